//! The double-entry ledger: accounts, grants, and transactions that sum to zero.
//!
//! A transaction's entries are written first and its own row last; a trigger checks the sum at that moment and refuses
//! entries ever after. A customer's balance is the fold of its entries. `billing_accounts` caches it, with the sum of
//! the leases, so that one conditional update decides whether money may be leased; a CHECK there is the hard cap.
//!
//! ```text
//! grant      customer:acme +10      funding        -10
//! usage      customer:acme  -3      revenue:SKU     +3
//! write_off  customer:acme  +1      write_off       -1   usage beyond the cap is the operator's loss
//! ```

use std::collections::BTreeMap;

use sqlx::FromRow;
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{
    args, counter,
    database::Conn,
    error::BillingError,
    event::AccountId,
    money::{Money, Total},
};

const CURRENCY: &str = "USD";

/// On what terms an account pays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccountKind {
    /// Pays first: the balance never goes below zero.
    Prepaid,
    /// Pays later: the balance never goes below the negative limit.
    Postpaid { credit_limit: Money },
}

/// An account's money as the ledger has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Balance {
    pub account: AccountId,
    pub kind: AccountKind,
    /// Credits less posted usage.
    pub posted: Money,
    /// The part that gateways have leased: open holds, bills on their way, and room for the next requests.
    pub leased: Money,
    /// What can still be leased: posted + credit limit - leased. Never negative.
    pub available: Money,
}

/// Credit bought or given.
#[derive(Clone, Debug)]
pub struct CreditGrant {
    /// The idempotency key: granting twice under one id grants once.
    pub id: Uuid,
    pub account: AccountId,
    pub amount: Money,
    /// Why, for the statement.
    pub memo: String,
    pub granted_at: OffsetDateTime,
}

/// What one transaction moves: amounts by book, which sum to zero.
pub(crate) struct Posting<'a> {
    pub kind: &'static str,
    pub account: &'a AccountId,
    pub at_s: i64,
    pub reference: &'a str,
    pub entries: BTreeMap<String, Money>,
}

pub(crate) fn customer(account: &AccountId) -> String {
    format!("customer:{account}")
}

pub(crate) fn revenue(sku: &str) -> String {
    format!("revenue:{sku}")
}

/// Creates an account. Doing it again with the same terms changes nothing.
pub(crate) async fn create_account(
    conn: &mut Conn,
    account: &AccountId,
    kind: AccountKind,
) -> Result<(), BillingError> {
    let (name, limit) = match kind {
        AccountKind::Prepaid => ("prepaid", Money::ZERO),
        AccountKind::Postpaid { credit_limit } if credit_limit >= Money::ZERO => ("postpaid", credit_limit),
        AccountKind::Postpaid { credit_limit } => return Err(BillingError::NotPositive(credit_limit)),
    };
    conn.execute(
        "INSERT INTO billing_accounts (id, kind, credit_limit_pico) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
        args![account.as_str(), name, limit.pico()],
    )
    .await?;
    if balance(conn, account).await?.kind != kind {
        return Err(BillingError::AccountExists(account.clone()));
    }
    Ok(())
}

/// Posts a grant, once. Run it in a transaction of its own.
pub(crate) async fn credit(conn: &mut Conn, grant: &CreditGrant) -> Result<(), BillingError> {
    if grant.amount <= Money::ZERO {
        return Err(BillingError::NotPositive(grant.amount));
    }
    let id = grant.id.to_string();
    // Whoever grants under this id at the same time waits here.
    counter::take(conn, "transaction", 0).await?;
    let posted: Option<(String, i64)> = conn
        .fetch_optional("SELECT account, amount_pico FROM credit_grants WHERE id = $1", args![&id])
        .await?;
    match posted {
        Some((account, amount)) if account == grant.account.as_str() && amount == grant.amount.pico() => {
            return Ok(());
        }
        Some(_) => return Err(BillingError::GrantConflict(grant.id)),
        None => {}
    }
    let transaction_id =
        fund(conn, "grant", &grant.account, grant.amount, grant.granted_at.unix_timestamp(), &id).await?;
    let granted_at_s = grant.granted_at.unix_timestamp();
    conn.execute(
        "INSERT INTO credit_grants (id, account, amount_pico, memo, granted_at_s, transaction_id) \
         VALUES ($1, $2, $3, $4, $5, $6)",
        args![&id, grant.account.as_str(), grant.amount.pico(), &grant.memo, granted_at_s, transaction_id],
    )
    .await?;
    Ok(())
}

/// Raises a customer's balance at the operator's side of the books: `funding` for a grant, else the kind's own book.
async fn fund(
    conn: &mut Conn,
    kind: &'static str,
    account: &AccountId,
    amount: Money,
    at_s: i64,
    reference: &str,
) -> Result<i64, BillingError> {
    let overflow = || BillingError::Overflow { account: account.clone() };
    let posted = balance(conn, account).await?.posted;
    posted.checked_add(amount).ok_or_else(overflow)?;
    let source = if kind == "grant" { "funding" } else { kind };
    let entries = BTreeMap::from([
        (customer(account), amount),
        (source.to_owned(), amount.checked_neg().ok_or_else(overflow)?),
    ]);
    let id = post(conn, Posting { kind, account, at_s, reference, entries }).await?;
    conn.execute(
        "UPDATE billing_accounts SET posted_pico = posted_pico + $1 WHERE id = $2",
        args![amount.pico(), account.as_str()],
    )
    .await?;
    Ok(id)
}

/// Writes one transaction: its entries, then the row that seals them.
pub(crate) async fn post(conn: &mut Conn, posting: Posting<'_>) -> Result<i64, BillingError> {
    if posting.entries.values().copied().sum::<Total>() != Total::ZERO {
        return Err(BillingError::Unbalanced(posting.reference.to_owned()));
    }
    let id = counter::take(conn, "transaction", 1).await?;
    for (book, amount) in &posting.entries {
        conn.execute(
            "INSERT INTO ledger_entries (transaction_id, book, currency, amount_pico) VALUES ($1, $2, $3, $4)",
            args![id, book, CURRENCY, amount.pico()],
        )
        .await?;
    }
    conn.execute(
        "INSERT INTO ledger_transactions (id, kind, account, at_s, reference) VALUES ($1, $2, $3, $4, $5)",
        args![id, posting.kind, posting.account.as_str(), posting.at_s, posting.reference],
    )
    .await?;
    Ok(id)
}

/// Takes `cost` out of an account whose usage is being posted, `from_lease` of it out of a lease.
///
/// A gateway that lost its lease may ship more than lease and balance hold. The usage stands, the cap stands too, and
/// the difference is written off.
pub(crate) async fn spend(
    conn: &mut Conn,
    account: &AccountId,
    cost: Money,
    from_lease: Money,
    at_s: i64,
    reference: &str,
) -> Result<(), BillingError> {
    let Balance { available, .. } = balance(conn, account).await?;
    let uncovered = Total::from(cost) - from_lease.into() - available.into();
    if let Some(loss) = uncovered.to_money().filter(|loss| *loss > Money::ZERO) {
        tracing::error!(%account, %loss, "usage arrived after its lease had expired; the part over the cap is written off");
        fund(conn, "write_off", account, loss, at_s, reference).await?;
    }
    conn.execute(
        "UPDATE billing_accounts SET posted_pico = posted_pico - $1, leased_pico = leased_pico - $2 WHERE id = $3",
        args![cost.pico(), from_lease.pico(), account.as_str()],
    )
    .await?;
    Ok(())
}

/// Sets `amount` aside for a lease if the account has it; false, and nothing changed, if not.
pub(crate) async fn set_aside(
    conn: &mut Conn,
    account: &AccountId,
    amount: Money,
) -> Result<bool, BillingError> {
    let set = conn
        .execute(
            "UPDATE billing_accounts SET leased_pico = leased_pico + $1 \
             WHERE id = $2 AND posted_pico + credit_limit_pico - leased_pico >= $1",
            args![amount.pico(), account.as_str()],
        )
        .await?;
    Ok(set == 1)
}

/// Gives `amount` of a lease back to the account.
pub(crate) async fn give_back(
    conn: &mut Conn,
    account: &AccountId,
    amount: Money,
) -> Result<(), BillingError> {
    conn.execute(
        "UPDATE billing_accounts SET leased_pico = leased_pico - $1 WHERE id = $2",
        args![amount.pico(), account.as_str()],
    )
    .await?;
    Ok(())
}

#[derive(FromRow)]
struct AccountRow {
    id: String,
    kind: String,
    credit_limit_pico: i64,
    posted_pico: i64,
    leased_pico: i64,
}

impl AccountRow {
    fn into_balance(self) -> Balance {
        let credit_limit = Money::from_pico(self.credit_limit_pico);
        let kind = match self.kind.as_str() {
            "prepaid" => AccountKind::Prepaid,
            _ => AccountKind::Postpaid { credit_limit },
        };
        let (posted, leased) = (Money::from_pico(self.posted_pico), Money::from_pico(self.leased_pico));
        // More than one amount can hold is as good as the most.
        let available = Total::from(posted) + credit_limit.into() - leased.into();
        let available = available.to_money().unwrap_or(Money::MAX);
        Balance { account: AccountId::new(self.id), kind, posted, leased, available }
    }
}

pub(crate) async fn balance(conn: &mut Conn, account: &AccountId) -> Result<Balance, BillingError> {
    let row: Option<AccountRow> = conn
        .fetch_optional(
            "SELECT id, kind, credit_limit_pico, posted_pico, leased_pico FROM billing_accounts WHERE id = $1",
            args![account.as_str()],
        )
        .await?;
    row.map(AccountRow::into_balance).ok_or_else(|| BillingError::UnknownAccount(account.clone()))
}

pub(crate) async fn accounts(conn: &mut Conn) -> Result<Vec<Balance>, BillingError> {
    let rows: Vec<AccountRow> = conn
        .fetch_all(
            "SELECT id, kind, credit_limit_pico, posted_pico, leased_pico FROM billing_accounts ORDER BY id",
            args![],
        )
        .await?;
    Ok(rows.into_iter().map(AccountRow::into_balance).collect())
}

/// An entry with its transaction, as the audit reads it. Without its transaction, kind and account are None.
#[derive(FromRow)]
pub(crate) struct EntryRow {
    pub transaction_id: i64,
    pub book: String,
    pub currency: String,
    pub amount_pico: i64,
    pub kind: Option<String>,
    pub account: Option<String>,
    pub at_s: Option<i64>,
}

/// Up to `limit` entries after (transaction, book), in that order.
pub(crate) async fn entries_after(
    conn: &mut Conn,
    after: (i64, &str),
    limit: i64,
) -> Result<Vec<EntryRow>, BillingError> {
    Ok(conn
        .fetch_all(
            "SELECT e.transaction_id, e.book, e.currency, e.amount_pico, t.kind, t.account, t.at_s \
             FROM ledger_entries e LEFT JOIN ledger_transactions t ON t.id = e.transaction_id \
             WHERE (e.transaction_id, e.book) > ($1, $2) ORDER BY e.transaction_id, e.book LIMIT $3",
            args![after.0, after.1, limit],
        )
        .await?)
}

/// Every grant: its id, account, amount and transaction.
pub(crate) async fn grants(conn: &mut Conn) -> Result<Vec<(String, String, i64, i64)>, BillingError> {
    Ok(conn
        .fetch_all(
            "SELECT id, account, amount_pico, transaction_id FROM credit_grants ORDER BY transaction_id",
            args![],
        )
        .await?)
}
