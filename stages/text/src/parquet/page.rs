//! Pages: a header, and data that may be packed.

use std::io::Read;

use flate2::bufread::MultiGzDecoder;

use super::{
    Result, Source, Trouble,
    thrift::{FALSE, I32, STRUCT, TRUE, Thrift},
};

/// A page that unpacks to more than this must have been reasonably large before.
const ALWAYS_BYTES: u64 = 4 << 20;
/// How much smaller than its content.
const MAX_RATIO: u64 = 4096;
/// First guess of a header's length. Headers may hold the smallest and largest value.
const HEADER_BYTES: u64 = 128;

/// A page's header.
#[derive(Default)]
pub(super) struct PageHeader {
    pub kind: PageKind,
    /// Bytes after the header.
    pub packed_bytes: u64,
    pub unpacked_bytes: u64,
    /// Values, nulls included.
    pub values: u64,
    pub encoding: i64,
    /// Encoding of definition levels in version 1; repetition levels must have the same.
    pub level_encodings: [i64; 2],
    /// Bytes of definition and repetition levels in version 2, which are not packed with the rest.
    pub level_bytes: [u64; 2],
    /// Whether the values are packed, in version 2.
    pub unpacked: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum PageKind {
    Data,
    DataV2,
    Dictionary,
    /// An index, or something newer.
    #[default]
    Other,
}

impl PageHeader {
    /// The header of the page at `start`, and where its data begin. The column ends at `end`.
    pub fn read(source: &Source<'_>, start: u64, end: u64) -> Result<(Self, u64)> {
        let mut window = HEADER_BYTES;
        loop {
            let length = window.min(end - start);
            let bytes = source.read(start, length)?;
            let mut thrift = Thrift::new(&bytes);
            match Self::parse(&mut thrift) {
                Ok(header) => {
                    let data = start + thrift.position() as u64;
                    if header.packed_bytes > end - data {
                        return Err("a page lies behind the end of its column".into());
                    }
                    return Ok((header, data));
                }
                // Perhaps only the window was too small.
                Err(Trouble::Format(_)) if length == window && window < 64 << 20 => window *= 16,
                Err(trouble) => return Err(trouble),
            }
        }
    }

    fn parse(thrift: &mut Thrift<'_>) -> Result<Self> {
        thrift.record(|thrift, header: &mut Self, field| {
            match field {
                (1, I32) => {
                    header.kind = match thrift.integer()? {
                        0 => PageKind::Data,
                        2 => PageKind::Dictionary,
                        3 => PageKind::DataV2,
                        _ => PageKind::Other,
                    }
                }
                (2, I32) => header.unpacked_bytes = thrift.size()?,
                (3, I32) => header.packed_bytes = thrift.size()?,
                (5 | 7, STRUCT) => thrift.fields(|thrift, field| {
                    match field {
                        (1, I32) => header.values = thrift.size()?,
                        (2, I32) => header.encoding = thrift.integer()?,
                        (3, I32) => header.level_encodings[0] = thrift.integer()?,
                        (4, I32) => header.level_encodings[1] = thrift.integer()?,
                        _ => {}
                    }
                    Ok(())
                })?,
                (8, STRUCT) => thrift.fields(|thrift, field| {
                    match field {
                        (1, I32) => header.values = thrift.size()?,
                        (4, I32) => header.encoding = thrift.integer()?,
                        (5, I32) => header.level_bytes[0] = thrift.size()?,
                        (6, I32) => header.level_bytes[1] = thrift.size()?,
                        (7, TRUE | FALSE) => header.unpacked = field.1 == FALSE,
                        _ => {}
                    }
                    Ok(())
                })?,
                _ => {}
            }
            Ok(())
        })
    }
}

/// Unpacks `packed` to exactly `length` bytes.
pub(super) fn unpack(codec: i64, packed: Vec<u8>, length: u64) -> Result<Vec<u8>> {
    const DAMAGED: &str = "a page cannot be unpacked: it is damaged";
    if length > ALWAYS_BYTES.max(packed.len() as u64 * MAX_RATIO) {
        return Err("a page says that it unpacks to far more than it can hold".into());
    }
    let unpacked = match codec {
        0 => packed,
        1 => {
            if snap::raw::decompress_len(&packed).ok() != Some(length as usize) {
                return Err(DAMAGED.into());
            }
            snap::raw::Decoder::new().decompress_vec(&packed).map_err(|_| DAMAGED)?
        }
        2 => {
            let mut unpacked = Vec::new();
            MultiGzDecoder::new(packed.as_slice()).take(length + 1).read_to_end(&mut unpacked).map_err(|_| DAMAGED)?;
            unpacked
        }
        6 => zstd::bulk::decompress(&packed, length as usize).map_err(|_| DAMAGED)?,
        other => {
            let name = match other {
                3 => "LZO",
                4 => "Brotli",
                5 | 7 => "LZ4",
                _ => "something unknown",
            };
            return Err(format!("the pages are packed with {name}; expected Snappy, Zstandard, gzip or none").into());
        }
    };
    if unpacked.len() as u64 == length { Ok(unpacked) } else { Err(DAMAGED.into()) }
}
