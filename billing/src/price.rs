//! Price books: what a unit costs, and the pure function from quantities to money.
//!
//! A book is immutable and addressed by the SHA-256 of its canonical form, so a bill that names the hash can be derived
//! again years later. A price is exact pico-USD per unit, or it is refused. Of one model and service tier a book has
//! list prices, and contracts: prices that one account has instead.
//!
//! ```text
//! file (TOML) ──► PriceBook ──► Prices of an account ──► Lines of an event ──► cost
//!                  │ canonical, hash   │ bound ──► hold      │ a month of them ──► tier adjustments
//! ```
//!
//! | concept | module |
//! | --- | --- |
//! | flat, packages, tiers | `rate` |
//! | the file and its form for the hash | `file` |
//! | one account's prices; lines and bounds | `prices` |
//! | what a month's tiers give back | `month` |
//! | what a new book changes | `diff` |

pub(crate) mod diff;
mod file;
mod month;
mod prices;
mod rate;

use std::{collections::BTreeMap, fmt};

pub use diff::{Change, PriceTerms, TierTerms};
pub use file::PriceBookError;
pub use month::{Adjustment, AdjustmentError, SkuUsage, tier_adjustments};
pub use prices::{Line, PriceError, Prices, cost};
pub use rate::{Rate, Step, Tier, TierPart, Tiers, TiersError};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use time::OffsetDateTime;

use crate::event::{AccountId, Quantities, ServiceTier};

/// The address of a price book: SHA-256 of its canonical form, lower-case hex.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PriceBookHash(String);

/// What is counted. The order is that of the canonical form: new meters go to the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Meter {
    Input,
    CachedInput,
    Output,
    /// Generated tokens that only led to the answer. Where they have no price, they are output.
    Reasoning,
    Characters,
    Seconds,
    Images,
    /// One for each request that is billed.
    Requests,
}

/// Prices in force from a moment on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PriceBook {
    effective_from: OffsetDateTime,
    models: BTreeMap<String, BTreeMap<ServiceTier, Offer>>,
    skus: BTreeMap<String, Product>,
    hash: PriceBookHash,
}

/// What one model costs in one service tier.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Offer {
    list: Meters,
    contracts: BTreeMap<AccountId, Meters>,
}

type Meters = BTreeMap<Meter, Price>;

/// What a SKU is the name of, whatever it costs and whoever buys it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Product {
    pub model: String,
    pub service_tier: ServiceTier,
    pub meter: Meter,
}

/// A rate under the name that statements show.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Price {
    pub sku: String,
    pub rate: Rate,
}

/// One `[[price]]` of a book.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BookRow<'a> {
    pub model: &'a str,
    pub service_tier: ServiceTier,
    /// The one account that has this price; None: the list price.
    pub account: Option<&'a AccountId>,
    pub meter: Meter,
    pub price: &'a Price,
}

impl PriceBook {
    /// Reads a price file; see the module `file` for what it may hold.
    pub fn from_toml(text: &str) -> Result<PriceBook, PriceBookError> {
        let file::Parsed { effective_from, models, skus } = file::parse(text)?;
        let mut book = PriceBook { effective_from, models, skus, hash: PriceBookHash(String::new()) };
        book.hash = PriceBookHash::of(&book.canonical());
        Ok(book)
    }

    pub fn hash(&self) -> &PriceBookHash {
        &self.hash
    }

    pub fn effective_from(&self) -> OffsetDateTime {
        self.effective_from
    }

    /// Every price, in the order of the canonical form: by model, service tier, account (the list first) and meter.
    pub fn rows(&self) -> impl Iterator<Item = BookRow<'_>> {
        let offers = self
            .models
            .iter()
            .flat_map(|(model, tiers)| tiers.iter().map(move |(tier, offer)| (model, *tier, offer)));
        offers.flat_map(|(model, service_tier, offer)| {
            let list = offer.list.iter().map(|price| (None, price));
            let contracts = offer
                .contracts
                .iter()
                .flat_map(|(account, meters)| meters.iter().map(move |price| (Some(account), price)));
            let row = move |(account, (meter, price)): (Option<_>, (&Meter, _))| BookRow {
                model,
                service_tier,
                account,
                meter: *meter,
                price,
            };
            list.chain(contracts).map(row)
        })
    }

    /// What an account pays for a model in a service tier; None if the book does not sell it that.
    pub fn prices(&self, account: &AccountId, model: &str, service_tier: ServiceTier) -> Option<Prices<'_>> {
        let (model, tiers) = self.models.get_key_value(model)?;
        let offer = tiers.get(&service_tier)?;
        Prices::of(model, service_tier, &offer.list, offer.contracts.get(account))
    }

    /// Whether the model has a price, be it for one account alone.
    pub fn sells(&self, model: &str) -> bool {
        self.models.contains_key(model)
    }

    /// What a SKU is the name of.
    pub fn product(&self, sku: &str) -> Option<&Product> {
        self.skus.get(sku)
    }

    /// Prices quantities: one line for each class, zero quantities left out. Pure, and the only way to a cost.
    pub fn price(
        &self,
        account: &AccountId,
        model: &str,
        service_tier: ServiceTier,
        quantities: &Quantities,
    ) -> Result<Vec<Line>, PriceError> {
        let none = || PriceError::NoModel { model: model.to_owned(), service_tier };
        self.prices(account, model, service_tier).ok_or_else(none)?.lines(quantities)
    }

    /// The text that the hash is taken over. It is itself a price file.
    pub fn canonical(&self) -> String {
        file::canonical(self)
    }
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

impl Meter {
    pub fn as_str(self) -> &'static str {
        match self {
            Meter::Input => "input",
            Meter::CachedInput => "cached_input",
            Meter::Output => "output",
            Meter::Reasoning => "reasoning",
            Meter::Characters => "characters",
            Meter::Seconds => "seconds",
            Meter::Images => "images",
            Meter::Requests => "requests",
        }
    }

    /// What one of it is called.
    pub fn unit(self) -> &'static str {
        match self {
            Meter::Input | Meter::CachedInput | Meter::Output | Meter::Reasoning => "token",
            Meter::Characters => "character",
            Meter::Seconds => "second",
            Meter::Images => "image",
            Meter::Requests => "request",
        }
    }
}

impl fmt::Display for Meter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests;
