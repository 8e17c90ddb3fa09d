//! `sluice-node bench --mixer`: one lightning layer's mixer against one softmax layer's, at one length.
//!
//! Only what differs between the two is timed: no projections, norms or experts. Prefill is the whole prompt in chunks, as the engine cuts
//! it; decode is one token at that length.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, ensure};

use super::bench::TOKENS_MAX;
use crate::config::ModelConfig;
use crate::kernel::{AttentionSpan, Cpu, Decay, Heads, Kernel, LightningSpan};
use crate::state::{BLOCK_TOKENS, LightningState, Page};

/// Tokens of one pass of prefill.
const CHUNK_TOKENS: usize = 512;
/// Tokens decoded; the median counts.
const DECODE_STEPS: usize = 33;

pub(super) fn run(model: &Path, length: usize, threads: usize, json: bool) -> anyhow::Result<()> {
    ensure!(threads > 0, "--threads must be at least 1");
    ensure!(length <= TOKENS_MAX, "--prompt-tokens must be at most {TOKENS_MAX}");
    let path = model.join("config.json");
    let bytes = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let config = ModelConfig::parse(&bytes).with_context(|| path.display().to_string())?;
    let context = config.context_tokens_max;
    ensure!(length <= context, "--prompt-tokens is {length}, more than the context of {context}");
    let mut bench = Bench::new(&config, threads);
    let (lightning, softmax) = (bench.lightning(length), bench.softmax(length));
    if json {
        println!(
            "{}",
            serde_json::json!({
                "length": length, "threads": threads, "kernel": Cpu::kind(crate::kernel::Dtype::F32),
                "heads": config.heads, "kv_heads": config.kv_heads, "head_dim": config.head_dim,
                "lightning_us": lightning.prefill_us, "softmax_us": softmax.prefill_us,
                "lightning_decode_us": lightning.decode_us, "softmax_decode_us": softmax.decode_us,
                "lightning_state_bytes": lightning.bytes, "softmax_state_bytes": softmax.bytes,
            })
        );
        return Ok(());
    }
    println!("one layer's mixer at {length} tokens: {} heads of {}", config.heads, config.head_dim);
    println!("           {:>15}  {:>15}  {:>8}", "lightning", "softmax", "saved");
    let row = |what: &str, lightning: f64, softmax: f64, unit: &str| {
        let saved = 100.0 * (1.0 - lightning / softmax);
        println!("{what:8}   {lightning:12.1} {unit}  {softmax:12.1} {unit}  {saved:6.1} %");
    };
    row("prefill", lightning.prefill_us / 1e3, softmax.prefill_us / 1e3, "ms");
    row("decode", lightning.decode_us, softmax.decode_us, "us");
    row("state", lightning.bytes as f64 / 1024.0, softmax.bytes as f64 / 1024.0, "Ki");
    Ok(())
}

struct Figures {
    prefill_us: f64,
    decode_us: f64,
    bytes: usize,
}

struct Bench {
    kernel: Cpu,
    heads: Heads,
    slopes: Vec<f64>,
}

impl Bench {
    fn new(config: &ModelConfig, threads: usize) -> Bench {
        let heads = Heads { heads: config.heads, kv_heads: config.kv_heads, head_dim: config.head_dim };
        Bench { kernel: Cpu::new(threads), heads, slopes: config.slopes(config.layers.len() / 2) }
    }

    fn lightning(&mut self, length: usize) -> Figures {
        let Heads { heads, head_dim: d, .. } = self.heads;
        let shape = Heads { kv_heads: heads, ..self.heads };
        let decay = Decay::new(&self.slopes);
        let mut state = LightningState {
            state: vec![0.0; heads * d * d],
            keys: vec![0.0; heads * d * BLOCK_TOKENS],
            values: vec![0.0; heads * d * BLOCK_TOKENS],
        };
        let bytes = (state.state.len() + state.keys.len() + state.values.len()) * size_of::<f32>();
        let kernel = &mut self.kernel;
        let pass = |position: usize, rows: usize, qkv: &[f32], out: &mut [f32]| {
            let mut spans = [LightningSpan { state: &mut state, position, rows }];
            kernel.lightning(shape, &decay, &mut spans, qkv, out);
        };
        timed(length, 3 * heads * d, heads * d, bytes, pass)
    }

    fn softmax(&mut self, length: usize) -> Figures {
        let Heads { heads, kv_heads, head_dim: d } = self.heads;
        let page_floats = kv_heads * 2 * d * BLOCK_TOKENS;
        let pages = (length + DECODE_STEPS).div_ceil(BLOCK_TOKENS);
        let mut pages: Vec<Page> = (0..pages).map(|_| Page::zeroed(page_floats)).collect();
        let bytes = length.div_ceil(BLOCK_TOKENS) * page_floats * size_of::<f32>();
        let (kernel, shape) = (&mut self.kernel, self.heads);
        let pass = |position: usize, rows: usize, qkv: &[f32], out: &mut [f32]| {
            let mut spans = [AttentionSpan { pages: &mut pages, offset: 0, position, rows }];
            kernel.attention(shape, &mut spans, qkv, out);
        };
        timed(length, (heads + 2 * kv_heads) * d, heads * d, bytes, pass)
    }
}

/// `pass(position, rows, qkv, out)` over a prompt of `length`, then token by token.
fn timed(
    length: usize,
    width_in: usize,
    width_out: usize,
    bytes: usize,
    mut pass: impl FnMut(usize, usize, &[f32], &mut [f32]),
) -> Figures {
    let chunk = CHUNK_TOKENS.min(length);
    let qkv: Vec<f32> = (0..chunk * width_in).map(|i| (i * 7919 % 1009) as f32 / 1009.0 - 0.5).collect();
    let mut out = vec![0.0; chunk * width_out];
    let started_at = Instant::now();
    for position in (0..length).step_by(chunk) {
        let rows = chunk.min(length - position);
        pass(position, rows, &qkv[..rows * width_in], &mut out[..rows * width_out]);
    }
    let prefill_us = started_at.elapsed().as_secs_f64() * 1e6;
    let mut steps = [0.0; DECODE_STEPS];
    for (index, step) in steps.iter_mut().enumerate() {
        let started_at = Instant::now();
        pass(length + index, 1, &qkv[..width_in], &mut out[..width_out]);
        *step = started_at.elapsed().as_secs_f64() * 1e6;
    }
    steps.sort_by(f64::total_cmp);
    Figures { prefill_us, decode_us: steps[DECODE_STEPS / 2], bytes }
}
