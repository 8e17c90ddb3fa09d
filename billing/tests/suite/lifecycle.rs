//! Admit, extend, settle, void, drop: the cap to the token, and each way a hold can end.

use std::time::Duration;

use sluice_billing::{
    AccountId, AccountKind, AdmitError, AdmitRequest, BillingError, BillingLimits, Books, CreditGrant,
    Database, DatabaseError, DatabaseOptions, Money, PriceBook, UsageGroup, UsageQuery, VoidCause,
};
use time::macros::date;
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::support::*;

async fn a_request_is_billed_from_hold_to_rollup() {
    let world = World::new(1_000).await;
    let mut hold = world.billing.admit(request(10, 100)).await.unwrap();
    assert_eq!((hold.granted_output_tokens(), hold.is_final()), (4, false));
    hold.extend(9).await;
    assert_eq!((hold.granted_output_tokens(), hold.is_final()), (9, false));
    let event = hold.settle(outcome(6, 4, 8)).await.unwrap();
    let cost = 6 * INPUT + 4 * CACHED + 8 * OUTPUT;
    assert_eq!(event.cost, pico(cost));
    assert_eq!(world.posted().await, 1_000 - cost);

    let query = UsageQuery { group_by: vec![UsageGroup::Day, UsageGroup::Model], ..UsageQuery::default() };
    let rows = world.billing.usage(&query).await.unwrap();
    let json = serde_json::to_value(&rows).unwrap();
    let expected = serde_json::json!([{
        "day": "2026-03-01", "model": "m", "requests": 1, "input_tokens": 6, "cached_input_tokens": 4,
        "output_tokens": 8, "reasoning_tokens": 0, "characters": 0, "seconds": 0, "images": 0, "cost": "0.000000000062",
    }]);
    assert_eq!(json, expected);
    let next_day = UsageQuery { from: Some(date!(2026 - 03 - 02)), ..query };
    assert_eq!(world.billing.usage(&next_day).await.unwrap(), []);
    world.assert_clean().await;
    world.billing.close().await.unwrap();
    let balance = world.billing.balance(&account()).await.unwrap();
    assert_eq!((balance.leased, balance.available), (Money::ZERO, pico(1_000 - cost)));
}

async fn generation_ends_at_exactly_the_token_that_is_still_paid() {
    // One pico-USD short of an eighth token.
    for (credit, tokens) in
        [(10 * INPUT + 8 * OUTPUT - 1, 7), (10 * INPUT + 7 * OUTPUT, 7), (10 * INPUT + OUTPUT, 1)]
    {
        let world = World::new(credit).await;
        let mut hold = world.billing.admit(request(10, 100)).await.unwrap();
        hold.extend(100).await;
        assert_eq!((hold.granted_output_tokens(), hold.is_final()), (tokens, true), "credit {credit}");
        hold.extend(100).await;
        assert_eq!(hold.granted_output_tokens(), tokens);
        hold.settle(outcome(10, 0, tokens)).await.unwrap();
        assert_eq!(world.posted().await, credit - 10 * INPUT - tokens as i64 * OUTPUT);
        world.assert_clean().await;
    }
}

async fn who_cannot_pay_one_token_is_refused() {
    for credit in [0, 1, 10 * INPUT, 10 * INPUT + OUTPUT - 1] {
        let world = World::new(credit).await;
        match world.billing.admit(request(10, 100)).await {
            Err(AdmitError::InsufficientCredit { needed, available }) => {
                assert_eq!((needed, available), (pico(10 * INPUT + OUTPUT), pico(credit)));
            }
            other => panic!("{other:?}"),
        }
        world.assert_clean().await;
    }
    // What no i64 holds is refused as well, whatever the credit.
    let world = World::new(i64::MAX).await;
    for input_tokens in [i64::MAX as u64 / 2, u64::MAX, 1 << 41] {
        let refused = world.billing.admit(request(input_tokens, 1)).await;
        assert!(matches!(refused, Err(AdmitError::InsufficientCredit { .. })), "{refused:?}");
    }
    let beyond = CreditGrant {
        id: Uuid::now_v7(),
        account: account(),
        amount: pico(1),
        memo: String::new(),
        granted_at: START,
    };
    assert!(matches!(world.billing.credit(&beyond).await, Err(BillingError::Overflow { .. })));
    world.assert_clean().await;
}

async fn a_model_without_a_price_is_refused_and_a_free_one_needs_no_credit() {
    let world = World::new(0).await;
    let mut unknown = request(1, 1);
    unknown.model = "nope".into();
    assert!(
        matches!(world.billing.admit(unknown).await, Err(AdmitError::NoPrice { model, .. }) if model == "nope")
    );
    let mut early = request(1, 1);
    early.admitted_at = time::macros::datetime!(2025-12-31 23:59:59 UTC);
    assert!(matches!(world.billing.admit(early).await, Err(AdmitError::NoPrice { .. })));
    let mut stranger = request(1, 1);
    stranger.account = AccountId::new("nobody");
    assert!(matches!(
        world.billing.admit(stranger).await,
        Err(AdmitError::Unavailable(BillingError::UnknownAccount(_)))
    ));
    let mut free = request(1_000, 100);
    free.model = "free".into();
    let mut hold = world.billing.admit(free).await.unwrap();
    hold.extend(100).await;
    assert_eq!((hold.granted_output_tokens(), hold.is_final()), (100, true));
    hold.settle(outcome(1_000, 0, 100)).await.unwrap();
    assert_eq!(world.posted().await, 0);
    world.assert_clean().await;
}

async fn the_price_is_pinned_at_admission() {
    let world = World::new(10_000).await;
    let hold = world.billing.admit(request(10, 4)).await.unwrap();
    let dearer = PRICES.replace("0.000005", "0.000500");
    let hash = world.billing.apply_price_book(&PriceBook::from_toml(&dearer).unwrap()).await.unwrap();
    let later = world.billing.admit(request(10, 4)).await.unwrap();
    let event = hold.settle(outcome(10, 0, 4)).await.unwrap();
    assert_eq!(event.cost, pico(10 * INPUT + 4 * OUTPUT));
    let event = later.settle(outcome(10, 0, 4)).await.unwrap();
    assert_eq!((event.cost, &event.price_book), (pico(10 * INPUT + 4 * 500), &hash));
    world.posted().await;
    world.assert_clean().await;
}

async fn tokens_beyond_the_hold_are_never_billed() {
    let world = World::new(1_000).await;
    let hold = world.billing.admit(request(10, 4)).await.unwrap();
    let event = hold.settle(outcome(8, 5, 9)).await.unwrap();
    assert_eq!(event.overrun_tokens, 3 + 5);
    assert_eq!(event.cost, pico(5 * INPUT + 5 * CACHED + 4 * OUTPUT));
    world.posted().await;
    world.assert_clean().await;
}

async fn void_and_drop_give_the_whole_hold_back() {
    let world = World::new(10 * INPUT + 4 * OUTPUT).await;
    for _ in 0..3 {
        let hold = world.billing.admit(request(10, 4)).await.unwrap();
        assert!(world.billing.admit(request(0, 1)).await.is_err());
        hold.void(VoidCause::NodeFailed).await;
        drop(world.billing.admit(request(10, 4)).await.unwrap());
    }
    let stats = world.billing.stats();
    assert_eq!((stats.admitted, stats.voided, stats.expired, stats.holds_open), (6, 3, 3, 0));
    assert_eq!(world.posted().await, 10 * INPUT + 4 * OUTPUT);
    world.assert_clean().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_hundred_at_once_against_a_balance_for_ten() {
    for lease_slice in [Money::ZERO, pico(7), pico(1_000_000)] {
        let each = 10 * INPUT + 4 * OUTPUT;
        let world = World::with(10 * each + OUTPUT, BillingLimits { lease_slice, ..limits() }).await;
        let mut tasks = JoinSet::new();
        for _ in 0..100 {
            let billing = world.billing.clone();
            tasks.spawn(async move { billing.admit(request(10, 4)).await });
        }
        let mut holds = Vec::new();
        for admitted in tasks.join_all().await {
            match admitted {
                Ok(hold) => holds.push(hold),
                Err(AdmitError::InsufficientCredit { .. }) => {}
                Err(other) => panic!("{other:?}"),
            }
        }
        assert_eq!(holds.len(), 10, "slice {lease_slice}");
        for hold in holds {
            hold.settle(outcome(10, 0, 4)).await.unwrap();
        }
        assert_eq!(world.posted().await, OUTPUT);
        world.assert_clean().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn streams_that_race_for_the_last_tokens_get_each_once() {
    let tokens = 777;
    let world = World::with(tokens * OUTPUT + 3, BillingLimits { lease_slice: pico(40), ..limits() }).await;
    let mut tasks = JoinSet::new();
    for _ in 0..20 {
        let billing = world.billing.clone();
        tasks.spawn(async move {
            let mut hold = billing.admit(request(0, 10_000)).await.unwrap();
            while !hold.is_final() {
                hold.extend(hold.granted_output_tokens() + 3).await;
            }
            let granted = hold.granted_output_tokens();
            hold.settle(outcome(0, 0, granted)).await.unwrap();
            granted
        });
    }
    let granted: u64 = tasks.join_all().await.into_iter().sum();
    assert_eq!(granted, tokens as u64);
    assert_eq!(world.posted().await, 3);
    world.assert_clean().await;
}

async fn bills_share_a_commit() {
    let world = World::new(100_000).await;
    let mut holds = Vec::new();
    for _ in 0..64 {
        holds.push(world.billing.admit(request(10, 4)).await.unwrap());
    }
    let mut tasks = JoinSet::new();
    for hold in holds {
        tasks.spawn(hold.settle(outcome(10, 0, 4)));
    }
    for settled in tasks.join_all().await {
        settled.unwrap();
    }
    let stats = world.billing.stats();
    assert_eq!((stats.settled, stats.outbox_backlog), (64, 64));
    assert!(stats.outbox_commits <= 4, "{stats:?}");
    world.posted().await;
    assert_eq!(world.billing.stats().outbox_backlog, 0);
    world.assert_clean().await;
}

async fn a_settle_that_nobody_waits_for_is_still_a_bill() {
    let world = World::new(1_000).await;
    let hold = world.billing.admit(request(10, 4)).await.unwrap();
    tokio::select! {
        biased;
        _ = hold.settle(outcome(10, 0, 4)) => panic!("a commit takes longer than one poll"),
        () = std::future::ready(()) => {}
    }
    assert_eq!(world.posted().await, 1_000 - 10 * INPUT - 4 * OUTPUT);
    world.assert_clean().await;
}

#[tokio::test]
async fn without_the_ledger_requests_go_on_under_their_lease_until_the_outbox_is_full() {
    let limits = BillingLimits { lease_slice: pico(500), outbox_events_max: 3, ..limits() };
    let world = World::patient(100_000, limits, Duration::ZERO).await;
    drop(world.billing.admit(request(1, 1)).await.unwrap());
    let other = open_url(&world.url, PATIENCE).await;
    let lock = other.write().await.unwrap();

    let mut holds = Vec::new();
    for _ in 0..3 {
        holds.push(world.billing.admit(request(10, 4)).await.unwrap());
    }
    assert!(
        matches!(world.billing.admit(request(10, 4)).await, Err(AdmitError::OutboxFull { retry_after }) if retry_after > Duration::ZERO)
    );
    for hold in holds.drain(..) {
        hold.settle(outcome(10, 0, 4)).await.unwrap();
    }
    assert!(matches!(world.billing.flush().await, Err(BillingError::Database(_))));
    assert!(matches!(world.billing.admit(request(10, 4)).await, Err(AdmitError::OutboxFull { .. })));
    assert_eq!(world.billing.stats().outbox_backlog, 3);

    lock.rollback().await.unwrap();
    assert_eq!(world.posted().await, 100_000 - 3 * (10 * INPUT + 4 * OUTPUT));
    drop(world.billing.admit(request(10, 4)).await.unwrap());
    world.assert_clean().await;
}

#[tokio::test]
async fn without_the_ledger_a_stream_beyond_its_lease_ends_at_a_token() {
    let world = World::patient(100_000, limits(), Duration::ZERO).await;
    let mut hold = world.billing.admit(request(10, 100)).await.unwrap();
    let other = open_url(&world.url, PATIENCE).await;
    let lock = other.write().await.unwrap();
    hold.extend(8).await;
    assert_eq!((hold.granted_output_tokens(), hold.is_final()), (4, true));
    let refused = world.billing.admit(request(10, 4)).await;
    assert!(matches!(refused, Err(AdmitError::Unavailable(BillingError::Database(_)))), "{refused:?}");
    hold.settle(outcome(10, 0, 4)).await.unwrap();
    lock.rollback().await.unwrap();
    world.posted().await;
    world.assert_clean().await;
}

async fn a_second_bill_for_one_request_is_kept_and_not_charged() {
    let world = World::new(1_000).await;
    let first = request(10, 4);
    let again = first.clone();
    world.billing.admit(first).await.unwrap().settle(outcome(10, 0, 4)).await.unwrap();
    world.billing.admit(again).await.unwrap().settle(outcome(10, 0, 3)).await.unwrap();
    assert_eq!(world.posted().await, 1_000 - 10 * INPUT - 4 * OUTPUT);
    let audit = world.audit().await;
    let failed: Vec<_> = audit.checks.iter().filter(|check| check.failed > 0).collect();
    assert_eq!((failed.len(), failed[0].failed), (1, 1), "{audit:#?}");
    // The money of the refused bill is free again.
    world.billing.close().await.unwrap();
    assert_eq!(world.billing.balance(&account()).await.unwrap().leased, Money::ZERO);
}

async fn a_postpaid_account_spends_its_limit_and_no_more() {
    let world = World::new(0).await;
    let later = AccountId::new("later");
    let kind = AccountKind::Postpaid { credit_limit: pico(10 * INPUT + 2 * OUTPUT) };
    world.billing.create_account(&later, kind).await.unwrap();
    world.billing.create_account(&later, kind).await.unwrap();
    let changed = world.billing.create_account(&later, AccountKind::Prepaid).await;
    assert!(matches!(changed, Err(BillingError::AccountExists(_))));
    let mut request = request(10, 4);
    request.account = later.clone();
    let hold = world.billing.admit(request).await.unwrap();
    assert_eq!((hold.granted_output_tokens(), hold.is_final()), (2, true));
    hold.settle(outcome(10, 0, 2)).await.unwrap();
    world.posted().await;
    let balance = world.billing.balance(&later).await.unwrap();
    assert_eq!((balance.posted, balance.available), (pico(-10 * INPUT - 2 * OUTPUT), Money::ZERO));
    world.assert_clean().await;
}

async fn a_grant_counts_once_and_only_as_it_was_made() {
    let world = World::new(0).await;
    let grant = CreditGrant {
        id: Uuid::now_v7(),
        account: account(),
        amount: pico(50),
        memo: "x".into(),
        granted_at: START,
    };
    world.billing.credit(&grant).await.unwrap();
    world.billing.credit(&grant).await.unwrap();
    let other = CreditGrant { amount: pico(51), ..grant.clone() };
    assert!(matches!(world.billing.credit(&other).await, Err(BillingError::GrantConflict(_))));
    let negative = CreditGrant { id: Uuid::now_v7(), amount: pico(-1), ..grant };
    assert!(matches!(world.billing.credit(&negative).await, Err(BillingError::NotPositive(_))));
    assert_eq!(world.posted().await, 50);
    world.assert_clean().await;
}

#[tokio::test]
async fn one_server_owns_the_outbox_and_anyone_may_read_the_books() {
    let world = World::new(1_000).await;
    world.billing.admit(request(10, 4)).await.unwrap().settle(outcome(10, 0, 4)).await.unwrap();
    let second = open(&world.database, world.dir.path().join("outbox.db"), limits(), &world.elapsed_s).await;
    assert!(matches!(second, Err(BillingError::Outbox { .. })), "{second:?}");

    let lock = world.database.write().await.unwrap();
    let books = Books::open(open_url(&world.url, PATIENCE).await).await.unwrap();
    assert_eq!(books.balance(&account()).await.unwrap().posted, pico(1_000));
    assert!(books.usage(&UsageQuery::default()).await.unwrap().is_empty());
    assert!(books.audit().await.unwrap().is_clean());
    lock.rollback().await.unwrap();
    assert_eq!(world.posted().await, 1_000 - 10 * INPUT - 4 * OUTPUT);
}

async fn a_database_that_could_lose_a_commit_is_refused() {
    let world = World::new(0).await;
    let name = world.database.name().rsplit('/').next().unwrap().to_owned();
    run(&world.database, &format!("ALTER DATABASE {name} SET synchronous_commit = off")).await.unwrap();
    let refused = Database::open(&world.url, &DatabaseOptions::default()).await;
    assert!(
        matches!(refused, Err(DatabaseError::NotDurable { setting: "synchronous_commit", .. })),
        "{refused:?}"
    );
}

#[tokio::test]
async fn postgres_that_could_lose_a_commit_is_refused() {
    KIND.scope(Kind::Postgres, a_database_that_could_lose_a_commit_is_refused()).await;
}

async fn what_postgres_cannot_store_in_a_text_is_left_out() {
    let world = World::new(10_000).await;
    for user in ["nul\0", "tab\t, line\r\n, slash\\N", "\u{1F600}"] {
        for _ in 0..9 {
            let request = AdmitRequest { user: user.into(), ..request(10, 4) };
            world.billing.admit(request).await.unwrap().settle(outcome(10, 0, 4)).await.unwrap();
        }
    }
    assert_eq!(world.posted().await, 10_000 - 27 * (10 * INPUT + 4 * OUTPUT));
    let users = "SELECT DISTINCT end_user FROM usage_events ORDER BY end_user";
    let users: Vec<(String,)> = world.database.read().await.unwrap().fetch_all(users, &[]).await.unwrap();
    let users: Vec<_> = users.iter().map(|(user,)| user.as_str()).collect();
    assert_eq!(users, ["nul", "tab\t, line\r\n, slash\\N", "\u{1F600}"]);
    world.assert_clean().await;
}

async fn after_close_nothing_is_admitted_and_an_open_hold_expires() {
    let world = World::new(1_000).await;
    let hold = world.billing.admit(request(10, 4)).await.unwrap();
    world.billing.close().await.unwrap();
    assert!(matches!(
        world.billing.admit(request(1, 1)).await,
        Err(AdmitError::Unavailable(BillingError::Closed))
    ));
    assert!(hold.settle(outcome(10, 0, 4)).await.is_err());
    world.assert_clean().await;
    let world = world.crash().await;
    assert_eq!(world.billing.balance(&account()).await.unwrap().available, pico(1_000));
}

on_both! {
    a_request_is_billed_from_hold_to_rollup,
    generation_ends_at_exactly_the_token_that_is_still_paid,
    who_cannot_pay_one_token_is_refused,
    a_model_without_a_price_is_refused_and_a_free_one_needs_no_credit,
    the_price_is_pinned_at_admission,
    tokens_beyond_the_hold_are_never_billed,
    void_and_drop_give_the_whole_hold_back,
    bills_share_a_commit,
    a_settle_that_nobody_waits_for_is_still_a_bill,
    a_second_bill_for_one_request_is_kept_and_not_charged,
    a_postpaid_account_spends_its_limit_and_no_more,
    a_grant_counts_once_and_only_as_it_was_made,
    after_close_nothing_is_admitted_and_an_open_hold_expires,
    what_postgres_cannot_store_in_a_text_is_left_out,
}
