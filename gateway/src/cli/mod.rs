//! The command line. `sluice --help` teaches; every command takes `--json` for scripts: results on stdout, logs
//! and errors on stderr.

mod budgets;
mod credits;
mod export;
mod invoices;
mod keys;
mod money;
mod prices;
mod receipt;
mod webhooks;

use std::{
    io::{IsTerminal, Write},
    path::PathBuf,
};

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use serde::Serialize;
use sluice_billing::{Books, Database};

use crate::{config::Config, store, up};

/// An open platform in a box: serve a large model to developers, meter every token, bill it exactly once.
#[derive(Debug, Parser)]
#[command(
    name = "sluice",
    version,
    max_term_width = 110,
    after_help = "\
Start here:
  sluice up                                  a working platform on http://127.0.0.1:8080
  sluice keys create --name ci               another key
  sluice usage --by key,model,day            what was used, and what it cost
"
)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
    /// Log filter, such as `info` or `sluice_gateway=debug`.
    #[arg(long, global = true, env = "SLUICE_LOG", default_value = "info", value_name = "FILTER")]
    log: String,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start the platform: gateway, ledger, and (unless --node names others) an inference node in this process.
    Up(UpArgs),
    /// Create, list and revoke API keys.
    Keys(keys::KeysArgs),
    /// Tokens and cost, by key, model, day or project.
    Usage(money::UsageArgs),
    /// What an account has left.
    Balance(money::BalanceArgs),
    /// Apply price books, and show what is in force.
    Prices(prices::PricesArgs),
    /// Add prepaid credit to an account.
    Credit(money::CreditArgs),
    /// Limit what an organisation, a project or a key spends in a day, a month or altogether.
    Budgets(budgets::BudgetsArgs),
    /// Bring the database up to date with this version. `sluice up` does it by itself.
    Migrate(MigrateArgs),
    /// Who is told of low balances, budgets and invoices: create, list and delete endpoints, replay deliveries.
    Webhooks(webhooks::WebhooksArgs),
    /// Grants of credit: what is left of each, and what has expired.
    Credits(credits::CreditsArgs),
    /// Invoices: close a month, show, pay, take back, and write them as PDF or CSV.
    Invoices(invoices::InvoicesArgs),
    /// Check the books: every transaction, line, rollup and balance. Fails if one does not hold.
    Audit(money::AuditArgs),
    /// Check receipts, the signed bills that come with each answer.
    Receipt(receipt::ReceiptArgs),
    Export(export::ExportArgs),
}

/// What the caller gave is at fault, not what the command met: exit status 2, as for a wrong flag.
#[derive(Debug, thiserror::Error)]
#[error("{0:#}")]
pub struct Refused(anyhow::Error);

/// The exit status of a command that failed.
pub fn exit_status(error: &anyhow::Error) -> u8 {
    if error.is::<Refused>() { 2 } else { 1 }
}

/// Where the configuration comes from; the same for every command.
#[derive(Debug, Args)]
pub struct ConfigArgs {
    /// TOML file with any of the settings.
    #[arg(long, env = "SLUICE_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Folder for database, outbox and first keys [default: ~/.local/share/sluice].
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// postgres://USER:PASSWORD@HOST/DATABASE, or sqlite:PATH [default: ledger.db in the data folder]. Prefer the environment
    /// (SLUICE_DATABASE_URL) or the file: other users of this machine can see the flags of a program.
    #[arg(long, value_name = "URL")]
    database_url: Option<String>,
}

#[derive(Debug, Args)]
struct MigrateArgs {
    #[command(flatten)]
    config: ConfigArgs,
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct UpArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// Address for REST and gRPC; port 0 takes a free one [default: 127.0.0.1:8080].
    #[arg(long, value_name = "ADDR")]
    listen: Option<String>,
    /// Hugging Face model directory [default: the bundled model].
    #[arg(long, value_name = "DIR", conflicts_with = "node")]
    model: Option<PathBuf>,
    /// What its weights are stored and multiplied as: f32, bf16 or int8 [default: bf16 where the checkpoint is, else f32].
    #[arg(long, value_name = "DTYPE", conflicts_with = "node")]
    dtype: Option<String>,
    /// Threads of the node in this process [default: all cores].
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
    /// A remote inference node, such as http://10.0.0.7:50051; may be given again.
    #[arg(long, value_name = "URL")]
    node: Vec<String>,
    /// Print one JSON object (base_url, grpc_url, api_key, admin_key) on the first line of stdout.
    #[arg(long)]
    json: bool,
}

/// What the flags say, in the configuration's own names; absent flags are left out.
#[derive(Default, Serialize)]
struct Flags {
    #[serde(skip_serializing_if = "Option::is_none")]
    listen: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_dir: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    database_url: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    nodes: Vec<String>,
    #[serde(skip_serializing_if = "NodeFlags::is_empty")]
    node: NodeFlags,
}

#[derive(Default, Serialize)]
struct NodeFlags {
    #[serde(skip_serializing_if = "Option::is_none")]
    model: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dtype: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    threads: Option<usize>,
}

impl NodeFlags {
    fn is_empty(&self) -> bool {
        self.model.is_none() && self.dtype.is_none() && self.threads.is_none()
    }
}

impl Cli {
    pub async fn run(self) -> anyhow::Result<()> {
        start_logging(&self.log)?;
        match self.command {
            Command::Up(args) => {
                let flags = Flags {
                    listen: args.listen,
                    data_dir: args.config.data_dir,
                    database_url: args.config.database_url,
                    nodes: args.node,
                    node: NodeFlags { model: args.model, dtype: args.dtype, threads: args.threads },
                };
                let config = Config::load(args.config.config.as_deref(), flags)?;
                up::run(config, args.json).await
            }
            Command::Keys(args) => args.run().await,
            Command::Usage(args) => args.run().await,
            Command::Balance(args) => args.run().await,
            Command::Prices(args) => args.run().await,
            Command::Credit(args) => args.run().await,
            Command::Budgets(args) => args.run().await,
            Command::Migrate(args) => args.run().await,
            Command::Webhooks(args) => args.run().await,
            Command::Credits(args) => args.run().await,
            Command::Invoices(args) => args.run().await,
            Command::Audit(args) => args.run().await,
            Command::Receipt(args) => args.run().await,
            Command::Export(args) => args.run().await,
        }
    }
}

impl ConfigArgs {
    /// The caller named an installation, and does not just have one by default.
    fn is_given(&self) -> bool {
        self.config.is_some() || self.data_dir.is_some() || self.database_url.is_some()
    }

    fn load(&self) -> anyhow::Result<Config> {
        let flags = Flags {
            data_dir: self.data_dir.clone(),
            database_url: self.database_url.clone(),
            ..Flags::default()
        };
        Config::load(self.config.as_deref(), flags)
    }

    /// An existing database, for commands that work beside a running server.
    async fn database(&self) -> anyhow::Result<(Config, Database)> {
        let config = self.load()?;
        if config.database_url.is_none() {
            let path = config.data_dir.join("ledger.db");
            anyhow::ensure!(
                path.is_file(),
                "no Sluice database at {}; start one with `sluice up --data-dir {}`, or name another folder with --data-dir",
                path.display(),
                config.data_dir.display()
            );
        }
        let database = store::open(&config, false).await?;
        Ok((config, database))
    }
}

impl ConfigArgs {
    /// The books of an existing database.
    async fn books(&self) -> anyhow::Result<Books> {
        let (_, database) = self.database().await?;
        Books::open(database).await.context("cannot open the books")
    }
}

impl MigrateArgs {
    async fn run(self) -> anyhow::Result<()> {
        let config = self.config.load()?;
        if config.database_url.is_none() {
            std::fs::create_dir_all(&config.data_dir)?;
        }
        let database = store::open(&config, true).await?;
        let name = database.name().to_owned();
        Books::open(database).await?;
        if self.json {
            return print_json(&serde_json::json!({ "database": name, "migrated": true }));
        }
        println!("{name} is up to date");
        Ok(())
    }
}

fn start_logging(filter: &str) -> anyhow::Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_new(filter).with_context(|| {
        format!("--log {filter:?} is not a filter; try `info`, `debug`, or `sluice_gateway=debug`")
    })?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        // It would report a log that cannot be written with a panic.
        .log_internal_errors(false)
        .init();
    Ok(())
}

fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    writeln!(std::io::stdout(), "{}", serde_json::to_string(value)?)?;
    Ok(())
}

/// Seconds since the epoch as `2026-01-31 23:59:59` (UTC).
fn utc(seconds: i64) -> String {
    let format = time::macros::format_description!("[year]-[month]-[day] [hour]:[minute]:[second]");
    time::OffsetDateTime::from_unix_timestamp(seconds)
        .ok()
        .and_then(|at| at.format(&format).ok())
        .unwrap_or_else(|| seconds.to_string())
}
