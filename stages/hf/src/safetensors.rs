//! Headers of safetensors files: eight bytes of length, a JSON object, then the tensors' bytes without holes.

use std::{collections::HashSet, fmt, io::Read};

use rlflow_api::Dtype;
use serde::{
    Deserialize,
    de::{Deserializer, MapAccess, Visitor},
};
use serde_json::{Value, json};

use crate::HfError;

/// Longest header that is read, as in the format's own library.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;
const METADATA: &str = "__metadata__";

/// A tensor, as the header describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name.
    pub name: String,
    /// Element type, as the file spells it.
    pub dtype: String,
    /// Dimensions, outermost first.
    pub shape: Vec<u64>,
    /// First byte, counted from the end of the header.
    pub start: u64,
    /// Number of bytes.
    pub size_bytes: u64,
}

/// What a file holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Tensors in the order of their bytes, which they fill without a hole.
    pub tensors: Vec<TensorInfo>,
    /// Length of all that stands before the tensors' bytes.
    pub size_bytes: u64,
}

/// Name of an element type in headers.
pub const fn dtype_name(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F32 => "F32",
        Dtype::F16 => "F16",
        Dtype::Bf16 => "BF16",
        Dtype::I64 => "I64",
        Dtype::I32 => "I32",
        Dtype::U32 => "U32",
        Dtype::U16 => "U16",
        Dtype::U8 => "U8",
    }
}

/// The type of weights that is called `name`, if weights may have it.
pub fn weight_dtype(name: &str) -> Option<Dtype> {
    [Dtype::F32, Dtype::F16, Dtype::Bf16].into_iter().find(|dtype| dtype_name(*dtype) == name)
}

/// Bits of an element, of every type that the format knows.
fn bits(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "F64" | "I64" | "U64" | "C64" => 64,
        "F32" | "I32" | "U32" => 32,
        "F16" | "BF16" | "I16" | "U16" => 16,
        "I8" | "U8" | "BOOL" | "F8_E4M3" | "F8_E5M2" | "F8_E8M0" => 8,
        "F6_E2M3" | "F6_E3M2" => 6,
        "F4" => 4,
        _ => return None,
    })
}

impl Header {
    /// Reads the header at the beginning of a file of `file_bytes`; returns it with its bytes. `file` is for messages.
    ///
    /// # Errors
    /// If the file is shorter than it says, or the header is not one.
    pub fn read(input: &mut dyn Read, file_bytes: u64, file: &str) -> Result<(Self, Vec<u8>), HfError> {
        let unreadable = |error: std::io::Error| HfError::new(file, format!("cannot be read: {error}"));
        if file_bytes < 8 {
            return Err(truncated(file, format!("it has {file_bytes} bytes, too few for a safetensors file")));
        }
        let mut length = [0; 8];
        input.read_exact(&mut length).map_err(unreadable)?;
        let header_bytes = u64::from_le_bytes(length);
        if header_bytes > MAX_HEADER_BYTES {
            return Err(HfError::new(file, format!("not a safetensors file: its first bytes announce a header of {header_bytes} bytes")));
        }
        if header_bytes > file_bytes - 8 {
            return Err(truncated(file, format!("its header has {header_bytes} bytes, and the file only {file_bytes}")));
        }
        let mut raw = length.to_vec();
        input.take(header_bytes).read_to_end(&mut raw).map_err(unreadable)?;
        if raw.len() as u64 != 8 + header_bytes {
            return Err(truncated(file, "it ends within its header".into()));
        }
        let data_bytes = file_bytes - 8 - header_bytes;
        let header = Self::parse(&raw[8..], data_bytes, file)?;
        Ok((header, raw))
    }

    /// Parses the JSON of a header that `data_bytes` of tensors follow.
    ///
    /// # Errors
    /// If offsets overlap, leave holes or the file, or do not fit the shapes; if a name stands twice.
    pub fn parse(json: &[u8], data_bytes: u64, file: &str) -> Result<Self, HfError> {
        let bad = |message: String| HfError::new(file, message);
        let Entries(entries) = serde_json::from_slice(json).map_err(|error| bad(format!("its header is not valid: {error}")))?;
        let mut names = HashSet::with_capacity(entries.len());
        let mut tensors = Vec::with_capacity(entries.len());
        for (name, value) in entries {
            if !names.insert(name.clone()) {
                return Err(bad(format!("its header names tensor `{name}` twice")));
            }
            if name == METADATA {
                continue;
            }
            let entry =
                Described::deserialize(value).map_err(|error| bad(format!("its header describes tensor `{name}` wrongly: {error}")))?;
            let Described { dtype, shape, data_offsets: [start, end] } = entry;
            let element = bits(&dtype).ok_or_else(|| bad(format!("tensor `{name}` has elements of type `{dtype}`, which is unknown")))?;
            let total_bits = shape.iter().try_fold(element, |product, size| product.checked_mul(*size));
            let size_bytes = total_bits.filter(|bits| bits.is_multiple_of(8)).map(|bits| bits / 8);
            if size_bytes.is_none() || end.checked_sub(start) != size_bytes {
                return Err(bad(format!("tensor `{name}` is said to be {dtype} of shape {shape:?}, but to take bytes {start} to {end}")));
            }
            tensors.push(TensorInfo { name, dtype, shape, start, size_bytes: end - start });
        }
        tensors.sort_by(|a, b| (a.start, a.size_bytes, &a.name).cmp(&(b.start, b.size_bytes, &b.name)));
        let mut at = 0;
        for tensor in &tensors {
            if tensor.start != at {
                let what = if tensor.start > at { "leaves a hole before" } else { "overlaps with the tensor before" };
                return Err(bad(format!("its header {what} tensor `{}`: it begins at byte {} and not at {at}", tensor.name, tensor.start)));
            }
            at += tensor.size_bytes;
        }
        if at > data_bytes {
            let name = tensors.iter().find(|tensor| tensor.start + tensor.size_bytes > data_bytes).map_or("", |tensor| &tensor.name);
            return Err(truncated(
                file,
                format!("its tensors take {at} bytes, and {data_bytes} are there; it ends within tensor `{name}`"),
            ));
        }
        if at < data_bytes {
            return Err(bad(format!("{} bytes follow its last tensor", data_bytes - at)));
        }
        Ok(Self { tensors, size_bytes: 8 + json.len() as u64 })
    }

    /// The bytes before the tensors of a new file: length and JSON, padded to a multiple of eight. Tensors must be in the order of
    /// their bytes, without holes.
    pub fn encode(tensors: &[TensorInfo]) -> Vec<u8> {
        let mut object = serde_json::Map::new();
        object.insert(METADATA.into(), json!({ "format": "pt" }));
        for tensor in tensors {
            let offsets = [tensor.start, tensor.start + tensor.size_bytes];
            object.insert(tensor.name.clone(), json!({ "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets }));
        }
        let mut json = Value::Object(object).to_string().into_bytes();
        json.resize(json.len().next_multiple_of(8), b' ');
        [&(json.len() as u64).to_le_bytes()[..], &json].concat()
    }
}

fn truncated(file: &str, message: String) -> HfError {
    HfError::new(file, message).hint("the file is incomplete: copy or download it again")
}

#[derive(Deserialize)]
struct Described {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

/// The members of an object as they stand, names that stand twice included.
struct Entries(Vec<(String, Value)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Members;

        impl<'de> Visitor<'de> for Members {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Entries, M::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }

        deserializer.deserialize_map(Members)
    }
}
