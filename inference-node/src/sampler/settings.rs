//! How a sequence chooses its tokens: numbers as they came, and the same numbers once they are valid.

use std::sync::Arc;

/// Token ids that a request may bias.
pub const LOGIT_BIAS_MAX: usize = 1024;
/// A bias this large makes a token certain, or impossible, whatever the model says.
pub const LOGIT_BIAS_LIMIT: f32 = 100.0;
/// Likeliest tokens that a request may see beside the chosen one.
pub const TOP_LOGPROBS_MAX: u32 = 20;

/// A request's numbers, unchecked. The default is greedy.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// 0 is greedy.
    pub temperature: f32,
    /// 0 means no limit.
    pub top_p: f32,
    /// 0 means no limit.
    pub top_k: u32,
    /// 0 means no limit.
    pub min_p: f32,
    /// 0 and 1 mean none.
    pub repetition_penalty: f32,
    pub frequency_penalty: f32,
    pub presence_penalty: f32,
    pub logit_bias: Vec<(u32, f32)>,
    pub seed: u64,
}

impl Default for Settings {
    fn default() -> Settings {
        Settings {
            temperature: 0.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

/// How a sequence chooses its tokens. Valid by construction.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    pub(super) temperature: f32,
    pub(super) top_p: f32,
    pub(super) top_k: usize,
    pub(super) min_p: f32,
    pub(super) seed: u64,
    pub(super) penalties: Penalties,
    pub(super) logit_bias: Arc<[(u32, f32)]>,
}

/// What is taken from the logits of tokens that the sequence holds already.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Penalties {
    /// Divides a positive logit and multiplies a negative one, of tokens in the prompt or the output. 1 is none.
    pub repetition: f32,
    /// Taken once for each time the token is in the output.
    pub frequency: f32,
    /// Taken once if the token is in the output.
    pub presence: f32,
}

#[derive(Debug, thiserror::Error, PartialEq)]
pub enum SamplingError {
    #[error("must be a finite number of at least 0, not {0}")]
    Temperature(f32),
    #[error("must be in (0, 1], or 0 for no limit, not {0}")]
    TopP(f32),
    #[error("must be in [0, 1], not {0}")]
    MinP(f32),
    #[error("must be in [0.1, 10], or 0 for none, not {0}")]
    RepetitionPenalty(f32),
    #[error("must be in [-2, 2], not {0}")]
    FrequencyPenalty(f32),
    #[error("must be in [-2, 2], not {0}")]
    PresencePenalty(f32),
    #[error("biases {0} tokens; at most {LOGIT_BIAS_MAX} can be")]
    LogitBiasCount(usize),
    #[error(
        "gives the token {id} {bias}; a bias must be in [-{LOGIT_BIAS_LIMIT}, {LOGIT_BIAS_LIMIT}], and each \
             token named once"
    )]
    LogitBias { id: u32, bias: f32 },
}

impl SamplingError {
    pub fn field(&self) -> &'static str {
        match self {
            SamplingError::Temperature(_) => "temperature",
            SamplingError::TopP(_) => "top_p",
            SamplingError::MinP(_) => "min_p",
            SamplingError::RepetitionPenalty(_) => "repetition_penalty",
            SamplingError::FrequencyPenalty(_) => "frequency_penalty",
            SamplingError::PresencePenalty(_) => "presence_penalty",
            SamplingError::LogitBiasCount(_) | SamplingError::LogitBias { .. } => "logit_bias",
        }
    }
}

impl Sampling {
    pub fn greedy() -> Sampling {
        Sampling::try_from(Settings::default()).expect("the defaults are valid")
    }

    /// `temperature` 0 is greedy; `top_p` 0 and `top_k` 0 mean no limit.
    pub fn new(temperature: f32, top_p: f32, top_k: u32, seed: u64) -> Result<Sampling, SamplingError> {
        Sampling::try_from(Settings { temperature, top_p, top_k, seed, ..Settings::default() })
    }

    /// The ids it names, which only the caller can compare with a vocabulary.
    pub fn biased_ids(&self) -> impl Iterator<Item = u32> {
        self.logit_bias.iter().map(|&(id, _)| id)
    }
}

impl TryFrom<Settings> for Sampling {
    type Error = SamplingError;

    fn try_from(settings: Settings) -> Result<Sampling, SamplingError> {
        let Settings { temperature, top_p, top_k, min_p, seed, .. } = settings;
        if !(temperature.is_finite() && temperature >= 0.0) {
            return Err(SamplingError::Temperature(temperature));
        }
        if !(0.0..=1.0).contains(&top_p) {
            return Err(SamplingError::TopP(top_p));
        }
        if !(0.0..=1.0).contains(&min_p) {
            return Err(SamplingError::MinP(min_p));
        }
        Ok(Sampling {
            temperature,
            top_p: if top_p == 0.0 { 1.0 } else { top_p },
            top_k: top_k as usize,
            min_p,
            seed,
            penalties: Penalties::of(&settings)?,
            logit_bias: logit_bias(settings.logit_bias)?,
        })
    }
}

impl Penalties {
    fn of(settings: &Settings) -> Result<Penalties, SamplingError> {
        let repetition = match settings.repetition_penalty {
            0.0 => 1.0,
            given => given,
        };
        if !(0.1..=10.0).contains(&repetition) {
            return Err(SamplingError::RepetitionPenalty(repetition));
        }
        let (frequency, presence) = (settings.frequency_penalty, settings.presence_penalty);
        if !(-2.0..=2.0).contains(&frequency) {
            return Err(SamplingError::FrequencyPenalty(frequency));
        }
        if !(-2.0..=2.0).contains(&presence) {
            return Err(SamplingError::PresencePenalty(presence));
        }
        Ok(Penalties { repetition, frequency, presence })
    }

    pub fn reads_prompt(&self) -> bool {
        self.repetition != 1.0
    }

    pub fn counts_output(&self) -> bool {
        self.frequency != 0.0 || self.presence != 0.0
    }
}

/// In order of ids, so that equal requests compare equal.
fn logit_bias(mut biases: Vec<(u32, f32)>) -> Result<Arc<[(u32, f32)]>, SamplingError> {
    if biases.len() > LOGIT_BIAS_MAX {
        return Err(SamplingError::LogitBiasCount(biases.len()));
    }
    biases.sort_unstable_by_key(|&(id, _)| id);
    let twice = biases.windows(2).find(|pair| pair[0].0 == pair[1].0).map(|pair| pair[1]);
    let beyond = |bias: f32| !(-LOGIT_BIAS_LIMIT..=LOGIT_BIAS_LIMIT).contains(&bias);
    if let Some((id, bias)) = twice.or_else(|| biases.iter().copied().find(|&(_, bias)| beyond(bias))) {
        return Err(SamplingError::LogitBias { id, bias });
    }
    Ok(biases.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn refused(change: impl FnOnce(&mut Settings), field: &str) {
        let mut settings = Settings::default();
        change(&mut settings);
        let error = Sampling::try_from(settings).expect_err("nonsense");
        assert_eq!(error.field(), field);
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        for bad in [-1.0, f32::NAN, f32::INFINITY] {
            refused(|s| s.temperature = bad, "temperature");
            refused(|s| s.min_p = bad, "min_p");
            refused(|s| s.repetition_penalty = bad, "repetition_penalty");
        }
        for bad in [1.5, f32::NAN] {
            refused(|s| s.top_p = bad, "top_p");
        }
        for bad in [-2.1, 2.1, f32::NAN] {
            refused(|s| s.frequency_penalty = bad, "frequency_penalty");
            refused(|s| s.presence_penalty = bad, "presence_penalty");
        }
        for bad in [-100.5, f32::NAN, f32::INFINITY] {
            refused(|s| s.logit_bias = vec![(3, bad)], "logit_bias");
        }
        refused(|s| s.logit_bias = vec![(3, 1.0), (3, 1.0)], "logit_bias");
        refused(|s| s.logit_bias = (0..1025).map(|id| (id, 1.0)).collect(), "logit_bias");
    }

    #[test]
    fn zeros_of_the_wire_mean_no_limit() {
        let zeros = Settings { top_p: 0.0, repetition_penalty: 0.0, ..Settings::default() };
        assert_eq!(Sampling::try_from(zeros), Ok(Sampling::greedy()));
        let edges = Settings {
            top_p: 1.0,
            min_p: 1.0,
            frequency_penalty: -2.0,
            presence_penalty: 2.0,
            logit_bias: vec![(9, -100.0), (1, 100.0)],
            ..Settings::default()
        };
        let edges = Sampling::try_from(edges).expect("the edges are inside");
        assert_eq!(edges.biased_ids().collect::<Vec<_>>(), [1, 9]);
    }
}
