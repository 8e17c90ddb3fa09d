//! Price books at work: tiers of service, contracts, packages, and books that others apply while a gateway runs.

use std::time::Duration;

use proptest::prelude::*;
use sluice_billing::{
    AccountId, AccountKind, AdmitError, AdmitRequest, BillingLimits, Books, CreditGrant, Media, Outcome,
    PriceBook, ServiceTier,
};
use time::macros::datetime;
use uuid::Uuid;

use crate::support::*;

/// What `m` costs beside the plain prices of every world: a batch tier, packages of output, a contract.
const MORE: &str = r#"
    currency = "USD"
    effective_from = "2026-02-01T00:00:00Z"
    price = [
        { model = "m", meter = "input", usd_per_million = "0.000003" },
        { model = "m", meter = "cached_input", usd_per_million = "0.000001" },
        { model = "m", meter = "output", scheme = "package", usd = "0.00000000005", per = 10 },
        { model = "m", meter = "requests", usd_per_unit = "0.000000000002" },
        { model = "m", meter = "input", usd_per_million = "0.000002", account = "beta" },
        { model = "m", meter = "input", service_tier = "batch", usd_per_million = "0.000002" },
        { model = "m", meter = "cached_input", service_tier = "batch", usd_per_million = "0.000001" },
        { model = "m", meter = "output", service_tier = "batch", usd_per_million = "0.000003" },
        { model = "embed", meter = "input", usd_per_million = "0.000001" },
        { model = "paint", meter = "images", usd_per_unit = "0.000000000007" },
    ]
"#;

async fn world(credit: i64) -> World {
    let world = World::new(credit).await;
    world.billing.apply_price_book(&PriceBook::from_toml(MORE).unwrap()).await.unwrap();
    world
}

async fn a_service_tier_has_its_own_prices_or_is_refused_by_name() {
    let world = world(1_000).await;
    let batch = AdmitRequest { service_tier: ServiceTier::Batch, ..request(10, 4) };
    let event = world.billing.admit(batch).await.unwrap().settle(outcome(10, 0, 4)).await.unwrap();
    assert_eq!((event.cost, event.service_tier), (pico(10 * 2 + 4 * 3), ServiceTier::Batch));
    let priority = AdmitRequest { service_tier: ServiceTier::Priority, ..request(10, 4) };
    let refused = world.billing.admit(priority).await.unwrap_err();
    assert!(matches!(&refused, AdmitError::NoPrice { service_tier: ServiceTier::Priority, .. }));
    assert_eq!(refused.to_string(), "there is no priority price for the model m");
}

async fn a_package_that_is_begun_covers_its_tokens_and_stops_at_its_end() {
    // A request is 2, a prompt token 3; then money for two packages of 10 tokens, and not for a third.
    let world = world(2 + 3 + 2 * 50 + 49).await;
    let mut hold = world.billing.admit(request(1, 100)).await.unwrap();
    assert_eq!((hold.granted_output_tokens(), hold.is_final()), (4, false));
    for (asked, granted) in [(5, 5), (10, 10), (11, 11), (20, 20)] {
        hold.extend(asked).await;
        assert_eq!((hold.granted_output_tokens(), hold.is_final()), (granted, false), "{asked}");
    }
    hold.extend(21).await;
    assert_eq!((hold.granted_output_tokens(), hold.is_final()), (20, true));
    let event = hold.settle(outcome(1, 0, 20)).await.unwrap();
    assert_eq!(event.cost, pico(2 + 3 + 2 * 50));
    assert_eq!(world.posted().await, 49);
}

async fn a_contract_is_held_and_billed_by_its_own_prices() {
    let world = world(1_000).await;
    let beta = AccountId::new("beta");
    world.billing.create_account(&beta, AccountKind::Prepaid).await.unwrap();
    let (id, amount) = (Uuid::now_v7(), pico(2 + 10 * 2 + 50));
    let grant = CreditGrant { id, account: beta.clone(), amount, memo: String::new(), granted_at: START };
    world.billing.credit(&grant).await.unwrap();
    // Exactly enough by the contract, and not by the list.
    let own = AdmitRequest { account: beta, ..request(10, 10) };
    let event = world.billing.admit(own).await.unwrap().settle(outcome(10, 0, 1)).await.unwrap();
    assert_eq!(event.cost, amount);
}

async fn what_is_no_chat_is_held_and_billed_by_what_it_uses() {
    let world = world(1_000).await;
    let embed = AdmitRequest { model: "embed".into(), ..request(10, 0) };
    let event = world.billing.admit(embed).await.unwrap().settle(outcome(6, 4, 0)).await.unwrap();
    assert_eq!(event.cost, pico(10));
    let answer = AdmitRequest { model: "embed".into(), ..request(10, 1) };
    assert!(matches!(world.billing.admit(answer).await, Err(AdmitError::NoPrice { .. })));
    let media_max = Media { images: 2, ..Media::default() };
    let paint = AdmitRequest { model: "paint".into(), media_max, ..request(0, 0) };
    let hold = world.billing.admit(paint).await.unwrap();
    // A node that painted more than was held is not paid for it.
    let media = Media { images: 3, ..Media::default() };
    let event = hold.settle(Outcome { media, ..outcome(0, 0, 0) }).await.unwrap();
    assert_eq!((event.quantities.images, event.cost), (2, pico(14)));
}

async fn a_running_gateway_takes_up_a_book_that_another_process_applied() {
    let world = World::with(1_000, BillingLimits { refresh: Duration::from_millis(1), ..limits() }).await;
    // Nothing is shipped here, which would be another occasion to look for books.
    let elsewhere = Books::open(world.database.clone()).await.unwrap();
    let book = PriceBook::from_toml(MORE).unwrap();
    elsewhere.apply_price_book(&book).await.unwrap();
    let at = datetime!(2026-03-01 00:00 UTC);
    while world.billing.catalog().in_force(at).unwrap().hash() != book.hash() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let event = world.billing.admit(request(10, 4)).await.unwrap().settle(outcome(10, 0, 4)).await.unwrap();
    assert_eq!(&event.price_book, book.hash());
}

on_both! {
    a_service_tier_has_its_own_prices_or_is_refused_by_name,
    a_package_that_is_begun_covers_its_tokens_and_stops_at_its_end,
    a_contract_is_held_and_billed_by_its_own_prices,
    what_is_no_chat_is_held_and_billed_by_what_it_uses,
    a_running_gateway_takes_up_a_book_that_another_process_applied,
}

/// A book of one model, every price random; tiers, packages and contracts among them.
fn random_book() -> impl Strategy<Value = String> {
    let price = || {
        let pico = || (0..40u64).prop_map(|pico| format!("usd_per_million = \"0.{pico:06}\""));
        prop_oneof![
            pico(),
            (0..90u64, 2..12u64).prop_map(|(pico, per)| {
                format!("scheme = \"package\", usd = \"0.{pico:012}\", per = {per}")
            }),
            (1..20u64, pico(), pico(), any::<bool>()).prop_map(|(up_to, low, high, volume)| {
                let scheme = if volume { "volume" } else { "graduated" };
                format!("scheme = \"{scheme}\", tiers = [{{ up_to = {up_to}, {low} }}, {{ {high} }}]")
            }),
        ]
        .boxed()
    };
    let rows = |account: &'static str| {
        (price(), price(), price(), proptest::option::of(price()), proptest::option::of(price())).prop_map(
            move |(input, cached, output, reasoning, requests)| {
                let row = |meter: &str, price: &str| {
                    format!("{{ model = \"m\", meter = \"{meter}\", {account}{price} }},")
                };
                let optional =
                    |meter, price: Option<String>| price.map_or(String::new(), |price| row(meter, &price));
                [
                    row("input", &input),
                    row("cached_input", &cached),
                    row("output", &output),
                    optional("reasoning", reasoning),
                    optional("requests", requests),
                ]
                .concat()
            },
        )
    };
    (rows(""), proptest::option::of(rows("account = \"acme\", "))).prop_map(|(list, contract)| {
        let contract = contract.unwrap_or_default();
        format!("currency = \"USD\"\neffective_from = \"2026-02-01T00:00:00Z\"\nprice = [{list}{contract}]")
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]
    /// Settling asserts that the bill is at most the hold; here, whatever the book, the outcome and the credit.
    #[test]
    fn no_bill_is_above_its_hold(
        text in random_book(),
        (credit, prompt, output_max) in (0..3_000i64, 0..40u64, 0..60u64),
        extends in proptest::collection::vec(1..30u64, 0..4),
        (cached, reasoning, overrun) in (0..50u64, 0..70u64, 0..5u64),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let world = World::new(credit).await;
            let book = PriceBook::from_toml(&text).expect("the book is valid");
            world.billing.apply_price_book(&book).await.unwrap();
            let mut hold = match world.billing.admit(request(prompt, output_max)).await {
                Ok(hold) => hold,
                Err(AdmitError::InsufficientCredit { needed, available }) => return assert!(needed > available),
                Err(other) => panic!("{other:?}"),
            };
            for more in extends {
                hold.extend(hold.granted_output_tokens() + more).await;
            }
            let granted = hold.granted_output_tokens();
            let (cached, reasoning) = (cached.min(prompt), reasoning.min(granted));
            let outcome = outcome(prompt - cached, cached, granted - reasoning + overrun);
            let event = hold.settle(Outcome { reasoning_tokens: reasoning, ..outcome }).await.unwrap();
            assert!(event.cost <= pico(credit));
            let again = book.price(&account(), "m", ServiceTier::Default, &event.quantities).unwrap();
            assert_eq!(sluice_billing::cost(&again), Some(event.cost));
            assert_eq!(world.posted().await, credit - event.cost.pico());
        });
    }
}
