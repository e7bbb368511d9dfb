//! Data files as streams: unpacked, checked against the digest that entered the key, and split into lines.

use std::{
    cell::{Cell, RefCell},
    fs::File,
    io::{self, BufRead, BufReader, Cursor, Read, Seek, SeekFrom},
    ops::ControlFlow,
    path::Path,
    rc::Rc,
};

use flate2::bufread::MultiGzDecoder;
use rlflow_api::{DataFile, StageError, StageResult, StoreError, data_format};
use rlflow_store::Hasher;

const BUFFER_BYTES: usize = 1 << 17;

/// How a stream of rows goes on: `Break` when no more are wanted.
pub type Flow = ControlFlow<()>;

/// What a data file holds, by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DataFormat {
    /// Plain text.
    Text,
    /// A web page.
    Html,
    /// One JSON value per line, or one JSON array.
    Json,
    /// Rows of cells, the first of which names the fields.
    Csv {
        /// What stands between two cells.
        delimiter: u8,
    },
    /// Apache Parquet.
    Parquet,
}

/// Names of files whose rows have fields.
const ROW_NAMES: &str = ".jsonl, .json, .csv or .tsv, each also with .gz or .zst, or .parquet";

impl DataFormat {
    /// By the name's ending; `.gz` and `.zst` may follow. The error says what would do.
    pub fn of(path: &Path) -> Result<Self, String> {
        let format = data_format(path);
        match format.trim_end_matches(".gz").trim_end_matches(".zst") {
            "txt" | "text" | "md" | "" => Ok(Self::Text),
            "html" | "htm" | "xhtml" => Ok(Self::Html),
            "json" | "jsonl" | "ndjson" => Ok(Self::Json),
            "csv" => Ok(Self::Csv { delimiter: b',' }),
            "tsv" => Ok(Self::Csv { delimiter: b'\t' }),
            "parquet" if format == "parquet" => Ok(Self::Parquet),
            "parquet" => Err("Parquet files are packed inside, not as a whole; unpack it and name it .parquet".into()),
            other => Err(format!("cannot read `.{other}` files; expected .txt, .md, .html, {ROW_NAMES}")),
        }
    }

    pub(crate) fn of_file(file: &DataFile) -> StageResult<Self> {
        Self::of(&file.path).map_err(|message| data_error(file, None, message, None))
    }

    /// Why no rows with fields can be read from it, if so. `lines` = a line of plain text is a row too.
    pub(crate) fn no_rows(self, lines: bool) -> Option<String> {
        let (what, or_text) = match self {
            Self::Text if !lines => ("plain text", ""),
            Self::Html => ("a web page", if lines { ".txt, " } else { "" }),
            _ => return None,
        };
        Some(format!("rows cannot be read from {what}; expected {or_text}{ROW_NAMES}"))
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
    let result = unpacked(file, &raw).and_then(|input| {
        let mut input = without_byte_order_mark(file, input)?;
        read(&mut *input)
    });
    if matches!(result, Err(StageError::Interrupted)) {
        return result;
    }
    if raw.finish(file)? { result } else { Err(StoreError::ChangedWhileRead { path: file.path.clone() }.into()) }
}

/// The same for formats that are not read from beginning to end: the file is hashed after it was read, through the same handle.
pub(crate) fn with_seekable_file<T>(file: &DataFile, read: impl FnOnce(&mut File) -> StageResult<T>) -> StageResult<T> {
    let raw = Hashing::open(file)?;
    let result = read(&mut raw.0.borrow_mut().0);
    if matches!(result, Err(StageError::Interrupted)) {
        return result;
    }
    raw.0.borrow_mut().0.seek(SeekFrom::Start(0)).map_err(StoreError::io("read", &file.path))?;
    if raw.finish(file)? { result } else { Err(StoreError::ChangedWhileRead { path: file.path.clone() }.into()) }
}

/// How a file is packed.
#[derive(Clone, Copy, PartialEq)]
enum Packing {
    Gzip,
    Zstd,
}

impl Packing {
    /// What the file's name says.
    fn of(file: &DataFile) -> Option<Self> {
        let format = data_format(&file.path);
        let ends = |ending: &str| format.rsplit('.').next() == Some(ending);
        if ends("gz") {
            Some(Self::Gzip)
        } else if ends("zst") {
            Some(Self::Zstd)
        } else {
            None
        }
    }

    /// What the first bytes of a file say. No text begins so.
    fn begins(head: &[u8]) -> Option<Self> {
        match head {
            [0x1f, 0x8b, ..] => Some(Self::Gzip),
            // A frame, or one that decoders skip.
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Some(Self::Zstd),
            _ => None,
        }
    }

    /// Whether a file that ends after `head` may have been cut out of one that is packed so.
    fn may_begin(self, head: &[u8]) -> bool {
        let magic: &[u8] = if self == Self::Gzip { &[0x1f, 0x8b] } else { &[0x28, 0xb5, 0x2f, 0xfd] };
        magic.starts_with(head)
    }

    const fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Zstd => "Zstandard",
        }
    }

    const fn ending(self) -> &'static str {
        match self {
            Self::Gzip => ".gz",
            Self::Zstd => ".zst",
        }
    }
}

/// The content of the file, whose name and first bytes must agree on how it is packed.
fn unpacked(file: &DataFile, raw: &Hashing) -> StageResult<Box<dyn BufRead>> {
    let packed = Box::new(BufReader::with_capacity(BUFFER_BYTES, raw.clone()));
    let (head, packed) = with_head::<8>(file, packed)?;
    let (named, found) = (Packing::of(file), Packing::begins(&head));
    match (named, found) {
        (None, None) if head.starts_with(b"PAR1\x15") => {
            let hint = "name it `.parquet`";
            Err(data_error(file, None, "the file is Parquet, though its name does not say so", Some(hint)))
        }
        (None, None) => Ok(packed),
        // An empty file is one without rows, however it is packed.
        (Some(_), _) if head.is_empty() => Ok(packed),
        (None, Some(found)) => {
            let hint = format!("add `{}` to its name, or unpack it", found.ending());
            let message = format!("the file is packed with {}, though its name does not say so", found.name());
            Err(data_error(file, None, message, Some(&hint)))
        }
        (Some(named), found) if found != Some(named) && !(head.len() < 4 && named.may_begin(&head)) => {
            let hint = match found {
                Some(found) => format!("it is {}: name it `{}`", found.name(), found.ending()),
                None => format!("fetch it again, or take `{}` off its name if it is not packed", named.ending()),
            };
            let message = format!("the file is not {}, though its name ends in `{}`", named.name(), named.ending());
            Err(data_error(file, None, message, Some(&hint)))
        }
        (Some(Packing::Gzip), _) => Ok(Box::new(BufReader::with_capacity(BUFFER_BYTES, MultiGzDecoder::new(packed)))),
        (Some(Packing::Zstd), _) => {
            let decoder = zstd::stream::read::Decoder::with_buffer(packed).map_err(|error| read_error(file, error))?;
            Ok(Box::new(BufReader::with_capacity(BUFFER_BYTES, decoder)))
        }
    }
}

/// The first `N` bytes of `input` (fewer if it is shorter), and a reader of all of it.
fn with_head<const N: usize>(file: &DataFile, mut input: Box<dyn BufRead>) -> StageResult<(Vec<u8>, Box<dyn BufRead>)> {
    let mut head = Vec::with_capacity(N);
    input.by_ref().take(N as u64).read_to_end(&mut head).map_err(|error| read_error(file, error))?;
    Ok((head.clone(), Box::new(Cursor::new(head).chain(input))))
}

/// A failed read: for packed files it is mostly the content that is to blame.
pub(crate) fn read_error(file: &DataFile, error: io::Error) -> StageError {
    if error.raw_os_error().is_some() || Packing::of(file).is_none() {
        return StoreError::io("read", &file.path)(error).into();
    }
    match error.kind() {
        io::ErrorKind::UnexpectedEof => {
            data_error(file, None, "the compressed data end early: the file is truncated", Some("fetch the file again"))
        }
        _ => data_error(file, None, format!("cannot be unpacked: {error}"), Some("the file is damaged; fetch it again")),
    }
}

fn without_byte_order_mark(file: &DataFile, input: Box<dyn BufRead>) -> StageResult<Box<dyn BufRead>> {
    let (head, mut input) = with_head::<3>(file, input)?;
    match head.as_slice() {
        [0xEF, 0xBB, 0xBF] => {
            let mut mark = [0; 3];
            input.read_exact(&mut mark).map_err(|error| read_error(file, error))?;
        }
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
    Ok(input)
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

/// Calls `visit` with every line, its number (from 1) and without its end (`\n` or `\r\n`). Lines are UTF-8 without NUL.
pub(crate) fn for_each_line(
    file: &DataFile,
    input: &mut dyn BufRead,
    mut visit: impl FnMut(u64, &str) -> StageResult<Flow>,
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
        let line = text_of(&bytes).map_err(|flaw| flaw.at(file, number, &format!("offset {}", start + flaw.offset as u64)))?;
        start += read as u64;
        let line = line.strip_suffix('\n').unwrap_or(line);
        if visit(number, line.strip_suffix('\r').unwrap_or(line))?.is_break() {
            return Ok(());
        }
    }
}

/// A byte that does not belong into a text.
pub(crate) struct Flaw {
    byte: u8,
    /// Where it is.
    pub offset: usize,
}

impl Flaw {
    /// A NUL whose place is not known more exactly.
    pub const fn nul() -> Self {
        Self { byte: 0, offset: 0 }
    }

    /// The error that names it.
    pub fn at(&self, file: &DataFile, line: u64, place: &str) -> StageError {
        match self.byte {
            0 => {
                let hint = "the file is binary, or UTF-16 without its mark; `iconv` converts the latter, `tr -d '\\0'` drops NUL bytes";
                data_error(file, Some(line), format!("NUL byte at {place}: not a text"), Some(hint))
            }
            byte => data_error(file, Some(line), format!("byte 0x{byte:02x} at {place} is not UTF-8"), Some("convert the file to UTF-8")),
        }
    }
}

/// `bytes` as text: UTF-8 without NUL.
pub(crate) fn text_of(bytes: &[u8]) -> Result<&str, Flaw> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let offset = error.valid_up_to();
        Flaw { byte: bytes[offset], offset }
    })?;
    text.bytes().position(|byte| byte == 0).map_or(Ok(text), |offset| Err(Flaw { byte: 0, offset }))
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
