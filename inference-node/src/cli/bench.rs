//! `sluice-node bench`: prefill and decode, apart, through the real engine.
//!
//! A grant of one token lets every sequence compute its prompt and one token, then pause: that is prefill. The grant of
//! the rest starts the decoding of all at once.

use crate::engine::mailbox::{Ending, Grant};
use crate::engine::{Answer, Submission};
use crate::node::{Node, NodeOptions};
use crate::sampler::Sampling;
use crate::scheduler::Priority;
use anyhow::{bail, ensure};
use std::path::PathBuf;
use std::time::Instant;

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

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    ensure!(args.prompt_tokens > 0, "--prompt-tokens must be at least 1");
    ensure!(args.new_tokens > 1, "--new-tokens must be at least 2: the first comes with the prompt");
    ensure!(args.batch > 0, "--batch must be at least 1");
    let mut options = NodeOptions::new(&args.model);
    options.slots = args.batch;
    options.waiting_max = args.batch;
    options.threads = args.threads.unwrap_or(options.threads);
    options.step_tokens_max = args.step_tokens_max.unwrap_or(options.step_tokens_max.max(args.batch * 2));
    // What is measured is computed, every time.
    options.cache_ram_bytes = 0;
    options.cache_tokens = Some(args.batch * (args.prompt_tokens + args.new_tokens).next_multiple_of(256));
    let threads = options.threads;
    let load_started_at = Instant::now();
    let node = Node::start(options)?;
    let load_s = load_started_at.elapsed().as_secs_f64();
    let model = &node.models()[0];
    let context = model.context_tokens_max as usize;
    ensure!(
        args.prompt_tokens + args.new_tokens <= context,
        "prompt and output exceed the context of {context}"
    );

    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let speeds = runtime.block_on(measure(&node, &args))?;
    let peak = peak_rss_bytes();
    if args.json {
        println!(
            "{}",
            serde_json::json!({
                "model": model.name, "kernel": model.kernel, "threads": threads, "parameters": model.parameters,
                "prompt_tokens": args.prompt_tokens, "new_tokens": args.new_tokens, "batch": args.batch,
                "load_s": load_s,
                "prefill_tokens_per_second": speeds.prefill,
                "decode_tokens_per_second": speeds.decode,
                "peak_rss_bytes": peak,
            })
        );
    } else {
        println!("{} ({}, {threads} threads), loaded in {load_s:.2} s", model.name, model.kernel);
        println!(
            "prefill  {:10.1} tokens/s  ({} x {} tokens)",
            speeds.prefill, args.batch, args.prompt_tokens
        );
        println!(
            "decode   {:10.1} tokens/s  ({} x {} tokens)",
            speeds.decode,
            args.batch,
            args.new_tokens - 1
        );
        println!("peak     {:10.1} MiB", peak.unwrap_or(0) as f64 / f64::from(1 << 20));
    }
    Ok(())
}

struct Speeds {
    prefill: f64,
    decode: f64,
}

async fn measure(node: &Node, args: &Args) -> anyhow::Result<Speeds> {
    let started_at = Instant::now();
    let mut answers = Vec::with_capacity(args.batch);
    for index in 0..args.batch {
        answers.push(node.engine().submit(submission(node, args, index)).await?);
    }
    for answer in &mut answers {
        read_until(answer, 1).await?;
    }
    let prefill_s = started_at.elapsed().as_secs_f64();

    let started_at = Instant::now();
    for answer in &answers {
        answer.remote().raise_grant(Grant { output_tokens: args.new_tokens as u64, is_final: true });
    }
    for answer in &mut answers {
        read_until(answer, args.new_tokens - 1).await?;
    }
    let decode_s = started_at.elapsed().as_secs_f64();
    Ok(Speeds {
        prefill: (args.batch * args.prompt_tokens) as f64 / prefill_s,
        decode: (args.batch * (args.new_tokens - 1)) as f64 / decode_s,
    })
}

async fn read_until(answer: &mut Answer, mut tokens: usize) -> anyhow::Result<()> {
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
fn submission(node: &Node, args: &Args, index: usize) -> Submission {
    let vocabulary = u64::from(node.models()[0].vocabulary_size);
    let id = |position: u64| ((position + 1) * 0x9E37_79B1 + index as u64 * 7919) % vocabulary;
    Submission {
        prompt_ids: (0..args.prompt_tokens as u64).map(|position| id(position) as u32).collect(),
        resume_ids: Vec::new(),
        output_tokens_max: args.new_tokens,
        grant: Grant { output_tokens: 1, is_final: false },
        sampling: Sampling::GREEDY,
        stop_strings: Vec::new().into(),
        stop_ids: Vec::new(),
        ignore_end_of_sequence: true,
        tenant: format!("bench-{index}").into(),
        priority: Priority::Normal,
        deadline: None,
    }
}

/// The most memory this process ever held, as the kernel counts it.
fn peak_rss_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}
