//! From a row of logits to a token.
//!
//! Random numbers are counter-based: the one at position p of a sequence depends on (seed, p) alone. Nothing has to be
//! carried along when a sequence is preempted, replayed or moved to another node. No allocation per token.

/// How a sequence chooses its tokens. Valid by construction: see [`Sampling::new`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    temperature: f32,
    top_p: f32,
    top_k: usize,
    seed: u64,
}

#[derive(Debug, thiserror::Error, PartialEq)]
pub enum SamplingError {
    #[error("must be a finite number of at least 0, not {0}")]
    Temperature(f32),
    #[error("must be in (0, 1], or 0 for no limit, not {0}")]
    TopP(f32),
}

impl SamplingError {
    pub fn field(&self) -> &'static str {
        match self {
            SamplingError::Temperature(_) => "temperature",
            SamplingError::TopP(_) => "top_p",
        }
    }
}

impl Sampling {
    pub const GREEDY: Sampling = Sampling { temperature: 0.0, top_p: 1.0, top_k: 0, seed: 0 };

    /// `temperature` 0 is greedy; `top_p` 0 and `top_k` 0 mean no limit.
    pub fn new(temperature: f32, top_p: f32, top_k: u32, seed: u64) -> Result<Sampling, SamplingError> {
        if !(temperature.is_finite() && temperature >= 0.0) {
            return Err(SamplingError::Temperature(temperature));
        }
        if !(0.0..=1.0).contains(&top_p) {
            return Err(SamplingError::TopP(top_p));
        }
        let top_p = if top_p == 0.0 { 1.0 } else { top_p };
        Ok(Sampling { temperature, top_p, top_k: top_k as usize, seed })
    }
}

/// Scratch space for one thread.
#[derive(Default)]
pub struct Sampler {
    candidates: Vec<Candidate>,
}

#[derive(Clone, Copy)]
struct Candidate {
    id: u32,
    logit: f32,
    /// Relative to the most likely token's, which is 1.
    weight: f64,
}

impl Sampler {
    /// The token at `position` of its sequence (the first prompt token is at 0). `None` if the row holds a NaN or an
    /// infinity where the maximum should be: the model is broken, and no token is better than another.
    pub fn sample(&mut self, logits: &[f32], sampling: &Sampling, position: u64) -> Option<u32> {
        let best = argmax(logits)?;
        if sampling.temperature == 0.0 || sampling.top_k == 1 {
            return Some(best);
        }
        self.weigh(logits, logits[best as usize], sampling);
        self.keep_top_k(sampling.top_k);
        self.keep_top_p(sampling.top_p);
        Some(self.draw(unit(sampling.seed, position)))
    }

    fn weigh(&mut self, logits: &[f32], best: f32, sampling: &Sampling) {
        self.candidates.clear();
        self.candidates.extend(logits.iter().zip(0u32..).map(|(&logit, id)| {
            let weight = f64::from((logit - best) / sampling.temperature).exp();
            Candidate { id, logit, weight: if weight.is_nan() { 0.0 } else { weight } }
        }));
    }

    fn keep_top_k(&mut self, top_k: usize) {
        if top_k == 0 || top_k >= self.candidates.len() {
            return;
        }
        self.candidates.select_nth_unstable_by(top_k - 1, likelier);
        self.candidates.truncate(top_k);
        // The selection leaves no order of its own; ids give the draw one.
        self.candidates.sort_unstable_by_key(|c| c.id);
    }

    /// Keeps the smallest set of likeliest tokens whose probability is at least `top_p`.
    fn keep_top_p(&mut self, top_p: f32) {
        if top_p >= 1.0 {
            return;
        }
        let top_p = f64::from(top_p);
        let total: f64 = self.candidates.iter().map(|c| c.weight).sum();
        // Tokens below this weight hold less than 1 - top_p together, so none is in the set: no need to sort them.
        let floor = total * (1.0 - top_p) / self.candidates.len() as f64;
        self.candidates.retain(|c| c.weight >= floor);
        self.candidates.sort_unstable_by(likelier);
        let mut mass = 0.0;
        let kept = self.candidates.iter().position(|c| {
            mass += c.weight;
            mass >= total * top_p
        });
        self.candidates.truncate(kept.map_or(self.candidates.len(), |at| at + 1));
    }

    /// `unit` in [0, 1).
    fn draw(&self, unit: f64) -> u32 {
        let total: f64 = self.candidates.iter().map(|c| c.weight).sum();
        let mut rest = unit * total;
        let mut last = 0;
        for candidate in self.candidates.iter().filter(|c| c.weight > 0.0) {
            if rest < candidate.weight {
                return candidate.id;
            }
            rest -= candidate.weight;
            last = candidate.id;
        }
        last // rounding used up the last candidate's share
    }
}

fn likelier(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id))
}

/// The largest logit; of equal ones, the lowest id.
fn argmax(logits: &[f32]) -> Option<u32> {
    let (mut best, mut best_id) = (f32::NEG_INFINITY, 0);
    let mut broken = logits.is_empty();
    for (&logit, id) in logits.iter().zip(0u32..) {
        broken |= logit.is_nan();
        if logit > best {
            (best, best_id) = (logit, id);
        }
    }
    (!broken && best.is_finite()).then_some(best_id)
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

    fn draws(sampling: impl Fn(u64) -> Sampling, count: u64) -> Vec<f64> {
        let mut sampler = Sampler::default();
        let mut share = vec![0.0; LOGITS.len()];
        for position in 0..count {
            let id = sampler.sample(&LOGITS, &sampling(7), position).expect("finite logits");
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
        assert_eq!(Sampler::default().sample(&LOGITS, &Sampling::GREEDY, 0), Some(1));
    }

    #[test]
    fn a_broken_row_yields_no_token() {
        let mut sampler = Sampler::default();
        for row in
            [&[f32::NAN, 1.0][..], &[1.0, f32::NAN], &[f32::INFINITY, 0.0], &[f32::NEG_INFINITY; 2], &[]]
        {
            assert_eq!(sampler.sample(row, &Sampling::GREEDY, 0), None, "{row:?}");
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
        let mut forth = Sampler::default();
        let expect: Vec<_> = (0..50).map(|p| forth.sample(&LOGITS, &sampling, p)).collect();
        let mut back = Sampler::default();
        let mut got: Vec<_> = (0..50).rev().map(|p| back.sample(&LOGITS, &sampling, p)).collect();
        got.reverse();
        assert_eq!(got, expect);
        let other = Sampling::new(1.0, 0.95, 5, 43).expect("valid");
        assert_ne!((0..50).map(|p| forth.sample(&LOGITS, &other, p)).collect::<Vec<_>>(), expect);
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        assert_eq!(Sampling::new(-1.0, 1.0, 0, 0).map_err(|e| e.field()), Err("temperature"));
        assert_eq!(Sampling::new(f32::NAN, 1.0, 0, 0).map_err(|e| e.field()), Err("temperature"));
        assert_eq!(Sampling::new(1.0, 1.5, 0, 0).map_err(|e| e.field()), Err("top_p"));
        assert_eq!(Sampling::new(1.0, f32::NAN, 0, 0).map_err(|e| e.field()), Err("top_p"));
    }
}
