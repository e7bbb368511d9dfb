//! Model artifacts between stages: loading, storing, and the checks that planning and running share.

use std::collections::BTreeMap;

use rlflow_api::{
    Artifact, ArtifactBuilder, ArtifactMeta, ArtifactType, DescribeContext, Description, Needs, Problem, RunContext, StageError,
    StageResult,
};
use rlflow_model::{CheckpointInfo, Group, Head, Layout, LoraSettings, Use, adapter, checkpoint};
use rlflow_text::ChatTokenizer;

use crate::train::{Memory, Precision};

/// A loaded model with where it came from.
pub struct LoadedModel {
    /// The network on its ranks.
    pub model: Group,
    /// What its artifact says.
    pub info: CheckpointInfo,
    /// The artifact, whose tokenizer files later checkpoints share.
    pub artifact: Artifact,
}

/// Loads the model on `port` to where the stage runs, to be trained; with `lora` a fresh adapter is put on it.
pub fn load(
    context: &RunContext<'_>,
    port: &str,
    head: Head,
    precision: Precision,
    lora: Option<&LoraSettings>,
    memory: &Memory,
) -> StageResult<LoadedModel> {
    let layout = memory.layout(context.placement)?;
    load_artifact(&context.input(port)?.artifact, head, context.seed, &layout, precision, Use::Trained(lora))
}

/// Loads a model artifact onto the ranks of `layout`.
pub fn load_artifact(
    artifact: &Artifact,
    head: Head,
    seed: u64,
    layout: &Layout,
    precision: Precision,
    usage: Use<'_>,
) -> StageResult<LoadedModel> {
    let (model, info) = checkpoint::load_on(artifact, head, seed, layout, precision.arithmetic(), usage)?;
    Ok(LoadedModel { model, info, artifact: artifact.clone() })
}

impl LoadedModel {
    /// The model of `artifact` without loading it, if it is the one below this model's adapter: one copy serves both.
    pub fn base_as(&self, artifact: &Artifact) -> Option<Group> {
        (self.model.first().adapter().is_some() && adapter::same_weights(&self.artifact, artifact)).then(|| self.model.without_adapter())
    }
}

/// Publishes `model` with `head` as an artifact of `artifact_type` with the tokenizer files of `source` (a tokenizer or a model). What an
/// adapter was trained on is shared with `source`, from which it was loaded.
pub fn publish(
    context: &RunContext<'_>,
    artifact_type: ArtifactType,
    model: &Group,
    head: Head,
    info: &CheckpointInfo,
    source: &Artifact,
) -> StageResult<Artifact> {
    context.phase("storing the checkpoint");
    let mut builder = context.output(artifact_type);
    match model.first().adapter() {
        Some(lora) => adapter::save(model, lora, head, source, &mut builder, info)?,
        None => checkpoint::save(model, head, &mut builder, info)?,
    }
    share_files(&mut builder, source)?;
    context.publish(builder)
}

/// Publishes a tokenizer.
pub fn publish_tokenizer(context: &RunContext<'_>, tokenizer: &ChatTokenizer) -> StageResult<Artifact> {
    let mut builder = context.output(ArtifactType::Tokenizer);
    tokenizer.store(&mut builder)?;
    builder.metadata(serde_json::json!({ "digest": tokenizer.digest(), "vocab_size": tokenizer.vocab_size() }));
    Ok(builder.publish()?)
}

/// Shares the entries of `source` that are not tensors: the tokenizer's files, and those of an imported
/// checkpoint that say more than rlflow needs. Nothing is copied.
pub fn share_files(builder: &mut ArtifactBuilder, source: &Artifact) -> StageResult<()> {
    for entry in source.manifest().entries.iter().filter(|entry| entry.dtype.is_none()) {
        builder.share(entry)?;
    }
    Ok(())
}

/// The tokenizer that travels with a model.
pub fn tokenizer(model: &Artifact) -> StageResult<ChatTokenizer> {
    ChatTokenizer::load(model)
}

/// Two artifacts that meet in one stage must come from one tokenizer.
pub fn check_same_tokenizer(context: &RunContext<'_>, ports: &[&str]) -> StageResult<()> {
    let mut first: Option<(String, String)> = None;
    for port in ports {
        for input in context.inputs.get(*port).into_iter().flatten() {
            let Some(digest) = input.artifact.manifest().metadata.get("tokenizer").and_then(|digest| digest.as_str()) else { continue };
            match &first {
                None => first = Some((input.stage.clone(), digest.to_owned())),
                Some((stage, known)) if known != digest => {
                    return Err(StageError::invalid_with_hint(
                        format!("`{stage}` and `{}` were made with different tokenizers", input.stage),
                        "their token ids do not mean the same: make both from one tokenizer stage",
                    ));
                }
                Some(_) => {}
            }
        }
    }
    Ok(())
}

/// What planning knows of a model made from the one on `port`.
pub fn describe_from(
    context: &DescribeContext<'_>,
    port: &str,
    output: &str,
    artifact_type: ArtifactType,
    needs: impl FnOnce(&ArtifactMeta) -> Needs,
) -> Result<Description, Vec<Problem>> {
    let Some(input) = context.input(port) else { return Ok(Description::default()) };
    let meta = ArtifactMeta { artifact_type, ..input.meta.clone() };
    let needs = needs(&meta);
    let size_bytes = meta.model.as_ref().map(|model| 4 * model.parameter_count());
    Ok(Description::new(BTreeMap::from([(output.to_owned(), ArtifactMeta { size_bytes, ..meta })]), needs))
}
