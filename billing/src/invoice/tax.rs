//! Tax, as lines from configured rates. Pure: the place and the rules decide, nothing else.
//!
//! ```toml
//! [[tax.rate]]
//! name = "VAT"              # what the line says
//! country = "DE"            # absent: everywhere that no other rate names
//! rate = "0.19"
//!
//! [tax.category]            # what each kind of line is taxed as; "standard" where nothing is said
//! adjustment = "standard"
//! ```
//!
//! Of the rates of a category the most specific ones count: those of the region, else those of the country, else those
//! of everywhere. Several of one place are several lines. Credit lowers what is taxed: it was taxed when it was sold.

use std::{collections::BTreeMap, fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::line::LineKind;
use crate::money::parse_decimal;

/// A rate of 1.
const MICROS: u32 = 1_000_000;
const RATE_DECIMALS: usize = 6;
const STANDARD: &str = "standard";

/// A tax rate of at most six decimals, from 0 to 1, written `0.19`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rate(u32);

/// The text is not a rate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "\"{0}\" is not a tax rate: write a decimal from 0 to 1 with at most six digits after the point, like \"0.19\""
)]
pub struct RateError(String);

/// What is taxed how, and where. The section `[tax]` of the configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TaxRules {
    pub rate: Vec<TaxRate>,
    pub category: BTreeMap<LineKind, String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaxRate {
    pub name: String,
    pub rate: Rate,
    /// ISO 3166-1, two capital letters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub country: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    #[serde(default = "standard")]
    pub category: String,
}

/// Where a customer is taxed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TaxPlace {
    pub country: Option<String>,
    pub region: Option<String>,
    pub exempt: bool,
}

/// Why the rules are refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TaxRulesError {
    #[error("tax.rate[{index}].{field}: \"{found}\" is not {expected}")]
    Field { index: usize, field: &'static str, found: String, expected: &'static str },
    #[error("tax.rate[{index}] repeats the name, place and category of tax.rate[{first}]; keep one")]
    Twice { index: usize, first: usize },
    #[error("tax.category.{kind}: {problem}")]
    Category { kind: LineKind, problem: &'static str },
}

impl TaxRules {
    /// Refuses what would tax wrongly or in vain.
    pub fn check(&self) -> Result<(), TaxRulesError> {
        for (index, rate) in self.rate.iter().enumerate() {
            let wrong = |field, found: &str, expected| {
                Err(TaxRulesError::Field { index, field, found: found.to_owned(), expected })
            };
            let printable = |text: &str| !text.trim().is_empty() && !text.chars().any(char::is_control);
            if !printable(&rate.name) {
                return wrong("name", &rate.name, "a name that prints, such as \"VAT\"");
            }
            if !printable(&rate.category) {
                return wrong("category", &rate.category, "a name, such as \"standard\"");
            }
            if let Some(country) = rate.country.as_deref().filter(|country| !is_country(country)) {
                return wrong("country", country, "two capital letters, such as \"DE\"");
            }
            if let Some(region) = &rate.region
                && (rate.country.is_none() || !printable(region))
            {
                return wrong("region", region, "a region of a country; name its country beside it");
            }
            let place = |rate: &TaxRate| {
                (rate.name.clone(), rate.country.clone(), rate.region.clone(), rate.category.clone())
            };
            if let Some(first) = self.rate[..index].iter().position(|other| place(other) == place(rate)) {
                return Err(TaxRulesError::Twice { index, first });
            }
        }
        for (&kind, category) in &self.category {
            if matches!(kind, LineKind::Tax | LineKind::Credit) {
                return Err(TaxRulesError::Category { kind, problem: "is never taxed itself; leave it out" });
            }
            if category != STANDARD && !self.rate.iter().any(|rate| rate.category == *category) {
                return Err(TaxRulesError::Category {
                    kind,
                    problem: "no tax.rate has this category; add one",
                });
            }
        }
        Ok(())
    }

    /// What a kind of line is taxed as.
    pub fn category_of(&self, kind: LineKind) -> &str {
        self.category.get(&kind).map_or(STANDARD, String::as_str)
    }

    /// The rates that count for a category in a place, in the order of the configuration.
    pub fn rates_of(&self, place: &TaxPlace, category: &str) -> Vec<&TaxRate> {
        if place.exempt {
            return Vec::new();
        }
        let specific = |rate: &TaxRate| match (&rate.country, &rate.region) {
            (None, _) => Some(0),
            (country, None) if *country == place.country => Some(1),
            (country, region) if *country == place.country && *region == place.region => Some(2),
            _ => None,
        };
        let of_category = || self.rate.iter().filter(|rate| rate.category == category);
        let most = of_category().filter_map(specific).max();
        of_category().filter(|rate| specific(rate).is_some() && specific(rate) == most).collect()
    }
}

/// ISO 3166-1 alpha-2 by its form.
pub fn is_country(text: &str) -> bool {
    text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_uppercase())
}

fn standard() -> String {
    STANDARD.to_owned()
}

impl Rate {
    pub const fn from_micros(micros: u32) -> Rate {
        Rate(micros)
    }

    pub const fn micros(self) -> u32 {
        self.0
    }

    /// As a percentage without superfluous digits: `19 %`, `8.875 %`.
    pub fn percent(self) -> String {
        let (whole, rest) = (self.0 / 10_000, format!("{:04}", self.0 % 10_000));
        match rest.trim_end_matches('0') {
            "" => format!("{whole} %"),
            digits => format!("{whole}.{digits} %"),
        }
    }
}

impl FromStr for Rate {
    type Err = RateError;

    fn from_str(text: &str) -> Result<Rate, RateError> {
        let wrong = || RateError(text.to_owned());
        let micros = parse_decimal(text, RATE_DECIMALS).map_err(|_| wrong())?;
        u32::try_from(micros).ok().filter(|micros| *micros <= MICROS).map(Rate).ok_or_else(wrong)
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fraction = format!("{:06}", self.0 % MICROS);
        let digits = fraction.trim_end_matches('0').len().max(2);
        write!(f, "{}.{}", self.0 / MICROS, &fraction[..digits])
    }
}

impl Serialize for Rate {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Rate {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Rate, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: &str = r#"
        rate = [
            { name = "Sales tax", rate = "0" },
            { name = "VAT", country = "DE", rate = "0.19" },
            { name = "VAT", country = "DE", rate = "0.07", category = "reduced" },
            { name = "GST", country = "CA", rate = "0.05" },
            { name = "GST", country = "CA", region = "QC", rate = "0.05" },
            { name = "QST", country = "CA", region = "QC", rate = "0.09975" },
        ]
        category = { adjustment = "reduced" }
    "#;

    fn rules(text: &str) -> TaxRules {
        toml::from_str(text).expect("rules")
    }

    #[test]
    fn the_most_specific_rates_count() {
        let rules = rules(RULES);
        rules.check().expect("the rules hold");
        let check = |country: &str, region: &str, category: &str, expect: &[&str]| {
            let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
            let place = TaxPlace { country: some(country), region: some(region), exempt: false };
            let found: Vec<_> = rules
                .rates_of(&place, category)
                .iter()
                .map(|rate| format!("{} {}", rate.name, rate.rate))
                .collect();
            assert_eq!(found, expect, "{country} {region} {category}");
        };
        check("", "", STANDARD, &["Sales tax 0.00"]);
        check("FR", "", STANDARD, &["Sales tax 0.00"]);
        check("DE", "BY", STANDARD, &["VAT 0.19"]);
        check("DE", "", "reduced", &["VAT 0.07"]);
        check("FR", "", "reduced", &[]);
        check("CA", "ON", STANDARD, &["GST 0.05"]);
        check("CA", "QC", STANDARD, &["GST 0.05", "QST 0.09975"]);
        let exempt = TaxPlace { country: Some("DE".into()), exempt: true, region: None };
        assert!(rules.rates_of(&exempt, STANDARD).is_empty());
        assert_eq!(rules.category_of(LineKind::Usage), STANDARD);
        assert_eq!(rules.category_of(LineKind::Adjustment), "reduced");
    }

    #[test]
    fn wrong_rules_are_refused_by_the_field() {
        let check = |from: &str, to: &str, expect: &str| {
            assert!(RULES.contains(from), "{from}");
            let told = match toml::from_str::<TaxRules>(&RULES.replace(from, to)) {
                Ok(rules) => rules.check().expect_err(expect).to_string(),
                Err(error) => error.to_string(),
            };
            assert!(told.contains(expect), "{told}");
        };
        check("\"0.19\"", "\"19\"", "\"19\" is not a tax rate");
        check("\"0.19\"", "\"0.1234567\"", "is not a tax rate");
        check("\"0.19\"", "\"-0.1\"", "is not a tax rate");
        check("\"Sales tax\"", "\" \"", "tax.rate[0].name");
        check(
            "country = \"DE\", rate = \"0.19\"",
            "country = \"de\", rate = \"0.19\"",
            "tax.rate[1].country: \"de\"",
        );
        check(
            "country = \"CA\", region = \"QC\", rate = \"0.05\"",
            "region = \"QC\", rate = \"0.05\"",
            "tax.rate[4].region",
        );
        check("\"QST\"", "\"GST\"", "tax.rate[5] repeats the name, place and category of tax.rate[4]");
        check("adjustment = \"reduced\"", "adjustment = \"none\"", "tax.category.adjustment: no tax.rate");
        check("adjustment =", "credit =", "tax.category.credit: is never taxed itself");
        check("adjustment =", "gift =", "unknown variant `gift`");
    }

    #[test]
    fn a_rate_prints_as_it_is_read() {
        for (text, printed, percent) in [
            ("0.19", "0.19", "19 %"),
            ("0", "0.00", "0 %"),
            ("1", "1.00", "100 %"),
            ("0.088750", "0.08875", "8.875 %"),
        ] {
            let rate: Rate = text.parse().expect(text);
            assert_eq!((rate.to_string().as_str(), rate.percent().as_str()), (printed, percent));
            assert_eq!(rate.to_string().parse(), Ok(rate));
        }
    }
}
