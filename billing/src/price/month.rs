//! What the tiers of a month give back.
//!
//! An event of a graduated or volume price is rated at the highest of its tiers' prices, so that a hold covers it whatever
//! else the month brings, and it can be derived again from itself alone. When the month is closed, this makes up the
//! difference: by SKU, a line for each price book that rated a part of the month. It is never positive.
//!
//! ```text
//! month of a SKU   |---- book A: 700 ----|-- book B: 600 --|        in the order in which books come into force
//! graduated        A's tiers 1..=700      B's tiers 701..=1300      each unit where it falls, by the book of its time
//! volume           A's tier of 1300       B's tier of 1300          the whole month decides the tier
//! ```
//! A pure function of books and quantities: who has both derives the same lines. Bills that arrive after a month was
//! closed change them by the difference of two calls.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{Meter, PriceBook, PriceBookHash, TierPart};
use crate::{
    event::AccountId,
    money::{Money, Total},
};

/// What an account used of a SKU in a UTC month under one price book: the sum of its lines' quantities.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SkuUsage {
    pub sku: String,
    pub price_book: PriceBookHash,
    pub quantity: u64,
}

/// The difference between what events were rated at and what the month's tiers say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Adjustment {
    pub sku: String,
    pub meter: Meter,
    pub price_book: PriceBookHash,
    /// `graduated` or `volume`.
    pub scheme: &'static str,
    /// Units of the month before these, under earlier books.
    pub quantity_before: u64,
    /// Units that this line is about.
    pub quantity: u64,
    /// Units of the whole month.
    pub quantity_month: u64,
    /// What each unit was rated at.
    pub rated_unit_price: Money,
    pub rated: Total,
    /// What each unit costs by its tier.
    pub parts: Vec<TierPart>,
    pub due: Total,
    /// due - rated: zero or negative.
    pub amount: Total,
}

/// Why a month cannot be closed: its facts do not fit each other.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdjustmentError {
    #[error("no price book has the hash {0}")]
    UnknownPriceBook(PriceBookHash),
    #[error("the price book {price_book} has no price of the SKU {sku} for the account {account}")]
    UnknownSku { sku: String, price_book: PriceBookHash, account: AccountId },
    #[error("a month of the SKU {sku} counts more units than can be stored")]
    Overflow { sku: String },
}

/// The adjustments of an account's month, by SKU and then by book. `books` are in the order of coming into force;
/// `usage` may be in any order, and name a SKU and a book more than once. What is rated as it is due has no line.
pub fn tier_adjustments(
    books: &[&PriceBook],
    account: &AccountId,
    usage: &[SkuUsage],
) -> Result<Vec<Adjustment>, AdjustmentError> {
    // By SKU, then by the place of the book in time.
    let mut months: BTreeMap<&str, BTreeMap<usize, u64>> = BTreeMap::new();
    for SkuUsage { sku, price_book, quantity } in usage {
        let place = books.iter().position(|book| book.hash() == price_book);
        let place = place.ok_or_else(|| AdjustmentError::UnknownPriceBook(price_book.clone()))?;
        let sum = months.entry(sku).or_default().entry(place).or_default();
        let overflow = || AdjustmentError::Overflow { sku: sku.clone() };
        *sum = sum.checked_add(*quantity).ok_or_else(overflow)?;
    }
    let mut adjustments = Vec::new();
    for (sku, segments) in months {
        let overflow = || AdjustmentError::Overflow { sku: sku.to_owned() };
        let month = segments.values().try_fold(0_u64, |sum, quantity| sum.checked_add(*quantity));
        let quantity_month = month.ok_or_else(overflow)?;
        let mut quantity_before = 0;
        for (place, quantity) in segments {
            let span = Span { quantity_before, quantity, quantity_month };
            adjustments.extend(adjustment(books[place], account, sku, span)?);
            quantity_before += quantity;
        }
    }
    Ok(adjustments)
}

/// Where a part of a month lies in it.
struct Span {
    quantity_before: u64,
    quantity: u64,
    quantity_month: u64,
}

fn adjustment(
    book: &PriceBook,
    account: &AccountId,
    sku: &str,
    span: Span,
) -> Result<Option<Adjustment>, AdjustmentError> {
    let price = book.product(sku).and_then(|product| {
        let prices = book.prices(account, &product.model, product.service_tier)?;
        Some((product.meter, prices.get(product.meter)?))
    });
    let (meter, price) = price.ok_or_else(|| AdjustmentError::UnknownSku {
        sku: sku.to_owned(),
        price_book: book.hash().clone(),
        account: account.clone(),
    })?;
    let Span { quantity_before, quantity, quantity_month } = span;
    let Some(parts) = price.rate.tier_parts(quantity_before, quantity, quantity_month) else {
        return Ok(None);
    };
    let due = parts.iter().fold(Total::ZERO, |sum, part| sum + part.amount());
    let step = price.rate.step();
    let rated = step.total(quantity);
    let adjustment = Adjustment {
        sku: sku.to_owned(),
        meter,
        price_book: book.hash().clone(),
        scheme: price.rate.scheme(),
        quantity_before,
        quantity,
        quantity_month,
        rated_unit_price: step.price,
        rated,
        parts,
        due,
        amount: due - rated,
    };
    Ok((adjustment.amount != Total::ZERO).then_some(adjustment))
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::{
        event::{Quantities, ServiceTier},
        price::cost,
    };

    /// A book whose output has these tiers, (up_to, pico-USD a token), the last without an end.
    fn book(day: u8, scheme: &str, tiers: &[(u64, i64)], last: i64) -> PriceBook {
        let usd = |pico: i64| format!("usd_per_million = \"{}.{:06}\"", pico / 1_000_000, pico % 1_000_000);
        let mut rows: Vec<_> =
            tiers.iter().map(|(up_to, pico)| format!("{{ up_to = {up_to}, {} }}", usd(*pico))).collect();
        rows.push(format!("{{ {} }}", usd(last)));
        let text = format!(
            "currency = \"USD\"\neffective_from = \"2026-01-{day:02}T00:00:00Z\"\nprice = [\
             {{ model = \"m\", meter = \"input\", usd_per_million = \"0\" }},\
             {{ model = \"m\", meter = \"cached_input\", usd_per_million = \"0\" }},\
             {{ model = \"m\", meter = \"output\", scheme = \"{scheme}\", tiers = [{}] }},\
             ]",
            rows.join(", ")
        );
        PriceBook::from_toml(&text).expect("a book")
    }

    fn acme() -> AccountId {
        AccountId::new("acme")
    }

    fn usage(book: &PriceBook, quantity: u64) -> SkuUsage {
        SkuUsage { sku: "m.output".into(), price_book: book.hash().clone(), quantity }
    }

    fn sum(adjustments: &[Adjustment]) -> i128 {
        adjustments.iter().map(|line| line.amount.pico()).sum()
    }

    /// What a month of one book costs, by the text-book formula.
    fn formula(scheme: &str, tiers: &[(u64, i64)], last: i64, month: u64) -> i128 {
        let ends = tiers.iter().copied().chain([(u64::MAX, last)]);
        let mut from = 0;
        let mut total = 0;
        for (up_to, pico) in ends {
            if scheme == "volume" && month <= up_to {
                return i128::from(pico) * i128::from(month);
            }
            total += i128::from(pico) * i128::from(month.min(up_to).saturating_sub(from));
            from = up_to.min(month);
        }
        total
    }

    #[test]
    fn a_book_that_comes_in_the_middle_of_a_month_goes_on_where_the_other_stopped() {
        let first = book(1, "graduated", &[(1_000, 10)], 5);
        let second = book(15, "graduated", &[(1_000, 8)], 2);
        // Out of order, and in parts.
        let month = [usage(&second, 500), usage(&first, 300), usage(&first, 400), usage(&second, 100)];
        let lines = tier_adjustments(&[&first, &second], &acme(), &month).expect("a month");
        let told: Vec<_> =
            lines.iter().map(|line| (line.quantity_before, line.quantity, line.due.pico())).collect();
        // The first 700 are all at 10 and need no line; then 300 at 8 and 300 at 2.
        assert_eq!(told, [(700, 600, 300 * 8 + 300 * 2)]);
        assert_eq!(sum(&lines), -300 * 6);

        let (first, second) = (book(1, "volume", &[(1_000, 10)], 5), book(15, "volume", &[(1_000, 8)], 2));
        let month = [usage(&first, 700), usage(&second, 600)];
        let lines = tier_adjustments(&[&first, &second], &acme(), &month).expect("a month");
        assert_eq!(lines.iter().map(|line| line.due.pico()).collect::<Vec<_>>(), [700 * 5, 600 * 2]);
    }

    #[test]
    fn what_does_not_fit_the_books_is_refused() {
        let (known, unknown) = (book(1, "volume", &[(10, 2)], 1), book(2, "volume", &[(10, 2)], 1));
        let check = |usage: SkuUsage, expect: AdjustmentError| {
            assert_eq!(tier_adjustments(&[&known], &acme(), &[usage.clone(), usage]), Err(expect));
        };
        check(usage(&unknown, 1), AdjustmentError::UnknownPriceBook(unknown.hash().clone()));
        check(usage(&known, u64::MAX), AdjustmentError::Overflow { sku: "m.output".into() });
        let stranger = SkuUsage { sku: "x".into(), ..usage(&known, 1) };
        let expect = AdjustmentError::UnknownSku {
            sku: "x".into(),
            price_book: known.hash().clone(),
            account: acme(),
        };
        check(stranger, expect);
    }

    fn ends() -> impl Strategy<Value = (Vec<(u64, i64)>, i64)> {
        (vec((1..300u64, 0..100i64), 1..4), 0..100i64).prop_map(|(widths, last)| {
            let mut end = 0;
            let tiers = widths.into_iter().map(|(width, pico)| {
                end += width;
                (end, pico)
            });
            (tiers.collect(), last)
        })
    }

    proptest! {
        #[test]
        fn events_and_their_adjustment_are_the_tier_formula(
            (tiers, last) in ends(),
            events in vec((0..90u64, 0..20u64), 0..30),
            scheme in prop_oneof![Just("graduated"), Just("volume")],
        ) {
            let book = book(1, scheme, &tiers, last);
            let mut billed = 0;
            let mut month = Vec::new();
            for (output_tokens, reasoning_tokens) in &events {
                let quantities = Quantities {
                    output_tokens: *output_tokens,
                    reasoning_tokens: *reasoning_tokens,
                    ..Quantities::default()
                };
                let lines = book.price(&acme(), "m", ServiceTier::Default, &quantities).expect("a price");
                billed += i128::from(cost(&lines).expect("it fits").pico());
                let of_sku = |line: crate::price::Line| SkuUsage {
                    sku: line.sku,
                    price_book: book.hash().clone(),
                    quantity: line.quantity,
                };
                month.extend(lines.into_iter().map(of_sku));
            }
            let lines = tier_adjustments(&[&book], &acme(), &month).expect("a month");
            prop_assert!(lines.iter().all(|line| line.amount < Total::ZERO));
            let total = events.iter().map(|(output, reasoning)| output + reasoning).sum();
            prop_assert_eq!(billed + sum(&lines), formula(scheme, &tiers, last, total));
        }

        #[test]
        fn more_use_never_gives_less_back(
            (mut tiers, last) in ends(),
            (some, more) in (0..900u64, 0..300u64),
            scheme in prop_oneof![Just("graduated"), Just("volume")],
        ) {
            // Falling prices, as a volume discount has them; a graduated month only grows under any.
            let mut prices: Vec<_> = tiers.iter().map(|(_, pico)| *pico).chain([last]).collect();
            prices.sort_unstable_by(|a, b| b.cmp(a));
            for ((_, pico), falling) in tiers.iter_mut().zip(&prices) {
                *pico = *falling;
            }
            let book = book(1, scheme, &tiers, *prices.last().expect("the last tier"));
            let of = |quantity| tier_adjustments(&[&book], &acme(), &[usage(&book, quantity)]).expect("a month");
            let (less, greater) = (sum(&of(some)), sum(&of(some + more)));
            prop_assert!(greater <= less && less <= 0);
            if scheme == "graduated" {
                let rated = i128::from(prices[0]);
                let due = |quantity: u64, adjusted| rated * i128::from(quantity) + adjusted;
                prop_assert!(due(some, less) <= due(some + more, greater));
            }
        }
    }
}
