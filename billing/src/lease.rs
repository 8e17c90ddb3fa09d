//! Leases: money that this gateway may spend without asking the ledger.
//!
//! A lease is durable (`leases`, and set aside in the account); its gateway holds it as a [`Slice`] in memory. Admitting,
//! extending and settling move money within the slice and take no trip to the database. Only a slice that runs short
//! leases more, one trip at a time for each account.
//!
//! ```text
//! lease in the ledger = free + held by open holds + settled and not yet shipped
//! ```
//!
//! A gateway that crashed takes its lease back when it starts again, after its outbox has been shipped. One that never
//! comes back loses it to the account when it has not renewed it for `lease_ttl`.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
};

use sqlx::{SqliteConnection, SqlitePool};

use crate::{
    error::BillingError,
    event::AccountId,
    ledger::{self, give_back, set_aside},
    money::{Money, Total},
    price::Step,
};

/// Who leases, and until when.
#[derive(Clone, Debug)]
pub(crate) struct Holder {
    pub epoch: String,
    pub gateway: String,
}

/// One account's leased money in this process.
#[derive(Debug)]
pub(crate) struct Slice {
    pub account: AccountId,
    funds: Mutex<Funds>,
    /// Held by the one task that talks to the ledger about this account.
    pub refilling: Arc<tokio::sync::Mutex<()>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Funds {
    free: i64,
    held: i64,
    unshipped: i64,
    expires_at_s: i64,
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

    /// Covers the whole ask, without a trip, or nothing.
    pub fn take_all(self: &Arc<Slice>, ask: &Ask, now_s: i64) -> Option<Reserved> {
        let mut funds = self.funds();
        if funds.expires_at_s <= now_s || ask.affordable(funds.free) != Some(ask.units_max) {
            return None;
        }
        Some(self.reserve(&mut funds, ask.cost(ask.units_max)))
    }

    /// Covers as much of the ask as there is money for.
    pub fn take_most(self: &Arc<Slice>, ask: &Ask, now_s: i64) -> Option<(u64, Reserved)> {
        let mut funds = self.funds();
        let units = ask.affordable(funds.free).filter(|_| funds.expires_at_s > now_s)?;
        Some((units, self.reserve(&mut funds, ask.cost(units))))
    }

    fn reserve(self: &Arc<Slice>, funds: &mut Funds, amount: i128) -> Reserved {
        let amount = i64::try_from(amount).expect("what is affordable is at most the free money");
        funds.free -= amount;
        funds.held += amount;
        Reserved { slice: self.clone(), amount }
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

    pub fn is_low(&self, low_water: Money) -> bool {
        let funds = self.funds();
        !funds.dry && funds.free < low_water.pico()
    }

    pub fn free(&self) -> Money {
        Money::from_pico(self.funds().free)
    }

    fn renewed(&self, expires_at_s: i64) {
        self.funds().expires_at_s = expires_at_s;
    }
}

impl Reserved {
    /// Adds money of the same slice.
    pub fn absorb(&mut self, mut more: Reserved) {
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

/// The slices of this gateway, one for each account that it has served.
#[derive(Debug, Default)]
pub(crate) struct Slices {
    by_account: Mutex<HashMap<AccountId, Arc<Slice>>>,
    /// Bills that wait for the ledger, those of open holds included.
    pub waiting: Arc<AtomicU64>,
}

/// A place among the bills that may wait for the ledger. Dropped, it is free again.
#[derive(Debug)]
pub(crate) struct Place(Option<Arc<AtomicU64>>);

impl Place {
    /// The bill is durable: its place is given up when it is shipped.
    pub fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(waiting) = &self.0 {
            waiting.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Slices {
    pub fn get(&self, account: &AccountId) -> Arc<Slice> {
        let mut slices = self.by_account.lock().expect("no code panics while it holds the slices");
        if let Some(slice) = slices.get(account) {
            return slice.clone();
        }
        let slice =
            Arc::new(Slice { account: account.clone(), funds: Mutex::default(), refilling: Arc::default() });
        slices.insert(account.clone(), slice.clone());
        slice
    }

    pub fn all(&self) -> Vec<Arc<Slice>> {
        self.by_account.lock().expect("no code panics while it holds the slices").values().cloned().collect()
    }

    /// A place for one more bill, if fewer than `limit` wait.
    pub fn place(&self, limit: u64) -> Option<Place> {
        let taken = |waiting: u64| (waiting < limit).then_some(waiting + 1);
        let place = self.waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, taken);
        place.ok().map(|_| Place(Some(self.waiting.clone())))
    }

    pub fn renewed(&self, expires_at_s: i64) {
        for slice in self.all() {
            slice.renewed(expires_at_s);
        }
    }
}

/// Leases more for `slice`: at least what `ask` is short of, and up to `slice_size` beyond. Takes what there is if that
/// covers the least of the ask, and nothing if it does not. True: the account has no more. The caller holds
/// `slice.refilling`.
pub(crate) async fn refill(
    database: &SqlitePool,
    holder: &Holder,
    slice: &Arc<Slice>,
    ask: &Ask,
    slice_size: Money,
    expires_at_s: i64,
) -> Result<bool, BillingError> {
    let account = &slice.account;
    // A broke account is refused by a read, which never waits for a writer.
    let before = ledger::balance(&mut *database.acquire().await?, account).await?;
    let free = slice.free();
    let short = |units| ask.cost(units) - i128::from(free.pico());
    if short(ask.units_min) > i128::from(before.available.pico()) {
        slice.funds().dry = true;
        return Ok(true);
    }
    let mut tx = database.begin_with("BEGIN IMMEDIATE").await?;
    let available = ledger::balance(&mut tx, account).await?.available;
    let wanted = short(ask.units_max).max(i128::from(slice_size.pico()));
    let taken =
        i64::try_from(wanted).map_or(available, |wanted| available.min(Money::from_pico(wanted.max(0))));
    if !set_aside(&mut tx, account, taken).await? {
        return Ok(true);
    }
    let lost = !enlarge(&mut tx, holder, account, taken, expires_at_s).await?;
    tx.commit().await?;
    let mut funds = slice.funds();
    if lost {
        // Expired and given back while we did not renew it: what was free is ours no longer.
        funds.free = 0;
    }
    funds.free += taken.pico();
    funds.expires_at_s = expires_at_s;
    funds.dry = taken == available;
    Ok(funds.dry)
}

/// Adds to the durable lease; false if there was none.
async fn enlarge(
    conn: &mut SqliteConnection,
    holder: &Holder,
    account: &AccountId,
    amount: Money,
    expires_at_s: i64,
) -> Result<bool, BillingError> {
    let enlarged = sqlx::query(
        "UPDATE leases SET amount_pico = amount_pico + ?, expires_at_s = ? WHERE holder = ? AND account = ?",
    )
    .bind(amount.pico())
    .bind(expires_at_s)
    .bind(&holder.epoch)
    .bind(account.as_str())
    .execute(&mut *conn)
    .await?;
    if enlarged.rows_affected() == 1 {
        return Ok(true);
    }
    sqlx::query(
        "INSERT INTO leases (holder, account, gateway, amount_pico, expires_at_s) VALUES (?, ?, ?, ?, ?)",
    )
    .bind(&holder.epoch)
    .bind(account.as_str())
    .bind(&holder.gateway)
    .bind(amount.pico())
    .bind(expires_at_s)
    .execute(conn)
    .await?;
    Ok(false)
}

/// Takes up to `cost` out of the lease, for bills that are being posted. Returns how much there was.
pub(crate) async fn draw(
    conn: &mut SqliteConnection,
    holder: &str,
    account: &AccountId,
    cost: Money,
) -> Result<Money, BillingError> {
    let lease: Option<(i64,)> =
        sqlx::query_as("SELECT amount_pico FROM leases WHERE holder = ? AND account = ?")
            .bind(holder)
            .bind(account.as_str())
            .fetch_optional(&mut *conn)
            .await?;
    let drawn = lease.map_or(0, |(amount,)| amount.min(cost.pico()));
    sqlx::query("UPDATE leases SET amount_pico = amount_pico - ? WHERE holder = ? AND account = ?")
        .bind(drawn)
        .bind(holder)
        .bind(account.as_str())
        .execute(conn)
        .await?;
    Ok(Money::from_pico(drawn))
}

/// Keeps every lease of this holder for longer.
pub(crate) async fn renew(
    conn: &mut SqliteConnection,
    holder: &str,
    expires_at_s: i64,
) -> Result<(), BillingError> {
    sqlx::query("UPDATE leases SET expires_at_s = ? WHERE holder = ?")
        .bind(expires_at_s)
        .bind(holder)
        .execute(conn)
        .await?;
    Ok(())
}

/// At start, in one transaction: gives back what this holder had leased before it ended (its outbox is shipped by now),
/// and every lease that expired before `now_s`.
pub(crate) async fn recover(
    conn: &mut SqliteConnection,
    holder: &str,
    now_s: i64,
) -> Result<(), BillingError> {
    let ended: Vec<(String, String, i64)> = sqlx::query_as(
        "SELECT holder, account, amount_pico FROM leases WHERE holder = ? OR expires_at_s < ?",
    )
    .bind(holder)
    .bind(now_s)
    .fetch_all(&mut *conn)
    .await?;
    for (holder, account, amount) in ended {
        give_back(conn, &AccountId::new(account.clone()), Money::from_pico(amount)).await?;
        sqlx::query("DELETE FROM leases WHERE holder = ? AND account = ?")
            .bind(holder)
            .bind(account)
            .execute(&mut *conn)
            .await?;
    }
    Ok(())
}

/// Gives the free part of every slice back, when the gateway closes. Money of holds still open stays leased.
pub(crate) async fn release(
    database: &SqlitePool,
    holder: &str,
    slices: &Slices,
) -> Result<(), BillingError> {
    for slice in slices.all() {
        let _refilling = slice.refilling.lock().await;
        let free = Money::from_pico(std::mem::take(&mut slice.funds().free));
        let mut tx = database.begin_with("BEGIN IMMEDIATE").await?;
        let drawn = draw(&mut tx, holder, &slice.account, free).await?;
        give_back(&mut tx, &slice.account, drawn).await?;
        tx.commit().await?;
    }
    Ok(())
}

/// (account, amount) of every lease.
pub(crate) async fn leases(conn: &mut SqliteConnection) -> Result<Vec<(String, i64)>, BillingError> {
    Ok(sqlx::query_as("SELECT account, amount_pico FROM leases").fetch_all(conn).await?)
}
