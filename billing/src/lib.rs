#![forbid(unsafe_code)]
//! Money for Sluice: every token is billed exactly once, and no account spends a token more than it has.
//!
//! Knows accounts, prices, tokens and bills. Knows nothing of HTTP, gRPC or models.
//!
//! ```text
//! admit ──► Hold ──► extend* ──► settle ──► outbox (fsync) ──► shipper ──► ledger, usage, lease
//!            │ from the Slice, in memory                                      │
//!            └─ void, or drop ──► back to the Slice ◄──── lease, when short ──┘
//! ```
//!
//! | concept | module |
//! | --- | --- |
//! | an amount | `money` |
//! | what a token costs | `price`, `catalog` |
//! | who owns what; double entry | `ledger` |
//! | what was consumed | `event`, `usage` |
//! | what may be spent without asking | `lease`, `hold` |
//! | durable before answered | `outbox` |
//! | exactly once | `ship` |
//! | is it all true? | `audit` |

mod audit;
mod books;
mod catalog;
mod clock;
mod error;
mod event;
mod hold;
mod lease;
mod ledger;
mod money;
mod outbox;
mod price;
mod ship;
mod usage;

use std::{
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
pub use audit::{Audit, Check};
pub use books::Books;
pub use catalog::{Catalog, Plan, Standing};
pub use clock::Clock;
pub use error::{AdmitError, BillingError, SettleError};
pub use event::{
    AccountId, AdmitRequest, FinishReason, Media, Outcome, Quantities, RequestId, ServiceTier, UsageEvent,
};
pub use hold::{Hold, VoidCause};
pub use ledger::{AccountKind, Balance, CreditGrant};
pub use money::{Money, MoneyError, PICO_PER_USD, Total};
pub use price::{
    Adjustment, AdjustmentError, Change, Line, Meter, Price, PriceBook, PriceBookError, PriceBookHash,
    PriceError, PriceTerms, Prices, Product, Rate, Row, SkuUsage, Step, Tier, TierPart, TierTerms, Tiers,
    cost, tier_adjustments,
};
use sqlx::SqlitePool;
use tokio::{
    sync::{mpsc, oneshot},
    task::{AbortHandle, JoinHandle},
};
pub use usage::{UsageGroup, UsageQuery, UsageRow};

use crate::{
    hold::Granted,
    lease::{Ask, Holder, Slice, Slices},
    outbox::{Outbox, OutboxFile},
    ship::{Flush, ShipStats, Shipper},
};

/// No request uses more of anything; what claims to is refused. Keeps every count far from an i64's end.
const UNITS_MAX: u64 = 1 << 40;
/// How often one ask goes to the ledger again because others took what it had fetched.
const REFILLS_MAX: usize = 4;

#[derive(Debug)]
pub struct BillingOptions {
    /// The database, shared with the gateway. See [`Books::open`] for what its connections need.
    pub database: SqlitePool,
    /// The outbox file, of this gateway alone.
    pub outbox_path: PathBuf,
    /// The name of this gateway in the ledger.
    pub gateway: String,
    pub limits: BillingLimits,
}

#[derive(Clone, Debug)]
pub struct BillingLimits {
    /// Output tokens that a hold covers at admission, if the account affords them.
    pub hold_output_tokens: u64,
    /// What the gateway leases of an account's money at a time; it fetches more when half of it is used.
    pub lease_slice: Money,
    /// A lease that its gateway has not renewed for this long goes back to the account. Renewed four times as often.
    /// No stream may last longer while the ledger does not answer.
    pub lease_ttl: Duration,
    /// Bills that may wait for the ledger, those of open holds included. Beyond: [`AdmitError::OutboxFull`].
    pub outbox_events_max: u64,
    /// Bills that share one fsync at most.
    pub commit_events_max: usize,
    /// Bills that one ledger transaction posts at most.
    pub ship_events_max: usize,
    /// How long a bill waits for others before it is shipped.
    pub ship_linger: Duration,
    /// The longest pause between two attempts while the ledger does not answer.
    pub ship_backoff_max: Duration,
    /// How often a gateway looks for price books that others have applied.
    pub price_poll: Duration,
}

impl Default for BillingLimits {
    fn default() -> BillingLimits {
        BillingLimits {
            hold_output_tokens: 256,
            lease_slice: Money::from_pico(PICO_PER_USD),
            lease_ttl: Duration::from_secs(24 * 3600),
            outbox_events_max: 100_000,
            commit_events_max: 256,
            ship_events_max: 1_000,
            ship_linger: Duration::from_millis(100),
            ship_backoff_max: Duration::from_secs(5),
            price_poll: Duration::from_secs(1),
        }
    }
}

/// Counters for `/metrics`. At rest, admitted = settled + voided + expired + stranded + holds_open.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct BillingStats {
    pub admitted: u64,
    pub refused_credit: u64,
    pub refused_outbox_full: u64,
    pub settled: u64,
    pub voided: u64,
    /// Holds dropped without settle or void.
    pub expired: u64,
    /// Holds whose bill the outbox failed to take.
    pub stranded: u64,
    pub holds_open: u64,
    /// Bills durable here and not yet in the ledger.
    pub outbox_backlog: u64,
    pub outbox_oldest_age_ms: u64,
    /// Commits of the outbox, each one fsync for a group of bills.
    pub outbox_commits: u64,
    pub outbox_commit_us_total: u64,
    pub outbox_commit_us_max: u64,
    pub shipped: u64,
    pub ship_failures: u64,
    /// Trips to the ledger for a larger slice.
    pub lease_refills: u64,
}

/// The meter of one gateway. Cheap to clone; all clones are one.
#[derive(Clone, Debug)]
pub struct Billing {
    shared: Arc<Shared>,
    /// Gone with the last `Billing`; then the shipper ends.
    flushes: mpsc::Sender<Flush>,
    shipper: Arc<Mutex<Option<JoinHandle<()>>>>,
}

/// What holds need of the gateway that made them.
#[derive(Debug)]
pub(crate) struct Shared {
    books: Books,
    holder: Holder,
    limits: BillingLimits,
    clock: Clock,
    catalog: Arc<ArcSwap<Catalog>>,
    /// Takes up price books that other processes apply.
    watch: AbortHandle,
    slices: Arc<Slices>,
    pub(crate) outbox: Outbox,
    ship_stats: Arc<ShipStats>,
    pub(crate) counters: Counters,
    closed: AtomicBool,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    admitted: AtomicU64,
    refused_credit: AtomicU64,
    refused_outbox_full: AtomicU64,
    pub(crate) voided: AtomicU64,
    pub(crate) expired: AtomicU64,
    pub(crate) open: AtomicU64,
    refills: AtomicU64,
}

impl Billing {
    /// Opens the books and the outbox, ships what the last run left in it, takes back its leases, starts the shipper.
    pub async fn open(options: BillingOptions) -> Result<Billing, BillingError> {
        Billing::open_at(options, Clock::system()).await
    }

    /// `open` with a clock of one's own.
    pub async fn open_at(options: BillingOptions, clock: Clock) -> Result<Billing, BillingError> {
        let BillingOptions { database, outbox_path, gateway, limits } = options;
        let books = Books::open(database.clone()).await?;
        let mut file = OutboxFile::open(&outbox_path).await?;
        let mut conn = database.acquire().await?;
        let known = ship::known(&mut conn, &file.state.epoch).await?.unwrap_or(0);
        if known < file.state.pruned_seq {
            return Err(BillingError::LedgerBehindOutbox { shipped: file.state.pruned_seq, known });
        }
        let stale_epoch = (known > file.state.last_seq).then(|| file.state.epoch.clone());
        if let Some(epoch) = &stale_epoch {
            tracing::warn!(
                epoch,
                known,
                last_seq = file.state.last_seq,
                "the outbox is an old copy; beginning a new one"
            );
            file.begin_epoch().await?;
        }
        let last_seq = if stale_epoch.is_some() { 0 } else { known };
        let holder = Holder { epoch: file.state.epoch.clone(), gateway };
        ship::register(&mut conn, &holder).await?;
        let catalog = Arc::new(ArcSwap::from_pointee(Catalog::load(&mut conn).await?));
        drop(conn);

        let (outbox, _writer) = file.start(limits.commit_events_max);
        let slices = Arc::new(Slices::default());
        let ship_stats = Arc::new(ShipStats::default());
        let mut shipper = Shipper {
            database: database.clone(),
            holder: holder.clone(),
            outbox: outbox.clone(),
            slices: slices.clone(),
            catalog: catalog.clone(),
            stats: ship_stats.clone(),
            clock: clock.clone(),
            last_seq,
            batch_max: limits.ship_events_max,
            linger: limits.ship_linger,
            backoff_max: limits.ship_backoff_max,
            lease_ttl: limits.lease_ttl,
        };
        shipper.recover(stale_epoch.as_deref()).await?;
        let watching = catalog::watch(database, Arc::downgrade(&catalog), limits.price_poll);
        let watch = tokio::spawn(watching).abort_handle();
        let (flushes, requests) = mpsc::channel(1);
        let task = tokio::spawn(shipper.run(requests));
        let closed = AtomicBool::new(false);
        let counters = Counters::default();
        let shared = Shared {
            books,
            holder,
            limits,
            clock,
            catalog,
            watch,
            slices,
            outbox,
            ship_stats,
            counters,
            closed,
        };
        Ok(Billing { shared: Arc::new(shared), flushes, shipper: Arc::new(Mutex::new(Some(task))) })
    }

    /// Ships every bill, gives unused leases back and closes the outbox. Call it after the last hold has ended; a hold
    /// that is still open cannot settle any more, and keeps its money leased until the next start.
    pub async fn close(&self) -> Result<(), BillingError> {
        if self.shared.closed.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        self.shared.watch.abort();
        let flushed = self.flush().await;
        let task = self.shipper.lock().expect("no code panics while it holds the shipper").take();
        if let Some(task) = task {
            task.abort();
            drop(task.await);
        }
        // Without the ledger there is nobody to give leases back to; the next start recovers them.
        let released = match &flushed {
            Ok(()) => {
                lease::release(&self.shared.books.database, &self.shared.holder.epoch, &self.shared.slices)
                    .await
            }
            Err(_) => Ok(()),
        };
        self.shared.outbox.close().await?;
        flushed.and(released)
    }

    /// Holds money for a request: the whole prompt, and at least one output token.
    ///
    /// # Cancel safety
    /// Cancel safe: without a [`Hold`], nothing is held.
    pub async fn admit(&self, mut request: AdmitRequest) -> Result<Hold, AdmitError> {
        let shared = &self.shared;
        if shared.closed.load(Ordering::Acquire) {
            return Err(AdmitError::Unavailable(BillingError::Closed));
        }
        let (model, service_tier) = (request.model.clone(), request.service_tier);
        let no_price = || AdmitError::NoPrice { model: model.clone(), service_tier };
        let book = shared.catalog.load().in_force(request.admitted_at).cloned().ok_or_else(no_price)?;
        let prices = book.prices(&request.account, &model, service_tier).ok_or_else(no_price)?;
        let bound = prices
            .bound(request.input_tokens, &request.media_max, request.output_tokens_max > 0)
            .map_err(|_| no_price())?;
        let Some(place) = shared.slices.place(shared.limits.outbox_events_max) else {
            shared.counters.refused_outbox_full.fetch_add(1, Ordering::Relaxed);
            return Err(AdmitError::OutboxFull { retry_after: shared.limits.ship_backoff_max });
        };
        request.output_tokens_max = request.output_tokens_max.min(UNITS_MAX);
        let ask = Ask {
            fixed: bound.fixed,
            step: bound.generated,
            units_before: 0,
            units_min: request.output_tokens_max.min(1),
            units_max: request.output_tokens_max.min(shared.limits.hold_output_tokens.max(1)),
        };
        let slice = shared.slices.get(&request.account);
        let Media { characters, seconds, images } = request.media_max;
        let counts = [request.input_tokens, characters, seconds, images];
        let granted = match counts.iter().all(|count| *count <= UNITS_MAX) {
            true => shared.cover(&slice, ask).await.map_err(AdmitError::Unavailable)?,
            false => None,
        };
        let Some(granted) = granted else {
            shared.counters.refused_credit.fetch_add(1, Ordering::Relaxed);
            return Err(shared.insufficient(&slice, &ask).await);
        };
        shared.counters.admitted.fetch_add(1, Ordering::Relaxed);
        shared.counters.open.fetch_add(1, Ordering::Relaxed);
        let hold = Hold::new(shared.clone(), slice.clone(), book, request, granted, place);
        shared.prefetch(slice);
        Ok(hold)
    }

    /// Ships every bill that is durable now, without waiting for the shipper's pause.
    pub async fn flush(&self) -> Result<(), BillingError> {
        let (reply, flushed) = oneshot::channel();
        self.flushes.send(reply).await.map_err(|_| BillingError::Closed)?;
        flushed.await.map_err(|_| BillingError::Closed)?
    }

    /// The books of this gateway's database.
    pub fn books(&self) -> &Books {
        &self.shared.books
    }

    /// See [`Books::create_account`].
    pub async fn create_account(&self, account: &AccountId, kind: AccountKind) -> Result<(), BillingError> {
        self.books().create_account(account, kind).await
    }

    /// See [`Books::credit`].
    pub async fn credit(&self, grant: &CreditGrant) -> Result<(), BillingError> {
        self.books().credit(grant).await
    }

    /// See [`Books::balance`].
    pub async fn balance(&self, account: &AccountId) -> Result<Balance, BillingError> {
        self.books().balance(account).await
    }

    /// See [`Books::accounts`].
    pub async fn accounts(&self) -> Result<Vec<Balance>, BillingError> {
        self.books().accounts().await
    }

    /// See [`Books::usage`].
    pub async fn usage(&self, query: &UsageQuery) -> Result<Vec<UsageRow>, BillingError> {
        self.books().usage(query).await
    }

    /// The price books, as this gateway knows them.
    pub fn catalog(&self) -> Arc<Catalog> {
        self.shared.catalog.load_full()
    }

    /// Stores a price book. Requests admitted from now on may be priced by it; those admitted before are not touched.
    pub async fn apply_price_book(&self, book: &PriceBook) -> Result<PriceBookHash, BillingError> {
        let hash = self.books().apply_price_book(book).await?;
        catalog::reload(&self.books().database, &self.shared.catalog).await?;
        Ok(hash)
    }

    pub fn stats(&self) -> BillingStats {
        let Shared { counters, outbox, ship_stats, .. } = &*self.shared;
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let written = outbox.stats();
        let (outbox_backlog, oldest) = outbox.backlog();
        BillingStats {
            admitted: of(&counters.admitted),
            refused_credit: of(&counters.refused_credit),
            refused_outbox_full: of(&counters.refused_outbox_full),
            settled: written.settled,
            voided: of(&counters.voided),
            expired: of(&counters.expired),
            stranded: written.stranded,
            holds_open: of(&counters.open),
            outbox_backlog,
            outbox_oldest_age_ms: u64::try_from(oldest.as_millis()).unwrap_or(u64::MAX),
            outbox_commits: written.commits,
            outbox_commit_us_total: written.commit_us_total,
            outbox_commit_us_max: written.commit_us_max,
            shipped: of(&ship_stats.shipped),
            ship_failures: of(&ship_stats.failures),
            lease_refills: of(&counters.refills),
        }
    }
}

impl Shared {
    /// Covers an ask from the slice, which leases more when it is short. None: the account cannot pay the least of it.
    ///
    /// # Cancel safety
    /// Cancel safe: a trip to the ledger goes on in a task of its own, and money nobody waits for falls back.
    pub(crate) async fn cover(
        self: &Arc<Shared>,
        slice: &Arc<Slice>,
        ask: Ask,
    ) -> Result<Option<Granted>, BillingError> {
        if let Some(reserved) = slice.take_all(&ask, self.clock.now_s()) {
            return Ok(Some(Granted { units: ask.units_max, reserved, exhausted: false }));
        }
        let (shared, slice) = (self.clone(), slice.clone());
        let trip = tokio::spawn(async move { shared.lease_and_cover(&slice, ask).await });
        trip.await.map_err(|_| BillingError::Closed)?
    }

    async fn lease_and_cover(&self, slice: &Arc<Slice>, ask: Ask) -> Result<Option<Granted>, BillingError> {
        let _refilling = slice.refilling.clone().lock_owned().await;
        let mut dry = false;
        for _ in 0..REFILLS_MAX {
            if let Some(reserved) = slice.take_all(&ask, self.clock.now_s()) {
                return Ok(Some(Granted { units: ask.units_max, reserved, exhausted: false }));
            }
            if dry {
                break;
            }
            match self.refill(slice, &ask).await {
                Ok(no_more) => dry = no_more,
                // Requests go on under their lease while the ledger is away.
                Err(error) => {
                    let covered = slice.take_most(&ask, self.clock.now_s()).filter(|(units, _)| *units > 0);
                    let granted = |(units, reserved)| Some(Granted { units, reserved, exhausted: false });
                    return covered.map(granted).ok_or(error);
                }
            }
        }
        let covered = slice.take_most(&ask, self.clock.now_s());
        Ok(covered.map(|(units, reserved)| Granted {
            units,
            reserved,
            exhausted: dry && units < ask.units_max,
        }))
    }

    async fn refill(&self, slice: &Arc<Slice>, ask: &Ask) -> Result<bool, BillingError> {
        self.counters.refills.fetch_add(1, Ordering::Relaxed);
        let expires_at_s = self.clock.expiry_s(self.limits.lease_ttl);
        lease::refill(&self.books.database, &self.holder, slice, ask, self.limits.lease_slice, expires_at_s)
            .await
    }

    /// Leases more in the background when the slice runs low, so that no request has to wait for it.
    fn prefetch(self: &Arc<Shared>, slice: Arc<Slice>) {
        let low_water = Money::from_pico(self.limits.lease_slice.pico() / 2);
        if !slice.is_low(low_water) {
            return;
        }
        let Ok(refilling) = slice.refilling.clone().try_lock_owned() else { return };
        let shared = self.clone();
        tokio::spawn(async move {
            let nothing =
                Ask { fixed: Total::ZERO, step: Step::FREE, units_before: 0, units_min: 0, units_max: 0 };
            if let Err(error) = shared.refill(&slice, &nothing).await {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, account = %slice.account, "cannot lease ahead; the lease at hand goes on");
            }
            drop(refilling);
        });
    }

    /// The refusal, with what is available here and in the ledger.
    async fn insufficient(&self, slice: &Slice, ask: &Ask) -> AdmitError {
        let needed = Total::from_pico(ask.cost(ask.units_min)).to_money().unwrap_or(Money::MAX);
        match self.books.balance(&slice.account).await {
            Ok(balance) => {
                let available = Total::from(balance.available) + slice.free().into();
                AdmitError::InsufficientCredit {
                    needed,
                    available: available.to_money().unwrap_or(Money::MAX),
                }
            }
            Err(error) => AdmitError::Unavailable(error),
        }
    }
}
