//! Log-probabilities of the model's own distribution: before temperature, penalties, biases and masks.

use super::weights::{log_sum_exp, peak};

#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    pub id: u32,
    pub logprob: f32,
    /// The likeliest tokens, likeliest first; of equal ones, the lower id first.
    pub top: Vec<(u32, f32)>,
}

impl TokenLogprobs {
    /// Of `chosen`, and of the `top` likeliest, in a row whose largest element is finite.
    pub fn of(row: &[f32], chosen: u32, top: usize) -> TokenLogprobs {
        let total = log_sum_exp(row, peak(row).unwrap_or(f32::NAN));
        let logprob = |logit: f32| (f64::from(logit) - total) as f32;
        let top = likeliest(row, top).into_iter().map(|(id, logit)| (id, logprob(logit))).collect();
        TokenLogprobs { id: chosen, logprob: logprob(row[chosen as usize]), top }
    }
}

fn likeliest(row: &[f32], count: usize) -> Vec<(u32, f32)> {
    let mut best: Vec<(u32, f32)> = Vec::with_capacity(count + 1);
    if count == 0 {
        return best;
    }
    for (&logit, id) in row.iter().zip(0u32..) {
        // Ids rise: an equal logit that comes later stays behind.
        if best.len() == count && logit <= best[count - 1].1 {
            continue;
        }
        let at = best.partition_point(|&(_, other)| other >= logit);
        best.insert(at, (id, logit));
        best.truncate(count);
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_are_those_of_the_softmax() {
        let row = [1.0f32, 3.0, f32::NEG_INFINITY, 3.0, 2.0];
        let total: f64 = row.iter().map(|&l| f64::from(l).exp()).sum();
        let expect = |id: usize| (f64::from(row[id]).exp() / total).ln() as f32;
        let got = TokenLogprobs::of(&row, 4, 3);
        assert_eq!(got.top.iter().map(|&(id, _)| id).collect::<Vec<_>>(), [1, 3, 4]);
        for (id, logprob) in got.top.iter().copied().chain([(got.id, got.logprob)]) {
            assert!((logprob - expect(id as usize)).abs() < 1e-6, "{id}: {logprob}");
        }
        assert_eq!(
            TokenLogprobs::of(&row, 2, 0),
            TokenLogprobs { id: 2, logprob: f32::NEG_INFINITY, top: vec![] }
        );
        let all = TokenLogprobs::of(&row, 0, 20);
        assert_eq!(all.top.len(), 5);
        let sum: f64 = all.top.iter().map(|&(_, logprob)| f64::from(logprob).exp()).sum();
        assert!((sum - 1.0).abs() < 1e-6, "{sum}");
    }
}
