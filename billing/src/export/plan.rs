//! What a run has to do: go on after the last one, repeat another, or finish the one that was left unfinished.

use std::{
    fs::{File, TryLockError},
    path::Path,
};

use super::{
    ExportError, ExportOptions, ExportRange,
    journal::{Journal, Start},
    manifest::{FileRecord, LATEST, Manifest, Range, Settings, write_whole},
    part::hash_of,
    source::Source,
};
use crate::Books;

pub(crate) struct Plan {
    pub start: Start,
    pub journal: Journal,
    /// What an earlier, unfinished try has made.
    pub parts: Vec<FileRecord>,
    pub resumed: bool,
}

impl Books {
    /// What to do in a folder. None when it has everything.
    pub(super) async fn plan(&self, options: &ExportOptions) -> Result<Option<Plan>, ExportError> {
        let manifests = Manifest::read_all(&options.dir)?;
        let newest = manifests.last();
        let settings = options.settings();
        for existing in newest.iter().map(|(manifest, _)| &manifest.settings) {
            same(existing, &settings)?;
        }
        if let Some((journal, start, parts)) = Journal::open(&options.dir)? {
            if newest.is_none_or(|(manifest, _)| manifest.run < start.run) {
                same(&start.settings, &settings)?;
                return Plan::resume(options, journal, start, parts).map(Some);
            }
            // The last thing that run had to do.
            journal.remove()?;
        }
        if let Some((manifest, _)) = newest {
            write_whole(&options.dir.join(LATEST), &manifest.to_bytes())?;
        }
        let files = manifests.iter().map(|(manifest, _)| manifest.files.len() as u64).sum::<u64>();
        let mut start = Start {
            run: newest.map_or(1, |(manifest, _)| manifest.run + 1),
            first_part: files + 1,
            settings,
            ranges: Vec::new(),
            previous_manifest: newest.map(|(_, hash)| hash.clone()),
        };
        match &options.range {
            ExportRange::Repeat(manifest) => repeat(&mut start, manifest, newest.is_some())?,
            range => start.ranges = self.ranges(options, range, newest.map(|(manifest, _)| manifest)).await?,
        }
        if newest.is_some() && start.ranges.iter().all(|range| range.after == range.through) {
            return Ok(None);
        }
        let journal = Journal::create(&options.dir, &start)?;
        Ok(Some(Plan { start, journal, parts: Vec::new(), resumed: false }))
    }

    /// The range of each source: after what the folder has, up to what the ledger has now.
    async fn ranges(
        &self,
        options: &ExportOptions,
        asked: &ExportRange,
        newest: Option<&Manifest>,
    ) -> Result<Vec<Range>, ExportError> {
        let (after, through) = match asked {
            ExportRange::Between { after, through } => (*after, *through),
            _ => (None, None),
        };
        let bounded = after.is_some() || through.is_some();
        let sources = options.dataset.sources().iter();
        let mut ranges = Vec::new();
        for source in sources.filter(|source| **source == Source::UsageEvents || !bounded) {
            let exported = newest.and_then(|manifest| manifest.through(source.name()));
            let last = source.newest(&mut self.database.read().await?).await?;
            let option = |field, problem| Err(ExportError::Option { field, problem });
            let from = match (after, exported) {
                (Some(after), Some(exported)) if after != exported => {
                    let problem =
                        format!("the folder's export ends at {exported}; leave the option out to go on");
                    return option("--after-seq", problem);
                }
                (after, exported) => after.or(exported).unwrap_or(0),
            };
            let to = through.unwrap_or(last);
            if through.is_some_and(|through| through > last || through < from) {
                return option(
                    "--through-seq",
                    format!("must lie between {from} and {last}, the ledger's newest"),
                );
            }
            ranges.push(Range { source: source.name().to_owned(), after: from, through: to.max(from) });
        }
        Ok(ranges)
    }
}
impl Plan {
    /// Takes over the parts that are whole; from the first that is not, everything is made again.
    fn resume(
        options: &ExportOptions,
        mut journal: Journal,
        start: Start,
        mut parts: Vec<FileRecord>,
    ) -> Result<Plan, ExportError> {
        let asked = match &options.range {
            ExportRange::Repeat(manifest) => Some(&manifest.ranges) == Some(&start.ranges),
            ExportRange::Between { after, through } => start.ranges.iter().all(|range| {
                after.is_none_or(|after| after == range.after) && through.is_none_or(|to| to == range.through)
            }),
            ExportRange::Next => true,
        };
        if !asked {
            return Err(ExportError::OtherExport {
                field: "the range",
                existing: format!("unfinished run of {:?}", start.ranges),
                asked: "another one".to_owned(),
            });
        }
        let is_whole = |part: &FileRecord| {
            hash_of(&options.dir.join(&part.name))
                .is_ok_and(|found| found == (part.sha256.clone(), part.bytes))
        };
        let whole = parts.iter().take_while(|part| is_whole(part)).count();
        if whole < parts.len() {
            parts.truncate(whole);
            journal = Journal::create(&options.dir, &start)?;
            for part in &parts {
                journal.add(part)?;
            }
        }
        Ok(Plan { start, journal, parts, resumed: true })
    }
}

/// A run that is to be like another in all bytes: with its number, parts' numbers and predecessor.
fn repeat(start: &mut Start, manifest: &Manifest, has_runs: bool) -> Result<(), ExportError> {
    if has_runs && (start.run, &start.previous_manifest) != (manifest.run, &manifest.previous_manifest) {
        return Err(ExportError::Option {
            field: "--repeat",
            problem: format!("this is run {}, which does not follow what the folder has", manifest.run),
        });
    }
    let number = |file: &FileRecord| file.name.rsplit(['-', '.']).nth(1).and_then(|text| text.parse().ok());
    start.first_part = manifest.files.first().and_then(number).unwrap_or(start.first_part);
    start.run = manifest.run;
    start.previous_manifest = manifest.previous_manifest.clone();
    start.ranges = manifest.ranges.clone();
    Ok(())
}

fn same(existing: &Settings, asked: &Settings) -> Result<(), ExportError> {
    match existing.difference(asked) {
        None => Ok(()),
        Some((field, existing, asked)) => Err(ExportError::OtherExport { field, existing, asked }),
    }
}

/// Held for as long as the file is open, by one process.
pub(crate) fn lock(dir: &Path) -> Result<File, ExportError> {
    let path = dir.join(".lock");
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.map_err(ExportError::file(&path, "created"))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(ExportError::Busy { dir: dir.to_owned() }),
        Err(TryLockError::Error(source)) => Err(ExportError::file(&path, "locked")(source)),
    }
}
