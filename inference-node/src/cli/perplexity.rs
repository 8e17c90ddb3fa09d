//! `sluice-node perplexity`: how well a model predicts a text, as one number that says what a dtype costs in quality.
//!
//! ```text
//! text -> ids   | window 0        | window 1        | rest |
//! scored        |  x x x x x x x  |  x x x x x x x  |  x x |     each window from an empty state, its first token given
//! ```

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, ensure};

use crate::kernel::Dtype;
use crate::model::{LoadOptions, Logits, Model, Runner, Span};
use crate::node::name_of;
use crate::state::{CacheLimits, StateCache};
use crate::tokenizer::Tokenizer;

/// Tokens of one pass: bounds the memory of activations and logits whatever the window.
const CHUNK_TOKENS: usize = 256;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Hugging Face directory of the model
    #[arg(long, value_name = "DIR")]
    model: PathBuf,

    /// Text to predict, UTF-8; one that the model was not trained on
    #[arg(long, value_name = "FILE")]
    file: PathBuf,

    /// Tokens predicted from one empty state, at most the model's context
    #[arg(long, value_name = "N", default_value_t = 512)]
    window: usize,

    /// What weights are stored and multiplied as [default: bf16 where the checkpoint is bf16, else f32]
    #[arg(long, value_enum, value_name = "DTYPE")]
    dtype: Option<Dtype>,

    /// Threads that compute [default: all]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let mut options = LoadOptions::default();
    options.threads = args.threads.unwrap_or(options.threads);
    options.dtype = args.dtype;
    ensure!(options.threads > 0, "--threads must be at least 1");
    ensure!(args.window > 1, "--window must be at least 2: the first token is given");
    let model = Arc::new(Model::load(&args.model, &options).context("cannot load the model")?);
    let context = model.config().context_tokens_max;
    ensure!(args.window <= context, "--window is {}, more than the context of {context}", args.window);
    let ids = read_ids(&args.model, &args.file, model.config().vocab_size)?;
    ensure!(ids.len() > 1, "--file: {} has fewer than two tokens", args.file.display());

    let (kernel, dtype) = (model.kernel_name(), model.dtype().name());
    let mut runner = Runner::new(model, options.threads);
    let score = score(&mut runner, &ids, args.window);
    let (perplexity, nats) = (score.perplexity(), score.nats / score.tokens as f64);
    if args.json {
        let fields = serde_json::json!({
            "model": name_of(&args.model), "file": args.file, "kernel": kernel, "dtype": dtype, "window": args.window,
            "tokens": score.tokens, "nats_per_token": nats, "perplexity": perplexity,
        });
        println!("{fields}");
    } else {
        println!(
            "perplexity {perplexity:.4} ({nats:.5} nats a token over {} tokens, {kernel})",
            score.tokens
        );
    }
    Ok(())
}

fn read_ids(model: &Path, file: &Path, vocabulary: usize) -> anyhow::Result<Vec<u32>> {
    let tokenizer = Tokenizer::load(model, vocabulary)?;
    let text =
        std::fs::read_to_string(file).with_context(|| format!("--file: cannot read {}", file.display()))?;
    Ok(tokenizer.encode_text(&text)?)
}

#[derive(Debug, Default)]
struct Score {
    /// Tokens predicted.
    tokens: usize,
    /// Their summed surprise, `-ln p`.
    nats: f64,
}

impl Score {
    fn perplexity(&self) -> f64 {
        (self.nats / self.tokens as f64).exp()
    }
}

/// Every token of `ids` but the first of each window, predicted from those before it in the window.
fn score(runner: &mut Runner, ids: &[u32], window: usize) -> Score {
    let vocabulary = runner.model().config().vocab_size;
    let mut cache = StateCache::new(runner.model().config(), CacheLimits { slots: 1, tokens: window });
    let mut score = Score::default();
    for given in ids.chunks(window) {
        let slot = cache.acquire(given.len()).expect("the cache was made for one window");
        // The last token of a window is predicted and predicts nothing.
        let (inputs, targets) = (&given[..given.len() - 1], &given[1..]);
        for (tokens, targets) in inputs.chunks(CHUNK_TOKENS).zip(targets.chunks(CHUNK_TOKENS)) {
            let logits = runner.forward(&mut cache, &[Span { slot: &slot, tokens, logits: Logits::All }]);
            for (row, &target) in logits.chunks_exact(vocabulary).zip(targets) {
                score.nats += surprise(row, target);
                score.tokens += 1;
            }
        }
        cache.release(slot);
    }
    score
}

/// `-ln softmax(row)[target]`, in f64 with the largest logit taken out.
fn surprise(row: &[f32], target: u32) -> f64 {
    let largest = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = row.iter().map(|&logit| (f64::from(logit) - largest).exp()).sum();
    largest + sum.ln() - f64::from(row[target as usize])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;
    use crate::kernel::Dtype;
    use crate::model::reference_logits;

    #[test]
    fn surprise_is_the_negative_log_of_the_softmax() {
        let check = |row: &[f32], target, probability: f64| {
            let found = (-surprise(row, target)).exp();
            assert!((found - probability).abs() < 1e-12, "{row:?}[{target}]: {found}");
        };
        check(&[0.0, 0.0, 0.0, 0.0], 2, 0.25);
        check(&[1e4, 1e4 - 1.0], 1, 1.0 / (1.0 + 1f64.exp()));
        check(&[-1e4, -1e4], 0, 0.5);
    }

    /// Windows that end inside a chunk, on one and beyond one: the same sum as from the float64 recurrence.
    #[test]
    fn every_window_is_scored_from_an_empty_state() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/text-01");
        let checkpoint = Checkpoint::open(&dir).expect("a golden opens");
        let options = LoadOptions { threads: 2, dtype: Some(Dtype::F32) };
        let model = Arc::new(Model::load(&dir, &options).expect("a golden loads"));
        let vocabulary = model.config().vocab_size as u32;
        let ids: Vec<u32> = (0..CHUNK_TOKENS as u32 + 40).map(|i| i * 31 % vocabulary).collect();
        let mut runner = Runner::new(model, 2);
        for window in [2, 70, CHUNK_TOKENS + 1, 1000] {
            let (mut nats, mut tokens) = (0.0, 0);
            for given in ids.chunks(window) {
                let rows = reference_logits(&checkpoint, given).expect("a golden loads");
                for (row, &target) in rows.iter().zip(&given[1..]) {
                    let sum: f64 = row.iter().map(|logit| logit.exp()).sum();
                    nats += sum.ln() - row[target as usize];
                    tokens += 1;
                }
            }
            let found = score(&mut runner, &ids, window);
            assert_eq!(found.tokens, tokens, "window {window}");
            assert!((found.nats - nats).abs() < 1e-3 * nats, "window {window}: {} for {nats}", found.nats);
        }
    }
}
