//! What a sequence holds already, as far as its penalties ask for it. Nothing is kept for one that has none.

use super::settings::{Penalties, Sampling};
use std::collections::HashMap;

#[derive(Debug, Clone, Default)]
pub struct History {
    /// A bit for each id of the vocabulary that occurs in prompt or output.
    seen: Vec<u32>,
    /// Output ids, and how often.
    counts: HashMap<u32, u32>,
    counts_output: bool,
}

impl History {
    pub fn new(sampling: &Sampling, vocab_size: usize, prompt: &[u32]) -> History {
        let penalties = &sampling.penalties;
        let mut history = History { counts_output: penalties.counts_output(), ..History::default() };
        if penalties.reads_prompt() {
            history.seen = vec![0; vocab_size.div_ceil(32)];
            prompt.iter().for_each(|&id| history.see(id));
        }
        history
    }

    /// A token of the output.
    pub fn push(&mut self, id: u32) {
        self.see(id);
        if self.counts_output {
            *self.counts.entry(id).or_insert(0) += 1;
        }
    }

    /// Whether there is anything to take from a row.
    pub fn is_empty(&self) -> bool {
        self.seen.is_empty() && self.counts.is_empty()
    }

    /// Takes the penalties from a row of logits; touches the tokens that occurred, no others.
    pub(super) fn penalise(&self, penalties: &Penalties, row: &mut [f32]) {
        for (word, &bits) in self.seen.iter().enumerate() {
            let mut bits = bits;
            while bits != 0 {
                let logit = &mut row[word * 32 + bits.trailing_zeros() as usize];
                *logit =
                    if *logit > 0.0 { *logit / penalties.repetition } else { *logit * penalties.repetition };
                bits &= bits - 1;
            }
        }
        for (&id, &count) in &self.counts {
            row[id as usize] -= penalties.frequency * count as f32 + penalties.presence;
        }
    }

    fn see(&mut self, id: u32) {
        if let Some(word) = self.seen.get_mut(id as usize / 32) {
            *word |= 1 << (id % 32);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::settings::Settings;
    use super::*;

    #[track_caller]
    fn check(settings: Settings, prompt: &[u32], output: &[u32], expect: [f32; 4]) {
        let sampling = Sampling::try_from(settings).expect("valid");
        let mut history = History::new(&sampling, 4, prompt);
        output.iter().for_each(|&id| history.push(id));
        let mut row = [2.0, -2.0, 2.0, 2.0];
        history.penalise(&sampling.penalties, &mut row);
        assert_eq!(row, expect);
    }

    #[test]
    fn each_penalty_takes_what_it_says() {
        let none = Settings::default();
        check(none.clone(), &[0, 1], &[2, 2], [2.0, -2.0, 2.0, 2.0]);
        let repetition = Settings { repetition_penalty: 2.0, ..none.clone() };
        check(repetition, &[0, 1], &[2, 2], [1.0, -4.0, 1.0, 2.0]);
        let frequency = Settings { frequency_penalty: 0.5, ..none.clone() };
        check(frequency, &[0, 1], &[2, 2, 3], [2.0, -2.0, 1.0, 1.5]);
        let presence = Settings { presence_penalty: -1.0, ..none };
        check(presence, &[0, 1], &[2, 2, 1], [2.0, -1.0, 3.0, 2.0]);
    }
}
