//! A constraint at one place of an output: which tokens may come next, and what it is after one of them.

use super::compile::{Refused, invalid};
use super::masks::{Masks, Slot};
use llguidance::Matcher;
use llguidance::api::StopReason;
use llguidance::toktrie::SimpleVob;
use std::sync::Arc;

/// A bit for each id of the vocabulary; at least one is set.
#[derive(Clone)]
pub struct Mask(SimpleVob);

impl Mask {
    pub(super) fn of(matcher: &mut Matcher) -> Result<Mask, &'static str> {
        matcher.compute_mask().map(Mask).map_err(|error| failure(&error.to_string()))
    }

    pub fn bits(&self) -> &[u32] {
        self.0.as_slice()
    }
}

/// A mask that cannot be computed, and an allowed token that leads nowhere, are matters of llguidance's limits; by then it
/// has forgotten the cause, but for its words.
fn failure(error: &str) -> &'static str {
    match error.contains(&StopReason::NoExtensionBias.to_string()) {
        true => "reached a place where no token of this model fits",
        false => "became too complex to follow: allow less, or nest fewer repetitions",
    }
}

/// A compiled constraint that nobody follows yet.
pub struct Plan {
    matcher: Matcher,
    /// None if it is complete.
    mask: Option<Mask>,
}

impl Plan {
    /// Replays what was generated elsewhere.
    pub(super) fn new(mut matcher: Matcher, resume_ids: &[u32], field: &str) -> Result<Plan, Refused> {
        for (index, &id) in resume_ids.iter().enumerate() {
            if matcher.is_stopped() || matcher.consume_token(id).is_err() {
                let reason = "is a token that the constraint does not allow there";
                return Err(invalid(format!("resume_ids[{index}]"), reason));
            }
        }
        let mask = match matcher.is_stopped() {
            true => None,
            false => Some(Mask::of(&mut matcher).map_err(|reason| invalid(field, reason))?),
        };
        Ok(Plan { matcher, mask })
    }
}

impl Clone for Plan {
    /// With lexer states of its own: what one sequence does costs another nothing.
    fn clone(&self) -> Plan {
        Plan { matcher: self.matcher.deep_clone(), mask: self.mask.clone() }
    }
}

impl std::fmt::Debug for Plan {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Plan").field("complete", &self.mask.is_none()).finish_non_exhaustive()
    }
}

/// A constraint that a running sequence follows. Between two tokens it is with the mask threads.
pub struct Guide {
    /// `None` while it is away.
    matcher: Option<Box<Matcher>>,
    mask: Option<Mask>,
    slot: Arc<Slot>,
    complete: bool,
}

impl Guide {
    pub fn new(plan: Plan) -> Guide {
        let Plan { matcher, mask } = plan;
        Guide { complete: mask.is_none(), matcher: Some(Box::new(matcher)), mask, slot: Arc::default() }
    }

    /// Whether the output is whole: nothing may follow.
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    /// Which tokens may come next. Waits if the mask is not ready.
    pub fn mask(&mut self) -> Result<&Mask, &'static str> {
        if self.mask.is_none() {
            let (matcher, mask) = match self.matcher.take() {
                Some(mut matcher) => {
                    let mask = Mask::of(&mut matcher);
                    (matcher, mask)
                }
                None => self.slot.collect(),
            };
            self.matcher = Some(matcher);
            self.mask = Some(mask?);
        }
        Ok(self.mask.as_ref().expect("it was just computed"))
    }

    /// Goes on by a token that the mask allowed.
    pub fn consume(&mut self, id: u32) -> Result<(), &'static str> {
        self.mask = None;
        let matcher = self.matcher.as_mut().expect("it is here while its mask is");
        matcher.consume_token(id).map_err(|error| failure(&error.to_string()))?;
        self.complete = matcher.is_stopped();
        Ok(())
    }

    /// Has the next mask computed by other threads.
    pub fn prepare(&mut self, masks: &Masks) {
        if self.mask.is_none()
            && !self.complete
            && let Some(matcher) = self.matcher.take()
        {
            masks.request(&self.slot, matcher);
        }
    }
}
