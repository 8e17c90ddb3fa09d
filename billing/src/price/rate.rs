//! How a quantity becomes money: a flat price, packages, or tiers over a month.
//!
//! One event is always rated by a [`Step`], which is exact and needs nothing but the event and the book. Tiers over a
//! month are rated at the highest of their prices, so that a hold covers whatever the month brings; what that is too
//! much comes back when the month is closed (`month`).

use serde::Serialize;

use crate::money::{Money, Total};

/// How quantities become money.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rate {
    /// So much for each unit.
    Flat(Money),
    /// So much for each package of `size` units that an event begins.
    Package { size: u64, price: Money },
    /// Each unit of an account's month at the price of the tier that it falls into.
    Graduated(Tiers),
    /// All units of an account's month at the price of the tier that their number falls into.
    Volume(Tiers),
}

/// At least two tiers, their ends ascending, the last without an end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tiers(Vec<Tier>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tier {
    /// The last unit of the month that is in this tier; None in the last tier.
    pub up_to: Option<u64>,
    pub per_unit: Money,
}

/// A price for each `size` units that are begun; with a size of 1, for each unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Step {
    pub size: u64,
    pub price: Money,
}

/// A part of a month's units and what each of them costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct TierPart {
    pub quantity: u64,
    pub unit_price: Money,
}

/// What is wrong with a list of tiers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TiersError {
    #[error("needs at least two tiers; one price for all is the scheme \"flat\"")]
    TooFew,
    #[error("only the last tier has no up_to")]
    OpenInside,
    #[error("the last tier has no up_to: it holds whatever is beyond the others")]
    ClosedLast,
    #[error("each up_to must be over the one before, and the first over 0")]
    NotAscending,
}

impl Rate {
    /// How one event is rated.
    pub fn step(&self) -> Step {
        match self {
            Rate::Flat(price) => Step::each(*price),
            Rate::Package { size, price } => Step { size: *size, price: *price },
            Rate::Graduated(tiers) | Rate::Volume(tiers) => Step::each(tiers.highest()),
        }
    }

    /// What `quantity` units of a month cost by its tiers, when `before` units of it came earlier and it has `month`
    /// units in all. None where there are no tiers: then events already cost what is due.
    pub fn tier_parts(&self, before: u64, quantity: u64, month: u64) -> Option<Vec<TierPart>> {
        match self {
            Rate::Flat(_) | Rate::Package { .. } => None,
            Rate::Graduated(tiers) => Some(tiers.graduated(before, quantity)),
            Rate::Volume(tiers) => Some(vec![TierPart { quantity, unit_price: tiers.of(month).per_unit }]),
        }
    }

    pub fn scheme(&self) -> &'static str {
        match self {
            Rate::Flat(_) => "flat",
            Rate::Package { .. } => "package",
            Rate::Graduated(_) => "graduated",
            Rate::Volume(_) => "volume",
        }
    }

    pub fn tiers(&self) -> &[Tier] {
        match self {
            Rate::Flat(_) | Rate::Package { .. } => &[],
            Rate::Graduated(tiers) | Rate::Volume(tiers) => &tiers.0,
        }
    }
}

impl Tiers {
    pub fn new(tiers: Vec<Tier>) -> Result<Tiers, TiersError> {
        let Some((last, closed)) = tiers.split_last().filter(|(_, closed)| !closed.is_empty()) else {
            return Err(TiersError::TooFew);
        };
        if last.up_to.is_some() {
            return Err(TiersError::ClosedLast);
        }
        let mut end = 0;
        for tier in closed {
            let up_to = tier.up_to.ok_or(TiersError::OpenInside)?;
            if up_to <= end {
                return Err(TiersError::NotAscending);
            }
            end = up_to;
        }
        Ok(Tiers(tiers))
    }

    fn highest(&self) -> Money {
        self.0.iter().map(|tier| tier.per_unit).max().expect("there are at least two tiers")
    }

    /// The tier that a month's number of units falls into.
    fn of(&self, month: u64) -> Tier {
        *self.0.iter().find(|tier| tier.up_to.is_none_or(|up_to| month <= up_to)).expect("the last is open")
    }

    fn graduated(&self, before: u64, quantity: u64) -> Vec<TierPart> {
        let end = before.saturating_add(quantity);
        let mut from = before;
        let mut parts = Vec::new();
        for tier in &self.0 {
            let to = tier.up_to.unwrap_or(u64::MAX).min(end);
            if to > from {
                parts.push(TierPart { quantity: to - from, unit_price: tier.per_unit });
                from = to;
            }
        }
        parts
    }
}

impl TierPart {
    pub fn amount(&self) -> Total {
        self.unit_price.total_of(self.quantity)
    }
}

impl Step {
    pub const FREE: Step = Step::each(Money::ZERO);

    pub const fn each(price: Money) -> Step {
        Step { size: 1, price }
    }

    /// How many times the price is due for `quantity` units.
    pub fn count(self, quantity: u64) -> u64 {
        quantity.div_ceil(self.size)
    }

    pub fn total(self, quantity: u64) -> Total {
        self.price.total_of(self.count(quantity))
    }

    /// What `more` units cost beyond the first `from`.
    pub fn cost(self, from: u64, more: u64) -> Total {
        self.price.total_of(self.count(from.saturating_add(more)) - self.count(from))
    }

    /// How many units beyond the first `from` this much money pays for, up to `max`.
    pub fn affordable(self, from: u64, money: Total, max: u64) -> u64 {
        let counts = match i128::from(self.price.pico()) {
            _ if money < Total::ZERO => return 0,
            0 => return max,
            price => u64::try_from(money.pico() / price).unwrap_or(u64::MAX),
        };
        let paid = self.count(from).saturating_add(counts).saturating_mul(self.size);
        (paid - from).min(max)
    }

    /// A fixed part and a price a unit that together are never below this step: the tightest of whole pico-USD.
    fn line(self) -> (Money, Money) {
        let (size, price) = (i128::from(self.size), i128::from(self.price.pico()));
        let rounded_up = |part: i128| {
            let pico = (price * part + size - 1).div_euclid(size);
            Money::from_pico(i64::try_from(pico).expect("a part of a price is at most the price"))
        };
        (rounded_up(size - 1), rounded_up(1))
    }

    /// A bound for units that may each be rated by either step, whichever way they are split: a fixed part, and a step
    /// for all of them.
    pub fn either(self, other: Step) -> (Total, Step) {
        let ((one, one_unit), (two, two_unit)) = (self.line(), other.line());
        (Total::from(one) + two.into(), Step::each(one_unit.max(two_unit)))
    }
}

#[cfg(test)]
pub(crate) mod strategy {
    //! Random rates, for tests.

    use proptest::{collection::vec, prelude::*};

    use super::*;

    pub fn money() -> BoxedStrategy<Money> {
        prop_oneof![Just(0), 1..50i64, 1..5_000_000i64].prop_map(Money::from_pico).boxed()
    }

    pub fn tiers() -> impl Strategy<Value = Tiers> {
        (vec((1..200u64, money()), 1..5), money()).prop_map(|(closed, last)| {
            let mut end = 0;
            let mut tiers: Vec<_> = closed
                .into_iter()
                .map(|(width, per_unit)| {
                    end += width;
                    Tier { up_to: Some(end), per_unit }
                })
                .collect();
            tiers.push(Tier { up_to: None, per_unit: last });
            Tiers::new(tiers).expect("ascending, the last open")
        })
    }

    /// Boxed, since a book of them would not fit a test's stack.
    pub fn rate() -> BoxedStrategy<Rate> {
        prop_oneof![
            money().prop_map(Rate::Flat),
            (2..40u64, money()).prop_map(|(size, price)| Rate::Package { size, price }),
            tiers().prop_map(Rate::Graduated),
            tiers().prop_map(Rate::Volume),
        ]
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        strategy::{rate, tiers},
        *,
    };

    fn pico(amount: i64) -> Money {
        Money::from_pico(amount)
    }

    #[test]
    fn packages_are_paid_for_when_they_are_begun() {
        let step = Step { size: 10, price: pico(7) };
        for (quantity, cost) in [(0, 0), (1, 7), (10, 7), (11, 14), (100, 70)] {
            assert_eq!(step.total(quantity).pico(), cost, "{quantity}");
        }
        // The package that the first three units began covers seven more.
        assert_eq!(step.cost(3, 7).pico(), 0);
        assert_eq!(step.cost(3, 8).pico(), 7);
        assert_eq!(step.affordable(3, Total::ZERO, 100), 7);
        assert_eq!(step.affordable(3, Total::from_pico(13), 100), 17);
        assert_eq!(step.affordable(3, Total::from_pico(14), 20), 20);
        assert_eq!(step.affordable(0, Total::from_pico(-1), 20), 0);
    }

    #[test]
    fn tiers_are_read_as_everyone_reads_them() {
        let tier = |up_to, price| Tier { up_to, per_unit: pico(price) };
        let tiers = Tiers::new(vec![tier(Some(10), 5), tier(Some(30), 3), tier(None, 1)]).expect("tiers");
        let sum = |rate: &Rate, quantity| -> i128 {
            let parts = rate.tier_parts(0, quantity, quantity).expect("it has tiers");
            parts.iter().map(|part| part.amount().pico()).sum()
        };
        let (graduated, volume) = (Rate::Graduated(tiers.clone()), Rate::Volume(tiers));
        assert_eq!(graduated.step(), Step::each(pico(5)));
        for (quantity, by_part, by_all) in
            [(0, 0, 0), (10, 50, 50), (11, 53, 33), (30, 110, 90), (31, 111, 31), (100, 180, 100)]
        {
            assert_eq!((sum(&graduated, quantity), sum(&volume, quantity)), (by_part, by_all), "{quantity}");
        }
    }

    #[test]
    fn tiers_that_leave_a_gap_are_refused() {
        let check = |ends: &[Option<u64>], expect: TiersError| {
            let tiers = ends.iter().map(|&up_to| Tier { up_to, per_unit: Money::ZERO }).collect();
            assert_eq!(Tiers::new(tiers), Err(expect), "{ends:?}");
        };
        check(&[], TiersError::TooFew);
        check(&[None], TiersError::TooFew);
        check(&[Some(1), Some(2)], TiersError::ClosedLast);
        check(&[None, None], TiersError::OpenInside);
        check(&[Some(0), None], TiersError::NotAscending);
        check(&[Some(5), Some(5), None], TiersError::NotAscending);
    }

    proptest! {
        #[test]
        fn what_is_affordable_is_exactly_what_money_covers(rate in rate(), from in 0..100u64, money in 0..100_000_000i64, max in 0..1_000u64) {
            let step = rate.step();
            let money = Total::from_pico(money.into());
            let units = step.affordable(from, money, max);
            prop_assert!(units <= max && step.cost(from, units) <= money);
            prop_assert!(units == max || step.cost(from, units + 1) > money);
        }

        #[test]
        fn growing_by_parts_costs_the_same_as_at_once(rate in rate(), first in 0..1_000u64, second in 0..1_000u64) {
            let step = rate.step();
            prop_assert_eq!(step.cost(0, first) + step.cost(first, second), step.total(first + second));
        }

        #[test]
        fn a_package_is_never_cheaper_than_its_share(size in 1..1_000u64, price in 0..1_000_000i64, quantity in 0..100_000u64) {
            let step = Step { size, price: pico(price) };
            // total >= price * quantity / size, without a fraction.
            prop_assert!(step.total(quantity).pico() * i128::from(size) >= step.price.total_of(quantity).pico());
            prop_assert!(step.total(quantity + 1) >= step.total(quantity));
        }

        #[test]
        fn either_of_two_covers_every_split(one in rate(), two in rate(), a in 0..500u64, b in 0..500u64) {
            let (one, two) = (one.step(), two.step());
            let (fixed, step) = one.either(two);
            prop_assert!(one.total(a) + two.total(b) <= fixed + step.total(a + b));
        }

        #[test]
        fn graduated_months_add_up_and_only_grow(tiers in tiers(), first in 0..500u64, second in 0..500u64) {
            let rate = Rate::Graduated(tiers);
            let sum = |before, quantity| -> i128 {
                let parts = rate.tier_parts(before, quantity, before + quantity).expect("it has tiers");
                parts.iter().map(|part| part.amount().pico()).sum()
            };
            prop_assert_eq!(sum(0, first) + sum(first, second), sum(0, first + second));
            prop_assert!(sum(0, first + second) <= rate.step().total(first + second).pico());
        }
    }
}
