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
//! expiry     customer:acme  -2      expiry          +2   what was left of a grant
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
    invoice::Period,
    money::{Money, Total},
};

pub(crate) const CURRENCY: &str = "USD";
/// Books of the operator.
pub(crate) const FUNDING: &str = "funding";
pub(crate) const TAX: &str = "tax";
pub(crate) const ROUNDING: &str = "rounding";
pub(crate) const CREDIT_NOTE: &str = "credit_note";
pub(crate) const REFUND: &str = "refund";

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

/// What an account owes beyond its balance: tax and rounding of its invoices.
pub(crate) fn receivable(account: &AccountId) -> String {
    format!("receivable:{account}")
}

/// The reference of what the tiers of a month give back.
pub(crate) fn volume_of(period: Period) -> String {
    format!("volume of {period}")
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

/// Raises a customer's balance at the operator's side of the books: `funding` for a grant, else the kind's own book.
pub(crate) async fn fund(
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
    let source = if kind == "grant" { FUNDING } else { kind };
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

/// Writes one transaction and moves the account's balance by its customer entry, if it has one.
pub(crate) async fn post_to_balance(conn: &mut Conn, posting: Posting<'_>) -> Result<i64, BillingError> {
    let account = posting.account;
    let amount = posting.entries.get(&customer(account)).copied().unwrap_or_default();
    let id = post(conn, posting).await?;
    conn.execute(
        "UPDATE billing_accounts SET posted_pico = posted_pico + $1 WHERE id = $2",
        args![amount.pico(), account.as_str()],
    )
    .await?;
    Ok(id)
}

/// Keeps others from changing the account until the transaction ends.
pub(crate) async fn lock(conn: &mut Conn, account: &AccountId) -> Result<(), BillingError> {
    give_back(conn, account, Money::ZERO).await
}

/// A transaction as its account sees it.
#[derive(FromRow)]
pub(crate) struct MovementRow {
    pub id: i64,
    pub kind: String,
    pub at_s: i64,
    pub reference: String,
    pub amount_pico: i64,
}

/// Up to `limit` transactions that moved an account's balance, after one and up to another.
pub(crate) async fn movements_after(
    conn: &mut Conn,
    account: &AccountId,
    after: i64,
    through: i64,
    limit: i64,
) -> Result<Vec<MovementRow>, BillingError> {
    Ok(conn
        .fetch_all(
            "SELECT t.id, t.kind, t.at_s, t.reference, e.amount_pico FROM ledger_transactions t \
             JOIN ledger_entries e ON e.transaction_id = t.id AND e.book = $1 \
             WHERE t.account = $2 AND t.id > $3 AND t.id <= $4 ORDER BY t.id LIMIT $5",
            args![&customer(account), account.as_str(), after, through, limit],
        )
        .await?)
}

/// The earliest moment that anything was posted for; None if nothing was.
pub(crate) async fn first_moment(conn: &mut Conn, account: &AccountId) -> Result<Option<i64>, BillingError> {
    let (first,): (Option<i64>,) = conn
        .fetch_one("SELECT min(at_s) FROM ledger_transactions WHERE account = $1", args![account.as_str()])
        .await?;
    Ok(first)
}

/// A transaction, whole.
#[derive(Debug)]
pub(crate) struct Transaction {
    pub kind: String,
    pub reference: String,
    pub entries: BTreeMap<String, Money>,
}

pub(crate) async fn transaction(conn: &mut Conn, id: i64) -> Result<Option<Transaction>, BillingError> {
    let head: Option<(String, String)> = conn
        .fetch_optional("SELECT kind, reference FROM ledger_transactions WHERE id = $1", args![id])
        .await?;
    let Some((kind, reference)) = head else { return Ok(None) };
    let entries: Vec<(String, i64)> = conn
        .fetch_all("SELECT book, amount_pico FROM ledger_entries WHERE transaction_id = $1", args![id])
        .await?;
    let entries = entries.into_iter().map(|(book, pico)| (book, Money::from_pico(pico))).collect();
    Ok(Some(Transaction { kind, reference, entries }))
}

/// The numbers of all transactions of a kind.
pub(crate) async fn transactions_of(conn: &mut Conn, kind: &str) -> Result<Vec<i64>, BillingError> {
    let rows: Vec<(i64,)> =
        conn.fetch_all("SELECT id FROM ledger_transactions WHERE kind = $1 ORDER BY id", args![kind]).await?;
    Ok(rows.into_iter().map(|(id,)| id).collect())
}

/// The sums of an account's transactions of one kind and reference, by book.
pub(crate) async fn posted(
    conn: &mut Conn,
    account: &AccountId,
    kind: &str,
    reference: &str,
) -> Result<BTreeMap<String, Money>, BillingError> {
    let rows: Vec<(String, i64)> = conn
        .fetch_all(
            "SELECT e.book, CAST(sum(e.amount_pico) AS BIGINT) FROM ledger_transactions t \
             JOIN ledger_entries e ON e.transaction_id = t.id \
             WHERE t.account = $1 AND t.kind = $2 AND t.reference = $3 GROUP BY e.book",
            args![account.as_str(), kind, reference],
        )
        .await?;
    Ok(rows.into_iter().map(|(book, pico)| (book, Money::from_pico(pico))).collect())
}
