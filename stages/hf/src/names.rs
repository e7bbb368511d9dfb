//! The table between tensors in files and weights in rlflow.
//!
//! rlflow names and lays out weights as Llama checkpoints do, whatever the family. Llama, Mistral, Qwen2 and Qwen3 have the same
//! names; GPT-2 has its own, keeps projections transposed (`Conv1D`, `[in, out]`), and those to queries, keys and values in one tensor.
//! Import and export read the same table.

use rlflow_api::Architecture;

/// A weight: what rlflow calls it, and its shape there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WantedTensor {
    /// Name in rlflow.
    pub name: String,
    /// Shape in rlflow.
    pub shape: Vec<u64>,
}

/// A tensor of a file and the weights that it holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileTensor {
    /// Name in files.
    pub name: String,
    /// Shape in files.
    pub shape: Vec<u64>,
    /// Whether a matrix is stored as `[in, out]`.
    pub transposed: bool,
    /// The weights, stacked along their first dimension; or each the whole of it, where they have its shape.
    pub parts: Vec<WantedTensor>,
}

/// One line of a table: ending of the name in files, and of the names in rlflow; whether a matrix is transposed.
struct Line {
    file: &'static str,
    parts: &'static [&'static str],
    transposed: bool,
}

const fn line(file: &'static str, parts: &'static [&'static str]) -> Line {
    Line { file, parts, transposed: false }
}

const fn transposed(file: &'static str, parts: &'static [&'static str]) -> Line {
    Line { file, parts, transposed: true }
}

const GPT2: &[Line] = &[
    line("transformer.wte", &["model.embed_tokens"]),
    line("transformer.wpe", &["model.embed_positions"]),
    line("transformer.ln_f", &["model.norm"]),
    line("lm_head", &["lm_head"]),
    line("score", &["score"]),
];

/// Within `transformer.h.N.` and `model.layers.N.`.
const GPT2_BLOCK: &[Line] = &[
    line("ln_1", &["input_layernorm"]),
    transposed("attn.c_attn", &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    transposed("attn.c_proj", &["self_attn.o_proj"]),
    line("ln_2", &["post_attention_layernorm"]),
    transposed("mlp.c_fc", &["mlp.up_proj"]),
    transposed("mlp.c_proj", &["mlp.down_proj"]),
];

/// Prefix of all names but the heads'; some files leave it out.
pub const fn base_prefix(architecture: Architecture) -> &'static str {
    match architecture {
        Architecture::Gpt2 => "transformer.",
        _ => "model.",
    }
}

/// Whether a tensor in a file is a constant that older versions of transformers saved beside the weights.
pub fn is_buffer(name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq") || name.ends_with(".attn.bias") || name.ends_with(".attn.masked_bias")
}

/// What files call a weight.
pub fn file_name(architecture: Architecture, name: &str) -> String {
    match architecture {
        Architecture::Gpt2 => gpt2_name(name).0,
        _ => name.to_owned(),
    }
}

/// The tensors of a file that hold `wanted`, in its order.
pub fn file_tensors(architecture: Architecture, wanted: &[WantedTensor]) -> Vec<FileTensor> {
    if architecture != Architecture::Gpt2 {
        let same = |tensor: &WantedTensor| FileTensor {
            name: tensor.name.clone(),
            shape: tensor.shape.clone(),
            transposed: false,
            parts: vec![tensor.clone()],
        };
        return wanted.iter().map(same).collect();
    }
    let mut tensors: Vec<FileTensor> = Vec::with_capacity(wanted.len());
    for weight in wanted {
        let (file, transposed) = gpt2_name(&weight.name);
        match tensors.iter_mut().rev().take(8).find(|tensor| tensor.name == file) {
            Some(tensor) => tensor.parts.push(weight.clone()),
            None => tensors.push(FileTensor { name: file, shape: Vec::new(), transposed, parts: vec![weight.clone()] }),
        }
    }
    for tensor in &mut tensors {
        let mut shape = tensor.parts[0].shape.clone();
        if let Some(rows) = shape.first_mut() {
            *rows = tensor.parts.iter().filter_map(|part| part.shape.first()).sum();
        }
        tensor.transposed &= shape.len() == 2;
        if tensor.transposed {
            shape.reverse();
        }
        tensor.shape = shape;
    }
    tensors
}

/// What GPT-2's files call a weight, and whether it is transposed there.
fn gpt2_name(name: &str) -> (String, bool) {
    let (stem, kind) = name.rsplit_once('.').unwrap_or((name, ""));
    let block = stem.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
    let (prefix, stem, table) = match block {
        Some((layer, rest)) => (format!("transformer.h.{layer}."), rest, GPT2_BLOCK),
        None => (String::new(), stem, GPT2),
    };
    match table.iter().find(|line| line.parts.contains(&stem)) {
        Some(line) => (format!("{prefix}{}.{kind}", line.file), line.transposed),
        None => (name.to_owned(), false),
    }
}

impl FileTensor {
    /// Cuts the bytes of the tensor, elements of `element` bytes, into those of its parts, in order.
    pub fn split(&self, content: Vec<u8>, element: usize) -> Vec<Vec<u8>> {
        let content = if self.transposed { transpose(&content, self.shape[0] as usize, self.shape[1] as usize, element) } else { content };
        if self.parts.len() == 1 || self.parts.iter().all(|part| part.shape == self.shape) {
            return vec![content; self.parts.len()];
        }
        let mut rest = content.as_slice();
        self.parts
            .iter()
            .map(|part| {
                let (head, tail) = rest.split_at(part.shape.iter().product::<u64>() as usize * element);
                rest = tail;
                head.to_vec()
            })
            .collect()
    }

    /// The inverse of [`Self::split`].
    pub fn join(&self, mut parts: Vec<Vec<u8>>, element: usize) -> Vec<u8> {
        let content = match parts.len() {
            1 => parts.swap_remove(0),
            _ => parts.concat(),
        };
        if self.transposed { transpose(&content, self.shape[1] as usize, self.shape[0] as usize, element) } else { content }
    }
}

/// `[rows, columns]` as `[columns, rows]`.
fn transpose(content: &[u8], rows: usize, columns: usize, element: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(content.len());
    for column in 0..columns {
        for row in 0..rows {
            out.extend_from_slice(&content[(row * columns + column) * element..][..element]);
        }
    }
    out
}
