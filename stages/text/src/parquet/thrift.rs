//! Thrift's compact protocol, in which Parquet writes its metadata.

use super::Result;

/// Deepest nesting of values that are skipped.
const MAX_DEPTH: usize = 16;

/// What is said where a value should go on but the bytes do not.
pub(super) const CUT: &str = "the metadata end early";

/// Type of a value.
pub(super) type Kind = u8;
pub(super) const TRUE: Kind = 1;
pub(super) const FALSE: Kind = 2;
const BYTE: Kind = 3;
pub(super) const I32: Kind = 5;
pub(super) const I64: Kind = 6;
const DOUBLE: Kind = 7;
pub(super) const BINARY: Kind = 8;
pub(super) const LIST: Kind = 9;
const SET: Kind = 10;
const MAP: Kind = 11;
pub(super) const STRUCT: Kind = 12;

/// A cursor over encoded values.
pub(super) struct Thrift<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Thrift<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Bytes read so far.
    pub fn position(&self) -> usize {
        self.at
    }

    fn byte(&mut self) -> Result<u8> {
        let byte = *self.bytes.get(self.at).ok_or(CUT)?;
        self.at += 1;
        Ok(byte)
    }

    fn take(&mut self, length: u64) -> Result<&'a [u8]> {
        let rest = &self.bytes[self.at..];
        let taken = usize::try_from(length).ok().and_then(|length| rest.get(..length)).ok_or(CUT)?;
        self.at += taken.len();
        Ok(taken)
    }

    fn varint(&mut self) -> Result<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err("the metadata have a number that is too long".into())
    }

    /// A number of any width.
    pub fn integer(&mut self) -> Result<i64> {
        let value = self.varint()?;
        Ok((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    /// A number that counts or measures something.
    pub fn size(&mut self) -> Result<u64> {
        u64::try_from(self.integer()?).map_err(|_| "the metadata have a negative size".into())
    }

    pub fn text(&mut self) -> Result<String> {
        let length = self.varint()?;
        Ok(String::from_utf8_lossy(self.take(length)?).into_owned())
    }

    /// A struct: calls `read` for every field, known by its id and type, to put it into the result. What it leaves unread is skipped.
    pub fn record<T: Default>(&mut self, mut read: impl FnMut(&mut Self, &mut T, (i64, Kind)) -> Result<()>) -> Result<T> {
        let mut record = T::default();
        self.fields(|thrift, field| read(thrift, &mut record, field))?;
        Ok(record)
    }

    /// The same for a struct whose fields go elsewhere.
    pub fn fields(&mut self, mut read: impl FnMut(&mut Self, (i64, Kind)) -> Result<()>) -> Result<()> {
        let mut id = 0;
        while let Some(kind) = self.field(&mut id)? {
            let before = self.at;
            read(self, (id, kind))?;
            // Every value takes a byte or more, but for truth values, which there is nothing to skip of.
            if self.at == before {
                self.skip(kind, MAX_DEPTH)?;
            }
        }
        Ok(())
    }

    fn field(&mut self, id: &mut i64) -> Result<Option<Kind>> {
        let head = self.byte()?;
        if head == 0 {
            return Ok(None);
        }
        *id = match head >> 4 {
            0 => self.integer()?,
            delta => id.saturating_add(i64::from(delta)),
        };
        Ok(Some(head & 15))
    }

    /// The elements of a list of `wanted`, each read by `read`.
    pub fn list<T>(&mut self, wanted: Kind, mut read: impl FnMut(&mut Self) -> Result<T>) -> Result<Vec<T>> {
        let (length, kind) = self.list_head()?;
        if kind != wanted && length > 0 {
            return Err("the metadata have a list of another type than expected".into());
        }
        // Not reserved: an element may be larger than the byte that it takes at least.
        let mut elements = Vec::new();
        for _ in 0..length {
            elements.push(read(self)?);
        }
        Ok(elements)
    }

    fn list_head(&mut self) -> Result<(u64, Kind)> {
        let head = self.byte()?;
        let length = if head >> 4 == 15 { self.varint()? } else { u64::from(head >> 4) };
        // Every element takes a byte or more.
        if length > (self.bytes.len() - self.at) as u64 { Err(CUT.into()) } else { Ok((length, head & 15)) }
    }

    fn skip(&mut self, kind: Kind, depth: usize) -> Result<()> {
        let deeper = depth.checked_sub(1).ok_or("the metadata are nested too deep")?;
        match kind {
            TRUE | FALSE => {}
            BYTE => drop(self.byte()?),
            4..=I64 => drop(self.varint()?),
            DOUBLE => drop(self.take(8)?),
            BINARY => {
                let length = self.varint()?;
                self.take(length)?;
            }
            LIST | SET => {
                let (length, kind) = self.list_head()?;
                for _ in 0..length {
                    self.skip_element(kind, deeper)?;
                }
            }
            MAP => {
                let length = self.varint()?;
                if length > (self.bytes.len() - self.at) as u64 {
                    return Err(CUT.into());
                }
                let kinds = if length > 0 { self.byte()? } else { 0 };
                for _ in 0..length {
                    self.skip_element(kinds >> 4, deeper)?;
                    self.skip_element(kinds & 15, deeper)?;
                }
            }
            STRUCT => {
                let mut id = 0;
                while let Some(kind) = self.field(&mut id)? {
                    self.skip(kind, deeper)?;
                }
            }
            _ => return Err("the metadata have a value of an unknown type".into()),
        }
        Ok(())
    }

    /// Truth values have a byte of their own in lists and maps.
    fn skip_element(&mut self, kind: Kind, depth: usize) -> Result<()> {
        if matches!(kind, TRUE | FALSE) { self.byte().map(drop) } else { self.skip(kind, depth) }
    }
}
