use std::io::{IsTerminal, Write};

use clap::Args;
use serde_json::json;

use rlflow_stages::chat::Prompt;
use rlflow_text::Message;

use crate::{
    common::{Common, WorkflowArgs},
    failure::{Failure, Outcome, print_line},
    generate::{SamplingArgs, load_model, stage_failure},
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
            let mut stdout = std::io::stdout();
            let show = |piece: &str| common.json || write!(stdout, "{piece}").and_then(|()| stdout.flush()).is_ok();
            let reply = match model.reply(&Prompt::Messages(&messages), &sampling, self.sampling.seed, turn, show) {
                Ok(reply) => reply,
                // A conversation that has outgrown the context can start again; a single turn that is too long cannot.
                Err(error) if talk => {
                    eprintln!("{error}\nhint: /new starts again");
                    messages.pop();
                    continue;
                }
                Err(error) => return Err(stage_failure(error)),
            };
            if common.json {
                print_line(&json!({ "prompt": text, "text": reply.text, "tokens": reply.tokens, "ended": reply.ended }).to_string());
            } else {
                println!();
            }
            messages.push(Message::assistant(reply.text));
            turn += 1;
        }
    }
}
