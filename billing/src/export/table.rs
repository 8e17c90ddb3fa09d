//! What a dataset looks like to a writer and to a reader: columns, and the cells of one row.

use std::{borrow::Cow, collections::BTreeMap};

use crate::clock::moment_ms;

/// What a column holds, in every format the same value.
///
/// | kind | CSV and JSON Lines | Parquet |
/// | --- | --- | --- |
/// | `Text` | as it is | BYTE_ARRAY (STRING) |
/// | `Count` | an integer | INT64 |
/// | `Decimal` | `0.000123`, in JSON a string | FIXED_LEN_BYTE_ARRAY(16) (DECIMAL(38,12)) |
/// | `Moment` | `2026-01-31T23:59:59.123Z` | INT64 (TIMESTAMP(MILLIS, UTC)) |
/// | `Hour` | `2026-01-31T23:00:00Z` | INT64 (TIMESTAMP(MILLIS, UTC)) |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Text,
    Count,
    /// Units of 10^-12: money in dollars, or a quantity where a format asks for decimals.
    Decimal,
    /// Milliseconds since 1970 UTC.
    Moment,
    /// The same, written without milliseconds.
    Hour,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Column {
    pub name: &'static str,
    pub kind: Kind,
    pub nullable: bool,
    /// Summed per currency into the manifest.
    pub control: bool,
}

/// Columns in their order. Rows are summed by the text of the column `currency`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Table {
    pub columns: &'static [Column],
    pub currency: &'static str,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Cell<'a> {
    Null,
    Text(Cow<'a, str>),
    Count(i64),
    /// Units of 10^-12.
    Decimal(i128),
    /// Milliseconds since 1970 UTC.
    Moment(i64),
}

pub(crate) const fn column(name: &'static str, kind: Kind) -> Column {
    Column { name, kind, nullable: false, control: false }
}

impl Column {
    pub const fn nullable(self) -> Column {
        Column { nullable: true, ..self }
    }

    pub const fn control(self) -> Column {
        Column { control: true, ..self }
    }
}

impl Table {
    pub fn index_of(&self, name: &str) -> usize {
        self.columns.iter().position(|column| column.name == name).expect("a table has its currency column")
    }

    /// The columns that control totals are taken of, with their places.
    pub fn controls(&self) -> impl Iterator<Item = (usize, &'static Column)> {
        self.columns.iter().enumerate().filter(|(_, column)| column.control)
    }
}

impl<'a> Cell<'a> {
    pub fn text(text: impl Into<Cow<'a, str>>) -> Cell<'a> {
        Cell::Text(text.into())
    }

    /// Text where there is some; the ledger keeps what was not named as the empty string.
    pub fn named(text: &'a str) -> Cell<'a> {
        if text.is_empty() { Cell::Null } else { Cell::text(text) }
    }
}

/// Control totals: currency, column, sum. Counts in units, decimals in units of 10^-12.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Totals(pub BTreeMap<String, BTreeMap<String, i128>>);

impl Totals {
    pub fn add_value(&mut self, currency: &str, column: &str, value: i128) {
        if !self.0.contains_key(currency) {
            self.0.insert(currency.to_owned(), BTreeMap::new());
        }
        let sums = self.0.get_mut(currency).expect("it was inserted above");
        match sums.get_mut(column) {
            Some(sum) => *sum += value,
            None => drop(sums.insert(column.to_owned(), value)),
        }
    }

    pub fn add(&mut self, other: &Totals) {
        for (currency, sums) in &other.0 {
            let mine = self.0.entry(currency.clone()).or_default();
            for (column, sum) in sums {
                *mine.entry(column.clone()).or_default() += sum;
            }
        }
    }
}

/// The control totals of rows as they are written: by place, without looking a name up for each cell.
#[derive(Debug)]
pub(crate) struct RowTotals {
    currency_index: usize,
    controls: Vec<(usize, &'static Column)>,
    /// Of each currency the sums of the control columns; None where there was no value yet.
    sums: Vec<(String, Vec<Option<i128>>)>,
}

impl RowTotals {
    pub fn new(table: &Table) -> RowTotals {
        let controls = table.controls().collect();
        RowTotals { currency_index: table.index_of(table.currency), controls, sums: Vec::new() }
    }

    pub fn add(&mut self, cells: &[Cell<'_>]) {
        let Cell::Text(currency) = &cells[self.currency_index] else { return };
        let known = self.sums.iter().position(|(known, _)| known == currency);
        let place = known.unwrap_or_else(|| {
            self.sums.push((currency.to_string(), vec![None; self.controls.len()]));
            self.sums.len() - 1
        });
        for ((index, _), sum) in self.controls.iter().zip(&mut self.sums[place].1) {
            match cells[*index] {
                Cell::Count(value) => *sum = Some(sum.unwrap_or_default() + i128::from(value)),
                Cell::Decimal(value) => *sum = Some(sum.unwrap_or_default() + value),
                _ => {}
            }
        }
    }

    pub fn totals(&self) -> Totals {
        let mut totals = Totals::default();
        for (currency, sums) in &self.sums {
            for ((_, column), sum) in self.controls.iter().zip(sums) {
                if let Some(sum) = sum {
                    totals.add_value(currency, column.name, *sum);
                }
            }
        }
        totals
    }
}

/// `2026-01-31T23:59:59.123Z`, or without the milliseconds.
pub(crate) fn push_moment(out: &mut Vec<u8>, at_ms: i64, with_ms: bool) {
    let at = moment_ms(at_ms);
    let (year, month, day) = (at.year(), u8::from(at.month()), at.day());
    let (hour, minute, second) = at.time().as_hms();
    push_two(out, (year / 100).clamp(0, 99) as u8);
    push_two(out, (year % 100).unsigned_abs() as u8);
    for (separator, value) in [(b'-', month), (b'-', day), (b'T', hour), (b':', minute), (b':', second)] {
        out.push(separator);
        push_two(out, value);
    }
    if with_ms {
        out.push(b'.');
        let ms = at.millisecond();
        out.push(b'0' + (ms / 100) as u8);
        push_two(out, (ms % 100) as u8);
    }
    out.push(b'Z');
}

fn push_two(out: &mut Vec<u8>, value: u8) {
    out.push(b'0' + value / 10);
    out.push(b'0' + value % 10);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_iso_8601_in_utc() {
        let check = |at_ms: i64, with_ms: bool, expect: &str| {
            let mut out = Vec::new();
            push_moment(&mut out, at_ms, with_ms);
            assert_eq!(String::from_utf8(out).unwrap(), expect);
        };
        check(0, true, "1970-01-01T00:00:00.000Z");
        check(1_769_903_999_123, true, "2026-01-31T23:59:59.123Z");
        check(1_769_900_400_000, false, "2026-01-31T23:00:00Z");
    }

    #[test]
    fn totals_are_kept_apart_by_currency_and_do_not_overflow() {
        static COLUMNS: [Column; 2] =
            [column("cost", Kind::Decimal).control(), column("currency", Kind::Text)];
        let table = Table { columns: &COLUMNS, currency: "currency" };
        let mut rows = RowTotals::new(&table);
        for (cost, currency) in [(i128::from(i64::MAX), "USD"), (1, "EUR"), (i128::from(i64::MAX), "USD")] {
            rows.add(&[Cell::Decimal(cost), Cell::text(currency)]);
        }
        let totals = rows.totals();
        assert_eq!(totals.0["USD"]["cost"], 2 * i128::from(i64::MAX));
        assert_eq!(totals.0["EUR"]["cost"], 1);
        let mut twice = totals.clone();
        twice.add(&totals);
        assert_eq!(twice.0["USD"]["cost"], 4 * i128::from(i64::MAX));
    }
}
