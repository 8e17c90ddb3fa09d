//! The worker: asks the database for what is due, and delivers it, one endpoint at a time for each endpoint.
//!
//! It runs in every gateway. An endpoint is taken by a conditional update with a lease, longer than an attempt may last;
//! whoever holds it delivers until nothing is due, then lets go.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use sluice_billing::{Database, args};
use sqlx::FromRow;
use tokio::{sync::Notify, task::JoinSet};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{
    WebhookSettings, dispatch,
    post::{Answer, Message, PostError, Poster},
    retry,
    signature::sign,
    store::{self, WebhookError, as_stored, now_ms},
    target::Target,
};

const PRUNE_EVERY_MS: i64 = 3_600_000;
const ERROR_BYTES_MAX: usize = 500;
/// A receiver's "never again".
const GONE: u16 = 410;

/// Counters of this gateway and, as of its last look, the queue of the platform. For `/metrics`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WebhookStats {
    pub delivered: u64,
    /// Attempts that failed, the last ones among them.
    pub failed: u64,
    /// Deliveries given up on.
    pub dead: u64,
    /// Deliveries that wait, of endpoints that are switched on.
    pub pending: u64,
    /// How long the oldest of them has waited.
    pub oldest_age_ms: u64,
}

#[derive(Default)]
struct Counters {
    delivered: AtomicU64,
    failed: AtomicU64,
    dead: AtomicU64,
    pending: AtomicU64,
    oldest_age_ms: AtomicU64,
}

/// Webhooks of one gateway. Cheap to clone; all clones are one.
#[derive(Clone)]
pub struct Webhooks {
    shared: Arc<Shared>,
}

struct Shared {
    database: Database,
    settings: Arc<WebhookSettings>,
    poster: Poster,
    /// This process, as the holder of leases.
    holder: String,
    wake: Notify,
    counters: Counters,
}

#[derive(FromRow)]
struct Due {
    id: String,
    event_id: String,
    body: String,
    attempts: i64,
    url: String,
}

/// What became of an attempt.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Delivered,
    /// Again at this moment.
    Again {
        at_ms: i64,
    },
    Dead {
        switch_off: bool,
    },
}

impl Webhooks {
    /// Checks the settings; sends nothing yet.
    pub fn new(database: Database, settings: WebhookSettings) -> anyhow::Result<Webhooks> {
        anyhow::ensure!(settings.timeout_ms > 0, "webhooks.timeout_ms must be over 0");
        anyhow::ensure!(settings.poll_interval_ms > 0, "webhooks.poll_interval_ms must be over 0");
        anyhow::ensure!(settings.addresses_max > 0, "webhooks.addresses_max must be over 0");
        anyhow::ensure!(
            settings.endpoints_in_flight_max > 0,
            "webhooks.endpoints_in_flight_max must be over 0"
        );
        let settings = Arc::new(settings);
        let poster = Poster::new(settings.clone())?;
        let (wake, counters) = (Notify::new(), Counters::default());
        let holder = Uuid::now_v7().to_string();
        Ok(Webhooks { shared: Arc::new(Shared { database, settings, poster, holder, wake, counters }) })
    }

    pub fn database(&self) -> &Database {
        &self.shared.database
    }

    pub fn settings(&self) -> &WebhookSettings {
        &self.shared.settings
    }

    /// Looks now for what is due, rather than at the next interval.
    pub fn wake(&self) {
        self.shared.wake.notify_one();
    }

    pub fn stats(&self) -> WebhookStats {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.shared.counters;
        WebhookStats {
            delivered: of(&counters.delivered),
            failed: of(&counters.failed),
            dead: of(&counters.dead),
            pending: of(&counters.pending),
            oldest_age_ms: of(&counters.oldest_age_ms),
        }
    }

    /// Delivers until `stop`, then ends with the attempts that run.
    ///
    /// # Cancel safety
    /// Dropped, attempts that run are cut off and made again by whoever takes their endpoint next.
    pub async fn run(self, stop: CancellationToken) {
        let shared = self.shared;
        let interval = Duration::from_millis(shared.settings.poll_interval_ms);
        let mut draining: JoinSet<String> = JoinSet::new();
        let mut held: HashSet<String> = HashSet::new();
        let mut healthy = true;
        let mut prune_at_ms = now_ms();
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                () = shared.wake.notified() => {}
                () = tokio::time::sleep(interval) => {}
                Some(ended) = draining.join_next() => {
                    forget(&mut held, ended);
                    continue;
                }
            }
            while let Some(ended) = draining.try_join_next() {
                forget(&mut held, ended);
            }
            let turn = shared.turn(&mut prune_at_ms).await;
            match &turn {
                Err(error) if healthy => {
                    let error = error as &dyn std::error::Error;
                    tracing::warn!(error, "webhooks wait: the database does not answer");
                }
                Ok(_) if !healthy => tracing::info!("webhooks go on"),
                _ => {}
            }
            healthy = turn.is_ok();
            for endpoint in turn.unwrap_or_default() {
                let room = held.len() < shared.settings.endpoints_in_flight_max;
                if room && held.insert(endpoint.clone()) {
                    draining.spawn(drain(shared.clone(), endpoint, stop.clone()));
                }
            }
        }
        while draining.join_next().await.is_some() {}
    }
}

fn forget(held: &mut HashSet<String>, ended: Result<String, tokio::task::JoinError>) {
    match ended {
        Ok(endpoint) => drop(held.remove(&endpoint)),
        // Its lease lapses; the set is only for this process.
        Err(error) => {
            tracing::error!(%error, "a webhook task failed");
            held.clear();
        }
    }
}

/// Delivers what is due to one endpoint, in its order, and returns its id.
async fn drain(shared: Arc<Shared>, endpoint: String, stop: CancellationToken) -> String {
    if let Err(error) = shared.deliver_all(&endpoint, &stop).await {
        let error = &error as &dyn std::error::Error;
        tracing::warn!(error, endpoint, "a webhook's outcome is not recorded; it is sent again");
    }
    endpoint
}

impl Shared {
    /// Dispatches new notices, measures the queue, and returns the endpoints that something is due for.
    async fn turn(&self, prune_at_ms: &mut i64) -> Result<Vec<String>, WebhookError> {
        let now_ms = now_ms();
        dispatch::run(&self.database, now_ms).await?;
        if now_ms >= *prune_at_ms {
            dispatch::prune(&self.database, &self.settings, now_ms).await?;
            *prune_at_ms = now_ms + PRUNE_EVERY_MS;
        }
        self.measure(now_ms).await?;
        let due: Vec<(String,)> = self
            .database
            .read()
            .await?
            .fetch_all(
                "SELECT DISTINCT d.endpoint_id FROM webhook_deliveries d \
                 JOIN webhook_endpoints e ON e.id = d.endpoint_id \
                 WHERE d.state = 'pending' AND d.next_attempt_at_ms <= $1 AND e.enabled = 1 \
                 AND (e.holder = $2 OR e.held_until_ms <= $1) LIMIT $3",
                args![now_ms, self.holder.as_str(), as_stored(self.settings.endpoints_in_flight_max as u64)],
            )
            .await?;
        Ok(due.into_iter().map(|(endpoint,)| endpoint).collect())
    }

    async fn measure(&self, now_ms: i64) -> Result<(), WebhookError> {
        let (pending, oldest): (i64, Option<i64>) = self
            .database
            .read()
            .await?
            .fetch_one(
                "SELECT count(*), min(d.created_at_ms) FROM webhook_deliveries d \
                 JOIN webhook_endpoints e ON e.id = d.endpoint_id WHERE d.state = 'pending' AND e.enabled = 1",
                args![],
            )
            .await?;
        let age_ms = oldest.map_or(0, |created_at_ms| now_ms.saturating_sub(created_at_ms).max(0));
        self.counters.pending.store(pending.unsigned_abs(), Ordering::Relaxed);
        self.counters.oldest_age_ms.store(age_ms.unsigned_abs(), Ordering::Relaxed);
        Ok(())
    }

    async fn deliver_all(&self, endpoint: &str, stop: &CancellationToken) -> Result<(), WebhookError> {
        // The lease is taken anew before each attempt, so that it covers the whole of it.
        while !stop.is_cancelled() && self.hold(endpoint).await? {
            let Some(due) = self.next_due(endpoint).await? else { break };
            self.deliver(endpoint, &due).await?;
        }
        self.let_go(endpoint).await
    }

    /// False: another gateway has it, or it is switched off or gone.
    async fn hold(&self, endpoint: &str) -> Result<bool, WebhookError> {
        let now_ms = now_ms();
        let until_ms = now_ms.saturating_add(as_stored(
            self.settings.timeout_ms.saturating_add(self.settings.lease_margin_ms),
        ));
        let held = self
            .database
            .read()
            .await?
            .execute(
                "UPDATE webhook_endpoints SET holder = $1, held_until_ms = $2 \
                 WHERE id = $3 AND enabled = 1 AND (holder = $1 OR held_until_ms <= $4)",
                args![self.holder.as_str(), until_ms, endpoint, now_ms],
            )
            .await?;
        Ok(held == 1)
    }

    async fn let_go(&self, endpoint: &str) -> Result<(), WebhookError> {
        self.database
            .read()
            .await?
            .execute(
                "UPDATE webhook_endpoints SET holder = '', held_until_ms = 0 WHERE id = $1 AND holder = $2",
                args![endpoint, self.holder.as_str()],
            )
            .await?;
        Ok(())
    }

    async fn next_due(&self, endpoint: &str) -> Result<Option<Due>, WebhookError> {
        let due = self
            .database
            .read()
            .await?
            .fetch_optional(
                "SELECT d.id, d.event_id, d.body, d.attempts, e.url FROM webhook_deliveries d \
                 JOIN webhook_endpoints e ON e.id = d.endpoint_id \
                 WHERE d.endpoint_id = $1 AND d.state = 'pending' AND d.next_attempt_at_ms <= $2 \
                 ORDER BY d.id LIMIT 1",
                args![endpoint, now_ms()],
            )
            .await?;
        Ok(due)
    }

    async fn deliver(&self, endpoint: &str, due: &Due) -> Result<(), WebhookError> {
        let outcome = self.attempt(endpoint, due).await?;
        let attempts = due.attempts.saturating_add(1);
        let verdict = verdict(&self.settings, &outcome, attempts, now_ms(), retry::draw());
        let (status, why) = match &outcome {
            Ok(answer) => (Some(i64::from(answer.status)), failure_of(answer)),
            Err(failure) => (None, Some(failure.clone())),
        };
        tracing::debug!(endpoint, event = due.event_id, attempts, status, why, ?verdict, "webhook attempted");
        self.record(endpoint, due, &verdict, (status, why.as_deref())).await?;
        let count = |counter: &AtomicU64| counter.fetch_add(1, Ordering::Relaxed);
        match verdict {
            Verdict::Delivered => drop(count(&self.counters.delivered)),
            Verdict::Again { .. } => drop(count(&self.counters.failed)),
            Verdict::Dead { switch_off } => {
                count(&self.counters.failed);
                count(&self.counters.dead);
                tracing::warn!(
                    endpoint,
                    event = due.event_id,
                    attempts,
                    switch_off,
                    "a webhook was given up on"
                );
            }
        }
        Ok(())
    }

    /// The answer, or in words why there is none. Of the outer error the attempt was not made.
    async fn attempt(&self, endpoint: &str, due: &Due) -> Result<Result<Answer, String>, WebhookError> {
        // What the operator permits may have changed since the endpoint was made.
        let target = match Target::parse(&due.url, &self.settings) {
            Ok(target) => target,
            Err(fault) => return Ok(Err(format!("refused: the URL {fault}"))),
        };
        let secrets = store::secrets(&mut self.database.read().await?, endpoint, now_ms()).await?;
        let timestamp_s = now_ms() / 1000;
        let signature = sign(&secrets, &due.event_id, timestamp_s, &due.body);
        let message = Message { id: due.event_id.clone(), timestamp_s, signature, body: due.body.clone() };
        Ok(self.poster.post(&target, &message).await.map_err(|error| in_words(&error)))
    }

    async fn record(
        &self,
        endpoint: &str,
        due: &Due,
        verdict: &Verdict,
        (status, why): (Option<i64>, Option<&str>),
    ) -> Result<(), WebhookError> {
        let now_ms = now_ms();
        let (state, next_ms, finished_at_ms) = match verdict {
            Verdict::Delivered => ("delivered", now_ms, Some(now_ms)),
            Verdict::Again { at_ms } => ("pending", *at_ms, None),
            Verdict::Dead { .. } => ("dead", now_ms, Some(now_ms)),
        };
        let mut tx = self.database.write().await?;
        // A replay meanwhile counts from 0 again, and is not undone here.
        tx.execute(
            "UPDATE webhook_deliveries SET state = $1, attempts = attempts + 1, next_attempt_at_ms = $2, \
             finished_at_ms = $3, last_status = $4, last_error = $5 \
             WHERE id = $6 AND state = 'pending' AND attempts = $7",
            args![state, next_ms, finished_at_ms, status, why, due.id.as_str(), due.attempts],
        )
        .await?;
        if let Verdict::Dead { switch_off: true } = verdict {
            tx.execute(
                "UPDATE webhook_endpoints SET enabled = 0, disabled_reason = $1 WHERE id = $2 AND url = $3",
                args!["the receiver answered 410 Gone", endpoint, due.url.as_str()],
            )
            .await?;
        }
        Ok(tx.commit().await?)
    }
}

/// What follows from an attempt, the `attempts`-th of its delivery.
fn verdict(
    settings: &WebhookSettings,
    outcome: &Result<Answer, String>,
    attempts: i64,
    now_ms: i64,
    draw: u64,
) -> Verdict {
    let asked = match outcome {
        Ok(Answer { status: 200..=299, .. }) => return Verdict::Delivered,
        Ok(Answer { status: GONE, .. }) => return Verdict::Dead { switch_off: true },
        Ok(answer) => answer.retry_after,
        Err(_) => None,
    };
    match retry::pause(settings, attempts.unsigned_abs(), asked, draw) {
        Some(pause) => Verdict::Again { at_ms: now_ms.saturating_add(as_stored(pause.as_millis() as u64)) },
        None => Verdict::Dead { switch_off: false },
    }
}

fn failure_of(answer: &Answer) -> Option<String> {
    match answer.status {
        200..=299 => None,
        300..=399 => Some(format!("the receiver answered {}: redirects are not followed", answer.status)),
        status => Some(format!("the receiver answered {status}")),
    }
}

/// With its causes, for the endpoint's owner, who has no log to look into.
fn in_words(error: &PostError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text.chars().filter(|character| !character.is_control()).take(ERROR_BYTES_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(status: Option<u16>, attempts: i64, expect: Verdict) {
        let settings = WebhookSettings {
            retry_delays_ms: vec![1000, 2000],
            retry_jitter_percent: 0,
            ..WebhookSettings::default()
        };
        let outcome = match status {
            Some(429) => Ok(Answer { status: 429, retry_after: Some(Duration::from_secs(7)) }),
            Some(status) => Ok(Answer { status, retry_after: None }),
            None => Err("no answer".to_owned()),
        };
        assert_eq!(verdict(&settings, &outcome, attempts, 10, 0), expect, "{status:?} at {attempts}");
    }

    #[test]
    fn an_answer_decides_what_follows() {
        check(Some(200), 1, Verdict::Delivered);
        check(Some(204), 3, Verdict::Delivered);
        check(Some(500), 1, Verdict::Again { at_ms: 1010 });
        check(Some(302), 2, Verdict::Again { at_ms: 2010 });
        check(Some(429), 1, Verdict::Again { at_ms: 7010 });
        check(None, 1, Verdict::Again { at_ms: 1010 });
        check(None, 3, Verdict::Dead { switch_off: false });
        check(Some(410), 1, Verdict::Dead { switch_off: true });
    }
}
