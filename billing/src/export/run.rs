//! One run: what is still missing, read in pages by one task and written in parts by another.
//!
//! ```text
//! database ─ pages of a source, in order ─►│ 2 │─► writer: rows ─► part.tmp ─ fsync, rename ─► journal ─► … ─► manifest
//! ```
//! Memory is two pages, one row group or the charges of one part, and the list of parts.

use std::{collections::HashSet, fs};

use tokio::sync::mpsc;

use super::{
    Dataset, ExportError, ExportFilter, ExportOptions, ExportReport, Progress,
    bills::{self, cost_cells, usage_cells},
    focus::{self, Charges},
    journal::{Journal, Start},
    manifest::{FORMAT_VERSION, FileRecord, LATEST, Manifest, Range, read_totals, write_whole, written},
    part::{Origin, Part},
    plan::{Plan, lock},
    source::{EventFact, GrantFact, Page, Source},
    table::Totals,
};
use crate::{Books, catalog::Catalog, database::Database, ledger, ledger::AccountKind};

/// Pages that wait for the writer.
const PAGES_WAITING: usize = 2;

/// What the reader sends.
enum Message {
    Page(Page),
    /// Everything was read. A channel that closes without this was cut off.
    End,
}

impl Books {
    /// Writes what a folder does not have yet, or finishes the run that was left unfinished there.
    ///
    /// # Cancel safety
    /// Cancel safe: what is on disk is whole parts and a journal, and the next call goes on from them.
    pub async fn export(
        &self,
        options: ExportOptions,
        progress: impl FnMut(Progress) + Send + 'static,
    ) -> Result<ExportReport, ExportError> {
        options.check()?;
        fs::create_dir_all(&options.dir).map_err(ExportError::file(&options.dir, "created"))?;
        let _lock = lock(&options.dir)?;
        let plan = self.plan(&options).await?;
        let Some(Plan { start, journal, parts, resumed }) = plan else {
            let newest = Manifest::read_all(&options.dir)?.pop();
            return Ok(ExportReport {
                manifest: newest.map(|(manifest, _)| manifest),
                resumed: false,
                new: false,
            });
        };
        let mut conn = self.database.read().await?;
        let catalog = Catalog::load(&mut conn).await?;
        let accounts = ledger::accounts(&mut conn).await?.into_iter();
        let prepaid = accounts.filter(|balance| balance.kind == AccountKind::Prepaid);
        let prepaid = prepaid.map(|balance| balance.account.to_string()).collect();
        drop(conn);

        let left = left_of(&start.ranges, parts.last())?;
        let filter = options.filter.clone();
        let writer = Writer {
            rows: parts.iter().map(|part| part.rows).sum(),
            progress: Box::new(progress),
            open: None,
            charges: Charges::default(),
            options,
            start,
            journal,
            parts,
            catalog,
            prepaid,
        };
        let (pages, received) = mpsc::channel(PAGES_WAITING);
        let reader = tokio::spawn(read(self.database.clone(), left, filter, pages));
        let written = tokio::task::spawn_blocking(move || writer.write(received));
        let written = written.await.map_err(|_| ExportError::Stopped("the writer ended early"))?;
        // A reader that failed is why the writer was cut off.
        reader.await.map_err(|_| ExportError::Stopped("the reader ended early"))??;
        Ok(ExportReport { manifest: Some(written?), resumed, new: true })
    }
}

/// What of the ranges comes after the last part.
fn left_of(ranges: &[Range], last: Option<&FileRecord>) -> Result<Vec<(Source, i64, i64)>, ExportError> {
    let mut left = Vec::new();
    for range in ranges {
        let source = Source::named(&range.source).ok_or_else(|| ExportError::Option {
            field: "--repeat",
            problem: format!("there is no source {:?} in this version", range.source),
        })?;
        left.push((source, range.after, range.through));
    }
    if let Some(last) = last {
        let reached = left.iter().position(|(source, _, _)| source.name() == last.source).unwrap_or(0);
        left.drain(..reached);
        if let Some((_, after, _)) = left.first_mut() {
            *after = last.last_sequence;
        }
    }
    Ok(left)
}

async fn read(
    database: Database,
    ranges: Vec<(Source, i64, i64)>,
    filter: ExportFilter,
    pages: mpsc::Sender<Message>,
) -> Result<(), ExportError> {
    for (source, mut after, through) in ranges {
        loop {
            let page = source.page(&mut database.read().await?, after, through, &filter).await?;
            let Some(last) = page.last() else { break };
            after = last;
            // A writer that is gone says itself why.
            if pages.send(Message::Page(page)).await.is_err() {
                return Ok(());
            }
        }
    }
    pages.send(Message::End).await.ok();
    Ok(())
}

struct Writer {
    options: ExportOptions,
    start: Start,
    journal: Journal,
    parts: Vec<FileRecord>,
    catalog: Catalog,
    prepaid: HashSet<String>,
    progress: Box<dyn FnMut(Progress) + Send>,
    open: Option<Open>,
    /// Of the open part, where rows are sums.
    charges: Charges,
    rows: u64,
}

struct Open {
    part: Part,
    origin: Origin,
    facts: u64,
}

impl Writer {
    fn write(mut self, mut pages: mpsc::Receiver<Message>) -> Result<Manifest, ExportError> {
        loop {
            match pages.blocking_recv() {
                Some(Message::Page(page)) => self.page(page)?,
                Some(Message::End) => break,
                None => return Err(ExportError::Stopped("it could not be read to the end")),
            }
        }
        self.close()?;
        let manifest = self.manifest();
        let (dir, bytes) = (&self.options.dir, manifest.to_bytes());
        write_whole(&dir.join(Manifest::name(manifest.run)), &bytes)?;
        write_whole(&dir.join(LATEST), &bytes)?;
        self.journal.remove()?;
        Ok(manifest)
    }

    fn page(&mut self, page: Page) -> Result<(), ExportError> {
        let reached = page.last();
        let source = match page {
            Page::UsageEvents(events) => {
                events.iter().try_for_each(|event| self.event(event))?;
                Source::UsageEvents
            }
            Page::CreditGrants(grants) => {
                grants.iter().try_for_each(|grant| self.grant(grant))?;
                Source::CreditGrants
            }
        };
        self.report(source, reached.unwrap_or_default());
        Ok(())
    }

    fn event(&mut self, event: &EventFact) -> Result<(), ExportError> {
        let lines = bills::lines(&self.catalog, event)?;
        let open = self.open(Source::UsageEvents, event.ordinal)?;
        if !open.origin.price_books.contains(&event.price_book) {
            open.origin.price_books.insert(event.price_book.clone());
        }
        let before = open.part.rows();
        match self.options.dataset {
            Dataset::Usage => self.open_part().row(&usage_cells(event))?,
            Dataset::Cost => {
                for line in &lines {
                    self.open_part().row(&cost_cells(event, line))?;
                }
            }
            Dataset::Focus12 | Dataset::Focus14 => self.charges.add(event, &lines),
        }
        self.rows += self.open_part().rows() - before;
        self.close_if_full()
    }

    fn grant(&mut self, grant: &GrantFact) -> Result<(), ExportError> {
        let Some(version) = self.options.dataset.focus() else { return Ok(()) };
        let charge = focus::purchase(grant);
        let provider = self.options.provider.clone();
        let open = self.open(Source::CreditGrants, grant.transaction_id)?;
        open.part.row(&charge.cells(version.table().columns, &provider))?;
        self.rows += 1;
        self.close_if_full()
    }

    /// The open part of a source, with the fact counted.
    fn open(&mut self, source: Source, sequence: i64) -> Result<&mut Open, ExportError> {
        if self.open.as_ref().is_some_and(|open| open.origin.source != source.name()) {
            self.close()?;
        }
        let open = match self.open.take() {
            Some(open) => open,
            None => {
                let number = self.start.first_part + self.parts.len() as u64;
                let ExportOptions { dir, dataset, format, csv_guard, .. } = &self.options;
                let name = format!("{}-{number:06}.{}", dataset.name(), format.name());
                let part = Part::create(dir, name, dataset.table(), *format, *csv_guard)?;
                let origin = Origin {
                    source: source.name(),
                    first_sequence: sequence,
                    last_sequence: sequence,
                    price_books: Default::default(),
                };
                Open { part, origin, facts: 0 }
            }
        };
        let open = self.open.insert(open);
        open.origin.last_sequence = sequence;
        open.facts += 1;
        Ok(open)
    }

    fn open_part(&mut self) -> &mut Part {
        &mut self.open.as_mut().expect("a part was opened for this fact").part
    }

    /// A part is full when it has as many rows, or stands for as many facts, as one may.
    fn close_if_full(&mut self) -> Result<(), ExportError> {
        let Some(open) = &self.open else { return Ok(()) };
        let rows = open.part.rows().max(self.charges.len() as u64).max(open.facts);
        if rows < self.options.part_rows { Ok(()) } else { self.close() }
    }

    fn close(&mut self) -> Result<(), ExportError> {
        let Some(Open { mut part, origin, .. }) = self.open.take() else { return Ok(()) };
        if let Some(version) = self.options.dataset.focus() {
            let columns = version.table().columns;
            for charge in self.charges.drain(|account| self.prepaid.contains(account)) {
                part.row(&charge.cells(columns, &self.options.provider))?;
                self.rows += 1;
            }
        }
        let record = part.finish(origin)?;
        self.journal.add(&record)?;
        self.parts.push(record);
        Ok(())
    }

    fn report(&mut self, at: Source, reached: i64) {
        let (mut done, mut total, mut passed) = (0, 0, false);
        for Range { source, after, through } in &self.start.ranges {
            total += (through - after).unsigned_abs();
            let here = *source == at.name();
            passed |= here;
            done += match (here, passed) {
                (true, _) => (reached - after).unsigned_abs(),
                (false, true) => 0,
                (false, false) => (through - after).unsigned_abs(),
            };
        }
        (self.progress)(Progress { done, total, rows: self.rows, files: self.parts.len() as u64 });
    }

    fn manifest(&mut self) -> Manifest {
        let table = self.options.dataset.table();
        let mut totals = Totals::default();
        for part in &self.parts {
            totals.add(&read_totals(&table, &part.totals));
        }
        Manifest {
            format_version: FORMAT_VERSION,
            run: self.start.run,
            settings: self.start.settings.clone(),
            ranges: self.start.ranges.clone(),
            rows: self.parts.iter().map(|part| part.rows).sum(),
            totals: written(&table, &totals),
            price_books: self.parts.iter().flat_map(|part| part.price_books.iter().cloned()).collect(),
            previous_manifest: self.start.previous_manifest.clone(),
            files: std::mem::take(&mut self.parts),
        }
    }
}
