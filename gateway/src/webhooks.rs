//! Webhooks: what billing notes down, delivered to whoever asked to be told, signed, at least once.
//!
//! Billing owns the facts (`notices`), written in the transaction of their cause. This module owns their delivery. It
//! never changes money, and no request waits for it.
//!
//! ```text
//! notices ──dispatch──▶ one delivery an endpoint ──attempt──▶ 2xx: delivered
//!    (each once)           (pending)     ▲             │      410: dead, the endpoint is switched off
//!                                        └──── pause ──┴───▶ else, until the attempts are used up: dead
//! ```
//!
//! Any number of gateways on one database share the work: a notice is dispatched under a row lock, and an endpoint has
//! one gateway at a time, by a lease that lapses when that one dies. So an endpoint sees its events one after another, in
//! their order unless one had to be tried again. A gateway that dies between an answer and its record sends again: receivers
//! tell by `webhook-id`, which stays the same.
//!
//! | concept | module |
//! | --- | --- |
//! | where a webhook may go | `target` |
//! | what it is signed with | `signature` |
//! | one attempt | `post` |
//! | when to try again | `retry` |
//! | endpoints, secrets, deliveries as they are stored | `store`, `dispatch` |
//! | the worker | `worker` |
//! | the admin API | `rest` |

mod dispatch;
mod post;
pub mod rest;
mod retry;
mod signature;
pub mod store;
mod target;
mod worker;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use signature::Secret;
pub use store::{
    Delivery, DeliveryQuery, DeliveryState, Endpoint, EndpointChange, EndpointDraft, WebhookError,
};
pub use worker::{WebhookStats, Webhooks};

/// The event of a test delivery. Everything else that is sent is a notice of billing.
pub const TEST_EVENT: &str = "webhook.test";

/// What an operator can set of webhooks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WebhookSettings {
    /// Lets endpoints be on loopback, private and link-local addresses: for receivers in one's own network, where everyone
    /// who holds an admin key may reach it.
    pub allow_private_addresses: bool,
    /// Lets endpoints be `http://`: for receivers behind a proxy of one's own.
    pub allow_http: bool,
    /// PEM file of certificate authorities to trust beside the system's.
    pub ca_file: Option<PathBuf>,
    /// Time for a whole attempt, from resolving the name to the end of the answer.
    pub timeout_ms: u64,
    /// Of an answer, this much is read.
    pub response_bytes_max: usize,
    /// Addresses of one host that an attempt tries.
    pub addresses_max: usize,
    /// The pauses before the second attempt, the third, and so on. After the last, the delivery is dead.
    pub retry_delays_ms: Vec<u64>,
    /// Up to this part of a pause is added to it at random.
    pub retry_jitter_percent: u64,
    /// The longest `retry-after` of a receiver that is honoured.
    pub retry_after_ms_max: u64,
    /// How often the database is asked for new notices and deliveries that are due.
    pub poll_interval_ms: u64,
    pub endpoints_per_org_max: usize,
    /// Endpoints that one gateway delivers to at the same time.
    pub endpoints_in_flight_max: usize,
    /// How much longer than an attempt a gateway keeps an endpoint: for what comes before and after, and for clocks that
    /// differ. After that, others take over from a gateway that died.
    pub lease_margin_ms: u64,
    /// How long a secret stays valid after its successor was made.
    pub rotation_overlap_ms: u64,
    /// How long delivered and dead deliveries are kept.
    pub retention_days: u64,
}

impl Default for WebhookSettings {
    fn default() -> Self {
        const MINUTE_MS: u64 = 60_000;
        const HOUR_MS: u64 = 60 * MINUTE_MS;
        WebhookSettings {
            allow_private_addresses: false,
            allow_http: false,
            ca_file: None,
            timeout_ms: 15_000,
            response_bytes_max: 64 * 1024,
            addresses_max: 4,
            // The schedule that Standard Webhooks recommends: ten attempts in a little over three days.
            retry_delays_ms: vec![
                5_000,
                5 * MINUTE_MS,
                30 * MINUTE_MS,
                2 * HOUR_MS,
                5 * HOUR_MS,
                10 * HOUR_MS,
                14 * HOUR_MS,
                20 * HOUR_MS,
                24 * HOUR_MS,
            ],
            retry_jitter_percent: 20,
            retry_after_ms_max: 24 * HOUR_MS,
            poll_interval_ms: 1_000,
            endpoints_per_org_max: 16,
            endpoints_in_flight_max: 64,
            lease_margin_ms: 30_000,
            rotation_overlap_ms: 24 * HOUR_MS,
            retention_days: 90,
        }
    }
}
