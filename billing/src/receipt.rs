//! Receipts: what one response used and cost, signed, so that whoever holds one can check it without asking us.
//!
//! A receipt is made from the durable [`UsageEvent`] and from nothing else, so it cannot say other than the bill does.
//! It is a JWS in compact form (RFC 7515) with an Ed25519 signature (RFC 8037), which any JOSE library verifies. It holds
//! no prompt, no answer, no key but the id of one, and nothing of the caller's own end user.
//!
//! ```text
//! {"alg":"EdDSA","typ":"sluice-receipt+jws","kid":..} . {"version":1,"request_id":..,"cost":"0.0000786"} . signature
//! ```
//! The quantities and the hash of the price book are in it: with that book, [`Receipt::check_cost`] derives the cost again.

mod keys;

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD as BASE64URL};
pub use keys::{ReceiptKey, ReceiptKeyError, ReceiptKeys, ReceiptSigner};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use time::OffsetDateTime;

use crate::{
    error::BillingError,
    event::{AccountId, FinishReason, Quantities, RequestId, ServiceTier, UsageEvent},
    money::Money,
    price::{PriceBook, PriceBookHash, PriceError, cost},
    usage::BillRow,
};

/// What is longer is no receipt: names in one are bounded, and one takes less than 2 KiB.
pub const RECEIPT_BYTES_MAX: usize = 8 * 1024;

const ALGORITHM: &str = "EdDSA";
/// The key signs nothing else under this type, so nothing else can be passed off as a receipt.
const TYPE: &str = "sluice-receipt+jws";
const VERSION: u64 = 1;
const CURRENCY: &str = "USD";

/// What a receipt states. The order of the fields is the order in which they are signed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Receipt {
    pub version: u64,
    pub request_id: RequestId,
    /// Who pays: prices may be of one account alone, so the cost could not be derived without it.
    pub account: AccountId,
    pub org: String,
    pub project: String,
    /// The id of the key that asked.
    pub api_key: String,
    pub model: String,
    pub service_tier: ServiceTier,
    pub quantities: Quantities,
    pub finish_reason: FinishReason,
    /// To the millisecond. The book in force at this moment priced the request.
    #[serde(with = "time::serde::rfc3339")]
    pub admitted_at: OffsetDateTime,
    pub price_book: PriceBookHash,
    pub currency: String,
    pub cost: Money,
}

/// Why a text is not a receipt that one of the keys has signed.
#[derive(Debug, thiserror::Error)]
pub enum ReceiptError {
    #[error("it is longer than {RECEIPT_BYTES_MAX} bytes, which no receipt is")]
    TooLarge,
    #[error("it is not a receipt, which is three parts of base64url with a dot between each two: {0}")]
    Malformed(&'static str),
    #[error("its header is not a receipt's")]
    Header(#[source] serde_json::Error),
    #[error("it is signed by the algorithm {0:?}, and only \"{ALGORITHM}\" is accepted")]
    Algorithm(String),
    #[error("it is a {0:?}, not a \"{TYPE}\"")]
    Type(String),
    #[error("it is signed by the key {kid:?}, which is not among those given: {known}")]
    UnknownKey { kid: String, known: String },
    #[error("the signature does not fit: the receipt was altered, or another key has signed it")]
    Signature,
    #[error("it is of version {0}, and this program reads version {VERSION}")]
    Version(u64),
    #[error("what it states cannot be read")]
    Payload(#[source] serde_json::Error),
}

/// How a signed receipt and what it is held against differ.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    #[error("the price book has the hash {found}, but the receipt names {named}")]
    PriceBook { named: PriceBookHash, found: PriceBookHash },
    #[error("the cost cannot be derived: {0}")]
    Unpriced(#[from] PriceError),
    #[error("the cost derived from the price book is {derived}, but the receipt says {stated}")]
    Cost { derived: String, stated: Money },
    #[error("{field}: the receipt says {stated}, but the bill says {billed}")]
    Bill { field: String, stated: String, billed: String },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    alg: String,
    typ: String,
    kid: String,
}

impl Receipt {
    /// What the receipt of a bill states.
    pub fn of(event: &UsageEvent) -> Receipt {
        Receipt {
            version: VERSION,
            request_id: event.request_id,
            account: event.account.clone(),
            org: event.org.clone(),
            project: event.project.clone(),
            api_key: event.api_key.clone(),
            model: event.model.clone(),
            service_tier: event.service_tier,
            quantities: event.quantities,
            finish_reason: event.finish_reason,
            admitted_at: moment(event.admitted_at_ms),
            price_book: event.price_book.clone(),
            currency: CURRENCY.to_owned(),
            cost: event.cost,
        }
    }

    /// What the receipt of a stored bill must state.
    pub(crate) fn of_stored(request_id: RequestId, bill: &BillRow) -> Result<Receipt, BillingError> {
        let corrupt =
            |error: serde_json::Error| BillingError::Corrupt { table: "usage_events", source: error.into() };
        let BillRow { event, finish_reason } = bill;
        let word = |text: &str| Value::String(text.to_owned());
        Ok(Receipt {
            version: VERSION,
            request_id,
            account: AccountId::new(event.account.clone()),
            org: event.org.clone(),
            project: event.project.clone(),
            api_key: event.api_key.clone(),
            model: event.model.clone(),
            service_tier: serde_json::from_value(word(&event.service_tier)).map_err(corrupt)?,
            quantities: event.quantities(),
            finish_reason: serde_json::from_value(word(finish_reason)).map_err(corrupt)?,
            admitted_at: moment(event.admitted_at_ms),
            price_book: PriceBookHash::from_stored(event.price_book.clone()),
            currency: CURRENCY.to_owned(),
            cost: Money::from_pico(event.cost_pico),
        })
    }

    /// Derives the cost again from the quantities and the book that the receipt names.
    pub fn check_cost(&self, book: &PriceBook) -> Result<(), Mismatch> {
        if *book.hash() != self.price_book {
            let (named, found) = (self.price_book.clone(), book.hash().clone());
            return Err(Mismatch::PriceBook { named, found });
        }
        let derived = cost(&book.price(&self.account, &self.model, self.service_tier, &self.quantities)?);
        match derived == Some(self.cost) {
            true => Ok(()),
            false => {
                let derived = derived.map_or("more than can be billed".to_owned(), |cost| cost.to_string());
                Err(Mismatch::Cost { derived, stated: self.cost })
            }
        }
    }

    /// Compares with what the bill says it must state. The first field that differs is told.
    pub fn check_bill(&self, billed: &Receipt) -> Result<(), Mismatch> {
        let fields = |receipt: &Receipt| match serde_json::to_value(receipt) {
            Ok(Value::Object(fields)) => fields,
            other => unreachable!("a receipt serialises to an object, not {other:?}"),
        };
        let (stated, mut billed) = (fields(self), fields(billed));
        for (field, stated) in stated {
            let billed = billed.remove(&field).unwrap_or_default();
            if stated != billed {
                let (stated, billed) = (stated.to_string(), billed.to_string());
                return Err(Mismatch::Bill { field, stated, billed });
            }
        }
        Ok(())
    }
}

impl ReceiptSigner {
    /// The signed receipt of a bill. Pure: the same bill and key give the same bytes.
    pub fn sign(&self, event: &UsageEvent) -> String {
        self.sign_receipt(&Receipt::of(event))
    }

    fn sign_receipt(&self, receipt: &Receipt) -> String {
        let header =
            Header { alg: ALGORITHM.to_owned(), typ: TYPE.to_owned(), kid: self.public().kid().to_owned() };
        let header = serde_json::to_vec(&header).expect("a header is plain data");
        let payload = serde_json::to_vec(receipt).expect("a receipt is plain data");
        self.compact(&header, &payload)
    }

    /// RFC 7515, section 7.1.
    fn compact(&self, header: &[u8], payload: &[u8]) -> String {
        let mut jws = BASE64URL.encode(header);
        jws.push('.');
        BASE64URL.encode_string(payload, &mut jws);
        let signature = self.signature(jws.as_bytes());
        jws.push('.');
        BASE64URL.encode_string(signature, &mut jws);
        jws
    }
}

impl ReceiptKeys {
    /// What a receipt states, if one of these keys has signed exactly this text. Nothing of it is read before.
    pub fn verify(&self, receipt: &str) -> Result<Receipt, ReceiptError> {
        if receipt.len() > RECEIPT_BYTES_MAX {
            return Err(ReceiptError::TooLarge);
        }
        let mut parts = receipt.split('.');
        let (Some(header), Some(payload), Some(signature), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(ReceiptError::Malformed("it does not have three parts"));
        };
        let decode = |part, why| BASE64URL.decode(part).map_err(|_| ReceiptError::Malformed(why));
        let (header, decoded) = (decode(header, "the first is not base64url")?, header);
        let signed = &receipt[..decoded.len() + 1 + payload.len()];
        let payload = decode(payload, "the second is not base64url")?;
        let signature = decode(signature, "the third is not base64url")?;
        let kid = key_of(&header)?;
        let Some(key) = self.get(&kid) else {
            let known = self.iter().map(ReceiptKey::kid).collect::<Vec<_>>().join(", ");
            return Err(ReceiptError::UnknownKey { kid, known });
        };
        if !key.has_signed(signed.as_bytes(), &signature) {
            return Err(ReceiptError::Signature);
        }
        read(&payload)
    }
}

/// No request is admitted outside of the calendar; a damaged bill then differs from its receipt.
fn moment(at_ms: i64) -> OffsetDateTime {
    let at = OffsetDateTime::from_unix_timestamp_nanos(i128::from(at_ms) * 1_000_000);
    at.ok().filter(|at| at.year() >= 0).unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

/// The key that a header names. A header with anything that a receipt's does not have is refused: RFC 7515 lets a
/// header change what the rest means (`crit`, `b64`) or bring a key of its own (`jwk`, `jku`, `x5c`).
fn key_of(header: &[u8]) -> Result<String, ReceiptError> {
    let named: Value = serde_json::from_slice(header).map_err(ReceiptError::Header)?;
    match &named["alg"] {
        Value::String(algorithm) if algorithm == ALGORITHM => {}
        Value::String(other) => return Err(ReceiptError::Algorithm(other.clone())),
        other => return Err(ReceiptError::Algorithm(other.to_string())),
    }
    let header: Header = serde_json::from_slice(header).map_err(ReceiptError::Header)?;
    match header.typ == TYPE {
        true => Ok(header.kid),
        false => Err(ReceiptError::Type(header.typ)),
    }
}

fn read(payload: &[u8]) -> Result<Receipt, ReceiptError> {
    let stated: Value = serde_json::from_slice(payload).map_err(ReceiptError::Payload)?;
    match stated["version"].as_u64() {
        // A later version may have other fields.
        Some(version) if version != VERSION => Err(ReceiptError::Version(version)),
        _ => serde_json::from_slice(payload).map_err(ReceiptError::Payload),
    }
}

#[cfg(test)]
mod tests;
