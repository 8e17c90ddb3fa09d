//! The lines of an invoice, from what is charged. Pure: the same charges and rules give the same lines.
//!
//! ```text
//! usage, late usage, adjustments      exact, to 10^-12 dollars
//! credit                              what grants paid for, negative
//! tax                                 rate x (the lines above it, by category)
//! -----------------------------------------------------------------------------
//! due                                 rounded once; each line gets its cents by largest remainder
//! ```

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{
    period::Period,
    rounding::apportion,
    tax::{Rate, TaxPlace, TaxRules},
};
use crate::money::{Money, Total};

/// Tax is exact in this part of 10^-12 dollars, since a rate has six decimals.
const PARTS_PER_PICO: i128 = 1_000_000;
pub(crate) const PICO_PER_CENT: i128 = 10_000_000_000;

/// What a line is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LineKind {
    Usage,
    /// Usage of a month that was closed when it arrived.
    LateUsage,
    /// What the tiers of the price book make of the month's volume.
    Adjustment,
    /// What grants paid for.
    Credit,
    Tax,
}

/// A sum that is charged, before tax.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Charge {
    pub kind: LineKind,
    /// The month that it was used in.
    pub period: Period,
    pub project: String,
    pub model: String,
    pub sku: String,
    pub unit: String,
    pub quantity: u64,
    pub exact: Money,
}

/// One line. Fields that a kind does not have are empty.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct InvoiceLine {
    pub position: u32,
    pub kind: LineKind,
    pub period: Period,
    pub description: String,
    pub project: String,
    pub model: String,
    pub sku: String,
    pub unit: String,
    pub quantity: u64,
    /// The amount before rounding; of tax, to the nearest 10^-12 dollars.
    pub exact: Money,
    /// In whole cents.
    pub amount: Money,
    pub tax_category: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tax_rate: Option<Rate>,
}

/// A sum is more than one amount can hold.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a line of the invoice is more than {max}", max = Money::MAX)]
pub struct TooLarge;

/// Draws the lines of one invoice. `due` is what is to be paid of the charges, before tax: the rest is paid by credit.
pub(crate) fn draw(
    period: Period,
    mut charges: Vec<Charge>,
    due: Money,
    place: &TaxPlace,
    rules: &TaxRules,
) -> Result<Vec<InvoiceLine>, TooLarge> {
    charges.sort();
    let charged: Total = charges.iter().map(|charge| charge.exact).sum();
    let mut lines: Vec<InvoiceLine> =
        charges.into_iter().map(|charge| charge_line(charge, period, rules)).collect();
    let credit = (Total::from(due) - charged).to_money().ok_or(TooLarge)?;
    if credit != Money::ZERO {
        let description = match credit < Money::ZERO {
            true => "Credit applied",
            false => "Carried over to the account's credit",
        };
        lines.push(plain_line(LineKind::Credit, period, description.to_owned(), credit));
    }
    for (category, base) in taxable(&lines) {
        for rate in rules.rates_of(place, &category) {
            let exact = to_pico(base * i128::from(rate.rate.micros()))?;
            let mut line =
                plain_line(LineKind::Tax, period, format!("{} {}", rate.name, rate.rate.percent()), exact);
            line.tax_category.clone_from(&category);
            line.tax_rate = Some(rate.rate);
            lines.push(line);
        }
    }
    for (index, amount) in rounded(&lines).into_iter().enumerate() {
        let pico = amount.checked_mul(PICO_PER_CENT).ok_or(TooLarge)?;
        lines[index].amount = Total::from_pico(pico).to_money().ok_or(TooLarge)?;
        lines[index].position = u32::try_from(index + 1).map_err(|_| TooLarge)?;
    }
    lines.iter().map(|line| line.amount).sum::<Total>().to_money().ok_or(TooLarge)?;
    Ok(lines)
}

/// The cents of every line, from their exact amounts. What the audit derives again.
pub(crate) fn rounded(lines: &[InvoiceLine]) -> Vec<i128> {
    let bases = taxable(lines);
    let exact: Vec<i128> = lines
        .iter()
        .map(|line| match line.tax_rate {
            Some(rate) => {
                let base = bases.iter().find(|(category, _)| *category == line.tax_category);
                base.map_or(0, |(_, base)| base * i128::from(rate.micros()))
            }
            None => i128::from(line.exact.pico()) * PARTS_PER_PICO,
        })
        .collect();
    apportion(&exact, PICO_PER_CENT * PARTS_PER_PICO)
}

/// What is taxed, in pico-USD by category, in the order of the lines. Credit is taken off the categories in that order.
fn taxable(lines: &[InvoiceLine]) -> Vec<(String, i128)> {
    let mut bases: Vec<(String, i128)> = Vec::new();
    let mut credit = 0;
    for line in lines {
        let exact = i128::from(line.exact.pico());
        match line.kind {
            LineKind::Tax => {}
            LineKind::Credit => credit += exact,
            LineKind::Usage | LineKind::LateUsage | LineKind::Adjustment => {
                match bases.iter_mut().find(|(category, _)| *category == line.tax_category) {
                    Some((_, base)) => *base += exact,
                    None => bases.push((line.tax_category.clone(), exact)),
                }
            }
        }
    }
    for (_, base) in &mut bases {
        // Credit is negative and lowers what is positive; what is carried over is the other way round.
        let taken = match credit < 0 {
            true => credit.max(-(*base).max(0)),
            false => credit.min(-(*base).min(0)),
        };
        *base += taken;
        credit -= taken;
    }
    bases
}

fn charge_line(charge: Charge, period: Period, rules: &TaxRules) -> InvoiceLine {
    let Charge { kind, period: used, project, model, sku, unit, quantity, exact } = charge;
    let description = match kind {
        LineKind::LateUsage => format!("{sku}, late usage of {used}"),
        LineKind::Adjustment if used != period => format!("{sku}, volume of {used}"),
        LineKind::Adjustment => format!("{sku}, volume of the month"),
        _ => sku.clone(),
    };
    InvoiceLine {
        position: 0,
        kind,
        period: used,
        description,
        project,
        model,
        sku,
        unit,
        quantity,
        exact,
        amount: Money::ZERO,
        tax_category: rules.category_of(kind).to_owned(),
        tax_rate: None,
    }
}

fn plain_line(kind: LineKind, period: Period, description: String, exact: Money) -> InvoiceLine {
    InvoiceLine {
        position: 0,
        kind,
        period,
        description,
        project: String::new(),
        model: String::new(),
        sku: String::new(),
        unit: String::new(),
        quantity: 0,
        exact,
        amount: Money::ZERO,
        tax_category: String::new(),
        tax_rate: None,
    }
}

/// To the nearest pico-USD, halves up.
fn to_pico(parts: i128) -> Result<Money, TooLarge> {
    Total::from_pico((parts + PARTS_PER_PICO / 2).div_euclid(PARTS_PER_PICO)).to_money().ok_or(TooLarge)
}

impl LineKind {
    pub const ALL: [LineKind; 5] =
        [LineKind::Usage, LineKind::LateUsage, LineKind::Adjustment, LineKind::Credit, LineKind::Tax];

    pub fn as_str(self) -> &'static str {
        match self {
            LineKind::Usage => "usage",
            LineKind::LateUsage => "late_usage",
            LineKind::Adjustment => "adjustment",
            LineKind::Credit => "credit",
            LineKind::Tax => "tax",
        }
    }
}

impl fmt::Display for LineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn october() -> Period {
        "2026-10".parse().expect("a month")
    }

    fn charge(kind: LineKind, sku: &str, exact: i64) -> Charge {
        Charge {
            kind,
            period: october(),
            project: "p".into(),
            model: "m".into(),
            sku: sku.into(),
            unit: "token".into(),
            quantity: 1,
            exact: Money::from_pico(exact),
        }
    }

    fn germany() -> (TaxPlace, TaxRules) {
        let rules = "rate = [{ name = \"VAT\", country = \"DE\", rate = \"0.19\" }]";
        let place = TaxPlace { country: Some("DE".into()), ..TaxPlace::default() };
        (place, toml::from_str(rules).expect("rules"))
    }

    fn shown(lines: &[InvoiceLine]) -> Vec<String> {
        lines.iter().map(|line| format!("{}: {}", line.description, line.amount.to_usd_string())).collect()
    }

    #[test]
    fn tax_is_on_what_credit_did_not_pay() {
        let (place, rules) = germany();
        let usage = || vec![charge(LineKind::Usage, "m.output", 10_004_000_000_000)];
        let draw =
            |due| shown(&draw(october(), usage(), Money::from_pico(due), &place, &rules).expect("lines"));
        assert_eq!(draw(10_004_000_000_000), ["m.output: 10.00", "VAT 19 %: 1.90"]);
        assert_eq!(draw(4_000_000_000), ["m.output: 10.00", "Credit applied: -10.00", "VAT 19 %: 0.00"]);
        assert_eq!(draw(0), ["m.output: 10.00", "Credit applied: -10.00", "VAT 19 %: 0.00"]);
    }

    #[test]
    fn what_the_tiers_give_back_beyond_the_charges_is_carried_over_and_not_taxed() {
        let (place, rules) = germany();
        let charges = vec![charge(LineKind::Adjustment, "m.output", -2_000_000_000_000)];
        let lines = draw(october(), charges, Money::ZERO, &place, &rules).expect("lines");
        let expect = [
            "m.output, volume of the month: -2.00",
            "Carried over to the account's credit: 2.00",
            "VAT 19 %: 0.00",
        ];
        assert_eq!(shown(&lines), expect);
    }

    #[test]
    fn a_category_without_a_rate_is_not_taxed() {
        let (place, mut rules) = germany();
        rules.category.insert(LineKind::LateUsage, "free".into());
        let charges = vec![
            charge(LineKind::LateUsage, "late", 1_000_000_000_000),
            charge(LineKind::Usage, "now", 1_000_000_000_000),
        ];
        let lines =
            draw(october(), charges, Money::from_pico(2_000_000_000_000), &place, &rules).expect("lines");
        assert_eq!(shown(&lines), ["now: 1.00", "late, late usage of 2026-10: 1.00", "VAT 19 %: 0.19"]);
    }

    #[test]
    fn what_no_amount_holds_is_refused() {
        let (place, rules) = germany();
        let charges = vec![charge(LineKind::Usage, "a", i64::MAX)];
        assert_eq!(draw(october(), charges, Money::MAX, &place, &rules), Err(TooLarge));
    }

    proptest! {
        #[test]
        fn lines_sum_to_what_is_due(
            amounts in prop::collection::vec(0_i64..50_000_000_000_000, 0..30),
            discount in -1_000_000_000_000_i64..1,
            paid in 0_i64..100,
        ) {
            let (place, rules) = germany();
            let mut charges: Vec<_> =
                amounts.iter().map(|amount| charge(LineKind::Usage, &amount.to_string(), *amount)).collect();
            charges.push(charge(LineKind::Adjustment, "tiers", discount));
            let charged: i64 = amounts.iter().sum::<i64>() + discount;
            let due = charged.max(0) / 100 * paid;
            let lines = draw(october(), charges, Money::from_pico(due), &place, &rules).unwrap();
            let total: i128 = lines.iter().map(|line| i128::from(line.amount.pico())).sum();
            let exact = i128::from(due) * 1_190_000;
            prop_assert!((total * 1_000_000 - exact).abs() * 2 <= PICO_PER_CENT * PARTS_PER_PICO);
            for line in &lines {
                prop_assert_eq!(i128::from(line.amount.pico()) % PICO_PER_CENT, 0);
                // Tax is stored to a pico-USD, and rounded from what is finer.
                let away = i128::from(line.amount.pico() - line.exact.pico()).abs();
                prop_assert!(away <= PICO_PER_CENT, "{} is {} away", line.description, away);
            }
        }
    }
}
