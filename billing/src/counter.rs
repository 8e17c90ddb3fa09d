//! Numbers in the order of commits. Owns the table `counters`.
//!
//! Whoever takes numbers of a counter holds its row until the end of the transaction, so a transaction that takes later
//! numbers also commits later. A reader that has seen number 7 will never see a 6 appear.

use crate::{args, database::Conn, error::BillingError};

/// Takes `count` numbers; returns the first.
pub(crate) async fn take(conn: &mut Conn, name: &'static str, count: i64) -> Result<i64, BillingError> {
    let (last,): (i64,) = conn
        .fetch_one(
            "UPDATE counters SET value = value + $1 WHERE name = $2 RETURNING value",
            args![count, name],
        )
        .await?;
    Ok(last - count + 1)
}
