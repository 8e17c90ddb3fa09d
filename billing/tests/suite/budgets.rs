//! Budgets: hard ones hold to the token, however many gateways and requests draw on them; soft ones only count.

use std::sync::atomic::Ordering;

use sluice_billing::{
    AdmitError, AdmitRequest, Billing, BillingError, BillingLimits, Budget, BudgetPeriod, BudgetScope, Money,
};
use tokio::task::JoinSet;

use crate::support::*;

const DAY: std::time::Duration = std::time::Duration::from_secs(86_400);

fn budget(id: &str, scope: BudgetScope, limit: i64) -> Budget {
    let scope_id = match scope {
        BudgetScope::Org => "org",
        BudgetScope::Project => "project",
        BudgetScope::Key => "key",
    };
    let (scope_id, limit) = (scope_id.to_owned(), pico(limit));
    Budget {
        id: id.into(),
        scope,
        scope_id,
        period: BudgetPeriod::Day,
        limit,
        hard: true,
        thresholds: vec![50, 100],
    }
}

async fn spent(world: &World, id: &str) -> i64 {
    let statuses = world.billing.books().budgets(START).await.unwrap();
    statuses.iter().find(|status| status.budget.id == id).expect(id).spent.pico()
}

async fn generation_ends_at_the_token_that_the_smallest_budget_affords() {
    let world = World::new(100_000).await;
    world.billing.put_budget(&budget("org", BudgetScope::Org, 10 * INPUT + 9 * OUTPUT)).await.unwrap();
    world.billing.put_budget(&budget("key", BudgetScope::Key, 10 * INPUT + 6 * OUTPUT + 1)).await.unwrap();
    let mut hold = world.billing.admit(request(10, 100)).await.unwrap();
    hold.extend(100).await;
    assert_eq!((hold.granted_output_tokens(), hold.is_final()), (6, true));
    hold.settle(outcome(10, 0, 6)).await.unwrap();
    match world.billing.admit(request(0, 1)).await {
        Err(AdmitError::OverBudget { budget, needed, available }) => {
            assert!(budget.starts_with("key (key key"), "{budget}");
            assert_eq!((needed, available), (pico(OUTPUT), pico(1)));
        }
        other => panic!("{other:?}"),
    }
    // Another key of the same organisation has its own.
    let other = AdmitRequest { api_key: "other".into(), ..request(0, 100) };
    let mut hold = world.billing.admit(other).await.unwrap();
    hold.extend(100).await;
    assert_eq!(hold.granted_output_tokens(), 3);
    hold.settle(outcome(0, 0, 3)).await.unwrap();
    world.posted().await;
    assert_eq!(
        (spent(&world, "key").await, spent(&world, "org").await),
        (10 * INPUT + 6 * OUTPUT, 10 * INPUT + 9 * OUTPUT)
    );
    world.assert_clean().await;
}

async fn a_window_begins_with_what_was_spent_in_it_and_ends_with_its_day() {
    let world = World::new(100_000).await;
    world.billing.admit(request(10, 4)).await.unwrap().settle(outcome(10, 0, 4)).await.unwrap();
    world.posted().await;
    let used = 10 * INPUT + 4 * OUTPUT;
    world.billing.put_budget(&budget("b", BudgetScope::Project, used + 2 * OUTPUT)).await.unwrap();
    assert_eq!(spent(&world, "b").await, used);
    let hold = world.billing.admit(request(0, 4)).await.unwrap();
    assert_eq!((hold.granted_output_tokens(), hold.is_final()), (2, true));
    hold.settle(outcome(0, 0, 2)).await.unwrap();
    let tomorrow = AdmitRequest { admitted_at: START + DAY, ..request(0, 4) };
    let hold = world.billing.admit(tomorrow).await.unwrap();
    assert_eq!(hold.granted_output_tokens(), 4);
    hold.settle(outcome(0, 0, 4)).await.unwrap();
    world.posted().await;
    assert_eq!(spent(&world, "b").await, used + 2 * OUTPUT);
    world.assert_clean().await;
}

async fn a_soft_budget_counts_and_ends_nothing() {
    let world = World::new(100_000).await;
    let soft = Budget { hard: false, ..budget("soft", BudgetScope::Org, 1) };
    world.billing.put_budget(&soft).await.unwrap();
    world.billing.admit(request(10, 4)).await.unwrap().settle(outcome(10, 0, 4)).await.unwrap();
    world.posted().await;
    assert_eq!(spent(&world, "soft").await, 10 * INPUT + 4 * OUTPUT);
    world.assert_clean().await;
}

async fn thresholds_and_refusals_are_told_once() {
    const EACH: i64 = 10 * INPUT + 4 * OUTPUT;
    let world = World::new(100_000).await;
    world.billing.put_budget(&budget("b", BudgetScope::Key, 2 * EACH)).await.unwrap();
    for _ in 0..2 {
        world.billing.admit(request(10, 4)).await.unwrap().settle(outcome(10, 0, 4)).await.unwrap();
        world.posted().await;
    }
    for _ in 0..2 {
        assert!(world.billing.admit(request(10, 4)).await.is_err());
    }
    let told = "SELECT kind, payload FROM notices WHERE subject = 'b' ORDER BY ordinal";
    let told: Vec<(String, String)> =
        world.database.read().await.unwrap().fetch_all(told, &[]).await.unwrap();
    let percent =
        |payload: &str| serde_json::from_str::<serde_json::Value>(payload).unwrap()["percent"].as_u64();
    let told: Vec<_> = told.iter().map(|(kind, payload)| (kind.as_str(), percent(payload))).collect();
    let reached = "budget.threshold_reached";
    assert_eq!(told, [(reached, Some(50)), (reached, Some(100)), ("budget.exhausted", None)]);
}

async fn budgets_change_and_end_while_holds_are_open() {
    let world = World::new(100_000).await;
    let mut changing = budget("b", BudgetScope::Key, 1_000);
    world.billing.put_budget(&changing).await.unwrap();
    let hold = world.billing.admit(request(10, 4)).await.unwrap();
    changing.limit = Money::ZERO;
    world.billing.put_budget(&changing).await.unwrap();
    assert!(matches!(world.billing.admit(request(10, 4)).await, Err(AdmitError::OverBudget { .. })));
    let other_period = Budget { period: BudgetPeriod::Total, ..changing.clone() };
    let refused = world.billing.put_budget(&other_period).await;
    assert!(matches!(refused, Err(BillingError::Budget { field: "id", .. })), "{refused:?}");
    assert!(world.billing.delete_budget("b").await.unwrap());
    assert!(!world.billing.delete_budget("b").await.unwrap());
    world.billing.admit(request(10, 4)).await.unwrap().settle(outcome(10, 0, 4)).await.unwrap();
    hold.settle(outcome(10, 0, 4)).await.unwrap();
    assert_eq!(world.posted().await, 100_000 - 2 * (10 * INPUT + 4 * OUTPUT));
    world.assert_clean().await;
    let world = world.crash().await;
    world.assert_clean().await;
    assert_eq!(world.billing.balance(&account()).await.unwrap().leased, Money::ZERO);
}

async fn a_gateway_that_dies_gives_its_part_of_a_budget_back() {
    let world = World::new(100_000).await;
    world.billing.put_budget(&budget("b", BudgetScope::Key, 10 * INPUT + 4 * OUTPUT)).await.unwrap();
    let hold = world.billing.admit(request(10, 4)).await.unwrap();
    assert!(world.billing.admit(request(0, 1)).await.is_err());
    let image = world.image();
    drop(hold);
    let world = world.reopen(image).await;
    let hold = world.billing.admit(request(10, 4)).await.unwrap();
    assert_eq!(hold.granted_output_tokens(), 4);
    world.assert_clean().await;
}

/// Three gateways on one database, forty requests at once on each, a budget and an account that afford ten.
async fn gateways_together_never_overspend() {
    const EACH: i64 = 10 * INPUT + 4 * OUTPUT;
    let limits = BillingLimits { lease_slice: pico(3 * EACH), ..limits() };
    let world = World::with(15 * EACH, limits.clone()).await;
    world.billing.put_budget(&budget("b", BudgetScope::Key, 10 * EACH)).await.unwrap();
    let mut gateways = vec![world.billing.clone()];
    for name in ["second.db", "third.db"] {
        let outbox = world.dir.path().join(name);
        gateways.push(open(&world.database, outbox, limits.clone(), &world.elapsed_s).await.unwrap());
    }
    let mut requests = JoinSet::new();
    for gateway in &gateways {
        for _ in 0..40 {
            requests.spawn(one_request(gateway.clone()));
        }
    }
    let costs = requests.join_all().await;
    let total: i64 = costs.iter().sum();
    for gateway in &gateways {
        gateway.flush().await.unwrap();
    }
    assert!(total <= 10 * EACH, "{total} of {}", 10 * EACH);
    assert!(total > 7 * EACH, "{total}: what one gateway has leased is lost to the others only for a while");
    assert_eq!(spent(&world, "b").await, total);
    // What lies idle goes back, and the rest can be spent by whoever wants it.
    for gateway in &gateways[1..] {
        gateway.close().await.unwrap();
    }
    let left = 10 * EACH - total;
    let mut hold = world.billing.admit(request(0, 1_000)).await;
    if let Ok(hold) = &mut hold {
        hold.extend(1_000).await;
    }
    let granted = hold.as_ref().map_or(0, |hold| hold.granted_output_tokens());
    assert_eq!(granted as i64, left / OUTPUT);
    drop(hold);
    world.elapsed_s.store(1, Ordering::Relaxed);
    world.assert_clean().await;
}

/// The cost of a request for ten and four tokens; 0 if it was refused.
async fn one_request(gateway: Billing) -> i64 {
    let Ok(hold) = gateway.admit(request(10, 4)).await else { return 0 };
    tokio::task::yield_now().await;
    let tokens = hold.granted_output_tokens();
    hold.settle(outcome(10, 0, tokens)).await.unwrap().cost.pico()
}

on_both! {
    generation_ends_at_the_token_that_the_smallest_budget_affords,
    a_window_begins_with_what_was_spent_in_it_and_ends_with_its_day,
    a_soft_budget_counts_and_ends_nothing,
    thresholds_and_refusals_are_told_once,
    budgets_change_and_end_while_holds_are_open,
    a_gateway_that_dies_gives_its_part_of_a_budget_back,
    gateways_together_never_overspend,
}
