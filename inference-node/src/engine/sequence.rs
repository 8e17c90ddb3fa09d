//! One sequence inside the engine: its tokens, where it may end, and what of its text is out.

use super::Submission;
use super::caching::Prefix;
use super::mailbox::{Ending, Outlet, Sampled, Usage};
use crate::constraint::{Guide, Masks};
use crate::detokenizer::Detokenizer;
use crate::sampler::{Choice, History, Sampler, Sampling, TokenLogprobs};
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
    output_tokens_min: usize,
    sampling: Sampling,
    history: History,
    top_logprobs: Option<usize>,
    guide: Option<Guide>,
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
            history: History::new(&submission.sampling, tokenizer.vocab_size(), &submission.prompt_ids),
            tokens: submission.prompt_ids,
            tenant: submission.tenant,
            tenant_weight: submission.tenant_weight,
            priority: submission.priority,
            sampling: submission.sampling,
            top_logprobs: submission.top_logprobs,
            guide: None,
            deadline: submission.deadline,
            slot: None,
            suspended: None,
            idle_since: None,
            granted_tokens: submission.grant.output_tokens,
            computed: 0,
            prefix: Prefix::default(),
            output_tokens_max: submission.output_tokens_max,
            output_tokens_min: submission.output_tokens_min,
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
        // It has replayed them itself, before the engine heard of the sequence.
        sequence.guide = submission.constraint.map(Guide::new);
        let whole = sequence.is_whole().then_some(Ending::Stop { stop_string: None });
        (sequence, whole)
    }

    /// The next token, by the logits for it.
    pub fn choose(&mut self, logits: &[f32], sampler: &mut Sampler) -> Result<Sampled, Ending> {
        let mask = match &mut self.guide {
            Some(guide) => Some(guide.mask().map_err(Ending::Constraint)?.bits()),
            None => None,
        };
        let too_early = self.tokens.len() - self.prompt_tokens < self.output_tokens_min;
        let choice = Choice {
            logits,
            sampling: &self.sampling,
            history: &self.history,
            mask,
            suppressed: if too_early { &self.stop_ids } else { &[] },
            position: self.tokens.len() as u64,
        };
        let Some(id) = sampler.sample(&choice) else {
            return Err(Ending::Broken("the model computed logits that are not finite"));
        };
        if let Some(guide) = &mut self.guide {
            guide.consume(id).map_err(Ending::Constraint)?;
        }
        let logprobs = self.top_logprobs.map(|top| TokenLogprobs::of(logits, id, top));
        Ok(Sampled { id, logprobs })
    }

    /// Has what the next token needs made ready beside the next step.
    pub fn prepare(&mut self, masks: &Masks) {
        if let Some(guide) = &mut self.guide {
            guide.prepare(masks);
        }
    }

    /// Appends an output token; `text` gets what became certain with it, everything if it was the last.
    pub fn advance(&mut self, id: u32, tokenizer: &Tokenizer, text: &mut String) -> Option<Ending> {
        self.tokens.push(id);
        self.history.push(id);
        let may_stop = self.output_tokens() > self.output_tokens_min;
        if may_stop && self.stop_ids.contains(&id) {
            self.detokenizer.finish(text);
            return Some(Ending::Stop { stop_string: None });
        }
        if !may_stop {
            self.detokenizer.push_unwatched(tokenizer.bytes(id), text);
        } else if let Some(stop) = self.detokenizer.push(tokenizer.bytes(id), text) {
            return Some(Ending::Stop { stop_string: Some(self.stop_strings[stop].clone()) });
        }
        if self.is_whole() {
            self.detokenizer.finish(text);
            return Some(Ending::Stop { stop_string: None });
        }
        if self.output_tokens() >= self.output_tokens_max {
            self.detokenizer.finish(text);
            return Some(Ending::Length);
        }
        None
    }

    /// Whether its constraint allows nothing more.
    fn is_whole(&self) -> bool {
        self.guide.as_ref().is_some_and(Guide::is_complete)
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
    pub fn end_after(self, last: Sampled, text: &str, ending: Ending) -> Option<Slot> {
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
