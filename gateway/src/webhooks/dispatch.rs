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

#[cfg(test)]
mod tests {
    use sluice_billing::{
        AccountId, AccountKind, Books,
        notice::{Notice, NoticeKind},
    };
    use time::OffsetDateTime;

    use super::*;
    use crate::{
        auth::Tenancy,
        config::Config,
        webhooks::{DeliveryQuery, EndpointDraft},
    };

    const ORG: &str = "org-1";
    const ACCOUNT: &str = "acct-1";

    async fn raise(database: &Database, key: &str) {
        let notice = Notice {
            kind: NoticeKind::INVOICE_READY,
            account: AccountId::new(ACCOUNT),
            subject: key.to_owned(),
            payload: serde_json::json!({}),
            dedupe_key: key.to_owned(),
            at: OffsetDateTime::now_utc(),
        };
        let mut tx = database.write().await.expect("a transaction");
        notice::raise(&mut tx, &notice).await.expect("a notice");
        tx.commit().await.expect("committed");
    }

    /// (floor, numbers seen above it, deliveries)
    async fn state(database: &Database) -> (i64, Vec<i64>, usize) {
        let mut conn = database.read().await.expect("a connection");
        let (floor,): (i64,) =
            conn.fetch_one("SELECT floor FROM webhook_cursor", args![]).await.expect("a floor");
        let seen: Vec<(i64,)> = conn
            .fetch_all("SELECT notice_ordinal FROM webhook_seen ORDER BY notice_ordinal", args![])
            .await
            .expect("numbers");
        let query = DeliveryQuery { org_id: ORG, state: None, endpoint_id: None, after: None, limit: 100 };
        let deliveries = store::deliveries(database, &query).await.expect("deliveries");
        (floor, seen.into_iter().map(|(ordinal,)| ordinal).collect(), deliveries.len())
    }

    #[tokio::test]
    async fn the_floor_rises_over_what_has_settled_and_nothing_is_dispatched_twice() {
        let folder = tempfile::tempdir().expect("a folder");
        let config = Config { data_dir: folder.path().to_owned(), ..Config::default() };
        let database = crate::store::open(&config, true).await.expect("a database");
        let books = Books::open(database.clone()).await.expect("books");
        books.create_account(&AccountId::new(ACCOUNT), AccountKind::Prepaid).await.expect("an account");
        Tenancy::new(database.clone()).ensure_org(ORG, "Org", ACCOUNT).await.expect("an organisation");
        let draft = EndpointDraft {
            org_id: ORG.into(),
            account: ACCOUNT.into(),
            url: "https://hooks.example.com/".into(),
            ..EndpointDraft::default()
        };
        let settings = WebhookSettings::default();
        store::create(&database, &settings, &draft, 0).await.expect("an endpoint");

        raise(&database, "a").await;
        raise(&database, "b").await;
        assert_eq!(run(&database, 1_000).await.expect("dispatched"), 2);
        assert_eq!(run(&database, 1_000).await.expect("dispatched"), 0);
        assert_eq!(state(&database).await, (0, vec![1, 2], 2));
        raise(&database, "c").await;
        run(&database, 1_000 + SETTLE_MS).await.expect("dispatched");
        assert_eq!(state(&database).await, (0, vec![1, 2, 3], 3), "not settled until it has been longer");
        raise(&database, "d").await;
        run(&database, 1_001 + SETTLE_MS).await.expect("dispatched");
        assert_eq!(state(&database).await, (2, vec![3, 4], 4));

        // What ended is kept as long as the settings say; what waits is kept.
        let mut conn = database.read().await.expect("a connection");
        conn.execute(
            "UPDATE webhook_deliveries SET state = 'dead', finished_at_ms = 5 \
             WHERE id = (SELECT min(id) FROM webhook_deliveries)",
            args![],
        )
        .await
        .expect("one is dead");
        drop(conn);
        let kept_ms = 90 * 24 * 3_600_000;
        assert_eq!(prune(&database, &settings, kept_ms + 5).await.expect("pruned"), 0);
        assert_eq!(prune(&database, &settings, kept_ms + 6).await.expect("pruned"), 1);
        assert_eq!(state(&database).await.2, 3);
    }
}
