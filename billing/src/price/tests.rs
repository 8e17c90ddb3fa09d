use super::*;
use crate::money::Money;

const BOOK: &str = r#"
    currency = "USD"
    effective_from = "2026-01-01T02:00:00+02:00"
    price = [
        { model = "b", meter = "output", usd_per_million = "0.80" },
        { model = "b", meter = "input", usd_per_million = "0.2", sku = "IN \"b\" \\ é" },
        { model = "b", meter = "cached_input", usd_per_million = "0.000001" },
    ]
"#;

fn book(text: &str) -> PriceBook {
    PriceBook::from_toml(text).expect("the book is valid")
}

fn acme() -> AccountId {
    AccountId::new("acme")
}

fn beta() -> AccountId {
    AccountId::new("beta")
}

/// Everything that a book can hold.
const FULL: &str = r#"
    currency = "USD"
    effective_from = "2026-01-01T00:00:00Z"

    [[price]]
    model = "chat"
    meter = "input"
    usd_per_million = "1.00"
    [[price]]
    model = "chat"
    meter = "cached_input"
    usd_per_million = "0.10"
    [[price]]
    model = "chat"
    meter = "output"
    sku = "chat.out"
    scheme = "graduated"
    tiers = [{ up_to = 1000, usd_per_million = "4" }, { usd_per_unit = "0.000003" }]
    [[price]]
    model = "chat"
    meter = "reasoning"
    scheme = "volume"
    tiers = [{ up_to = 1000, usd = "2", per = 1000000 }, { usd_per_million = "1" }]
    [[price]]
    model = "chat"
    meter = "requests"
    usd_per_unit = "0.001"

    [[price]]
    model = "chat"
    meter = "output"
    account = "acme"
    usd_per_million = "2.00"

    [[price]]
    model = "chat"
    meter = "input"
    service_tier = "batch"
    usd_per_million = "0.50"
    [[price]]
    model = "chat"
    meter = "cached_input"
    service_tier = "batch"
    usd_per_million = "0.05"
    [[price]]
    model = "chat"
    meter = "output"
    service_tier = "batch"
    usd_per_million = "2.00"

    [[price]]
    model = "embed"
    meter = "input"
    usd_per_million = "0.02"
    [[price]]
    model = "paint"
    meter = "images"
    usd_per_unit = "0.04"
    [[price]]
    model = "private"
    meter = "images"
    account = "acme"
    usd_per_unit = "0.01"
    [[price]]
    model = "speak"
    meter = "characters"
    scheme = "package"
    usd = "0.015"
    per = 1000
    [[price]]
    model = "listen"
    meter = "seconds"
    usd = "0.006"
    per = 60
"#;

/// (meter, quantity, unit price, amount) of each line.
fn told(lines: &[Line]) -> Vec<(Meter, u64, i64, i64)> {
    let told = |line: &Line| (line.meter, line.quantity, line.unit_price.pico(), line.amount.pico());
    lines.iter().map(told).collect()
}

#[test]
fn prices_are_exact_pico_usd_a_token() {
    let quantities = Quantities { input_tokens: 7, output_tokens: 3, ..Quantities::default() };
    let lines = book(BOOK).price(&acme(), "b", ServiceTier::Default, &quantities).unwrap();
    let amounts: Vec<_> = lines.iter().map(|line| (line.meter, line.amount.pico())).collect();
    assert_eq!(amounts, [(Meter::Input, 7 * 200_000), (Meter::Output, 3 * 800_000)]);
    assert_eq!(cost(&lines), Some(Money::from_pico(3_800_000)));
}

#[test]
fn each_meter_has_its_unit_and_tiers_are_rated_at_their_highest() {
    let book = book(FULL);
    let price = |model, quantities| {
        told(&book.price(&beta(), model, ServiceTier::Default, &quantities).expect("a price"))
    };
    let none = Quantities::default();
    let chat = Quantities {
        input_tokens: 5,
        cached_input_tokens: 2,
        output_tokens: 4_000,
        reasoning_tokens: 9,
        ..none
    };
    let expected = [
        (Meter::Input, 5, 1_000_000, 5_000_000),
        (Meter::CachedInput, 2, 100_000, 200_000),
        (Meter::Output, 4_000, 4_000_000, 16_000_000_000),
        (Meter::Reasoning, 9, 2_000_000, 18_000_000),
        (Meter::Requests, 1, 1_000_000_000, 1_000_000_000),
    ];
    assert_eq!(price("chat", chat), expected);
    let paint = price("paint", Quantities { images: 3, ..none });
    assert_eq!(paint, [(Meter::Images, 3, 40_000_000_000, 120_000_000_000)]);
    let listen = price("listen", Quantities { seconds: 61, ..none });
    assert_eq!(listen, [(Meter::Seconds, 61, 100_000_000, 6_100_000_000)]);
    let speak = Quantities { characters: 1_001, ..none };
    let speak = book.price(&beta(), "speak", ServiceTier::Default, &speak).expect("a price");
    assert_eq!(told(&speak), [(Meter::Characters, 1_001, 15_000_000_000, 30_000_000_000)]);
    assert_eq!((speak[0].unit_size, speak[0].priced_quantity()), (1_000, 2));
    // An embedding has no cached price: what comes from a cache is input.
    let embed = price("embed", Quantities { input_tokens: 3, cached_input_tokens: 4, ..none });
    assert_eq!(embed, [(Meter::Input, 7, 20_000, 140_000)]);
}

#[test]
fn a_service_tier_is_a_product_of_its_own() {
    let book = book(FULL);
    // Without a reasoning price of its own, reasoning is output: one line.
    let quantities = Quantities { output_tokens: 3, reasoning_tokens: 4, ..Quantities::default() };
    let lines = book.price(&beta(), "chat", ServiceTier::Batch, &quantities).expect("a price");
    assert_eq!(told(&lines), [(Meter::Output, 7, 2_000_000, 14_000_000)]);
    assert_eq!(lines[0].sku, "chat.output.batch");
    for (model, service_tier) in [("chat", ServiceTier::Priority), ("embed", ServiceTier::Batch)] {
        let refused = book.price(&beta(), model, service_tier, &quantities);
        assert_eq!(refused, Err(PriceError::NoModel { model: model.into(), service_tier }));
    }
}

#[test]
fn a_contract_goes_before_the_list_and_both_are_told() {
    let book = book(FULL);
    let quantities = Quantities { output_tokens: 10, input_tokens: 1, ..Quantities::default() };
    let line = |account: &AccountId| {
        let mut lines = book.price(account, "chat", ServiceTier::Default, &quantities).expect("a price");
        lines.remove(1)
    };
    let (contract, list) = (line(&acme()), line(&beta()));
    assert_eq!((contract.unit_price.pico(), contract.list_unit_price.pico()), (2_000_000, 4_000_000));
    assert_eq!((contract.amount.pico(), contract.list_amount().pico()), (20_000_000, 40_000_000));
    assert_eq!((list.unit_price, list.list_unit_price), (contract.list_unit_price, contract.list_unit_price));
    assert_eq!(contract.sku, list.sku);
    // What only one account can buy.
    let image = Quantities { images: 1, ..Quantities::default() };
    let private = |account: AccountId| book.price(&account, "private", ServiceTier::Default, &image);
    assert_eq!(told(&private(acme()).expect("its contract"))[0].3, 10_000_000_000);
    assert!(private(beta()).is_err());
    assert!(book.sells("chat") && book.sells("private") && !book.sells("nothing"));
}

#[test]
fn the_same_prices_have_the_same_hash_however_they_are_written() {
    let canonical = book(BOOK).canonical();
    assert_eq!(book(&canonical), book(BOOK));
    assert_eq!(book(&canonical).canonical(), canonical);
    let other = BOOK.replace("0.80", "0.800000").replace("2026-01-01T02:00:00+02:00", "2026-01-01T00:00:00Z");
    assert_eq!(book(&other).hash(), book(BOOK).hash());
    assert_ne!(book(&BOOK.replace("0.80", "0.81")).hash(), book(BOOK).hash());
    // Hashes are on bills: this one may never change.
    assert_eq!(
        book(BOOK).hash().as_str(),
        "db801e992a8e7eaf9eac93ec219d9bb8da4413fc5b3c741d2f581b71f8c996f3"
    );
    assert_eq!(book(&book(FULL).canonical()), book(FULL));
    assert_eq!(book(&book(FULL).canonical()).canonical(), book(FULL).canonical());
    assert_eq!(
        book(FULL).hash().as_str(),
        "80379a224705f5d6260746255efc44d81075d708d2dcd6d39aa9a767b23a67e0"
    );
}

#[test]
fn a_bad_book_is_refused_with_the_field_and_the_fix() {
    let check_in = |book: &str, from: &str, to: &str, expect: &str| {
        assert!(book.contains(from), "{from}");
        let error = PriceBook::from_toml(&book.replacen(from, to, 1)).expect_err(expect);
        let told = format!(
            "{error}: {}",
            std::error::Error::source(&error).map_or(String::new(), ToString::to_string)
        );
        assert!(told.contains(expect), "{told}");
    };
    let check = |from: &str, to: &str, expect: &str| check_in(BOOK, from, to, expect);
    check("\"USD\"", "\"EUR\"", "currency: \"EUR\"");
    check("2026-01-01T02:00:00+02:00", "yesterday", "effective_from: \"yesterday\"");
    check("0.80", "0.8000001", "price[0] (b, output): usd_per_million: \"0.8000001\" is finer");
    check("0.80", "-1", "usd_per_million: must not be negative");
    check("0.80", "1e3", "is not an amount of dollars");
    check("0.80", "99999999999999", "is more than can be stored");
    check("\"cached_input\"", "\"input\"", "b already has a price for input");
    check(
        "model = \"b\", meter = \"output\"",
        "model = \"c\", meter = \"output\"",
        "b has no price for output",
    );
    check("meter = \"output\"", "meter = \"tokens\"", "unknown variant `tokens`");
    check("meter = \"output\"", "tier = 1, meter = \"output\"", "unknown field `tier`");
    check("IN \\\"b\\\" \\\\ é", "b.output", "the SKU b.output is used twice");
    check("IN \\\"b\\\" \\\\ é", "\\n", "sku is empty or has characters that do not print");
    let check = |from: &str, to: &str, expect: &str| check_in(FULL, from, to, expect);
    check("per = 60", "", "price[13] (listen, seconds): usd: usd and per go together: per is missing");
    check("per = 60", "per = 0", "(listen, seconds): per: must be at least 1");
    check("per = 60", "per = 7", "0.006 for 7 units is no whole number of 10^-12 dollars a unit");
    check("usd_per_unit = \"0.04\"", "", "(paint, images): no price: write usd_per_million");
    check("usd_per_unit = \"0.04\"", "usd_per_unit = \"1\"\nusd_per_million = \"1\"", "keep one of");
    check("per = 1000\n", "per = 1\n", "(speak, characters): a package needs usd, and per");
    check("scheme = \"graduated\"", "", "tiers need scheme = \"graduated\" or \"volume\"");
    check("scheme = \"graduated\"", "scheme = \"volume\"\nusd = \"1\"", "prices stand in the tiers alone");
    check("{ usd_per_unit = \"0.000003\" }", "", "(chat, output): tiers: needs at least two tiers");
    check("\"0.000003\"", "\"-3\"", "(chat, output): tiers[1].usd_per_unit: must not be negative");
    check("account = \"acme\"", "account = \" \"", "account is empty");
    check(
        "account = \"acme\"",
        "account = \"acme\"\nsku = \"other\"",
        "chat has the SKU chat.out for output (account acme), not other",
    );
    check("service_tier = \"batch\"", "", "chat already has a price for input; keep one");
    check(
        "meter = \"output\"\n    service_tier = \"batch\"",
        "meter = \"input\"\n    service_tier = \"priority\"",
        "chat has no price for output (batch)",
    );
    check(
        "model = \"private\"\n    meter = \"images\"",
        "model = \"private\"\n    meter = \"output\"",
        "private has no price for input (account acme)",
    );
    check("service_tier = \"batch\"", "service_tier = \"fast\"", "unknown variant `fast`");
}

#[test]
fn what_does_not_fit_is_refused() {
    let quantities = Quantities { output_tokens: u64::MAX, ..Quantities::default() };
    let price = |model: &str, quantities: &Quantities| {
        book(BOOK).price(&acme(), model, ServiceTier::Default, quantities)
    };
    assert!(matches!(price("b", &quantities), Err(PriceError::Overflow { .. })));
    let both = Quantities { reasoning_tokens: 1, ..quantities };
    assert!(matches!(price("b", &both), Err(PriceError::Overflow { .. })));
    let service_tier = ServiceTier::Default;
    assert_eq!(price("x", &quantities), Err(PriceError::NoModel { model: "x".into(), service_tier }));
    let image = Quantities { images: 1, ..Quantities::default() };
    let none = PriceError::NoMeter { model: "b".into(), service_tier, meter: Meter::Images };
    assert_eq!(price("b", &image), Err(none));
}
