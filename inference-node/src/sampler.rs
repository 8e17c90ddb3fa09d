//! From a row of logits to a token.
//!
//! ```text
//! logits -> penalties, biases -> mask of the constraint -> temperature -> min_p -> top_k -> top_p -> draw
//!    +----> log-probabilities, of the row as the model computed it
//! ```
//! Random numbers are counter-based: the one at position p of a sequence depends on (seed, p) alone, and penalties on
//! the sequence's own tokens. Nothing else has to be carried along when a sequence is preempted, replayed or moved to
//! another node. No allocation per token; what a token costs is a few passes over the row.

mod history;
mod logprobs;
mod settings;
mod weights;

pub use self::history::History;
pub use self::logprobs::TokenLogprobs;
pub use self::settings::{
    LOGIT_BIAS_LIMIT, LOGIT_BIAS_MAX, Penalties, Sampling, SamplingError, Settings, TOP_LOGPROBS_MAX,
};
use self::weights::{Cut, Share};

/// What decides a sequence's next token.
#[derive(Clone, Copy)]
pub struct Choice<'a> {
    /// As the model computed it: an element for each id.
    pub logits: &'a [f32],
    pub sampling: &'a Sampling,
    pub history: &'a History,
    /// A bit for each id that a constraint allows; at least one is set.
    pub mask: Option<&'a [u32]>,
    /// Ids that must wait: those that would end the sequence too early. They come after all, where a constraint
    /// leaves nothing else.
    pub suppressed: &'a [u32],
    /// Of the token in its sequence; the first prompt token is at 0.
    pub position: u64,
}

/// Scratch space for one thread.
#[derive(Default)]
pub struct Sampler {
    row: Vec<f32>,
    weights: Vec<f32>,
    sums: Vec<f64>,
    cut: Cut,
}

impl Sampler {
    /// `None` if the row holds a NaN, or an infinity where the maximum should be: the model is broken, and no token is
    /// better than another.
    pub fn sample(&mut self, choice: &Choice<'_>) -> Option<u32> {
        let peak = weights::peak(choice.logits)?;
        if !choice.adjusts() {
            return Some(self.pick(choice.logits, peak, choice));
        }
        let mut row = std::mem::take(&mut self.row);
        choice.adjust(&mut row);
        let peak = weights::peak(&row).or_else(|| {
            Choice { suppressed: &[], ..*choice }.adjust(&mut row);
            weights::peak(&row)
        });
        let token = peak.map(|peak| self.pick(&row, peak, choice));
        self.row = row;
        token
    }

    /// `peak` is the largest of `row`.
    fn pick(&mut self, row: &[f32], peak: f32, choice: &Choice<'_>) -> u32 {
        let sampling = choice.sampling;
        let id = if sampling.temperature == 0.0 || sampling.top_k == 1 {
            weights::position_of(row, peak).expect("the peak is in its row")
        } else {
            weights::weigh(row, peak, sampling.temperature, &mut self.weights);
            self.cut_tail(sampling);
            weights::draw(&self.weights, unit(sampling.seed, choice.position), &mut self.sums)
        };
        id as u32
    }

    fn cut_tail(&mut self, sampling: &Sampling) {
        if sampling.min_p > 0.0 {
            // The likeliest weighs 1, so a weight is the ratio that min_p speaks of.
            self.weights.iter_mut().for_each(|w| *w = if *w < sampling.min_p { 0.0 } else { *w });
        }
        if sampling.top_k > 0 && sampling.top_k < self.weights.len() {
            self.cut.keep(&mut self.weights, Share::Count(sampling.top_k));
        }
        if sampling.top_p < 1.0 {
            self.cut.keep(&mut self.weights, Share::Mass(f64::from(sampling.top_p)));
        }
    }
}

impl Choice<'_> {
    fn adjusts(&self) -> bool {
        self.mask.is_some()
            || !self.suppressed.is_empty()
            || !self.history.is_empty()
            || !self.sampling.logit_bias.is_empty()
    }

    /// Writes the row to choose from.
    fn adjust(&self, row: &mut Vec<f32>) {
        row.clear();
        row.extend_from_slice(self.logits);
        self.history.penalise(&self.sampling.penalties, row);
        for &(id, bias) in self.sampling.logit_bias.iter() {
            row[id as usize] += bias;
        }
        for &id in self.suppressed {
            row[id as usize] = f32::NEG_INFINITY;
        }
        if let Some(mask) = self.mask {
            for (logits, &allowed) in row.chunks_mut(32).zip(mask) {
                match allowed {
                    u32::MAX => {}
                    0 => logits.fill(f32::NEG_INFINITY),
                    _ => logits.iter_mut().enumerate().for_each(|(bit, logit)| {
                        *logit = if allowed >> bit & 1 == 1 { *logit } else { f32::NEG_INFINITY };
                    }),
                }
            }
        }
    }
}

/// The number in [0, 1) at `counter` of the stream `key`: 53 bits of Philox4x32-10.
fn unit(key: u64, counter: u64) -> f64 {
    let [low, high, ..] =
        philox([counter as u32, (counter >> 32) as u32, 0, 0], [key as u32, (key >> 32) as u32]);
    let bits = u64::from(low) | u64::from(high) << 32;
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    let wide = |a: u32, b: u32| u64::from(a) * u64::from(b);
    for _ in 0..10 {
        let (x, y) = (wide(0xD251_1F53, counter[0]), wide(0xCD9E_8D57, counter[2]));
        counter = [
            (y >> 32) as u32 ^ counter[1] ^ key[0],
            y as u32,
            (x >> 32) as u32 ^ counter[3] ^ key[1],
            x as u32,
        ];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 6] = [0.0, 3.0, 1.0, 3.0, -2.0, 2.0];

    fn choose(logits: &[f32], sampling: &Sampling, position: u64) -> Option<u32> {
        let history = History::default();
        let choice = Choice { logits, sampling, history: &history, mask: None, suppressed: &[], position };
        Sampler::default().sample(&choice)
    }

    fn draws(sampling: impl Fn(u64) -> Sampling, count: u64) -> Vec<f64> {
        let mut share = vec![0.0; LOGITS.len()];
        for position in 0..count {
            let id = choose(&LOGITS, &sampling(7), position).expect("finite logits");
            share[id as usize] += 1.0 / count as f64;
        }
        share
    }

    #[test]
    fn philox_gives_the_published_numbers() {
        // Known answers of the Random123 distribution.
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([!0; 4], [!0; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    }

    #[test]
    fn greedy_ties_go_to_the_lowest_id() {
        assert_eq!(choose(&LOGITS, &Sampling::greedy(), 0), Some(1));
    }

    #[test]
    fn a_broken_row_yields_no_token() {
        for row in
            [&[f32::NAN, 1.0][..], &[1.0, f32::NAN], &[f32::INFINITY, 0.0], &[f32::NEG_INFINITY; 2], &[]]
        {
            assert_eq!(choose(row, &Sampling::greedy(), 0), None, "{row:?}");
        }
    }

    #[test]
    fn shares_follow_the_softmax() {
        let share = draws(|seed| Sampling::new(1.0, 1.0, 0, seed).expect("valid"), 40_000);
        let total: f64 = LOGITS.iter().map(|&l| f64::from(l).exp()).sum();
        for (id, &logit) in LOGITS.iter().enumerate() {
            let expect = f64::from(logit).exp() / total;
            // Five standard deviations of a share of 40,000 draws.
            assert!(
                (share[id] - expect).abs() < 5.0 * (expect / 40_000.0).sqrt(),
                "{id}: {} {expect}",
                share[id]
            );
        }
    }

    #[test]
    fn top_k_and_top_p_cut_the_tail() {
        let top_k = draws(|seed| Sampling::new(1.0, 1.0, 3, seed).expect("valid"), 2_000);
        let top_p = draws(|seed| Sampling::new(1.0, 0.9, 0, seed).expect("valid"), 2_000);
        for share in [top_k, top_p] {
            assert!(
                [1, 3, 5].iter().all(|&id| share[id] > 0.0) && share[0] + share[2] + share[4] == 0.0,
                "{share:?}"
            );
        }
        let tiny = draws(|seed| Sampling::new(1.0, 1e-6, 0, seed).expect("valid"), 100);
        assert!(tiny[1] > 0.999, "the likeliest always stays: {tiny:?}");
        let cold = draws(|seed| Sampling::new(1e-30, 1.0, 0, seed).expect("valid"), 1_000);
        assert!(cold[1] + cold[3] > 0.999, "a very low temperature overflows nothing: {cold:?}");
    }

    #[test]
    fn a_token_depends_on_seed_and_position_alone() {
        let sampling = Sampling::new(1.0, 0.95, 5, 42).expect("valid");
        let expect: Vec<_> = (0..50).map(|p| choose(&LOGITS, &sampling, p)).collect();
        let mut got: Vec<_> = (0..50).rev().map(|p| choose(&LOGITS, &sampling, p)).collect();
        got.reverse();
        assert_eq!(got, expect);
        let other = Sampling::new(1.0, 0.95, 5, 43).expect("valid");
        assert_ne!((0..50).map(|p| choose(&LOGITS, &other, p)).collect::<Vec<_>>(), expect);
    }

    #[test]
    fn min_p_is_relative_to_the_likeliest() {
        let min_p = |seed| Settings { temperature: 1.0, min_p: 0.3, seed, ..Settings::default() };
        let share = draws(|seed| Sampling::try_from(min_p(seed)).expect("valid"), 2_000);
        // e^-1 = 0.37 stays, e^-2 = 0.14 does not.
        assert!([1, 3, 5].iter().all(|&id| share[id] > 0.0) && share[0] + share[2] + share[4] == 0.0);
    }

    #[test]
    fn a_mask_binds_and_suppression_gives_way_to_it() {
        let history = History::default();
        let greedy = Sampling::greedy();
        let hot = Sampling::new(5.0, 1.0, 0, 1).expect("valid");
        let check = |mask: u32, suppressed: &[u32], expect: u32| {
            for sampling in [&greedy, &hot] {
                let mask = [mask];
                let choice = Choice {
                    logits: &LOGITS,
                    sampling,
                    history: &history,
                    mask: Some(&mask),
                    suppressed,
                    position: 3,
                };
                assert_eq!(Sampler::default().sample(&choice), Some(expect), "{mask:?} {suppressed:?}");
            }
        };
        check(0b1_0000, &[], 4);
        check(0b1_0010, &[1], 4);
        check(0b1_0000, &[4], 4);
    }

    #[test]
    fn a_bias_of_a_hundred_decides() {
        let biased = |bias| {
            let settings = Settings { logit_bias: vec![(4, bias)], temperature: 1.0, ..Settings::default() };
            Sampling::try_from(settings).expect("valid")
        };
        for position in 0..200 {
            assert_eq!(choose(&LOGITS, &biased(100.0), position), Some(4));
            assert_ne!(choose(&LOGITS, &biased(-100.0), position), Some(4));
        }
    }

    #[test]
    fn long_rows_are_drawn_from_whole() {
        let logits: Vec<f32> = (0..10_000).map(|id| ((id * 7919) % 1000) as f32 / 500.0).collect();
        let seen = |sampling: &dyn Fn(u64) -> Sampling| {
            let ids: std::collections::BTreeSet<u32> =
                (0..3_000).filter_map(|p| choose(&logits, &sampling(p), p)).collect();
            (*ids.first().expect("draws"), *ids.last().expect("draws"), ids.len())
        };
        let (first, last, distinct) = seen(&|seed| Sampling::new(1.0, 1.0, 0, seed).expect("valid"));
        assert!(first < 100 && last > 9_900 && distinct > 2_000, "{first} {last} {distinct}");
        let (.., distinct) = seen(&|seed| Sampling::new(1.0, 1.0, 20, seed).expect("valid"));
        assert_eq!(distinct, 20);
    }
}
