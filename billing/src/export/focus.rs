//! FOCUS, the FinOps Open Cost and Usage Specification: what finance tools read.
//!
//! Sources. 1.2: https://focus.finops.org/focus-specification/v1-2/ and its requirements model 1.2.0.1, which the public
//! `focus-validator` runs. 1.4: https://focus.finops.org/focus-specification/v1-4/, dataset Cost and Usage; against 1.2 it
//! has no ProviderName and PublisherName (deprecated in 1.3), and has ServiceProviderName, HostProviderName (1.3) and
//! InvoiceDetailId (1.4). Columns that are conditional on what this platform does not have (regions, capacity
//! reservations, split cost allocation) are absent, as the specification allows. The validator reads four more that would be
//! conditional: prices in their currency, which is the billing currency, and the commitment discount, of which there is none.
//!
//! A row is one hour (the charge period, UTC) of one SKU at one price of one key, within one part: a stretch of the ledger's
//! sequence. A bill that arrives later for an hour that was exported before makes a further row for that hour; rows add up.
//!
//! | | BilledCost | EffectiveCost | ListCost = ContractedCost |
//! | --- | --- | --- | --- |
//! | usage of a postpaid account | cost | cost | cost |
//! | usage of a prepaid account | 0, it was billed by the purchase | cost | cost |
//! | purchase of prepaid credit | amount | 0, it covers later usage | amount |
//!
//! BillingAccountName and SubAccountName repeat the ids: names may change, and an export of the same range may not.

use std::{borrow::Cow, collections::HashMap};

use time::{Date, Month, Time};

use super::{
    bills::CURRENCY,
    source::{EventFact, GrantFact},
    table::{Cell, Column, Kind, Table, column},
};
use crate::{
    clock::moment_s,
    money::PICO_PER_USD,
    price::{Line, Meter},
    usage::EventRow,
};

const HOUR_MS: i64 = 3_600_000;
const SERVICE: &str = "Model Inference";
/// The SKU of prepaid credit: a dollar of it costs a dollar.
const CREDIT_SKU: &str = "prepaid-credit";

/// Which version's columns are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Version {
    V1_2,
    V1_4,
}

macro_rules! columns {
    ($($name:ident $kind:ident $($property:ident)*),* $(,)?) => {
        &[$(column(stringify!($name), Kind::$kind)$(.$property())*),*]
    };
}

static V1_2: Table = Table {
    columns: columns![
        BilledCost Decimal control,
        BillingAccountId Text,
        BillingAccountName Text,
        BillingCurrency Text,
        BillingPeriodEnd Hour,
        BillingPeriodStart Hour,
        ChargeCategory Text,
        ChargeClass Text nullable,
        ChargeDescription Text,
        ChargeFrequency Text,
        ChargePeriodEnd Hour,
        ChargePeriodStart Hour,
        CommitmentDiscountId Text nullable,
        CommitmentDiscountStatus Text nullable,
        ConsumedQuantity Decimal nullable control,
        ConsumedUnit Text nullable,
        ContractedCost Decimal control,
        ContractedUnitPrice Decimal nullable,
        EffectiveCost Decimal control,
        InvoiceId Text nullable,
        InvoiceIssuerName Text,
        ListCost Decimal control,
        ListUnitPrice Decimal nullable,
        PricingCategory Text nullable,
        PricingCurrency Text,
        PricingCurrencyContractedUnitPrice Decimal nullable,
        PricingCurrencyEffectiveCost Decimal,
        PricingCurrencyListUnitPrice Decimal nullable,
        PricingQuantity Decimal nullable,
        PricingUnit Text nullable,
        ProviderName Text,
        PublisherName Text,
        ResourceId Text nullable,
        ResourceName Text nullable,
        ResourceType Text nullable,
        ServiceCategory Text,
        ServiceName Text,
        ServiceSubcategory Text,
        SkuId Text nullable,
        SkuMeter Text nullable,
        SkuPriceDetails Text nullable,
        SkuPriceId Text nullable,
        SubAccountId Text nullable,
        SubAccountName Text nullable,
        Tags Text nullable,
        x_Model Text nullable,
        x_PriceHash Text nullable,
        x_ServiceTier Text nullable,
        x_TokenClass Text nullable,
    ],
    currency: "BillingCurrency",
};

static V1_4: Table = Table {
    columns: columns![
        BilledCost Decimal control,
        BillingAccountId Text,
        BillingAccountName Text,
        BillingCurrency Text,
        BillingPeriodEnd Hour,
        BillingPeriodStart Hour,
        ChargeCategory Text,
        ChargeClass Text nullable,
        ChargeDescription Text,
        ChargeFrequency Text,
        ChargePeriodEnd Hour,
        ChargePeriodStart Hour,
        CommitmentDiscountId Text nullable,
        CommitmentDiscountStatus Text nullable,
        ConsumedQuantity Decimal nullable control,
        ConsumedUnit Text nullable,
        ContractedCost Decimal control,
        ContractedUnitPrice Decimal nullable,
        EffectiveCost Decimal control,
        HostProviderName Text,
        InvoiceDetailId Text nullable,
        InvoiceId Text nullable,
        InvoiceIssuerName Text,
        ListCost Decimal control,
        ListUnitPrice Decimal nullable,
        PricingCategory Text nullable,
        PricingCurrency Text,
        PricingCurrencyContractedUnitPrice Decimal nullable,
        PricingCurrencyEffectiveCost Decimal,
        PricingCurrencyListUnitPrice Decimal nullable,
        PricingQuantity Decimal nullable,
        PricingUnit Text nullable,
        ResourceId Text nullable,
        ResourceName Text nullable,
        ResourceType Text nullable,
        ServiceCategory Text,
        ServiceName Text,
        ServiceProviderName Text,
        ServiceSubcategory Text,
        SkuId Text nullable,
        SkuMeter Text nullable,
        SkuPriceDetails Text nullable,
        SkuPriceId Text nullable,
        SubAccountId Text nullable,
        SubAccountName Text nullable,
        Tags Text nullable,
        x_Model Text nullable,
        x_PriceHash Text nullable,
        x_ServiceTier Text nullable,
        x_TokenClass Text nullable,
    ],
    currency: "BillingCurrency",
};

/// One charge, in FOCUS's terms and in no version's columns. Further kinds of charges (tax, adjustments, credits) are
/// further ways to make one.
#[derive(Debug)]
pub(crate) struct Charge {
    category: &'static str,
    frequency: &'static str,
    description: String,
    account: String,
    start_ms: i64,
    billed: i128,
    effective: i128,
    /// At the account's own price, and at the list's.
    contracted: i128,
    listed: i128,
    quantity: i128,
    unit: &'static str,
    /// How many times the unit price is due, and for how many units each time.
    priced_quantity: i128,
    unit_size: u64,
    unit_price: i128,
    /// None: the list sells another size of package, or none at all at a price of this unit.
    list_unit_price: Option<i128>,
    sku: String,
    sku_price: String,
    meter: &'static str,
    usage: Option<Use>,
}

/// What only a usage charge says.
#[derive(Debug)]
struct Use {
    org: String,
    project: String,
    api_key: String,
    model: String,
    service_tier: String,
    price_book: String,
    token_class: &'static str,
}

impl Version {
    pub fn table(self) -> Table {
        match self {
            Version::V1_2 => V1_2,
            Version::V1_4 => V1_4,
        }
    }
}

/// Sums the lines of one part by charge. Texts are kept once, so memory is bounded by the charges of a part.
#[derive(Debug, Default)]
pub(crate) struct Charges {
    texts: Vec<String>,
    numbers: HashMap<String, usize>,
    sums: HashMap<Key, Sum>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    hour_ms: i64,
    /// Numbers of texts: account, org, project, key, model, service tier, price book, SKU.
    texts: [usize; 8],
    meter: Meter,
    unit_price: i64,
    unit_size: u64,
    list_unit_price: i64,
    list_unit_size: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    quantity: i128,
    priced_quantity: i128,
    amount: i128,
    listed: i128,
}

impl Charges {
    pub fn len(&self) -> usize {
        self.sums.len()
    }

    pub fn add(&mut self, event: &EventFact, lines: &[Line]) {
        let EventRow { account, org, project, api_key, model, service_tier, price_book, .. } = &**event;
        let texts = [account, org, project, api_key, model, service_tier, price_book];
        let [account, org, project, api_key, model, tier, book] = texts.map(|text| self.number(text));
        let hour_ms = event.admitted_at_ms.div_euclid(HOUR_MS) * HOUR_MS;
        for line in lines {
            let texts = [account, org, project, api_key, model, tier, book, self.number(&line.sku)];
            let key = Key {
                hour_ms,
                texts,
                meter: line.meter,
                unit_price: line.unit_price.pico(),
                unit_size: line.unit_size,
                list_unit_price: line.list_unit_price.pico(),
                list_unit_size: line.list_unit_size,
            };
            let sum = self.sums.entry(key).or_default();
            sum.quantity += i128::from(line.quantity);
            sum.priced_quantity += i128::from(line.priced_quantity());
            sum.amount += i128::from(line.amount.pico());
            sum.listed += line.list_amount().pico();
        }
    }

    /// Every charge, in an order that depends on nothing but what they are.
    pub fn drain(&mut self, is_prepaid: impl Fn(&str) -> bool) -> impl Iterator<Item = Charge> {
        let texts = std::mem::take(&mut self.texts);
        self.numbers.clear();
        let mut sums: Vec<_> = self.sums.drain().collect();
        sums.sort_by(|(left, _), (right, _)| {
            let order = |key: &Key| {
                (key.meter, key.unit_price, key.unit_size, key.list_unit_price, key.list_unit_size)
            };
            let named = |key: &Key| key.texts.map(|number| texts[number].as_str());
            (left.hour_ms, named(left), order(left)).cmp(&(right.hour_ms, named(right), order(right)))
        });
        sums.into_iter().map(move |(key, sum)| {
            let prepaid = is_prepaid(&texts[key.texts[0]]);
            usage_charge(&key, sum, key.texts.map(|number| texts[number].clone()), prepaid)
        })
    }

    fn number(&mut self, text: &str) -> usize {
        if let Some(number) = self.numbers.get(text) {
            return *number;
        }
        self.texts.push(text.to_owned());
        self.numbers.insert(text.to_owned(), self.texts.len() - 1);
        self.texts.len() - 1
    }
}

fn usage_charge(key: &Key, sum: Sum, texts: [String; 8], prepaid: bool) -> Charge {
    let [account, org, project, api_key, model, service_tier, price_book, sku] = texts;
    let (unit, meter, token_class) = match key.meter {
        Meter::Input => ("Tokens", "Input Tokens", "input"),
        Meter::CachedInput => ("Tokens", "Cached Input Tokens", "cached_input"),
        Meter::Output => ("Tokens", "Output Tokens", "output"),
        Meter::Reasoning => ("Tokens", "Reasoning Tokens", "reasoning"),
        Meter::Characters => ("Characters", "Characters", "characters"),
        Meter::Seconds => ("Seconds", "Seconds", "seconds"),
        Meter::Images => ("Images", "Images", "images"),
        Meter::Requests => ("Requests", "Requests", "requests"),
    };
    Charge {
        category: "Usage",
        frequency: "Usage-Based",
        description: format!("{meter} of {model}"),
        account,
        start_ms: key.hour_ms,
        billed: if prepaid { 0 } else { sum.amount },
        effective: sum.amount,
        contracted: sum.amount,
        listed: sum.listed,
        quantity: sum.quantity * i128::from(PICO_PER_USD),
        unit,
        priced_quantity: sum.priced_quantity * i128::from(PICO_PER_USD),
        unit_size: key.unit_size,
        unit_price: key.unit_price.into(),
        list_unit_price: (key.list_unit_size == key.unit_size).then_some(key.list_unit_price.into()),
        // A SKU has a price in each book; the start of the book's hash tells them apart.
        sku_price: format!("{sku}@{}", price_book.get(..12).unwrap_or(&price_book)),
        sku,
        meter,
        usage: Some(Use { org, project, api_key, model, service_tier, price_book, token_class }),
    }
}

/// A purchase of prepaid credit: as many dollars of credit, at a dollar each.
pub(crate) fn purchase(grant: &GrantFact) -> Charge {
    let amount = i128::from(grant.amount_pico);
    Charge {
        category: "Purchase",
        frequency: "One-Time",
        description: if grant.memo.is_empty() { "Prepaid credit".to_owned() } else { grant.memo.clone() },
        account: grant.account.clone(),
        start_ms: (grant.granted_at_s * 1_000).div_euclid(HOUR_MS) * HOUR_MS,
        billed: amount,
        effective: 0,
        contracted: amount,
        listed: amount,
        quantity: amount,
        unit: "Credits",
        priced_quantity: amount,
        unit_size: 1,
        unit_price: PICO_PER_USD.into(),
        list_unit_price: Some(PICO_PER_USD.into()),
        sku: CREDIT_SKU.to_owned(),
        sku_price: CREDIT_SKU.to_owned(),
        meter: "Prepaid Credit",
        usage: None,
    }
}

impl Charge {
    /// The cells of a table's columns.
    pub fn cells<'a>(&'a self, columns: &[Column], provider: &'a str) -> Vec<Cell<'a>> {
        columns.iter().map(|column| self.cell(column.name, provider)).collect()
    }

    fn cell<'a>(&'a self, column: &str, provider: &'a str) -> Cell<'a> {
        let (period_start, period_end) = month_of(self.start_ms);
        let used = |of: fn(&Use) -> &str| match &self.usage {
            Some(usage) => Cell::text(of(usage)),
            None => Cell::Null,
        };
        match column {
            "BilledCost" => Cell::Decimal(self.billed),
            "BillingAccountId" | "BillingAccountName" => Cell::text(&self.account),
            "BillingCurrency" | "PricingCurrency" => Cell::text(CURRENCY),
            "BillingPeriodEnd" => Cell::Moment(period_end),
            "BillingPeriodStart" => Cell::Moment(period_start),
            "ChargeCategory" => Cell::text(self.category),
            "ChargeDescription" => Cell::text(&self.description),
            "ChargeFrequency" => Cell::text(self.frequency),
            "ChargePeriodEnd" => Cell::Moment(self.start_ms + HOUR_MS),
            "ChargePeriodStart" => Cell::Moment(self.start_ms),
            "ConsumedQuantity" => self.usage.as_ref().map_or(Cell::Null, |_| Cell::Decimal(self.quantity)),
            "ConsumedUnit" => self.usage.as_ref().map_or(Cell::Null, |_| Cell::text(self.unit)),
            "EffectiveCost" | "PricingCurrencyEffectiveCost" => Cell::Decimal(self.effective),
            "ListCost" => Cell::Decimal(self.listed),
            "ContractedCost" => Cell::Decimal(self.contracted),
            "ListUnitPrice" | "PricingCurrencyListUnitPrice" => {
                self.list_unit_price.map_or(Cell::Null, Cell::Decimal)
            }
            "ContractedUnitPrice" | "PricingCurrencyContractedUnitPrice" => Cell::Decimal(self.unit_price),
            "PricingCategory" => Cell::text("Standard"),
            "PricingQuantity" => Cell::Decimal(self.priced_quantity),
            "PricingUnit" if self.unit_size > 1 => {
                Cell::Text(Cow::Owned(format!("{} {}", self.unit_size, self.unit)))
            }
            "PricingUnit" => Cell::text(self.unit),
            "InvoiceIssuerName" | "ProviderName" | "PublisherName" | "ServiceProviderName" | "HostProviderName" => {
                Cell::text(provider)
            }
            "ResourceId" => used(|usage| &usage.api_key),
            "ResourceType" => used(|_| "API Key"),
            "ServiceCategory" => Cell::text("AI and Machine Learning"),
            "ServiceName" => Cell::text(SERVICE),
            "ServiceSubcategory" => Cell::text("Generative AI"),
            "SkuId" => Cell::text(&self.sku),
            "SkuMeter" => Cell::text(self.meter),
            "SkuPriceDetails" => self.json(|usage| {
                serde_json::json!({ "x_TokenClass": usage.token_class, "x_Model": usage.model })
            }),
            "SkuPriceId" => Cell::text(&self.sku_price),
            "SubAccountId" | "SubAccountName" => used(|usage| &usage.project),
            "Tags" => self.json(|usage| {
                serde_json::json!({ "sluice/org": usage.org, "sluice/service_tier": usage.service_tier })
            }),
            "x_Model" => used(|usage| &usage.model),
            "x_PriceHash" => used(|usage| &usage.price_book),
            "x_ServiceTier" => used(|usage| &usage.service_tier),
            "x_TokenClass" => used(|usage| usage.token_class),
            // ChargeClass (nothing is corrected), CommitmentDiscount.., ResourceName (keys have no lasting name), InvoiceId and InvoiceDetailId
            // (not yet invoiced).
            _ => Cell::Null,
        }
    }

    fn json(&self, of: fn(&Use) -> serde_json::Value) -> Cell<'_> {
        match &self.usage {
            Some(usage) => Cell::Text(Cow::Owned(of(usage).to_string())),
            None => Cell::Null,
        }
    }
}

/// The billing period: the calendar month, UTC, as its first moment and the next month's.
fn month_of(at_ms: i64) -> (i64, i64) {
    let at = moment_s(at_ms.div_euclid(1_000));
    let first_ms = |year: i32, month: Month| {
        let first = Date::from_calendar_date(year, month, 1).expect("every month has a first day");
        first.with_time(Time::MIDNIGHT).assume_utc().unix_timestamp() * 1_000
    };
    let next = match at.month() {
        Month::December => first_ms(at.year() + 1, Month::January),
        month => first_ms(at.year(), month.next()),
    };
    (first_ms(at.year(), at.month()), next)
}
