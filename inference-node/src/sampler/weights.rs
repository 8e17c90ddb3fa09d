//! Rows of numbers as long as the vocabulary, in loops that the compiler turns into SIMD: the largest logit,
//! exponentials, sums, and cutting the tail off a distribution without sorting it.
//!
//! Orders of summation are fixed, and no operation differs between machines: the same row gives the same bits
//! everywhere.

/// Elements that are summed together; their sums are what a draw walks first.
const BLOCK: usize = 64;
const LANES: usize = 16;

/// The largest element. `None` if there is a NaN, or if the largest is an infinity: the row means nothing.
pub fn peak(row: &[f32]) -> Option<f32> {
    let (mut largest, mut broken) = ([f32::NEG_INFINITY; LANES], [0u32; LANES]);
    let chunks = row.chunks_exact(LANES);
    let rest = chunks.remainder();
    let mut take = |lane: usize, x: f32| {
        largest[lane] = if x > largest[lane] { x } else { largest[lane] };
        broken[lane] |= u32::from(x.is_nan());
    };
    for chunk in chunks {
        for lane in 0..LANES {
            take(lane, chunk[lane]);
        }
    }
    rest.iter().enumerate().for_each(|(lane, &x)| take(lane, x));
    let largest = largest.into_iter().fold(f32::NEG_INFINITY, f32::max);
    (largest.is_finite() && broken.iter().all(|&lane| lane == 0)).then_some(largest)
}

/// Where `value` is first.
pub fn position_of(row: &[f32], value: f32) -> Option<usize> {
    for (block, chunk) in row.chunks(BLOCK).enumerate() {
        if chunk.iter().fold(false, |found, &x| found | (x == value)) {
            return chunk.iter().position(|&x| x == value).map(|at| block * BLOCK + at);
        }
    }
    None
}

/// `out[i] = exp((row[i] - peak) / temperature)`: relative to the likeliest token, which gets 1. What is below e^-87
/// is 0.
pub fn weigh(row: &[f32], peak: f32, temperature: f32, out: &mut Vec<f32>) {
    out.clear();
    out.extend(row.iter().map(|&logit| exp((logit - peak) / temperature)));
}

/// The logarithm of the sum of `exp(x)` over a row without NaN whose largest element is `peak`.
pub fn log_sum_exp(row: &[f32], peak: f32) -> f64 {
    let sum: f64 = row.chunks(BLOCK).map(|block| sum_of(block.iter().map(|&x| exp(x - peak)))).sum();
    f64::from(peak) + sum.ln()
}

/// `e^x` for x of at most 0, to about 2e-7 relative. The argument is split into a multiple of ln 2 and a rest, whose
/// exponential is a polynomial (coefficients of Cephes' `expf`).
fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits
    let clamped = if x > -87.0 { x } else { -87.0 };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = clamped - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let mut p = 1.987_569_1e-4f32;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5.0e-1] {
        p = p * r + c;
    }
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3F80_0000));
    let value = (p * r * r + r + 1.0) * scale;
    if x > -87.0 { value } else { 0.0 }
}

/// The smallest set of largest weights that holds so many, or so large a part of the total.
#[derive(Debug, Clone, Copy)]
pub enum Share {
    Count(usize),
    Mass(f64),
}

/// Scratch of [`Cut::keep`]: what falls into each of the values that the next bits of a weight can have.
pub struct Cut {
    counts: Vec<u32>,
    masses: Vec<f64>,
}

impl Default for Cut {
    fn default() -> Cut {
        Cut { counts: vec![0; BUCKETS], masses: vec![0.0; BUCKETS] }
    }
}

const BUCKETS: usize = 1 << 11;
/// A weight's 32 bits from the top, 11, 11 and 10 at a time: (shift, bits).
const LEVELS: [(u32, u32); 3] = [(21, 11), (10, 11), (0, 10)];

impl Cut {
    /// Zeroes all weights but the largest that make up `share`; of equal ones, the first stay. Weights are in [0, 1],
    /// so their bits are in their order: the threshold is found by a radix search.
    pub fn keep(&mut self, weights: &mut [f32], share: Share) {
        let (threshold, mut ties) = self.threshold(weights, share);
        for weight in weights.iter_mut().filter(|weight| weight.to_bits() <= threshold) {
            if weight.to_bits() == threshold && ties > 0 {
                ties -= 1;
            } else {
                *weight = 0.0;
            }
        }
    }

    /// The bits of the smallest weight that stays, and how many of just that weight do.
    fn threshold(&mut self, weights: &[f32], share: Share) -> (u32, usize) {
        let goal = match share {
            Share::Count(count) => count as f64,
            Share::Mass(part) => part * total(weights),
        };
        let by_mass = matches!(share, Share::Mass(_));
        let (mut prefix, mut reached) = (0u32, 0.0);
        for (shift, bits) in LEVELS {
            self.fill(weights, prefix, shift, bits);
            let amount = |bucket: usize| match by_mass {
                true => self.masses[bucket],
                false => f64::from(self.counts[bucket]),
            };
            let mut below = (0..1usize << bits).rev().filter(|&bucket| self.counts[bucket] > 0);
            let Some(mut bucket) = below.next() else { return (0, 0) };
            // Where the goal is out of reach, by what was asked or by rounding, the lowest bucket is the one.
            while reached + amount(bucket) < goal
                && let Some(lower) = below.next()
            {
                reached += amount(bucket);
                bucket = lower;
            }
            prefix = prefix << bits | bucket as u32;
        }
        let count = self.counts[(prefix & 0x3FF) as usize] as usize;
        let missing = goal - reached;
        let ties = if by_mass { missing / f64::from(f32::from_bits(prefix)) } else { missing };
        (prefix, (ties.ceil().max(1.0) as usize).min(count))
    }

    fn fill(&mut self, weights: &[f32], prefix: u32, shift: u32, bits: u32) {
        self.counts[..1 << bits].fill(0);
        self.masses[..1 << bits].fill(0.0);
        for &weight in weights.iter().filter(|&&weight| weight > 0.0) {
            let key = weight.to_bits() >> shift;
            if u64::from(key) >> bits == u64::from(prefix) {
                let bucket = (key & ((1 << bits) - 1)) as usize;
                self.counts[bucket] += 1;
                self.masses[bucket] += f64::from(weight);
            }
        }
    }
}

pub fn total(weights: &[f32]) -> f64 {
    weights.chunks(BLOCK).map(|block| sum_of(block.iter().copied())).sum()
}

/// The index at `unit` (in [0, 1)) of the way through the weights, which are not all 0.
pub fn draw(weights: &[f32], unit: f64, sums: &mut Vec<f64>) -> usize {
    sums.clear();
    sums.extend(weights.chunks(BLOCK).map(|block| sum_of(block.iter().copied())));
    let mut rest = unit * sums.iter().sum::<f64>();
    let mut chosen = None;
    for (block, &sum) in sums.iter().enumerate().filter(|&(_, &sum)| sum > 0.0) {
        chosen = Some(block);
        if rest < sum {
            break;
        }
        rest -= sum;
    }
    // Rounding may use up the last block's share, and the last weight's: then it is the last that counts.
    let block = chosen.expect("the likeliest token has weight 1");
    let from = block * BLOCK;
    let mut last = from;
    for (at, &weight) in weights[from..].iter().take(BLOCK).enumerate().filter(|&(_, &weight)| weight > 0.0) {
        last = from + at;
        if rest < f64::from(weight) {
            break;
        }
        rest -= f64::from(weight);
    }
    last
}

/// Eight sums side by side, then their sum.
fn sum_of(values: impl Iterator<Item = f32>) -> f64 {
    let mut lanes = [0.0f64; 8];
    values.enumerate().for_each(|(at, value)| lanes[at % 8] += f64::from(value));
    lanes.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_broken_row_has_no_peak() {
        for at in [0, 15, 16, 36] {
            let mut row = vec![1.0f32; 37];
            assert_eq!(peak(&row), Some(1.0));
            for bad in [f32::NAN, f32::INFINITY] {
                row[at] = bad;
                assert_eq!(peak(&row), None, "{bad} at {at}");
            }
            row[at] = f32::NEG_INFINITY;
            assert_eq!(peak(&row), Some(1.0));
        }
        assert_eq!(peak(&[]), None);
        assert_eq!(peak(&[f32::NEG_INFINITY; 20]), None);
    }

    #[test]
    fn exponentials_are_close_and_in_order() {
        let mut before = 0.0;
        for step in 0..900_000 {
            let x = -90.0 + step as f32 / 10_000.0;
            let (got, expect) = (exp(x), f64::from(x).exp());
            let error = (f64::from(got) - expect).abs() / expect;
            assert!(if x > -87.0 { error < 3e-7 } else { got == 0.0 }, "{x}: {got} {expect}");
            assert!(got >= before * (1.0 - 3e-7), "{x}");
            before = got;
        }
        assert_eq!((exp(0.0), exp(f32::NEG_INFINITY)), (1.0, 0.0));
    }

    /// By sorting: what [`Cut::keep`] does without.
    fn kept_by_sorting(weights: &[f32], share: Share) -> Vec<usize> {
        let mut order: Vec<usize> = (0..weights.len()).filter(|&at| weights[at] > 0.0).collect();
        order.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]).then(a.cmp(&b)));
        let goal = match share {
            Share::Count(count) => count as f64,
            Share::Mass(part) => part * total(weights),
        };
        let mut reached = 0.0;
        let kept = order.iter().position(|&at| {
            reached += if matches!(share, Share::Count(_)) { 1.0 } else { f64::from(weights[at]) };
            reached >= goal
        });
        order.truncate(kept.map_or(order.len(), |at| at + 1));
        order.sort_unstable();
        order
    }

    proptest! {
        /// Weights are multiples of 1/64: sums are exact, whatever their order.
        #[test]
        fn a_cut_keeps_what_sorting_would(
            steps in prop::collection::vec(0u32..=64, 0..300),
            count in 1usize..320,
            part in 1u32..=64,
        ) {
            let weights: Vec<f32> = steps.iter().chain(&[64]).map(|&step| step as f32 / 64.0).collect();
            for share in [Share::Count(count), Share::Mass(f64::from(part) / 64.0)] {
                let mut cut = weights.clone();
                Cut::default().keep(&mut cut, share);
                let kept: Vec<usize> = (0..cut.len()).filter(|&at| cut[at] > 0.0).collect();
                prop_assert_eq!(&kept, &kept_by_sorting(&weights, share), "{:?}", share);
                prop_assert!(kept.iter().all(|&at| cut[at] == weights[at]));
            }
        }

        #[test]
        fn a_draw_finds_the_weight_it_falls_on(
            steps in prop::collection::vec(0u32..4, 1..300),
            unit in 0.0f64..1.0,
        ) {
            let weights: Vec<f32> = steps.iter().chain(&[4]).map(|&step| step as f32 / 4.0).collect();
            let at = draw(&weights, unit, &mut Vec::new());
            let before: f64 = weights[..at].iter().map(|&w| f64::from(w)).sum();
            let target = unit * total(&weights);
            prop_assert!(weights[at] > 0.0);
            prop_assert!(before <= target && target < before + f64::from(weights[at]));
        }
    }
}
