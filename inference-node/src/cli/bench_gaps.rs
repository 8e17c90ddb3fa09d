//! `sluice-node bench-gaps`: how evenly do tokens flow while somebody else's long prompt is computed?
//!
//! ```text
//!   streams decode alone | a prompt arrives ... its first token | alone again
//!   gaps: the base       | gaps: what the prompt costs          |
//! ```
//!
//! A gap is the time between two deliveries of a stream, as its reader sees them: a reader that comes late and finds two
//! tokens has seen one long gap.

use crate::engine::mailbox::{Ending, Grant};
use crate::engine::{Answer, Submission};
use crate::node::{Node, NodeOptions};
use crate::sampler::Sampling;
use crate::scheduler::Priority;
use anyhow::{bail, ensure};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tokio::sync::watch;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Hugging Face directory of the model
    #[arg(long, value_name = "DIR")]
    model: PathBuf,

    /// Streams that decode all the while
    #[arg(long, value_name = "N", default_value_t = 16)]
    streams: usize,

    /// Prompt tokens of each stream
    #[arg(long, value_name = "P", default_value_t = 64)]
    stream_prompt_tokens: usize,

    /// Output tokens of each stream at most; too few if a stream ends before the prompt is computed
    #[arg(long, value_name = "N", default_value_t = 8192)]
    stream_tokens_max: usize,

    /// Output tokens of each stream before the prompt arrives
    #[arg(long, value_name = "N", default_value_t = 64)]
    tokens_before: usize,

    /// Tokens of the long prompt
    #[arg(long, value_name = "P", default_value_t = 32_768)]
    prompt_tokens: usize,

    /// Threads that compute [default: all]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,

    /// Tokens computed in one step
    #[arg(long, value_name = "N")]
    step_tokens_max: Option<usize>,

    /// How long a step may take that computes prompts beside decoding, in steps that only decode
    #[arg(long, value_name = "RATIO")]
    mixed_step_ratio: Option<f64>,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    ensure!(args.streams > 0, "--streams must be at least 1");
    ensure!(args.stream_prompt_tokens > 0, "--stream-prompt-tokens must be at least 1");
    ensure!(args.prompt_tokens > 0, "--prompt-tokens must be at least 1");
    ensure!(args.tokens_before > WARM_TOKENS, "--tokens-before must be over {WARM_TOKENS}, which warm it up");
    ensure!(args.stream_tokens_max > args.tokens_before, "--stream-tokens-max must be over --tokens-before");
    let mut options = NodeOptions::new(&args.model);
    options.slots = args.streams + 1;
    options.threads = args.threads.unwrap_or(options.threads);
    options.step_tokens_max = args.step_tokens_max.unwrap_or(options.step_tokens_max.max(2 * options.slots));
    options.mixed_step_ratio = args.mixed_step_ratio.unwrap_or(options.mixed_step_ratio);
    let each = (args.stream_prompt_tokens + args.stream_tokens_max).next_multiple_of(256);
    options.cache_tokens = Some(args.streams * each + (args.prompt_tokens + 1).next_multiple_of(256));
    let (threads, ratio) = (options.threads, options.mixed_step_ratio);
    let node = Node::start(options)?;
    let context = node.models()[0].context_tokens_max as usize;
    for (flag, tokens) in [
        ("--prompt-tokens", args.prompt_tokens + 1),
        (
            "--stream-prompt-tokens and --stream-tokens-max",
            args.stream_prompt_tokens + args.stream_tokens_max,
        ),
    ] {
        ensure!(tokens <= context, "{flag} exceed the context of {context}");
    }
    let runtime = tokio::runtime::Builder::new_current_thread().build()?;
    let measured = runtime.block_on(measure(&node, &args))?;
    print(&node, &args, threads, ratio, &measured);
    Ok(())
}

/// A stream's first tokens come while the others' prompts are computed: they are no measure.
const WARM_TOKENS: usize = 8;

struct Measured {
    alone: Gaps,
    beside: Gaps,
    /// Both.
    all: Gaps,
    prompt_s: f64,
}

/// Milliseconds.
struct Gaps {
    count: usize,
    median: f64,
    p99: f64,
    max: f64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Alone,
    Beside,
    Over,
}

async fn measure(node: &Node, args: &Args) -> anyhow::Result<Measured> {
    let (phase, phases) = watch::channel(Phase::Alone);
    let mut streams = Vec::with_capacity(args.streams);
    for index in 0..args.streams {
        let submission = submission(node, index, args.stream_prompt_tokens, args.stream_tokens_max);
        let answer = node.engine().submit(submission).await?;
        streams.push(Stream { answer, tokens_before: args.tokens_before, phases: phases.clone() });
    }
    let (ready, mut warm) = tokio::sync::mpsc::channel(args.streams);
    let streams = streams.into_iter().map(|stream| stream.read(ready.clone()));
    let streams = futures::future::try_join_all(streams);
    let long_prompt = async {
        for _ in 0..args.streams {
            warm.recv().await;
        }
        let started_at = Instant::now();
        phase.send_replace(Phase::Beside);
        let mut answer = node.engine().submit(submission(node, args.streams, args.prompt_tokens, 1)).await?;
        while let Some(delivery) = answer.next().await {
            match delivery.ending {
                None | Some(Ending::Length) => {}
                Some(ending) => bail!("the long prompt ended early: {ending:?}"),
            }
        }
        phase.send_replace(Phase::Over);
        Ok(started_at.elapsed().as_secs_f64())
    };
    let (streams, prompt_s) = futures::future::try_join(streams, long_prompt).await?;
    let of = |wanted: Phase| -> Vec<Duration> {
        let gaps = streams.iter().flatten().filter(|(phase, _)| *phase == wanted);
        gaps.map(|&(_, gap)| gap).collect()
    };
    let (alone, beside) = (of(Phase::Alone), of(Phase::Beside));
    ensure!(!beside.is_empty(), "the prompt was computed between two tokens: make --prompt-tokens larger");
    let all = [&alone[..], &beside[..]].concat();
    Ok(Measured { alone: Gaps::new(alone), beside: Gaps::new(beside), all: Gaps::new(all), prompt_s })
}

struct Stream {
    answer: Answer,
    tokens_before: usize,
    phases: watch::Receiver<Phase>,
}

impl Stream {
    /// Reads until the measurement is over; says when it has read as many tokens as come before the prompt.
    async fn read(mut self, ready: tokio::sync::mpsc::Sender<()>) -> anyhow::Result<Vec<(Phase, Duration)>> {
        let (mut gaps, mut tokens) = (Vec::new(), 0);
        let mut last: Option<Instant> = None;
        loop {
            let Some(delivery) = self.answer.next().await else { bail!("a stream ended without a reason") };
            let phase = *self.phases.borrow();
            if phase == Phase::Over {
                return Ok(gaps);
            }
            if let Some(ending) = delivery.ending {
                bail!(
                    "a stream ended before the prompt was computed ({ending:?}): raise --stream-tokens-max"
                );
            }
            let was = tokens;
            tokens += delivery.ids.len();
            let now = Instant::now();
            // The gap in which the prompt arrived belongs to it.
            if let Some(last) = last.replace(now)
                && was >= WARM_TOKENS
            {
                gaps.push((phase, now - last));
            }
            if was < self.tokens_before && tokens >= self.tokens_before {
                ready.send(()).await?;
            }
        }
    }
}

impl Gaps {
    /// At least one.
    fn new(mut gaps: Vec<Duration>) -> Gaps {
        gaps.sort_unstable();
        let ms = |share: f64| gaps[((gaps.len() - 1) as f64 * share).round() as usize].as_secs_f64() * 1e3;
        Gaps { count: gaps.len(), median: ms(0.5), p99: ms(0.99), max: ms(1.0) }
    }

    fn json(&self) -> serde_json::Value {
        serde_json::json!({
            "count": self.count, "median_ms": self.median, "p99_ms": self.p99, "max_ms": self.max,
        })
    }
}

fn print(node: &Node, args: &Args, threads: usize, ratio: f64, measured: &Measured) {
    let Measured { alone, beside, all, prompt_s } = measured;
    let model = &node.models()[0];
    let (against_alone, against_all) = (beside.p99 / alone.median, all.p99 / all.median);
    let prompt_speed = args.prompt_tokens as f64 / prompt_s;
    if args.json {
        println!(
            "{}",
            serde_json::json!({
                "model": model.name, "kernel": model.kernel, "threads": threads, "mixed_step_ratio": ratio,
                "streams": args.streams, "prompt_tokens": args.prompt_tokens,
                "gaps_alone": alone.json(), "gaps_beside_prompt": beside.json(), "gaps_all": all.json(),
                "p99_beside_over_median_alone": against_alone,
                "p99_over_median": against_all,
                "prompt_s": prompt_s, "prompt_tokens_per_second": prompt_speed,
            })
        );
        return;
    }
    println!("{} ({}, {threads} threads), mixed steps up to {ratio} x", model.name, model.kernel);
    println!("gaps of {} streams, ms     count    median       p99       max", args.streams);
    for (name, gaps) in [("alone", alone), ("beside the prompt", beside), ("all", all)] {
        let Gaps { count, median, p99, max } = gaps;
        println!("  {name:<20} {count:>9} {median:>9.2} {p99:>9.2} {max:>9.2}");
    }
    println!("p99 beside the prompt over the median alone  {against_alone:.2}");
    println!("p99 over the median, all gaps                {against_all:.2}");
    println!("prompt of {} tokens: {prompt_s:.2} s, {prompt_speed:.1} tokens/s", args.prompt_tokens);
}

/// Ids spread over the vocabulary, other ones for each sequence.
fn submission(node: &Node, index: usize, prompt_tokens: usize, output_tokens_max: usize) -> Submission {
    let vocabulary = u64::from(node.models()[0].vocabulary_size);
    let id = |position: u64| ((position + 1) * 0x9E37_79B1 + index as u64 * 7919) % vocabulary;
    Submission {
        prompt_ids: (0..prompt_tokens as u64).map(|position| id(position) as u32).collect(),
        resume_ids: Vec::new(),
        output_tokens_max,
        grant: Grant { output_tokens: output_tokens_max as u64, is_final: true },
        sampling: Sampling::GREEDY,
        stop_strings: Vec::new().into(),
        stop_ids: Vec::new(),
        ignore_end_of_sequence: true,
        tenant: format!("bench-{index}").into(),
        tenant_weight: 1,
        priority: Priority::Normal,
        deadline: None,
    }
}
