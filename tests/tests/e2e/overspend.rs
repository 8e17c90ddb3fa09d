//! A thousand streams race for money that affords ten: not a token beyond it, with one gateway or with three.

use futures::future::join_all;
use serde_json::Value;
use sluice_tests::{Caller, Cluster, Customer, Fate, Platform, Price, eventually};

const STREAMS: usize = 1_000;
const AFFORDED: i64 = 10;
const ANSWER_TOKENS: u32 = 8;
/// Connections that a gateway's share of the streams comes over; each carries up to 1,000.
const CONNECTIONS: usize = 4;
/// What one gateway leased and did not use is soon there for the others.
const EAGER: &str = "[billing]\nlease_idle_ms = 1000\nrefresh_ms = 100\n";

/// What the streams race for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Purse {
    Balance,
    KeyBudget,
}

impl Purse {
    fn code(self) -> &'static str {
        match self {
            Purse::Balance => "insufficient_quota",
            Purse::KeyBudget => "budget_exceeded",
        }
    }
}

fn question(cluster: &Cluster) -> Value {
    cluster.question("Why?", ANSWER_TOKENS)
}

/// Whether the purse still pays for something.
fn is_refusal(fate: &Fate, purse: Purse) -> bool {
    match fate {
        Fate::Refused { status: 429, text } if text.contains(purse.code()) => true,
        Fate::Completed { .. } => false,
        other => panic!("an answer, or a refusal for want of money: {other:?}"),
    }
}

/// A customer who can pay for [`AFFORDED`] requests of `each_pico`, and how much that is.
async fn customer(platform: &Platform, purse: Purse, each_pico: i64) -> (Customer, i64) {
    let (gateway, limit) = (platform.gateway(), AFFORDED * each_pico);
    if purse == Purse::Balance {
        return (gateway.customer("racing", Some(limit)).await, limit);
    }
    let customer = gateway.customer("racing", Some(1_000 * limit)).await;
    // Once every gateway refuses at a limit of 0, each of them knows of the budget.
    gateway.limit_key(&customer, 0).await;
    for gateway in &platform.gateways {
        let caller = gateway.caller(&customer.key);
        eventually("the budget is in force", async || match caller.ask(&question(gateway)).await {
            Fate::Refused { text, .. } if text.contains(purse.code()) => Ok(()),
            fate => Err(format!("{fate:?}")),
        })
        .await;
    }
    platform.settled().await;
    let limit = gateway.budget_spent_pico(&customer).await + limit;
    gateway.limit_key(&customer, limit).await;
    (customer, limit)
}

async fn left(platform: &Platform, purse: Purse, customer: &Customer, limit: i64) -> i64 {
    match purse {
        Purse::Balance => platform.gateway().balance_of(customer).await,
        Purse::KeyBudget => limit - platform.gateway().budget_spent_pico(customer).await,
    }
}

async fn a_thousand_streams(platform: Platform, purse: Purse) {
    let gateway = platform.gateway();
    let Price { input_pico, output_pico, .. } = gateway.price().await;
    let (prompt, completion) = gateway.chat(&question(gateway)).await.usage();
    let each = prompt as i64 * input_pico + completion as i64 * output_pico;
    let (customer, limit) = customer(&platform, purse, each).await;
    platform.settled().await;
    let (billed_before, odometer_before) = (gateway.bills().await, gateway.metrics().await);
    let left_before = left(&platform, purse, &customer, limit).await;

    let connections: Vec<Caller> = (0..CONNECTIONS)
        .flat_map(|_| platform.gateways.iter().map(|gateway| gateway.caller_of_many(&customer.key)))
        .collect();
    let body = question(gateway);
    let fates = join_all((0..STREAMS).map(|number| connections[number % connections.len()].ask(&body))).await;
    platform.settled().await;

    let (bills, odometer) = (gateway.bills().await, gateway.metrics().await);
    let new: Vec<_> = bills.iter().filter(|(id, _)| !billed_before.contains_key(*id)).collect();
    let completed: Vec<&Fate> = fates.iter().filter(|fate| !is_refusal(fate, purse)).collect();
    assert!(!completed.is_empty(), "some of them got something");
    assert_eq!(new.len(), completed.len(), "each answer has its bill, and nothing else has");
    for fate in completed {
        let Fate::Completed { request_id, usage } = fate else { unreachable!("refusals are sorted out") };
        let bill = bills.get(request_id).unwrap_or_else(|| panic!("{request_id} has no bill"));
        assert_eq!((bill.prompt_tokens(), bill.output_tokens), *usage, "{request_id}");
    }
    let spent: i64 = new.iter().map(|(_, bill)| bill.cost_pico).sum();
    println!("{} of {STREAMS} streams were answered, {spent} of {left_before} pico-USD spent", new.len());
    assert!(spent <= left_before, "{spent} of {left_before} spent");
    assert_eq!(left(&platform, purse, &customer, limit).await, left_before - spent);
    let tokens: u64 = new.iter().map(|(_, bill)| bill.prompt_tokens() + bill.output_tokens).sum();
    let computed = odometer.node_tokens() - odometer_before.node_tokens();
    assert_eq!(computed, tokens, "the engine computed what was billed, and not a token more");

    // What was held or leased and not used is there to be spent, to the last token that fits.
    let least = prompt as i64 * input_pico + output_pico;
    let rest = eventually("the rest is spent", async || {
        for gateway in &platform.gateways {
            let caller = gateway.caller(&customer.key);
            while !is_refusal(&caller.ask(&body).await, purse) {}
        }
        platform.settled().await;
        match left(&platform, purse, &customer, limit).await {
            rest if rest < least => Ok(rest),
            rest => Err(format!("{rest} is left, and {least} would do")),
        }
    })
    .await;
    assert!(rest >= 0, "{rest} is left");
    platform.finish().await;
}

#[tokio::test]
async fn a_balance_is_never_overspent_by_one_gateway() {
    a_thousand_streams(Platform::on_sqlite(EAGER).await, Purse::Balance).await;
}

#[tokio::test]
async fn a_budget_is_never_overspent_by_one_gateway() {
    a_thousand_streams(Platform::on_sqlite(EAGER).await, Purse::KeyBudget).await;
}

#[tokio::test]
async fn a_balance_is_never_overspent_by_three_gateways() {
    a_thousand_streams(Platform::on_postgres(3, EAGER).await, Purse::Balance).await;
}

#[tokio::test]
async fn a_budget_is_never_overspent_by_three_gateways() {
    a_thousand_streams(Platform::on_postgres(3, EAGER).await, Purse::KeyBudget).await;
}
