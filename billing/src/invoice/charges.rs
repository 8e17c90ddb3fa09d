//! What an account is charged for a month: its events, priced again from their quantities and books, and its tiers.
//!
//! ```text
//! ordinals of the ledger   ──────┬───────────────────┬──────────►
//!                           last close          this close
//! admitted before the month  invoiced     late usage
//! admitted in the month      usage        usage
//! admitted after it          next         next
//! ```

use std::collections::BTreeMap;

use super::{
    line::{Charge, LineKind},
    period::Period,
    store::ClosedRow,
};
use crate::{
    catalog::{self, Catalog},
    database::Conn,
    error::BillingError,
    event::AccountId,
    money::Total,
    price::{Adjustment, AdjustmentError, Meter, PriceBook, PriceBookHash, SkuUsage, tier_adjustments},
    usage::{self, EventRow},
};

/// Events read at a time.
const PAGE: i64 = 4_096;

/// Which events an invoice takes, by their numbers in the ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Window {
    pub period: Period,
    /// The last number when the month before was closed: what was admitted earlier and came later is late.
    pub last_close: i64,
    /// Everything up to here is on earlier invoices.
    pub after: i64,
}

impl Window {
    /// The window of a month that follows a closed one, or nothing.
    pub fn after(period: Period, previous: Option<&ClosedRow>) -> Window {
        let (last_close, after) = previous.map_or((0, 0), |row| (row.last_event, row.settled_through));
        Window { period, last_close, after }
    }
}

/// The events of a window, as far as they have been read. Most of them are read before a close keeps others waiting.
pub(crate) struct Gathered {
    pub window: Window,
    sums: Sums,
    read_through: i64,
    /// The first event of a later month.
    next_month: Option<i64>,
    catalog: Catalog,
}

/// The charges of a month, before credit and tax.
#[derive(Clone, Debug, Default)]
pub(crate) struct MonthCharges {
    pub usage: Vec<Charge>,
    /// What the tiers of the month give back.
    pub adjustments: Vec<Charge>,
    /// Everything up to here is on this invoice or an earlier one.
    pub settled_through: i64,
}

/// Month, project, model, SKU and unit.
type Key = (Period, String, String, String, &'static str);

#[derive(Default)]
struct Sums {
    charged: BTreeMap<Key, (u64, Total)>,
    months: BTreeMap<Period, SkuSums>,
}

/// Quantities by SKU and price book, which the tiers of a month follow from.
type SkuSums = BTreeMap<(String, String), u64>;

impl Gathered {
    pub fn new(window: Window) -> Gathered {
        let (sums, catalog) = (Sums::default(), Catalog::default());
        Gathered { window, sums, read_through: window.after, next_month: None, catalog }
    }

    /// Reads on, up to a number. Those that are not posted yet are read by a later call.
    pub async fn read(
        &mut self,
        conn: &mut Conn,
        account: &AccountId,
        through: i64,
    ) -> Result<(), BillingError> {
        if catalog::has_grown(conn, &self.catalog).await? {
            self.catalog = Catalog::load(conn).await?;
        }
        loop {
            let page = usage::events_of(conn, account, self.read_through, through, PAGE).await?;
            let Some(last) = page.last() else { return Ok(()) };
            self.read_through = last.ordinal;
            for event in &page {
                let month = Period::of_ms(event.admitted_at_ms);
                if month > self.window.period {
                    self.next_month = self.next_month.or(Some(event.ordinal));
                } else if month == self.window.period || event.ordinal > self.window.last_close {
                    self.sums.add(&self.catalog, account, event, month)?;
                }
            }
        }
    }

    /// The charges of everything up to a number.
    pub async fn charges(
        mut self,
        conn: &mut Conn,
        account: &AccountId,
        through: i64,
    ) -> Result<MonthCharges, BillingError> {
        self.read(conn, account, through).await?;
        let Gathered { window, sums, next_month, catalog, .. } = self;
        let usage = usage_charges(sums.charged, window.period, account)?;
        let mut adjustments = Vec::new();
        for (month, used) in &sums.months {
            let before = match *month == window.period {
                true => SkuSums::new(),
                // The month was closed without these: they make the difference between two closes.
                false => month_before(conn, &catalog, account, *month, used, through).await?,
            };
            adjustments.extend(tier_charges(&catalog, account, *month, &before, used)?);
        }
        let settled_through = next_month.map_or(through, |first| first - 1);
        Ok(MonthCharges { usage, adjustments, settled_through })
    }
}

impl Sums {
    fn add(
        &mut self,
        catalog: &Catalog,
        account: &AccountId,
        event: &EventRow,
        month: Period,
    ) -> Result<(), BillingError> {
        let months = self.months.entry(month).or_default();
        for line in usage::lines_of(catalog, event)? {
            let key =
                (month, event.project.clone(), event.model.clone(), line.sku.clone(), line.meter.unit());
            let (quantity, amount) = self.charged.entry(key).or_default();
            *quantity = quantity.checked_add(line.quantity).ok_or_else(|| overflow(account))?;
            *amount += line.amount.into();
            let used = months.entry((line.sku, event.price_book.clone())).or_default();
            *used = used.checked_add(line.quantity).ok_or_else(|| overflow(account))?;
        }
        Ok(())
    }
}

/// What of a closed month is on earlier invoices: all of it, less what came late.
async fn month_before(
    conn: &mut Conn,
    catalog: &Catalog,
    account: &AccountId,
    month: Period,
    late: &SkuSums,
    through: i64,
) -> Result<SkuSums, BillingError> {
    let (mut all, mut after) = (Sums::default(), 0);
    loop {
        let page = usage::events_of(conn, account, after, through, PAGE).await?;
        let Some(last) = page.last() else { break };
        after = last.ordinal;
        for event in page.iter().filter(|event| Period::of_ms(event.admitted_at_ms) == month) {
            all.add(catalog, account, event, month)?;
        }
    }
    let mut before = all.months.remove(&month).unwrap_or_default();
    for (key, quantity) in late {
        if let Some(sum) = before.get_mut(key) {
            *sum = sum.saturating_sub(*quantity);
        }
    }
    Ok(before)
}

/// What the tiers make of a month that had `before` when it was closed last, and now has `more`.
fn tier_charges(
    catalog: &Catalog,
    account: &AccountId,
    month: Period,
    before: &SkuSums,
    more: &SkuSums,
) -> Result<Vec<Charge>, BillingError> {
    let books: Vec<&PriceBook> = catalog.books().iter().map(AsRef::as_ref).collect();
    let usage_of = |sums: &SkuSums| -> Vec<SkuUsage> {
        let usage = |((sku, book), quantity): (&(String, String), &u64)| SkuUsage {
            sku: sku.clone(),
            price_book: PriceBookHash::from_stored(book.clone()),
            quantity: *quantity,
        };
        sums.iter().map(usage).collect()
    };
    let corrupt =
        |error: AdjustmentError| BillingError::Corrupt { table: "usage_events", source: error.into() };
    let made = |usage: &[SkuUsage]| tier_adjustments(&books, account, usage).map_err(corrupt);
    let mut sums: BTreeMap<(String, PriceBookHash), (Meter, u64, Total)> = BTreeMap::new();
    let mut add = |adjustment: Adjustment, sign: i128| {
        let key = (adjustment.sku, adjustment.price_book);
        let (_, quantity, amount) = sums.entry(key).or_insert((adjustment.meter, 0, Total::ZERO));
        *quantity = (*quantity).max(adjustment.quantity);
        *amount += Total::from_pico(sign * adjustment.amount.pico());
    };
    made(&usage_of(before))?.into_iter().for_each(|adjustment| add(adjustment, -1));
    let all = [usage_of(before), usage_of(more)].concat();
    made(&all)?.into_iter().for_each(|adjustment| add(adjustment, 1));
    let changed = sums.into_iter().filter(|(_, (.., amount))| *amount != Total::ZERO);
    changed
        .map(|((sku, book), (meter, quantity, amount))| {
            let exact = amount.to_money().ok_or_else(|| overflow(account))?;
            let product = catalog.get(&book)?.product(&sku);
            let model = product.map_or_else(String::new, |product| product.model.clone());
            let (kind, unit) = (LineKind::Adjustment, meter.unit().to_owned());
            Ok(Charge { kind, period: month, project: String::new(), model, sku, unit, quantity, exact })
        })
        .collect()
}

/// What costs nothing is no line.
fn usage_charges(
    charged: BTreeMap<Key, (u64, Total)>,
    period: Period,
    account: &AccountId,
) -> Result<Vec<Charge>, BillingError> {
    let charged = charged.into_iter().filter(|(_, (_, amount))| *amount != Total::ZERO);
    charged
        .map(|((month, project, model, sku, unit), (quantity, amount))| {
            let kind = if month < period { LineKind::LateUsage } else { LineKind::Usage };
            let exact = amount.to_money().ok_or_else(|| overflow(account))?;
            Ok(Charge { kind, period: month, project, model, sku, unit: unit.to_owned(), quantity, exact })
        })
        .collect()
}

fn overflow(account: &AccountId) -> BillingError {
    BillingError::Overflow { account: account.clone() }
}
