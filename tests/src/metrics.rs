//! `/metrics`, as Prometheus would read it.

use std::collections::BTreeMap;

/// One scrape: every sample, by name, summed over labels.
#[derive(Debug, Clone)]
pub struct Metrics {
    sums: BTreeMap<String, f64>,
}

/// Names the tests rely on. They are the operator's contract too: dashboards and alerts use the same.
const HOLDS_OPEN: &str = "sluice_holds_open";
const OUTBOX_BACKLOG: &str = "sluice_outbox_backlog_events";
const NODE_PROMPT_TOKENS: &str = "sluice_node_prompt_tokens_total";
const NODE_CACHED_TOKENS: &str = "sluice_node_cached_tokens_total";
const WASTED_TOKENS: &str = "sluice_wasted_tokens_total";
const NODE_OUTPUT_TOKENS: &str = "sluice_node_output_tokens_total";

impl Metrics {
    /// Parses the text format, and panics on a line that is not of it.
    pub fn parse(text: &str) -> Metrics {
        let mut metrics = Metrics { sums: BTreeMap::new() };
        for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("no sample: {line}"));
            let value: f64 = value.parse().unwrap_or_else(|_| panic!("no number: {line}"));
            let name = series.split('{').next().expect("split has a first part");
            *metrics.sums.entry(name.to_owned()).or_default() += value;
        }
        metrics
    }

    /// The sum of a metric over its labels.
    pub fn sum(&self, name: &str) -> f64 {
        let names = || self.sums.keys().map(String::as_str).collect::<Vec<_>>().join("\n  ");
        *self.sums.get(name).unwrap_or_else(|| panic!("/metrics has no {name}; it has\n  {}", names()))
    }

    /// The same of a metric that is not there before its first event.
    pub fn sum_or_zero(&self, name: &str) -> f64 {
        self.sums.get(name).copied().unwrap_or_default()
    }

    /// Tokens that the engine computed and nobody pays for, prompt and output.
    pub fn wasted_tokens(&self) -> u64 {
        self.sum_or_zero(WASTED_TOKENS) as u64
    }

    /// Requests admitted and not yet settled, voided or expired.
    pub fn holds_open(&self) -> u64 {
        self.sum(HOLDS_OPEN) as u64
    }

    /// Usage events that are durable here and not yet in the ledger.
    pub fn outbox_backlog(&self) -> u64 {
        self.sum(OUTBOX_BACKLOG) as u64
    }

    /// The node's odometer, every class of it.
    pub fn node_tokens(&self) -> u64 {
        self.node_prompt_tokens() + self.node_cached_tokens() + self.node_output_tokens()
    }

    /// The node's odometer: prompt tokens computed since it started.
    pub fn node_prompt_tokens(&self) -> u64 {
        self.sum(NODE_PROMPT_TOKENS) as u64
    }

    /// The node's odometer: prompt tokens that its cache restored since it started.
    pub fn node_cached_tokens(&self) -> u64 {
        self.sum(NODE_CACHED_TOKENS) as u64
    }

    /// The node's odometer: tokens sampled since it started.
    pub fn node_output_tokens(&self) -> u64 {
        self.sum(NODE_OUTPUT_TOKENS) as u64
    }
}
