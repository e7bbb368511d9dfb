use std::{
    fs, io,
    path::{Path, PathBuf},
};

use clap::Args;

use rlflow_engine::workflow::Workflow;

use crate::{
    common::{Common, WorkflowArgs},
    failure::{Failure, Outcome, other},
    run::Run,
};

/// Take a Hugging Face checkpoint directory, or an adapter of PEFT, into a workflow
///
/// Adds a stage of kind `import` to the workflow file, which is made if there is none, and runs it.
#[derive(Args)]
pub struct Import {
    /// The workflow file
    #[arg(value_name = "WORKFLOW")]
    pub workflow: PathBuf,
    /// Name of the stage
    #[arg(value_name = "STAGE")]
    pub stage: String,
    /// The checkpoint: a directory with config.json, model.safetensors and tokenizer.json; or with adapter_config.json and
    /// adapter_model.safetensors
    #[arg(value_name = "DIR")]
    pub folder: PathBuf,
    /// Longest sequence, in tokens [default: the checkpoint's]
    #[arg(long)]
    pub context: Option<u64>,
    /// For an adapter: the stage with the model that it was trained on
    #[arg(long, value_name = "STAGE", conflicts_with = "context")]
    pub model: Option<String>,
}

impl Import {
    pub fn run(self, common: &Common) -> Result<Outcome, Failure> {
        let named = |character: char| character.is_ascii_alphanumeric() || "_-".contains(character);
        if self.stage.is_empty() || !self.stage.chars().all(named) {
            let message = format!("`{}` cannot be the name of a stage", self.stage);
            return Err(Failure::request("bad_stage_name", message, "names are made of letters, digits, `_` and `-`"));
        }
        let before = match fs::read_to_string(&self.workflow) {
            Ok(text) => Some(text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                let message = format!("{} cannot be read: {error}", self.workflow.display());
                return Err(Failure::request("unreadable_file", message, "name a workflow file"));
            }
        };
        let arguments = || WorkflowArgs { workflow: self.workflow.clone(), sets: Vec::new() };
        let path = self.path()?;
        let known = match before.as_deref().map(str::trim) {
            None | Some("") => None,
            Some(_) => Some(arguments().load()?).filter(|workflow| workflow.find(&self.stage).is_some()),
        };
        match known {
            Some(workflow) => self.check_same(&workflow, &path)?,
            None => self.add(before.as_deref(), &path, &arguments)?,
        }
        let stages = vec![self.stage.clone()];
        Run { workflow: arguments(), stages, jobs: 1, force: Vec::new(), keep_going: false, no_cache: false }.run(common)
    }

    /// The directory as the workflow file names it: relative where it stands beside or below that.
    fn path(&self) -> Result<String, Failure> {
        let missing = |error: io::Error| {
            let message = format!("{}: {error}", self.folder.display());
            Failure::request("missing_file", message, "name a checkpoint directory")
        };
        let folder = self.folder.canonicalize().map_err(missing)?;
        let beside = self.workflow.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let path = beside.canonicalize().ok().and_then(|beside| folder.strip_prefix(beside).ok().map(Path::to_owned)).unwrap_or(folder);
        path.to_str().map(str::to_owned).ok_or_else(|| Failure::request("bad_path", "the directory's name is not UTF-8", "rename it"))
    }

    fn check_same(&self, workflow: &Workflow, path: &str) -> Result<(), Failure> {
        let found = workflow.find(&self.stage).map(|index| &workflow.stages[index]);
        let same = found.is_some_and(|stage| {
            let below = match (&self.model, stage.inputs.get("model").and_then(|edges| edges.first())) {
                (Some(asked), Some(edge)) => {
                    let name = &workflow.stages[edge.stage].name;
                    asked == name || *asked == format!("{name}.{}", edge.port)
                }
                (asked, found) => asked.is_none() && found.is_none(),
            };
            below
                && stage.kind.name() == "import"
                && stage.file_patterns.first().is_some_and(|source| source.pattern.trim_end_matches('/') == path)
        });
        if same {
            return Ok(());
        }
        let message = format!("{} has another stage `{}` already", workflow.path.display(), self.stage);
        Err(Failure::request("stage_exists", message, "give this one another name"))
    }

    /// Adds the stage to the file; if the file is then wrong, it is as it was before.
    fn add(&self, before: Option<&str>, path: &str, arguments: &dyn Fn() -> WorkflowArgs) -> Result<(), Failure> {
        let mut text = before.unwrap_or_default().to_owned();
        if !text.is_empty() {
            text.push_str(if text.ends_with('\n') { "\n" } else { "\n\n" });
        }
        // A JSON string is a TOML string.
        text.push_str(&format!("[stage.{}]\nkind = \"import\"\npath = {}\n", self.stage, serde_json::Value::from(path)));
        if let Some(model) = &self.model {
            text.push_str(&format!("inputs = {{ model = {} }}\n", serde_json::Value::from(model.as_str())));
        }
        if let Some(context) = self.context {
            text.push_str(&format!("context = {context}\n"));
        }
        let failed = |error: io::Error| other(anyhow::Error::new(error).context(format!("write {}", self.workflow.display())));
        fs::write(&self.workflow, &text).map_err(failed)?;
        let Err(failure) = arguments().load() else { return Ok(()) };
        match before {
            Some(before) => fs::write(&self.workflow, before).map_err(failed)?,
            None => fs::remove_file(&self.workflow).map_err(failed)?,
        }
        Err(failure)
    }
}
