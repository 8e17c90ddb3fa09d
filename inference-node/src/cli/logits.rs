//! `sluice-node logits`: the model's raw answer for a list of token ids, for comparison with other implementations.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, ensure};

use crate::kernel::Dtype;
use crate::model::{LoadOptions, Logits, Model, Runner, Span};
use crate::state::{CacheLimits, StateCache};

/// Tokens of one pass: bounds the memory of activations and logits whatever the length.
const CHUNK_TOKENS: usize = 256;

#[derive(Debug, clap::Args)]
pub struct LogitsArgs {
    /// Model directory: config.json and safetensors weights.
    #[arg(long, value_name = "DIR")]
    pub model: PathBuf,
    /// Token ids, separated by commas.
    #[arg(long, value_name = "IDS", value_delimiter = ',', required = true)]
    pub ids: Vec<u32>,
    /// Print `{"logits": [[..], ..]}`, one row a position (otherwise the most likely token of each).
    #[arg(long)]
    pub json: bool,
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// What weights are stored and multiplied as [default: bf16 where the checkpoint is bf16, else f32].
    #[arg(long, value_enum, value_name = "DTYPE")]
    pub dtype: Option<Dtype>,
}

pub fn run(args: LogitsArgs) -> anyhow::Result<()> {
    let default = LoadOptions::default();
    let options = LoadOptions { threads: args.threads.unwrap_or(default.threads), dtype: args.dtype };
    let model = Arc::new(Model::load(&args.model, &options).context("cannot load the model")?);
    let vocabulary = model.config().vocab_size;
    let outside = args.ids.iter().find(|&&id| id as usize >= vocabulary);
    ensure!(
        outside.is_none(),
        "--ids: {} is not below the vocabulary size {vocabulary}",
        outside.unwrap_or(&0)
    );
    let mut cache = StateCache::new(model.config(), CacheLimits { slots: 1, tokens: args.ids.len() });
    let slot = cache.acquire(args.ids.len()).context("no room for the sequence")?;
    let mut runner = Runner::new(model, options.threads);
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    if args.json {
        write!(out, "{{\"logits\":[")?;
    }
    for (index, tokens) in args.ids.chunks(CHUNK_TOKENS).enumerate() {
        let logits = runner.forward(&mut cache, &[Span { slot: &slot, tokens, logits: Logits::All }]);
        for (offset, row) in logits.chunks_exact(vocabulary).enumerate() {
            let position = index * CHUNK_TOKENS + offset;
            if args.json {
                write!(out, "{}", if position == 0 { "" } else { "," })?;
                serde_json::to_writer(&mut out, row)?;
            } else {
                let best = (0..vocabulary).fold(0, |best, id| if row[id] > row[best] { id } else { best });
                writeln!(out, "{position}\t{best}\t{}", row[best])?;
            }
        }
    }
    if args.json {
        writeln!(out, "]}}")?;
    }
    cache.release(slot);
    out.flush().context("cannot write to standard output")
}
