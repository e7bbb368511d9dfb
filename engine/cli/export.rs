use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde_json::json;

use rlflow_api::StageError;
use rlflow_engine::text::bytes;
use rlflow_stages::export::{ExportOptions, export};
use rlflow_store::Dtype;

use crate::{
    artifact,
    common::{Common, WorkflowArgs},
    failure::{Failure, Outcome, other, print_line, print_text},
    store::parse_size,
    terminal::visible,
};

/// Element types of exported weights.
#[derive(Clone, Copy, ValueEnum)]
enum ExportDtype {
    Fp32,
    Bf16,
    Fp16,
}

impl From<ExportDtype> for Dtype {
    fn from(dtype: ExportDtype) -> Self {
        match dtype {
            ExportDtype::Fp32 => Self::F32,
            ExportDtype::Bf16 => Self::Bf16,
            ExportDtype::Fp16 => Self::F16,
        }
    }
}

/// Write a model as a Hugging Face checkpoint directory
#[derive(Args)]
pub struct Export {
    #[command(flatten)]
    pub workflow: WorkflowArgs,
    /// A stage whose output is a policy, a reward model or a critic, STAGE.PORT, or an artifact's digest
    #[arg(value_name = "STAGE")]
    pub stage: String,
    /// A new directory
    #[arg(value_name = "DIR")]
    pub folder: PathBuf,
    /// Element type of the weights [default: as stored, which is fp32 after training]
    #[arg(long)]
    dtype: Option<ExportDtype>,
    /// Most bytes of weights in one file: 500MB, 5GB
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = parse_size)]
    pub max_shard_size: u64,
    /// Only the adapter that was trained (`lora`), in PEFT's format; without this it is merged into the weights
    #[arg(long, conflicts_with = "dtype")]
    pub adapter: bool,
}

impl Export {
    pub fn run(self, common: &Common) -> Result<Outcome, Failure> {
        let (workflow, store) = self.workflow.look(common)?;
        let digest = artifact::find(&workflow, &store, &self.stage)?;
        if artifact::is_stale(&workflow, &store, &self.stage)? {
            eprintln!("warning: `{}` has not run with these settings and inputs; this is an older result of it", visible(&self.stage));
        }
        let Some(model) = store.open_artifact(digest)? else {
            let hint = format!("rlflow run {} {}", workflow.path.display(), self.stage);
            return Err(Failure::request("no_artifact", format!("{digest} is not in the store any more"), hint));
        };
        let options = ExportOptions { dtype: self.dtype.map(Into::into), max_shard_bytes: self.max_shard_size, adapter: self.adapter };
        let exported = export(&model, &self.folder, &options).map_err(|error| match error {
            StageError::Invalid { .. } | StageError::Data { .. } => {
                Failure::Request { code: "cannot_export", message: error.to_string(), hint: error.hint().map(str::to_owned) }
            }
            error => other(error),
        })?;
        if !common.quiet {
            exported.notes.iter().for_each(|note| eprintln!("note: {}", visible(note)));
        }
        if common.json {
            let object = json!({
                "artifact": digest,
                "directory": self.folder,
                "files": exported.files,
                "size_bytes": exported.size_bytes,
                "notes": exported.notes,
            });
            print_line(&object.to_string());
        } else {
            let weights = bytes(exported.size_bytes);
            print_text(&format!("{}: {weights} of weights; {}\n", self.folder.display(), exported.files.join(", ")));
        }
        Ok(Outcome::Done)
    }
}
