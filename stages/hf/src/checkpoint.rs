use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    io::{self, BufReader, Read},
    path::PathBuf,
};

use rlflow_api::{Architecture, Digest, Dtype, StageError, StageResult, StoreError};
use rlflow_store::Hasher;

use crate::{
    FileTensor, HfError, WantedTensor,
    error::listed,
    names::{base_prefix, is_buffer},
    safetensors::{Header, weight_dtype},
};

const BUFFER_BYTES: usize = 1 << 20;
const LM_HEAD: &str = "lm_head.weight";

/// A file of weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightFile {
    /// Its name in the directory, which the index knows it by.
    pub name: String,
    /// As messages name it.
    pub shown: String,
    /// Where it is.
    pub path: PathBuf,
}

/// The files of a checkpoint, checked against what its config asks for: every tensor is there, with the right shape, and no other.
#[derive(Debug)]
pub struct Checkpoint {
    files: Vec<(WeightFile, Header)>,
    wanted: HashMap<String, FileTensor>,
    embedding: Option<String>,
}

/// A weight as it was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// What it is.
    pub weight: WantedTensor,
    /// Element type, that of the file.
    pub dtype: Dtype,
    /// Little-endian elements, row-major, in rlflow's layout.
    pub content: Vec<u8>,
}

impl Checkpoint {
    /// Reads the headers of `files` and checks them against `tensors`, which `config` (the file's name) asks for. With `tied` embeddings a
    /// file may repeat them as output projection.
    ///
    /// # Errors
    /// One, naming all tensors that are missing, too many, misshapen or of a type that weights cannot have.
    pub fn open(
        files: Vec<WeightFile>,
        index: Option<&BTreeMap<String, String>>,
        architecture: Architecture,
        tensors: Vec<FileTensor>,
        tied: bool,
        config: &str,
        shown: &str,
    ) -> StageResult<Self> {
        let mut found: HashMap<String, (usize, usize)> = HashMap::new();
        let mut headers = Vec::with_capacity(files.len());
        for (at, file) in files.into_iter().enumerate() {
            let (mut input, size_bytes) = open(&file)?;
            let (header, _) = Header::read(&mut input, size_bytes, &file.shown)?;
            for (tensor, info) in header.tensors.iter().enumerate() {
                if let Some((other, _)) = found.insert(info.name.clone(), (at, tensor)) {
                    let other = headers.get(other).map_or(&file, |(other, _): &(WeightFile, Header)| other);
                    return Err(HfError::new(&file.shown, format!("tensor `{}` is here and in {} too", info.name, other.name)).into());
                }
            }
            headers.push((file, header));
        }
        let prefix = base_prefix(architecture);
        let first = tensors.first().map(|tensor| tensor.name.as_str()).unwrap_or_default();
        let embedding_name = first.to_owned();
        // Saved from the trunk's class, names lack its prefix.
        let bare = !found.contains_key(first) && first.strip_prefix(prefix).is_some_and(|name| found.contains_key(name));
        let name_in_file = |name: &str| if bare { name.strip_prefix(prefix).unwrap_or(name).to_owned() } else { name.to_owned() };

        let (mut missing, mut wrong) = (Vec::new(), Vec::new());
        let mut wanted = HashMap::with_capacity(tensors.len());
        for tensor in tensors {
            let name = name_in_file(&tensor.name);
            match found.remove(&name) {
                None => missing.push(name),
                Some((file, at)) => {
                    let info = &headers[file].1.tensors[at];
                    if info.shape != tensor.shape {
                        wrong.push(format!("tensor `{name}` has shape {:?}, and {:?} is expected", info.shape, tensor.shape));
                    }
                    if weight_dtype(&info.dtype).is_none() {
                        wrong.push(format!("tensor `{name}` has elements of type {}; F32, BF16 and F16 are read", info.dtype));
                    }
                    let there = &headers[file].0.name;
                    if let Some(said) = index.map(|index| index.get(&name)).filter(|said| *said != Some(there)) {
                        let said = said.map_or_else(|| "not in the index".into(), |said| format!("in {said} by the index"));
                        wrong.push(format!("tensor `{name}` is in {there}, and {said}"));
                    }
                    wanted.insert(name, tensor);
                }
            }
        }
        let repeated = tied && found.remove(LM_HEAD).is_some();
        let mut extra: Vec<&str> = found.keys().map(String::as_str).filter(|name| !is_buffer(name)).collect();
        extra.sort_unstable();
        let mut problems = Vec::new();
        if !missing.is_empty() {
            problems.push(format!("missing: {}", listed(missing.iter().map(String::as_str))));
        }
        if !extra.is_empty() {
            problems.push(format!("not part of such a model: {}", listed(extra)));
        }
        if !wrong.is_empty() {
            let more = wrong.len().saturating_sub(8);
            wrong.truncate(8);
            problems.extend(wrong);
            problems.extend((more > 0).then(|| format!("and {more} more")));
        }
        if !problems.is_empty() {
            let error = HfError::new(shown, format!("its tensors are not those that {config} describes; {}", problems.join("; ")));
            return Err(error.hint(format!("{config} and the weights must come from one checkpoint")).into());
        }
        let embedding = repeated.then(|| name_in_file(&embedding_name));
        Ok(Self { files: headers, wanted, embedding })
    }

    /// Element types and bytes of the weights, most bytes first.
    pub fn dtypes(&self) -> Vec<(String, u64)> {
        let mut bytes = BTreeMap::new();
        for info in self.files.iter().flat_map(|(_, header)| &header.tensors) {
            *bytes.entry(info.dtype.clone()).or_default() += info.size_bytes;
        }
        let mut dtypes: Vec<(String, u64)> = bytes.into_iter().collect();
        dtypes.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
        dtypes
    }

    /// Reads every weight, one tensor at a time in the order of the files' bytes, and makes sure that the files are those
    /// of the given digests, one each in the order in which they were opened: what was hashed when planning.
    ///
    /// # Errors
    /// What `each` returns; if a file changed, or repeats tied embeddings wrongly.
    pub fn read(self, digests: &[Digest], mut each: impl FnMut(Piece) -> StageResult<()>) -> StageResult<()> {
        let mut tied: [Option<Digest>; 2] = [None, None];
        for ((file, header), digest) in self.files.iter().zip(digests) {
            let changed = || StageError::from(StoreError::ChangedWhileRead { path: file.path.clone() });
            let unreadable = |error: io::Error| match error.kind() {
                io::ErrorKind::UnexpectedEof => changed(),
                _ => StageError::Io { operation: format!("read {}", file.shown), source: error },
            };
            let (mut input, _) = open(file)?;
            let mut hasher = Hasher::new();
            let mut before = vec![0; header.size_bytes as usize];
            input.read_exact(&mut before).map_err(unreadable)?;
            hasher.update(&before);
            drop(before);
            for info in &header.tensors {
                let mut content = vec![0; info.size_bytes as usize];
                input.read_exact(&mut content).map_err(unreadable)?;
                hasher.update(&content);
                if let Some(embedding) = &self.embedding {
                    let side = [embedding.as_str(), LM_HEAD].iter().position(|name| *name == info.name);
                    side.into_iter().for_each(|side| tied[side] = Some(Digest::of(&content)));
                }
                let (Some(tensor), Some(dtype)) = (self.wanted.get(&info.name), weight_dtype(&info.dtype)) else { continue };
                let parts = tensor.split(content, dtype.size_bytes() as usize);
                for (weight, content) in tensor.parts.iter().zip(parts) {
                    each(Piece { weight: weight.clone(), dtype, content })?;
                }
            }
            if input.read(&mut [0]).map_err(unreadable)? != 0 || hasher.finish() != *digest {
                return Err(changed());
            }
        }
        if tied[0] != tied[1] {
            let message = format!("`tie_word_embeddings` is true, but `{LM_HEAD}` in the weights is not the embedding");
            return Err(HfError::new(crate::config::CONFIG, message).hint("set it to false, or remove that tensor").into());
        }
        Ok(())
    }
}

fn open(file: &WeightFile) -> StageResult<(BufReader<File>, u64)> {
    let failed = |source: io::Error| StageError::Io { operation: format!("read {}", file.shown), source };
    let input = File::open(&file.path).map_err(failed)?;
    let size_bytes = input.metadata().map_err(failed)?.len();
    Ok((BufReader::with_capacity(BUFFER_BYTES, input), size_bytes))
}
