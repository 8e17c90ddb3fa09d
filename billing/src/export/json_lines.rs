//! JSON Lines: one object a line, every column in its order, NULL as `null`, decimals as strings.

use std::io::{self, Write};

use super::table::{Cell, Column, Kind, push_moment};
use crate::money::push_decimal;

#[derive(Debug)]
pub(crate) struct JsonLinesWriter<W: Write> {
    out: W,
    columns: &'static [Column],
    line: Vec<u8>,
}

impl<W: Write> JsonLinesWriter<W> {
    pub fn new(out: W, columns: &'static [Column]) -> JsonLinesWriter<W> {
        JsonLinesWriter { out, columns, line: Vec::new() }
    }

    pub fn row(&mut self, cells: &[Cell<'_>]) -> io::Result<()> {
        self.line.clear();
        for (index, (cell, column)) in cells.iter().zip(self.columns).enumerate() {
            write!(self.line, "{}\"{}\":", if index == 0 { '{' } else { ',' }, column.name)?;
            match cell {
                Cell::Null => self.line.extend_from_slice(b"null"),
                Cell::Text(text) => serde_json::to_writer(&mut self.line, text.as_ref())?,
                Cell::Count(value) => write!(self.line, "{value}")?,
                Cell::Decimal(value) => {
                    self.line.push(b'"');
                    push_decimal(&mut self.line, *value);
                    self.line.push(b'"');
                }
                Cell::Moment(at_ms) => {
                    self.line.push(b'"');
                    push_moment(&mut self.line, *at_ms, column.kind == Kind::Moment);
                    self.line.push(b'"');
                }
            }
        }
        self.line.extend_from_slice(b"}\n");
        self.out.write_all(&self.line)
    }

    pub fn finish(mut self) -> io::Result<W> {
        self.out.flush()?;
        Ok(self.out)
    }
}

#[cfg(test)]
mod tests {
    use super::{super::table::column, *};

    #[test]
    fn a_row_is_one_line_of_valid_json() {
        static COLUMNS: [Column; 4] = [
            column("text", Kind::Text),
            column("none", Kind::Text).nullable(),
            column("count", Kind::Count),
            column("at", Kind::Hour),
        ];
        let mut writer = JsonLinesWriter::new(Vec::new(), &COLUMNS);
        let text = "line\nend \"quoted\" \u{1}";
        writer.row(&[Cell::text(text), Cell::Null, Cell::Count(-7), Cell::Moment(0)]).unwrap();
        let bytes = writer.finish().unwrap();
        assert_eq!(bytes.iter().filter(|byte| **byte == b'\n').count(), 1);
        let value: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        let expected =
            serde_json::json!({ "text": text, "none": null, "count": -7, "at": "1970-01-01T00:00:00Z" });
        assert_eq!(value, expected);
    }
}
