//! Apache Parquet, read row by row as JSON objects.
//!
//! A reader of its own: it takes what data sets of text are made of and nothing else (no statistics, indexes, decimals or encryption),
//! in memory that a damaged file cannot inflate. In data order: [`footer`] finds schema and column chunks, [`page`] unpacks pages,
//! [`values`] decodes what is in them, [`column`] walks one column, [`record`] puts columns together to rows. After
//! <https://parquet.apache.org/docs/file-format/>.
//!
//! Texts, numbers, truth values, structs, lists and maps become their JSON; dates and times the numbers that are stored. Nulls are left
//! out of structs and maps, as are bytes that are no text, decimals and 96-bit times.

mod column;
mod footer;
mod page;
mod record;
mod thrift;
mod values;

use std::{
    cell::RefCell,
    fs::File,
    io::{self, Read, Seek, SeekFrom},
};

use rlflow_api::{DataFile, StageError, StageResult, StoreError};
use serde_json::Value;

use self::{footer::Footer, record::Rows};
use crate::data_file::{Flow, data_error, with_seekable_file};

/// Begins and ends a file.
const MAGIC: &[u8] = b"PAR1";

/// Calls `visit` with every row and its number (from 1). If `only` is one of the columns, no other is read.
pub(crate) fn read_parquet(file: &DataFile, only: Option<&str>, visit: &mut dyn FnMut(u64, Value) -> StageResult<Flow>) -> StageResult<()> {
    with_seekable_file(file, |input| {
        let source = Source::new(input).map_err(|error| Trouble::from(error).at(file, None))?;
        if source.size_bytes == 0 {
            return Ok(());
        }
        let footer = Footer::read(&source).map_err(|trouble| trouble.at(file, None))?;
        let mut number = 0;
        for group in &footer.groups {
            let mut rows = Rows::new(&source, &footer, group, only);
            while let Some(row) = rows.next().map_err(|trouble| trouble.at(file, Some(number + 1)))? {
                number += 1;
                if visit(number, Value::Object(row))?.is_break() {
                    return Ok(());
                }
            }
        }
        Ok(())
    })
}

/// The file, read in any order.
struct Source<'a> {
    file: RefCell<&'a mut File>,
    size_bytes: u64,
}

impl<'a> Source<'a> {
    fn new(file: &'a mut File) -> io::Result<Self> {
        let size_bytes = file.seek(SeekFrom::End(0))?;
        Ok(Self { file: RefCell::new(file), size_bytes })
    }

    /// `length` bytes from `start`, which must lie within the file.
    fn read(&self, start: u64, length: u64) -> Result<Vec<u8>> {
        if start.checked_add(length).is_none_or(|end| end > self.size_bytes) {
            return Err("a part of the file lies behind its end".into());
        }
        let mut bytes = vec![0; length as usize];
        let mut file = self.file.borrow_mut();
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

/// Why a file cannot be read.
enum Trouble {
    /// The operating system says so.
    Io(io::Error),
    /// Its content does.
    Format(String),
}

type Result<T> = std::result::Result<T, Trouble>;

impl Trouble {
    fn at(self, file: &DataFile, row: Option<u64>) -> StageError {
        match self {
            Self::Io(error) => StoreError::io("read", &file.path)(error).into(),
            Self::Format(message) => data_error(file, row, format!("Parquet: {message}"), Some("write the file again, or as .jsonl")),
        }
    }
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<&str> for Trouble {
    fn from(message: &str) -> Self {
        Self::Format(message.to_owned())
    }
}

impl From<String> for Trouble {
    fn from(message: String) -> Self {
        Self::Format(message)
    }
}
