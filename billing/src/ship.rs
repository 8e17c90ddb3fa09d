//! The shipper: moves bills from the outbox into the ledger, each exactly once.
//!
//! One transaction does it all for a batch: it advances `ship_state` from the number it expects (compare-and-set),
//! records the events, posts them, and draws the lease that paid for them. If it commits, the batch can never be posted
//! again; if it does not, nothing happened. Whether the outbox forgets the batch afterwards does not matter.
//!
//! While the ledger does not answer, bills wait in the outbox and the shipper tries again, ever more slowly.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use sqlx::{SqliteConnection, SqlitePool};
use tokio::sync::{mpsc, oneshot};

use crate::{
    catalog::{self, Catalog},
    clock::Clock,
    error::BillingError,
    event::{AccountId, UsageEvent},
    lease::{self, Holder, Slices},
    ledger::{self, Posting},
    money::{Money, Total},
    outbox::Outbox,
    price::cost,
    usage,
};

const BACKOFF_FIRST: Duration = Duration::from_millis(50);
const MINUTE_MS: i64 = 60_000;

/// Asks the shipper to ship now; the answer comes when the outbox was empty, or why it could not be emptied.
pub(crate) type Flush = oneshot::Sender<Result<(), BillingError>>;

#[derive(Debug, Default)]
pub(crate) struct ShipStats {
    pub shipped: AtomicU64,
    pub failures: AtomicU64,
}

pub(crate) struct Shipper {
    pub database: SqlitePool,
    pub holder: Holder,
    pub outbox: Outbox,
    pub slices: Arc<Slices>,
    pub catalog: Arc<ArcSwap<Catalog>>,
    pub stats: Arc<ShipStats>,
    pub clock: Clock,
    /// Everything up to here is in the ledger.
    pub last_seq: i64,
    pub batch_max: usize,
    pub linger: Duration,
    pub backoff_max: Duration,
    pub lease_ttl: Duration,
}

/// What became of a batch, per account: the sums the ledger took, and those it refused as duplicates.
#[derive(Debug, Default)]
struct Posted {
    bills: u64,
    taken: BTreeMap<AccountId, Total>,
    refused: BTreeMap<AccountId, Total>,
}

impl Shipper {
    /// Runs until the sender of flushes is gone.
    pub async fn run(mut self, mut flushes: mpsc::Receiver<Flush>) {
        let mut backoff: Option<Duration> = None;
        let renew_every = self.lease_ttl / 4;
        let mut renew_at = tokio::time::Instant::now() + renew_every;
        loop {
            let appended = self.outbox.appended.clone();
            let flush = tokio::select! {
                flush = flushes.recv() => match flush {
                    Some(flush) => Some(flush),
                    None => return,
                },
                () = appended.notified(), if backoff.is_none() => {
                    // More bills are likely on their way; they share this transaction.
                    match tokio::time::timeout(self.linger, flushes.recv()).await {
                        Ok(Some(flush)) => Some(flush),
                        Ok(None) => return,
                        Err(_) => None,
                    }
                }
                () = tokio::time::sleep(backoff.unwrap_or(renew_every)) => None,
            };
            if tokio::time::Instant::now() >= renew_at && self.renew().await.is_ok() {
                renew_at = tokio::time::Instant::now() + renew_every;
            }
            let shipped = self.ship_all().await;
            backoff = match &shipped {
                Ok(()) => None,
                Err(error) => {
                    self.stats.failures.fetch_add(1, Ordering::Relaxed);
                    tracing::warn!(
                        error = error as &dyn std::error::Error,
                        "bills wait: the ledger did not take them"
                    );
                    Some(backoff.map_or(BACKOFF_FIRST, |pause| pause * 2).min(self.backoff_max))
                }
            };
            if let Some(flush) = flush {
                drop(flush.send(shipped));
            }
        }
    }

    /// At start: ships what the last run left behind, then takes its leases back, and those of an outbox that this one
    /// replaces. No slice knows of these bills, so there is none to tell.
    pub async fn recover(&mut self, replaced_epoch: Option<&str>) -> Result<(), BillingError> {
        while self.ship_next().await?.is_some() {}
        let mut tx = self.database.begin_with("BEGIN IMMEDIATE").await?;
        for epoch in replaced_epoch.into_iter().chain([self.holder.epoch.as_str()]) {
            lease::recover(&mut tx, epoch, self.clock.now_s()).await?;
        }
        Ok(tx.commit().await?)
    }

    /// Ships batch after batch until the outbox is empty.
    async fn ship_all(&mut self) -> Result<(), BillingError> {
        while let Some(posted) = self.ship_next().await? {
            for (account, sum) in posted.taken {
                self.slices.get(&account).shipped(slice_sum(sum));
            }
            for (account, sum) in posted.refused {
                self.slices.get(&account).refused(slice_sum(sum));
            }
            self.slices.waiting.fetch_sub(posted.bills, Ordering::Relaxed);
        }
        catalog::reload(&self.database, &self.catalog).await
    }

    /// Ships one batch; None if the outbox is empty.
    async fn ship_next(&mut self) -> Result<Option<Posted>, BillingError> {
        let batch = self.outbox.read(self.last_seq, self.batch_max).await?;
        let Some(&(last_seq, _)) = batch.last() else { return Ok(None) };
        let mut posted = self.post(&batch, last_seq).await?;
        posted.bills = batch.len() as u64;
        self.last_seq = last_seq;
        self.stats.shipped.fetch_add(posted.bills, Ordering::Relaxed);
        self.outbox.shipped(last_seq);
        if let Err(error) = self.outbox.prune(last_seq).await {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "the outbox keeps bills that are shipped; the next batch takes them along");
        }
        Ok(Some(posted))
    }

    async fn post(&self, batch: &[(i64, UsageEvent)], last_seq: i64) -> Result<Posted, BillingError> {
        let mut tx = self.database.begin_with("BEGIN IMMEDIATE").await?;
        if known(&mut tx, &self.holder.epoch).await? == Some(last_seq) {
            // The last attempt did commit; only its answer was lost.
            return Ok(self.taken_whole(batch));
        }
        advance(&mut tx, &self.holder.epoch, self.last_seq, last_seq).await?;
        let posted = post_batch(&mut tx, &self.holder.epoch, &self.catalog.load(), batch).await?;
        tx.commit().await?;
        Ok(posted)
    }

    fn taken_whole(&self, batch: &[(i64, UsageEvent)]) -> Posted {
        let mut posted = Posted::default();
        for (_, event) in batch {
            *posted.taken.entry(event.account.clone()).or_default() += event.cost.into();
        }
        posted
    }

    async fn renew(&self) -> Result<(), BillingError> {
        let expires_at_s = self.clock.expiry_s(self.lease_ttl);
        lease::renew(&mut *self.database.acquire().await?, &self.holder.epoch, expires_at_s).await?;
        self.slices.renewed(expires_at_s);
        Ok(())
    }
}

/// All of these bills were covered by one slice, whose sum is one amount.
fn slice_sum(sum: Total) -> Money {
    sum.to_money().expect("bills of one slice sum to at most the slice")
}

/// How far the ledger knows an epoch; None if it does not know it at all.
pub(crate) async fn known(conn: &mut SqliteConnection, epoch: &str) -> Result<Option<i64>, BillingError> {
    let state: Option<(i64,)> = sqlx::query_as("SELECT last_seq FROM ship_state WHERE epoch = ?")
        .bind(epoch)
        .fetch_optional(conn)
        .await?;
    Ok(state.map(|(last_seq,)| last_seq))
}

/// Makes an outbox known to the ledger, and its gateway's present name.
pub(crate) async fn register(conn: &mut SqliteConnection, holder: &Holder) -> Result<(), BillingError> {
    sqlx::query(
        "INSERT INTO ship_state (epoch, gateway, last_seq) VALUES (?, ?, 0) \
         ON CONFLICT DO UPDATE SET gateway = excluded.gateway",
    )
    .bind(&holder.epoch)
    .bind(&holder.gateway)
    .execute(conn)
    .await?;
    Ok(())
}

/// (epoch, last number) of every outbox.
pub(crate) async fn epochs(conn: &mut SqliteConnection) -> Result<Vec<(String, i64)>, BillingError> {
    Ok(sqlx::query_as("SELECT epoch, last_seq FROM ship_state ORDER BY epoch").fetch_all(conn).await?)
}

/// The compare-and-set that makes shipping exactly-once.
async fn advance(conn: &mut SqliteConnection, epoch: &str, from: i64, to: i64) -> Result<(), BillingError> {
    let moved = sqlx::query("UPDATE ship_state SET last_seq = ? WHERE epoch = ? AND last_seq = ?")
        .bind(to)
        .bind(epoch)
        .bind(from)
        .execute(conn)
        .await?;
    if moved.rows_affected() == 1 { Ok(()) } else { Err(BillingError::ShippedElsewhere) }
}

/// Records and posts a batch: one ledger transaction for each account and minute, with an entry for each SKU.
async fn post_batch(
    conn: &mut SqliteConnection,
    epoch: &str,
    catalog: &Catalog,
    batch: &[(i64, UsageEvent)],
) -> Result<Posted, BillingError> {
    let mut posted = Posted::default();
    let mut minutes: BTreeMap<(AccountId, i64), BTreeMap<String, Total>> = BTreeMap::new();
    for (seq, event) in batch {
        if !usage::record(conn, epoch, *seq, event).await? {
            *posted.refused.entry(event.account.clone()).or_default() += event.cost.into();
            continue;
        }
        *posted.taken.entry(event.account.clone()).or_default() += event.cost.into();
        let skus = minutes.entry((event.account.clone(), minute_of(event.admitted_at_ms))).or_default();
        for (sku, amount) in repriced(catalog, event)? {
            *skus.entry(sku).or_default() += amount.into();
        }
    }
    let (first, last) = (batch.first().map_or(0, |bill| bill.0), batch.last().map_or(0, |bill| bill.0));
    let reference = format!("{epoch}:{first}-{last}");
    for (account, sum) in &posted.taken {
        let overflow = || BillingError::Overflow { account: account.clone() };
        let cost = sum.to_money().ok_or_else(overflow)?;
        let drawn = lease::draw(conn, epoch, account, cost).await?;
        let at_s = batch.last().map_or(0, |(_, event)| event.admitted_at_ms / 1000);
        ledger::spend(conn, account, cost, drawn, at_s, &reference).await?;
    }
    for ((account, at_s), skus) in minutes {
        let overflow = || BillingError::Overflow { account: account.clone() };
        let mut entries = BTreeMap::new();
        for (sku, amount) in skus.iter().filter(|(_, amount)| **amount != Total::ZERO) {
            entries.insert(ledger::revenue(sku), amount.to_money().ok_or_else(overflow)?);
        }
        if entries.is_empty() {
            continue;
        }
        let sum = entries.values().copied().sum::<Total>();
        let charge = sum.to_money().and_then(Money::checked_neg).ok_or_else(overflow)?;
        entries.insert(ledger::customer(&account), charge);
        ledger::post(
            conn,
            Posting { kind: "usage", account: &account, at_s, reference: &reference, entries },
        )
        .await?;
    }
    Ok(posted)
}

/// The start of the UTC minute, in seconds.
pub(crate) fn minute_of(at_ms: i64) -> i64 {
    at_ms.div_euclid(MINUTE_MS) * 60
}

/// Prices an event again from its quantities and its book; the sum must be the cost that it carries.
fn repriced(catalog: &Catalog, event: &UsageEvent) -> Result<Vec<(String, Money)>, BillingError> {
    let corrupt = |why: String| BillingError::Corrupt { table: "outbox_events", source: why.into() };
    let book = catalog.get(&event.price_book)?;
    let lines = book.price(&event.account, &event.model, event.service_tier, &event.quantities);
    let lines = lines.map_err(|error| corrupt(error.to_string()))?;
    if cost(&lines) != Some(event.cost) {
        return Err(corrupt(format!("request {} does not cost {}", event.request_id, event.cost)));
    }
    Ok(lines.into_iter().map(|line| (line.sku, line.amount)).collect())
}
