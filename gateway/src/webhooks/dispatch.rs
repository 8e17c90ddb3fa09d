//! From notices to deliveries: each notice is dispatched once, to the endpoints that its account has at that moment.
//!
//! Notices are numbered when they are raised and visible when their transaction commits, so a lower number can appear
//! after a higher one. A cursor alone would pass it by for ever. So dispatched numbers are remembered one by one for
//! [`SETTLE_MS`], and only then does the cursor, the floor, rise over them:
//!
//! ```text
//! ... 41 42 43 44 | 45 46 47    49      48 is not committed yet: when it is, it is found to be missing
//!          floor ─┘  └─ seen ───┘
//! ```

use std::collections::BTreeSet;

use sluice_billing::{
    Conn, Database, args,
    notice::{self, StoredNotice},
};

use super::{
    WebhookSettings,
    store::{self, Event, WebhookError, as_stored},
};

/// No transaction that raises a notice stays open for longer.
const SETTLE_MS: i64 = 600_000;
/// Notices that one transaction dispatches.
const BATCH_MAX: usize = 100;
/// Numbers over the floor that are looked at; more wait until it rises.
const WINDOW_MAX: i64 = 100_000;

/// Dispatches what is new; returns how many notices that were. Several gateways may do so at once.
pub async fn run(database: &Database, now_ms: i64) -> Result<usize, WebhookError> {
    let mut dispatched = 0;
    // Most of the time there is nothing, and nothing is written.
    while !unseen(&mut database.read().await?).await?.is_empty() {
        dispatched += batch(database, now_ms).await?;
    }
    Ok(dispatched)
}

async fn batch(database: &Database, now_ms: i64) -> Result<usize, WebhookError> {
    let mut tx = database.write().await?;
    // Takes the row: the other gateways wait here, and then see what this one has done.
    tx.execute("UPDATE webhook_cursor SET floor = floor", args![]).await?;
    let ordinals = unseen(&mut tx).await?;
    let mut dispatched = 0;
    for ordinal in ordinals.into_iter().take(BATCH_MAX) {
        if let Some(notice) = notice::get(&mut tx, ordinal).await? {
            dispatch(&mut tx, &notice, now_ms).await?;
        }
        tx.execute(
            "INSERT INTO webhook_seen (notice_ordinal, seen_at_ms) VALUES ($1, $2)",
            args![ordinal, now_ms],
        )
        .await?;
        dispatched += 1;
    }
    raise_floor(&mut tx, now_ms).await?;
    tx.commit().await?;
    Ok(dispatched)
}

/// Numbers of notices that nobody has dispatched, in their order.
async fn unseen(conn: &mut Conn) -> Result<Vec<i64>, WebhookError> {
    let (floor,): (i64,) = conn.fetch_one("SELECT floor FROM webhook_cursor", args![]).await?;
    let seen: Vec<(i64,)> = conn
        .fetch_all("SELECT notice_ordinal FROM webhook_seen WHERE notice_ordinal > $1", args![floor])
        .await?;
    let seen: BTreeSet<i64> = seen.into_iter().map(|(ordinal,)| ordinal).collect();
    let raised = notice::ordinals_after(conn, floor, WINDOW_MAX).await?;
    Ok(raised.into_iter().filter(|ordinal| !seen.contains(ordinal)).collect())
}

#[derive(sqlx::FromRow)]
struct Subscriber {
    id: String,
    events: String,
}

async fn dispatch(conn: &mut Conn, notice: &StoredNotice, now_ms: i64) -> Result<(), WebhookError> {
    let subscribers: Vec<Subscriber> = conn
        .fetch_all(
            "SELECT id, events FROM webhook_endpoints WHERE account = $1 AND enabled = 1 ORDER BY id",
            args![notice.account.as_str()],
        )
        .await?;
    let event =
        Event { id: &notice.id, kind: &notice.kind, created_at_ms: notice.created_at_ms, data: data(notice) };
    for Subscriber { id, events } in subscribers {
        let wanted: Vec<String> = serde_json::from_str(&events).expect("the store writes the list as JSON");
        if wanted.is_empty() || wanted.contains(&notice.kind) {
            store::insert_delivery(conn, &id, &event, now_ms).await?;
        }
    }
    Ok(())
}

/// What the cause said, and whom and what it is about.
fn data(notice: &StoredNotice) -> serde_json::Value {
    let mut data = serde_json::json!({ "account": notice.account, "subject": notice.subject });
    match &notice.payload {
        serde_json::Value::Object(fields) => {
            let all = data.as_object_mut().expect("it was made an object");
            all.extend(fields.clone());
        }
        other => data["detail"] = other.clone(),
    }
    data
}

async fn raise_floor(conn: &mut Conn, now_ms: i64) -> Result<(), sqlx::Error> {
    let (settled,): (Option<i64>,) = conn
        .fetch_one(
            "SELECT max(notice_ordinal) FROM webhook_seen WHERE seen_at_ms < $1",
            args![now_ms.saturating_sub(SETTLE_MS)],
        )
        .await?;
    let Some(floor) = settled else { return Ok(()) };
    conn.execute("UPDATE webhook_cursor SET floor = $1 WHERE floor < $1", args![floor]).await?;
    conn.execute("DELETE FROM webhook_seen WHERE notice_ordinal <= $1", args![floor]).await?;
    Ok(())
}

/// Forgets deliveries that ended longer ago than they are kept.
pub async fn prune(
    database: &Database,
    settings: &WebhookSettings,
    now_ms: i64,
) -> Result<u64, WebhookError> {
    let keep_ms = as_stored(settings.retention_days).saturating_mul(24 * 3_600_000);
    let pruned = database
        .read()
        .await?
        .execute(
            "DELETE FROM webhook_deliveries WHERE finished_at_ms < $1",
            args![now_ms.saturating_sub(keep_ms)],
        )
        .await?;
    Ok(pruned)
}
