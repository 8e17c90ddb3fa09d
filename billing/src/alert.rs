//! Balance alerts: a notice when what an account has left falls below its owner's threshold, and one when it pays for
//! nothing more. Owns the table `account_alerts`.
//!
//! What is left is posted credit and credit limit less posted usage. Leases count as left: they are not spent yet.
//! Each alert is raised once, and again only after what is left has been back above the threshold, or was added to.

use time::OffsetDateTime;

use crate::{
    args,
    database::Conn,
    error::BillingError,
    event::AccountId,
    ledger::{self, Balance},
    money::{Money, Total},
    notice::{self, Notice, NoticeKind},
};

/// What has just happened to an account.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// Usage was posted. `stopped_at`: an answer was ended for want of the money for one more token, which costs this.
    Spent { stopped_at: Option<Money> },
    /// Credit was added.
    Credited,
    /// The threshold was changed.
    Threshold,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Alert {
    low_balance: Option<Money>,
    low_raised: bool,
    exhausted_raised: bool,
    raised_count: i64,
}

#[derive(sqlx::FromRow)]
struct AlertRow {
    low_balance_pico: Option<i64>,
    low_raised: i64,
    exhausted_raised: i64,
    raised_count: i64,
}

impl Alert {
    /// The alert after a change, and what is to be raised.
    fn after(self, left: Total, change: Change) -> (Alert, Vec<NoticeKind>) {
        let (mut alert, mut raise) = (self, Vec::new());
        let is_low = self.low_balance.is_some_and(|threshold| left < threshold.into());
        let is_exhausted = match change {
            Change::Spent { stopped_at: Some(token) } => left < token.into() || left <= Total::ZERO,
            _ => left <= Total::ZERO,
        };
        // An account that never had anything has used nothing up.
        let may_be_exhausted = matches!(change, Change::Spent { .. });
        if change == Change::Credited && !is_exhausted {
            alert.exhausted_raised = false;
        }
        if is_low && !self.low_raised {
            raise.push(NoticeKind::BALANCE_LOW);
        }
        alert.low_raised = is_low;
        if is_exhausted && may_be_exhausted && !alert.exhausted_raised {
            raise.push(NoticeKind::BALANCE_EXHAUSTED);
            alert.exhausted_raised = true;
        }
        alert.raised_count += raise.len() as i64;
        (alert, raise)
    }
}

/// Raises what is due after a change, in its transaction. The account's row must be locked by it already.
pub(crate) async fn check(
    conn: &mut Conn,
    account: &AccountId,
    change: Change,
    at: OffsetDateTime,
) -> Result<(), BillingError> {
    let balance = ledger::balance(conn, account).await?;
    let left = Total::from(balance.available) + balance.leased.into();
    let before = read(conn, account).await?;
    let (after, raise) = before.after(left, change);
    for (index, kind) in raise.iter().enumerate() {
        let number = before.raised_count + 1 + index as i64;
        notice::raise(conn, &told(*kind, &balance, left, before.low_balance, number, at)).await?;
    }
    if after != before {
        write(conn, account, &after).await?;
    }
    Ok(())
}

fn told(
    kind: NoticeKind,
    balance: &Balance,
    left: Total,
    threshold: Option<Money>,
    number: i64,
    at: OffsetDateTime,
) -> Notice {
    let account = balance.account.clone();
    let payload = serde_json::json!({
        "currency": "USD",
        "left": left,
        "posted": balance.posted.to_usd_string(),
        "low_balance": threshold.map(|threshold| threshold.to_usd_string()),
    });
    let dedupe_key = format!("{}:{account}:{number}", kind.as_str());
    Notice { kind, subject: account.to_string(), account, payload, dedupe_key, at }
}

/// The threshold of an account's `balance.low`, if it has one.
pub(crate) async fn low_balance(conn: &mut Conn, account: &AccountId) -> Result<Option<Money>, BillingError> {
    // Tells an unknown account from one without a threshold.
    ledger::balance(conn, account).await?;
    Ok(read(conn, account).await?.low_balance)
}

/// Sets the threshold, or with `None` removes it.
pub(crate) async fn set_low_balance(
    conn: &mut Conn,
    account: &AccountId,
    low_balance: Option<Money>,
    at: OffsetDateTime,
) -> Result<(), BillingError> {
    if let Some(amount) = low_balance.filter(|amount| *amount <= Money::ZERO) {
        return Err(BillingError::NotPositive(amount));
    }
    // Locks the account's row, as whoever spends does.
    ledger::give_back(conn, account, Money::ZERO).await?;
    ledger::balance(conn, account).await?;
    let before = read(conn, account).await?;
    // A new threshold is a new question.
    let low_raised = before.low_raised && before.low_balance == low_balance;
    write(conn, account, &Alert { low_balance, low_raised, ..before }).await?;
    check(conn, account, Change::Threshold, at).await
}

async fn read(conn: &mut Conn, account: &AccountId) -> Result<Alert, BillingError> {
    let row: Option<AlertRow> = conn
        .fetch_optional(
            "SELECT low_balance_pico, low_raised, exhausted_raised, raised_count FROM account_alerts WHERE account = $1",
            args![account.as_str()],
        )
        .await?;
    Ok(row.map_or_else(Alert::default, |row| Alert {
        low_balance: row.low_balance_pico.map(Money::from_pico),
        low_raised: row.low_raised == 1,
        exhausted_raised: row.exhausted_raised == 1,
        raised_count: row.raised_count,
    }))
}

async fn write(conn: &mut Conn, account: &AccountId, alert: &Alert) -> Result<(), BillingError> {
    conn.execute(
        "INSERT INTO account_alerts (account, low_balance_pico, low_raised, exhausted_raised, raised_count) \
         VALUES ($1, $2, $3, $4, $5) ON CONFLICT (account) DO UPDATE SET \
         low_balance_pico = excluded.low_balance_pico, low_raised = excluded.low_raised, \
         exhausted_raised = excluded.exhausted_raised, raised_count = excluded.raised_count",
        args![
            account.as_str(),
            alert.low_balance.map(Money::pico),
            i64::from(alert.low_raised),
            i64::from(alert.exhausted_raised),
            alert.raised_count
        ],
    )
    .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPENT: Change = Change::Spent { stopped_at: None };

    /// Goes through (what is left, change) from a threshold of 100; returns what each step raised.
    fn check(steps: &[(i128, Change)], expect: &[&[NoticeKind]]) {
        let mut alert = Alert { low_balance: Some(Money::from_pico(100)), ..Alert::default() };
        let mut raised = Vec::new();
        for (left, change) in steps {
            let (after, kinds) = alert.after(Total::from_pico(*left), *change);
            alert = after;
            raised.push(kinds);
        }
        assert_eq!(raised, expect, "{steps:?}");
    }

    #[test]
    fn a_low_balance_is_told_once_until_it_has_been_above() {
        const LOW: &[NoticeKind] = &[NoticeKind::BALANCE_LOW];
        check(
            &[(100, SPENT), (99, SPENT), (50, SPENT), (100, Change::Credited), (99, SPENT)],
            &[&[], LOW, &[], &[], LOW],
        );
        check(&[(99, Change::Threshold), (99, Change::Threshold)], &[LOW, &[]]);
        check(&[(99, SPENT), (99, Change::Credited), (98, SPENT)], &[LOW, &[], &[]]);
    }

    #[test]
    fn an_account_is_used_up_when_it_cannot_pay_for_the_next_token() {
        const BOTH: &[NoticeKind] = &[NoticeKind::BALANCE_LOW, NoticeKind::BALANCE_EXHAUSTED];
        let stopped = Change::Spent { stopped_at: Some(Money::from_pico(5)) };
        check(&[(4, stopped), (4, SPENT), (3, stopped)], &[BOTH, &[], &[]]);
        check(&[(0, SPENT), (0, SPENT)], &[BOTH, &[]]);
        // Another answer's hold has given money back since.
        check(&[(5, stopped)], &[&[NoticeKind::BALANCE_LOW]]);
        // A new account has nothing, and has used nothing up.
        check(&[(0, Change::Threshold)], &[&[NoticeKind::BALANCE_LOW]]);
        check(&[(0, SPENT), (500, Change::Credited), (0, SPENT)], &[BOTH, &[], BOTH]);
    }
}
