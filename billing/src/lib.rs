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
//! | what may be spent without asking | `lease`, `hold`, of a `fund` |
//! | what a scope may spend in a period | `budget` |
//! | durable before answered | `outbox` |
//! | exactly once | `ship` |
//! | what a customer can prove | `receipt` |
//! | what customers are told | `notice`, `alert` |
//! | is it all true? | `audit` |
//! | files for others | `export` |
//! | which grant pays; expiry | `credit` |
//! | months, invoices, tax | `invoice` |
//! | two databases, one SQL | `database`, `counter` |

mod alert;
mod audit;
mod books;
mod budget;
mod catalog;
mod clock;
mod counter;
mod credit;
mod database;
mod error;
mod event;
mod export;
mod fund;
mod hold;
mod invoice;
mod lease;
mod ledger;
mod money;
pub mod notice;
mod outbox;
mod price;
mod receipt;
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
pub use budget::{Budget, BudgetPeriod, BudgetScope, BudgetStatus};
pub use catalog::{Catalog, Plan, Standing};
pub use clock::Clock;
pub use credit::{CreditTerms, Expiry, GrantStatus};
pub use database::{
    Arg, Conn, Database, DatabaseError, DatabaseOptions, Dialect, Migrations, Raw, Row, Tx, create_private,
};
pub use error::{AdmitError, BillingError, SettleError};
pub use event::{
    AccountId, AdmitRequest, FinishReason, Media, Outcome, Quantities, RequestId, ServiceTier, UsageEvent,
};
pub use export::{
    Dataset, ExportError, ExportFilter, ExportOptions, ExportRange, ExportReport, FileRecord, Format,
    Manifest, Progress, Range, Settings, verify as verify_export,
};
pub use hold::{Hold, PinnedPrices, VoidCause};
pub use invoice::{
    BillingProfile, CloseReport, ClosedPeriod, Closing, CreditNote, FontError, Invoice, InvoiceError,
    InvoiceKind, InvoiceLine, InvoiceQuery, InvoiceRules, InvoiceState, InvoiceStatus, InvoiceTotals,
    IssueCreditNote, LineKind, Party, Payment, Period, PeriodError, RecordPayment, TaxRate, TaxRules,
    TaxRulesError, check_font, is_country, render_pdf,
};
pub use ledger::{AccountKind, Balance, CreditGrant};
pub use money::{Money, MoneyError, PICO_PER_USD, Total};
pub use price::{
    Adjustment, AdjustmentError, BookRow, Change, Line, Meter, Price, PriceBook, PriceBookError,
    PriceBookHash, PriceError, PriceTerms, Prices, Product, Rate, SkuUsage, Step, Tier, TierPart, TierTerms,
    Tiers, cost, tier_adjustments,
};
pub use receipt::{
    Mismatch, RECEIPT_BYTES_MAX, Receipt, ReceiptError, ReceiptKey, ReceiptKeyError, ReceiptKeys,
    ReceiptSigner,
};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
};
pub use usage::{UsageGroup, UsageQuery, UsageRow};

use crate::{
    hold::{Covered, Granted},
    invoice::horizon,
    lease::{Ask, Holder, Reserved, Slice, Slices},
    outbox::{Outbox, OutboxFile},
    ship::{Flush, ShipStats, Shipper},
};

/// No request uses more of anything; what claims to is refused. Keeps every count far from an i64's end.
const UNITS_MAX: u64 = 1 << 40;
/// How often one ask goes to the ledger again because others took what it had fetched.
const REFILLS_MAX: usize = 4;

#[derive(Debug)]
pub struct BillingOptions {
    /// The database, shared with this gateway's other parts and with other gateways.
    pub database: Database,
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
    /// How soon new price books and budgets are taken up, and how often idle leases are looked for.
    pub refresh: Duration,
    /// What a gateway has leased and not used for this long goes back, so that others can have it.
    pub lease_idle: Duration,
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
            refresh: Duration::from_millis(500),
            lease_idle: Duration::from_secs(30),
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
    budgets: Arc<ArcSwap<Vec<Budget>>>,
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
        let mut conn = database.read().await?;
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
        let budgets = Arc::new(ArcSwap::from_pointee(budget::all(&mut conn).await?));
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
            budgets: budgets.clone(),
            stats: ship_stats.clone(),
            clock: clock.clone(),
            last_seq,
            limits: limits.clone(),
        };
        shipper.recover(stale_epoch.as_deref()).await?;
        // What this outbox held is in the ledger; what it will hold is admitted from now on.
        let now_s = clock.now_s();
        let mut conn = database.read().await?;
        horizon::report(&mut conn, &holder.epoch, Period::of_second(now_s).start_s(), now_s).await?;
        if let Some(epoch) = &stale_epoch {
            horizon::report(&mut conn, epoch, horizon::FOREVER_S, now_s).await?;
        }
        drop(conn);
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
            budgets,
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
        let flushed = self.flush().await;
        let task = self.shipper.lock().expect("no code panics while it holds the shipper").take();
        if let Some(task) = task {
            task.abort();
            drop(task.await);
        }
        // Without the ledger there is nobody to give leases back to; the next start recovers them.
        let released = match &flushed {
            Ok(()) => {
                let Shared { books, holder, slices, clock, .. } = &*self.shared;
                let released = lease::release(&books.database, &holder.epoch, slices, i64::MAX).await;
                if released.is_ok() && slices.open_months.is_empty() {
                    let mut conn = books.database.read().await?;
                    horizon::report(&mut conn, &holder.epoch, horizon::FOREVER_S, clock.now_s()).await?;
                }
                released
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
        let admitted_in = Period::containing(request.admitted_at);
        let Some(place) = shared.slices.place(shared.limits.outbox_events_max, admitted_in) else {
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
        let slices = shared.slices(&request);
        let Media { characters, seconds, images } = request.media_max;
        let counts = [request.input_tokens, characters, seconds, images];
        let covered = match counts.iter().all(|count| *count <= UNITS_MAX) {
            true => shared.cover(&slices, ask).await.map_err(AdmitError::Unavailable)?,
            false => Covered::Short(slices[0].clone()),
        };
        let granted = match covered {
            Covered::Granted(granted) => granted,
            Covered::Short(slice) => {
                shared.counters.refused_credit.fetch_add(1, Ordering::Relaxed);
                return Err(shared.insufficient(&request.account, &slice, &ask).await);
            }
        };
        shared.counters.admitted.fetch_add(1, Ordering::Relaxed);
        shared.counters.open.fetch_add(1, Ordering::Relaxed);
        let hold = Hold::new(shared.clone(), slices.clone(), book, request, granted, place);
        slices.into_iter().for_each(|slice| shared.prefetch(slice));
        Ok(hold)
    }

    /// Ships every bill that is durable now, without waiting for the shipper's pause.
    pub async fn flush(&self) -> Result<(), BillingError> {
        let (reply, flushed) = oneshot::channel();
        self.flushes.send(reply).await.map_err(|_| BillingError::Closed)?;
        flushed.await.map_err(|_| BillingError::Closed)?
    }

    /// Tells the ledger up to which month this gateway has shipped everything, so that months can be closed. False while a
    /// request of an earlier month is open.
    pub async fn report_horizon(&self) -> Result<bool, BillingError> {
        let Shared { books, holder, slices, clock, .. } = &*self.shared;
        let now_s = clock.now_s();
        let month = Period::of_second(now_s);
        if slices.open_months.any_before(month) {
            return Ok(false);
        }
        // Whatever was admitted before this month is durable by now, and so is shipped when this returns.
        self.flush().await?;
        let mut conn = books.database.read().await?;
        horizon::report(&mut conn, &holder.epoch, month.start_s(), now_s).await?;
        Ok(true)
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
        let catalog = Catalog::load(&mut self.books().database.read().await?).await?;
        self.shared.catalog.store(Arc::new(catalog));
        Ok(hash)
    }

    /// Creates or changes a budget; see [`Books::put_budget`]. This gateway keeps to it from now on.
    pub async fn put_budget(&self, budget: &Budget) -> Result<(), BillingError> {
        self.books().put_budget(budget).await?;
        self.reload_budgets().await
    }

    /// Ends a budget; false where there is none.
    pub async fn delete_budget(&self, id: &str) -> Result<bool, BillingError> {
        let deleted = self.books().delete_budget(id).await?;
        self.reload_budgets().await?;
        Ok(deleted)
    }

    async fn reload_budgets(&self) -> Result<(), BillingError> {
        let budgets = budget::all(&mut self.books().database.read().await?).await?;
        self.shared.budgets.store(Arc::new(budgets));
        Ok(())
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
    /// Covers an ask from every one of the slices, which lease more when they are short.
    ///
    /// # Cancel safety
    /// Cancel safe: a trip to the ledger goes on in a task of its own, and money nobody waits for falls back.
    pub(crate) async fn cover(
        self: &Arc<Shared>,
        slices: &[Arc<Slice>],
        ask: Ask,
    ) -> Result<Covered, BillingError> {
        if let Some(reserved) = self.take(slices, &ask, ask.units_max) {
            return Ok(Covered::Granted(Granted { units: ask.units_max, reserved, exhausted: false }));
        }
        let (shared, slices) = (self.clone(), slices.to_vec());
        let trip = tokio::spawn(async move { shared.lease_and_cover(&slices, ask).await });
        trip.await.map_err(|_| BillingError::Closed)?
    }

    /// So many units of every slice, or nothing.
    fn take(&self, slices: &[Arc<Slice>], ask: &Ask, units: u64) -> Option<Vec<Reserved>> {
        let now_s = self.clock.now_s();
        slices.iter().map(|slice| slice.take(ask, units, now_s)).collect()
    }

    async fn lease_and_cover(&self, slices: &[Arc<Slice>], ask: Ask) -> Result<Covered, BillingError> {
        let (mut dry, mut failure) = (false, None);
        for _ in 0..REFILLS_MAX {
            for slice in slices {
                let _refilling = slice.refilling.clone().lock_owned().await;
                if slice.affords(&ask, self.clock.now_s()) == Some(ask.units_max) {
                    continue;
                }
                match self.refill(slice, &ask).await {
                    Ok(no_more) => dry |= no_more,
                    // Requests go on under their leases while the ledger is away.
                    Err(error) => failure = Some(error),
                }
            }
            if let Some(reserved) = self.take(slices, &ask, ask.units_max) {
                return Ok(Covered::Granted(Granted { units: ask.units_max, reserved, exhausted: false }));
            }
            if dry || failure.is_some() {
                break;
            }
        }
        // Others take from the same slices, so what was there a moment ago may be gone.
        for _ in 0..REFILLS_MAX {
            let mut units = ask.units_max;
            for slice in slices {
                match (slice.affords(&ask, self.clock.now_s()), failure) {
                    (Some(affordable), none_or_error) => {
                        units = units.min(affordable);
                        failure = none_or_error;
                    }
                    (None, Some(error)) => return Err(error),
                    (None, None) => return Ok(Covered::Short(slice.clone())),
                }
            }
            match failure {
                Some(error) if units == 0 => return Err(error),
                none_or_error => failure = none_or_error,
            }
            if let Some(reserved) = self.take(slices, &ask, units) {
                let exhausted = dry && units < ask.units_max;
                return Ok(Covered::Granted(Granted { units, reserved, exhausted }));
            }
        }
        match failure {
            Some(error) => Err(error),
            None => Ok(Covered::Short(slices[0].clone())),
        }
    }

    async fn refill(&self, slice: &Arc<Slice>, ask: &Ask) -> Result<bool, BillingError> {
        self.counters.refills.fetch_add(1, Ordering::Relaxed);
        let expires_at_s = self.clock.expiry_s(self.limits.lease_ttl);
        let times = (self.clock.now_s(), expires_at_s);
        lease::refill(&self.books.database, &self.holder, slice, ask, self.limits.lease_slice, times).await
    }

    /// Leases more in the background when a slice runs low, so that no request has to wait for it.
    fn prefetch(self: &Arc<Shared>, slice: Arc<Slice>) {
        if !slice.is_low() {
            return;
        }
        let Ok(refilling) = slice.refilling.clone().try_lock_owned() else { return };
        let shared = self.clone();
        tokio::spawn(async move {
            if let Err(error) = shared.refill(&slice, &Ask::NOTHING).await {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, fund = %slice.fund, "cannot lease ahead; the lease at hand goes on");
            }
            drop(refilling);
        });
    }

    /// The funds that pay for a request: the account, and every hard budget that it falls under.
    fn slices(&self, request: &AdmitRequest) -> Vec<Arc<Slice>> {
        let mut slices = vec![self.slices.of_account(&request.account)];
        for budget in self.budgets.load().iter().filter(|budget| budget.hard) {
            if budget.applies_to(&request.org, &request.project, &request.api_key) {
                slices.push(self.slices.of_budget(budget, budget.window(request.admitted_at)));
            }
        }
        slices
    }

    /// The refusal, with what is available here and in the ledger.
    async fn insufficient(&self, account: &AccountId, slice: &Slice, ask: &Ask) -> AdmitError {
        let needed = Total::from_pico(ask.cost(ask.units_min)).to_money().unwrap_or(Money::MAX);
        let available = async { slice.fund.available(&mut self.books.database.read().await?).await };
        let available = match available.await {
            Ok(available) => (Total::from(available) + slice.free().into()).to_money().unwrap_or(Money::MAX),
            Err(error) => return AdmitError::Unavailable(error),
        };
        let Some((budget, window)) = slice.window() else {
            return AdmitError::InsufficientCredit { needed, available };
        };
        if !slice.told_exhausted.swap(true, Ordering::Relaxed) {
            let told = async {
                let at = self.clock.now();
                let mut tx = self.books.database.write().await?;
                budget::exhausted(&mut tx, budget, window, account, at).await?;
                Ok::<(), BillingError>(tx.commit().await?)
            };
            if let Err(error) = told.await {
                slice.told_exhausted.store(false, Ordering::Relaxed);
                tracing::warn!(error = &error as &dyn std::error::Error, %budget, "nobody is told that it is used up");
            }
        }
        AdmitError::OverBudget { budget: budget.to_string(), needed, available }
    }
}
