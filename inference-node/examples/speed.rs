//! Tokens a second of one model: `cargo run --release --example speed -- MODEL_DIR [THREADS [DTYPE]]`.
//!
//! Prefill is one pass of 512 tokens; decode is one token a pass for 1, 8 and 32 sequences that hold 64 tokens each. The best of
//! several rounds counts: a shared machine only ever makes a round slower.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use clap::ValueEnum;
use sluice_node::kernel::Dtype;
use sluice_node::model::{LoadOptions, Logits, Model, Runner, Span};
use sluice_node::state::{CacheLimits, Slot, StateCache};

const PREFILL_TOKENS: usize = 512;
const PROMPT_TOKENS: usize = 64;
const DECODE_STEPS: usize = 16;
const ROUNDS: usize = 2;

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let dir = PathBuf::from(args.next().context("usage: speed MODEL_DIR [THREADS [DTYPE]]")?);
    let default = LoadOptions::default().threads;
    let threads =
        args.next().map_or(Ok(default), |threads| threads.parse()).context("THREADS is a number")?;
    let start = Instant::now();
    let dtype =
        args.next().map(|name| Dtype::from_str(&name, true)).transpose().map_err(anyhow::Error::msg)?;
    let model = Arc::new(Model::load(&dir, &LoadOptions { threads, dtype })?);
    println!(
        "{} M parameters, {} M active, {}, {threads} threads, loaded in {:.2} s",
        model.parameters() / 1_000_000,
        model.active_parameters() / 1_000_000,
        model.kernel_name(),
        start.elapsed().as_secs_f64(),
    );
    let mut runner = Runner::new(model, threads);
    println!("prefill {PREFILL_TOKENS}: {:.0} tokens/s", best(|| prefill(&mut runner)));
    for sequences in [1, 8, 32] {
        println!("decode B={sequences}: {:.0} tokens/s", best(|| decode(&mut runner, sequences)));
    }
    Ok(())
}

fn best(mut round: impl FnMut() -> f64) -> f64 {
    (0..ROUNDS).map(|_| round()).fold(0.0, f64::max)
}

fn tokens(runner: &Runner, count: usize) -> Vec<u32> {
    (0..count as u32)
        .map(|i| i.wrapping_mul(2_654_435_761) % runner.model().config().vocab_size as u32)
        .collect()
}

fn prefill(runner: &mut Runner) -> f64 {
    let tokens = tokens(runner, PREFILL_TOKENS);
    let mut cache =
        StateCache::new(runner.model().config(), CacheLimits { slots: 1, tokens: PREFILL_TOKENS });
    let slot = cache.acquire(PREFILL_TOKENS).expect("the cache was made for it");
    let start = Instant::now();
    runner.forward(&mut cache, &[Span { slot: &slot, tokens: &tokens, logits: Logits::Last }]);
    let seconds = start.elapsed().as_secs_f64();
    cache.release(slot);
    PREFILL_TOKENS as f64 / seconds
}

fn decode(runner: &mut Runner, sequences: usize) -> f64 {
    let each = PROMPT_TOKENS + DECODE_STEPS;
    // A page more than the tokens fill: every sequence reserves whole pages.
    let limits = CacheLimits { slots: sequences, tokens: sequences * each.next_multiple_of(64) };
    let mut cache = StateCache::new(runner.model().config(), limits);
    let slots: Vec<Slot> =
        (0..sequences).map(|_| cache.acquire(each).expect("the cache was made for it")).collect();
    let tokens = tokens(runner, PROMPT_TOKENS + sequences);
    for (index, slot) in slots.iter().enumerate() {
        let prompt = &tokens[index..index + PROMPT_TOKENS];
        runner.forward(&mut cache, &[Span { slot, tokens: prompt, logits: Logits::None }]);
    }
    let start = Instant::now();
    for step in 0..DECODE_STEPS {
        let span = |(index, slot)| Span {
            slot,
            tokens: &tokens[(index + step) % PROMPT_TOKENS..][..1],
            logits: Logits::Last,
        };
        let spans: Vec<Span<'_>> = slots.iter().enumerate().map(span).collect();
        runner.forward(&mut cache, &spans);
    }
    let seconds = start.elapsed().as_secs_f64();
    slots.into_iter().for_each(|slot| cache.release(slot));
    (DECODE_STEPS * sequences) as f64 / seconds
}
