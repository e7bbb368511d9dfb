//! One column of a row group, value by value.

use serde_json::Value;

use super::{
    Result, Source,
    footer::{Chunk, Leaf},
    page::{PageHeader, PageKind, unpack},
    values::{Bytes, Hybrid, Values, plain},
};

/// Repetition and definition level of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Levels {
    /// The level at which an element repeats; 0 = a row begins.
    pub repetition: u32,
    /// How much of the value's path is there.
    pub definition: u32,
}

/// A cursor over the values of a column.
pub(super) struct Column<'a> {
    source: &'a Source<'a>,
    leaf: &'a Leaf,
    chunk: &'a Chunk,
    /// Where the next page begins.
    at: u64,
    /// Values that are still to come, those of the page included.
    left: u64,
    page: Option<Page>,
    dictionary: Vec<Value>,
    next: Option<Levels>,
}

struct Page {
    left: u64,
    repetitions: Option<Hybrid>,
    definitions: Option<Hybrid>,
    values: Values,
}

impl<'a> Column<'a> {
    pub fn new(source: &'a Source<'a>, leaf: &'a Leaf, chunk: &'a Chunk) -> Self {
        Self { source, leaf, chunk, at: chunk.start, left: chunk.values, page: None, dictionary: Vec::new(), next: None }
    }

    /// Levels of the value that [`Self::take`] will return; none at the end.
    pub fn peek(&mut self) -> Result<Option<Levels>> {
        if self.next.is_some() || self.left == 0 {
            return Ok(self.next);
        }
        while self.page.as_ref().is_none_or(|page| page.left == 0) {
            self.read_page()?;
        }
        let Some(page) = &mut self.page else { return Ok(None) };
        let level = |levels: &mut Option<Hybrid>, most: u32| -> Result<u32> {
            match levels {
                None => Ok(most),
                Some(levels) => match levels.next()? {
                    level if level <= u64::from(most) => Ok(level as u32),
                    level => Err(format!("column `{}` has level {level} of {most}", self.leaf.name).into()),
                },
            }
        };
        // A column without repetition begins a row with every value.
        let repetition = level(&mut page.repetitions, self.leaf.max_repetition)?;
        let definition = level(&mut page.definitions, self.leaf.max_definition)?;
        self.next = Some(Levels { repetition, definition });
        Ok(self.next)
    }

    /// The next value; null if less than all of its path is there.
    pub fn take(&mut self) -> Result<Value> {
        let levels = self.peek()?.ok_or_else(|| format!("column `{}` ends early", self.leaf.name))?;
        self.next = None;
        self.left -= 1;
        let Some(page) = &mut self.page else { return Ok(Value::Null) };
        page.left -= 1;
        if levels.definition < self.leaf.max_definition { Ok(Value::Null) } else { page.values.next(self.leaf, &self.dictionary) }
    }

    fn read_page(&mut self) -> Result<()> {
        if self.at >= self.chunk.end {
            return Err(format!("column `{}` ends early", self.leaf.name).into());
        }
        let (header, data) = PageHeader::read(self.source, self.at, self.chunk.end)?;
        self.at = data + header.packed_bytes;
        match header.kind {
            PageKind::Other => {}
            PageKind::Dictionary => {
                let page = self.source.read(data, header.packed_bytes)?;
                let mut page = Bytes::new(unpack(self.chunk.codec, page, header.unpacked_bytes)?);
                // Every entry takes bytes, so that this ends no later than the page.
                self.dictionary.clear();
                for _ in 0..header.values {
                    self.dictionary.push(plain(&mut page, self.leaf)?);
                }
            }
            PageKind::Data => {
                let page = self.source.read(data, header.packed_bytes)?;
                let mut page = Bytes::new(unpack(self.chunk.codec, page, header.unpacked_bytes)?);
                let readable = |most: u32, encoding: i64| match most {
                    0 => Ok(None),
                    _ if encoding != 3 => {
                        Err(format!("column `{}` has levels in encoding {encoding}, which cannot be read", self.leaf.name))
                    }
                    _ => Ok(Some(most)),
                };
                let [definition, repetition] = header.level_encodings;
                let most = (readable(self.leaf.max_repetition, repetition)?, readable(self.leaf.max_definition, definition)?);
                let mut levels = |most: Option<u32>| match most {
                    None => Ok(None),
                    Some(most) => {
                        let length = page.u32()?;
                        Hybrid::new(page.split(length)?, width(most)).map(Some)
                    }
                };
                let (repetitions, definitions) = (levels(most.0)?, levels(most.1)?);
                let values = Values::new(page, header.encoding, self.leaf)?;
                self.page = Some(Page { left: header.values.min(self.left), repetitions, definitions, values });
            }
            PageKind::DataV2 => {
                let [definition, repetition] = header.level_bytes;
                let level_bytes =
                    definition.checked_add(repetition).filter(|bytes| *bytes <= header.packed_bytes.min(header.unpacked_bytes));
                let level_bytes = level_bytes.ok_or("the levels of a page are longer than the page")?;
                let mut levels = Bytes::new(self.source.read(data, level_bytes)?);
                let packed = self.source.read(data + level_bytes, header.packed_bytes - level_bytes)?;
                let codec = if header.unpacked { 0 } else { self.chunk.codec };
                // A page of nulls may have nothing to unpack.
                let values = if packed.is_empty() { packed } else { unpack(codec, packed, header.unpacked_bytes - level_bytes)? };
                let mut hybrid = |most: u32, length: u64| {
                    let bytes = levels.split(length as usize)?;
                    if most == 0 { Ok(None) } else { Hybrid::new(bytes, width(most)).map(Some) }
                };
                let (repetitions, definitions) =
                    (hybrid(self.leaf.max_repetition, repetition)?, hybrid(self.leaf.max_definition, definition)?);
                let values = Values::new(Bytes::new(values), header.encoding, self.leaf)?;
                self.page = Some(Page { left: header.values.min(self.left), repetitions, definitions, values });
            }
        }
        Ok(())
    }
}

/// Bits of a level that is at most `most`.
fn width(most: u32) -> u32 {
    32 - most.leading_zeros()
}
