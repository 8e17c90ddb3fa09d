//! The audit: is everything that the books claim true?
//!
//! Runs on one snapshot, beside a running server too, reads every fact once in pages, and trusts no cached sum. A check
//! that fails names its evidence.

mod invoices;

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use crate::{
    Books, budget,
    catalog::{self, Catalog},
    credit,
    database::Conn,
    error::BillingError,
    event::AccountId,
    fund::Fund,
    lease, ledger,
    money::{Money, Total},
    price::cost,
    ship,
    usage::{self, RollupRow, ShippedRow, UsageQuery},
};

/// Rows read at a time.
const PAGE: i64 = 4_096;
/// Evidence kept for one check; the rest is only counted.
const EVIDENCE_MAX: usize = 100;

/// What was checked and what was found.
#[derive(Clone, Debug, Serialize)]
pub struct Audit {
    pub checks: Vec<Check>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// The claim.
    pub name: &'static str,
    /// How many things it was checked on.
    pub checked: u64,
    pub failed: u64,
    /// The first failures, in words.
    pub evidence: Vec<String>,
}

impl Audit {
    pub fn is_clean(&self) -> bool {
        self.checks.iter().all(|check| check.failed == 0)
    }
}

impl Check {
    pub(crate) fn new(name: &'static str) -> Check {
        Check { name, checked: 0, failed: 0, evidence: Vec::new() }
    }

    pub(crate) fn expect(&mut self, holds: bool, evidence: impl FnOnce() -> String) {
        self.checked += 1;
        if !holds {
            self.failed += 1;
            if self.evidence.len() < EVIDENCE_MAX {
                self.evidence.push(evidence());
            }
        }
    }

    fn expect_equal<K: Ord + std::fmt::Debug, V: PartialEq + std::fmt::Debug + Default>(
        &mut self,
        left: &BTreeMap<K, V>,
        right: &BTreeMap<K, V>,
    ) {
        let zero = V::default();
        for key in left.keys().chain(right.keys()).collect::<BTreeSet<_>>() {
            let (left, right) = (left.get(key).unwrap_or(&zero), right.get(key).unwrap_or(&zero));
            self.expect(left == right, || format!("{key:?}: {left:?} is not {right:?}"));
        }
    }
}

/// Amounts by account, ledger minute and SKU book.
type ByMinute = BTreeMap<(String, i64, String), Total>;

/// What the events add up to.
struct Events {
    by_minute: ByMinute,
    rollups: BTreeMap<[String; 6], [i128; 9]>,
    sequences: BTreeMap<String, Sequence>,
}

#[derive(Default)]
struct Sequence {
    count: i64,
    max: i64,
}

/// What the ledger entries add up to.
struct Entries {
    customers: BTreeMap<String, Total>,
    usage: ByMinute,
    /// Customer's amount of each grant transaction.
    grants: BTreeMap<i64, (String, Total)>,
}

impl Books {
    /// Checks the books against themselves.
    pub async fn audit(&self) -> Result<Audit, BillingError> {
        let mut snapshot = self.database.snapshot().await?;
        let conn = &mut *snapshot;
        let mut checks = Vec::new();
        checks.push(price_books(conn).await?);
        let events = events(conn, &mut checks).await?;
        let entries = entries(conn, &mut checks).await?;
        let mut posted = Check::new("posted usage = sum of the events, for each account, minute and SKU");
        posted.expect_equal(&entries.usage, &events.by_minute);
        checks.push(posted);
        checks.push(rollups(conn, &events).await?);
        checks.push(sequences(conn, &events).await?);
        checks.push(grants(conn, &entries).await?);
        accounts(conn, &entries, &mut checks).await?;
        checks.push(budgets(conn, &events).await?);
        invoices::check(conn, &mut checks).await?;
        snapshot.rollback().await?;
        Ok(Audit { checks })
    }
}

async fn price_books(conn: &mut Conn) -> Result<Check, BillingError> {
    let mut check = Check::new("every price book hashes to its address");
    for (hash, canonical) in catalog::stored(conn).await? {
        let found = crate::PriceBook::from_toml(&canonical);
        let same =
            matches!(&found, Ok(book) if book.hash().as_str() == hash && book.canonical() == canonical);
        check.expect(same, || format!("price book {hash}: {:?}", found.map(|book| book.hash().to_string())));
    }
    Ok(check)
}

async fn events(conn: &mut Conn, checks: &mut Vec<Check>) -> Result<Events, BillingError> {
    let mut derives = Check::new("every event's cost derives from its quantities and price book");
    let mut sums =
        Events { by_minute: BTreeMap::new(), rollups: BTreeMap::new(), sequences: BTreeMap::new() };
    // A book that does not hash to its address was reported above; events under it then have no price.
    let catalog = Catalog::load(conn).await.unwrap_or_default();
    let mut after = 0;
    loop {
        let page = usage::events_after(conn, after, PAGE).await?;
        let Some(last) = page.last() else { break };
        after = last.event.ordinal;
        for shipped in &page {
            let (repriced, event) = (sums.add(&catalog, shipped), &shipped.event);
            derives.expect(repriced == Ok(Money::from_pico(event.cost_pico)), || {
                format!(
                    "request {} says {}, derives {repriced:?}",
                    event.request_id,
                    Money::from_pico(event.cost_pico)
                )
            });
        }
    }
    checks.push(derives);
    Ok(sums)
}

impl Events {
    /// Adds an event to every sum; returns its cost, derived again.
    fn add(&mut self, catalog: &Catalog, shipped: &ShippedRow) -> Result<Money, String> {
        let ShippedRow { event, epoch, seq } = shipped;
        let sequence = self.sequences.entry(epoch.clone()).or_default();
        sequence.count += 1;
        sequence.max = sequence.max.max(*seq);
        let key = [
            usage::day_of(event.admitted_at_ms),
            event.account.clone(),
            event.org.clone(),
            event.project.clone(),
            event.api_key.clone(),
            event.model.clone(),
        ];
        let counts = [
            1,
            event.input_tokens,
            event.cached_input_tokens,
            event.output_tokens,
            event.reasoning_tokens,
            event.characters,
            event.seconds,
            event.images,
            event.cost_pico,
        ];
        for (sum, part) in self.rollups.entry(key).or_default().iter_mut().zip(counts) {
            *sum += i128::from(part);
        }
        let lines = event.lines(event.book(catalog).map_err(|error| error.to_string())?)?;
        for line in lines.iter().filter(|line| line.amount != Money::ZERO) {
            let key =
                (event.account.clone(), ship::minute_of(event.admitted_at_ms), ledger::revenue(&line.sku));
            *self.by_minute.entry(key).or_default() += line.amount.into();
        }
        cost(&lines).ok_or_else(|| "more than one amount can hold".to_owned())
    }
}

async fn entries(conn: &mut Conn, checks: &mut Vec<Check>) -> Result<Entries, BillingError> {
    let mut balanced = Check::new("every ledger transaction sums to zero per currency");
    let mut sums = Entries { customers: BTreeMap::new(), usage: BTreeMap::new(), grants: BTreeMap::new() };
    let mut open: Option<(i64, BTreeMap<String, Total>)> = None;
    let mut close = |transaction: Option<(i64, BTreeMap<String, Total>)>| {
        if let Some((id, by_currency)) = transaction {
            let zero = by_currency.values().all(|sum| *sum == Total::ZERO);
            balanced.expect(zero, || format!("transaction {id} sums to {by_currency:?}"));
        }
    };
    let mut after = (i64::MIN, String::new());
    loop {
        let page = ledger::entries_after(conn, (after.0, &after.1), PAGE).await?;
        let Some(last) = page.last() else { break };
        after = (last.transaction_id, last.book.clone());
        for entry in page {
            if open.as_ref().is_none_or(|(id, _)| *id != entry.transaction_id) {
                close(open.replace((entry.transaction_id, BTreeMap::new())));
            }
            let amount = Total::from_pico(entry.amount_pico.into());
            let (_, by_currency) = open.as_mut().expect("a transaction was opened above");
            *by_currency.entry(entry.currency.clone()).or_default() += amount;
            sums.add(entry, amount);
        }
    }
    close(open);
    checks.push(balanced);
    Ok(sums)
}

impl Entries {
    fn add(&mut self, entry: ledger::EntryRow, amount: Total) {
        if let Some(account) = entry.book.strip_prefix("customer:") {
            *self.customers.entry(account.to_owned()).or_default() += amount;
            if entry.kind.as_deref() == Some("grant") {
                self.grants.insert(entry.transaction_id, (account.to_owned(), amount));
            }
        } else if entry.kind.as_deref() == Some("usage") {
            let key = (entry.account.unwrap_or_default(), entry.at_s.unwrap_or_default(), entry.book);
            *self.usage.entry(key).or_default() += amount;
        }
    }
}

async fn rollups(conn: &mut Conn, events: &Events) -> Result<Check, BillingError> {
    let mut check = Check::new("every rollup = fold of the events");
    let sums = |row: &RollupRow| row.sums().map(i128::from);
    let rows = usage::rollups(conn, &UsageQuery::default()).await?;
    let stored = rows.iter().map(|row| (row.key().map(str::to_owned), sums(row))).collect();
    check.expect_equal(&stored, &events.rollups);
    Ok(check)
}

async fn sequences(conn: &mut Conn, events: &Events) -> Result<Check, BillingError> {
    let mut check =
        Check::new("every outbox is in the ledger without a gap or a second bill for one request");
    let mut refused: BTreeMap<String, Sequence> = BTreeMap::new();
    for (epoch, seq, request_id) in usage::duplicates(conn).await? {
        check.expect(false, || format!("request {request_id} was billed again as {epoch}:{seq}"));
        let sequence = refused.entry(epoch).or_default();
        sequence.count += 1;
        sequence.max = sequence.max.max(seq);
    }
    let none = Sequence::default();
    for (epoch, last_seq) in ship::epochs(conn).await? {
        let (taken, refused) =
            (events.sequences.get(&epoch).unwrap_or(&none), refused.get(&epoch).unwrap_or(&none));
        let (count, max) = (taken.count + refused.count, taken.max.max(refused.max));
        check.expect(count == last_seq && max == last_seq, || {
            format!("outbox {epoch} is shipped up to {last_seq}, but the ledger has {count} bills of it, up to {max}")
        });
    }
    Ok(check)
}

async fn grants(conn: &mut Conn, entries: &Entries) -> Result<Check, BillingError> {
    let mut check = Check::new("every grant = its ledger transaction");
    let mut stored = BTreeMap::new();
    for grant in credit::all_grants(conn).await? {
        stored.insert(grant.transaction_id, (grant.account, Total::from_pico(grant.amount_pico.into())));
    }
    check.expect_equal(&stored, &entries.grants);
    Ok(check)
}

async fn accounts(conn: &mut Conn, entries: &Entries, checks: &mut Vec<Check>) -> Result<(), BillingError> {
    let mut balances = Check::new("every balance = fold of its entries");
    let mut leased = Check::new("what every account and budget has leased = the sum of its leases");
    let mut capped = Check::new("no account's available amount is below zero");
    let mut leases: BTreeMap<String, Total> = BTreeMap::new();
    for (fund, amount) in lease::leases(conn).await? {
        *leases.entry(fund).or_default() += Total::from_pico(amount.into());
    }
    let accounts = ledger::accounts(conn).await?;
    let by_account = |of: fn(&ledger::Balance) -> Money| -> BTreeMap<String, Total> {
        accounts.iter().map(|balance| (balance.account.to_string(), of(balance).into())).collect()
    };
    let fund_of = |account: AccountId| Fund::Account(account).to_string();
    let mut set_aside: BTreeMap<String, Total> =
        accounts.iter().map(|balance| (fund_of(balance.account.clone()), balance.leased.into())).collect();
    for (fund, leased) in budget::leased(conn).await? {
        set_aside.insert(fund, Total::from_pico(leased.into()));
    }
    leased.expect_equal(&set_aside, &leases);
    balances.expect_equal(&by_account(|balance| balance.posted), &entries.customers);
    for balance in &accounts {
        capped.expect(balance.available >= Money::ZERO, || {
            format!("{}: {}", balance.account, balance.available)
        });
    }
    checks.extend([balances, leased, capped]);
    Ok(())
}

async fn budgets(conn: &mut Conn, events: &Events) -> Result<Check, BillingError> {
    let mut check = Check::new("every budget's spending = fold of the events in its window");
    for window in budget::windows(conn).await? {
        let in_scope = |[day, _, org, project, api_key, _]: &[String; 6]| {
            let id = match window.scope.as_str() {
                "org" => org,
                "project" => project,
                _ => api_key,
            };
            *id == window.scope_id && *day >= window.from_day && *day < window.to_day
        };
        let costs = events.rollups.iter().filter(|(key, _)| in_scope(key)).map(|(_, [.., cost])| *cost);
        let (folded, spent) = (Total::from_pico(costs.sum()), Total::from_pico(window.spent_pico.into()));
        check.expect(folded == spent, || format!("{}: {spent} is not {folded}", window.fund));
    }
    Ok(check)
}
