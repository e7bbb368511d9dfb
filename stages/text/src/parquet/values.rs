//! Decoders of what is in a page. All are lazy: how many values a page claims to hold allocates nothing.

use std::rc::Rc;

use serde_json::{Number, Value};

use super::{
    Result,
    footer::{Leaf, Meaning, Physical},
};

const CUT: &str = "a page ends early";

/// Bytes of a page from here on; cheap to clone.
#[derive(Clone)]
pub(super) struct Bytes {
    page: Rc<[u8]>,
    at: usize,
    end: usize,
}

impl Bytes {
    pub fn new(page: Vec<u8>) -> Self {
        let end = page.len();
        Self { page: page.into(), at: 0, end }
    }

    fn rest(&self) -> &[u8] {
        &self.page[self.at..self.end]
    }

    /// The next `length` bytes, apart.
    pub fn split(&mut self, length: usize) -> Result<Self> {
        if length > self.end - self.at {
            return Err(CUT.into());
        }
        let taken = Self { page: Rc::clone(&self.page), at: self.at, end: self.at + length };
        self.at += length;
        Ok(taken)
    }

    fn take(&mut self, length: usize) -> Result<&[u8]> {
        if length > self.end - self.at {
            return Err(CUT.into());
        }
        self.at += length;
        Ok(&self.page[self.at - length..self.at])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N)?);
        Ok(array)
    }

    pub fn u32(&mut self) -> Result<usize> {
        Ok(u32::from_le_bytes(self.array()?) as usize)
    }

    fn varint(&mut self) -> Result<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let [byte] = self.array()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err("a page has a number that is too long".into())
    }

    fn zigzag(&mut self) -> Result<i64> {
        let value = self.varint()?;
        Ok((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    /// Number `index` of those that are packed with `width` (at most 64) bits each, lowest bit first.
    fn packed(&self, index: u64, width: u32) -> Result<u64> {
        let first = index.checked_mul(u64::from(width)).ok_or(CUT)?;
        let bytes = usize::try_from(first / 8).ok().and_then(|from| self.rest().get(from..)).ok_or(CUT)?;
        let (shift, mut window) = ((first % 8) as u32, [0; 16]);
        let length = ((shift + width).div_ceil(8) as usize).min(16);
        window[..length].copy_from_slice(bytes.get(..length).ok_or(CUT)?);
        let mask = if width == 64 { u64::MAX } else { (1 << width) - 1 };
        Ok((u128::from_le_bytes(window) >> shift) as u64 & mask)
    }
}

/// Runs of equal numbers and groups of packed ones: levels, dictionary indices and truth values.
pub(super) struct Hybrid {
    bytes: Bytes,
    width: u32,
    run: Run,
    left: u64,
}

enum Run {
    Equal(u64),
    Packed { bytes: Bytes, next: u64 },
}

impl Hybrid {
    pub fn new(bytes: Bytes, width: u32) -> Result<Self> {
        if width > 32 {
            Err("a page packs numbers wider than 32 bits".into())
        } else {
            Ok(Self { bytes, width, run: Run::Equal(0), left: 0 })
        }
    }

    pub fn next(&mut self) -> Result<u64> {
        while self.left == 0 {
            let head = self.bytes.varint()?;
            (self.run, self.left) = match head & 1 {
                0 => {
                    let mut value = [0; 8];
                    let length = self.width.div_ceil(8) as usize;
                    value[..length].copy_from_slice(self.bytes.take(length)?);
                    (Run::Equal(u64::from_le_bytes(value)), head >> 1)
                }
                _ => {
                    let groups = head >> 1;
                    // Writers may leave the padding of the last group away.
                    let length = groups.saturating_mul(u64::from(self.width)).min(self.bytes.rest().len() as u64);
                    (Run::Packed { bytes: self.bytes.split(length as usize)?, next: 0 }, groups.saturating_mul(8))
                }
            };
        }
        self.left -= 1;
        match &mut self.run {
            Run::Equal(value) => Ok(*value),
            Run::Packed { bytes, next } => {
                *next += 1;
                bytes.packed(*next - 1, self.width)
            }
        }
    }
}

/// Numbers as differences to the one before (`DELTA_BINARY_PACKED`).
pub(super) struct Delta {
    bytes: Bytes,
    /// Numbers in a miniblock, and miniblocks in a block.
    mini_len: u64,
    minis: usize,
    left: u64,
    value: i64,
    first: bool,
    min_delta: i64,
    /// Widths of the block's miniblocks that are to come, last first.
    widths: Vec<u8>,
    mini: Bytes,
    width: u32,
    mini_left: u64,
}

impl Delta {
    pub fn new(mut bytes: Bytes) -> Result<Self> {
        let (block_len, minis, left, value) = (bytes.varint()?, bytes.varint()?, bytes.varint()?, bytes.zigzag()?);
        let known = minis > 0 && block_len.is_multiple_of(minis) && minis <= bytes.page.len() as u64;
        let mini_len = if known { block_len / minis } else { 0 };
        if mini_len == 0 || !mini_len.is_multiple_of(8) || mini_len > 1 << 20 {
            return Err("a page has blocks of an impossible size".into());
        }
        let mini = Bytes { page: Rc::clone(&bytes.page), at: 0, end: 0 };
        let (minis, widths) = (minis as usize, Vec::new());
        Ok(Self { bytes, mini_len, minis, left, value, first: true, min_delta: 0, widths, mini, width: 0, mini_left: 0 })
    }

    fn next(&mut self) -> Result<i64> {
        self.left = self.left.checked_sub(1).ok_or(CUT)?;
        if std::mem::take(&mut self.first) {
            return Ok(self.value);
        }
        if self.mini_left == 0 {
            self.next_mini()?;
        }
        let delta = self.mini.packed(self.mini_len - self.mini_left, self.width)?;
        self.mini_left -= 1;
        self.value = self.value.wrapping_add(self.min_delta).wrapping_add(delta as i64);
        Ok(self.value)
    }

    fn next_mini(&mut self) -> Result<()> {
        if self.widths.is_empty() {
            self.min_delta = self.bytes.zigzag()?;
            self.widths = self.bytes.take(self.minis)?.iter().rev().copied().collect();
        }
        self.width = u32::from(self.widths.pop().unwrap_or_default());
        if self.width > 64 {
            return Err("a page packs numbers wider than 64 bits".into());
        }
        self.mini = self.bytes.split((self.mini_len * u64::from(self.width) / 8) as usize)?;
        self.mini_left = self.mini_len;
        Ok(())
    }

    /// What follows all the numbers.
    fn after(mut self) -> Result<Bytes> {
        let mut deltas = self.left.saturating_sub(1);
        while deltas > 0 {
            self.next_mini()?;
            deltas = deltas.saturating_sub(self.mini_len);
        }
        Ok(self.bytes)
    }
}

/// The values of a page, nulls apart.
pub(super) enum Values {
    /// All are null.
    None,
    Plain(Bytes),
    PlainBits(Bytes, u64),
    /// Indices into the dictionary.
    Dictionary(Hybrid),
    Bits(Hybrid),
    Delta(Delta),
    DeltaLength {
        lengths: Delta,
        data: Bytes,
    },
    DeltaBytes {
        prefixes: Delta,
        lengths: Delta,
        data: Bytes,
        last: Vec<u8>,
    },
    /// Byte `i` of every value, then byte `i + 1` of every value.
    Streams {
        data: Bytes,
        next: usize,
    },
}

impl Values {
    /// Of a page's data in `encoding`.
    pub fn new(mut data: Bytes, encoding: i64, leaf: &Leaf) -> Result<Self> {
        let physical = leaf.physical;
        Ok(match (encoding, physical) {
            _ if data.rest().is_empty() => Self::None,
            (0, Physical::Boolean) => Self::PlainBits(data, 0),
            (0, _) => Self::Plain(data),
            (2 | 8, _) => {
                let [width] = data.array()?;
                Self::Dictionary(Hybrid::new(data, u32::from(width))?)
            }
            (3, Physical::Boolean) => {
                let length = data.u32()?;
                Self::Bits(Hybrid::new(data.split(length)?, 1)?)
            }
            (5, Physical::Int32 | Physical::Int64) => Self::Delta(Delta::new(data)?),
            (6, Physical::ByteArray) => {
                let lengths = Delta::new(data.clone())?;
                Self::DeltaLength { lengths, data: Delta::new(data)?.after()? }
            }
            (7, Physical::ByteArray | Physical::FixedLenByteArray(_)) => {
                let (prefixes, rest) = (Delta::new(data.clone())?, Delta::new(data)?.after()?);
                let (lengths, data) = (Delta::new(rest.clone())?, Delta::new(rest)?.after()?);
                Self::DeltaBytes { prefixes, lengths, data, last: Vec::new() }
            }
            (9, Physical::Int32 | Physical::Int64 | Physical::Float | Physical::Double | Physical::FixedLenByteArray(_)) => {
                Self::Streams { data, next: 0 }
            }
            _ => return Err(format!("column `{}` is {physical:?} in encoding {encoding}, which cannot be read", leaf.name).into()),
        })
    }

    /// The next value.
    pub fn next(&mut self, leaf: &Leaf, dictionary: &[Value]) -> Result<Value> {
        match self {
            Self::None => Err(CUT.into()),
            Self::Plain(data) => plain(data, leaf),
            Self::PlainBits(data, next) => {
                *next += 1;
                Ok(Value::Bool(data.packed(*next - 1, 1)? == 1))
            }
            Self::Dictionary(indices) => {
                let index = indices.next()?;
                let value = usize::try_from(index).ok().and_then(|index| dictionary.get(index));
                value.cloned().ok_or_else(|| format!("column `{}` has entry {index} of {}", leaf.name, dictionary.len()).into())
            }
            Self::Bits(bits) => Ok(Value::Bool(bits.next()? == 1)),
            Self::Delta(delta) => {
                let value = delta.next()?;
                Ok(integer(if leaf.physical == Physical::Int32 { i64::from(value as i32) } else { value }, leaf))
            }
            Self::DeltaLength { lengths, data } => {
                let length = usize::try_from(lengths.next()?).map_err(|_| CUT)?;
                bytes(data.take(length)?, leaf)
            }
            Self::DeltaBytes { prefixes, lengths, data, last } => {
                let prefix = usize::try_from(prefixes.next()?).ok().filter(|prefix| *prefix <= last.len()).ok_or(CUT)?;
                let length = usize::try_from(lengths.next()?).map_err(|_| CUT)?;
                last.truncate(prefix);
                last.extend_from_slice(data.take(length)?);
                bytes(last, leaf)
            }
            Self::Streams { data, next } => {
                let size = match leaf.physical {
                    Physical::Int32 | Physical::Float => 4,
                    Physical::FixedLenByteArray(length) => length,
                    _ => 8,
                };
                let stream = data.rest().len() / size;
                if *next >= stream {
                    return Err(CUT.into());
                }
                let value: Vec<u8> = data.rest().iter().skip(*next).step_by(stream).take(size).copied().collect();
                *next += 1;
                plain(&mut Bytes::new(value), leaf)
            }
        }
    }
}

/// A value as it is in memory, little-endian.
pub(super) fn plain(data: &mut Bytes, leaf: &Leaf) -> Result<Value> {
    Ok(match leaf.physical {
        Physical::Boolean => return Err(format!("column `{}` has a dictionary of truth values", leaf.name).into()),
        Physical::Int32 => integer(i64::from(i32::from_le_bytes(data.array()?)), leaf),
        Physical::Int64 => integer(i64::from_le_bytes(data.array()?), leaf),
        Physical::Int96 => {
            data.take(12)?;
            Value::Null
        }
        Physical::Float => real(f64::from(f32::from_le_bytes(data.array()?))),
        Physical::Double => real(f64::from_le_bytes(data.array()?)),
        Physical::ByteArray => {
            let length = data.u32()?;
            return bytes(data.take(length)?, leaf);
        }
        Physical::FixedLenByteArray(length) => {
            data.take(length)?;
            Value::Null
        }
    })
}

fn integer(value: i64, leaf: &Leaf) -> Value {
    match (leaf.meaning, leaf.physical) {
        (Meaning::Other, _) => Value::Null,
        (Meaning::Unsigned, Physical::Int32) => Value::from(value as u32),
        (Meaning::Unsigned, _) => Value::from(value as u64),
        _ => Value::from(value),
    }
}

fn real(value: f64) -> Value {
    Number::from_f64(value).map_or(Value::Null, Value::Number)
}

fn bytes(bytes: &[u8], leaf: &Leaf) -> Result<Value> {
    match (std::str::from_utf8(bytes), leaf.meaning) {
        (_, Meaning::Other) => Ok(Value::Null),
        (Ok(text), _) => Ok(Value::String(text.to_owned())),
        (Err(_), Meaning::Text) => Err(format!("column `{}` has text that is not UTF-8", leaf.name).into()),
        // Pictures, for example.
        (Err(_), _) => Ok(Value::Null),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The examples of Parquet's `Encodings.md`.
    #[test]
    fn numbers_are_unpacked_as_specified() {
        // 0 to 7, three bits each.
        let mut packed = Hybrid::new(Bytes::new(vec![3, 0b1000_1000, 0b1100_0110, 0b1111_1010]), 3).ok().unwrap();
        let read: Vec<u64> = (0..8).map(|_| packed.next().ok().unwrap()).collect();
        assert_eq!(read, [0, 1, 2, 3, 4, 5, 6, 7]);
        assert!(packed.next().is_err());
        let mut runs = Hybrid::new(Bytes::new(vec![5 << 1, 9, 1 << 1, 4]), 4).ok().unwrap();
        assert_eq!((0..6).map(|_| runs.next().ok().unwrap()).collect::<Vec<_>>(), [9, 9, 9, 9, 9, 4]);

        // Block of 128 in 4 miniblocks; 7, 5, 3, 1, 2, 3, 4, 5: the smallest difference is -2, the rest take two bits.
        let mut bytes = vec![0x80, 1, 4, 8, 14, 3, 2, 0, 0, 0, 0b1100_0000, 0b0011_1111];
        bytes.extend([0; 6]);
        bytes.push(99);
        let mut delta = Delta::new(Bytes::new(bytes.clone())).ok().unwrap();
        assert_eq!((0..8).map(|_| delta.next().ok().unwrap()).collect::<Vec<_>>(), [7, 5, 3, 1, 2, 3, 4, 5]);
        assert!(delta.next().is_err());
        assert_eq!(Delta::new(Bytes::new(bytes)).ok().unwrap().after().ok().unwrap().rest(), [99]);
    }
}
