//! The price file, and the canonical form that a book's hash is taken over. Each is a valid instance of the other.
//!
//! ```toml
//! currency = "USD"
//! effective_from = "2026-01-01T00:00:00Z"
//!
//! [[price]]
//! model = "lightning-1"
//! meter = "output"              # input | cached_input | output | reasoning | characters | seconds | images | requests
//! usd_per_million = "0.80"      # or usd_per_unit = "0.04"; or usd = "0.006" with per = 60
//! sku = "lightning-1.output"    # what a statement shows; default: MODEL.METER, or MODEL.METER.TIER
//! service_tier = "batch"        # default | batch | priority
//! account = "acme"              # only this account has the price
//! scheme = "flat"               # flat | package (usd and per) | graduated | volume (tiers)
//! tiers = [{ up_to = 1000000000, usd_per_million = "0.80" }, { usd_per_million = "0.60" }]
//! ```

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use serde::Deserialize;
use time::{OffsetDateTime, format_description::well_known::Rfc3339};

use super::{BookRow, Meter, Meters, Offer, Price, PriceBook, Product, Rate, Tier, Tiers, TiersError};
use crate::{
    event::{AccountId, ServiceTier},
    money::{Money, MoneyError, Total, parse_decimal},
};

/// Dollars per million units have this many decimals when pico-USD per unit are to be whole.
const USD_PER_MILLION_DECIMALS: usize = 6;
const USD_DECIMALS: usize = 12;

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
    #[error("price[{index}] ({model}, {meter}): {field}")]
    Amount {
        index: usize,
        model: String,
        meter: Meter,
        field: String,
        #[source]
        source: AmountError,
    },
    #[error("price[{index}] ({model}, {meter}): tiers")]
    Tiers {
        index: usize,
        model: String,
        meter: Meter,
        #[source]
        source: TiersError,
    },
    #[error("price[{index}] ({model}, {meter}): {problem}")]
    Scheme { index: usize, model: String, meter: Meter, problem: &'static str },
    #[error("price[{index}]: {field} is empty or has characters that do not print")]
    Name { index: usize, field: &'static str },
    #[error("price[{index}]: {model} already has a price for {meter}{scope}; keep one")]
    Duplicate { index: usize, model: String, meter: Meter, scope: Scope },
    #[error("price[{index}]: the SKU {sku} is used twice; a statement could not tell the two apart")]
    SkuTwice { index: usize, sku: String },
    #[error(
        "price[{index}]: {model} has the SKU {known} for {meter}{scope}, not {sku}; one product has one SKU"
    )]
    SkuDiffers { index: usize, model: String, meter: Meter, scope: Scope, sku: String, known: String },
    #[error("price: {model} has no price for {meter}{scope}; add one (\"0\" is a price)")]
    Missing { model: String, meter: Meter, scope: Scope },
}

/// Why an amount of a price is refused.
#[derive(Debug, thiserror::Error)]
pub enum AmountError {
    #[error(transparent)]
    Money(#[from] MoneyError),
    #[error("must not be negative")]
    Negative,
    #[error("write usd_per_million, usd_per_unit, or usd with per")]
    Missing,
    #[error("keep one of usd_per_million, usd_per_unit, and usd with per")]
    Several,
    #[error("usd and per go together: {missing} is missing")]
    Half { missing: &'static str },
    #[error("must be at least 1")]
    PerZero,
    #[error(
        "{usd} for {per} units is no whole number of 10^-12 dollars a unit; choose a price that is, or the scheme \"package\""
    )]
    Inexact { usd: String, per: u64 },
}

/// Whose price it is, where it is not everybody's in the default tier.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scope {
    service_tier: ServiceTier,
    account: Option<AccountId>,
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
    #[serde(default)]
    service_tier: ServiceTier,
    account: Option<AccountId>,
    sku: Option<String>,
    #[serde(default)]
    scheme: Scheme,
    usd_per_million: Option<String>,
    usd_per_unit: Option<String>,
    usd: Option<String>,
    per: Option<u64>,
    #[serde(default)]
    tiers: Vec<TierRow>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TierRow {
    up_to: Option<u64>,
    usd_per_million: Option<String>,
    usd_per_unit: Option<String>,
    usd: Option<String>,
    per: Option<u64>,
}

#[derive(Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Scheme {
    #[default]
    Flat,
    Package,
    Graduated,
    Volume,
}

pub(super) struct Parsed {
    pub effective_from: OffsetDateTime,
    pub models: BTreeMap<String, BTreeMap<ServiceTier, Offer>>,
    pub skus: BTreeMap<String, Product>,
}

pub(super) fn parse(text: &str) -> Result<Parsed, PriceBookError> {
    let file: BookFile = toml::from_str(text)?;
    if file.currency != "USD" {
        return Err(PriceBookError::Currency(file.currency));
    }
    let effective_from = OffsetDateTime::parse(&file.effective_from, &Rfc3339)
        .map_err(|_| PriceBookError::EffectiveFrom(file.effective_from))?
        .to_offset(time::UtcOffset::UTC);
    if file.price.is_empty() {
        return Err(PriceBookError::Empty);
    }
    let skus = Skus::of(&file.price)?;
    let mut models: BTreeMap<String, BTreeMap<ServiceTier, Offer>> = BTreeMap::new();
    for (index, row) in file.price.into_iter().enumerate() {
        let price = Price { sku: skus.of_product[&row.product()].clone(), rate: rate(index, &row)? };
        let PriceRow { model, meter, service_tier, account, .. } = row;
        let offer = models.entry(model.clone()).or_default().entry(service_tier).or_default();
        let meters = match &account {
            None => &mut offer.list,
            Some(account) => offer.contracts.entry(account.clone()).or_default(),
        };
        if meters.insert(meter, price).is_some() {
            let scope = Scope { service_tier, account };
            return Err(PriceBookError::Duplicate { index, model, meter, scope });
        }
    }
    complete(&models)?;
    Ok(Parsed { effective_from, models, skus: skus.by_name })
}

/// Which SKU names which product: one to one, whoever buys it.
#[derive(Default)]
struct Skus {
    by_name: BTreeMap<String, Product>,
    of_product: BTreeMap<Product, String>,
}

impl Skus {
    fn of(rows: &[PriceRow]) -> Result<Skus, PriceBookError> {
        let mut skus = Skus::default();
        // The rows that name a SKU decide; the others are named after what they are.
        let (named, unnamed): (Vec<_>, Vec<_>) =
            rows.iter().enumerate().partition(|(_, row)| row.sku.is_some());
        for (index, row) in named.into_iter().chain(unnamed) {
            skus.add(index, row)?;
        }
        Ok(skus)
    }

    fn add(&mut self, index: usize, row: &PriceRow) -> Result<(), PriceBookError> {
        let product = row.product();
        let default = || match row.service_tier {
            ServiceTier::Default => format!("{}.{}", row.model, row.meter),
            tier => format!("{}.{}.{tier}", row.model, row.meter),
        };
        let known = self.of_product.get(&product).cloned();
        let sku = row.sku.clone().or_else(|| known.clone()).unwrap_or_else(default);
        let account = row.account.as_ref().map_or("account", AccountId::as_str);
        for (field, name) in [("model", row.model.as_str()), ("sku", &sku), ("account", account)] {
            if name.trim().is_empty() || name.chars().any(char::is_control) {
                return Err(PriceBookError::Name { index, field });
            }
        }
        match known {
            Some(known) if known == sku => return Ok(()),
            Some(known) => {
                let (model, meter, scope) = (row.model.clone(), row.meter, row.scope());
                return Err(PriceBookError::SkuDiffers { index, model, meter, scope, sku, known });
            }
            None => {}
        }
        if self.by_name.insert(sku.clone(), product.clone()).is_some() {
            return Err(PriceBookError::SkuTwice { index, sku });
        }
        self.of_product.insert(product, sku);
        Ok(())
    }
}

impl PriceRow {
    fn product(&self) -> Product {
        Product { model: self.model.clone(), service_tier: self.service_tier, meter: self.meter }
    }

    fn scope(&self) -> Scope {
        Scope { service_tier: self.service_tier, account: self.account.clone() }
    }

    fn amount(&self) -> Amount<'_> {
        let (million, unit) = (self.usd_per_million.as_deref(), self.usd_per_unit.as_deref());
        Amount { usd_per_million: million, usd_per_unit: unit, usd: self.usd.as_deref(), per: self.per }
    }
}

impl TierRow {
    fn amount(&self) -> Amount<'_> {
        let (million, unit) = (self.usd_per_million.as_deref(), self.usd_per_unit.as_deref());
        Amount { usd_per_million: million, usd_per_unit: unit, usd: self.usd.as_deref(), per: self.per }
    }
}

fn rate(index: usize, row: &PriceRow) -> Result<Rate, PriceBookError> {
    let PriceRow { model, meter, scheme, .. } = row;
    let refused = |field: String| {
        move |source| PriceBookError::Amount { index, model: model.clone(), meter: *meter, field, source }
    };
    let problem = |problem| PriceBookError::Scheme { index, model: model.clone(), meter: *meter, problem };
    let amount = row.amount();
    if matches!(scheme, Scheme::Flat | Scheme::Package) && !row.tiers.is_empty() {
        return Err(problem("tiers need scheme = \"graduated\" or \"volume\""));
    }
    match scheme {
        Scheme::Flat => amount.per_unit().map(Rate::Flat).map_err(refused(amount.field().to_owned())),
        Scheme::Package => {
            let Some(size) = amount.per.filter(|size| *size > 1) else {
                return Err(problem("a package needs usd, and per with the number of its units, at least 2"));
            };
            let price = amount.whole().map_err(refused("usd".to_owned()))?;
            Ok(Rate::Package { size, price })
        }
        Scheme::Graduated | Scheme::Volume => {
            if amount.is_given() {
                return Err(problem("with tiers, prices stand in the tiers alone"));
            }
            let mut tiers = Vec::new();
            for (at, tier) in row.tiers.iter().enumerate() {
                let amount = tier.amount();
                let per_unit =
                    amount.per_unit().map_err(refused(format!("tiers[{at}].{}", amount.field())))?;
                tiers.push(Tier { up_to: tier.up_to, per_unit });
            }
            let tiers = Tiers::new(tiers).map_err(|source| PriceBookError::Tiers {
                index,
                model: model.clone(),
                meter: *meter,
                source,
            })?;
            Ok(if *scheme == Scheme::Volume { Rate::Volume(tiers) } else { Rate::Graduated(tiers) })
        }
    }
}

/// A price in one of its spellings.
#[derive(Clone, Copy)]
struct Amount<'a> {
    usd_per_million: Option<&'a str>,
    usd_per_unit: Option<&'a str>,
    usd: Option<&'a str>,
    per: Option<u64>,
}

impl Amount<'_> {
    fn is_given(&self) -> bool {
        self.usd_per_million.or(self.usd_per_unit).or(self.usd).is_some() || self.per.is_some()
    }

    /// The field to name in an error.
    fn field(&self) -> &'static str {
        match self {
            Amount { usd_per_million: Some(_), .. } => "usd_per_million",
            Amount { usd_per_unit: Some(_), .. } => "usd_per_unit",
            Amount { usd: None, per: None, .. } => "no price",
            Amount { per: Some(0), .. } => "per",
            _ => "usd",
        }
    }

    fn per_unit(&self) -> Result<Money, AmountError> {
        match *self {
            Amount { usd_per_million: Some(text), usd_per_unit: None, usd: None, per: None } => {
                money(text, USD_PER_MILLION_DECIMALS)
            }
            Amount { usd_per_million: None, usd_per_unit: Some(text), usd: None, per: None } => {
                money(text, USD_DECIMALS)
            }
            Amount { usd_per_million: None, usd_per_unit: None, usd: None, per: None } => {
                Err(AmountError::Missing)
            }
            Amount { usd_per_million: None, usd_per_unit: None, .. } => {
                let (whole, per) = (self.whole()?, self.per.unwrap_or(1));
                let inexact = || AmountError::Inexact { usd: self.usd.unwrap_or_default().to_owned(), per };
                let divisor = i64::try_from(per).map_err(|_| inexact())?;
                (whole.pico() % divisor == 0)
                    .then(|| Money::from_pico(whole.pico() / divisor))
                    .ok_or_else(inexact)
            }
            _ => Err(AmountError::Several),
        }
    }

    /// The price of `per` units together.
    fn whole(&self) -> Result<Money, AmountError> {
        match *self {
            Amount { usd_per_million: None, usd_per_unit: None, usd: Some(text), per: Some(1..) } => {
                money(text, USD_DECIMALS)
            }
            Amount { usd_per_million: None, usd_per_unit: None, per: Some(0), .. } => {
                Err(AmountError::PerZero)
            }
            Amount { usd_per_million: None, usd_per_unit: None, usd: Some(_), per: None } => {
                Err(AmountError::Half { missing: "per" })
            }
            Amount { usd_per_million: None, usd_per_unit: None, usd: None, .. } => {
                Err(AmountError::Half { missing: "usd" })
            }
            _ => Err(AmountError::Several),
        }
    }
}

fn money(text: &str, decimals: usize) -> Result<Money, AmountError> {
    let pico = parse_decimal(text, decimals)?;
    let amount = Total::from_pico(pico).to_money().ok_or_else(|| MoneyError::TooLarge(text.to_owned()))?;
    if amount < Money::ZERO { Err(AmountError::Negative) } else { Ok(amount) }
}

/// What generates or caches is a model that takes prompts and answers: without one of the three it could not be billed.
fn complete(models: &BTreeMap<String, BTreeMap<ServiceTier, Offer>>) -> Result<(), PriceBookError> {
    let chat = [Meter::Input, Meter::CachedInput, Meter::Output];
    for (model, tiers) in models {
        for (&service_tier, Offer { list, contracts }) in tiers {
            let none = Meters::new();
            let views =
                std::iter::once((None, &none)).chain(contracts.iter().map(|(who, own)| (Some(who), own)));
            for (account, own) in views {
                let priced: BTreeSet<Meter> = list.keys().chain(own.keys()).copied().collect();
                let answers = [Meter::CachedInput, Meter::Output, Meter::Reasoning];
                if !answers.iter().any(|meter| priced.contains(meter)) {
                    continue;
                }
                if let Some(&meter) = chat.iter().find(|meter| !priced.contains(meter)) {
                    let scope = Scope { service_tier, account: account.cloned() };
                    return Err(PriceBookError::Missing { model: model.clone(), meter, scope });
                }
            }
        }
    }
    Ok(())
}

/// Rows in order, prices without superfluous digits, time in UTC, nothing that is a default but the SKU: the same book,
/// the same bytes. What is added to the file must leave the form of a book that does not use it as it is.
pub(super) fn canonical(book: &PriceBook) -> String {
    let from = book.effective_from.format(&Rfc3339).expect("a parsed RFC 3339 time formats as one");
    let mut text = format!("currency = \"USD\"\neffective_from = {}\n", quoted(&from));
    for BookRow { model, service_tier, account, meter, price } in book.rows() {
        text += &format!("\n[[price]]\nmodel = {}\nmeter = \"{meter}\"\n", quoted(model));
        if service_tier != ServiceTier::Default {
            text += &format!("service_tier = \"{service_tier}\"\n");
        }
        if let Some(account) = account {
            text += &format!("account = {}\n", quoted(account.as_str()));
        }
        text += &format!("sku = {}\n", quoted(&price.sku));
        match &price.rate {
            Rate::Flat(per_unit) => {
                text += &format!("usd_per_million = \"{}\"\n", usd_per_million(*per_unit));
            }
            Rate::Package { size, price } => {
                let usd = price.to_usd_string();
                text += &format!("scheme = \"package\"\nusd = \"{usd}\"\nper = {size}\n");
            }
            rate @ (Rate::Graduated(_) | Rate::Volume(_)) => {
                let tier = |tier: &Tier| {
                    let up_to = tier.up_to.map_or(String::new(), |up_to| format!("up_to = {up_to}, "));
                    format!("{{ {up_to}usd_per_million = \"{}\" }}", usd_per_million(tier.per_unit))
                };
                let tiers = rate.tiers().iter().map(tier).collect::<Vec<_>>().join(", ");
                text += &format!("scheme = \"{}\"\ntiers = [{tiers}]\n", rate.scheme());
            }
        }
    }
    text
}

/// A JSON string without control characters is a TOML basic string, and its form never changes.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// The inverse of reading `usd_per_million`.
fn usd_per_million(per_unit: Money) -> String {
    let unit = 10_i64.pow(USD_PER_MILLION_DECIMALS as u32);
    format!("{}.{:0width$}", per_unit.pico() / unit, per_unit.pico() % unit, width = USD_PER_MILLION_DECIMALS)
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.service_tier, &self.account) {
            (ServiceTier::Default, None) => Ok(()),
            (tier, None) => write!(f, " ({tier})"),
            (ServiceTier::Default, Some(account)) => write!(f, " (account {account})"),
            (tier, Some(account)) => write!(f, " ({tier}, account {account})"),
        }
    }
}
