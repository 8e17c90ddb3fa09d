//! `sluice`: the front door of an LLM platform.
#![forbid(unsafe_code)]

use std::io::Write;

use clap::Parser;

#[tokio::main]
async fn main() -> std::process::ExitCode {
    let cli = sluice_gateway::cli::Cli::parse();
    match cli.run().await {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            // Nobody may be reading.
            let _ = writeln!(std::io::stderr(), "error: {error:#}");
            std::process::ExitCode::from(sluice_gateway::cli::exit_status(&error))
        }
    }
}
