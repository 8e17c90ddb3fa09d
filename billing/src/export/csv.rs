//! CSV after RFC 4180: a header, `\n` line ends, quotes where they are needed, NULL as an empty cell.
//!
//! Spreadsheets run a cell that begins with `= + - @` or a tab or carriage return as a formula, and some of the text here
//! was chosen by customers (names of models, projects, end users). So a text cell that begins with one of these, or with
//! an apostrophe, gets an apostrophe in front. The guard can be undone: of a text cell that begins with an apostrophe, drop
//! that one. Numbers and times are ours and never guarded. `csv_guard: false` in the manifest says that it was left out.

use std::io::{self, BufRead, Write};

use super::table::{Cell, Column, Kind, push_moment};
use crate::money::push_decimal;

#[derive(Debug)]
pub(crate) struct CsvWriter<W: Write> {
    out: W,
    columns: &'static [Column],
    guard: bool,
    line: Vec<u8>,
}

impl<W: Write> CsvWriter<W> {
    pub fn new(mut out: W, columns: &'static [Column], guard: bool) -> io::Result<CsvWriter<W>> {
        let names: Vec<_> = columns.iter().map(|column| column.name).collect();
        writeln!(out, "{}", names.join(","))?;
        Ok(CsvWriter { out, columns, guard, line: Vec::new() })
    }

    pub fn row(&mut self, cells: &[Cell<'_>]) -> io::Result<()> {
        self.line.clear();
        for (index, (cell, column)) in cells.iter().zip(self.columns).enumerate() {
            if index > 0 {
                self.line.push(b',');
            }
            match cell {
                Cell::Null => {}
                Cell::Text(text) => push_text(&mut self.line, text, self.guard),
                Cell::Count(value) => write!(self.line, "{value}")?,
                Cell::Decimal(value) => push_decimal(&mut self.line, *value),
                Cell::Moment(at_ms) => push_moment(&mut self.line, *at_ms, column.kind == Kind::Moment),
            }
        }
        self.line.push(b'\n');
        self.out.write_all(&self.line)
    }

    pub fn finish(mut self) -> io::Result<W> {
        self.out.flush()?;
        Ok(self.out)
    }
}

fn push_text(line: &mut Vec<u8>, text: &str, guard: bool) {
    let guarded = guard && text.starts_with(['=', '+', '-', '@', '\t', '\r', '\'']);
    // An empty text is quoted, so that it is not read as NULL.
    let quoted = text.is_empty() || text.contains([',', '"', '\n', '\r']);
    if quoted {
        line.push(b'"');
    }
    if guarded {
        line.push(b'\'');
    }
    for byte in text.bytes() {
        if byte == b'"' {
            line.push(b'"');
        }
        line.push(byte);
    }
    if quoted {
        line.push(b'"');
    }
}

/// Reads records back, one at a time. Every cell as text; the guard is left on.
#[derive(Debug)]
pub(crate) struct CsvReader<R: BufRead> {
    input: R,
}

impl<R: BufRead> CsvReader<R> {
    pub fn new(input: R) -> CsvReader<R> {
        CsvReader { input }
    }

    /// None at the end. A quoted cell may hold line ends.
    pub fn record(&mut self) -> io::Result<Option<Vec<String>>> {
        let mut record = Vec::new();
        // A record goes on while a quote is open.
        while record.is_empty() || record.iter().filter(|byte| **byte == b'"').count() % 2 == 1 {
            if self.input.read_until(b'\n', &mut record)? == 0 {
                break;
            }
        }
        if record.is_empty() {
            return Ok(None);
        }
        let text =
            String::from_utf8(record).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        Ok(Some(cells_of(text.strip_suffix('\n').unwrap_or(&text))))
    }
}

fn cells_of(line: &str) -> Vec<String> {
    let (mut cells, mut cell, mut quoted) = (Vec::new(), String::new(), false);
    let mut characters = line.chars().peekable();
    while let Some(character) = characters.next() {
        match character {
            '"' if quoted && characters.peek() == Some(&'"') => cell.extend(characters.next()),
            '"' => quoted = !quoted,
            ',' if !quoted => cells.push(std::mem::take(&mut cell)),
            other => cell.push(other),
        }
    }
    cells.push(cell);
    cells
}

#[cfg(test)]
mod tests {
    use super::{super::table::column, *};

    static COLUMNS: [Column; 2] = [column("text", Kind::Text).nullable(), column("amount", Kind::Decimal)];

    fn written(cell: Cell<'_>, guard: bool) -> String {
        let mut writer = CsvWriter::new(Vec::new(), &COLUMNS, guard).unwrap();
        writer.row(&[cell, Cell::Decimal(-5)]).unwrap();
        let text = String::from_utf8(writer.finish().unwrap()).unwrap();
        let (header, row) = text.split_once('\n').unwrap();
        assert_eq!(header, "text,amount");
        row.strip_suffix(",-0.000000000005\n").expect("a number is never guarded").to_owned()
    }

    #[test]
    fn text_is_quoted_and_guarded_where_it_must_be() {
        let check = |text: &str, guarded: &str, raw: &str| {
            assert_eq!(written(Cell::text(text), true), guarded, "{text:?}");
            assert_eq!(written(Cell::text(text), false), raw, "{text:?}");
        };
        check("plain", "plain", "plain");
        check("", "\"\"", "\"\"");
        check("a,b", "\"a,b\"", "\"a,b\"");
        check("say \"hi\"", "\"say \"\"hi\"\"\"", "\"say \"\"hi\"\"\"");
        check("two\nlines", "\"two\nlines\"", "\"two\nlines\"");
        check("=HYPERLINK(\"x\")", "\"'=HYPERLINK(\"\"x\"\")\"", "\"=HYPERLINK(\"\"x\"\")\"");
        check("+1", "'+1", "+1");
        check("-1", "'-1", "-1");
        check("@sum", "'@sum", "@sum");
        check("\tx", "'\tx", "\tx");
        check("'quoted", "''quoted", "'quoted");
        check("a=b", "a=b", "a=b");
        assert_eq!(written(Cell::Null, true), "");
    }

    #[test]
    fn what_is_written_reads_back() {
        let texts = ["plain", "", "a,b", "\"", "two\nlines \"quoted\"\n", "é\r\n"];
        let mut writer = CsvWriter::new(Vec::new(), &COLUMNS, false).unwrap();
        for text in texts {
            writer.row(&[Cell::text(text), Cell::Decimal(1)]).unwrap();
        }
        let bytes = writer.finish().unwrap();
        let mut reader = CsvReader::new(&bytes[..]);
        assert_eq!(reader.record().unwrap().unwrap(), ["text", "amount"]);
        for text in texts {
            assert_eq!(reader.record().unwrap().unwrap(), [text, "0.000000000001"]);
        }
        assert_eq!(reader.record().unwrap(), None);
    }
}
