//! PostgreSQL goes away under load: what a lease covers goes on, what cannot be recorded is refused, nothing is lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use sluice_tests::{Fate, Platform, StopMode, assert_error, eventually};
use tokio::sync::watch;
use tokio::task::JoinSet;

const CLIENTS: usize = 6;
const OUTAGE: Duration = Duration::from_secs(20);

/// Every answer that was completed has its bill, as it was told.
async fn assert_billed(platform: &Platform, fates: &[Fate]) {
    platform.settled().await;
    let bills = platform.gateway().bills().await;
    for fate in fates {
        let Fate::Completed { request_id, usage } = fate else { panic!("an answer: {fate:?}") };
        let bill = bills.get(request_id).unwrap_or_else(|| panic!("{request_id} has no bill"));
        assert_eq!((bill.prompt_tokens(), bill.output_tokens), *usage, "{request_id}");
    }
}

#[tokio::test]
async fn twenty_seconds_without_postgres_are_noticed_by_nobody() {
    let platform = Platform::on_postgres(1, "").await;
    let (gateway, postgres) = (platform.gateway(), platform.postgres.as_ref().expect("it is on PostgreSQL"));
    gateway.chat(&gateway.question("Is there a lease?", 1)).await.ok();

    let (stop, stopping) = watch::channel(false);
    let answered = Arc::new(AtomicUsize::new(0));
    let mut clients = JoinSet::new();
    for number in 0..CLIENTS {
        let (caller, body) = (gateway.caller(&gateway.api_key), gateway.question(&number.to_string(), 12));
        let (stopping, answered) = (stopping.clone(), answered.clone());
        clients.spawn(async move {
            let mut fates = Vec::new();
            while !*stopping.borrow() {
                fates.push(caller.ask(&body).await);
                answered.fetch_add(1, Ordering::Relaxed);
            }
            fates
        });
    }
    let some_more = async |what: &str| {
        let before = answered.load(Ordering::Relaxed);
        eventually(what, async || match answered.load(Ordering::Relaxed) - before {
            more if more >= CLIENTS => Ok(()),
            more => Err(format!("{more} answers more")),
        })
        .await;
    };
    some_more("answers before").await;
    postgres.stop(StopMode::Immediate).await;
    some_more("answers without PostgreSQL").await;
    tokio::time::sleep(OUTAGE).await;
    some_more("answers at the end of it").await;
    let backlog = gateway.metrics().await.outbox_backlog();
    assert!(backlog >= CLIENTS as u64, "the bills wait: {backlog}");
    postgres.start_again().await;
    some_more("answers after").await;
    stop.send(true).expect("the clients listen");
    let fates = clients.join_all().await.concat();
    assert_billed(&platform, &fates).await;
    platform.finish().await;
}

/// More bills than may wait: then requests are refused, and told when to come back.
#[tokio::test]
async fn a_full_outbox_refuses_until_postgres_is_back() {
    const WAITING_MAX: usize = 16;
    let settings = format!("[billing]\noutbox_events_max = {WAITING_MAX}\nship_backoff_ms_max = 500\n");
    let platform = Platform::on_postgres(1, &settings).await;
    let (gateway, postgres) = (platform.gateway(), platform.postgres.as_ref().expect("it is on PostgreSQL"));
    let (caller, body) = (gateway.caller(&gateway.api_key), gateway.question("Is there room?", 2));
    gateway.chat(&body).await.ok();
    gateway.settled().await;

    postgres.stop(StopMode::Immediate).await;
    let mut fates = Vec::new();
    loop {
        match caller.ask(&body).await {
            fate @ Fate::Completed { .. } => fates.push(fate),
            Fate::Refused { status: 503, .. } => break,
            other => panic!("an answer, or no room: {other:?}"),
        }
        assert!(fates.len() <= WAITING_MAX, "more bills wait than may");
    }
    assert_eq!(fates.len(), WAITING_MAX, "as many bills wait as may");
    let refused = gateway.chat(&body).await;
    assert_error("a full outbox", &refused, 503, Some("server_error"), None);
    assert_eq!(refused.header("retry-after"), Some("1"));

    postgres.start_again().await;
    let again = eventually("the outbox is shipped", async || match caller.ask(&body).await {
        fate @ Fate::Completed { .. } => Ok(fate),
        fate => Err(format!("{fate:?}")),
    })
    .await;
    fates.push(again);
    assert_billed(&platform, &fates).await;
    platform.finish().await;
}
