//! What an export says of itself. One manifest a run, each with the hash of the one before: a chain.
//!
//! ```text
//! manifest-000001.json ◄── manifest-000002.json ◄── manifest-000003.json   and manifest.json, a copy of the last
//! usage-000001.parquet …   usage-000003.parquet …   usage-000004.parquet   parts are numbered through all runs
//! ```
//!
//! Nothing in a manifest depends on when or where it was written, so the same range gives the same bytes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{
    ExportError,
    table::{Kind, Table, Totals},
};
use crate::money::{DECIMALS, parse_decimal, push_decimal};

pub(crate) const FORMAT_VERSION: u32 = 1;
/// A copy of the newest manifest, for who only wants to know what there is.
pub(crate) const LATEST: &str = "manifest.json";

/// The manifest of one run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub format_version: u32,
    /// 1 for the first run into a folder.
    pub run: u64,
    pub settings: Settings,
    /// What was read: of each source, everything after `after` up to and including `through`.
    pub ranges: Vec<Range>,
    pub files: Vec<FileRecord>,
    pub rows: u64,
    /// Control totals by currency and column: counts as integers, amounts as decimals.
    pub totals: BTreeMap<String, BTreeMap<String, String>>,
    /// The price books that the rows were derived with.
    pub price_books: BTreeSet<String>,
    /// SHA-256 of the previous run's manifest, None for the first.
    pub previous_manifest: Option<String>,
}

/// What decides the rows and bytes of an export beside its range. The same for all runs into one folder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    pub dataset: String,
    pub format: String,
    pub part_rows: u64,
    /// Who sells, in FOCUS columns.
    pub provider: String,
    /// Whether CSV text that a spreadsheet would run got an apostrophe in front.
    pub csv_guard: bool,
    pub account: Option<String>,
    pub org: Option<String>,
    /// First day, YYYY-MM-DD UTC.
    pub from: Option<String>,
    /// The day after the last.
    pub to: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Range {
    pub source: String,
    pub after: i64,
    pub through: i64,
}

/// One part file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRecord {
    pub name: String,
    pub sha256: String,
    pub bytes: u64,
    pub rows: u64,
    pub source: String,
    pub first_sequence: i64,
    pub last_sequence: i64,
    pub totals: BTreeMap<String, BTreeMap<String, String>>,
    pub price_books: BTreeSet<String>,
}

impl Manifest {
    pub(crate) fn name(run: u64) -> String {
        format!("manifest-{run:06}.json")
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec_pretty(self).expect("a manifest is plain data");
        bytes.push(b'\n');
        bytes
    }

    /// Reads a manifest and the hash of its bytes.
    pub fn read(path: &Path) -> Result<(Manifest, String), ExportError> {
        let bytes = fs::read(path).map_err(ExportError::file(path, "read"))?;
        let not = |problem: String| ExportError::Manifest { path: path.to_owned(), problem };
        let manifest: Manifest = serde_json::from_slice(&bytes).map_err(|error| not(error.to_string()))?;
        if manifest.format_version != FORMAT_VERSION {
            return Err(not(format!("format_version {}", manifest.format_version)));
        }
        Ok((manifest, sha256(&bytes)))
    }

    /// Every run's manifest in a folder, in order, with the hashes of their bytes.
    pub fn read_all(dir: &Path) -> Result<Vec<(Manifest, String)>, ExportError> {
        let mut manifests = Vec::new();
        let mut paths: Vec<PathBuf> = Vec::new();
        for entry in fs::read_dir(dir).map_err(ExportError::file(dir, "listed"))? {
            let entry = entry.map_err(ExportError::file(dir, "listed"))?;
            let name = entry.file_name().into_string().unwrap_or_default();
            let number = name.strip_prefix("manifest-").and_then(|rest| rest.strip_suffix(".json"));
            if number.is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit())) {
                paths.push(entry.path());
            }
        }
        paths.sort();
        for path in paths {
            manifests.push(Manifest::read(&path)?);
        }
        manifests.sort_by_key(|(manifest, _)| manifest.run);
        Ok(manifests)
    }

    /// How far each source was exported.
    pub(crate) fn through(&self, source: &str) -> Option<i64> {
        self.ranges.iter().find(|range| range.source == source).map(|range| range.through)
    }
}

impl Settings {
    /// The first setting in which two differ: its name and both values.
    pub(crate) fn difference(&self, other: &Settings) -> Option<(&'static str, String, String)> {
        let shown = |value: &Option<String>| value.clone().unwrap_or_else(|| "none".to_owned());
        let pairs = |settings: &Settings| {
            [
                ("--dataset", settings.dataset.clone()),
                ("--format", settings.format.clone()),
                ("--part-rows", settings.part_rows.to_string()),
                ("--provider", settings.provider.clone()),
                ("--csv-raw", (!settings.csv_guard).to_string()),
                ("--account", shown(&settings.account)),
                ("--org", shown(&settings.org)),
                ("--from", shown(&settings.from)),
                ("--to", shown(&settings.to)),
            ]
        };
        let both = pairs(self).into_iter().zip(pairs(other));
        both.into_iter()
            .find(|(mine, theirs)| mine.1 != theirs.1)
            .map(|(mine, theirs)| (mine.0, mine.1, theirs.1))
    }
}

/// Totals as a manifest has them.
pub(crate) fn written(table: &Table, totals: &Totals) -> BTreeMap<String, BTreeMap<String, String>> {
    let text = |column: &String, sum: &i128| {
        let decimal = table.columns[table.index_of(column)].kind == Kind::Decimal;
        let mut text = Vec::new();
        if decimal {
            push_decimal(&mut text, *sum);
        } else {
            text.extend(sum.to_string().bytes());
        }
        String::from_utf8(text).expect("digits are ASCII")
    };
    let sums = |sums: &BTreeMap<String, i128>| {
        sums.iter().map(|(column, sum)| (column.clone(), text(column, sum))).collect()
    };
    totals.0.iter().map(|(currency, of)| (currency.clone(), sums(of))).collect()
}

/// The inverse of [`written`]. What is not a number counts as nothing, and is found by who compares.
pub(crate) fn read_totals(table: &Table, text: &BTreeMap<String, BTreeMap<String, String>>) -> Totals {
    let mut totals = Totals::default();
    for (currency, sums) in text {
        for (name, sum) in sums {
            let column = table.columns.iter().find(|column| column.name == name);
            let value = match column.map(|column| column.kind) {
                Some(Kind::Decimal) => parse_decimal(sum, DECIMALS).unwrap_or_default(),
                _ => sum.parse().unwrap_or_default(),
            };
            totals.add_value(currency, name, value);
        }
    }
    totals
}

pub(crate) fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

/// Replaces a file so that a crash leaves the old one or the new one, whole.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> Result<(), ExportError> {
    let temporary = path.with_added_extension("tmp");
    let written = ExportError::file(&temporary, "written");
    File::create(&temporary)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .map_err(written)?;
    fs::rename(&temporary, path).map_err(ExportError::file(path, "put in place"))?;
    sync_dir_of(path)
}

/// Makes a rename in the file's folder durable.
pub(crate) fn sync_dir_of(path: &Path) -> Result<(), ExportError> {
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(ExportError::file(path, "made durable"))
}
