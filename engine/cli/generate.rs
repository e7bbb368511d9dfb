use std::io::BufRead;

use clap::{ArgGroup, Args};
use serde_json::json;

use rlflow_api::DeviceSpec;
use rlflow_model::Sampling;
use rlflow_stages::chat::{ChatModel, Prompt};
use rlflow_text::Message;

use crate::{
    artifact,
    common::{Common, WorkflowArgs},
    failure::{Failure, Outcome, print_line},
    terminal::write_piece,
};

/// How answers are drawn.
#[derive(Args)]
pub struct SamplingArgs {
    /// Longest answer, in tokens
    #[arg(long, default_value_t = 128)]
    pub max_new_tokens: usize,
    /// Divides the logits; 0 takes the likeliest token
    #[arg(long, default_value_t = 0.7)]
    pub temperature: f64,
    /// Only this many of the likeliest tokens; 0 for all
    #[arg(long, default_value_t = 0)]
    pub top_k: usize,
    /// Only the likeliest tokens that together have this probability
    #[arg(long, default_value_t = 1.0)]
    pub top_p: f64,
    /// Seed of the draws
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// The device: cpu or cuda:N
    #[arg(long, default_value = "cpu")]
    pub device: DeviceSpec,
    /// A system message before the conversation
    #[arg(long)]
    pub system: Option<String>,
}

impl SamplingArgs {
    pub fn sampling(&self) -> Result<Sampling, Failure> {
        let usable =
            self.temperature >= 0.0 && self.temperature.is_finite() && self.top_p > 0.0 && self.top_p <= 1.0 && self.max_new_tokens > 0;
        if !usable {
            let hint = "temperature is at least 0, top-p above 0 and at most 1, max-new-tokens at least 1";
            return Err(Failure::request("out_of_range", "these sampling options cannot be used".to_owned(), hint));
        }
        Ok(Sampling {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            max_new_tokens: self.max_new_tokens,
            stop_ids: Vec::new(),
        })
    }

    pub fn opening(&self) -> Vec<Message> {
        self.system.iter().map(Message::system).collect()
    }
}

/// Loads the policy that `stage` names.
pub fn load_model(workflow: &WorkflowArgs, stage: &str, device: DeviceSpec, common: &Common) -> Result<ChatModel, Failure> {
    let (workflow, store) = workflow.open(common)?;
    let digest = artifact::find(&workflow, &store, stage)?;
    if artifact::is_stale(&workflow, &store, stage)? {
        eprintln!("warning: `{stage}` has not run with these settings and inputs; this is an older result of it");
    }
    let Some(artifact) = store.open_artifact(digest)? else {
        let hint = format!("rlflow run {} {stage} --force {stage}", workflow.path.display());
        return Err(Failure::request("no_artifact", format!("{digest} is not in the store any more"), hint));
    };
    ChatModel::load(&artifact, device).map_err(stage_failure)
}

/// A stage's error as a failure of the request.
pub fn stage_failure(error: rlflow_api::StageError) -> Failure {
    let hint = error.hint().unwrap_or("see `rlflow show`").to_owned();
    Failure::request("cannot_generate", error.to_string(), hint)
}

/// Write text with a checkpoint of a workflow
#[derive(Args)]
#[command(group(ArgGroup::new("prompts").args(["prompt", "stdin"]).required(true)))]
pub struct Generate {
    #[command(flatten)]
    pub workflow: WorkflowArgs,
    /// A stage whose output is a policy, STAGE.PORT, or an artifact's digest
    #[arg(value_name = "STAGE")]
    pub stage: String,
    /// What to answer; repeat for several
    #[arg(short, long)]
    pub prompt: Vec<String>,
    /// Read prompts from standard input, one a line
    #[arg(long)]
    pub stdin: bool,
    /// Continue the text as it is, without the chat template
    #[arg(long)]
    pub raw: bool,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

impl Generate {
    pub fn run(self, common: &Common) -> Result<Outcome, Failure> {
        let sampling = self.sampling.sampling()?;
        let model = load_model(&self.workflow, &self.stage, self.sampling.device, common)?;
        let mut prompts = self.prompt.clone();
        if self.stdin {
            for line in std::io::stdin().lock().lines() {
                let line =
                    line.map_err(|error| Failure::request("bad_input", format!("standard input: {error}"), "prompts are UTF-8 text"))?;
                prompts.push(line);
            }
        }
        for (turn, prompt) in prompts.iter().enumerate() {
            let mut messages = self.sampling.opening();
            messages.push(Message::user(prompt));
            let prompt_for = if self.raw { Prompt::Text(prompt) } else { Prompt::Messages(&messages) };
            // A reader that has gone away ends the answer.
            let show = |piece: &str| common.json || write_piece(piece);
            let reply = model.reply(&prompt_for, &sampling, self.sampling.seed, turn as u64, show).map_err(stage_failure)?;
            if common.json {
                print_line(&json!({ "prompt": prompt, "text": reply.text, "tokens": reply.tokens, "ended": reply.ended }).to_string());
            } else if !write_piece("\n") {
                break;
            }
        }
        Ok(Outcome::Done)
    }
}
