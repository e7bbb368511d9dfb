use std::{
    fs::File,
    io::{self, BufWriter, Write},
    path::Path,
};

use rlflow_api::{Dtype, StageError, StageResult};
use serde_json::{Map, Value, json};

use crate::{
    FileTensor, WantedTensor,
    config::pretty,
    safetensors::{Header, TensorInfo, dtype_name},
    weight_files::{INDEX, SINGLE},
};

const BUFFER_BYTES: usize = 1 << 20;

/// Writes weights as safetensors files: one, or several with an index.
pub struct Writer<'a> {
    /// Where to.
    pub folder: &'a Path,
    /// Most bytes of tensors in one file, unless one tensor has more.
    pub max_shard_bytes: u64,
}

impl Writer<'_> {
    /// Writes `tensors`, each as elements of its type; `content` gives the bytes of a weight in that type. Returns the files' names.
    ///
    /// # Errors
    /// What `content` returns, and what the file system says.
    pub fn write(
        &self,
        tensors: &[(FileTensor, Dtype)],
        mut content: impl FnMut(&WantedTensor, Dtype) -> StageResult<Vec<u8>>,
    ) -> StageResult<Vec<String>> {
        let shards = self.shards(tensors);
        let mut written = Vec::with_capacity(shards.len() + 1);
        let mut map = Map::new();
        for (at, shard) in shards.iter().enumerate() {
            let name = match shards.len() {
                1 => SINGLE.to_owned(),
                count => format!("model-{:05}-of-{count:05}.safetensors", at + 1),
            };
            let path = self.folder.join(&name);
            let failed = |source: io::Error| StageError::Io { operation: format!("write {}", path.display()), source };
            let mut output = BufWriter::with_capacity(BUFFER_BYTES, File::create_new(&path).map_err(failed)?);
            let mut start = 0;
            let infos: Vec<TensorInfo> = shard
                .iter()
                .map(|(tensor, dtype)| {
                    let (name, shape, size_bytes) = (tensor.name.clone(), tensor.shape.clone(), size_bytes(tensor, *dtype));
                    start += size_bytes;
                    TensorInfo { name, dtype: dtype_name(*dtype).into(), shape, start: start - size_bytes, size_bytes }
                })
                .collect();
            output.write_all(&Header::encode(&infos)).map_err(failed)?;
            for (tensor, dtype) in *shard {
                let parts = tensor.parts.iter().map(|part| content(part, *dtype)).collect::<StageResult<_>>()?;
                output.write_all(&tensor.join(parts, dtype.size_bytes() as usize)).map_err(failed)?;
                map.insert(tensor.name.clone(), name.clone().into());
            }
            output.into_inner().map_err(|error| failed(error.into_error()))?.sync_all().map_err(failed)?;
            written.push(name);
        }
        if written.len() > 1 {
            let total: u64 = tensors.iter().map(|(tensor, dtype)| size_bytes(tensor, *dtype)).sum();
            let mut index = Map::new();
            index.insert("metadata".into(), json!({ "total_size": total }));
            index.insert("weight_map".into(), Value::Object(map));
            let path = self.folder.join(INDEX);
            let failed = |source: io::Error| StageError::Io { operation: format!("write {}", path.display()), source };
            std::fs::write(&path, pretty(&index)).map_err(failed)?;
            written.push(INDEX.into());
        }
        Ok(written)
    }

    /// Cuts the list where a file would grow too large.
    fn shards<'t>(&self, tensors: &'t [(FileTensor, Dtype)]) -> Vec<&'t [(FileTensor, Dtype)]> {
        let mut shards = Vec::new();
        let (mut first, mut bytes) = (0, 0u64);
        for (at, (tensor, dtype)) in tensors.iter().enumerate() {
            let more = size_bytes(tensor, *dtype);
            if at > first && bytes + more > self.max_shard_bytes {
                shards.push(&tensors[first..at]);
                (first, bytes) = (at, 0);
            }
            bytes += more;
        }
        shards.push(&tensors[first..]);
        shards
    }
}

fn size_bytes(tensor: &FileTensor, dtype: Dtype) -> u64 {
    tensor.shape.iter().product::<u64>() * dtype.size_bytes()
}

/// Little-endian elements of one type of weights as another, rounded to nearest, ties to even.
pub fn converted(content: Vec<u8>, from: Dtype, to: Dtype) -> Vec<u8> {
    if from == to {
        return content;
    }
    let two = |bytes: &[u8]| [bytes[0], bytes[1]];
    let wide: Vec<f32> = match from {
        Dtype::Bf16 => content.chunks_exact(2).map(|bytes| half::bf16::from_le_bytes(two(bytes)).to_f32()).collect(),
        Dtype::F16 => content.chunks_exact(2).map(|bytes| half::f16::from_le_bytes(two(bytes)).to_f32()).collect(),
        _ => content.chunks_exact(4).map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])).collect(),
    };
    match to {
        Dtype::Bf16 => wide.into_iter().flat_map(|value| half::bf16::from_f32(value).to_le_bytes()).collect(),
        Dtype::F16 => wide.into_iter().flat_map(|value| half::f16::from_f32(value).to_le_bytes()).collect(),
        _ => wide.into_iter().flat_map(f32::to_le_bytes).collect(),
    }
}
