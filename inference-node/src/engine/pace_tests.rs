//! The pace against machines that are nothing but formulas.

use super::*;
use crate::scheduler::SequenceId;
use proptest::prelude::*;

const CONFIG: &[u8] =
    br#"{"model_type": "minimax", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 32,
    "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"], "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16,
    "rope_theta": 10000.0, "max_position_embeddings": 10240}"#;

fn pace(mixed_step_ratio: f64) -> Pace {
    Pace::new(&ModelConfig::parse(CONFIG).expect("valid"), 5_000_000, mixed_step_ratio)
}

/// `decoding` tokens of as many sequences, and a chunk of another's prompt.
fn batch(decoding: usize, from: usize, chunk: usize) -> Vec<Work> {
    let decode = |id| Work { id: SequenceId(id), from: 1000, tokens: 1, samples: true };
    let mut batch: Vec<Work> = (1..=decoding as u64).map(decode).collect();
    if chunk > 0 {
        batch.push(Work { id: SequenceId(0), from, tokens: chunk, samples: false });
    }
    batch
}

/// Seconds of a step: weights are read once, then each token costs, and attention more with its position.
#[derive(Debug, Clone, Copy)]
struct Machine {
    step_s: f64,
    token_s: f64,
    attention_s: f64,
}

impl Machine {
    fn step(&self, batch: &[Work]) -> Duration {
        let cost = |work: &Work| {
            let middle = work.from as f64 + work.tokens as f64 / 2.0;
            work.tokens as f64 * (self.token_s + self.attention_s * middle)
        };
        Duration::from_secs_f64(self.step_s + batch.iter().map(cost).sum::<f64>())
    }
}

/// Machines whose attention is up to 10 times as slow as the count of its multiplications says.
fn machine() -> impl Strategy<Value = Machine> {
    let growth = pace(2.5).cost_growth;
    (0.0005f64..0.05, 0.00002f64..0.005, 0.0f64..10.0).prop_map(move |(step_s, token_s, slower)| Machine {
        step_s,
        token_s,
        attention_s: token_s * growth * slower,
    })
}

proptest! {
    /// On any machine a long prompt gets through, and no mixed step but the first few takes much more than the ratio allows,
    /// unless the smallest chunk alone does: at the default of 2.5, less than 3 pure steps.
    #[test]
    fn mixed_steps_keep_to_the_ratio(machine in machine(), decoding in 1usize..33, ratio in 1.2f64..6.0) {
        const PROMPT: usize = 32_768;
        let mut pace = pace(ratio);
        let pure = machine.step(&batch(decoding, 0, 0)).as_secs_f64();
        let (mut at, mut steps, mut without) = (0, 0, 0);
        while at < PROMPT {
            let budget = pace.prompt_tokens_max(Ahead { decoding, prompt_at: Some(at) });
            let chunk = budget.min(PROMPT - at).min(512);
            let batch = batch(decoding, at, chunk);
            let took = machine.step(&batch);
            pace.observe(&batch, took);
            at += chunk;
            steps += 1;
            without += usize::from(chunk == 0);
            if chunk > CHUNK_TOKENS_MIN && steps > 6 {
                let allowed = pure * (1.0 + 1.25 * (ratio - 1.0));
                prop_assert!(took.as_secs_f64() <= allowed, "{took:?} at {at}, {chunk} tokens; alone {pure} s");
            }
        }
        prop_assert!(without <= 1 + steps / 32, "{without} of {steps} steps without a prompt");
        prop_assert!(steps <= PROMPT / CHUNK_TOKENS_MIN + without);
    }
}

#[test]
fn the_budget_is_used_up() {
    let machine = Machine { step_s: 0.010, token_s: 0.0005, attention_s: 0.0 };
    let mut pace = pace(2.5);
    let mut chunk = 0;
    for at in 0..20 {
        chunk = pace.prompt_tokens_max(Ahead { decoding: 16, prompt_at: Some(at * 64) });
        let batch = batch(16, at * 64, chunk);
        pace.observe(&batch, machine.step(&batch));
    }
    // 18 ms pure, so 27 ms are the prompt's: 54 tokens, less what the model of rising costs takes off.
    assert!((44..=54).contains(&chunk), "{chunk}");
}

#[test]
fn nobody_decoding_leaves_the_whole_step() {
    let pace = pace(2.5);
    assert_eq!(pace.prompt_tokens_max(Ahead { decoding: 0, prompt_at: Some(7) }), usize::MAX);
    assert_eq!(pace.prompt_tokens_max(Ahead { decoding: 3, prompt_at: None }), usize::MAX);
    assert_eq!(pace.prompt_tokens_max(Ahead { decoding: 3, prompt_at: Some(7) }), 0, "first it measures");
}

#[test]
fn one_slow_step_is_not_the_measure_of_all() {
    let mut pace = pace(2.5);
    for _ in 0..10 {
        pace.observe(&batch(4, 0, 0), Duration::from_millis(10));
    }
    pace.observe(&batch(4, 0, 0), Duration::from_secs(10));
    assert_eq!(pace.decode_s[4].map(|s| (s * 1e4).round()), Some(125.0));
}

#[test]
fn time_is_told_from_tokens() {
    let mut pace = pace(2.5);
    assert_eq!(pace.seconds_for(1000.0, 1000.0), 0.0);
    pace.observe(&batch(0, 0, 1), Duration::from_millis(2));
    pace.observe(&batch(4, 0, 0), Duration::from_millis(20));
    let seconds = pace.seconds_for(1000.0, 100.0);
    assert!((2.4..=2.5).contains(&seconds), "1000 x 2 ms + 100 x 5 ms, not {seconds}");

    assert_eq!(pace.output_tokens_left(0, 1000), 256.0);
    (0..200).for_each(|_| pace.ended(40));
    assert!((30.0..=31.0).contains(&pace.output_tokens_left(10, 1000)));
    assert_eq!(pace.output_tokens_left(100, 1000), 50.0, "it has outlived the average");
    assert_eq!(pace.output_tokens_left(0, 5), 5.0);
}

#[test]
fn a_deadline_is_hopeless_only_beyond_doubt() {
    let mut pace = pace(2.5);
    assert!(!pace.is_hopeless(1_000_000, Duration::from_millis(1)), "nothing is known yet");
    pace.observe(&batch(0, 0, 100), Duration::from_millis(100));
    pace.observe(&batch(0, 0, 100), Duration::from_secs(100));
    assert!(!pace.is_hopeless(100, Duration::from_millis(51)));
    assert!(pace.is_hopeless(100, Duration::from_millis(49)));
}

#[test]
fn size_classes_are_fine_and_few() {
    let classes: Vec<usize> = (1..=1024).map(size_class).collect();
    assert!(classes.is_sorted() && classes[..16].iter().eq(&(1..=16).collect::<Vec<_>>()));
    assert!(classes[1023] < 100);
}
