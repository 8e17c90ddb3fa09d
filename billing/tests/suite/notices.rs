//! Notices are written with their cause, once: balance alerts through real credit, usage and crashes.

use sluice_billing::{
    AccountId, Billing, BillingError, FinishReason, Money, Outcome,
    notice::{self, Notice, NoticeKind, StoredNotice},
};

use crate::support::*;

async fn notices(world: &World) -> Vec<StoredNotice> {
    let mut conn = world.database.read().await.unwrap();
    let mut notices = Vec::new();
    for ordinal in notice::ordinals_after(&mut conn, 0, 1000).await.unwrap() {
        notices.push(notice::get(&mut conn, ordinal).await.unwrap().expect("a listed notice is there"));
    }
    notices
}

async fn kinds(world: &World) -> Vec<String> {
    notices(world).await.into_iter().map(|notice| notice.kind).collect()
}

async fn alert_at(billing: &Billing, low_balance: Option<i64>) {
    billing.books().set_low_balance_alert(&account(), low_balance.map(pico), START).await.unwrap();
    let set = billing.books().low_balance_alert(&account()).await.unwrap();
    assert_eq!(set.map(Money::pico), low_balance);
}

/// One request of `tokens` output tokens, shipped.
async fn spend(world: &World, tokens: u64, finish_reason: FinishReason) {
    let mut hold = world.billing.admit(request(0, tokens)).await.unwrap();
    hold.extend(tokens).await;
    hold.settle(Outcome { finish_reason, ..outcome(0, 0, tokens) }).await.unwrap();
    world.posted().await;
}

async fn a_low_balance_is_told_with_the_usage_that_caused_it_and_again_after_a_top_up() {
    let world = World::new(10 * OUTPUT).await;
    alert_at(&world.billing, Some(5 * OUTPUT)).await;
    spend(&world, 5, FinishReason::Stop).await;
    assert_eq!(kinds(&world).await, Vec::<String>::new(), "at the threshold is not below it");
    spend(&world, 1, FinishReason::Stop).await;
    spend(&world, 1, FinishReason::Stop).await;
    let told = notices(&world).await;
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!((told[0].kind.as_str(), told[0].account.as_str()), ("balance.low", "acme"));
    assert_eq!(told[0].payload["left"], "0.00000000002", "4 tokens of 5 pico-USD");
    assert_eq!(told[0].payload["low_balance"], "0.000000000025");
    world.credit(2 * OUTPUT).await;
    spend(&world, 1, FinishReason::Stop).await;
    assert_eq!(kinds(&world).await, ["balance.low", "balance.low"]);
    world.assert_clean().await;
}

async fn an_account_is_used_up_once_until_it_is_topped_up() {
    let world = World::new(4 * OUTPUT + 2).await;
    spend(&world, 4, FinishReason::Budget).await;
    assert_eq!(kinds(&world).await, ["balance.exhausted"], "2 pico-USD do not pay for a token");
    world.credit(OUTPUT).await;
    assert_eq!(kinds(&world).await.len(), 1);
    spend(&world, 1, FinishReason::Budget).await;
    assert_eq!(kinds(&world).await, ["balance.exhausted", "balance.exhausted"]);
    world.assert_clean().await;
}

async fn a_threshold_above_the_balance_is_told_at_once_and_one_that_is_gone_never() {
    let world = World::new(10 * OUTPUT).await;
    alert_at(&world.billing, Some(20 * OUTPUT)).await;
    alert_at(&world.billing, Some(20 * OUTPUT)).await;
    assert_eq!(kinds(&world).await, ["balance.low"]);
    alert_at(&world.billing, Some(9 * OUTPUT)).await;
    alert_at(&world.billing, None).await;
    spend(&world, 9, FinishReason::Stop).await;
    assert_eq!(kinds(&world).await, ["balance.low"]);

    let books = world.billing.books();
    let nobody = AccountId::new("nobody");
    assert!(matches!(books.low_balance_alert(&nobody).await, Err(BillingError::UnknownAccount(_))));
    for (account, amount) in [(nobody, pico(1)), (account(), Money::ZERO), (account(), pico(-1))] {
        assert!(
            books.set_low_balance_alert(&account, Some(amount), START).await.is_err(),
            "{account} {amount}"
        );
    }
}

async fn a_notice_is_raised_once_for_its_key_and_not_without_its_cause() {
    let world = World::new(1).await;
    let notice = |key: &str| Notice {
        kind: NoticeKind::INVOICE_READY,
        account: account(),
        subject: "inv-1".into(),
        payload: serde_json::json!({ "total": "1.00" }),
        dedupe_key: key.into(),
        at: START,
    };
    let mut tx = world.database.write().await.unwrap();
    assert!(notice::raise(&mut tx, &notice("invoice:1")).await.unwrap());
    assert!(!notice::raise(&mut tx, &notice("invoice:1")).await.unwrap());
    tx.commit().await.unwrap();
    let mut tx = world.database.write().await.unwrap();
    assert!(!notice::raise(&mut tx, &notice("invoice:1")).await.unwrap());
    assert!(notice::raise(&mut tx, &notice("invoice:2")).await.unwrap());
    drop(tx);
    let told = notices(&world).await;
    assert_eq!(told.len(), 1, "what was rolled back was never raised: {told:?}");
    assert_eq!((told[0].subject.as_str(), &told[0].payload["total"]), ("inv-1", &serde_json::json!("1.00")));

    for statement in ["UPDATE notices SET kind = 'x'", "DELETE FROM notices"] {
        let refused = run(&world.database, statement).await.expect_err("notices are append-only");
        assert!(refused.to_string().contains("append-only"), "{refused}");
    }
}

/// The power cut comes after the bill is durable here and before it is in the ledger.
async fn a_crash_neither_loses_a_notice_nor_repeats_it() {
    let world = World::new(10 * OUTPUT).await;
    alert_at(&world.billing, Some(8 * OUTPUT)).await;
    let mut hold = world.billing.admit(request(0, 4)).await.unwrap();
    hold.extend(4).await;
    hold.settle(outcome(0, 0, 4)).await.unwrap();
    let world = world.crash().await;
    assert_eq!(kinds(&world).await, ["balance.low"]);
    let world = world.crash().await;
    spend(&world, 1, FinishReason::Stop).await;
    assert_eq!(kinds(&world).await, ["balance.low"]);
    world.assert_clean().await;
}

on_both!(
    a_low_balance_is_told_with_the_usage_that_caused_it_and_again_after_a_top_up,
    an_account_is_used_up_once_until_it_is_topped_up,
    a_threshold_above_the_balance_is_told_at_once_and_one_that_is_gone_never,
    a_notice_is_raised_once_for_its_key_and_not_without_its_cause,
    a_crash_neither_loses_a_notice_nor_repeats_it,
);
