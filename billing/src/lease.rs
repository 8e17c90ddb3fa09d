//! Leases: money that this gateway may spend without asking the ledger.
//!
//! A lease is durable (`fund_leases`, and set aside in its fund); its gateway holds it as a [`Slice`] in memory. Admitting,
//! extending and settling move money within slices and take no trip to the database. Only a slice that runs short
//! leases more, one trip at a time for each fund.
//!
//! ```text
//! lease in the ledger = free + held by open holds + settled and not yet shipped
//! ```
//!
//! A gateway that crashed takes its leases back when it starts again, after its outbox has been shipped. One that never
//! comes back loses them to their funds when it has not renewed them for `lease_ttl`. What lies idle is given back, so that
//! other gateways can have it.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use crate::{
    args,
    budget::{self, Budget, Window},
    database::{Conn, Database, Tx},
    error::BillingError,
    event::AccountId,
    fund::Fund,
    invoice::{Period, horizon::OpenMonths},
    money::{Money, Total},
    price::Step,
};

/// Beyond what a request needs, a gateway takes at most this part of what its fund has left: others may need it too.
const SHARE: i64 = 4;
/// Clocks of gateways differ by less than this: only so long after a lease has expired may others take it.
const EXPIRY_GRACE_S: i64 = 60;

/// Who leases, and until when.
#[derive(Clone, Debug)]
pub(crate) struct Holder {
    pub epoch: String,
    pub gateway: String,
}

/// One fund's leased money in this process.
#[derive(Debug)]
pub(crate) struct Slice {
    pub fund: Fund,
    /// What a budget's fund is a window of, and whether the ledger is known to have its row.
    window: Option<(Budget, Window)>,
    has_row: AtomicBool,
    /// Its budget's owner has been told that it refused a request.
    pub told_exhausted: AtomicBool,
    funds: Mutex<Funds>,
    /// Held by the one task that talks to the ledger about this fund.
    pub refilling: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Funds {
    free: i64,
    held: i64,
    unshipped: i64,
    expires_at_s: i64,
    used_at_s: i64,
    /// Below this, more is leased ahead.
    low_water: i64,
    /// The ledger had no more at the last trip, so prefetching would be in vain.
    dry: bool,
}

/// Money of a slice that one request holds. Dropped, it goes back.
#[derive(Debug)]
pub(crate) struct Reserved {
    slice: Arc<Slice>,
    amount: i64,
}

/// What a request wants covered: `fixed` and then, beyond the units it has, as many as the money allows, of
/// `units_min..=units_max`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ask {
    pub fixed: Total,
    pub step: Step,
    pub units_before: u64,
    pub units_min: u64,
    pub units_max: u64,
}

impl Ask {
    /// Nothing: leases ahead.
    pub const NOTHING: Ask =
        Ask { fixed: Total::ZERO, step: Step::FREE, units_before: 0, units_min: 0, units_max: 0 };

    pub fn cost(&self, units: u64) -> i128 {
        (self.fixed + self.step.cost(self.units_before, units)).pico()
    }

    /// How many units `free` covers, if it covers the fixed part and the least number.
    fn affordable(&self, free: i64) -> Option<u64> {
        let rest = Total::from_pico(free.into()) - self.fixed;
        if rest < Total::ZERO {
            return None;
        }
        let units = self.step.affordable(self.units_before, rest, self.units_max);
        (units >= self.units_min).then_some(units)
    }
}

impl Slice {
    fn funds(&self) -> MutexGuard<'_, Funds> {
        self.funds.lock().expect("no code panics while it holds the funds")
    }

    /// How many units of the ask there is money for, without a trip.
    pub fn affords(&self, ask: &Ask, now_s: i64) -> Option<u64> {
        let funds = self.funds();
        ask.affordable(funds.free).filter(|_| funds.expires_at_s > now_s)
    }

    /// Covers exactly so many units, or nothing.
    pub fn take(self: &Arc<Slice>, ask: &Ask, units: u64, now_s: i64) -> Option<Reserved> {
        let mut funds = self.funds();
        if funds.expires_at_s <= now_s || ask.cost(units) > i128::from(funds.free) {
            return None;
        }
        let amount = i64::try_from(ask.cost(units)).expect("what is affordable is at most the free money");
        funds.free -= amount;
        funds.held += amount;
        funds.used_at_s = now_s;
        Some(Reserved { slice: self.clone(), amount })
    }

    /// Bills of this slice that have arrived in the ledger.
    pub fn shipped(&self, cost: Money) {
        self.funds().unshipped -= cost.pico();
    }

    /// Bills that the ledger refused as duplicates: their money is free again.
    pub fn refused(&self, cost: Money) {
        let mut funds = self.funds();
        funds.unshipped -= cost.pico();
        funds.free += cost.pico();
    }

    pub fn is_low(&self) -> bool {
        let funds = self.funds();
        !funds.dry && funds.free < funds.low_water
    }

    /// The budget, and its window, that this is a slice of.
    pub fn window(&self) -> Option<(&Budget, &Window)> {
        self.window.as_ref().map(|(budget, window)| (budget, window))
    }

    pub fn free(&self) -> Money {
        Money::from_pico(self.funds().free)
    }

    fn is_idle(&self, since_s: i64) -> bool {
        let funds = self.funds();
        funds.free > 0 && funds.used_at_s < since_s
    }

    fn renewed(&self, expires_at_s: i64) {
        self.funds().expires_at_s = expires_at_s;
    }
}

impl Reserved {
    /// Adds money of the same slice.
    pub fn absorb(&mut self, mut more: Reserved) {
        debug_assert_eq!(self.slice.fund, more.slice.fund);
        self.amount += std::mem::take(&mut more.amount);
    }

    /// The hold ends in a bill: `cost` stays out of the slice until it is shipped, the rest is free again.
    pub fn settle(mut self, cost: Money) {
        let amount = std::mem::take(&mut self.amount);
        let mut funds = self.slice.funds();
        funds.held -= amount;
        funds.unshipped += cost.pico();
        funds.free += amount - cost.pico();
    }

    /// Whether the bill is durable is unknown: the money stays held until the next start.
    pub fn strand(mut self) {
        self.amount = 0;
    }

    pub fn covers(&self, cost: Money) -> bool {
        cost.pico() <= self.amount
    }

    pub fn fund(&self) -> &Fund {
        &self.slice.fund
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if self.amount != 0 {
            let mut funds = self.slice.funds();
            funds.held -= self.amount;
            funds.free += self.amount;
        }
    }
}

/// The slices of this gateway, one for each fund that it has served.
#[derive(Debug, Default)]
pub(crate) struct Slices {
    by_fund: Mutex<HashMap<Fund, Arc<Slice>>>,
    /// Bills that wait for the ledger, those of open holds included.
    pub waiting: Arc<AtomicU64>,
    pub open_months: Arc<OpenMonths>,
}

/// A place among the bills that may wait for the ledger. Dropped, it is free again.
#[derive(Debug)]
pub(crate) struct Place {
    waiting: Option<Arc<AtomicU64>>,
    /// The month that the hold was admitted in; it stays open as long as the hold.
    month: Option<(Arc<OpenMonths>, Period)>,
}

impl Place {
    /// The bill is durable: its place is given up when it is shipped.
    pub fn keep(mut self) {
        self.waiting = None;
    }

    /// Whether the bill is durable is unknown: place and month stay taken until the next start.
    pub fn strand(mut self) {
        self.waiting = None;
        self.month = None;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(waiting) = &self.waiting {
            waiting.fetch_sub(1, Ordering::Relaxed);
        }
        if let Some((months, period)) = &self.month {
            months.leave(*period);
        }
    }
}

impl Slices {
    fn lock(&self) -> MutexGuard<'_, HashMap<Fund, Arc<Slice>>> {
        self.by_fund.lock().expect("no code panics while it holds the slices")
    }

    pub fn of_account(&self, account: &AccountId) -> Arc<Slice> {
        self.get_or(Fund::Account(account.clone()), || None)
    }

    pub fn of_budget(&self, budget: &Budget, window: Window) -> Arc<Slice> {
        self.get_or(budget.fund(&window), || Some((budget.clone(), window)))
    }

    /// The slice of a fund, if this process has leased of it.
    pub fn get(&self, fund: &Fund) -> Option<Arc<Slice>> {
        self.lock().get(fund).cloned()
    }

    fn get_or(&self, fund: Fund, window: impl FnOnce() -> Option<(Budget, Window)>) -> Arc<Slice> {
        let mut slices = self.lock();
        if let Some(slice) = slices.get(&fund) {
            return slice.clone();
        }
        let slice = Arc::new(Slice {
            fund: fund.clone(),
            window: window(),
            has_row: AtomicBool::new(false),
            told_exhausted: AtomicBool::new(false),
            funds: Mutex::default(),
            refilling: Arc::default(),
        });
        slices.insert(fund, slice.clone());
        slice
    }

    pub fn all(&self) -> Vec<Arc<Slice>> {
        self.lock().values().cloned().collect()
    }

    /// A place for one more bill, if fewer than `limit` wait. It keeps the month of its admission open.
    pub fn place(&self, limit: u64, admitted_in: Period) -> Option<Place> {
        let taken = |waiting: u64| (waiting < limit).then_some(waiting + 1);
        let place = self.waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, taken);
        place.ok()?;
        self.open_months.enter(admitted_in);
        let month = Some((self.open_months.clone(), admitted_in));
        Some(Place { waiting: Some(self.waiting.clone()), month })
    }

    pub fn renewed(&self, expires_at_s: i64) {
        for slice in self.all() {
            slice.renewed(expires_at_s);
        }
    }

    /// Forgets slices that nobody uses and that hold nothing: those of windows that are over, and of idle accounts.
    pub fn forget_empty(&self) {
        self.lock().retain(|_, slice| {
            let funds = *slice.funds();
            Arc::strong_count(slice) > 1 || funds.free + funds.held + funds.unshipped != 0
        });
    }
}

/// Leases more for `slice`: what `ask` is short of, and ahead of the next requests up to `slice_size` or a share of what
/// is left. Takes what there is if that covers the least of the ask, and nothing if it does not. True: the fund has no
/// more. The caller holds `slice.refilling`.
pub(crate) async fn refill(
    database: &Database,
    holder: &Holder,
    slice: &Arc<Slice>,
    ask: &Ask,
    slice_size: Money,
    (now_s, expires_at_s): (i64, i64),
) -> Result<bool, BillingError> {
    if let Some((budget, window)) = &slice.window
        && !slice.has_row.load(Ordering::Relaxed)
    {
        let mut tx = database.write().await?;
        budget::ensure_window(&mut tx, budget, window).await?;
        tx.commit().await?;
        slice.has_row.store(true, Ordering::Relaxed);
    }
    // A broke fund is refused by a read, which never waits for a writer.
    let before = slice.fund.available(&mut database.read().await?).await?;
    let free = slice.free();
    let short = |units| ask.cost(units) - i128::from(free.pico());
    if short(ask.units_min) > i128::from(before.pico()) {
        slice.funds().dry = true;
        return Ok(true);
    }
    let mut tx = database.write().await?;
    slice.fund.lock(&mut tx).await?;
    let available = slice.fund.available(&mut tx).await?;
    let ahead = slice_size.pico().min(available.pico() / SHARE);
    let wanted = short(ask.units_max).max(i128::from(ahead));
    let taken =
        i64::try_from(wanted).map_or(available, |wanted| available.min(Money::from_pico(wanted.max(0))));
    if !slice.fund.set_aside(&mut tx, taken).await? {
        return Ok(true);
    }
    let lost = !enlarge(&mut tx, holder, &slice.fund, taken, expires_at_s).await?;
    tx.commit().await?;
    let mut funds = slice.funds();
    if lost {
        // Expired and given back while we did not renew it: what was free is ours no longer.
        funds.free = 0;
    }
    funds.free += taken.pico();
    funds.expires_at_s = expires_at_s;
    funds.used_at_s = now_s;
    funds.low_water = ahead / 2;
    funds.dry = taken == available;
    Ok(funds.dry)
}

/// Adds to the durable lease; false if there was none.
async fn enlarge(
    conn: &mut Conn,
    holder: &Holder,
    fund: &Fund,
    amount: Money,
    expires_at_s: i64,
) -> Result<bool, BillingError> {
    let fund = fund.to_string();
    let enlarged = conn
        .execute(
            "UPDATE fund_leases SET amount_pico = amount_pico + $1, expires_at_s = $2 WHERE holder = $3 AND fund = $4",
            args![amount.pico(), expires_at_s, &holder.epoch, &fund],
        )
        .await?;
    if enlarged == 1 {
        return Ok(true);
    }
    conn.execute(
        "INSERT INTO fund_leases (holder, fund, gateway, amount_pico, expires_at_s) VALUES ($1, $2, $3, $4, $5)",
        args![&holder.epoch, &fund, &holder.gateway, amount.pico(), expires_at_s],
    )
    .await?;
    Ok(false)
}

/// Takes up to `cost` out of the lease, for bills that are being posted. Returns how much there was. The caller has
/// locked the fund.
pub(crate) async fn draw(
    conn: &mut Conn,
    holder: &str,
    fund: &Fund,
    cost: Money,
) -> Result<Money, BillingError> {
    let fund = fund.to_string();
    let lease: Option<(i64,)> = conn
        .fetch_optional(
            "SELECT amount_pico FROM fund_leases WHERE holder = $1 AND fund = $2",
            args![holder, &fund],
        )
        .await?;
    let drawn = lease.map_or(0, |(amount,)| amount.min(cost.pico()));
    conn.execute(
        "UPDATE fund_leases SET amount_pico = amount_pico - $1 WHERE holder = $2 AND fund = $3",
        args![drawn, holder, &fund],
    )
    .await?;
    Ok(Money::from_pico(drawn))
}

/// Keeps every lease of this holder for longer; those that are used up expire.
pub(crate) async fn renew(conn: &mut Conn, holder: &str, expires_at_s: i64) -> Result<(), BillingError> {
    conn.execute(
        "UPDATE fund_leases SET expires_at_s = $1 WHERE holder = $2 AND expires_at_s < $1 AND amount_pico > 0",
        args![expires_at_s, holder],
    )
    .await?;
    Ok(())
}

/// At start, in one transaction: gives back what this holder had leased before it ended (its outbox is shipped by now),
/// and every lease that has expired.
pub(crate) async fn recover(conn: &mut Conn, holder: &str, now_s: i64) -> Result<(), BillingError> {
    end(conn, holder, now_s).await
}

/// Gives back every lease that has expired.
pub(crate) async fn expire(conn: &mut Conn, now_s: i64) -> Result<(), BillingError> {
    // No outbox is called nothing.
    end(conn, "", now_s).await
}

async fn end(conn: &mut Conn, holder: &str, now_s: i64) -> Result<(), BillingError> {
    let expired_s = now_s.saturating_sub(EXPIRY_GRACE_S);
    let ended: Vec<(String, String)> = conn
        .fetch_all(
            "SELECT holder, fund FROM fund_leases WHERE holder = $1 OR expires_at_s < $2",
            args![holder, expired_s],
        )
        .await?;
    let mut by_fund: BTreeMap<Fund, Vec<String>> = BTreeMap::new();
    for (owner, key) in ended {
        let corrupt = || BillingError::Corrupt { table: "fund_leases", source: key.clone().into() };
        by_fund.entry(Fund::parse(&key).ok_or_else(corrupt)?).or_default().push(owner);
    }
    for (fund, owners) in by_fund {
        fund.lock(conn).await?;
        for owner in owners {
            // It may have been renewed, or taken by somebody else, before the lock was ours.
            let lease: Option<(i64,)> = conn
                .fetch_optional(
                    "DELETE FROM fund_leases WHERE holder = $1 AND fund = $2 AND (holder = $3 OR expires_at_s < $4) \
                     RETURNING amount_pico",
                    args![&owner, &fund.to_string(), holder, expired_s],
                )
                .await?;
            if let Some((amount,)) = lease {
                fund.give_back(conn, Money::from_pico(amount)).await?;
            }
        }
    }
    Ok(())
}

/// Gives the free part of every slice back that nobody has used since `since_s`; of all of them with the end of time.
/// Money of open holds stays leased.
pub(crate) async fn release(
    database: &Database,
    holder: &str,
    slices: &Slices,
    since_s: i64,
) -> Result<(), BillingError> {
    for slice in slices.all() {
        if !slice.is_idle(since_s) {
            continue;
        }
        let _refilling = slice.refilling.lock().await;
        let free = Money::from_pico(std::mem::take(&mut slice.funds().free));
        match give_back(database, holder, &slice.fund, free).await {
            Ok(tx) => tx.commit().await?,
            // Nothing has happened. Of a commit without an answer nobody knows: then the money is ours no longer, and
            // what the ledger may still have leased comes back with the next start.
            Err(error) => {
                slice.funds().free += free.pico();
                return Err(error);
            }
        }
        slice.funds().low_water = 0;
    }
    slices.forget_empty();
    Ok(())
}

async fn give_back(
    database: &Database,
    holder: &str,
    fund: &Fund,
    amount: Money,
) -> Result<Tx, BillingError> {
    let mut tx = database.write().await?;
    fund.lock(&mut tx).await?;
    let drawn = draw(&mut tx, holder, fund, amount).await?;
    fund.give_back(&mut tx, drawn).await?;
    Ok(tx)
}

/// (fund, amount) of every lease.
pub(crate) async fn leases(conn: &mut Conn) -> Result<Vec<(String, i64)>, BillingError> {
    Ok(conn.fetch_all("SELECT fund, amount_pico FROM fund_leases", args![]).await?)
}
