//! `sluice export run | verify`: usage and cost as files that other tools read.

use std::{
    io::{IsTerminal, Write},
    path::PathBuf,
    time::{Duration, Instant},
};

use clap::{Args, Subcommand, ValueEnum};
use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};
use sluice_billing::{
    Audit, Dataset, ExportFilter, ExportOptions, ExportRange, ExportReport, Format, Manifest, Progress,
    verify_export,
};
use time::Date;

use super::{
    ConfigArgs,
    money::{books, parse_day},
    print_json,
};

/// Without a terminal, how often a line says how far it is.
const LINE_EVERY: Duration = Duration::from_secs(10);

#[derive(Debug, Args)]
#[command(
    about = "Usage and cost as CSV, JSON Lines, Parquet, FOCUS 1.2 or 1.4",
    long_about = "\
Usage and cost as files that other tools read: CSV, JSON Lines, Parquet; FOCUS 1.2 and 1.4.

An export is a folder. Part files hold the rows. A manifest for each run says which stretch of the
ledger they are, with a SHA-256 and control totals for every file, and the hash of the manifest
before it:

  usage-000001.parquet  usage-000002.parquet  manifest-000001.json
  usage-000003.parquet                        manifest-000002.json
                                              manifest.json, a copy of the newest

Run the same command again, and it adds what has arrived since. Kill it, and the next run goes on
after the last whole part. The same stretch gives the same bytes, on any machine, on any day.",
    after_long_help = "\
Datasets:
  usage      a row a request: tokens by class, how it ended, how long it took, its cost
  cost       a row a request and SKU: quantity, unit price, cost
  focus-1.2  FinOps FOCUS Cost and Usage: a row an hour, key and SKU, and a row a purchase
  focus-1.4  the same in the columns of 1.4

Amounts are exact, in dollars with up to 12 decimals: DECIMAL(38,12) in Parquet, text in JSON.
Times are UTC. Text in CSV that begins with = + - @ would be run by a spreadsheet: it gets an
apostrophe in front, which --csv-raw leaves out.

Examples:
  Everything; the same command later adds what is new:
    sluice export run --dataset usage --format parquet --out usage/
  For a FinOps tool:
    sluice export run --dataset focus-1.2 --format csv --out focus/
  One account's May:
    sluice export run --dataset cost --format jsonl --out may/ --account acme \\
      --from 2026-05-01 --to 2026-06-01
  The same bytes once more:
    sluice export run --repeat usage/manifest-000001.json --out copy/
  Hashes, chain, rows and totals; then the sums against the ledger, too:
    sluice export verify usage/
    sluice export verify usage/ --ledger
  Ask it something:
    duckdb -c \"SELECT model, sum(cost) FROM 'usage/*.parquet' GROUP BY 1\""
)]
pub struct ExportArgs {
    #[command(subcommand)]
    command: ExportCommand,
}

#[derive(Debug, Subcommand)]
enum ExportCommand {
    /// Write what the folder does not have yet.
    Run(RunArgs),
    /// Check a folder against its manifests, and with --ledger against the ledger. Fails if something does not hold.
    Verify(VerifyArgs),
}

#[derive(Debug, Args)]
struct RunArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// What the rows are.
    #[arg(long, value_enum, required_unless_present = "repeat")]
    dataset: Option<DatasetArg>,
    #[arg(long, value_enum, required_unless_present = "repeat")]
    format: Option<FormatArg>,
    /// The folder of the export; it is created.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// First day of admission, YYYY-MM-DD (UTC).
    #[arg(long, value_parser = parse_day)]
    from: Option<Date>,
    /// The day after the last, YYYY-MM-DD (UTC).
    #[arg(long, value_parser = parse_day)]
    to: Option<Date>,
    /// Only bills after this sequence number of the ledger [default: after the folder's last].
    #[arg(long, value_name = "N")]
    after_seq: Option<i64>,
    /// Only bills up to this sequence number [default: the newest].
    #[arg(long, value_name = "N")]
    through_seq: Option<i64>,
    /// Only this account.
    #[arg(long, value_name = "ID")]
    account: Option<String>,
    /// Only this organisation. Purchases of credit belong to accounts and are left out.
    #[arg(long, value_name = "ID")]
    org: Option<String>,
    /// Rows of one part file at most. Memory grows with it.
    #[arg(long, value_name = "N", default_value_t = 250_000, value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    part_rows: u64,
    /// Who sells, as the FOCUS columns name it.
    #[arg(long, value_name = "NAME", default_value = "Sluice")]
    provider: String,
    /// Leave CSV text as it is, also where a spreadsheet would run it as a formula.
    #[arg(long)]
    csv_raw: bool,
    /// Export exactly what the run of this manifest did, with the same options and bytes.
    #[arg(
        long,
        value_name = "MANIFEST",
        conflicts_with_all = ["dataset", "format", "from", "to", "after_seq", "through_seq", "account", "org", "csv_raw"]
    )]
    repeat: Option<PathBuf>,
    /// Print one JSON object about what was done.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct VerifyArgs {
    #[command(flatten)]
    config: ConfigArgs,
    /// The folder of the export.
    dir: PathBuf,
    /// Compare with the ledger of --config or --data-dir, too.
    #[arg(long)]
    ledger: bool,
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum DatasetArg {
    Usage,
    Cost,
    #[value(name = "focus-1.2")]
    Focus12,
    #[value(name = "focus-1.4")]
    Focus14,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum FormatArg {
    Csv,
    Jsonl,
    Parquet,
}

impl ExportArgs {
    pub async fn run(self) -> anyhow::Result<()> {
        match self.command {
            ExportCommand::Run(args) => args.run().await,
            ExportCommand::Verify(args) => args.run().await,
        }
    }
}

impl RunArgs {
    async fn run(self) -> anyhow::Result<()> {
        let books = books(&self.config).await?;
        let (json, dir) = (self.json, self.out.clone());
        let report = books.export(self.options()?, shower()).await?;
        let Some(manifest) = &report.manifest else {
            anyhow::bail!("nothing was exported, now or before");
        };
        if json {
            return print_json(&said(&report, manifest));
        }
        let folder = dir.display();
        if !report.new {
            println!("{folder} has everything: run {} ends with the newest bill", manifest.run);
            return Ok(());
        }
        let resumed = if report.resumed { ", finishing a run that had been stopped" } else { "" };
        println!(
            "run {} into {folder}{resumed}: {} rows in {} files",
            manifest.run,
            manifest.rows,
            manifest.files.len()
        );
        for (currency, sums) in &manifest.totals {
            for (column, sum) in sums {
                println!("  {column:<24} {sum:>28}  {currency}");
            }
        }
        Ok(())
    }

    fn options(self) -> anyhow::Result<ExportOptions> {
        if let Some(path) = &self.repeat {
            let (manifest, _) = Manifest::read(path)?;
            return Ok(ExportOptions::repeating(manifest, self.out)?);
        }
        let (Some(dataset), Some(format)) = (self.dataset, self.format) else {
            anyhow::bail!("--dataset and --format say what to write");
        };
        let range = match (self.after_seq, self.through_seq) {
            (None, None) => ExportRange::Next,
            (after, through) => ExportRange::Between { after, through },
        };
        Ok(ExportOptions {
            dir: self.out,
            dataset: match dataset {
                DatasetArg::Usage => Dataset::Usage,
                DatasetArg::Cost => Dataset::Cost,
                DatasetArg::Focus12 => Dataset::Focus12,
                DatasetArg::Focus14 => Dataset::Focus14,
            },
            format: match format {
                FormatArg::Csv => Format::Csv,
                FormatArg::Jsonl => Format::Jsonl,
                FormatArg::Parquet => Format::Parquet,
            },
            filter: ExportFilter { account: self.account, org: self.org, from: self.from, to: self.to },
            range,
            part_rows: self.part_rows,
            provider: self.provider,
            csv_guard: !self.csv_raw,
        })
    }
}

fn said(report: &ExportReport, manifest: &Manifest) -> serde_json::Value {
    serde_json::json!({
        "object": "export",
        "new": report.new,
        "resumed": report.resumed,
        "run": manifest.run,
        "dataset": manifest.settings.dataset,
        "format": manifest.settings.format,
        "ranges": manifest.ranges,
        "files": manifest.files.len(),
        "rows": manifest.rows,
        "totals": manifest.totals,
    })
}

/// A bar on a terminal; elsewhere a line now and then. Both on stderr.
fn shower() -> impl FnMut(Progress) + Send + 'static {
    let bar = std::io::stderr().is_terminal().then(|| {
        let style =
            ProgressStyle::with_template("{bar:40} {percent:>3}%  {msg}  {elapsed} gone, {eta} to go")
                .expect("the template is well formed");
        ProgressBar::new(0).with_style(style).with_finish(ProgressFinish::AndClear)
    });
    let mut said = Instant::now();
    move |Progress { done, total, rows, files }| {
        let words = format!("{rows} rows in {files} whole files");
        match &bar {
            Some(bar) => {
                bar.set_length(total);
                bar.set_position(done);
                bar.set_message(words);
            }
            None if said.elapsed() >= LINE_EVERY => {
                said = Instant::now();
                // Nobody may be reading.
                let _ = writeln!(std::io::stderr(), "{done} of {total} facts, {words}");
            }
            None => {}
        }
    }
}

impl VerifyArgs {
    async fn run(self) -> anyhow::Result<()> {
        let audit: Audit = match self.ledger {
            true => books(&self.config).await?.verify_export(&self.dir).await?,
            false => {
                let dir = self.dir.clone();
                tokio::task::spawn_blocking(move || verify_export(&dir)).await??
            }
        };
        if self.json {
            print_json(&audit)?;
        } else {
            super::money::print_checks(&audit);
        }
        anyhow::ensure!(audit.is_clean(), "the export does not hold: see the findings above");
        Ok(())
    }
}
