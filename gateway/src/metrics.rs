//! What the gateway measures, as OpenTelemetry instruments, read by Prometheus at `/metrics`.
//!
//! | metric | labels |
//! | --- | --- |
//! | `sluice_requests_total` | route, method, status |
//! | `sluice_requests_in_flight` | |
//! | `sluice_completions_total` | model, outcome: `finished`, `cancelled` or an error's code |
//! | `sluice_time_to_first_token_seconds`, `sluice_time_between_tokens_seconds` | model |
//! | `sluice_tokens_total` | model, class: input, cached_input, output |
//! | `sluice_holds_open`, `sluice_holds_total` | outcome |
//! | `sluice_outbox_backlog_events`, `sluice_outbox_oldest_age_seconds` | |
//! | `sluice_outbox_commits_total`, `sluice_outbox_commit_seconds_total` | |
//! | `sluice_webhook_{delivered,failed,dead}_total` | |
//! | `sluice_webhook_deliveries_pending`, `sluice_webhook_oldest_age_seconds` | |
//! | `sluice_node_up`, `sluice_node_sequences`, `sluice_node_{prompt,cached,output}_tokens_total` | node |
//! | `sluice_node_cache_{hits,misses,evictions}_total` | node |

use std::{sync::Arc, time::Duration};

use opentelemetry::{
    KeyValue,
    metrics::{Counter, Histogram, Meter, MeterProvider},
};
use opentelemetry_sdk::metrics::SdkMeterProvider;
use prometheus::{Registry, TextEncoder};
use sluice_billing::{Billing, BillingStats};
use tokio::sync::Semaphore;

use sluice_proto::node::v1::Usage as Counted;

use crate::{
    complete::Usage,
    node_client::Seen,
    route::Nodes,
    webhooks::{WebhookStats, Webhooks},
};

/// Seconds; from a cached prompt on a fast node to a long one in a queue.
const FIRST_TOKEN_BUCKETS_S: [f64; 14] =
    [0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0, 120.0];
const BETWEEN_TOKENS_BUCKETS_S: [f64; 13] =
    [0.001, 0.0025, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 5.0];

/// The instruments and the registry they are read from.
pub struct Metrics {
    registry: Registry,
    meter: Meter,
    requests: Counter<u64>,
    completions: Counter<u64>,
    tokens: Counter<u64>,
    wasted: Counter<u64>,
    time_to_first_token: Histogram<f64>,
    time_between_tokens: Histogram<f64>,
    /// Owns the reader; without it nothing is collected.
    _provider: SdkMeterProvider,
}

impl Default for Metrics {
    fn default() -> Self {
        Metrics::new()
    }
}

/// Takes one number out of what the webhook worker counts.
type ReadQueue = fn(WebhookStats) -> u64;

/// Takes one number out of what a node last said.
type ReadLoad = fn(&Seen) -> u64;

impl Metrics {
    pub fn new() -> Metrics {
        let registry = Registry::new();
        let exporter = opentelemetry_prometheus::exporter()
            .with_registry(registry.clone())
            .without_target_info()
            .scope_info_enabled(false)
            .build()
            .expect("a new registry takes the exporter");
        let provider = SdkMeterProvider::builder().with_reader(exporter).build();
        let meter = provider.meter("sluice");
        Metrics {
            requests: meter.u64_counter("sluice_requests").with_description("Requests answered").build(),
            completions: meter
                .u64_counter("sluice_completions")
                .with_description("Completions ended")
                .build(),
            tokens: meter.u64_counter("sluice_tokens").with_description("Tokens billed").build(),
            wasted: meter
                .u64_counter("sluice_wasted_tokens")
                .with_description("Tokens computed that nobody is billed for: whole answers that failed")
                .build(),
            time_to_first_token: meter
                .f64_histogram("sluice_time_to_first_token_seconds")
                .with_description("From receiving a request to its first token")
                .with_boundaries(FIRST_TOKEN_BUCKETS_S.to_vec())
                .build(),
            time_between_tokens: meter
                .f64_histogram("sluice_time_between_tokens_seconds")
                .with_description("Between two frames of one stream")
                .with_boundaries(BETWEEN_TOKENS_BUCKETS_S.to_vec())
                .build(),
            registry,
            meter,
            _provider: provider,
        }
    }

    pub fn request(&self, route: &str, method: &str, status: String) {
        let labels = [
            KeyValue::new("route", route.to_owned()),
            KeyValue::new("method", method.to_owned()),
            KeyValue::new("status", status),
        ];
        self.requests.add(1, &labels);
    }

    pub fn completed(&self, model: &str, outcome: &'static str) {
        self.completions.add(1, &[of_model(model), KeyValue::new("outcome", outcome)]);
    }

    pub fn time_to_first_token(&self, model: &str, elapsed: Duration) {
        self.time_to_first_token.record(elapsed.as_secs_f64(), &[of_model(model)]);
    }

    pub fn time_between_tokens(&self, model: &str, elapsed: Duration) {
        self.time_between_tokens.record(elapsed.as_secs_f64(), &[of_model(model)]);
    }

    pub fn tokens(&self, model: &str, usage: &Usage) {
        let classes = [
            ("input", usage.prompt_tokens - usage.cached_prompt_tokens),
            ("cached_input", usage.cached_prompt_tokens),
            ("output", usage.completion_tokens),
        ];
        for (class, count) in classes {
            self.tokens.add(count, &[of_model(model), KeyValue::new("class", class)]);
        }
    }

    /// Tokens that a node computed and nobody pays for.
    pub fn wasted(&self, model: &str, counted: &Counted) {
        let classes = [
            ("input", counted.input_tokens),
            ("cached_input", counted.cached_input_tokens),
            ("output", counted.output_tokens),
        ];
        for (class, count) in classes.into_iter().filter(|(_, count)| *count > 0) {
            self.wasted.add(count, &[of_model(model), KeyValue::new("class", class)]);
        }
    }

    /// Everything, in the text format of Prometheus.
    pub fn render(&self) -> Result<String, prometheus::Error> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }

    /// Reads these parts whenever the metrics are read.
    pub fn observe(&self, billing: &Billing, nodes: &Nodes, permits: &Arc<Semaphore>, permits_max: usize) {
        let permits = permits.clone();
        self.meter
            .u64_observable_gauge("sluice_requests_in_flight")
            .with_description("Requests being answered, streams included")
            .with_callback(move |gauge| {
                gauge.observe((permits_max - permits.available_permits()) as u64, &[])
            })
            .build();
        self.observe_billing(billing);
        self.observe_nodes(nodes);
    }

    fn observe_billing(&self, billing: &Billing) {
        self.billing_gauge(billing, "sluice_holds_open", "Requests whose money is held", |s| s.holds_open);
        self.billing_gauge(billing, "sluice_outbox_backlog_events", "Bills not yet in the ledger", |s| {
            s.outbox_backlog
        });
        let stats = billing.clone();
        self.meter
            .f64_observable_gauge("sluice_outbox_oldest_age_seconds")
            .with_description("How long the oldest bill waits for the ledger")
            .with_callback(move |gauge| gauge.observe(stats.stats().outbox_oldest_age_ms as f64 / 1e3, &[]))
            .build();
        let stats = billing.clone();
        self.meter
            .u64_observable_counter("sluice_holds")
            .with_description("Holds by how they ended, and requests refused one")
            .with_callback(move |counter| {
                let stats = stats.stats();
                for (outcome, count) in [
                    ("settled", stats.settled),
                    ("voided", stats.voided),
                    ("expired", stats.expired),
                    ("stranded", stats.stranded),
                    ("refused_credit", stats.refused_credit),
                    ("refused_outbox_full", stats.refused_outbox_full),
                ] {
                    counter.observe(count, &[KeyValue::new("outcome", outcome)]);
                }
            })
            .build();
        let stats = billing.clone();
        self.meter
            .u64_observable_counter("sluice_outbox_commits")
            .with_description("Commits of the outbox, each with one fsync")
            .with_callback(move |counter| counter.observe(stats.stats().outbox_commits, &[]))
            .build();
        let stats = billing.clone();
        self.meter
            .f64_observable_counter("sluice_outbox_commit_seconds")
            .with_description("Time spent in commits of the outbox")
            .with_callback(move |counter| {
                counter.observe(stats.stats().outbox_commit_us_total as f64 / 1e6, &[])
            })
            .build();
    }

    fn billing_gauge(
        &self,
        billing: &Billing,
        name: &'static str,
        description: &'static str,
        read: fn(BillingStats) -> u64,
    ) {
        let billing = billing.clone();
        self.meter
            .u64_observable_gauge(name)
            .with_description(description)
            .with_callback(move |gauge| gauge.observe(read(billing.stats()), &[]))
            .build();
    }

    pub fn observe_webhooks(&self, webhooks: &Webhooks) {
        let counters: [(&'static str, &'static str, ReadQueue); 3] = [
            ("sluice_webhook_delivered", "Deliveries that a receiver took", |stats| stats.delivered),
            ("sluice_webhook_failed", "Attempts that failed", |stats| stats.failed),
            ("sluice_webhook_dead", "Deliveries given up on", |stats| stats.dead),
        ];
        for (name, description, read) in counters {
            let webhooks = webhooks.clone();
            self.meter
                .u64_observable_counter(name)
                .with_description(description)
                .with_callback(move |counter| counter.observe(read(webhooks.stats()), &[]))
                .build();
        }
        let queue = webhooks.clone();
        self.meter
            .u64_observable_gauge("sluice_webhook_deliveries_pending")
            .with_description("Deliveries of the platform that wait for their next attempt")
            .with_callback(move |gauge| gauge.observe(queue.stats().pending, &[]))
            .build();
        let queue = webhooks.clone();
        self.meter
            .f64_observable_gauge("sluice_webhook_oldest_age_seconds")
            .with_description("How long the oldest of them has waited")
            .with_callback(move |gauge| gauge.observe(queue.stats().oldest_age_ms as f64 / 1e3, &[]))
            .build();
    }

    fn observe_nodes(&self, nodes: &Nodes) {
        let all = nodes.clone();
        self.meter
            .u64_observable_gauge("sluice_node_up")
            .with_description("1: the node answers and takes requests")
            .with_callback(move |gauge| {
                for node in all.nodes() {
                    gauge.observe(node.seen().takes_requests().into(), &[of_node(node.name())]);
                }
            })
            .build();
        let all = nodes.clone();
        self.meter
            .u64_observable_gauge("sluice_node_sequences")
            .with_description("Sequences on the node, by state")
            .with_callback(move |gauge| {
                for node in all.nodes() {
                    let load = node.seen().load;
                    let states = [("running", load.sequences_running), ("waiting", load.sequences_waiting)];
                    for (state, count) in states {
                        gauge.observe(count.into(), &[of_node(node.name()), KeyValue::new("state", state)]);
                    }
                }
            })
            .build();
        let odometer: [(&'static str, &'static str, ReadLoad); 6] = [
            ("sluice_node_prompt_tokens", "Prompt tokens computed", |seen| seen.load.prompt_tokens_total),
            ("sluice_node_cached_tokens", "Prompt tokens restored", |seen| seen.load.cached_tokens_total),
            ("sluice_node_output_tokens", "Tokens sampled", |seen| seen.load.output_tokens_total),
            ("sluice_node_cache_hits", "Sequences that started from a checkpoint", |seen| {
                seen.load.cache_hits_total
            }),
            ("sluice_node_cache_misses", "Sequences that did not", |seen| seen.load.cache_misses_total),
            ("sluice_node_cache_evictions", "Checkpoints that left memory", |seen| {
                seen.load.cache_evictions_total
            }),
        ];
        for (name, description, read) in odometer {
            let all = nodes.clone();
            self.meter
                .u64_observable_counter(name)
                .with_description(description)
                .with_callback(move |counter| {
                    for node in all.nodes() {
                        counter.observe(read(&node.seen()), &[of_node(node.name())]);
                    }
                })
                .build();
        }
    }
}

fn of_model(model: &str) -> KeyValue {
    KeyValue::new("model", model.to_owned())
}

fn of_node(node: &str) -> KeyValue {
    KeyValue::new("node", node.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_ones_operators_know() {
        let metrics = Metrics::new();
        metrics.request("/v1/models", "GET", "200".to_owned());
        metrics.completed("m", "finished");
        metrics.time_to_first_token("m", Duration::from_millis(30));
        let usage = Usage { prompt_tokens: 5, cached_prompt_tokens: 2, completion_tokens: 7 };
        metrics.tokens("m", &usage);
        let text = metrics.render().expect("text");
        for line in [
            "sluice_requests_total{method=\"GET\",route=\"/v1/models\",status=\"200\"} 1",
            "sluice_completions_total{model=\"m\",outcome=\"finished\"} 1",
            "sluice_time_to_first_token_seconds_bucket{model=\"m\",le=\"0.05\"} 1",
            "sluice_tokens_total{class=\"input\",model=\"m\"} 3",
            "sluice_tokens_total{class=\"cached_input\",model=\"m\"} 2",
            "sluice_tokens_total{class=\"output\",model=\"m\"} 7",
        ] {
            assert!(text.contains(line), "no {line} in\n{text}");
        }
    }
}
