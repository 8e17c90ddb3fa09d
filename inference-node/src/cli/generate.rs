//! `sluice-node generate`: one prompt through the real engine, without a server.

use crate::engine::Submission;
use crate::engine::mailbox::{Ending, Usage};
use crate::kernel::Dtype;
use crate::node::{Node, NodeOptions};
use crate::sampler::Sampling;
use anyhow::{bail, ensure};
use sluice_proto::node::v1::tokenize_request::Input;
use sluice_proto::node::v1::{ChatMessage, ChatPrompt};
use std::io::Write;
use std::path::PathBuf;
use std::time::Instant;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Hugging Face directory of the model
    #[arg(long, value_name = "DIR")]
    model: PathBuf,

    #[command(flatten)]
    prompt: Prompt,

    /// Tokens to generate at most
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_tokens: usize,

    /// 0 always takes the likeliest token
    #[arg(long, value_name = "T", default_value_t = 0.0, allow_negative_numbers = true)]
    temperature: f32,

    /// Choose among the likeliest tokens that have this probability together
    #[arg(long, value_name = "P", default_value_t = 1.0, allow_negative_numbers = true)]
    top_p: f32,

    /// Choose among this many of the likeliest tokens; 0 is no limit
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: u32,

    /// The same seed gives the same text
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,

    /// End before this text; may be given more than once
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,

    /// Go on after an end-of-sequence token
    #[arg(long)]
    ignore_eos: bool,

    /// What weights are stored and multiplied as [default: bf16 where the checkpoint is bf16, else f32]
    #[arg(long, value_enum, value_name = "DTYPE")]
    dtype: Option<Dtype>,

    /// Threads that compute [default: all]
    #[arg(long, value_name = "N")]
    threads: Option<usize>,

    /// Print one JSON object instead of the text: ids, text, finish_reason, usage, tokens_per_second
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct Prompt {
    /// Prompt as token ids: 1,2,3
    #[arg(long, value_delimiter = ',', value_name = "IDS")]
    ids: Option<Vec<u32>>,

    /// Prompt as plain text, control tokens included
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,

    /// Message from a user, put into the model's chat template
    #[arg(long, value_name = "TEXT")]
    chat: Option<String>,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let mut options = NodeOptions::new(&args.model);
    options.slots = 1;
    options.dtype = args.dtype;
    options.threads = args.threads.unwrap_or(options.threads);
    let node = Node::start(options)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(generate(&node, args))
}

async fn generate(node: &Node, args: Args) -> anyhow::Result<()> {
    let submission = submission(node, &args)?;
    let started_at = Instant::now();
    let mut first_token_at = None;
    let mut answer = node.engine().submit(submission).await?;
    let (mut text, mut ids, mut usage, mut finish_reason) = (String::new(), Vec::new(), Usage::default(), "");
    while let Some(delivery) = answer.next().await {
        if !delivery.ids.is_empty() {
            first_token_at.get_or_insert_with(|| (Instant::now(), delivery.ids.len()));
        }
        if !args.json {
            print!("{}", delivery.text);
            std::io::stdout().flush()?;
        }
        text.push_str(&delivery.text);
        ids.extend(delivery.ids);
        usage = delivery.usage;
        finish_reason = match delivery.ending {
            None => continue,
            Some(Ending::Stop { .. }) => "stop",
            Some(Ending::Length) => "length",
            Some(Ending::Broken(reason)) => bail!("the engine gave up: {reason}"),
            Some(other) => bail!("the engine ended it: {other:?}"),
        };
    }
    if !args.json {
        println!();
        return Ok(());
    }
    let (first_token_at, first_tokens) = first_token_at.unwrap_or((started_at, 0));
    let decode_s = first_token_at.elapsed().as_secs_f64();
    let decoded = (ids.len() - first_tokens) as f64;
    let prefill_s = (first_token_at - started_at).as_secs_f64();
    println!(
        "{}",
        serde_json::json!({
            "ids": ids,
            "text": text,
            "finish_reason": finish_reason,
            "usage": {"input_tokens": usage.input_tokens, "output_tokens": usage.output_tokens},
            "time_to_first_token_ms": prefill_s * 1e3,
            "tokens_per_second": if decoded > 0.0 { Some(decoded / decode_s) } else { None },
        })
    );
    Ok(())
}

fn submission(node: &Node, args: &Args) -> anyhow::Result<Submission> {
    let encode =
        |input| node.service().encode(input).map_err(|status| anyhow::anyhow!("{}", status.message()));
    let prompt_ids = match (&args.prompt.ids, &args.prompt.prompt, &args.prompt.chat) {
        (Some(ids), _, _) => ids.clone(),
        (_, Some(text), _) => encode(Input::Text(text.clone()))?,
        (_, _, Some(text)) => {
            let message =
                ChatMessage { role: "user".to_owned(), content: text.clone(), ..ChatMessage::default() };
            encode(Input::Chat(ChatPrompt { messages: vec![message], tools_json: String::new() }))?
        }
        (None, None, None) => bail!("one of --ids, --prompt and --chat is needed"),
    };
    let model = &node.models()[0];
    let context = model.context_tokens_max as usize;
    ensure!(!prompt_ids.is_empty(), "the prompt is empty; it must have at least one token");
    ensure!(prompt_ids.len() < context, "the prompt has {} tokens, the context {context}", prompt_ids.len());
    if let Some(id) = prompt_ids.iter().find(|&&id| id >= model.vocabulary_size) {
        bail!("--ids: {id} is not in the vocabulary; ids are below {}", model.vocabulary_size);
    }
    ensure!(args.max_tokens > 0, "--max-tokens must be at least 1");
    ensure!(args.stop.iter().all(|stop| !stop.is_empty()), "--stop must not be empty");
    let output_tokens_max = args.max_tokens.min(context - prompt_ids.len());
    let sampling = Sampling::new(args.temperature, args.top_p, args.top_k, args.seed);
    Ok(Submission {
        sampling: sampling
            .map_err(|error| anyhow::anyhow!("--{}: {error}", error.field().replace('_', "-")))?,
        stop_strings: args.stop.clone().into(),
        ignore_end_of_sequence: args.ignore_eos,
        ..Submission::new(prompt_ids, output_tokens_max)
    })
}
