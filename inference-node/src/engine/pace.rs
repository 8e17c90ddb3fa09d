//! How fast does this engine compute? Measured step by step, to tell how much of a prompt fits beside decoding, how long
//! the work at hand will take, and whether a deadline can be met at all.
//!
//! ```text
//!   a pure decode step  |=== n tokens ===|                               learned for each n
//!   a mixed step        |=== n tokens ===|== a chunk of a prompt ==|     the rest is the chunk's
//!                       |<---------- mixed_step_ratio ------------>|
//! ```
//!
//! A prompt's token costs more the later it stands, for the softmax layers walk over all before it: costs are kept for a
//! token at position 0 and scaled. While a prompt is computed no step is a pure one, so every so often one is made to
//! be, and what decoding takes stays known.
//!
//! Pure arithmetic: the engine passes the times in.

use crate::config::{LayerKind, ModelConfig};
use crate::scheduler::{Ahead, Work};
use std::time::Duration;

/// Prompt tokens beside decoding as long as nothing is measured; from there, at most twice as many as last time.
const CHUNK_TOKENS_START: usize = 16;
/// However slow a prompt's tokens are, it gets on.
const CHUNK_TOKENS_MIN: usize = 4;
/// After so many mixed steps one without a prompt, to measure.
const MIXED_STEPS_MAX: u32 = 32;
/// Weight of the newest measurement.
const NEWEST: f64 = 0.25;
/// One measurement moves an estimate by no more than this factor: another process may have taken the core.
const OUTLIER: f64 = 2.0;
/// A deadline is hopeless only if it would be missed at this multiple of the best speed ever seen.
const BEST_SPEED_MARGIN: f64 = 2.0;
/// Output tokens of a sequence, as long as none has ended.
const OUTPUT_TOKENS_START: f64 = 256.0;

pub(super) struct Pace {
    mixed_step_ratio: f64,
    /// How much more a prompt's token costs for each token before it, as a share of its cost at position 0.
    cost_growth: f64,
    /// Seconds of a pure decode step, by [`size_class`] of its sequences.
    decode_s: Vec<Option<f64>>,
    /// Seconds of a prompt's token at position 0: beside decoding, and on its own.
    mixed_token_s: Option<f64>,
    prompt_token_s: Option<f64>,
    fastest_prompt_token_s: f64,
    output_token_s: Option<f64>,
    output_tokens: f64,
    chunk_tokens: usize,
    mixed_steps: u32,
}

impl Pace {
    pub fn new(config: &ModelConfig, active_parameters: u64, mixed_step_ratio: f64) -> Pace {
        // Multiplications: scores and values of a token before it, against all weights that a token meets.
        let attention = config.layers_of(LayerKind::Softmax) * 2 * config.heads * config.head_dim;
        Pace {
            mixed_step_ratio,
            cost_growth: attention as f64 / active_parameters.max(1) as f64,
            decode_s: Vec::new(),
            mixed_token_s: None,
            prompt_token_s: None,
            fastest_prompt_token_s: f64::INFINITY,
            output_token_s: None,
            output_tokens: OUTPUT_TOKENS_START,
            chunk_tokens: CHUNK_TOKENS_START,
            mixed_steps: 0,
        }
    }

    /// How many tokens of prompts may go beside the sequences that decode.
    pub fn prompt_tokens_max(&self, ahead: Ahead) -> usize {
        let Some(position) = ahead.prompt_at.filter(|_| ahead.decoding > 0) else { return usize::MAX };
        let class = size_class(ahead.decoding);
        let Some(decode_s) = self.decode_s.get(class).copied().flatten() else { return 0 };
        if self.mixed_steps >= MIXED_STEPS_MAX {
            return 0;
        }
        let Some(token_s) = self.mixed_token_s else { return CHUNK_TOKENS_START };
        let spare_s = (self.mixed_step_ratio - 1.0) * decode_s;
        let at_start = spare_s / (token_s * self.cost_at(position as f64));
        let tokens = spare_s / (token_s * self.cost_at(position as f64 + at_start / 2.0));
        (tokens as usize).min(2 * self.chunk_tokens).max(CHUNK_TOKENS_MIN)
    }

    /// A step computed `batch` and took `took`.
    pub fn observe(&mut self, batch: &[Work], took: Duration) {
        let took_s = took.as_secs_f64();
        let decodes = |work: &&Work| work.tokens == 1 && work.samples;
        let decoding = batch.iter().filter(decodes).count();
        let (mut chunk_tokens, mut costs) = (0, 0.0);
        for work in batch.iter().filter(|work| !decodes(work)) {
            chunk_tokens += work.tokens;
            costs += work.tokens as f64 * self.cost_at(work.from as f64 + work.tokens as f64 / 2.0);
        }
        let class = size_class(decoding);
        match (decoding, chunk_tokens) {
            (0, 0) => {}
            (_, 0) => {
                self.decode_s.resize(self.decode_s.len().max(class + 1), None);
                learn(&mut self.decode_s[class], took_s);
                learn(&mut self.output_token_s, took_s / decoding as f64);
                self.mixed_steps = 0;
            }
            (0, _) => {
                learn(&mut self.prompt_token_s, took_s / costs);
                self.fastest_prompt_token_s = self.fastest_prompt_token_s.min(took_s / costs);
            }
            (..) => {
                self.mixed_steps += 1;
                self.chunk_tokens = chunk_tokens.max(CHUNK_TOKENS_START);
                if let Some(decode_s) = self.decode_s.get(class).copied().flatten() {
                    // It may even have been faster than decoding usually is.
                    learn_worst(&mut self.mixed_token_s, (took_s - decode_s).max(took_s / 100.0) / costs);
                }
            }
        }
    }

    /// A sequence ended after so many output tokens of its own.
    pub fn ended(&mut self, output_tokens: usize) {
        self.output_tokens += NEWEST / 4.0 * (output_tokens as f64 - self.output_tokens);
    }

    /// How many output tokens a sequence is likely to have still before it: no more than `left_max`.
    pub fn output_tokens_left(&self, output_tokens: usize, left_max: usize) -> f64 {
        // Whoever has outlived the others may well be half way.
        (self.output_tokens - output_tokens as f64).max(output_tokens as f64 / 2.0).min(left_max as f64)
    }

    /// Seconds that so much work takes, everybody's together; 0 while nothing is measured.
    pub fn seconds_for(&self, prompt_tokens: f64, output_tokens: f64) -> f64 {
        let prompt_token_s = self.prompt_token_s.or(self.mixed_token_s).unwrap_or(0.0);
        prompt_tokens * prompt_token_s + output_tokens * self.output_token_s.unwrap_or(0.0)
    }

    /// Whether even alone, and faster than ever yet, `tokens` known ones could not be computed `within` this time.
    pub fn is_hopeless(&self, tokens: usize, within: Duration) -> bool {
        let costs = tokens as f64 * self.cost_at(tokens as f64 / 2.0);
        let fastest_s = self.fastest_prompt_token_s / BEST_SPEED_MARGIN;
        fastest_s.is_finite() && costs * fastest_s > within.as_secs_f64()
    }

    fn cost_at(&self, position: f64) -> f64 {
        1.0 + self.cost_growth * position
    }
}

fn learn(estimate: &mut Option<f64>, measured: f64) {
    *estimate = Some(match *estimate {
        None => measured,
        Some(known) => known + NEWEST * (measured.clamp(known / OUTLIER, known * OUTLIER) - known),
    });
}

/// Rises at once and falls slowly: what must hold for nearly all steps is not told by their mean.
fn learn_worst(estimate: &mut Option<f64>, measured: f64) {
    match estimate {
        Some(known) if measured > *known => *known = measured.min(*known * OUTLIER),
        _ => learn(estimate, measured),
    }
}

/// Exact up to 16, then in steps of an eighth to a sixteenth.
fn size_class(sequences: usize) -> usize {
    let shift = sequences.max(1).ilog2().saturating_sub(3);
    8 * shift as usize + (sequences >> shift)
}

#[cfg(test)]
#[path = "pace_tests.rs"]
mod tests;
