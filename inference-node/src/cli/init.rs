//! `sluice-node init`: a checkpoint with random weights of any size, for benchmarks and tests.

use std::path::PathBuf;

use crate::checkpoint::{WeightsDtype, initialize};

#[derive(Debug, clap::Args)]
pub struct InitArgs {
    /// Configuration of the model to make up (either generation of config.json).
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,
    /// The same seed gives the same bytes.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    #[arg(long, value_enum, default_value_t = WeightsDtype::Bf16)]
    pub dtype: WeightsDtype,
    /// Directory to write; must not hold weights yet.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

pub fn run(args: InitArgs) -> anyhow::Result<()> {
    let parameters = initialize(&args.config, args.seed, args.dtype, &args.out)?;
    println!("wrote {} parameters to {}", parameters, args.out.display());
    Ok(())
}
