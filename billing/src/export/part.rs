//! One part file: rows go into a temporary name; finishing syncs it and puts it in place under its own.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::{self, BufWriter, Write},
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use super::{
    ExportError, Format,
    csv::CsvWriter,
    json_lines::JsonLinesWriter,
    manifest::{FileRecord, sync_dir_of, written},
    parquet_file::ParquetWriter,
    table::{Cell, RowTotals, Table},
};

/// The extension of a part that is not whole.
const TEMPORARY: &str = "tmp";

pub(crate) struct Part {
    path: PathBuf,
    name: String,
    temporary: PathBuf,
    encoder: Encoder,
    table: Table,
    rows: u64,
    totals: RowTotals,
}

enum Encoder {
    Csv(CsvWriter<BufWriter<Hashed>>),
    JsonLines(JsonLinesWriter<BufWriter<Hashed>>),
    Parquet(Box<ParquetWriter<Hashed>>),
}

/// A file whose hash is known when it is written.
struct Hashed {
    file: File,
    hash: Sha256,
    bytes: u64,
}

/// What the rows of a part were made of.
#[derive(Debug, Default)]
pub(crate) struct Origin {
    pub source: &'static str,
    pub first_sequence: i64,
    pub last_sequence: i64,
    pub price_books: BTreeSet<String>,
}

impl Part {
    pub fn create(
        dir: &Path,
        name: String,
        table: Table,
        format: Format,
        csv_guard: bool,
    ) -> Result<Part, ExportError> {
        let path = dir.join(&name);
        let temporary = path.with_added_extension(TEMPORARY);
        let file = File::create(&temporary).map_err(ExportError::file(&temporary, "created"))?;
        let hashed = Hashed { file, hash: Sha256::new(), bytes: 0 };
        let failed = ExportError::file(&temporary, "written");
        let encoder = match format {
            Format::Csv => {
                let writer =
                    CsvWriter::new(BufWriter::new(hashed), table.columns, csv_guard).map_err(failed)?;
                Encoder::Csv(writer)
            }
            Format::Jsonl => Encoder::JsonLines(JsonLinesWriter::new(BufWriter::new(hashed), table.columns)),
            Format::Parquet => {
                let parquet = |source| ExportError::Parquet { path: temporary.clone(), source };
                Encoder::Parquet(Box::new(ParquetWriter::new(hashed, table.columns).map_err(parquet)?))
            }
        };
        let totals = RowTotals::new(&table);
        Ok(Part { path, name, temporary, encoder, table, rows: 0, totals })
    }

    pub fn row(&mut self, cells: &[Cell<'_>]) -> Result<(), ExportError> {
        self.rows += 1;
        self.totals.add(cells);
        let Part { encoder, temporary, .. } = self;
        match encoder {
            Encoder::Csv(writer) => writer.row(cells).map_err(ExportError::file(temporary, "written")),
            Encoder::JsonLines(writer) => writer.row(cells).map_err(ExportError::file(temporary, "written")),
            Encoder::Parquet(writer) => {
                writer.row(cells).map_err(|source| ExportError::Parquet { path: temporary.clone(), source })
            }
        }
    }

    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Makes the part durable under its own name.
    pub fn finish(self, origin: Origin) -> Result<FileRecord, ExportError> {
        let Part { path, name, temporary, encoder, table, rows, totals, .. } = self;
        let failed = || ExportError::file(&temporary, "written");
        let unbuffered =
            |writer: BufWriter<Hashed>| writer.into_inner().map_err(|error| failed()(error.into_error()));
        let hashed = match encoder {
            Encoder::Csv(writer) => unbuffered(writer.finish().map_err(failed())?)?,
            Encoder::JsonLines(writer) => unbuffered(writer.finish().map_err(failed())?)?,
            Encoder::Parquet(writer) => {
                writer.finish().map_err(|source| ExportError::Parquet { path: temporary.clone(), source })?
            }
        };
        hashed.file.sync_all().map_err(failed())?;
        fs::rename(&temporary, &path).map_err(ExportError::file(&path, "put in place"))?;
        sync_dir_of(&path)?;
        Ok(FileRecord {
            name,
            sha256: hex::encode(hashed.hash.finalize()),
            bytes: hashed.bytes,
            rows,
            source: origin.source.to_owned(),
            first_sequence: origin.first_sequence,
            last_sequence: origin.last_sequence,
            totals: written(&table, &totals.totals()),
            price_books: origin.price_books,
        })
    }
}

impl Write for Hashed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.hash.update(&bytes[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

/// The hash and size of a file.
pub(crate) fn hash_of(path: &Path) -> io::Result<(String, u64)> {
    let mut sink = HashSink(Sha256::new());
    let bytes = io::copy(&mut File::open(path)?, &mut sink)?;
    Ok((hex::encode(sink.0.finalize()), bytes))
}

struct HashSink(Sha256);

impl Write for HashSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
