use std::{
    cell::Cell,
    io::{self, Read},
    rc::Rc,
};

use csv::ByteRecord;
use rlflow_api::{DataFile, StageError, StageResult};
use serde_json::{Map, Value};

use crate::data_file::{Flaw, Flow, data_error, read_error, text_of, with_file};

/// Longest row. A quote that is never closed makes all that follows one row; memory must not hold it.
const MAX_ROW_BYTES: u64 = 64 << 20;

/// Put after the file's content as a row of its own. Files hold no NUL, so if it comes out as part of a cell, a quote is open.
const END: &[u8] = b"\n\0\n";

/// Calls `visit` with every row after the header and the line on which it begins.
pub(crate) fn read_csv(file: &DataFile, delimiter: u8, visit: &mut dyn FnMut(u64, Value) -> StageResult<Flow>) -> StageResult<()> {
    with_file(file, |input| {
        let row_bytes = Rc::new(Cell::new(0));
        let limited = Limited { input: input.chain(END), row_bytes: Rc::clone(&row_bytes) };
        let mut rows = Rows {
            file,
            reader: csv::ReaderBuilder::new()
                .delimiter(delimiter)
                // A carriage return before it is ours to take off: this way lines can be counted.
                .terminator(csv::Terminator::Any(b'\n'))
                .has_headers(false)
                .flexible(true)
                .from_reader(limited),
            record: ByteRecord::new(),
            row_bytes,
        };
        let Some(line) = rows.next()? else { return Ok(()) };
        let names = rows.names(line)?;
        while let Some(line) = rows.next()? {
            if visit(line, rows.row(line, &names)?)?.is_break() {
                break;
            }
        }
        Ok(())
    })
}

struct Rows<'a, R> {
    file: &'a DataFile,
    reader: csv::Reader<Limited<R>>,
    record: ByteRecord,
    row_bytes: Rc<Cell<u64>>,
}

impl<R: Read> Rows<'_, R> {
    /// Reads a row that is not blank; the line on which it begins.
    fn next(&mut self) -> StageResult<Option<u64>> {
        loop {
            let Some(line) = self.read()? else { return Ok(None) };
            let last = self.record.iter().next_back().unwrap_or_default();
            let (end, open) = (self.record.len() == 1 && last == b"\0", last.ends_with(END));
            if end || open {
                // Only what stands at the very end is ours.
                return match (self.read()?, end) {
                    (Some(_), _) => Err(Flaw::nul().at(self.file, line, "the row that begins here")),
                    (None, true) => Ok(None),
                    // No line end came after it.
                    (None, false) => Err(self.open_quote(line + 1)),
                };
            }
            if self.record.len() > 1 || last != b"\r" {
                return Ok(Some(line));
            }
        }
    }

    fn read(&mut self) -> StageResult<Option<u64>> {
        let line = self.reader.position().line();
        self.row_bytes.set(0);
        let read = self.reader.read_byte_record(&mut self.record);
        match read.map_err(csv::Error::into_kind) {
            Ok(false) => Ok(None),
            Ok(true) => {
                // Blank lines before the row belong to it for the parser, as does the line end after it.
                let within = self.record.as_slice().iter().filter(|byte| **byte == b'\n').count() as u64;
                Ok(Some(self.reader.position().line().saturating_sub(within + 1).max(1)))
            }
            Err(_) if self.row_bytes.get() > MAX_ROW_BYTES => Err(self.open_quote(line)),
            Err(csv::ErrorKind::Io(error)) => Err(read_error(self.file, error)),
            Err(other) => Err(data_error(self.file, Some(line), format!("broken CSV: {other:?}"), None)),
        }
    }

    /// The cells of the row, without the line end's carriage return.
    fn cells(&self) -> impl Iterator<Item = &[u8]> {
        let last = self.record.len().saturating_sub(1);
        self.record.iter().enumerate().map(move |(at, cell)| if at == last { cell.strip_suffix(b"\r").unwrap_or(cell) } else { cell })
    }

    fn open_quote(&self, line: u64) -> StageError {
        let message = "a quote of the row that begins here is not closed";
        data_error(self.file, Some(line), message, Some("close it with `\"`; a quote within a quoted cell is written `\"\"`"))
    }

    /// The cells of the header.
    fn names(&self, line: u64) -> StageResult<Vec<String>> {
        let mut names: Vec<String> = Vec::with_capacity(self.record.len());
        for (at, name) in self.cells().enumerate() {
            let name = text_of(name).map_err(|flaw| flaw.at(self.file, line, &format!("column {} of the header", at + 1)))?.trim();
            if !name.is_empty() && names.iter().any(|known| known == name) {
                let message = format!("two columns are called `{name}`");
                return Err(data_error(self.file, Some(line), message, Some("the first row must name the columns")));
            }
            names.push(name.to_owned());
        }
        Ok(names)
    }

    /// The row that was read, by the names of its cells. CSV cannot tell an empty text from none; none is what every format of rows allows.
    fn row(&self, line: u64, names: &[String]) -> StageResult<Value> {
        if self.record.len() != names.len() {
            let message = format!("the row has {} cells, the header has {}", self.record.len(), names.len());
            return Err(data_error(self.file, Some(line), message, Some("put cells with separators, quotes or line ends between quotes")));
        }
        let mut row = Map::new();
        for (name, cell) in names.iter().zip(self.cells()) {
            let cell = text_of(cell).map_err(|flaw| flaw.at(self.file, line, &format!("column `{name}`")))?;
            if !name.is_empty() && !cell.is_empty() {
                row.insert(name.clone(), cell.into());
            }
        }
        Ok(Value::Object(row))
    }
}

/// Fails when a row becomes too long.
struct Limited<R> {
    input: R,
    /// Read since the row began.
    row_bytes: Rc<Cell<u64>>,
}

impl<R: Read> Read for Limited<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.input.read(buffer)?;
        self.row_bytes.set(self.row_bytes.get() + read as u64);
        if self.row_bytes.get() > MAX_ROW_BYTES { Err(io::Error::other("the row is too long")) } else { Ok(read) }
    }
}
