use std::io::IsTerminal;

use clap::Args;
use serde_json::json;

use rlflow_api::StageResult;
use rlflow_stages::chat::{ChatModel, Prompt};
use rlflow_text::Message;

use crate::{
    common::{Common, WorkflowArgs},
    failure::{Failure, Outcome, print_line},
    generate::{SamplingArgs, load_model, stage_failure},
    terminal::{visible, write_piece},
};

/// Talk with a checkpoint of a workflow
#[derive(Args)]
pub struct Chat {
    #[command(flatten)]
    pub workflow: WorkflowArgs,
    /// A stage whose output is a policy, STAGE.PORT, or an artifact's digest
    #[arg(value_name = "STAGE")]
    pub stage: String,
    #[command(flatten)]
    pub sampling: SamplingArgs,
}

impl Chat {
    pub fn run(self, common: &Common) -> Result<Outcome, Failure> {
        let sampling = self.sampling.sampling()?;
        let model = load_model(&self.workflow, &self.stage, self.sampling.device, common)?;
        let talk = std::io::stdin().is_terminal() && !common.quiet;
        if talk {
            eprintln!("{}: one line is one turn; /new forgets the conversation, an empty line or Ctrl-D ends it", self.stage);
        }
        let mut messages = self.sampling.opening();
        let mut turn = 0;
        loop {
            if talk {
                eprint!("> ");
            }
            let mut line = String::new();
            let read = std::io::stdin().read_line(&mut line);
            let read = read.map_err(|error| Failure::request("bad_input", format!("standard input: {error}"), "turns are UTF-8 text"))?;
            let text = line.trim();
            if read == 0 || text.is_empty() {
                return Ok(Outcome::Done);
            }
            if text == "/new" {
                messages = self.sampling.opening();
                continue;
            }
            messages.push(Message::user(text));
            let forgotten = self.forget(&model, &mut messages).map_err(stage_failure)?;
            if forgotten > 0 && !common.quiet {
                eprintln!(
                    "the conversation has outgrown the context of {}: {forgotten} of its oldest turns are forgotten",
                    model.context()
                );
            }
            let show = |piece: &str| common.json || write_piece(piece);
            let reply = match model.reply(&Prompt::Messages(&messages), &sampling, self.sampling.seed, turn, show) {
                Ok(reply) => reply,
                // Who types can say it in fewer words.
                Err(error) if talk => {
                    eprintln!("{}", visible(&error.to_string()));
                    messages.pop();
                    continue;
                }
                Err(error) => return Err(stage_failure(error)),
            };
            if common.json {
                print_line(&json!({ "prompt": text, "text": reply.text, "tokens": reply.tokens, "ended": reply.ended }).to_string());
            } else {
                write_piece("\n");
            }
            messages.push(Message::assistant(reply.text));
            turn += 1;
        }
    }

    /// Drops the oldest turns until the conversation leaves room for an answer; the opening and the last turn stay.
    /// Returns how many were dropped.
    fn forget(&self, model: &ChatModel, messages: &mut Vec<Message>) -> StageResult<usize> {
        let (opening, context) = (self.sampling.opening().len(), model.context());
        // A short answer is better than one more old turn; a long one is not worth all of them.
        let room = self.sampling.max_new_tokens.min(context / 4).max(1);
        let before = messages.len();
        while messages.len() > opening + 2 && model.prompt_tokens(&Prompt::Messages(messages))? + room > context {
            messages.drain(opening..opening + 2);
        }
        Ok(before - messages.len())
    }
}
