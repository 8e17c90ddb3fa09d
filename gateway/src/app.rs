//! What a running gateway consists of, and its limits.

use serde::{Deserialize, Serialize};
use sluice_billing::Billing;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{auth::Auth, metrics::Metrics, receipts::Receipts, route::Nodes, webhooks::Webhooks};

/// The parts every request passes. One for the life of the process, behind an `Arc`.
pub struct App {
    pub auth: Auth,
    pub billing: Billing,
    pub receipts: Receipts,
    pub nodes: Nodes,
    pub limits: Limits,
    /// What PDFs are written with, where the built-in font has not all characters.
    pub invoice_font: Option<Vec<u8>>,
    pub metrics: Metrics,
    pub webhooks: Webhooks,
    /// Every relay: when it is empty, every hold is settled.
    pub tracker: TaskTracker,
    /// No new requests; those in flight finish.
    pub draining: CancellationToken,
    /// Requests in flight end now; what they used is settled.
    pub cut: CancellationToken,
}

/// Bounds on what requests may take.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Limits {
    /// A larger request body is refused with 413.
    pub body_bytes_max: usize,
    /// Of a body that is too large, this much is read and thrown away, so that its sender sees the answer.
    pub body_discard_bytes_max: usize,
    /// Time for a request body to arrive.
    pub body_read_timeout_ms: u64,
    /// Requests in flight, streams included; more are refused with 503.
    pub requests_in_flight_max: usize,
    /// Nodes that one request may be tried on, as long as none has answered.
    pub attempts_max: usize,
    /// Events of one stream that may wait for its client to read them.
    pub events_buffered_max: usize,
    /// Tokens a node may generate ahead of what the client was handed.
    pub grant_window_tokens: u64,
    /// Tokens by which a hold grows, each time before it runs out.
    pub hold_step_tokens: u64,
    /// A client that takes no event for this long is cut off.
    pub client_idle_ms_max: u64,
    /// A node that says nothing for this long has failed; long prompts and full queues count as silence.
    pub node_silence_ms_max: u64,
    /// How long a cancelled node may take to say what it used. After that, the last it said counts.
    pub cancel_wait_ms_max: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            body_bytes_max: 4 << 20,
            body_discard_bytes_max: 64 << 20,
            body_read_timeout_ms: 30_000,
            requests_in_flight_max: 4_096,
            attempts_max: 2,
            events_buffered_max: 16,
            grant_window_tokens: 64,
            hold_step_tokens: 256,
            client_idle_ms_max: 60_000,
            node_silence_ms_max: 600_000,
            cancel_wait_ms_max: 5_000,
        }
    }
}
