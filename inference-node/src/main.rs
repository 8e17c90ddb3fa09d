use clap::Parser;
use sluice_node::cli::{init, logits};

#[derive(Parser)]
enum Command {
    Logits(logits::LogitsArgs),
    Init(init::InitArgs),
}

fn main() -> anyhow::Result<()> {
    match Command::parse() {
        Command::Logits(args) => logits::run(args),
        Command::Init(args) => init::run(args),
    }
}
