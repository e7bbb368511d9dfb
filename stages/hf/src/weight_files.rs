use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use crate::{
    HfError,
    error::listed,
    peft::{ADAPTER_CONFIG, ADAPTER_MODEL},
};

/// One file with all weights.
pub const SINGLE: &str = "model.safetensors";
/// Says which of several files holds which tensor.
pub const INDEX: &str = "model.safetensors.index.json";

/// The files of a directory that hold weights.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WeightFiles {
    /// Names, sorted.
    pub files: Vec<String>,
    /// Tensor to file, where an index says so.
    pub index: Option<BTreeMap<String, String>>,
}

impl WeightFiles {
    /// Finds them among the names of the files in a directory; `read` gives a file's content. `shown` names the directory in messages.
    ///
    /// # Errors
    /// If there are none that can be read, or the index is wrong.
    pub fn find<E: From<HfError>>(names: &[String], shown: &str, read: impl FnOnce(&str) -> Result<Vec<u8>, E>) -> Result<Self, E> {
        let there = |name: &str| names.iter().any(|known| known == name);
        if there(SINGLE) {
            return Ok(Self { files: vec![SINGLE.into()], index: None });
        }
        if there(INDEX) {
            return Ok(Self::indexed(&read(INDEX)?, names)?);
        }
        if there(ADAPTER_MODEL) || there(ADAPTER_CONFIG) {
            return Err(lone_adapter(shown).into());
        }
        let single: Vec<&String> = names.iter().filter(|name| name.ends_with(".safetensors")).collect();
        if let [file] = single[..] {
            return Ok(Self { files: vec![file.clone()], index: None });
        }
        if !single.is_empty() {
            let message = format!(
                "weights are in {} files ({}) and `{INDEX}` is missing",
                single.len(),
                listed(single.iter().map(|name| name.as_str()))
            );
            return Err(HfError::new(shown, message).hint("the index comes with the files: copy or download it too").into());
        }
        let pickles: Vec<&str> = names.iter().map(String::as_str).filter(|name| is_pickle(name)).collect();
        if pickles.is_empty() {
            return Err(HfError::new(shown, format!("there are no weights: neither `{SINGLE}` nor `{INDEX}`")).into());
        }
        let convert = "convert them where you trust them: `AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)` in Python";
        Err(pickled(shown, pickles, convert).into())
    }

    fn indexed(content: &[u8], names: &[String]) -> Result<Self, HfError> {
        #[derive(Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let Index { weight_map } =
            serde_json::from_slice(content).map_err(|error| HfError::new(INDEX, format!("not an index of tensors: {error}")))?;
        let files: BTreeSet<&String> = weight_map.values().collect();
        // Names that are not plain file names are never among those of the directory, so that none leads out of it.
        let missing: Vec<&str> = files.iter().filter(|file| !names.contains(file)).map(|file| file.as_str()).collect();
        if !missing.is_empty() {
            let error = HfError::new(INDEX, format!("it names {}, which the directory does not hold", listed(missing)));
            return Err(error.hint("the checkpoint is incomplete: copy or download the missing files too"));
        }
        if files.is_empty() {
            return Err(HfError::new(INDEX, "it names no tensor"));
        }
        Ok(Self { files: files.into_iter().cloned().collect(), index: Some(weight_map) })
    }
}

/// An adapter where a model was looked for.
pub fn lone_adapter(shown: &str) -> HfError {
    HfError::new(shown, "this is an adapter (LoRA), which needs the model that it was trained on")
        .hint("import that model too, and give this stage `inputs = { model = \"...\" }` (`rlflow import --model STAGE`)")
}

/// Weights that are in pickles only; `convert` says what to do about it.
pub fn pickled<'a>(shown: &str, pickles: impl IntoIterator<Item = &'a str>, convert: &str) -> HfError {
    let message =
        format!("its weights are pickles ({}), which can run any code when they are opened; only safetensors are read", listed(pickles));
    HfError::new(shown, message).hint(convert)
}

/// Whether a file of this name is one that `torch.load` or `pickle.load` opens.
pub fn is_pickle(name: &str) -> bool {
    [".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin.index.json"].iter().any(|ending| name.ends_with(ending))
}
