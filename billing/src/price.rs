//! Price books: what a token costs, and the pure function from quantities to money.
//!
//! A book is immutable and addressed by the SHA-256 of its canonical form, so a bill that names the hash can be derived
//! again years later. Prices are written as dollars per million units and stored as exact pico-USD per unit; a price
//! that is not exact is refused.
//!
//! ```toml
//! currency = "USD"
//! effective_from = "2026-01-01T00:00:00Z"
//!
//! [[price]]
//! model = "lightning-1"
//! meter = "output"              # input | cached_input | output
//! sku = "lightning-1.output"    # what a statement shows; default: MODEL.METER
//! usd_per_million = "0.80"
//! ```

use std::{collections::BTreeMap, fmt};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use crate::{
    event::Quantities,
    money::{Money, MoneyError, Total, parse_decimal},
};

/// Dollars per million units have this many decimals when pico-USD per unit are to be whole.
const USD_PER_MILLION_DECIMALS: usize = 6;

/// The address of a price book: SHA-256 of its canonical form, lower-case hex.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PriceBookHash(String);

/// What is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Meter {
    Input,
    CachedInput,
    Output,
}

/// Prices in force from a moment on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PriceBook {
    effective_from: OffsetDateTime,
    models: BTreeMap<String, ModelPrices>,
    hash: PriceBookHash,
}

/// The prices of one model, all classes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelPrices {
    pub input: Price,
    pub cached_input: Price,
    pub output: Price,
}

/// A unit price under the name that statements show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Price {
    pub sku: String,
    pub per_unit: Money,
}

/// One priced quantity.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Line {
    pub sku: String,
    pub meter: Meter,
    pub quantity: u64,
    pub unit_price: Money,
    pub amount: Money,
}

/// Why a price file is refused.
#[derive(Debug, thiserror::Error)]
pub enum PriceBookError {
    #[error("the price book is not valid TOML")]
    Toml(#[from] toml::de::Error),
    #[error("currency: \"{0}\" is not supported; write \"USD\"")]
    Currency(String),
    #[error("effective_from: \"{0}\" is not a moment in time; write it like \"2026-01-01T00:00:00Z\"")]
    EffectiveFrom(String),
    #[error("price: the book has no prices; add a [[price]] for each model and meter")]
    Empty,
    #[error("price[{index}] ({model}, {meter}): usd_per_million")]
    Amount {
        index: usize,
        model: String,
        meter: Meter,
        #[source]
        source: MoneyError,
    },
    #[error("price[{index}] ({model}, {meter}): usd_per_million is negative")]
    Negative { index: usize, model: String, meter: Meter },
    #[error("price[{index}]: {field} is empty or has characters that do not print")]
    Name { index: usize, field: &'static str },
    #[error("price[{index}]: {model} already has a price for {meter}; keep one")]
    Duplicate { index: usize, model: String, meter: Meter },
    #[error("price[{index}]: the SKU {sku} is used twice; a statement could not tell the two apart")]
    SkuTwice { index: usize, sku: String },
    #[error("price: {model} has no price for {meter}; add one (\"0\" is a price)")]
    Missing { model: String, meter: Meter },
}

/// Why a quantity cannot be priced.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PriceError {
    #[error("the price book has no prices for the model {0}")]
    NoModel(String),
    #[error("{quantity} x {unit_price} is more than one amount can hold")]
    Overflow { quantity: u64, unit_price: Money },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct BookFile {
    currency: String,
    effective_from: String,
    #[serde(default)]
    price: Vec<PriceRow>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PriceRow {
    model: String,
    meter: Meter,
    sku: Option<String>,
    usd_per_million: String,
}

impl PriceBook {
    pub fn from_toml(text: &str) -> Result<PriceBook, PriceBookError> {
        let file: BookFile = toml::from_str(text)?;
        if file.currency != "USD" {
            return Err(PriceBookError::Currency(file.currency));
        }
        let effective_from = OffsetDateTime::parse(&file.effective_from, &Rfc3339)
            .map_err(|_| PriceBookError::EffectiveFrom(file.effective_from))?
            .to_offset(time::UtcOffset::UTC);
        let models = models_from_rows(file.price)?;
        let hash = PriceBookHash::of(&canonical(effective_from, &models));
        Ok(PriceBook { effective_from, models, hash })
    }

    pub fn hash(&self) -> &PriceBookHash {
        &self.hash
    }

    pub fn effective_from(&self) -> OffsetDateTime {
        self.effective_from
    }

    pub fn models(&self) -> impl Iterator<Item = (&str, &ModelPrices)> {
        self.models.iter().map(|(name, prices)| (name.as_str(), prices))
    }

    pub fn model(&self, name: &str) -> Option<&ModelPrices> {
        self.models.get(name)
    }

    /// Prices quantities: one line for each class, zero quantities left out. Pure, and the only way to a cost.
    pub fn price(&self, model: &str, quantities: &Quantities) -> Result<Vec<Line>, PriceError> {
        let prices = self.model(model).ok_or_else(|| PriceError::NoModel(model.to_owned()))?;
        let classes = [
            (Meter::Input, quantities.input_tokens),
            (Meter::CachedInput, quantities.cached_input_tokens),
            (Meter::Output, quantities.output_tokens),
        ];
        let counted = classes.into_iter().filter(|(_, quantity)| *quantity > 0);
        counted.map(|(meter, quantity)| prices.line(meter, quantity)).collect()
    }

    /// The text that the hash is taken over. It is itself a price file.
    pub fn canonical(&self) -> String {
        canonical(self.effective_from, &self.models)
    }
}

/// The sum of the lines.
pub fn cost(lines: &[Line]) -> Option<Money> {
    lines.iter().map(|line| line.amount).sum::<Total>().to_money()
}

impl ModelPrices {
    pub fn get(&self, meter: Meter) -> &Price {
        match meter {
            Meter::Input => &self.input,
            Meter::CachedInput => &self.cached_input,
            Meter::Output => &self.output,
        }
    }

    /// What a prompt token costs at most, whether or not it comes from the cache.
    pub fn prompt_token_max(&self) -> Money {
        self.input.per_unit.max(self.cached_input.per_unit)
    }

    fn line(&self, meter: Meter, quantity: u64) -> Result<Line, PriceError> {
        let Price { sku, per_unit } = self.get(meter);
        let amount =
            per_unit.checked_mul(quantity).ok_or(PriceError::Overflow { quantity, unit_price: *per_unit })?;
        Ok(Line { sku: sku.clone(), meter, quantity, unit_price: *per_unit, amount })
    }
}

fn models_from_rows(rows: Vec<PriceRow>) -> Result<BTreeMap<String, ModelPrices>, PriceBookError> {
    if rows.is_empty() {
        return Err(PriceBookError::Empty);
    }
    let mut models: BTreeMap<String, BTreeMap<Meter, Price>> = BTreeMap::new();
    let mut skus = std::collections::BTreeSet::new();
    for (index, row) in rows.into_iter().enumerate() {
        let PriceRow { model, meter, sku, usd_per_million } = row;
        let sku = sku.unwrap_or_else(|| format!("{model}.{meter}"));
        for (field, name) in [("model", &model), ("sku", &sku)] {
            if name.trim().is_empty() || name.chars().any(char::is_control) {
                return Err(PriceBookError::Name { index, field });
            }
        }
        let amount = |source| PriceBookError::Amount { index, model: model.clone(), meter, source };
        let pico = parse_decimal(&usd_per_million, USD_PER_MILLION_DECIMALS).map_err(amount)?;
        let per_unit =
            Total::from_pico(pico).to_money().ok_or_else(|| amount(MoneyError::TooLarge(usd_per_million)))?;
        if per_unit < Money::ZERO {
            return Err(PriceBookError::Negative { index, model, meter });
        }
        let prices = models.entry(model.clone()).or_default();
        if prices.insert(meter, Price { sku: sku.clone(), per_unit }).is_some() {
            return Err(PriceBookError::Duplicate { index, model, meter });
        }
        if !skus.insert(sku.clone()) {
            return Err(PriceBookError::SkuTwice { index, sku });
        }
    }
    models.into_iter().map(|(model, prices)| Ok((model.clone(), all_meters(&model, prices)?))).collect()
}

fn all_meters(model: &str, mut prices: BTreeMap<Meter, Price>) -> Result<ModelPrices, PriceBookError> {
    let mut take = |meter| {
        prices.remove(&meter).ok_or_else(|| PriceBookError::Missing { model: model.to_owned(), meter })
    };
    Ok(ModelPrices {
        input: take(Meter::Input)?,
        cached_input: take(Meter::CachedInput)?,
        output: take(Meter::Output)?,
    })
}

/// Models by name, meters in order, prices without superfluous digits, time in UTC: the same book, the same bytes.
fn canonical(effective_from: OffsetDateTime, models: &BTreeMap<String, ModelPrices>) -> String {
    // A JSON string without control characters is a TOML basic string, and its form never changes.
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    let from = effective_from.format(&Rfc3339).expect("a parsed RFC 3339 time formats as one");
    let mut text = format!("currency = \"USD\"\neffective_from = {}\n", quoted(&from));
    for (model, prices) in models {
        for meter in [Meter::Input, Meter::CachedInput, Meter::Output] {
            let Price { sku, per_unit } = prices.get(meter);
            let (model, sku, price) = (quoted(model), quoted(sku), usd_per_million(*per_unit));
            text += &format!(
                "\n[[price]]\nmodel = {model}\nmeter = \"{meter}\"\nsku = {sku}\nusd_per_million = \"{price}\"\n"
            );
        }
    }
    text
}

/// The inverse of reading `usd_per_million`.
fn usd_per_million(per_unit: Money) -> String {
    let unit = 10_i64.pow(USD_PER_MILLION_DECIMALS as u32);
    format!("{}.{:0width$}", per_unit.pico() / unit, per_unit.pico() % unit, width = USD_PER_MILLION_DECIMALS)
}

impl PriceBookHash {
    fn of(canonical: &str) -> PriceBookHash {
        PriceBookHash(hex::encode(Sha256::digest(canonical.as_bytes())))
    }

    pub(crate) fn from_stored(text: String) -> PriceBookHash {
        PriceBookHash(text)
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for PriceBookHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Meter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Meter::Input => "input",
            Meter::CachedInput => "cached_input",
            Meter::Output => "output",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn prices_are_exact_pico_usd_a_token() {
        let quantities = Quantities { input_tokens: 7, output_tokens: 3, ..Quantities::default() };
        let lines = book(BOOK).price("b", &quantities).unwrap();
        let amounts: Vec<_> = lines.iter().map(|line| (line.meter, line.amount.pico())).collect();
        assert_eq!(amounts, [(Meter::Input, 7 * 200_000), (Meter::Output, 3 * 800_000)]);
        assert_eq!(cost(&lines), Some(Money::from_pico(3_800_000)));
    }

    #[test]
    fn the_same_prices_have_the_same_hash_however_they_are_written() {
        let canonical = book(BOOK).canonical();
        assert_eq!(book(&canonical), book(BOOK));
        assert_eq!(book(&canonical).canonical(), canonical);
        let other =
            BOOK.replace("0.80", "0.800000").replace("2026-01-01T02:00:00+02:00", "2026-01-01T00:00:00Z");
        assert_eq!(book(&other).hash(), book(BOOK).hash());
        assert_ne!(book(&BOOK.replace("0.80", "0.81")).hash(), book(BOOK).hash());
        // Hashes are on bills: this one may never change.
        assert_eq!(
            book(BOOK).hash().as_str(),
            "db801e992a8e7eaf9eac93ec219d9bb8da4413fc5b3c741d2f581b71f8c996f3"
        );
    }

    #[test]
    fn a_bad_book_is_refused_with_the_field_and_the_fix() {
        let check = |from: &str, to: &str, expect: &str| {
            assert!(BOOK.contains(from), "{from}");
            let error = PriceBook::from_toml(&BOOK.replace(from, to)).expect_err(expect);
            let told = format!(
                "{error}: {}",
                std::error::Error::source(&error).map_or(String::new(), ToString::to_string)
            );
            assert!(told.contains(expect), "{told}");
        };
        check("\"USD\"", "\"EUR\"", "currency: \"EUR\"");
        check("2026-01-01T02:00:00+02:00", "yesterday", "effective_from: \"yesterday\"");
        check("0.80", "0.8000001", "price[0] (b, output): usd_per_million: \"0.8000001\" is finer");
        check("0.80", "-1", "usd_per_million is negative");
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
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let quantities = Quantities { output_tokens: u64::MAX, ..Quantities::default() };
        assert!(matches!(book(BOOK).price("b", &quantities), Err(PriceError::Overflow { .. })));
        assert_eq!(book(BOOK).price("x", &quantities), Err(PriceError::NoModel("x".into())));
    }
}
