//! `sluice-node gaps`: what a long prompt that arrives does to those who are being answered.
//!
//! ```text
//! streams   t t t t t t t t  t  t  t  t  t  t t t t t     gaps between the tokens of each
//! newcomer                  [ long prompt ] first token
//!           |--- alone ----|---- beside ----|
//! ```

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use super::bench;
use crate::engine::Answer;
use crate::engine::mailbox::{Ending, Grant};
use crate::kernel::Dtype;
use crate::node::{Node, NodeOptions};

/// Prompt tokens of a stream.
const STREAM_PROMPT_TOKENS: usize = 64;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Hugging Face directory of the model
    #[arg(long, value_name = "DIR")]
    model: PathBuf,

    /// Sequences that are being answered
    #[arg(long, value_name = "N", default_value_t = 16)]
    streams: usize,

    /// Tokens of the prompt that arrives
    #[arg(long, value_name = "P", default_value_t = 32_768)]
    prompt_tokens: usize,

    /// Tokens that each stream may have; they must outlast the prompt
    #[arg(long, value_name = "N", default_value_t = 16_384)]
    stream_tokens_max: usize,

    /// How long the streams are watched before the prompt arrives
    #[arg(long, value_name = "MS", default_value_t = 5000)]
    alone_ms: u64,

    /// What weights are stored and multiplied as [default: bf16 where the checkpoint is bf16, else f32]
    #[arg(long, value_enum, value_name = "DTYPE")]
    dtype: Option<Dtype>,

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
    ensure!((1..=bench::BATCH_MAX).contains(&args.streams), "--streams must be 1 to {}", bench::BATCH_MAX);
    ensure!(
        args.prompt_tokens.max(args.stream_tokens_max) <= bench::TOKENS_MAX,
        "--prompt-tokens and --stream-tokens-max must be at most {}",
        bench::TOKENS_MAX
    );
    ensure!(args.prompt_tokens > 0, "--prompt-tokens must be at least 1");
    ensure!(args.stream_tokens_max > 0, "--stream-tokens-max must be at least 1");
    let mut options = NodeOptions::new(&args.model);
    options.slots = args.streams + 1;
    options.waiting_max = args.streams + 1;
    options.dtype = args.dtype;
    options.threads = args.threads.unwrap_or(options.threads);
    options.step_tokens_max =
        args.step_tokens_max.unwrap_or(options.step_tokens_max.max((args.streams + 1) * 2));
    let stream_tokens = STREAM_PROMPT_TOKENS + args.stream_tokens_max;
    let page = |tokens: usize| tokens.next_multiple_of(256);
    options.cache_tokens = Some(args.streams * page(stream_tokens) + page(args.prompt_tokens + 1));
    let (threads, step_tokens_max) = (options.threads, options.step_tokens_max);
    let node = Node::start(options)?;
    let context = node.models()[0].context_tokens_max as usize;
    let longest = stream_tokens.max(args.prompt_tokens + 1);
    ensure!(longest <= context, "a sequence of {longest} tokens exceeds the context of {context}");

    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
    let Watched { alone, beside, prompt } = runtime.block_on(watch(&node, &args))?;
    let (alone, beside) = (Gaps::of(alone, "alone")?, Gaps::of(beside, "beside the prompt")?);
    let kernel = &node.models()[0].kernel;
    let spread = beside.p99.as_secs_f64() / beside.median.as_secs_f64();
    if args.json {
        let fields = json!({
            "model": node.models()[0].name, "kernel": kernel, "threads": threads, "streams": args.streams,
            "prompt_tokens": args.prompt_tokens, "step_tokens_max": step_tokens_max,
            "alone": alone.json(), "beside": beside.json(), "prompt_s": prompt.as_secs_f64(),
            "beside_p99_over_median": spread,
        });
        println!("{fields}");
    } else {
        println!("{} streams, {kernel}, {threads} threads, {step_tokens_max} tokens a step", args.streams);
        println!("alone    {alone}");
        println!("beside   {beside}  (p99 is {spread:.2} x the median)");
        println!("prompt   {} tokens in {:.2} s", args.prompt_tokens, prompt.as_secs_f64());
    }
    Ok(())
}

struct Watched {
    alone: Vec<Duration>,
    /// Gaps that ended while the prompt was computed.
    beside: Vec<Duration>,
    prompt: Duration,
}

async fn watch(node: &Node, args: &Args) -> anyhow::Result<Watched> {
    let mut streams = Vec::with_capacity(args.streams);
    let mut readers = Vec::with_capacity(args.streams);
    for index in 0..args.streams {
        let submission = bench::submission(node, STREAM_PROMPT_TOKENS, args.stream_tokens_max, index);
        let mut answer = node.engine().submit(submission).await?;
        bench::read_until(&mut answer, 1).await?;
        streams.push(answer.remote());
        readers.push(tokio::spawn(moments(answer)));
    }
    let all = Grant { output_tokens: args.stream_tokens_max as u64, is_final: true };
    streams.iter().for_each(|stream| stream.raise_grant(all));
    // Every stream runs from here on: what came before was their own prompts.
    let watched_from = Instant::now();
    tokio::time::sleep(Duration::from_millis(args.alone_ms)).await;

    let arrived_at = Instant::now();
    let newcomer = bench::submission(node, args.prompt_tokens, 1, args.streams);
    let mut newcomer = node.engine().submit(newcomer).await?;
    bench::read_until(&mut newcomer, 1).await?;
    let answered_at = Instant::now();
    streams.iter().for_each(|stream| stream.cancel());

    let mut watched = Watched { alone: Vec::new(), beside: Vec::new(), prompt: answered_at - arrived_at };
    for reader in readers {
        let moments = finished(reader, answered_at).await?;
        for pair in moments.windows(2).filter(|pair| pair[0] >= watched_from) {
            if pair[1] <= arrived_at {
                watched.alone.push(pair[1] - pair[0]);
            } else if pair[1] <= answered_at {
                watched.beside.push(pair[1] - pair[0]);
            }
        }
    }
    Ok(watched)
}

async fn finished(
    reader: JoinHandle<anyhow::Result<Vec<Instant>>>,
    answered_at: Instant,
) -> anyhow::Result<Vec<Instant>> {
    let moments = reader.await??;
    let outlasted = moments.last().is_some_and(|&last| last + Duration::from_secs(5) > answered_at);
    ensure!(outlasted, "a stream ended before the prompt was computed: raise --stream-tokens-max");
    Ok(moments)
}

/// When each token came, until the sequence ends.
async fn moments(mut answer: Answer) -> anyhow::Result<Vec<Instant>> {
    let mut moments = Vec::new();
    while let Some(delivery) = answer.next().await {
        if let Some(Ending::Broken(reason)) = delivery.ending {
            bail!("the engine gave up: {reason}");
        }
        moments.extend(delivery.ids.iter().map(|_| Instant::now()));
    }
    Ok(moments)
}

struct Gaps {
    count: usize,
    median: Duration,
    p99: Duration,
    longest: Duration,
}

impl Gaps {
    fn of(mut gaps: Vec<Duration>, when: &str) -> anyhow::Result<Gaps> {
        ensure!(
            !gaps.is_empty(),
            "no stream had two tokens {when}: watch longer, send a longer prompt, or give streams more tokens"
        );
        gaps.sort_unstable();
        // The nearest rank: the smallest gap that this share of all gaps does not exceed.
        let rank = |percent: usize| gaps[(gaps.len() * percent).div_ceil(100) - 1];
        Ok(Gaps { count: gaps.len(), median: rank(50), p99: rank(99), longest: rank(100) })
    }

    fn json(&self) -> Value {
        let ms = |gap: Duration| gap.as_secs_f64() * 1e3;
        json!({ "gaps": self.count, "median_ms": ms(self.median), "p99_ms": ms(self.p99), "max_ms": ms(self.longest) })
    }
}

impl std::fmt::Display for Gaps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ms = |gap: Duration| gap.as_secs_f64() * 1e3;
        let (median, p99, longest) = (ms(self.median), ms(self.p99), ms(self.longest));
        write!(f, "median {median:.1} ms, p99 {p99:.1} ms, longest {longest:.1} ms over {} gaps", self.count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    /// As the command line gives them.
    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let ms = Duration::from_millis;
        let gaps = Gaps::of((1..=200).rev().map(ms).collect(), "alone").expect("there are gaps");
        assert_eq!((gaps.count, gaps.median, gaps.p99, gaps.longest), (200, ms(100), ms(198), ms(200)));
        let one = Gaps::of(vec![ms(7)], "alone").expect("there is a gap");
        assert_eq!((one.median, one.p99, one.longest), (ms(7), ms(7), ms(7)));
        assert!(Gaps::of(Vec::new(), "alone").is_err());
    }

    #[test]
    fn too_many_streams_are_refused_by_name() {
        for streams in ["0", "4097"] {
            let error = run(Line::parse_from(["gaps", "--model", "nowhere", "--streams", streams]).args)
                .expect_err("refused");
            assert!(error.to_string().starts_with("--streams must be 1 to 4096"), "{error}");
        }
    }

    /// Through a real engine: every step that computes a part of the prompt gives each stream its token.
    #[test]
    fn the_bundled_model_streams_beside_a_prompt() {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("models/sluice-demo");
        let args = Args {
            model: dir,
            streams: 3,
            prompt_tokens: 3000,
            stream_tokens_max: 4000,
            alone_ms: 10,
            dtype: None,
            threads: Some(2),
            step_tokens_max: Some(64),
            json: true,
        };
        let mut options = NodeOptions::new(&args.model);
        (options.slots, options.step_tokens_max) = (4, 64);
        let node = Node::start(options).expect("the bundled model loads");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
        let watched = runtime.block_on(watch(&node, &args)).expect("nobody is refused");
        // A step of 64 tokens has at most 61 of the prompt, and one token of each stream.
        assert!(watched.beside.len() >= 3 * (3000 / 61 - 2), "{}", watched.beside.len());
    }
}
