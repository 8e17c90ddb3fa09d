//! Is an export what its manifests say, and do they say what the ledger says?
//!
//! Every byte is hashed, every row counted and every control column summed again, from the files alone. With the books at
//! hand, what was exported is also compared with what was billed.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufRead, BufReader},
    path::Path,
};

use super::{
    Dataset, ExportError, ExportFilter, Format,
    csv::CsvReader,
    manifest::{FileRecord, LATEST, Manifest, read_totals, sha256},
    parquet_file,
    part::hash_of,
    source::{Page, Source},
    table::{Kind, Table, Totals},
};
use crate::{
    Audit, Books, Check,
    ledger::{self, AccountKind},
    money::{DECIMALS, parse_decimal},
};

/// Checks a folder by itself.
pub fn verify(dir: &Path) -> Result<Audit, ExportError> {
    let manifests = Manifest::read_all(dir)?;
    let mut chain =
        Check::new("every manifest follows the one before, and every range begins where the last ended");
    let mut hashes = Check::new("every file has the size and SHA-256 of its manifest");
    let mut counts = Check::new("every file's rows and control totals are those of its manifest");
    let mut sums = Check::new("every manifest's totals are the sum of its files");
    chain.expect(!manifests.is_empty(), || format!("{} has no manifest", dir.display()));
    let mut before: Option<&(Manifest, String)> = None;
    for both in &manifests {
        let (manifest, _) = both;
        check_chain(&mut chain, manifest, before);
        before = Some(both);
        let (Some(dataset), Some(format)) =
            (Dataset::named(&manifest.settings.dataset), Format::named(&manifest.settings.format))
        else {
            sums.expect(false, || format!("run {}: a dataset or format of another version", manifest.run));
            continue;
        };
        let table = dataset.table();
        let (mut rows, mut totals) = (0, Totals::default());
        for file in &manifest.files {
            check_file(&mut hashes, &mut counts, dir, file, &table, format);
            rows += file.rows;
            totals.add(&read_totals(&table, &file.totals));
        }
        let same = rows == manifest.rows && totals == read_totals(&table, &manifest.totals);
        sums.expect(same, || format!("run {}: the files have {rows} rows and {totals:?}", manifest.run));
    }
    if let Some((_, hash)) = manifests.last() {
        let latest = std::fs::read(dir.join(LATEST)).map(|bytes| sha256(&bytes));
        chain.expect(latest.as_ref().ok() == Some(hash), || {
            format!("{LATEST} is not a copy of the last manifest")
        });
    }
    Ok(Audit { checks: vec![chain, hashes, counts, sums] })
}

impl Books {
    /// Checks a folder by itself and against these books.
    pub async fn verify_export(&self, dir: &Path) -> Result<Audit, ExportError> {
        let folder = dir.to_owned();
        let alone = tokio::task::spawn_blocking(move || verify(&folder));
        let mut audit = alone.await.map_err(|_| ExportError::Stopped("the check ended early"))??;
        let mut billed = Check::new("every run's cost is the sum of the ledger's bills in its range");
        for (manifest, _) in Manifest::read_all(dir)? {
            self.check_billed(&mut billed, &manifest).await?;
        }
        audit.checks.push(billed);
        Ok(audit)
    }

    async fn check_billed(&self, check: &mut Check, manifest: &Manifest) -> Result<(), ExportError> {
        let options = super::ExportOptions::repeating(manifest.clone(), Default::default())?;
        let mut conn = self.database.read().await?;
        let accounts = ledger::accounts(&mut conn).await?.into_iter();
        let kinds: BTreeMap<_, _> =
            accounts.map(|balance| (balance.account.to_string(), balance.kind)).collect();
        drop(conn);
        let mut ledger = Billed::default();
        for range in &manifest.ranges {
            let Some(source) = Source::named(&range.source) else { continue };
            let bounds = (range.after, range.through);
            ledger.add(self, source, bounds, &options.filter, &kinds).await?;
        }
        let found = read_totals(&options.dataset.table(), &manifest.totals);
        let expected = match options.dataset {
            Dataset::Usage | Dataset::Cost => vec![("cost", ledger.cost)],
            Dataset::Focus12 | Dataset::Focus14 => vec![
                ("EffectiveCost", ledger.cost),
                ("BilledCost", ledger.postpaid + ledger.purchased),
                ("ContractedCost", ledger.cost + ledger.purchased),
            ],
        };
        for (column, expected) in expected {
            let sum = found.0.values().filter_map(|sums| sums.get(column)).sum::<i128>();
            check.expect(sum == expected, || {
                format!("run {}: {column} is {sum}, the ledger has {expected} (10^-12 dollars)", manifest.run)
            });
        }
        if options.dataset == Dataset::Usage {
            check.expect(manifest.rows == ledger.bills, || {
                format!("run {}: {} rows, the ledger has {} bills", manifest.run, manifest.rows, ledger.bills)
            });
        }
        Ok(())
    }
}

/// What the ledger has in a range, as it was billed. Sums of what is stored: nothing is derived here.
#[derive(Default)]
struct Billed {
    bills: u64,
    cost: i128,
    postpaid: i128,
    purchased: i128,
}

impl Billed {
    async fn add(
        &mut self,
        books: &Books,
        source: Source,
        (mut after, through): (i64, i64),
        filter: &ExportFilter,
        kinds: &BTreeMap<String, AccountKind>,
    ) -> Result<(), ExportError> {
        loop {
            let page = source.page(&mut books.database.read().await?, after, through, filter).await?;
            let Some(last) = page.last() else { return Ok(()) };
            after = last;
            match page {
                Page::UsageEvents(events) => {
                    for event in events {
                        let cost = i128::from(event.cost_pico);
                        self.bills += 1;
                        self.cost += cost;
                        if kinds.get(&event.account).is_some_and(|kind| *kind != AccountKind::Prepaid) {
                            self.postpaid += cost;
                        }
                    }
                }
                Page::CreditGrants(grants) => {
                    self.purchased += grants.iter().map(|grant| i128::from(grant.amount_pico)).sum::<i128>();
                }
            }
        }
    }
}

fn check_chain(check: &mut Check, manifest: &Manifest, before: Option<&(Manifest, String)>) {
    let run = manifest.run;
    match before {
        None => {
            check.expect(run == 1, || {
                format!("the first manifest is that of run {run}: earlier ones are missing")
            });
            check.expect(manifest.previous_manifest.is_none() || run != 1, || {
                "run 1 names a predecessor".to_owned()
            });
        }
        Some((previous, hash)) => {
            check
                .expect(manifest.previous_manifest.as_ref() == Some(hash) && run == previous.run + 1, || {
                    format!("run {run} does not follow run {} with the hash {hash}", previous.run)
                });
            check.expect(manifest.settings == previous.settings, || format!("run {run} has other settings"));
            for range in &manifest.ranges {
                let ended = previous.through(&range.source);
                check.expect(ended.is_none_or(|ended| ended == range.after), || {
                    format!(
                        "run {run}: {} begin after {}, the run before ended at {ended:?}",
                        range.source, range.after
                    )
                });
            }
        }
    }
    for range in &manifest.ranges {
        let mut reached = range.after;
        for file in manifest.files.iter().filter(|file| file.source == range.source) {
            let ordered = reached < file.first_sequence
                && file.first_sequence <= file.last_sequence
                && file.last_sequence <= range.through;
            check.expect(ordered, || format!("{}: its sequence numbers lie outside of its place", file.name));
            reached = file.last_sequence;
        }
    }
}

fn check_file(
    hashes: &mut Check,
    counts: &mut Check,
    dir: &Path,
    file: &FileRecord,
    table: &Table,
    format: Format,
) {
    let path = dir.join(&file.name);
    match hash_of(&path) {
        Ok((hash, bytes)) => {
            hashes.expect((&hash, bytes) == (&file.sha256, file.bytes), || {
                format!("{}: {bytes} bytes with the hash {hash}", file.name)
            });
        }
        Err(error) => {
            hashes.expect(false, || format!("{}: {error}", file.name));
            return;
        }
    }
    match recount(&path, table, format) {
        Ok((rows, totals)) => {
            let same = rows == file.rows && totals == read_totals(table, &file.totals);
            counts.expect(same, || format!("{}: {rows} rows and {totals:?}", file.name));
        }
        Err(error) => counts.expect(false, || format!("{}: {error}", file.name)),
    }
}

type Counted = (u64, Totals);
type BoxError = Box<dyn std::error::Error + Send + Sync>;

fn recount(path: &Path, table: &Table, format: Format) -> Result<Counted, BoxError> {
    match format {
        Format::Csv => recount_csv(BufReader::new(File::open(path)?), table),
        Format::Jsonl => recount_json_lines(BufReader::new(File::open(path)?), table),
        Format::Parquet => Ok(parquet_file::recount(path, table)?),
    }
}

fn recount_csv(input: impl BufRead, table: &Table) -> Result<Counted, BoxError> {
    let mut reader = CsvReader::new(input);
    let header = reader.record()?.unwrap_or_default();
    if !header.iter().eq(table.columns.iter().map(|column| column.name)) {
        return Err("the header has other columns".into());
    }
    let (mut rows, mut totals) = (0, Totals::default());
    let currency = table.index_of(table.currency);
    while let Some(record) = reader.record()? {
        rows += 1;
        let cell = |index: usize| record.get(index).map_or("", String::as_str);
        for (index, column) in table.controls() {
            if !cell(index).is_empty() {
                totals.add_value(cell(currency), column.name, number(cell(index), column.kind)?);
            }
        }
    }
    Ok((rows, totals))
}

fn recount_json_lines(input: impl BufRead, table: &Table) -> Result<Counted, BoxError> {
    let (mut rows, mut totals) = (0, Totals::default());
    for line in input.lines() {
        let row: serde_json::Value = serde_json::from_str(&line?)?;
        rows += 1;
        let currency = row[table.currency].as_str().unwrap_or_default();
        for (_, column) in table.controls() {
            match &row[column.name] {
                serde_json::Value::Null => {}
                serde_json::Value::String(text) => {
                    totals.add_value(currency, column.name, number(text, column.kind)?);
                }
                other => totals.add_value(currency, column.name, number(&other.to_string(), column.kind)?),
            }
        }
    }
    Ok((rows, totals))
}

fn number(text: &str, kind: Kind) -> Result<i128, BoxError> {
    match kind {
        Kind::Decimal => Ok(parse_decimal(text, DECIMALS)?),
        _ => Ok(text.parse()?),
    }
}
