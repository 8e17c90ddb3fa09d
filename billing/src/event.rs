//! The facts of one request: who asked, what was counted, what it cost.

use std::fmt;

use serde::{Deserialize, Serialize};
use time::OffsetDateTime;
use uuid::Uuid;

use crate::{money::Money, price::PriceBookHash};

/// A billing account. An organisation has one; the gateway decides which.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct AccountId(String);

/// A request of a client, whatever number of attempts it took. UUIDv7, and the idempotency key of its bill.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RequestId(Uuid);

/// What one request used, by class. Classes do not overlap: `input + cached_input` is the whole prompt, and
/// `output + reasoning` is everything that was generated.
///
/// A class that an older version did not write is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Quantities {
    pub input_tokens: u64,
    pub cached_input_tokens: u64,
    pub output_tokens: u64,
    pub reasoning_tokens: u64,
    /// Characters of text that were spoken.
    pub characters: u64,
    /// Seconds of sound, each begun one whole.
    pub seconds: u64,
    pub images: u64,
}

/// What a request uses beside tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Media {
    pub characters: u64,
    pub seconds: u64,
    pub images: u64,
}

/// How soon an answer is wanted, and so by which prices it is billed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ServiceTier {
    #[default]
    Default,
    Batch,
    Priority,
}

/// Why generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// End of sequence or a stop string.
    Stop,
    /// The request's own limit, or the end of the context.
    Length,
    ToolCalls,
    /// The account's money was used up, at exactly this token.
    Budget,
    /// The client went away.
    Cancelled,
    /// The node failed and nothing could continue the stream.
    Error,
}

/// A request as it is admitted.
#[derive(Clone, Debug)]
pub struct AdmitRequest {
    pub request_id: RequestId,
    pub account: AccountId,
    pub org: String,
    pub project: String,
    pub api_key: String,
    /// The end user that the client named; empty when it named none.
    pub user: String,
    pub model: String,
    pub service_tier: ServiceTier,
    /// The exact number of prompt tokens, cached ones included.
    pub input_tokens: u64,
    /// Tokens that may be generated, reasoning among them.
    pub output_tokens_max: u64,
    /// What may be used beside tokens, at most.
    pub media_max: Media,
    pub admitted_at: OffsetDateTime,
}

/// How a request ended, as the engine counted it. Token classes do not overlap.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub input_tokens: u64,
    pub cached_input_tokens: u64,
    pub output_tokens: u64,
    pub reasoning_tokens: u64,
    pub media: Media,
    pub finish_reason: FinishReason,
    /// The node that produced the last token.
    pub node: String,
    /// None when no token came.
    pub time_to_first_token_ms: Option<u64>,
    pub duration_ms: u64,
}

/// What is billed for one request. Immutable once written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UsageEvent {
    pub request_id: RequestId,
    pub account: AccountId,
    pub org: String,
    pub project: String,
    pub api_key: String,
    pub user: String,
    pub model: String,
    #[serde(default)]
    pub service_tier: ServiceTier,
    pub node: String,
    pub quantities: Quantities,
    /// Tokens that the engine counted beyond what the hold covered. They are waste of the operator, never billed.
    pub overrun_tokens: u64,
    pub finish_reason: FinishReason,
    pub time_to_first_token_ms: Option<u64>,
    pub duration_ms: u64,
    /// Milliseconds since 1970 UTC. The price book, the day and the ledger minute follow from it.
    pub admitted_at_ms: i64,
    pub price_book: PriceBookHash,
    pub cost: Money,
    /// The budget windows that the hold drew on, by their keys.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub budgets: Vec<String>,
}

impl AccountId {
    pub fn new(id: impl Into<String>) -> AccountId {
        AccountId(id.into())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl RequestId {
    /// Takes an id that the caller made; see [`Uuid::now_v7`].
    pub const fn new(id: Uuid) -> RequestId {
        RequestId(id)
    }

    pub const fn uuid(self) -> Uuid {
        self.0
    }
}

impl From<&str> for AccountId {
    fn from(id: &str) -> AccountId {
        AccountId::new(id)
    }
}

impl From<Uuid> for RequestId {
    fn from(id: Uuid) -> RequestId {
        RequestId(id)
    }
}

impl fmt::Display for AccountId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl Quantities {
    /// All tokens. A sum of counts that a hold bounds, so that it cannot overflow.
    pub(crate) fn tokens(&self) -> u64 {
        self.input_tokens + self.cached_input_tokens + self.output_tokens + self.reasoning_tokens
    }

    pub fn media(&self) -> Media {
        Media { characters: self.characters, seconds: self.seconds, images: self.images }
    }
}

impl ServiceTier {
    const ALL: [ServiceTier; 3] = [ServiceTier::Default, ServiceTier::Batch, ServiceTier::Priority];

    pub(crate) fn parse(name: &str) -> Option<ServiceTier> {
        ServiceTier::ALL.into_iter().find(|tier| tier.as_str() == name)
    }

    pub fn as_str(self) -> &'static str {
        match self {
            ServiceTier::Default => "default",
            ServiceTier::Batch => "batch",
            ServiceTier::Priority => "priority",
        }
    }
}

impl fmt::Display for ServiceTier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FinishReason {
    pub fn as_str(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::ToolCalls => "tool_calls",
            FinishReason::Budget => "budget",
            FinishReason::Cancelled => "cancelled",
            FinishReason::Error => "error",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bill_that_an_older_version_left_in_the_outbox_still_reads() {
        let older = serde_json::json!({
            "request_id": Uuid::nil(), "account": "acme", "org": "o", "project": "p", "api_key": "k", "user": "u",
            "model": "m", "node": "n",
            "quantities": { "input_tokens": 5, "cached_input_tokens": 4, "output_tokens": 3 },
            "overrun_tokens": 0, "finish_reason": "stop", "time_to_first_token_ms": 7, "duration_ms": 9,
            "admitted_at_ms": 1, "price_book": "ab", "cost": "0.000001",
        });
        let event: UsageEvent = serde_json::from_value(older).expect("the older form is readable");
        let expected =
            Quantities { input_tokens: 5, cached_input_tokens: 4, output_tokens: 3, ..Quantities::default() };
        assert_eq!((event.quantities, event.service_tier), (expected, ServiceTier::Default));
        let newer = serde_json::to_string(&event).expect("an event is plain data");
        assert_eq!(serde_json::from_str::<UsageEvent>(&newer).expect("it reads itself"), event);
    }
}
