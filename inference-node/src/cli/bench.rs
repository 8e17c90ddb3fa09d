//! `sluice-node bench`: prefill and decode, apart, through the real engine.
//!
//! A grant of one token lets every sequence compute its prompt and one token, then pause: that is prefill. The grant of
//! the rest starts the decoding of all at once.

use super::bench_mixer;
use crate::engine::mailbox::{Ending, Grant};
use crate::engine::{Answer, Submission};
use crate::kernel::{Cpu, Dtype, Roofline};
use crate::model::{Cost, LoadOptions};
use crate::node::{Node, NodeOptions};
use anyhow::{bail, ensure};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// A prompt that reaches every expert, and no longer: a long prompt is not computed twice.
const WARM_UP_TOKENS: usize = 512;

/// Beyond these a figure is a typing error.
pub(super) const BATCH_MAX: usize = 4096;
pub(super) const TOKENS_MAX: usize = 1 << 26;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Hugging Face directory of the model
    #[arg(long, value_name = "DIR")]
    model: PathBuf,

    /// Prompt tokens of each sequence
    #[arg(long, value_name = "P", default_value_t = 512)]
    prompt_tokens: usize,

    /// Output tokens of each sequence
    #[arg(long, value_name = "N", default_value_t = 64)]
    new_tokens: usize,

    /// Sequences at the same time
    #[arg(long, value_name = "B", default_value_t = 1)]
    batch: usize,

    /// Threads that compute [default: all]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,

    /// Tokens computed in one step
    #[arg(long, value_name = "N")]
    step_tokens_max: Option<usize>,

    /// What weights are stored and multiplied as [default: bf16 where the checkpoint is bf16, else f32]
    #[arg(long, value_enum, value_name = "DTYPE")]
    dtype: Option<Dtype>,

    /// Time the mixer of one lightning layer against that of one softmax layer at P tokens, with the model's heads; needs
    /// its config.json alone
    #[arg(long)]
    mixer: bool,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    ensure!(args.prompt_tokens > 0, "--prompt-tokens must be at least 1");
    ensure!(args.new_tokens > 1, "--new-tokens must be at least 2: the first comes with the prompt");
    ensure!(args.batch > 0, "--batch must be at least 1");
    let threads = args.threads.unwrap_or(LoadOptions::default().threads);
    if args.mixer {
        return bench_mixer::run(&args.model, args.prompt_tokens, threads, args.json);
    }
    ensure!(args.batch <= BATCH_MAX, "--batch must be at most {BATCH_MAX}");
    ensure!(
        args.prompt_tokens.max(args.new_tokens) <= TOKENS_MAX,
        "--prompt-tokens and --new-tokens must be at most {TOKENS_MAX}"
    );
    if let Some(step) = args.step_tokens_max {
        ensure!(step > args.batch, "--step-tokens-max must be more than --batch ({})", args.batch);
    }
    let mut options = NodeOptions::new(&args.model);
    options.slots = args.batch;
    options.waiting_max = args.batch;
    options.dtype = args.dtype;
    options.threads = threads;
    options.step_tokens_max = args.step_tokens_max.unwrap_or(options.step_tokens_max.max(args.batch * 2));
    // What is measured is computed, every time.
    options.cache_ram_bytes = 0;
    options.cache_tokens = Some(args.batch * (args.prompt_tokens + args.new_tokens).next_multiple_of(256));
    let load_started_at = Instant::now();
    let node = Node::start(options)?;
    let load_s = load_started_at.elapsed().as_secs_f64();
    let model = &node.models()[0];
    let context = model.context_tokens_max as usize;
    ensure!(
        args.prompt_tokens + args.new_tokens <= context,
        "prompt and output exceed the context of {context}"
    );

    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    let (prefill, decode) = runtime.block_on(measure(&node, &args))?;
    let (peak, kept) = (resident_bytes("VmHWM:"), resident_bytes("VmRSS:"));
    let roofline = Cpu::new(threads).measure_roofline(node.dtype());
    let fractions = [&prefill, &decode].map(|phase| phase.floor_s(&roofline) / phase.seconds);
    if args.json {
        println!(
            "{}",
            serde_json::json!({
                "model": model.name, "kernel": model.kernel, "dtype": model.weights_dtype, "threads": threads,
                "parameters": model.parameters, "active_parameters": model.active_parameters,
                "prompt_tokens": args.prompt_tokens, "new_tokens": args.new_tokens, "batch": args.batch,
                "load_s": load_s,
                "prefill_tokens_per_second": prefill.tokens_per_second(),
                "decode_tokens_per_second": decode.tokens_per_second(),
                "prefill_fraction_of_floor": fractions[0], "decode_fraction_of_floor": fractions[1],
                "decode_bytes_per_token": decode.bytes() / decode.tokens as f64,
                "prefill_operations_per_token": prefill.operations() / prefill.tokens as f64,
                "read_bytes_per_second": roofline.read_bytes_per_second,
                "peak_operations_per_second": roofline.operations_per_second,
                "peak_rss_bytes": peak, "rss_bytes": kept,
            })
        );
    } else {
        println!("{} ({}, {threads} threads), loaded in {load_s:.2} s", model.name, model.kernel);
        for (name, phase, fraction) in
            [("prefill", &prefill, fractions[0]), ("decode", &decode, fractions[1])]
        {
            println!(
                "{name:8} {:10.1} tokens/s  ({} x {} tokens; {:.0} % of what memory and arithmetic allow)",
                phase.tokens_per_second(),
                args.batch,
                phase.tokens / args.batch,
                100.0 * fraction,
            );
        }
        println!(
            "machine  {:10.1} GB/s read, {:.0} G {} operations/s",
            roofline.read_bytes_per_second / 1e9,
            roofline.operations_per_second / 1e9,
            model.weights_dtype
        );
        println!("peak     {:10.1} MiB", peak.unwrap_or(0) as f64 / f64::from(1 << 20));
    }
    Ok(())
}

/// One phase of a run: what it took, and what it had to move and compute.
struct Phase {
    tokens: usize,
    seconds: f64,
    cost: Cost,
}

impl Phase {
    fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.seconds
    }

    fn bytes(&self) -> f64 {
        (self.cost.weight_bytes + self.cost.state_bytes) as f64
    }

    fn operations(&self) -> f64 {
        2.0 * self.cost.multiply_adds as f64
    }

    /// The shortest time that this machine's memory and arithmetic allow.
    fn floor_s(&self, roofline: &Roofline) -> f64 {
        let arithmetic_s = self.operations() / roofline.operations_per_second;
        (self.bytes() / roofline.read_bytes_per_second).max(arithmetic_s)
    }
}

async fn measure(node: &Node, args: &Args) -> anyhow::Result<(Phase, Phase)> {
    warm_up(node, args).await?;
    let before = cost(node).await;
    let started_at = Instant::now();
    let mut answers = Vec::with_capacity(args.batch);
    for index in 0..args.batch {
        answers
            .push(node.engine().submit(submission(node, args.prompt_tokens, args.new_tokens, index)).await?);
    }
    for answer in &mut answers {
        read_until(answer, 1).await?;
    }
    let prefill_s = started_at.elapsed().as_secs_f64();
    let between = cost(node).await;

    let started_at = Instant::now();
    for answer in &answers {
        answer.remote().raise_grant(Grant { output_tokens: args.new_tokens as u64, is_final: true });
    }
    for answer in &mut answers {
        read_until(answer, args.new_tokens - 1).await?;
    }
    let decode_s = started_at.elapsed().as_secs_f64();
    let after = cost(node).await;
    let phase = |tokens, seconds, from: Cost, to: Cost| Phase {
        tokens: args.batch * tokens,
        seconds,
        cost: to - from,
    };
    Ok((
        phase(args.prompt_tokens, prefill_s, before, between),
        phase(args.new_tokens - 1, decode_s, between, after),
    ))
}

/// What the engine has spent so far. It counts a step after its tokens are out, so it is given a moment.
async fn cost(node: &Node) -> Cost {
    tokio::time::sleep(Duration::from_millis(20)).await;
    node.engine().odometer().cost()
}

/// One other sequence of at most WARM_UP_TOKENS: buffers have grown and weights were touched when time is taken.
async fn warm_up(node: &Node, args: &Args) -> anyhow::Result<()> {
    let tokens = args.prompt_tokens.min(WARM_UP_TOKENS);
    let mut answer = node.engine().submit(submission(node, tokens, 1, args.batch)).await?;
    read_until(&mut answer, 1).await
}

pub(super) async fn read_until(answer: &mut Answer, mut tokens: usize) -> anyhow::Result<()> {
    while tokens > 0 {
        let Some(delivery) = answer.next().await else { bail!("a sequence ended before its last token") };
        if let Some(Ending::Broken(reason)) = delivery.ending {
            bail!("the engine gave up: {reason}");
        }
        tokens = tokens.saturating_sub(delivery.ids.len());
    }
    Ok(())
}

/// Ids spread over the vocabulary, other ones for each sequence.
pub(super) fn submission(node: &Node, prompt_tokens: usize, new_tokens: usize, index: usize) -> Submission {
    let vocabulary = u64::from(node.models()[0].vocabulary_size);
    let id = |position: u64| ((position + 1) * 0x9E37_79B1 + index as u64 * 7919) % vocabulary;
    let prompt_ids = (0..prompt_tokens as u64).map(|position| id(position) as u32).collect();
    Submission {
        grant: Grant { output_tokens: 1, is_final: false },
        ignore_end_of_sequence: true,
        tenant: format!("bench-{index}").into(),
        ..Submission::new(prompt_ids, new_tokens)
    }
}

/// Memory of this process as the kernel counts it: the most it ever held (`VmHWM:`, loading included) or holds now (`VmRSS:`).
fn resident_bytes(field: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}
