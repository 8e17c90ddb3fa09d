//! The power is cut at each write boundary; what was answered is billed, once, and the rest never happened.

use std::sync::atomic::Ordering;

use sluice_billing::{BillingError, Money};
use tempfile::TempDir;

use crate::support::*;

const EACH: i64 = 10 * INPUT + 4 * OUTPUT;

async fn bill(world: &World) {
    world.billing.admit(request(10, 4)).await.unwrap().settle(outcome(10, 0, 4)).await.unwrap();
}

async fn a_bill_that_was_durable_is_shipped_at_the_next_start() {
    let world = World::new(1_000).await;
    bill(&world).await;
    let _open = world.billing.admit(request(10, 4)).await.unwrap();
    let world = world.crash().await;
    let balance = world.billing.balance(&account()).await.unwrap();
    assert_eq!((balance.posted, balance.leased), (pico(1_000 - EACH), Money::ZERO));
    world.assert_clean().await;
}

async fn a_batch_that_the_ledger_has_and_the_outbox_has_not_forgotten_is_not_posted_again() {
    let world = World::new(1_000).await;
    bill(&world).await;
    let before = world.image();
    world.posted().await;
    let image = world.image();
    copy(before.path(), image.path(), "outbox.db");
    let world = world.reopen(image).await;
    assert_eq!(world.posted().await, 1_000 - EACH);
    bill(&world).await;
    assert_eq!(world.posted().await, 1_000 - 2 * EACH);
    world.assert_clean().await;
}

#[tokio::test]
async fn a_ledger_that_lost_shipped_bills_is_refused() {
    let world = World::new(1_000).await;
    bill(&world).await;
    let before = world.image();
    world.posted().await;
    let image = world.image();
    copy(before.path(), image.path(), "ledger.db");
    let refused = World::open_in(image, limits()).await.map(|_| ());
    assert!(matches!(refused, Err(BillingError::LedgerBehindOutbox { shipped: 1, known: 0 })), "{refused:?}");
}

async fn an_old_copy_of_the_outbox_begins_anew() {
    let world = World::new(1_000).await;
    bill(&world).await;
    let before = world.image();
    for _ in 0..3 {
        bill(&world).await;
    }
    world.posted().await;
    let image = world.image();
    copy(before.path(), image.path(), "outbox.db");
    let world = world.reopen(image).await;
    bill(&world).await;
    assert_eq!(world.posted().await, 1_000 - 5 * EACH);
    world.assert_clean().await;
    let balance = world.crash().await.billing.balance(&account()).await.unwrap();
    assert_eq!(balance.leased, Money::ZERO);
}

#[tokio::test]
async fn a_lost_outbox_leaves_a_lease_that_expires() {
    let world = World::new(1_000).await;
    bill(&world).await;
    let image = TempDir::new().unwrap();
    copy(world.dir.path(), image.path(), "ledger.db");
    let world = World::open_in(image, limits()).await.unwrap();
    assert_eq!(world.billing.balance(&account()).await.unwrap().leased, pico(EACH));
    world.elapsed_s.store(2 * limits().lease_ttl.as_secs() as i64, Ordering::Relaxed);
    let again =
        open(&world.database, world.dir.path().join("other.db"), limits(), &world.elapsed_s).await.unwrap();
    assert_eq!(again.balance(&account()).await.unwrap().available, pico(1_000));
    world.assert_clean().await;
}

async fn what_is_shipped_after_its_lease_expired_is_written_off_beyond_the_cap() {
    let world = World::new(2 * EACH).await;
    bill(&world).await;
    let open_hold = world.billing.admit(request(10, 4)).await.unwrap();
    // This gateway is cut off; another one finds its lease expired, and spends all but one token.
    world.elapsed_s.store(2 * limits().lease_ttl.as_secs() as i64, Ordering::Relaxed);
    let other =
        open(&world.database, world.dir.path().join("other.db"), limits(), &world.elapsed_s).await.unwrap();
    other.admit(request(20, 3)).await.unwrap().settle(outcome(20, 0, 3)).await.unwrap();
    other.flush().await.unwrap();
    other.close().await.unwrap();
    let left = 2 * EACH - 20 * INPUT - 3 * OUTPUT;
    assert_eq!(world.billing.balance(&account()).await.unwrap().available, pico(left));

    open_hold.settle(outcome(10, 0, 4)).await.unwrap();
    assert_eq!(world.posted().await, 0);
    assert!(world.billing.admit(request(0, 1)).await.is_err());
    let sum = "SELECT CAST(sum(amount_pico) AS BIGINT) FROM ledger_entries WHERE book = 'write_off'";
    let (written_off,): (i64,) = world.database.read().await.unwrap().fetch_one(sum, &[]).await.unwrap();
    assert_eq!(written_off, left - 2 * EACH);
    world.assert_clean().await;
}

async fn a_bill_that_the_outbox_refuses_is_an_error_and_its_money_stays_held() {
    let world = World::new(2 * EACH).await;
    let hold = world.billing.admit(request(10, 4)).await.unwrap();
    // The outbox's own number is taken behind its back: its next commit fails.
    let world = {
        let image = world.image();
        drop(hold);
        let outbox = open_url(&file_url(&image.path().join("outbox.db")), PATIENCE).await;
        let full = "CREATE TRIGGER full BEFORE INSERT ON outbox_events WHEN NEW.seq = 1 BEGIN SELECT RAISE(ABORT, 'disk full'); END";
        run(&outbox, full).await.unwrap();
        outbox.close().await.unwrap();
        world.reopen(image).await
    };
    let hold = world.billing.admit(request(10, 4)).await.unwrap();
    assert!(hold.settle(outcome(10, 0, 4)).await.is_err());
    assert_eq!(world.billing.stats().stranded, 1);
    let other = world.billing.admit(request(10, 4)).await.unwrap();
    assert!(world.billing.admit(request(0, 1)).await.is_err(), "stranded money is not spent twice");
    drop(other);
    world.assert_clean().await;
    let world = world.crash().await;
    assert_eq!(world.billing.balance(&account()).await.unwrap().available, pico(2 * EACH));
}

on_both! {
    a_bill_that_was_durable_is_shipped_at_the_next_start,
    a_batch_that_the_ledger_has_and_the_outbox_has_not_forgotten_is_not_posted_again,
    an_old_copy_of_the_outbox_begins_anew,
    what_is_shipped_after_its_lease_expired_is_written_off_beyond_the_cap,
    a_bill_that_the_outbox_refuses_is_an_error_and_its_money_stays_held,
}
