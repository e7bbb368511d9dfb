//! Data files as streams: unpacked, checked against the digest that entered the key, and split into lines.

use std::{
    cell::{Cell, RefCell},
    fs::File,
    io::{self, BufRead, BufReader, Read},
    path::Path,
    rc::Rc,
};

use flate2::bufread::MultiGzDecoder;
use rlflow_api::{DataFile, StageError, StageResult, StoreError, data_format};
use rlflow_store::Hasher;

const BUFFER_BYTES: usize = 1 << 17;

/// What a data file holds, by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DataFormat {
    /// Plain text.
    Text,
    /// One JSON value per line, or one JSON array.
    Json,
}

impl DataFormat {
    /// By the name's ending; `.gz` and `.zst` may follow. The error says what would do.
    pub fn of(path: &Path) -> Result<Self, String> {
        let format = data_format(path);
        match format.trim_end_matches(".gz").trim_end_matches(".zst") {
            "txt" | "text" | "md" | "" => Ok(Self::Text),
            "json" | "jsonl" | "ndjson" => Ok(Self::Json),
            other => Err(format!("cannot read `.{other}` files; expected .txt, .md, .jsonl or .json, each also with .gz or .zst")),
        }
    }

    pub(crate) fn of_file(file: &DataFile) -> StageResult<Self> {
        Self::of(&file.path).map_err(|message| data_error(file, None, message, None))
    }
}

/// An error in a data file.
pub(crate) fn data_error(file: &DataFile, line: Option<u64>, message: impl Into<String>, hint: Option<&str>) -> StageError {
    StageError::Data { path: file.name.clone(), line, message: message.into(), hint: hint.map(str::to_owned) }
}

/// Reads `file` with `read` and makes sure that all of it is what was hashed when planning. A file that changed since
/// then explains every other error, so that one is told first.
pub(crate) fn with_file<T>(file: &DataFile, read: impl FnOnce(&mut dyn BufRead) -> StageResult<T>) -> StageResult<T> {
    let raw = Hashing::open(file)?;
    let result = unpacked(file, &raw).and_then(|mut input| {
        skip_byte_order_mark(file, &mut input)?;
        read(&mut input)
    });
    if matches!(result, Err(StageError::Interrupted)) {
        return result;
    }
    if raw.finish(file)? { result } else { Err(StoreError::ChangedWhileRead { path: file.path.clone() }.into()) }
}

fn unpacked(file: &DataFile, raw: &Hashing) -> StageResult<Box<dyn BufRead>> {
    let packed = BufReader::with_capacity(BUFFER_BYTES, raw.clone());
    let format = data_format(&file.path);
    Ok(if format.ends_with(".gz") || format == "gz" {
        Box::new(BufReader::with_capacity(BUFFER_BYTES, MultiGzDecoder::new(packed)))
    } else if format.ends_with(".zst") || format == "zst" {
        let decoder = zstd::stream::read::Decoder::with_buffer(packed).map_err(|error| read_error(file, error))?;
        Box::new(BufReader::with_capacity(BUFFER_BYTES, decoder))
    } else {
        Box::new(packed)
    })
}

/// A failed read: for packed files it is mostly the content that is to blame.
pub(crate) fn read_error(file: &DataFile, error: io::Error) -> StageError {
    let format = data_format(&file.path);
    if error.raw_os_error().is_some() || !(format.ends_with("gz") || format.ends_with("zst")) {
        return StoreError::io("read", &file.path)(error).into();
    }
    match error.kind() {
        io::ErrorKind::UnexpectedEof => {
            data_error(file, None, "the compressed data end early: the file is truncated", Some("fetch the file again"))
        }
        _ => data_error(
            file,
            None,
            format!("cannot be unpacked: {error}"),
            Some("the file is damaged, or its name does not say how it is packed"),
        ),
    }
}

fn skip_byte_order_mark(file: &DataFile, input: &mut Box<dyn BufRead>) -> StageResult<()> {
    // A mark is never split: the buffer holds at least three bytes unless the file is shorter or a reader gives less.
    let start = input.fill_buf().map_err(|error| read_error(file, error))?;
    match start {
        [0xEF, 0xBB, 0xBF, ..] => input.consume(3),
        [0xFF, 0xFE, ..] | [0xFE, 0xFF, ..] => {
            return Err(data_error(
                file,
                Some(1),
                "the file is UTF-16, expected UTF-8",
                Some("convert it, for example with `iconv -f UTF-16 -t UTF-8`"),
            ));
        }
        _ => {}
    }
    Ok(())
}

/// A file that hashes what is read of it.
#[derive(Clone)]
struct Hashing(Rc<RefCell<(File, Hasher)>>);

impl Hashing {
    fn open(file: &DataFile) -> StageResult<Self> {
        let opened = File::open(&file.path).map_err(StoreError::io("open", &file.path))?;
        Ok(Self(Rc::new(RefCell::new((opened, Hasher::new())))))
    }

    /// Reads the rest; whether all of it hashes to the expected digest.
    fn finish(mut self, file: &DataFile) -> StageResult<bool> {
        let mut buffer = vec![0; BUFFER_BYTES];
        while self.read(&mut buffer).map_err(StoreError::io("read", &file.path))? > 0 {}
        Ok(self.0.borrow().1.finish() == file.digest)
    }
}

impl Read for Hashing {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let (file, hasher) = &mut *self.0.borrow_mut();
        let read = file.read(buffer)?;
        hasher.update(&buffer[..read]);
        Ok(read)
    }
}

/// Calls `visit` with every line, its number (from 1) and without its end (`\n` or `\r\n`).
pub(crate) fn for_each_line(
    file: &DataFile,
    input: &mut dyn BufRead,
    mut visit: impl FnMut(u64, &str) -> StageResult<()>,
) -> StageResult<()> {
    let mut bytes = Vec::new();
    let (mut number, mut start) = (0, 0u64);
    loop {
        bytes.clear();
        let read = input.read_until(b'\n', &mut bytes).map_err(|error| read_error(file, error))?;
        if read == 0 {
            return Ok(());
        }
        number += 1;
        let line = std::str::from_utf8(&bytes).map_err(|error| {
            let byte = bytes[error.valid_up_to()];
            let at = start + error.valid_up_to() as u64;
            data_error(file, Some(number), format!("byte 0x{byte:02x} at offset {at} is not UTF-8"), Some("convert the file to UTF-8"))
        })?;
        start += read as u64;
        let line = line.strip_suffix('\n').unwrap_or(line);
        visit(number, line.strip_suffix('\r').unwrap_or(line))?;
    }
}

/// A reader that counts lines, for parsers that do not.
pub(crate) struct LineCounter<'a> {
    input: &'a mut dyn BufRead,
    line: Rc<Cell<u64>>,
}

impl<'a> LineCounter<'a> {
    /// Counts from 1; the cell always holds the line of the next byte.
    pub fn new(input: &'a mut dyn BufRead) -> (Self, Rc<Cell<u64>>) {
        let line = Rc::new(Cell::new(1));
        (Self { input, line: Rc::clone(&line) }, line)
    }

    /// The next byte that is not white space, not consumed.
    pub fn peek(&mut self) -> io::Result<Option<u8>> {
        loop {
            let buffer = self.input.fill_buf()?;
            if buffer.is_empty() {
                return Ok(None);
            }
            let blank = buffer.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
            let found = buffer.get(blank).copied();
            self.line.set(self.line.get() + count_lines(&buffer[..blank]));
            self.input.consume(blank);
            if found.is_some() {
                return Ok(found);
            }
        }
    }
}

fn count_lines(bytes: &[u8]) -> u64 {
    bytes.iter().filter(|byte| **byte == b'\n').count() as u64
}

impl Read for LineCounter<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.input.read(buffer)?;
        self.line.set(self.line.get() + count_lines(&buffer[..read]));
        Ok(read)
    }
}
