//! Exports: the ledger's facts as files that other people's tools read, and that prove what they are.
//!
//! ```text
//! usage_events ─┐                        ┌─ usage-000001.parquet, usage-000002.parquet, …
//!               ├─► rows of a dataset ──►┤
//! credit_grants ┘   priced again         └─ manifest-000001.json ◄─ manifest-000002.json ◄─ …
//! ```
//!
//! - The same range gives the same bytes: parts, manifests, everything. Nothing of the clock or the machine goes in.
//! - A further run into a folder goes on after the last one. A run that was killed goes on after its last whole part.
//! - A bill whose lines do not come to what was billed stops the export.
//! - Memory is bounded by a part, whatever is exported.
//!
//! | concept | module |
//! | --- | --- |
//! | what a row is | `bills`, `focus`; `table` |
//! | where it comes from | `source` |
//! | how it is written | `csv`, `json_lines`, `parquet_file`; `part` |
//! | what has been written | `manifest`, `journal` |
//! | what is to be done, and doing it | `plan`, `run` |
//! | is it all there? | `verify` |

mod bills;
mod csv;
mod error;
mod focus;
mod journal;
mod json_lines;
mod manifest;
mod parquet_file;
mod part;
mod plan;
mod run;
mod source;
mod table;
mod verify;

use std::path::PathBuf;

pub use error::ExportError;
pub use manifest::{FileRecord, Manifest, Range, Settings};
use time::{Date, Time};
pub use verify::verify;

use self::{focus::Version, source::Source, table::Table};

/// What the rows are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dataset {
    /// A row a request: what it used, how it went, what it cost.
    Usage,
    /// A row a request and SKU: quantity, unit price, cost.
    Cost,
    /// FOCUS 1.2 Cost and Usage.
    Focus12,
    /// FOCUS 1.4 Cost and Usage.
    Focus14,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Csv,
    Jsonl,
    Parquet,
}

/// Which facts are exported; None leaves a side open.
#[derive(Clone, Debug, Default)]
pub struct ExportFilter {
    pub account: Option<String>,
    pub org: Option<String>,
    /// UTC day of admission.
    pub from: Option<Date>,
    /// The day after the last.
    pub to: Option<Date>,
}

/// Which stretch of the ledger.
#[derive(Clone, Debug)]
pub enum ExportRange {
    /// What the folder does not have yet.
    Next,
    /// Bills with a sequence number over `after`, up to and including `through`; no other facts.
    Between { after: Option<i64>, through: Option<i64> },
    /// Exactly what another run exported, with the same bytes.
    Repeat(Box<Manifest>),
}

#[derive(Clone, Debug)]
pub struct ExportOptions {
    pub dir: PathBuf,
    pub dataset: Dataset,
    pub format: Format,
    pub filter: ExportFilter,
    pub range: ExportRange,
    /// Rows of one part file at most, and facts that it stands for. Memory grows with it.
    pub part_rows: u64,
    /// Who sells, as FOCUS columns name it.
    pub provider: String,
    /// Whether CSV text that a spreadsheet would run as a formula gets an apostrophe in front.
    pub csv_guard: bool,
}

/// How far a run is.
#[derive(Clone, Copy, Debug)]
pub struct Progress {
    /// Sequence numbers passed, of how many.
    pub done: u64,
    pub total: u64,
    pub rows: u64,
    pub files: u64,
}

/// What an export has done.
#[derive(Clone, Debug)]
pub struct ExportReport {
    /// The newest manifest of the folder. None only where nothing was ever exported.
    pub manifest: Option<Manifest>,
    /// Whether it went on from parts that an earlier try had made.
    pub resumed: bool,
    /// False when the folder had everything already.
    pub new: bool,
}

impl Dataset {
    pub const ALL: [Dataset; 4] = [Dataset::Usage, Dataset::Cost, Dataset::Focus12, Dataset::Focus14];

    pub fn name(self) -> &'static str {
        match self {
            Dataset::Usage => "usage",
            Dataset::Cost => "cost",
            Dataset::Focus12 => "focus-1.2",
            Dataset::Focus14 => "focus-1.4",
        }
    }

    pub fn named(name: &str) -> Option<Dataset> {
        Dataset::ALL.into_iter().find(|dataset| dataset.name() == name)
    }

    pub(crate) fn table(self) -> Table {
        match self {
            Dataset::Usage => bills::USAGE,
            Dataset::Cost => bills::COST,
            Dataset::Focus12 => Version::V1_2.table(),
            Dataset::Focus14 => Version::V1_4.table(),
        }
    }

    pub(crate) fn focus(self) -> Option<Version> {
        match self {
            Dataset::Usage | Dataset::Cost => None,
            Dataset::Focus12 => Some(Version::V1_2),
            Dataset::Focus14 => Some(Version::V1_4),
        }
    }

    pub(crate) fn sources(self) -> &'static [Source] {
        match self {
            Dataset::Usage | Dataset::Cost => &[Source::UsageEvents],
            Dataset::Focus12 | Dataset::Focus14 => &[Source::UsageEvents, Source::CreditGrants],
        }
    }
}

impl Format {
    pub const ALL: [Format; 3] = [Format::Csv, Format::Jsonl, Format::Parquet];

    pub fn name(self) -> &'static str {
        match self {
            Format::Csv => "csv",
            Format::Jsonl => "jsonl",
            Format::Parquet => "parquet",
        }
    }

    pub fn named(name: &str) -> Option<Format> {
        Format::ALL.into_iter().find(|format| format.name() == name)
    }
}

impl ExportFilter {
    /// The filter's days as milliseconds: from the first moment on, up to but not including the last.
    pub(crate) fn bounds_ms(&self) -> (i64, i64) {
        let start_ms = |day: Date| day.with_time(Time::MIDNIGHT).assume_utc().unix_timestamp() * 1_000;
        (self.from.map_or(i64::MIN, start_ms), self.to.map_or(i64::MAX, start_ms))
    }
}

impl ExportOptions {
    fn check(&self) -> Result<(), ExportError> {
        let refuse = |field, problem: &str| Err(ExportError::Option { field, problem: problem.to_owned() });
        if self.part_rows == 0 {
            return refuse("--part-rows", "a part has at least 1 row");
        }
        if self.provider.trim().is_empty() || self.provider.chars().any(char::is_control) {
            return refuse("--provider", "write a name");
        }
        match (self.filter.from, self.filter.to) {
            (Some(from), Some(to)) if from >= to => {
                refuse("--to", "is the day after the last, so it lies after --from")
            }
            _ => Ok(()),
        }
    }

    fn settings(&self) -> Settings {
        Settings {
            dataset: self.dataset.name().to_owned(),
            format: self.format.name().to_owned(),
            part_rows: self.part_rows,
            provider: self.provider.clone(),
            csv_guard: self.csv_guard,
            account: self.filter.account.clone(),
            org: self.filter.org.clone(),
            from: self.filter.from.map(|day| day.to_string()),
            to: self.filter.to.map(|day| day.to_string()),
        }
    }

    /// The options that another run had, into a folder of one's own.
    pub fn repeating(manifest: Manifest, dir: PathBuf) -> Result<ExportOptions, ExportError> {
        let not = |problem: String| ExportError::Option { field: "--repeat", problem };
        let Settings { dataset, format, part_rows, provider, csv_guard, account, org, from, to } =
            manifest.settings.clone();
        let day = |text: Option<String>| {
            let format = time::macros::format_description!("[year]-[month]-[day]");
            text.map(|text| Date::parse(&text, format)).transpose().map_err(|error| not(error.to_string()))
        };
        Ok(ExportOptions {
            dir,
            dataset: Dataset::named(&dataset).ok_or_else(|| not(format!("no dataset {dataset:?}")))?,
            format: Format::named(&format).ok_or_else(|| not(format!("no format {format:?}")))?,
            filter: ExportFilter { account, org, from: day(from)?, to: day(to)? },
            range: ExportRange::Repeat(Box::new(manifest)),
            part_rows,
            provider,
            csv_guard,
        })
    }
}
