//! The run that is being made. A killed run goes on after the last part that is named here.
//!
//! The first line says what the run is, each further line names a part that is whole: written under another name, synced,
//! renamed, and only then named. A line that a crash has torn does not count; its part is made again, the same bytes.

use std::{
    fs::{self, File},
    io::{Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{
    ExportError,
    manifest::{FileRecord, Range, Settings, sync_dir_of, write_whole},
};

const NAME: &str = "unfinished.jsonl";

/// What a run was started as; it is finished as that, whatever the ledger holds by then.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Start {
    pub run: u64,
    /// The number of its first part.
    pub first_part: u64,
    pub settings: Settings,
    pub ranges: Vec<Range>,
    pub previous_manifest: Option<String>,
}

#[derive(Debug)]
pub(crate) struct Journal {
    path: PathBuf,
    file: File,
}

impl Journal {
    pub fn create(dir: &Path, start: &Start) -> Result<Journal, ExportError> {
        let path = dir.join(NAME);
        let mut line = serde_json::to_vec(start).expect("a start is plain data");
        line.push(b'\n');
        write_whole(&path, &line)?;
        let file = File::options().append(true).open(&path).map_err(ExportError::file(&path, "opened"))?;
        Ok(Journal { path, file })
    }

    /// The unfinished run of a folder and its whole parts, if there is one.
    pub fn open(dir: &Path) -> Result<Option<(Journal, Start, Vec<FileRecord>)>, ExportError> {
        let path = dir.join(NAME);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(ExportError::file(&path, "read")(error)),
        };
        let whole = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
        let not = |error: serde_json::Error| ExportError::Manifest {
            path: path.clone(),
            problem: error.to_string(),
        };
        let mut lines = text[..whole].split_inclusive(|byte| *byte == b'\n');
        let start = serde_json::from_slice(lines.next().unwrap_or_default()).map_err(not)?;
        let parts = lines.map(serde_json::from_slice).collect::<Result<_, _>>().map_err(not)?;
        let mut file = File::options().write(true).open(&path).map_err(ExportError::file(&path, "opened"))?;
        file.set_len(whole as u64)
            .and_then(|()| file.seek(SeekFrom::End(0)))
            .map_err(ExportError::file(&path, "cut to its whole lines"))?;
        Ok(Some((Journal { path, file }, start, parts)))
    }

    pub fn add(&mut self, part: &FileRecord) -> Result<(), ExportError> {
        let mut line = serde_json::to_vec(part).expect("a part is plain data");
        line.push(b'\n');
        self.file
            .write_all(&line)
            .and_then(|()| self.file.sync_data())
            .map_err(ExportError::file(&self.path, "written"))
    }

    /// The run is in a manifest.
    pub fn remove(self) -> Result<(), ExportError> {
        fs::remove_file(&self.path).map_err(ExportError::file(&self.path, "removed"))?;
        sync_dir_of(&self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(number: u64) -> FileRecord {
        FileRecord {
            name: format!("usage-{number:06}.csv"),
            sha256: String::new(),
            bytes: 1,
            rows: 1,
            source: "usage_events".to_owned(),
            first_sequence: 1,
            last_sequence: 2,
            totals: Default::default(),
            price_books: Default::default(),
        }
    }

    #[test]
    fn a_torn_line_does_not_count_and_the_next_one_is_not_glued_to_it() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Journal::open(dir.path()).unwrap().is_none());
        let settings = Settings {
            dataset: "usage".to_owned(),
            format: "csv".to_owned(),
            part_rows: 1,
            provider: "p".to_owned(),
            csv_guard: true,
            account: None,
            org: None,
            from: None,
            to: None,
        };
        let start = Start { run: 1, first_part: 1, settings, ranges: Vec::new(), previous_manifest: None };
        let mut journal = Journal::create(dir.path(), &start).unwrap();
        journal.add(&part(1)).unwrap();
        let whole = fs::read(dir.path().join(NAME)).unwrap();
        journal.add(&part(2)).unwrap();
        let two = fs::read(dir.path().join(NAME)).unwrap();
        for cut in whole.len()..two.len() {
            fs::write(dir.path().join(NAME), &two[..cut]).unwrap();
            let (mut journal, found, parts) = Journal::open(dir.path()).unwrap().unwrap();
            assert_eq!((found, parts), (start.clone(), vec![part(1)]), "cut at {cut}");
            journal.add(&part(3)).unwrap();
            let (journal, _, parts) = Journal::open(dir.path()).unwrap().unwrap();
            assert_eq!(parts, [part(1), part(3)]);
            drop(journal);
        }
        let (journal, _, _) = Journal::open(dir.path()).unwrap().unwrap();
        journal.remove().unwrap();
        assert!(Journal::open(dir.path()).unwrap().is_none());
    }
}
