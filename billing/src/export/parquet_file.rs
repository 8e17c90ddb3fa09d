//! Parquet: the same rows, the same bytes. Every property that shapes a file is fixed here, and so is who made it.
//!
//! Rows are gathered by column and written as a row group each [`GROUP_ROWS`], so memory is bounded by a row group.
//! Decimals are exact: FIXED_LEN_BYTE_ARRAY(16) as DECIMAL(38,12), which readers know as decimal128.

use std::{fs::File, io::Write, path::Path, sync::Arc};

use parquet::{
    basic::Compression,
    column::reader::{ColumnReader, ColumnReaderImpl},
    data_type::{ByteArray, ByteArrayType, DataType, FixedLenByteArray, FixedLenByteArrayType, Int64Type},
    errors::{ParquetError, Result},
    file::{
        properties::{EnabledStatistics, WriterProperties, WriterVersion},
        reader::{FileReader, SerializedFileReader},
        writer::{SerializedColumnWriter, SerializedFileWriter},
    },
    schema::parser::parse_message_type,
};

use super::table::{Cell, Column, Kind, Table, Totals};

/// Rows that are in memory at most.
const GROUP_ROWS: usize = 32_768;
/// Names the writer, whatever version of the library wrote it. Part of a file's bytes: a change makes other files.
const CREATED_BY: &str = "sluice export format 1";

pub(crate) struct ParquetWriter<W: Write + Send> {
    file: SerializedFileWriter<W>,
    columns: Vec<Gathered>,
    rows: usize,
}

/// A column of the row group that is being gathered: its values without NULLs, and where there are NULLs.
struct Gathered {
    column: &'static Column,
    values: Values,
    /// 1 for a value, 0 for NULL; empty for a column that has none.
    levels: Vec<i16>,
}

enum Values {
    Texts(Vec<ByteArray>),
    Integers(Vec<i64>),
    Decimals(Vec<FixedLenByteArray>),
}

impl<W: Write + Send> ParquetWriter<W> {
    pub fn new(out: W, columns: &'static [Column]) -> Result<ParquetWriter<W>> {
        let properties = WriterProperties::builder()
            .set_writer_version(WriterVersion::PARQUET_1_0)
            .set_created_by(CREATED_BY.to_owned())
            .set_compression(Compression::SNAPPY)
            .set_dictionary_enabled(true)
            .set_data_page_size_limit(1 << 20)
            .set_dictionary_page_size_limit(1 << 20)
            .set_data_page_row_count_limit(20_000)
            .set_write_batch_size(1_024)
            .set_statistics_enabled(EnabledStatistics::Chunk)
            .set_offset_index_disabled(true)
            .build();
        let schema = Arc::new(parse_message_type(&message_type(columns))?);
        let file = SerializedFileWriter::new(out, schema, Arc::new(properties))?;
        Ok(ParquetWriter { file, columns: columns.iter().map(Gathered::new).collect(), rows: 0 })
    }

    pub fn row(&mut self, cells: &[Cell<'_>]) -> Result<()> {
        for (gathered, cell) in self.columns.iter_mut().zip(cells) {
            gathered.push(cell)?;
        }
        self.rows += 1;
        if self.rows == GROUP_ROWS { self.write_group() } else { Ok(()) }
    }

    pub fn finish(mut self) -> Result<W> {
        self.write_group()?;
        self.file.into_inner()
    }

    fn write_group(&mut self) -> Result<()> {
        if self.rows == 0 {
            return Ok(());
        }
        let mut group = self.file.next_row_group()?;
        for gathered in &mut self.columns {
            let mut writer = group.next_column()?.expect("the schema was made of these columns");
            gathered.write_to(&mut writer)?;
            writer.close()?;
        }
        group.close()?;
        self.rows = 0;
        Ok(())
    }
}

/// The schema as Parquet's own text.
fn message_type(columns: &[Column]) -> String {
    let mut text = "message sluice {\n".to_owned();
    for Column { name, kind, nullable, .. } in columns {
        let repetition = if *nullable { "optional" } else { "required" };
        text += &match kind {
            Kind::Text => format!("  {repetition} binary {name} (STRING);\n"),
            Kind::Count => format!("  {repetition} int64 {name};\n"),
            Kind::Decimal => format!("  {repetition} fixed_len_byte_array(16) {name} (DECIMAL(38, 12));\n"),
            Kind::Moment | Kind::Hour => format!("  {repetition} int64 {name} (TIMESTAMP(MILLIS,true));\n"),
        };
    }
    text + "}"
}

impl Gathered {
    fn new(column: &'static Column) -> Gathered {
        let values = match column.kind {
            Kind::Text => Values::Texts(Vec::new()),
            Kind::Count | Kind::Moment | Kind::Hour => Values::Integers(Vec::new()),
            Kind::Decimal => Values::Decimals(Vec::new()),
        };
        Gathered { column, values, levels: Vec::new() }
    }

    fn push(&mut self, cell: &Cell<'_>) -> Result<()> {
        match (cell, &mut self.values) {
            (Cell::Text(text), Values::Texts(values)) => values.push(text.as_bytes().to_vec().into()),
            (Cell::Count(value) | Cell::Moment(value), Values::Integers(values)) => values.push(*value),
            (Cell::Decimal(value), Values::Decimals(values)) => {
                values.push(value.to_be_bytes().to_vec().into());
            }
            (Cell::Null, _) if self.column.nullable => {}
            _ => return Err(ParquetError::General(format!("{cell:?} in the column {}", self.column.name))),
        }
        if self.column.nullable {
            self.levels.push(i16::from(*cell != Cell::Null));
        }
        Ok(())
    }

    fn write_to(&mut self, writer: &mut SerializedColumnWriter<'_>) -> Result<()> {
        let levels = self.column.nullable.then_some(&self.levels[..]);
        match &mut self.values {
            Values::Texts(values) => {
                writer.typed::<ByteArrayType>().write_batch(values, levels, None)?;
                values.clear();
            }
            Values::Integers(values) => {
                writer.typed::<Int64Type>().write_batch(values, levels, None)?;
                values.clear();
            }
            Values::Decimals(values) => {
                writer.typed::<FixedLenByteArrayType>().write_batch(values, levels, None)?;
                values.clear();
            }
        }
        self.levels.clear();
        Ok(())
    }
}

/// Rows and control totals of a file, read back.
pub(crate) fn recount(path: &Path, table: &Table) -> Result<(u64, Totals)> {
    let reader = SerializedFileReader::new(File::open(path)?)?;
    let (mut rows, mut totals) = (0, Totals::default());
    for group in 0..reader.num_row_groups() {
        let group = reader.get_row_group(group)?;
        let count = usize::try_from(group.metadata().num_rows()).unwrap_or_default();
        let currencies = read_texts(group.get_column_reader(table.index_of(table.currency))?, count)?;
        for (index, column) in table.controls() {
            let values = read_numbers(group.get_column_reader(index)?, count)?;
            for (currency, value) in currencies.iter().zip(values) {
                if let Some(value) = value {
                    totals.add_value(currency, column.name, value);
                }
            }
        }
        rows += count as u64;
    }
    Ok((rows, totals))
}

fn read_texts(column: ColumnReader, rows: usize) -> Result<Vec<String>> {
    let ColumnReader::ByteArrayColumnReader(column) = column else {
        return Err(ParquetError::General("the currency is not text".to_owned()));
    };
    let (values, _) = read_values(column, rows)?;
    values.iter().map(|value| Ok(value.as_utf8()?.to_owned())).collect()
}

/// A column of numbers with its NULLs.
fn read_numbers(column: ColumnReader, rows: usize) -> Result<Vec<Option<i128>>> {
    let (numbers, levels): (Vec<i128>, _) = match column {
        ColumnReader::Int64ColumnReader(column) => {
            let (values, levels) = read_values(column, rows)?;
            (values.into_iter().map(i128::from).collect(), levels)
        }
        ColumnReader::FixedLenByteArrayColumnReader(column) => {
            let (values, levels) = read_values(column, rows)?;
            (values.iter().map(decimal).collect::<Result<_>>()?, levels)
        }
        _ => return Err(ParquetError::General("a control column is not a number".to_owned())),
    };
    if levels.is_empty() {
        return Ok(numbers.into_iter().map(Some).collect());
    }
    let mut numbers = numbers.into_iter();
    Ok(levels.into_iter().map(|level| if level == 1 { numbers.next() } else { None }).collect())
}

/// All values of a column in a row group; levels only where it may be NULL.
fn read_values<T: DataType>(mut column: ColumnReaderImpl<T>, rows: usize) -> Result<(Vec<T::T>, Vec<i16>)> {
    let (mut values, mut levels, mut read) = (Vec::new(), Vec::new(), 0);
    while read < rows {
        let (records, _, _) = column.read_records(rows - read, Some(&mut levels), None, &mut values)?;
        if records == 0 {
            return Err(ParquetError::General("a column is shorter than its row group".to_owned()));
        }
        read += records;
    }
    Ok((values, levels))
}

fn decimal(value: &FixedLenByteArray) -> Result<i128> {
    let bytes = value.data().try_into();
    bytes.map(i128::from_be_bytes).map_err(|_| ParquetError::General("not a decimal128".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::{super::table::column, *};

    static COLUMNS: [Column; 5] = [
        column("text", Kind::Text).nullable(),
        column("count", Kind::Count).control(),
        column("cost", Kind::Decimal).nullable().control(),
        column("at", Kind::Moment),
        column("currency", Kind::Text),
    ];
    static TABLE: Table = Table { columns: &COLUMNS, currency: "currency" };

    fn written(rows: usize) -> Vec<u8> {
        let mut writer = ParquetWriter::new(Vec::new(), &COLUMNS).unwrap();
        for row in 0..rows {
            let cost =
                if row % 3 == 0 { Cell::Null } else { Cell::Decimal(i128::MAX / 100_000 - row as i128) };
            let text = if row % 2 == 0 { Cell::Null } else { Cell::text(format!("text {row}")) };
            let cells = [text, Cell::Count(row as i64), cost, Cell::Moment(row as i64), Cell::text("USD")];
            writer.row(&cells).unwrap();
        }
        writer.finish().unwrap()
    }

    #[test]
    fn files_are_read_back_exactly_over_row_groups_and_nulls() {
        let dir = tempfile::tempdir().unwrap();
        for rows in [0, 1, 5, GROUP_ROWS, GROUP_ROWS + 1, 2 * GROUP_ROWS + 7] {
            let path = dir.path().join(format!("{rows}.parquet"));
            std::fs::write(&path, written(rows)).unwrap();
            let (found, totals) = recount(&path, &TABLE).unwrap();
            assert_eq!(found, rows as u64);
            let costs = (0..rows).filter(|row| row % 3 != 0).map(|row| i128::MAX / 100_000 - row as i128);
            if rows > 0 {
                assert_eq!(totals.0["USD"]["count"], (0..rows as i128).sum::<i128>());
                let found = totals.0["USD"].get("cost").copied().unwrap_or_default();
                assert_eq!(found, costs.sum::<i128>());
            }
        }
    }

    #[test]
    fn the_same_rows_are_the_same_bytes() {
        assert_eq!(written(1_000), written(1_000));
        assert_ne!(written(1_000), written(1_001));
    }

    #[test]
    fn a_null_where_none_may_be_is_an_error_and_not_a_shifted_column() {
        let mut writer = ParquetWriter::new(Vec::new(), &COLUMNS).unwrap();
        let cells = [Cell::Null, Cell::Null, Cell::Null, Cell::Moment(0), Cell::text("USD")];
        assert!(writer.row(&cells).unwrap_err().to_string().contains("count"));
    }
}
