//! The shipper: moves bills from the outbox into the ledger, each exactly once.
//!
//! One transaction does it all for a batch: it advances `ship_state` from the number it expects (compare-and-set),
//! records the events, posts them, and draws the lease that paid for them. If it commits, the batch can never be posted
//! again; if it does not, nothing happened. Whether the outbox forgets the batch afterwards does not matter.
//!
//! While the ledger does not answer, bills wait in the outbox and the shipper tries again, ever more slowly.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use crate::{
    BillingLimits,
    alert::{self, Change},
    args,
    budget::{self, Budget, Window},
    catalog::{self, Catalog},
    clock::{Clock, moment_ms, moment_s},
    counter,
    database::{Conn, Database},
    error::BillingError,
    event::{AccountId, FinishReason, UsageEvent},
    fund::Fund,
    lease::{self, Holder, Slices},
    ledger::{self, Posting},
    money::{Money, Total},
    outbox::Outbox,
    price::{Line, cost},
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
    pub database: Database,
    pub holder: Holder,
    pub outbox: Outbox,
    pub slices: Arc<Slices>,
    pub catalog: Arc<ArcSwap<Catalog>>,
    pub budgets: Arc<ArcSwap<Vec<Budget>>>,
    pub stats: Arc<ShipStats>,
    pub clock: Clock,
    /// Everything up to here is in the ledger.
    pub last_seq: i64,
    pub limits: BillingLimits,
}

/// Why the shipper wakes.
enum Wake {
    Ship(Option<Flush>),
    Refresh,
}

/// What became of a batch, per fund: the sums the ledger took, and those it refused as duplicates.
#[derive(Debug, Default)]
struct Posted {
    bills: u64,
    taken: BTreeMap<Fund, Total>,
    refused: BTreeMap<Fund, Total>,
}

/// The funds that the hold of a bill drew on.
fn funds_of(event: &UsageEvent) -> impl Iterator<Item = Fund> {
    let budgets = event.budgets.iter().filter_map(|key| Fund::parse(key));
    std::iter::once(Fund::Account(event.account.clone())).chain(budgets)
}

impl Shipper {
    /// Runs until the sender of flushes is gone.
    pub async fn run(mut self, mut flushes: mpsc::Receiver<Flush>) {
        let mut backoff: Option<Duration> = None;
        let renew_every = self.limits.lease_ttl / 4;
        let mut renew_at = Instant::now() + renew_every;
        let mut refresh = tokio::time::interval(self.limits.refresh.max(Duration::from_millis(10)));
        refresh.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let appended = self.outbox.appended.clone();
            let wake = tokio::select! {
                flush = flushes.recv() => match flush {
                    Some(flush) => Wake::Ship(Some(flush)),
                    None => return,
                },
                () = appended.notified(), if backoff.is_none() => {
                    // More bills are likely on their way; they share this transaction.
                    match tokio::time::timeout(self.limits.ship_linger, flushes.recv()).await {
                        Ok(Some(flush)) => Wake::Ship(Some(flush)),
                        Ok(None) => return,
                        Err(_) => Wake::Ship(None),
                    }
                }
                () = tokio::time::sleep(backoff.unwrap_or(renew_every)) => Wake::Ship(None),
                _ = refresh.tick() => Wake::Refresh,
            };
            if Instant::now() >= renew_at && self.renew().await.is_ok() {
                renew_at = Instant::now() + renew_every;
            }
            let Wake::Ship(flush) = wake else {
                if let Err(error) = self.refresh().await {
                    tracing::debug!(
                        error = &error as &dyn std::error::Error,
                        "prices and budgets are those known"
                    );
                }
                continue;
            };
            let shipped = self.ship_all().await;
            backoff = match &shipped {
                Ok(()) => None,
                Err(error) => {
                    self.stats.failures.fetch_add(1, Ordering::Relaxed);
                    tracing::warn!(
                        error = error as &dyn std::error::Error,
                        "bills wait: the ledger did not take them"
                    );
                    Some(backoff.map_or(BACKOFF_FIRST, |pause| pause * 2).min(self.limits.ship_backoff_max))
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
        let mut tx = self.database.write().await?;
        for epoch in replaced_epoch.into_iter().chain([self.holder.epoch.as_str()]) {
            lease::recover(&mut tx, epoch, self.clock.now_s()).await?;
        }
        Ok(tx.commit().await?)
    }

    /// Ships batch after batch until the outbox is empty.
    async fn ship_all(&mut self) -> Result<(), BillingError> {
        while let Some(posted) = self.ship_next().await? {
            for (fund, sum) in posted.taken {
                if let Some(slice) = self.slices.get(&fund) {
                    slice.shipped(slice_sum(sum));
                }
            }
            for (fund, sum) in posted.refused {
                if let Some(slice) = self.slices.get(&fund) {
                    slice.refused(slice_sum(sum));
                }
            }
            self.slices.waiting.fetch_sub(posted.bills, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Ships one batch; None if the outbox is empty.
    async fn ship_next(&mut self) -> Result<Option<Posted>, BillingError> {
        let batch = self.outbox.read(self.last_seq, self.limits.ship_events_max).await?;
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
        let mut tx = self.database.write().await?;
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
            for fund in funds_of(event) {
                *posted.taken.entry(fund).or_default() += event.cost.into();
            }
        }
        posted
    }

    /// Keeps this gateway's leases, and gives back those of gateways that are gone.
    async fn renew(&self) -> Result<(), BillingError> {
        let expires_at_s = self.clock.expiry_s(self.limits.lease_ttl);
        lease::renew(&mut self.database.read().await?, &self.holder.epoch, expires_at_s).await?;
        self.slices.renewed(expires_at_s);
        let mut tx = self.database.write().await?;
        lease::expire(&mut tx, self.clock.now_s()).await?;
        Ok(tx.commit().await?)
    }

    /// Takes up price books and budgets that another process has changed, and gives back what lies idle.
    async fn refresh(&self) -> Result<(), BillingError> {
        let mut conn = self.database.read().await?;
        if catalog::has_grown(&mut conn, &self.catalog.load()).await? {
            self.catalog.store(Arc::new(Catalog::load(&mut conn).await?));
        }
        let budgets = budget::all(&mut conn).await?;
        drop(conn);
        if **self.budgets.load() != budgets {
            self.budgets.store(Arc::new(budgets));
        }
        let idle_s = i64::try_from(self.limits.lease_idle.as_secs()).unwrap_or(i64::MAX);
        let since_s = self.clock.now_s().saturating_sub(idle_s);
        lease::release(&self.database, &self.holder.epoch, &self.slices, since_s).await
    }
}

/// All of these bills were covered by one slice, whose sum is one amount.
fn slice_sum(sum: Total) -> Money {
    sum.to_money().expect("bills of one slice sum to at most the slice")
}

/// How far the ledger knows an epoch; None if it does not know it at all.
pub(crate) async fn known(conn: &mut Conn, epoch: &str) -> Result<Option<i64>, BillingError> {
    let state: Option<(i64,)> =
        conn.fetch_optional("SELECT last_seq FROM ship_state WHERE epoch = $1", args![epoch]).await?;
    Ok(state.map(|(last_seq,)| last_seq))
}

/// Makes an outbox known to the ledger, and its gateway's present name.
pub(crate) async fn register(conn: &mut Conn, holder: &Holder) -> Result<(), BillingError> {
    conn.execute(
        "INSERT INTO ship_state (epoch, gateway, last_seq) VALUES ($1, $2, 0) \
         ON CONFLICT (epoch) DO UPDATE SET gateway = excluded.gateway",
        args![&holder.epoch, &holder.gateway],
    )
    .await?;
    Ok(())
}

/// (epoch, last number) of every outbox.
pub(crate) async fn epochs(conn: &mut Conn) -> Result<Vec<(String, i64)>, BillingError> {
    Ok(conn.fetch_all("SELECT epoch, last_seq FROM ship_state ORDER BY epoch", args![]).await?)
}

/// (epoch, gateway) of every outbox.
pub(crate) async fn gateways(conn: &mut Conn) -> Result<Vec<(String, String)>, BillingError> {
    Ok(conn.fetch_all("SELECT epoch, gateway FROM ship_state ORDER BY gateway, epoch", args![]).await?)
}

/// The compare-and-set that makes shipping exactly-once.
async fn advance(conn: &mut Conn, epoch: &str, from: i64, to: i64) -> Result<(), BillingError> {
    let moved = conn
        .execute(
            "UPDATE ship_state SET last_seq = $1 WHERE epoch = $2 AND last_seq = $3",
            args![to, epoch, from],
        )
        .await?;
    if moved == 1 { Ok(()) } else { Err(BillingError::ShippedElsewhere) }
}

/// Records and posts a batch: one ledger transaction for each account and minute, with an entry for each SKU.
async fn post_batch(
    conn: &mut Conn,
    epoch: &str,
    catalog: &Catalog,
    batch: &[(i64, UsageEvent)],
) -> Result<Posted, BillingError> {
    // In one order with whoever else posts, so that no two wait for each other.
    let first = counter::take(conn, "event", 0).await?;
    counter::take(conn, "transaction", 0).await?;
    let budgets = budget::all(conn).await?;
    let mut windows = windows_of(&budgets, batch);
    for Counting { budget, window, .. } in windows.values() {
        budget::ensure_window(conn, budget, window).await?;
    }
    let refused = usage::record(conn, epoch, batch, first).await?;
    let mut posted = Posted::default();
    let mut minutes: BTreeMap<(AccountId, i64), BTreeMap<String, Total>> = BTreeMap::new();
    for (seq, event) in batch {
        let taken = !refused.contains(seq);
        for fund in funds_of(event) {
            let sums = if taken { &mut posted.taken } else { &mut posted.refused };
            *sums.entry(fund).or_default() += event.cost.into();
        }
        if !taken {
            continue;
        }
        for (budget, window) in applying(&budgets, event) {
            let counting = windows.get_mut(&budget.fund(&window)).expect("every window was made above");
            counting.spent += event.cost.into();
        }
        let skus = minutes.entry((event.account.clone(), minute_of(event.admitted_at_ms))).or_default();
        for (sku, amount) in repriced(catalog, event)? {
            *skus.entry(sku).or_default() += amount.into();
        }
    }
    let (first, last) = (batch.first().map_or(0, |bill| bill.0), batch.last().map_or(0, |bill| bill.0));
    let reference = format!("{epoch}:{first}-{last}");
    let at_s = batch.last().map_or(0, |(_, event)| event.admitted_at_ms / 1000);
    spend(conn, epoch, &posted, &windows, at_s, &reference).await?;
    for ((account, at_s), skus) in minutes {
        post_minute(conn, &account, at_s, skus, &reference).await?;
    }
    raise_alerts(conn, catalog, batch).await?;
    Ok(posted)
}

/// A window that bills of a batch count in, and what they add to it.
struct Counting {
    budget: Budget,
    window: Window,
    spent: Total,
    /// Who pays, and is told of thresholds.
    account: AccountId,
}

type Windows = BTreeMap<Fund, Counting>;

/// Budgets that a bill counts against, whether or not its hold knew of them.
fn applying<'a>(budgets: &'a [Budget], event: &'a UsageEvent) -> impl Iterator<Item = (&'a Budget, Window)> {
    let applies = |budget: &&Budget| budget.applies_to(&event.org, &event.project, &event.api_key);
    budgets.iter().filter(applies).map(|budget| (budget, Window::of_event(budget, event)))
}

fn windows_of(budgets: &[Budget], batch: &[(i64, UsageEvent)]) -> Windows {
    let mut windows = BTreeMap::new();
    for (_, event) in batch {
        for (budget, window) in applying(budgets, event) {
            windows.entry(budget.fund(&window)).or_insert_with(|| Counting {
                budget: budget.clone(),
                window,
                spent: Total::ZERO,
                account: event.account.clone(),
            });
        }
    }
    windows
}

/// Takes what was used out of accounts, budgets and the leases on them, in the order of their keys.
async fn spend(
    conn: &mut Conn,
    epoch: &str,
    posted: &Posted,
    windows: &Windows,
    at_s: i64,
    reference: &str,
) -> Result<(), BillingError> {
    let funds = posted.taken.keys().chain(windows.keys()).collect::<BTreeSet<_>>();
    for fund in funds {
        let overflow = || BillingError::Corrupt { table: "outbox_events", source: fund.to_string().into() };
        let held = posted.taken.get(fund).copied().unwrap_or_default().to_money().ok_or_else(overflow)?;
        fund.lock(conn).await?;
        let drawn = lease::draw(conn, epoch, fund, held).await?;
        match (fund, windows.get(fund)) {
            (Fund::Account(account), _) => {
                ledger::spend(conn, account, held, drawn, at_s, reference).await?;
            }
            (Fund::Budget(_), Some(Counting { budget, window, spent, account })) => {
                let spent = spent.to_money().ok_or_else(overflow)?;
                budget::spend(conn, budget, window, spent, drawn, (account, moment_s(at_s))).await?;
            }
            // A budget that is no longer in force.
            (Fund::Budget(_), None) => fund.give_back(conn, drawn).await?,
        }
    }
    Ok(())
}

async fn post_minute(
    conn: &mut Conn,
    account: &AccountId,
    at_s: i64,
    skus: BTreeMap<String, Total>,
    reference: &str,
) -> Result<(), BillingError> {
    let overflow = || BillingError::Overflow { account: account.clone() };
    let mut entries = BTreeMap::new();
    for (sku, amount) in skus.iter().filter(|(_, amount)| **amount != Total::ZERO) {
        entries.insert(ledger::revenue(sku), amount.to_money().ok_or_else(overflow)?);
    }
    if entries.is_empty() {
        return Ok(());
    }
    let sum = entries.values().copied().sum::<Total>();
    let charge = sum.to_money().and_then(Money::checked_neg).ok_or_else(overflow)?;
    entries.insert(ledger::customer(account), charge);
    ledger::post(conn, Posting { kind: "usage", account, at_s, reference, entries }).await?;
    Ok(())
}

/// Tells of accounts that have little or nothing left by now.
async fn raise_alerts(
    conn: &mut Conn,
    catalog: &Catalog,
    batch: &[(i64, UsageEvent)],
) -> Result<(), BillingError> {
    let mut accounts: BTreeMap<&AccountId, (Option<Money>, i64)> = BTreeMap::new();
    for (_, event) in batch {
        let (stopped_at, ended_ms) = accounts.entry(&event.account).or_default();
        *ended_ms = event.admitted_at_ms.saturating_add_unsigned(event.duration_ms).max(*ended_ms);
        if event.finish_reason == FinishReason::Budget {
            let token = next_token(catalog, event)?;
            *stopped_at = Some(stopped_at.map_or(token, |other| token.min(other)));
        }
    }
    for (account, (stopped_at, ended_ms)) in accounts {
        alert::check(conn, account, Change::Spent { stopped_at }, moment_ms(ended_ms)).await?;
    }
    Ok(())
}

/// What one more token of this answer would have cost.
fn next_token(catalog: &Catalog, event: &UsageEvent) -> Result<Money, BillingError> {
    let mut longer = event.clone();
    longer.quantities.output_tokens += 1;
    let lines = priced(catalog, &longer)?;
    Ok(cost(&lines).and_then(|cost| cost.checked_sub(event.cost)).unwrap_or(Money::MAX))
}

/// The start of the UTC minute, in seconds.
pub(crate) fn minute_of(at_ms: i64) -> i64 {
    at_ms.div_euclid(MINUTE_MS) * 60
}

/// Prices an event again from its quantities and its book; the sum must be the cost that it carries.
fn repriced(catalog: &Catalog, event: &UsageEvent) -> Result<Vec<(String, Money)>, BillingError> {
    let lines = priced(catalog, event)?;
    if cost(&lines) != Some(event.cost) {
        return Err(corrupt(format!("request {} does not cost {}", event.request_id, event.cost)));
    }
    Ok(lines.into_iter().map(|line| (line.sku, line.amount)).collect())
}

fn priced(catalog: &Catalog, event: &UsageEvent) -> Result<Vec<Line>, BillingError> {
    let book = catalog.get(&event.price_book)?;
    let lines = book.price(&event.account, &event.model, event.service_tier, &event.quantities);
    lines.map_err(|error| corrupt(error.to_string()))
}

fn corrupt(why: String) -> BillingError {
    BillingError::Corrupt { table: "outbox_events", source: why.into() }
}
