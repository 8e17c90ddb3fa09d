//! What a client and the engine leave for each other about one sequence.
//!
//! Neither waits for the other. What the client wants is a few registers (the largest grant, "cancelled"), so that no
//! number of messages can fill a queue. What the engine says piles up in one outbox, where text joins text: a slow
//! client finds one long delta instead of many short ones, and a step never waits for it. The grant bounds the pile.

use crate::sampler::TokenLogprobs;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::Notify;

/// Counted by the engine, cumulative. Classes do not overlap.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    pub input_tokens: u64,
    pub cached_input_tokens: u64,
    pub output_tokens: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grant {
    /// Output tokens in total.
    pub output_tokens: u64,
    pub is_final: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    Stop {
        stop_string: Option<String>,
    },
    Length,
    Cancelled,
    GrantExhausted,
    GrantTimeout,
    Deadline,
    /// The constraint cannot be followed any further: the rest of the sentence that its name begins.
    Constraint(&'static str),
    /// Not the client's doing: the sentence is for the log and the status.
    Broken(&'static str),
}

/// A token as it was sampled.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampled {
    pub id: u32,
    pub logprobs: Option<TokenLogprobs>,
}

/// Everything since the last take.
#[derive(Debug, Default, PartialEq)]
pub struct Delivery {
    pub text: String,
    pub ids: Vec<u32>,
    /// One for each id, where they were asked for.
    pub logprobs: Vec<TokenLogprobs>,
    pub usage: Usage,
    pub ending: Option<Ending>,
}

impl Delivery {
    fn take_up(&mut self, sampled: Sampled) {
        self.ids.push(sampled.id);
        self.logprobs.extend(sampled.logprobs);
    }
}

#[derive(Default)]
pub struct Mailbox {
    granted_tokens: AtomicU64,
    grant_is_final: AtomicBool,
    cancelled: AtomicBool,
    outbox: Mutex<Outbox>,
    ready: Notify,
}

#[derive(Default)]
struct Outbox {
    delivery: Delivery,
    fresh: bool,
    ended: bool,
}

impl Mailbox {
    pub fn new(grant: Grant) -> Mailbox {
        let mailbox = Mailbox::default();
        mailbox.raise_grant(grant);
        mailbox
    }

    /// Grants may repeat and overtake each other: the largest counts, and a final one stays final.
    pub fn raise_grant(&self, grant: Grant) {
        self.granted_tokens.fetch_max(grant.output_tokens, Ordering::Relaxed);
        if grant.is_final {
            self.refuse_further_grants();
        }
    }

    /// No grant will come any more: the sequence ends where its grant does.
    pub fn refuse_further_grants(&self) {
        self.grant_is_final.store(true, Ordering::Release);
    }

    pub fn grant(&self) -> Grant {
        // Finality first: whoever sees it must see the tokens it came with.
        let is_final = self.grant_is_final.load(Ordering::Acquire);
        Grant { output_tokens: self.granted_tokens.load(Ordering::Relaxed), is_final }
    }

    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// Waits for news. `None` after the ending was taken.
    ///
    /// # Cancel safety
    /// Dropping the future takes nothing.
    pub async fn take(&self) -> Option<Delivery> {
        loop {
            {
                let mut outbox = self.outbox();
                if outbox.fresh {
                    outbox.fresh = false;
                    return Some(std::mem::take(&mut outbox.delivery));
                }
                if outbox.ended {
                    return None;
                }
            }
            self.ready.notified().await;
        }
    }

    fn outbox(&self) -> std::sync::MutexGuard<'_, Outbox> {
        // Nothing in here is left half-done by a panic.
        self.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The engine's end. Dropped without an ending (the engine died), it says so to the client.
#[must_use]
pub struct Outlet(Arc<Mailbox>);

impl Outlet {
    pub fn new(mailbox: Arc<Mailbox>) -> Outlet {
        Outlet(mailbox)
    }

    pub fn mailbox(&self) -> &Mailbox {
        &self.0
    }

    /// A token was sampled, and `text` became certain with it.
    pub fn token(&self, sampled: Sampled, text: &str, usage: Usage) {
        self.put(|delivery| {
            delivery.take_up(sampled);
            delivery.text.push_str(text);
            delivery.usage = usage;
        });
    }

    /// The end. `last` and `text` leave together: text that is sent is always a function of the ids sent.
    pub fn end(self, last: Option<Sampled>, text: &str, usage: Usage, ending: Ending) {
        self.put(|delivery| {
            last.into_iter().for_each(|sampled| delivery.take_up(sampled));
            delivery.text.push_str(text);
            delivery.usage = usage;
            delivery.ending = Some(ending);
        });
    }

    /// Nothing follows an ending.
    fn put(&self, write: impl FnOnce(&mut Delivery)) {
        let mut outbox = self.0.outbox();
        if !outbox.ended {
            write(&mut outbox.delivery);
            outbox.fresh = true;
            outbox.ended = outbox.delivery.ending.is_some();
        }
        drop(outbox);
        self.0.ready.notify_one();
    }
}

impl Drop for Outlet {
    fn drop(&mut self) {
        self.put(|delivery| delivery.ending = Some(Ending::Broken("the engine stopped")));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NO_GRANT: Grant = Grant { output_tokens: 0, is_final: false };

    fn plain(id: u32) -> Sampled {
        Sampled { id, logprobs: None }
    }

    fn usage(output_tokens: u64) -> Usage {
        Usage { input_tokens: 3, cached_input_tokens: 0, output_tokens }
    }

    #[tokio::test]
    async fn a_slow_reader_finds_one_long_delivery() {
        let mailbox = Arc::new(Mailbox::new(NO_GRANT));
        let outlet = Outlet::new(mailbox.clone());
        outlet.token(plain(7), "a", usage(1));
        outlet.token(plain(8), "b", usage(2));
        let expect = Delivery { text: "ab".into(), ids: vec![7, 8], usage: usage(2), ..Delivery::default() };
        assert_eq!(mailbox.take().await, Some(expect));
        outlet.token(plain(9), "", usage(3));
        outlet.end(Some(plain(10)), "c", usage(4), Ending::Length);
        let expect = Delivery {
            text: "c".into(),
            ids: vec![9, 10],
            usage: usage(4),
            ending: Some(Ending::Length),
            ..Delivery::default()
        };
        assert_eq!(mailbox.take().await, Some(expect));
        assert_eq!(mailbox.take().await, None);
    }

    #[tokio::test]
    async fn an_engine_that_dies_tells_its_clients() {
        let mailbox = Arc::new(Mailbox::new(NO_GRANT));
        drop(Outlet::new(mailbox.clone()));
        let delivery = mailbox.take().await.expect("an ending");
        assert!(matches!(delivery.ending, Some(Ending::Broken(_))));
    }

    #[test]
    fn the_largest_grant_counts_and_final_stays_final() {
        let mailbox = Mailbox::new(Grant { output_tokens: 5, is_final: false });
        mailbox.raise_grant(Grant { output_tokens: 9, is_final: true });
        mailbox.raise_grant(Grant { output_tokens: 7, is_final: false });
        assert_eq!(mailbox.grant(), Grant { output_tokens: 9, is_final: true });
    }
}
