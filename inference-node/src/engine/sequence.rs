//! One sequence inside the engine: its tokens, where it may end, and what of its text is out.

use super::Submission;
use super::caching::Prefix;
use super::mailbox::{Ending, Outlet, Usage};
use crate::detokenizer::Detokenizer;
use crate::sampler::Sampling;
use crate::scheduler::Priority;
use crate::state::{Slot, Suspended};
use crate::tokenizer::Tokenizer;
use std::sync::Arc;
use std::time::Instant;

pub(super) struct Sequence {
    /// Prompt, then output.
    pub tokens: Vec<u32>,
    pub tenant: Arc<str>,
    pub tenant_weight: u32,
    pub priority: Priority,
    pub sampling: Sampling,
    pub deadline: Option<Instant>,
    pub slot: Option<Slot>,
    /// Its state while others have its slot.
    pub suspended: Option<Suspended>,
    /// Since when it cannot go on without a grant.
    pub idle_since: Option<Instant>,
    /// What the scheduler was last told.
    pub granted_tokens: u64,
    /// Tokens in the state.
    pub computed: usize,
    pub prefix: Prefix,
    prompt_tokens: usize,
    resumed_tokens: usize,
    output_tokens_max: usize,
    stop_ids: Vec<u32>,
    stop_strings: Arc<[String]>,
    detokenizer: Detokenizer,
    outlet: Outlet,
}

impl Sequence {
    /// Takes up a submission where it was left; if it had ended there already, says how.
    pub fn new(
        submission: Submission,
        end_of_sequence: &[u32],
        outlet: Outlet,
        tokenizer: &Tokenizer,
    ) -> (Sequence, Option<Ending>) {
        let mut stop_ids = submission.stop_ids;
        if !submission.ignore_end_of_sequence {
            stop_ids.extend_from_slice(end_of_sequence);
        }
        let mut sequence = Sequence {
            prompt_tokens: submission.prompt_ids.len(),
            resumed_tokens: submission.resume_ids.len(),
            tokens: submission.prompt_ids,
            tenant: submission.tenant,
            tenant_weight: submission.tenant_weight,
            priority: submission.priority,
            sampling: submission.sampling,
            deadline: submission.deadline,
            slot: None,
            suspended: None,
            idle_since: None,
            granted_tokens: submission.grant.output_tokens,
            computed: 0,
            prefix: Prefix::default(),
            output_tokens_max: submission.output_tokens_max,
            stop_ids,
            detokenizer: Detokenizer::new(submission.stop_strings.clone()),
            stop_strings: submission.stop_strings,
            outlet,
        };
        // Replayed one by one, the detokenizer comes to hold back just what it held back elsewhere.
        let mut already_sent = String::new();
        for id in submission.resume_ids {
            if let Some(ending) = sequence.advance(id, tokenizer, &mut already_sent) {
                return (sequence, Some(ending));
            }
        }
        (sequence, None)
    }

    /// Appends an output token; `text` gets what became certain with it, everything if it was the last.
    pub fn advance(&mut self, id: u32, tokenizer: &Tokenizer, text: &mut String) -> Option<Ending> {
        self.tokens.push(id);
        if self.stop_ids.contains(&id) {
            self.detokenizer.finish(text);
            return Some(Ending::Stop { stop_string: None });
        }
        if let Some(stop) = self.detokenizer.push(tokenizer.bytes(id), text) {
            return Some(Ending::Stop { stop_string: Some(self.stop_strings[stop].clone()) });
        }
        if self.output_tokens() >= self.output_tokens_max {
            self.detokenizer.finish(text);
            return Some(Ending::Length);
        }
        None
    }

    pub fn output_tokens(&self) -> usize {
        self.tokens.len() - self.prompt_tokens
    }

    pub fn output_tokens_left_max(&self) -> usize {
        self.output_tokens_max - self.output_tokens()
    }

    /// Whether it never had a slot.
    pub fn is_new(&self) -> bool {
        self.slot.is_none() && self.suspended.is_none()
    }

    /// The longest it can get.
    pub fn tokens_max(&self) -> usize {
        self.prompt_tokens + self.output_tokens_max
    }

    /// Tokens it came with: their computation is prefill.
    pub fn given_tokens(&self) -> usize {
        self.prompt_tokens + self.resumed_tokens
    }

    /// A prompt counts as far as it was computed; that of a resumed sequence was, elsewhere. What came from the cache is in a class
    /// of its own.
    pub fn usage(&self) -> Usage {
        let prompt =
            if self.resumed_tokens > 0 { self.prompt_tokens } else { self.computed.min(self.prompt_tokens) };
        let cached = self.prefix.restored.min(self.prompt_tokens);
        Usage {
            input_tokens: (prompt - cached) as u64,
            cached_input_tokens: cached as u64,
            output_tokens: self.output_tokens() as u64,
        }
    }

    pub fn outlet(&self) -> &Outlet {
        &self.outlet
    }

    /// Ends it right after a token, with the text that [`Sequence::advance`] gave.
    pub fn end_after(self, last: u32, text: &str, ending: Ending) -> Option<Slot> {
        let usage = self.usage();
        self.outlet.end(Some(last), text, usage, ending);
        self.slot
    }

    /// Ends it between tokens.
    pub fn end(mut self, ending: Ending) -> Option<Slot> {
        let mut text = String::new();
        self.detokenizer.finish(&mut text);
        let usage = self.usage();
        self.outlet.end(None, &text, usage, ending);
        self.slot
    }

    /// Ends it without a word: all of its text was sent elsewhere.
    pub fn end_silently(self, ending: Ending) {
        let usage = self.usage();
        self.outlet.end(None, "", usage, ending);
    }
}
