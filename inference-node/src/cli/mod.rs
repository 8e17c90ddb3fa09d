//! The command line of `sluice-node`.

mod bench;
mod bench_mixer;
mod cache;
mod gaps;
mod generate;
mod init;
mod logits;
mod perplexity;
mod serve;

use clap::{Parser, Subcommand};
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

/// Sluice's inference node: serves one MoE + linear-attention model over gRPC.
#[derive(Debug, Parser)]
#[command(name = "sluice-node", version, about, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  Serve a model to gateways, on a port that the system chooses:
    sluice-node serve --model models/sluice-demo --listen 127.0.0.1:0 --json
  Ask it something without a server:
    sluice-node generate --model models/sluice-demo --chat 'What is linear attention?'
  Look at the service (grpcurl works too, reflection is on):
    grpcurl -plaintext 127.0.0.1:50051 sluice.node.v1.NodeService/Describe

Logs go to stderr; RUST_LOG=debug shows more.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve a model over gRPC (sluice.node.v1, health, reflection)
    Serve(serve::Args),
    /// Generate from one prompt and print the text
    Generate(generate::Args),
    /// Print the logits of every position of a prompt
    Logits(logits::LogitsArgs),
    /// Say how well a model predicts a text
    Perplexity(perplexity::Args),
    /// Write a checkpoint with random weights, for benchmarks
    Init(init::InitArgs),
    /// Measure prefill and decode through the engine
    Bench(bench::Args),
    /// Look into the folder of a node's state cache
    Cache(cache::Args),
    /// Measure what an arriving prompt does to streams
    Gaps(gaps::Args),
}

pub fn main() -> ExitCode {
    let cli = Cli::parse();
    // Only a server has a story to tell; the other commands print their result.
    let level = if matches!(cli.command, Command::Serve(_)) { "info" } else { "warn" };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(colours)
        .with_writer(std::io::stderr)
        // It would report a log that cannot be written with a panic.
        .log_internal_errors(false)
        .init();
    let outcome = match cli.command {
        Command::Serve(args) => serve::run(args),
        Command::Generate(args) => generate::run(args),
        Command::Logits(args) => logits::run(args),
        Command::Perplexity(args) => perplexity::run(args),
        Command::Init(args) => init::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Cache(args) => cache::run(args),
        Command::Gaps(args) => gaps::run(args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Nobody may be reading.
            let _ = writeln!(std::io::stderr(), "sluice-node: {error:#}");
            ExitCode::FAILURE
        }
    }
}
