//! Chat templates against transformers: text, ids and masks of 200 conversations through the templates of ChatML, Llama 3, Qwen 2.5,
//! Qwen 3, Mistral and Zephyr, and the texts of thirty through all others that TRL ships (`tests/fixtures/make/chat_templates.py`).

use std::{collections::BTreeMap, fs, io::Read, sync::OnceLock};

use flate2::read::GzDecoder;
use rayon::prelude::*;
use rlflow_text::{Chat, ChatTemplate, ChatTokenizer, ConversationRow, Message, TextError, rows};
use serde::Deserialize;
use serde_json::{Value, json};

const FIXTURES: &str = "../../tests/fixtures";

#[derive(Deserialize)]
struct Settings {
    bos_token: String,
    pad_token: String,
    eos_token: BTreeMap<String, String>,
    dialect_messages: Vec<Message>,
    /// Sources and what jinja2 makes of them.
    dialect: Vec<(String, String)>,
}

/// One conversation with what every template makes of it.
#[derive(Deserialize)]
struct Recorded {
    #[serde(flatten)]
    row: Value,
    cases: BTreeMap<String, Case>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Case {
    Refused {
        /// What the template raised; empty where it failed otherwise.
        error: String,
    },
    Tokens {
        ids: Vec<u32>,
        prompt: Prompt,
        /// Tokens that the assistant wrote. None where rendering turn after turn does not tell.
        ranges: Option<Vec<(usize, usize)>>,
    },
    Text {
        text: String,
        prompt: String,
    },
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Prompt {
    /// The first so many ids of the conversation.
    Prefix(usize),
    Ids(Vec<u32>),
}

struct Fixture {
    settings: Settings,
    templates: BTreeMap<String, String>,
    conversations: Vec<Recorded>,
    tokenizer_json: Vec<u8>,
}

fn fixture() -> &'static Fixture {
    static ONCE: OnceLock<Fixture> = OnceLock::new();
    ONCE.get_or_init(|| {
        let read = |name: &str| fs::read(format!("{FIXTURES}/{name}")).unwrap();
        let mut cases = String::new();
        GzDecoder::new(read("chat_templates_cases.jsonl.gz").as_slice()).read_to_string(&mut cases).unwrap();
        let mut lines = cases.lines();
        Fixture {
            settings: serde_json::from_slice(&read("chat_templates.json")).unwrap(),
            templates: serde_json::from_str(lines.next().unwrap()).unwrap(),
            conversations: lines.map(|line| serde_json::from_str(line).unwrap()).collect(),
            tokenizer_json: read("chat_templates_tokenizer.json"),
        }
    })
}

impl Fixture {
    fn tokenizer(&self, template: &str) -> ChatTokenizer {
        let config = json!({
            "bos_token": self.settings.bos_token, "pad_token": self.settings.pad_token, "eos_token": self.settings.eos_token[template],
            "chat_template": self.templates[template],
        });
        ChatTokenizer::from_json(&self.tokenizer_json, config.to_string().as_bytes()).unwrap()
    }
}

fn ranges(mask: &[bool]) -> Vec<(usize, usize)> {
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    for at in (0..mask.len()).filter(|at| mask[*at]) {
        match ranges.last_mut().filter(|range| range.1 == at) {
            Some(range) => range.1 += 1,
            None => ranges.push((at, at + 1)),
        }
    }
    ranges
}

/// What a template makes of a conversation here, compared with the recorded case; the first difference in words.
fn compare(tokenizer: &ChatTokenizer, chat: Chat<'_>, case: &Case) -> Result<(), String> {
    let end = chat.messages.len() - usize::from(chat.messages.last().is_some_and(Message::is_assistant));
    let prompt_chat = chat.with_messages(&chat.messages[..end]);
    let (rendered, prompt_rendered) = (tokenizer.render(chat, false), tokenizer.render(prompt_chat, true));
    let same = |what: &str, found: &dyn std::fmt::Debug, expected: &dyn std::fmt::Debug| {
        let (found, expected) = (format!("{found:?}"), format!("{expected:?}"));
        if found == expected { Ok(()) } else { Err(format!("{what}:\n  here {found}\n  there {expected}")) }
    };
    match case {
        Case::Refused { error } if error.is_empty() => Ok(()),
        Case::Refused { error } => match rendered.and(prompt_rendered) {
            Err(found) if found.to_string().contains(error) => Ok(()),
            other => Err(format!("{other:?} where transformers raises {error}")),
        },
        Case::Text { text, prompt } => {
            same("text", &rendered, &Ok::<_, TextError>(text.clone()))?;
            same("prompt", &prompt_rendered, &Ok::<_, TextError>(prompt.clone()))
        }
        Case::Tokens { ids, prompt, ranges: expected } => {
            same("text", &rendered, &Ok::<_, TextError>(tokenizer.decode_all(ids)))?;
            let prompt = match prompt {
                Prompt::Prefix(length) => &ids[..*length],
                Prompt::Ids(ids) => ids,
            };
            let prompt_ids = tokenizer.encode_prompt(prompt_chat).map_err(|error| error.to_string())?;
            same("prompt", &prompt_ids, &prompt)?;
            match (tokenizer.encode_conversation(chat), expected) {
                (Ok(row), Some(expected)) => {
                    // A row ends with its last counted token.
                    let end = expected.last().map_or(0, |range| range.1);
                    same("ids", &row.ids, &&ids[..end])?;
                    same("mask", &ranges(&row.mask), expected)
                }
                (Err(TextError::Mask { .. }), None) => Ok(()),
                (Err(TextError::NoAssistantTurn), Some(none)) if none.is_empty() => Ok(()),
                (other, expected) => Err(format!("mask: {other:?}, expected {expected:?}")),
            }
        }
    }
}

/// The row as a data file holds it.
fn chat_of(row: &Value) -> (Vec<Message>, rlflow_text::ChatContext) {
    let mut row = row.clone();
    // Rows must have an answer; prompts are conversations too here.
    let messages = row["messages"].as_array_mut().unwrap();
    let open = messages.last().unwrap()["role"] != "assistant";
    messages.push(json!({"role": "assistant", "content": "x"}));
    let mut read = rows::conversation(&row).unwrap();
    read.messages.pop();
    assert_eq!(open, !read.messages.last().unwrap().is_assistant());
    (read.messages, read.context)
}

#[test]
fn templates_render_and_mask_as_in_transformers() {
    let fixture = fixture();
    assert_eq!(fixture.conversations.len(), 200);
    let wrong: Vec<String> = fixture
        .templates
        .par_iter()
        .flat_map_iter(|(name, _)| {
            let tokenizer = fixture.tokenizer(name);
            let each = move |(at, recorded): (usize, &Recorded)| {
                let (messages, context) = chat_of(&recorded.row);
                let found = compare(&tokenizer, Chat::new(&messages, &context), recorded.cases.get(name)?);
                found.err().map(|what| format!("{name}, conversation {at}: {what}"))
            };
            fixture.conversations.iter().enumerate().filter_map(each)
        })
        .collect();
    assert!(wrong.is_empty(), "{} differ\n{}", wrong.len(), wrong.iter().take(12).map(String::as_str).collect::<Vec<_>>().join("\n"));
}

/// What an environment of transformers' offers, and how Python prints.
#[test]
fn dialect_of_hugging_face() {
    let settings = &fixture().settings;
    let mut wrong = Vec::new();
    for (source, expected) in &settings.dialect {
        let template = ChatTemplate::new(source, vec![("bos_token".into(), "<s>".into())]).map_err(|error| error.to_string());
        let found = template.and_then(|template| template.render(&settings.dialect_messages, true).map_err(|error| error.to_string()));
        if found.as_ref().map(|rendered| &rendered.text) != Ok(expected) {
            let found = found.map(|rendered| rendered.text);
            wrong.push(format!("{source}\n  here  {found:?}\n  there {expected:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Rows that say the same in other words give the same tokens.
#[test]
fn calls_of_tools_may_be_written_in_several_ways() {
    let fixture = fixture();
    let (tools, qwen) = (&fixture.conversations[1].row["tools"], fixture.tokenizer("qwen2_5_training"));
    let encode = |row: Value| -> ConversationRow {
        let read = rows::conversation(&row).unwrap();
        qwen.encode_conversation(Chat::new(&read.messages, &read.context)).unwrap()
    };
    let call = |arguments: Value| json!({"name": "add", "arguments": arguments});
    let row = |call: Value, tools: Value| {
        json!({"tools": tools, "messages": [
            {"role": "user", "content": "1 + 2?"}, call,
            {"role": "tool", "content": "3"}, {"role": "assistant", "content": "3"},
        ]})
    };
    let object = json!({"a": 1, "b": [2.0]});
    let text = json!("{\"a\":1,\"b\":[2.0]}");
    let expected =
        encode(row(json!({"role": "assistant", "content": "", "tool_calls": [{"function": call(object.clone())}]}), tools.clone()));
    for other in [
        row(
            json!({"role": "assistant", "content": null, "tool_calls": [{"id": "1", "type": "function", "function": call(text.clone())}]}),
            tools.clone(),
        ),
        row(json!({"role": "assistant", "function_call": call(text.clone())}), json!(tools.to_string())),
        row(
            json!({"role": "assistant", "tool_calls": [call(object.clone())]}),
            json!(tools.as_array().unwrap().iter().map(Value::to_string).collect::<Vec<_>>()),
        ),
        row(json!({"from": "function_call", "value": call(object).to_string()}), tools.clone()),
    ] {
        assert_eq!(encode(other), expected);
    }
    let counted: Vec<u32> = expected.ids.iter().zip(&expected.mask).filter(|(_, counts)| **counts).map(|(id, _)| *id).collect();
    let counted = qwen.decode_all(&counted);
    assert_eq!(
        counted,
        "\n<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1, \"b\": [2.0]}}\n</tool_call><|im_end|>\n\n3<|im_end|>\n"
    );
}
