//! What does the next step compute? One token of everybody who decodes, and chunks of prompts in what is left.

use super::{Flow, Place, Scheduler, Sequence, SequenceId, flow::Clock};

/// What one step computes for one sequence: its known tokens `from..from + tokens`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    pub id: SequenceId,
    pub from: usize,
    pub tokens: usize,
    /// They reach the end of what is known: a token is to be sampled.
    pub samples: bool,
}

/// What the next step could compute, for whoever sets its budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ahead {
    /// Sequences that decode.
    pub decoding: usize,
    /// Where the prompt whose turn it is has got to.
    pub prompt_at: Option<usize>,
}

impl Scheduler {
    pub fn ahead(&mut self) -> Ahead {
        let decoding = self.find_candidates();
        let prompt_at = self.candidates.first().map(|(_, id)| self.sequences[id].computed);
        Ahead { decoding, prompt_at }
    }

    /// Fills `batch` with the next step, and takes it for computed. At most `prompt_tokens_max` tokens of prompts go beside
    /// sequences that decode; a step without any takes as many as `step_tokens_max` allows.
    pub fn schedule(&mut self, batch: &mut Vec<Work>, prompt_tokens_max: usize) {
        batch.clear();
        let decoding = self.find_candidates();
        for (&id, sequence) in &mut self.sequences {
            if sequence.decodes() {
                let flow = self.flows.get_mut(&sequence.flow).expect("a sequence's flow is kept");
                batch.push(take(id, sequence, flow, &mut self.clock, 1));
            }
        }
        let mut budget = self.limits.step_tokens_max - decoding;
        if decoding > 0 {
            budget = budget.min(prompt_tokens_max);
        }
        for (turn, &(_, id)) in self.candidates.iter().enumerate() {
            let sequence = self.sequences.get_mut(&id).expect("a candidate is known");
            let flow = self.flows.get_mut(&sequence.flow).expect("a sequence's flow is kept");
            let tokens = chunk(sequence, budget, self.limits.block_tokens, turn == 0);
            if tokens > 0 {
                batch.push(take(id, sequence, flow, &mut self.clock, tokens));
                budget -= tokens;
            }
        }
    }

    /// Puts the running prompts in order, the flow furthest behind first; answers with the number of those that decode.
    fn find_candidates(&mut self) -> usize {
        self.candidates.clear();
        let mut decoding = 0;
        for (&id, sequence) in &self.sequences {
            if sequence.decodes() {
                decoding += 1;
            } else if sequence.place == Place::Running && sequence.allowed() > 0 {
                self.candidates.push((self.flows[&sequence.flow].counter, id));
            }
        }
        self.candidates.sort_unstable();
        decoding
    }
}

fn take(id: SequenceId, sequence: &mut Sequence, flow: &mut Flow, clock: &mut Clock, tokens: usize) -> Work {
    let work = Work { id, from: sequence.computed, tokens, samples: tokens == sequence.left() };
    // Charged before it counts as done: whose last chunk this is still was backlogged.
    flow.charge(clock, tokens as u64);
    flow.promised -= tokens as u64;
    sequence.computed += tokens;
    sequence.stint_tokens += tokens as u64;
    work
}

/// How many tokens of a prompt go into a step with `budget` left. It ends on the grid where it can. Only the first in turn
/// may take less than a block for want of budget: it must get on, the others can wait for a whole one.
fn chunk(sequence: &Sequence, budget: usize, block: usize, first: bool) -> usize {
    let allowed = sequence.allowed().min(sequence.until_stop());
    if allowed <= budget {
        return allowed;
    }
    let end = sequence.computed + budget;
    let on_grid = end - end % block;
    if budget >= block && on_grid > sequence.computed {
        on_grid - sequence.computed
    } else if first {
        budget
    } else {
        0
    }
}
