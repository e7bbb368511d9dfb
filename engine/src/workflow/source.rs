use std::{
    path::PathBuf,
    sync::{Arc, OnceLock},
};

/// A text that a workflow was read from: a file, or a `--set` argument.
#[derive(Debug)]
pub(crate) struct Source {
    /// What messages call it.
    pub name: String,
    /// Folder that paths written in it are relative to.
    pub folder: PathBuf,
    /// The text.
    pub text: Arc<str>,
    /// Byte offset of the start of each line.
    lines: Vec<usize>,
    /// The text as a terminal may see it.
    printable: OnceLock<String>,
}

impl Source {
    pub fn new(name: String, folder: PathBuf, text: String) -> Self {
        let lines = std::iter::once(0).chain(text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n').map(|(at, _)| at + 1)).collect();
        Self { name, folder, text: text.into(), lines, printable: OnceLock::new() }
    }

    /// Line and column of a byte offset, both counted from 1, columns in characters.
    pub fn position(&self, offset: usize) -> (usize, usize) {
        let line = self.lines.partition_point(|start| *start <= offset).max(1);
        let column = self.text.get(self.lines[line - 1]..offset).map_or(0, |before| before.chars().count());
        (line, column + 1)
    }

    /// The text with something harmless for every control character, all bytes at the same place: a file that is no workflow must not
    /// talk to the terminal that its errors are shown on.
    pub fn printable(&self) -> &str {
        self.printable.get_or_init(|| {
            let harmless = |character: char| match character {
                '\n' | '\t' => character,
                '\r' => ' ',
                '\0'..='\u{1f}' | '\u{7f}' => '?',
                // Two bytes each.
                '\u{80}'..='\u{9f}' => '\u{b7}',
                other => other,
            };
            self.text.chars().map(harmless).collect()
        })
    }

    /// The text of line `line`, counted from 1.
    pub fn line(&self, line: usize) -> &str {
        let start = self.lines.get(line.wrapping_sub(1)).copied().unwrap_or(self.text.len());
        let end = self.lines.get(line).copied().unwrap_or(self.text.len());
        self.text.get(start..end).unwrap_or("").trim_end_matches(['\n', '\r'])
    }
}

/// A piece of one of the sources.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Span {
    /// Index of the source; [`Span::NOWHERE`] has none.
    pub source: u32,
    /// First byte.
    pub start: u32,
    /// One past the last byte.
    pub end: u32,
}

impl Span {
    /// The place of what nobody wrote: defaults of an edition.
    pub const NOWHERE: Self = Self { source: u32::MAX, start: 0, end: 0 };

    pub fn new(source: u32, range: std::ops::Range<usize>) -> Self {
        Self { source, start: range.start as u32, end: range.end as u32 }
    }
}

/// All that a workflow was read from.
#[derive(Debug, Default)]
pub(crate) struct Sources(Vec<Arc<Source>>);

impl Sources {
    pub fn add(&mut self, source: Source) -> u32 {
        self.0.push(Arc::new(source));
        self.0.len() as u32 - 1
    }

    pub fn get(&self, index: u32) -> Option<&Arc<Source>> {
        self.0.get(index as usize)
    }
}
