use serde_json::{Map, Value};

use super::turns::{alpaca_prompt, content_text, context, field_names, messages, object, text_field, with_system};
use crate::{ChatContext, Message};

/// A conversation to learn from.
#[derive(Debug, Clone, PartialEq)]
pub struct Conversation {
    /// Name of the row's format.
    pub format: &'static str,
    /// Its turns; at least one is the assistant's and not empty.
    pub messages: Vec<Message>,
    /// What comes with them.
    pub context: ChatContext,
}

/// Reads a row in the format that its fields show:
///
/// | format | fields |
/// |---|---|
/// | `messages` | `messages`: [{role, content, ..}] (OpenAI); content may be a list of text parts |
/// | `sharegpt` | `conversations`: [{from, value}], `system` |
/// | `alpaca` | `instruction`, `input`, `output`, `system`, `history`: [[question, answer]] |
/// | `prompt_completion` | `prompt` and `completion` (or `response`), text or messages |
/// | `question_answer` | `question` and `answer` |
///
/// Beside any of them may stand what templates are given with the turns: `tools`, `documents` and `chat_template_kwargs`.
pub fn conversation(row: &Value) -> Result<Conversation, String> {
    let row = object(row)?;
    let (format, messages) = turns(row)?;
    let answered = messages.iter().any(|message| message.is_assistant() && message.says_something());
    match (messages.is_empty(), answered) {
        (true, _) => Err("the conversation is empty".into()),
        (false, false) => Err("no assistant turn with content".into()),
        (false, true) => Ok(Conversation { format, messages, context: context(row)? }),
    }
}

fn turns(row: &Map<String, Value>) -> Result<(&'static str, Vec<Message>), String> {
    if let Some(list) = row.get("messages") {
        return Ok(("messages", with_system(row, messages(list)?)?));
    }
    if let Some(list) = row.get("conversations").or_else(|| row.get("conversation")) {
        return Ok(("sharegpt", with_system(row, messages(list)?)?));
    }
    if row.contains_key("instruction") {
        let answer = text_field(row, "output")?.or(text_field(row, "response")?).ok_or("no field `output` beside `instruction`")?;
        let mut turns = alpaca_prompt(row)?;
        turns.push(Message::assistant(answer));
        return Ok(("alpaca", turns));
    }
    for (format, question, answers) in
        [("prompt_completion", "prompt", ["completion", "response"].as_slice()), ("question_answer", "question", &["answer"])]
    {
        if let (Some(question), Some(answer)) = (row.get(question), answers.iter().find_map(|name| row.get(*name))) {
            let mut turns = match question {
                Value::Array(_) => messages(question)?,
                text => vec![Message::user(content_text(text)?)],
            };
            match answer {
                Value::Array(_) => turns.extend(messages(answer)?),
                text => turns.push(Message::assistant(content_text(text)?)),
            }
            return Ok((format, with_system(row, turns)?));
        }
    }
    Err(format!(
        "not a known format: expected `messages`, `conversations`, `instruction` and `output`, `prompt` and `completion`, or `question` and `answer`; the row has {}",
        field_names(row)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pairs(row: Value) -> (&'static str, Vec<(String, String)>) {
        let read = conversation(&row).unwrap();
        (read.format, read.messages.into_iter().map(|message| (message.role, message.content)).collect())
    }

    fn turn(role: &str, content: &str) -> (String, String) {
        (role.into(), content.into())
    }

    #[test]
    fn alpaca() {
        let row = json!({"instruction": "Add", "input": "1 2", "output": "3", "system": "Be brief", "history": [["Hi", "Hello"]]});
        let expected = [("system", "Be brief"), ("user", "Hi"), ("assistant", "Hello"), ("user", "Add\n1 2"), ("assistant", "3")];
        assert_eq!(pairs(row), ("alpaca", expected.map(|(role, content)| turn(role, content)).to_vec()));
        let row = json!({"instruction": "说明", "input": "", "output": "好"});
        assert_eq!(pairs(row), ("alpaca", vec![turn("user", "说明"), turn("assistant", "好")]));
        assert!(conversation(&json!({"instruction": "x", "output": ""})).unwrap_err().contains("no assistant turn"));
        assert!(conversation(&json!({"instruction": "x"})).unwrap_err().contains("`output`"));
        assert!(conversation(&json!({"instruction": "", "output": "y"})).unwrap_err().contains("`instruction` is empty"));
        assert!(conversation(&json!({"instruction": "x", "output": "y", "history": [["a"]]})).unwrap_err().contains("`history`"));
    }

    #[test]
    fn openai_messages() {
        let row = json!({"messages": [
            {"role": "developer", "content": "S"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": null, "name": null, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{\"x\": 1}"}}]},
            {"role": "tool", "content": "r", "tool_call_id": "1"},
            {"role": "assistant", "content": "done", "reasoning": "e\u{301}"},
        ], "tools": "[{\"name\": \"f\"}]", "documents": null, "chat_template_kwargs": {"enable_thinking": false}});
        let read = conversation(&row).unwrap();
        let call = json!({"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}});
        assert_eq!(Value::Object(read.messages[2].extra.clone()), json!({"tool_calls": [call]}));
        assert_eq!(
            Value::Object(read.messages[4].extra.clone()),
            json!({"reasoning": "e\u{301}", "reasoning_content": "\u{e9}", "thinking": "\u{e9}"})
        );
        assert_eq!((read.context.tools, read.context.documents), (vec![json!({"name": "f"})], Vec::new()));
        assert_eq!(read.context.variables["enable_thinking"], json!(false));
        let expected = [("system", "S"), ("user", "ab"), ("assistant", ""), ("tool", "r"), ("assistant", "done")];
        assert_eq!(pairs(row), ("messages", expected.map(|(role, content)| turn(role, content)).to_vec()));
        let image = json!({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]});
        assert!(conversation(&image).unwrap_err().contains("`image_url`"));
        assert!(conversation(&json!({"messages": [{"role": "user"}]})).unwrap_err().contains("no `content`"));
        assert!(conversation(&json!({"messages": [{"role": "user", "content": "x"}]})).unwrap_err().contains("no assistant turn"));
        assert!(conversation(&json!({"messages": []})).unwrap_err().contains("empty"));
    }

    #[test]
    fn calls_of_tools() {
        let calling = |assistant: Value| conversation(&json!({"messages": [{"role": "user", "content": "q"}, assistant]}));
        let calls = |assistant: Value| calling(assistant).unwrap().messages[1].extra["tool_calls"].clone();
        let expected = json!([{"type": "function", "function": {"name": "f", "arguments": {}}}]);
        assert_eq!(calls(json!({"role": "assistant", "tool_calls": [{"name": "f", "arguments": ""}]})), expected);
        assert_eq!(calls(json!({"role": "assistant", "content": "", "function_call": {"name": "f"}})), expected);
        assert_eq!(calls(json!({"from": "function_call", "value": "{\"name\": \"f\", \"arguments\": {}}"})), expected);
        let said = calling(json!({"from": "function_call", "value": "not JSON"})).unwrap();
        assert_eq!((said.messages[1].content.as_str(), said.messages[1].extra.len()), ("not JSON", 0));
        for (call, wrong) in [
            (json!([{"function": {"arguments": {}}}]), "no `name`"),
            (json!([{"function": {"name": "f", "arguments": "{"}}]), "`arguments`"),
            (json!([{"function": 3}]), "`function`"),
            (json!({"name": "f"}), "expected an array"),
        ] {
            let reason = calling(json!({"role": "assistant", "tool_calls": call})).unwrap_err();
            assert!(reason.contains(wrong), "{reason}");
        }
        // Empty lists are no calls.
        assert!(calling(json!({"role": "assistant", "content": "", "tool_calls": []})).unwrap_err().contains("no assistant turn"));
        let tool = json!({"messages": [{"role": "tool", "content": {"a": [1]}}, {"role": "assistant", "content": "x"}], "functions": [{"name": "f"}]});
        let read = conversation(&tool).unwrap();
        assert_eq!(read.messages[0].content, "{\"a\": [1]}");
        assert_eq!(read.context.tools, [json!({"type": "function", "function": {"name": "f"}})]);
        let documents = |documents: Value| {
            let row = json!({"prompt": "q", "completion": "a", "documents": documents, "functions": "not of tools"});
            conversation(&row).unwrap().context.documents
        };
        let expected = [json!({"text": "d"})];
        assert_eq!(documents(json!("d")), expected);
        assert_eq!(documents(json!(["d"])), expected);
        assert_eq!(documents(json!([{"text": "d"}])), expected);
        assert_eq!(documents(json!("[{\"text\": \"d\"}]")), expected);
        for (tools, wrong) in [(json!("x"), "not JSON"), (json!({"a": 1}), "an object"), (json!([1]), "a number")] {
            let row = json!({"prompt": "q", "completion": "a", "tools": tools});
            assert!(conversation(&row).unwrap_err().contains(wrong));
        }
    }

    #[test]
    fn sharegpt() {
        let row = json!({"system": "S", "conversations": [
            {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}, {"from": "observation", "value": "o"}, {"from": "gpt", "value": "b"},
        ]});
        let expected = [("system", "S"), ("user", "q"), ("assistant", "a"), ("tool", "o"), ("assistant", "b")];
        assert_eq!(pairs(row), ("sharegpt", expected.map(|(role, content)| turn(role, content)).to_vec()));
        assert!(conversation(&json!({"conversations": [{"from": "dog", "value": "x"}]})).unwrap_err().contains("`dog`"));
    }

    #[test]
    fn prompt_completion_and_question_answer() {
        let expected = vec![turn("user", "q"), turn("assistant", "a")];
        assert_eq!(pairs(json!({"prompt": "q", "completion": "a"})), ("prompt_completion", expected.clone()));
        let row = json!({"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]});
        assert_eq!(pairs(row), ("prompt_completion", expected.clone()));
        assert_eq!(pairs(json!({"question": "q", "answer": "a"})), ("question_answer", expected));
        assert!(conversation(&json!({"text": "x", "id": 3})).unwrap_err().contains("the row has text, id"));
        assert!(conversation(&json!([1])).unwrap_err().contains("an array"));
    }

    #[test]
    fn text_becomes_nfc() {
        let row = json!({"prompt": "e\u{301}", "completion": "A\u{30a}"});
        assert_eq!(pairs(row).1, vec![turn("user", "\u{e9}"), turn("assistant", "\u{c5}")]);
    }
}
