//! What a new price book changes, row by row.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{BookRow, Meter, PriceBook, Rate, Step, rate::Tier};
use crate::{
    event::{AccountId, ServiceTier},
    money::Money,
};

/// A price that is added (no `old`), removed (no `new`), or changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Change {
    pub model: String,
    pub service_tier: ServiceTier,
    /// None: the list price.
    pub account: Option<AccountId>,
    pub meter: Meter,
    pub old: Option<PriceTerms>,
    pub new: Option<PriceTerms>,
    /// By how many hundredths of a percent the price of one event goes up; None where the two cannot be compared.
    pub basis_points: Option<i64>,
}

/// A price in figures.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PriceTerms {
    pub sku: String,
    pub scheme: &'static str,
    /// What an event is rated at: the highest of tiers.
    pub unit_price: Money,
    /// 1, or the size of a package.
    pub unit_size: u64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tiers: Vec<TierTerms>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct TierTerms {
    pub up_to: Option<u64>,
    pub unit_price: Money,
}

impl PriceBook {
    /// What this book changes of `old`, in the order of the canonical form. Without an old one, everything is added.
    pub fn changes_from(&self, old: Option<&PriceBook>) -> Vec<Change> {
        let mut rows: BTreeMap<_, (Option<PriceTerms>, Option<PriceTerms>)> = BTreeMap::new();
        for row in old.iter().flat_map(|book| book.rows()) {
            rows.entry(key(&row)).or_default().0 = Some(PriceTerms::of(&row));
        }
        for row in self.rows() {
            rows.entry(key(&row)).or_default().1 = Some(PriceTerms::of(&row));
        }
        let changed = rows.into_iter().filter(|(_, (old, new))| old != new);
        changed
            .map(|((model, service_tier, account, meter), (old, new))| {
                let basis_points = old.as_ref().zip(new.as_ref()).and_then(|(old, new)| old.rise_to(new));
                Change { model, service_tier, account, meter, old, new, basis_points }
            })
            .collect()
    }
}

fn key(row: &BookRow<'_>) -> (String, ServiceTier, Option<AccountId>, Meter) {
    (row.model.to_owned(), row.service_tier, row.account.cloned(), row.meter)
}

impl PriceTerms {
    pub fn of(row: &BookRow<'_>) -> PriceTerms {
        PriceTerms::new(&row.price.sku, &row.price.rate)
    }

    pub fn new(sku: &str, rate: &Rate) -> PriceTerms {
        let Step { size, price } = rate.step();
        let tier = |tier: &Tier| TierTerms { up_to: tier.up_to, unit_price: tier.per_unit };
        PriceTerms {
            sku: sku.to_owned(),
            scheme: rate.scheme(),
            unit_price: price,
            unit_size: size,
            tiers: rate.tiers().iter().map(tier).collect(),
        }
    }

    /// Hundredths of a percent, rounded half away from zero. From nothing, no rise is a percentage.
    fn rise_to(&self, new: &PriceTerms) -> Option<i64> {
        // Prices of packages of different sizes: (new / size) / (old / size), without a fraction.
        let old_pico = i128::from(self.unit_price.pico()) * i128::from(new.unit_size);
        let new_pico = i128::from(new.unit_price.pico()) * i128::from(self.unit_size);
        if old_pico == 0 {
            return (new_pico == 0).then_some(0);
        }
        let scaled = (new_pico - old_pico).checked_mul(20_000)?;
        let points = (scaled + scaled.signum() * old_pico) / (2 * old_pico);
        i64::try_from(points).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn book(rows: &str) -> PriceBook {
        let text = format!("currency = \"USD\"\neffective_from = \"2026-01-01T00:00:00Z\"\nprice = [{rows}]");
        PriceBook::from_toml(&text).expect("a book")
    }

    #[test]
    fn a_change_is_told_with_old_new_and_percent() {
        let old = book(
            "{ model = \"a\", meter = \"images\", usd_per_unit = \"0.04\" }, \
             { model = \"b\", meter = \"input\", usd_per_million = \"0.30\" }, \
             { model = \"c\", meter = \"seconds\", usd = \"0.006\", per = 60 }",
        );
        let new = book(
            "{ model = \"b\", meter = \"input\", usd_per_million = \"0.20\" }, \
             { model = \"b\", meter = \"input\", usd_per_million = \"0.10\", account = \"acme\" }, \
             { model = \"c\", meter = \"seconds\", usd_per_unit = \"0.0001\" }",
        );
        let told: Vec<_> = new
            .changes_from(Some(&old))
            .into_iter()
            .map(|change| {
                let pico = |terms: Option<PriceTerms>| terms.map(|terms| terms.unit_price.pico());
                let account = change.account.map(|account| account.to_string());
                (change.model, account, pico(change.old), pico(change.new), change.basis_points)
            })
            .collect();
        let (a, b) = ("a".to_owned(), "b".to_owned());
        let expected = [
            (a, None, Some(40_000_000_000), None, None),
            (b.clone(), None, Some(300_000), Some(200_000), Some(-3_333)),
            (b, Some("acme".to_owned()), None, Some(100_000), None),
        ];
        assert_eq!(told, expected);
        assert_eq!(new.changes_from(Some(&new)), []);
        assert_eq!(new.changes_from(None).len(), 3);
    }

    #[test]
    fn a_rise_is_compared_unit_by_unit_and_rounded_once() {
        let terms = |pico, unit_size| PriceTerms {
            sku: String::new(),
            scheme: "flat",
            unit_price: Money::from_pico(pico),
            unit_size,
            tiers: Vec::new(),
        };
        for (old, new, expect) in [
            ((3, 1), (4, 1), Some(3_333)),
            ((3, 1), (5, 1), Some(6_667)),
            ((10, 10), (20, 20), Some(0)),
            ((10, 10), (2, 1), Some(10_000)),
            ((5, 1), (0, 1), Some(-10_000)),
            ((0, 1), (0, 1), Some(0)),
            ((0, 1), (1, 1), None),
        ] {
            assert_eq!(terms(old.0, old.1).rise_to(&terms(new.0, new.1)), expect, "{old:?} to {new:?}");
        }
    }
}
