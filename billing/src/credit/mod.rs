//! Credit: grants with expiry and priority. Owns the tables `credit_grants` and `credit_expiries`.
//!
//! The account's balance is one number; which grant paid for what follows from the ledger ([`burndown`]).
//!
//! What is left of a grant when it expires is posted out by [`Books::expire_credits`]:
//!
//! - Never more than the account has available beyond its leases, so no request that was admitted runs dry. Leases are
//!   counted against other credit first, and against the credit limit of a postpaid account.
//! - What is leased waits: the next sweep takes what has come back by then. What requests use of it meanwhile stays used.
//! - So expired credit can still be spent until the next sweep, and by a gateway that leased it, until its lease ends.

pub(crate) mod burndown;

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};
use sqlx::FromRow;
use time::OffsetDateTime;

use self::burndown::{BurnDown, Movement, Terms};
use crate::{
    Books,
    alert::{self, Change},
    args,
    clock::moment_s,
    counter,
    database::Conn,
    error::BillingError,
    event::AccountId,
    invoice::{self, Period},
    ledger::{self, CreditGrant},
    money::{Money, Total},
};

/// Transactions read at a time.
const PAGE: i64 = 4_096;

/// When a grant ends, and which pays first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CreditTerms {
    /// None: never.
    pub expires_at: Option<OffsetDateTime>,
    /// Lower pays first; of equal ones the earliest to expire, of those the oldest.
    pub priority: i32,
}

/// A grant and what is left of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct GrantStatus {
    pub id: String,
    pub account: AccountId,
    pub amount: Money,
    /// What neither usage nor expiry has taken.
    pub left: Money,
    pub expired: Money,
    pub memo: String,
    pub priority: i64,
    /// Seconds since 1970.
    pub granted_at: i64,
    pub expires_at: Option<i64>,
}

/// Credit that expired in a sweep.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Expiry {
    pub grant: String,
    pub account: AccountId,
    /// Posted out now.
    pub expired: Money,
    /// Leased, and so left for a later sweep.
    pub waiting: Money,
}

/// The fold of an account's ledger up to a transaction. Kept with each closed month.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Checkpoint {
    pub burn_down: BurnDown,
    /// Posted usage of months that no invoice has taken yet.
    pub open: BTreeMap<Period, Share>,
}

/// Usage of one month: its cost, and the part that no credit paid.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Share {
    pub charged: Money,
    pub owed: Money,
}

#[derive(Clone, FromRow)]
pub(crate) struct GrantRow {
    pub id: String,
    pub account: String,
    pub amount_pico: i64,
    pub memo: String,
    pub granted_at_s: i64,
    pub transaction_id: i64,
    pub priority: i64,
    pub expires_at_s: Option<i64>,
}

#[derive(FromRow)]
pub(crate) struct ExpiryRow {
    pub grant_id: String,
    pub amount_pico: i64,
    pub done: i64,
    pub transaction_id: Option<i64>,
}

impl Books {
    /// Adds credit on terms; again with the same id, changes nothing.
    pub async fn credit_on(&self, grant: &CreditGrant, terms: &CreditTerms) -> Result<(), BillingError> {
        let mut tx = self.database.write().await?;
        post_grant(&mut tx, grant, terms).await?;
        Ok(tx.commit().await?)
    }

    /// The grants of an account, oldest first.
    pub async fn grants(&self, account: &AccountId) -> Result<Vec<GrantStatus>, BillingError> {
        let mut conn = self.database.snapshot().await?;
        ledger::balance(&mut conn, account).await?;
        let (state, _) = fold_to_now(&mut conn, account).await?;
        let expired = expired_by_grant(&mut conn, account).await?;
        let status = |row: GrantRow| GrantStatus {
            left: state.burn_down.left_of(&row.id),
            expired: expired.get(&row.id).copied().unwrap_or_default(),
            id: row.id,
            account: AccountId::new(row.account),
            amount: Money::from_pico(row.amount_pico),
            memo: row.memo,
            priority: row.priority,
            granted_at: row.granted_at_s,
            expires_at: row.expires_at_s,
        };
        Ok(grants_of(&mut conn, account).await?.into_iter().map(status).collect())
    }

    /// Posts out what is left of every grant that has expired. Returns those of which something expired or waits.
    pub async fn expire_credits(&self, now: OffsetDateTime) -> Result<Vec<Expiry>, BillingError> {
        let now_s = now.unix_timestamp();
        let due: Vec<GrantRow> = self
            .database
            .read()
            .await?
            .fetch_all(
                "SELECT id, account, amount_pico, memo, granted_at_s, transaction_id, priority, expires_at_s \
                 FROM credit_grants g WHERE expires_at_s <= $1 \
                 AND NOT EXISTS (SELECT 1 FROM credit_expiries e WHERE e.grant_id = g.id AND e.done = 1) \
                 ORDER BY expires_at_s, transaction_id",
                args![now_s],
            )
            .await?;
        let mut expiries = Vec::new();
        for grant in due {
            let mut tx = self.database.write().await?;
            let expiry = expire(&mut tx, &grant, now_s).await?;
            tx.commit().await?;
            expiries.extend(expiry.filter(|e| e.expired != Money::ZERO || e.waiting != Money::ZERO));
        }
        Ok(expiries)
    }
}

/// Posts a grant, once. Run it in a transaction of its own.
pub(crate) async fn post_grant(
    conn: &mut Conn,
    grant: &CreditGrant,
    terms: &CreditTerms,
) -> Result<(), BillingError> {
    if grant.amount <= Money::ZERO {
        return Err(BillingError::NotPositive(grant.amount));
    }
    let (granted_at_s, expires_at_s) =
        (grant.granted_at.unix_timestamp(), terms.expires_at.map(OffsetDateTime::unix_timestamp));
    let id = grant.id.to_string();
    // Whoever grants under this id at the same time waits here.
    counter::take(conn, "transaction", 0).await?;
    let known: Option<GrantRow> = conn
        .fetch_optional(
            "SELECT id, account, amount_pico, memo, granted_at_s, transaction_id, priority, expires_at_s \
             FROM credit_grants WHERE id = $1",
            args![&id],
        )
        .await?;
    if let Some(known) = known {
        let same = known.account == grant.account.as_str()
            && known.amount_pico == grant.amount.pico()
            && known.priority == i64::from(terms.priority)
            && known.expires_at_s == expires_at_s;
        return if same { Ok(()) } else { Err(BillingError::GrantConflict(grant.id)) };
    }
    if expires_at_s.is_some_and(|at_s| at_s <= granted_at_s) {
        return Err(BillingError::ExpiryPassed);
    }
    let account = &grant.account;
    let transaction_id = ledger::fund(conn, "grant", account, grant.amount, granted_at_s, &id).await?;
    conn.execute(
        "INSERT INTO credit_grants (id, account, amount_pico, memo, granted_at_s, transaction_id, priority, expires_at_s) \
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
        args![
            &id,
            account.as_str(),
            grant.amount.pico(),
            &grant.memo,
            granted_at_s,
            transaction_id,
            i64::from(terms.priority),
            expires_at_s
        ],
    )
    .await?;
    alert::check(conn, account, Change::Credited, grant.granted_at).await
}

/// Posts out what can be of one expired grant; None if another sweep was faster.
async fn expire(conn: &mut Conn, grant: &GrantRow, now_s: i64) -> Result<Option<Expiry>, BillingError> {
    counter::take(conn, "transaction", 0).await?;
    let account = AccountId::new(grant.account.clone());
    let parts: Vec<ExpiryRow> = conn
        .fetch_all(
            "SELECT grant_id, amount_pico, done, transaction_id FROM credit_expiries \
             WHERE grant_id = $1 ORDER BY part",
            args![&grant.id],
        )
        .await?;
    if parts.iter().any(|part| part.done == 1) {
        return Ok(None);
    }
    ledger::lock(conn, &account).await?;
    let (state, _) = fold_to_now(conn, &account).await?;
    let left = state.burn_down.left_of(&grant.id);
    let expired = left.min(ledger::balance(conn, &account).await?.available);
    let waiting =
        left.checked_sub(expired).ok_or_else(|| BillingError::Overflow { account: account.clone() })?;
    let expiry = Expiry { grant: grant.id.clone(), account, expired, waiting };
    if expired == Money::ZERO && waiting != Money::ZERO {
        return Ok(Some(expiry));
    }
    let transaction_id = match expired {
        Money::ZERO => None,
        _ => {
            let overflow = || BillingError::Overflow { account: expiry.account.clone() };
            let lost = expired.checked_neg().ok_or_else(overflow)?;
            Some(ledger::fund(conn, "expiry", &expiry.account, lost, now_s, &grant.id).await?)
        }
    };
    conn.execute(
        "INSERT INTO credit_expiries (grant_id, part, amount_pico, done, expired_at_s, transaction_id) \
         VALUES ($1, $2, $3, $4, $5, $6)",
        args![
            &grant.id,
            parts.len() as i64 + 1,
            expired.pico(),
            i64::from(waiting == Money::ZERO),
            now_s,
            transaction_id
        ],
    )
    .await?;
    if expired != Money::ZERO {
        let at = moment_s(now_s);
        alert::check(conn, &expiry.account, Change::Spent { stopped_at: None }, at).await?;
    }
    Ok(Some(expiry))
}

/// The fold of everything that is posted, from the last closed month on, and the last transaction in it.
pub(crate) async fn fold_to_now(
    conn: &mut Conn,
    account: &AccountId,
) -> Result<(Checkpoint, i64), BillingError> {
    let (checkpoint, after) = invoice::last_checkpoint(conn, account).await?;
    fold(conn, account, checkpoint, after, i64::MAX).await
}

/// Folds the transactions after one and up to another into a checkpoint.
pub(crate) async fn fold(
    conn: &mut Conn,
    account: &AccountId,
    mut checkpoint: Checkpoint,
    mut after: i64,
    through: i64,
) -> Result<(Checkpoint, i64), BillingError> {
    let terms = grants_of(conn, account).await?;
    let terms: HashMap<String, Terms> =
        terms.into_iter().map(|row| (row.id.clone(), row.into_terms())).collect();
    loop {
        let page = ledger::movements_after(conn, account, after, through, PAGE).await?;
        let Some(last) = page.last() else { return Ok((checkpoint, after)) };
        after = last.id;
        for row in &page {
            checkpoint.add(row, &terms).map_err(|source| BillingError::Corrupt {
                table: "ledger_transactions",
                source: format!("transaction {}: {source}", row.id).into(),
            })?;
        }
    }
}

impl Checkpoint {
    fn add(&mut self, row: &ledger::MovementRow, terms: &HashMap<String, Terms>) -> Result<(), String> {
        let amount = Money::from_pico(row.amount_pico);
        let size = if amount < Money::ZERO { amount.checked_neg() } else { Some(amount) };
        let size = size.ok_or("more than one amount can hold")?;
        let movement = match row.kind.as_str() {
            "grant" => {
                let terms = terms.get(&row.reference).ok_or("its grant is not there")?;
                Movement::Granted(terms.clone(), size)
            }
            "expiry" => Movement::Expired(row.reference.clone(), size),
            "refund" | "write_off" => Movement::GivenBack(size),
            _ if amount < Money::ZERO => Movement::Charged(size),
            _ => Movement::Received(size),
        };
        let paid = self.burn_down.apply(&movement).map_err(|error| error.to_string())?;
        if row.kind == "usage" {
            let share = self.open.entry(Period::of_second(row.at_s)).or_default();
            let more = |sum: Money, part| sum.checked_add(part).ok_or("more than one amount can hold");
            *share = Share { charged: more(share.charged, size)?, owed: more(share.owed, paid.owed)? };
        }
        Ok(())
    }

    /// Takes out what was used up to the end of a month. What was used after stays for the next invoice. None: the sum is
    /// more than one amount can hold.
    pub fn take_share(&mut self, period: Period) -> Option<Share> {
        let later = self.open.split_off(&period.next());
        let taken = std::mem::replace(&mut self.open, later);
        let sum = |of: fn(&Share) -> Money| taken.values().map(of).sum::<Total>().to_money();
        Some(Share { charged: sum(|share| share.charged)?, owed: sum(|share| share.owed)? })
    }
}

impl GrantRow {
    fn into_terms(self) -> Terms {
        Terms {
            id: self.id,
            priority: self.priority,
            expires_at_s: self.expires_at_s,
            transaction_id: self.transaction_id,
        }
    }
}

async fn grants_of(conn: &mut Conn, account: &AccountId) -> Result<Vec<GrantRow>, BillingError> {
    Ok(conn
        .fetch_all(
            "SELECT id, account, amount_pico, memo, granted_at_s, transaction_id, priority, expires_at_s \
             FROM credit_grants WHERE account = $1 ORDER BY transaction_id",
            args![account.as_str()],
        )
        .await?)
}

async fn expired_by_grant(
    conn: &mut Conn,
    account: &AccountId,
) -> Result<BTreeMap<String, Money>, BillingError> {
    let rows: Vec<(String, i64)> = conn
        .fetch_all(
            "SELECT e.grant_id, CAST(sum(e.amount_pico) AS BIGINT) FROM credit_expiries e \
             JOIN credit_grants g ON g.id = e.grant_id WHERE g.account = $1 GROUP BY e.grant_id",
            args![account.as_str()],
        )
        .await?;
    Ok(rows.into_iter().map(|(id, pico)| (id, Money::from_pico(pico))).collect())
}

/// Every grant, in the order of its transaction.
pub(crate) async fn all_grants(conn: &mut Conn) -> Result<Vec<GrantRow>, BillingError> {
    Ok(conn
        .fetch_all(
            "SELECT id, account, amount_pico, memo, granted_at_s, transaction_id, priority, expires_at_s \
             FROM credit_grants ORDER BY transaction_id",
            args![],
        )
        .await?)
}

/// Every part of every expiry.
pub(crate) async fn all_expiries(conn: &mut Conn) -> Result<Vec<ExpiryRow>, BillingError> {
    Ok(conn
        .fetch_all(
            "SELECT grant_id, amount_pico, done, transaction_id FROM credit_expiries ORDER BY grant_id, part",
            args![],
        )
        .await?)
}
