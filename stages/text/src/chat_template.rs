use std::{ops::Range, sync::Arc};

use minijinja::{Environment, Value, context};
use serde_json::json;

use crate::{Chat, Message, TextError, dialect, tokenizer_config::TOKEN_KEYS};

/// Begins a `{% generation %}` block in rendered text.
const OPEN: char = '\u{FDD0}';
/// Ends one.
const CLOSE: char = '\u{FDD1}';
/// Put into a special token's name where a message quotes it, so that the quote is not taken for the token.
pub(crate) const BREAK: char = '\u{FDD2}';

/// Whether a character is one of those that mark places in rendered text, which no conversation may hold.
pub(crate) fn is_reserved(character: char) -> bool {
    matches!(character, '\u{FDD0}'..='\u{FDEF}')
}

/// ChatML (as in OpenAI's chat markup and Qwen), with the assistant's part marked for training.
pub const CHATML: &str = concat!(
    "{%- for message in messages %}",
    "{{- '<|im_start|>' + message.role + '\\n' }}",
    "{%- if message.role == 'assistant' %}",
    "{% generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}",
    "{%- else %}",
    "{{- message.content + '<|im_end|>' }}",
    "{%- endif %}",
    "{{- '\\n' }}",
    "{%- endfor %}",
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}",
);

/// A chat template in Hugging Face's dialect of Jinja.
#[derive(Clone)]
pub struct ChatTemplate {
    source: Arc<str>,
    environment: Arc<Environment<'static>>,
    marked: bool,
    special_tokens: Vec<(String, String)>,
}

/// A rendered conversation with the byte ranges that the assistant wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// The text.
    pub text: String,
    /// Byte ranges of `{% generation %}` blocks, in order.
    pub spans: Vec<Range<usize>>,
}

impl ChatTemplate {
    /// Parses `source`. `special_tokens` are the variables that templates may use: `("bos_token", "<s>")`.
    pub fn new(source: &str, special_tokens: Vec<(String, String)>) -> Result<Self, TextError> {
        let (replaced, marked) = replace_generation_tags(source);
        let mut environment = dialect::environment();
        let add = |environment: &mut Environment<'static>, name: &'static str, content: String| {
            environment.add_template_owned(name, content).map_err(|error| template_error(&error, source))
        };
        add(&mut environment, "generation_open", OPEN.to_string())?;
        add(&mut environment, "generation_close", CLOSE.to_string())?;
        add(&mut environment, "chat", replaced)?;
        Ok(Self { source: source.into(), environment: Arc::new(environment), marked, special_tokens })
    }

    /// Finds out whether `source` can be rendered at all, before there is a tokenizer: an error if it does not parse, or refuses every one of
    /// a few plain conversations.
    pub fn check(source: &str) -> Result<(), TextError> {
        let special_tokens = TOKEN_KEYS.iter().map(|key| ((*key).to_owned(), format!("<{key}>"))).collect();
        let template = Self::new(source, special_tokens)?;
        let (system, user, assistant) = (Message::system("Be brief."), Message::user("Hello"), Message::assistant("Hi!"));
        let mut refusal = None;
        for messages in
            [vec![user.clone()], vec![user.clone(), assistant.clone()], vec![system.clone(), user.clone()], vec![system, user, assistant]]
        {
            match template.render(&messages, !messages.last().is_some_and(Message::is_assistant)) {
                Ok(_) => return Ok(()),
                Err(error) => drop(refusal.get_or_insert(error)),
            }
        }
        refusal.map_or(Ok(()), Err)
    }

    /// Whether the template says itself, with `{% generation %}` blocks, what the assistant writes.
    pub fn is_marked(&self) -> bool {
        self.marked
    }

    /// Renders a conversation; `add_generation_prompt` ends the text where the assistant begins to speak.
    pub fn render<'a>(&self, chat: impl Into<Chat<'a>>, add_generation_prompt: bool) -> Result<Rendered, TextError> {
        let Chat { messages, context } = chat.into();
        // Tokens' names may be broken already, so only what marks generation blocks is looked for.
        let marks = [OPEN, CLOSE];
        if let Some(mark) = messages.iter().find_map(|message| message.content.chars().find(|found| marks.contains(found))) {
            return Err(TextError::Reserved { code: mark as u32 });
        }
        let mut variables = serde_json::Map::new();
        for (name, token) in &self.special_tokens {
            variables.insert(name.clone(), json!(token));
        }
        variables.extend(context.iter().flat_map(|context| context.variables.clone()));
        let list = |list: Option<&Vec<serde_json::Value>>| match list {
            Some(list) if !list.is_empty() => Value::from_serialize(list),
            _ => Value::from(()),
        };
        let (tools, documents) = (list(context.map(|context| &context.tools)), list(context.map(|context| &context.documents)));
        let (messages, variables) = (Value::from_serialize(messages), Value::from_serialize(&variables));
        let variables = context! { messages, add_generation_prompt, tools, documents, ..variables };
        let template = self.environment.get_template("chat").map_err(|error| template_error(&error, &self.source))?;
        let text = template.render(variables).map_err(|error| template_error(&error, &self.source))?;
        take_spans(text)
    }
}

/// The innermost cause comes first: what a template raises is for people. Then the line of `source`, with its text.
fn template_error(error: &minijinja::Error, source: &str) -> TextError {
    let what = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    let place = error.line().map(|number| match source.lines().nth(number.saturating_sub(1)).map(str::trim) {
        None | Some("") => format!(" (line {number} of the template)"),
        Some(line) => {
            let excerpt: String = line.chars().take(80).collect();
            let dots = if excerpt.len() < line.len() { "..." } else { "" };
            format!(" (line {number} of the template: `{excerpt}{dots}`)")
        }
    });
    TextError::Template { message: format!("{what}{}", place.unwrap_or_default()) }
}

/// Turns `{% generation %}` into an include, which is a block tag too, so that white space around it is trimmed alike.
fn replace_generation_tags(source: &str) -> (String, bool) {
    let mut replaced = String::with_capacity(source.len());
    let mut marked = false;
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(end) = rest[start..].find("%}").map(|end| start + end) else { break };
        let inner = &rest[start + 2..end];
        let left = if inner.starts_with(['-', '+']) { &inner[..1] } else { "" };
        let right = if inner.len() > left.len() && inner.ends_with(['-', '+']) { &inner[inner.len() - 1..] } else { "" };
        let include = match inner[left.len()..inner.len() - right.len()].trim() {
            "generation" => Some("generation_open"),
            "endgeneration" => Some("generation_close"),
            _ => None,
        };
        replaced.push_str(&rest[..start]);
        match include {
            Some(name) => {
                marked = true;
                replaced.push_str(&format!("{{%{left} include \"{name}\" {right}%}}"));
            }
            None => replaced.push_str(&rest[start..end + 2]),
        }
        rest = &rest[end + 2..];
    }
    replaced.push_str(rest);
    (replaced, marked)
}

/// Takes the marks out of `text` and says where they were.
fn take_spans(text: String) -> Result<Rendered, TextError> {
    let mut clean = String::with_capacity(text.len());
    let mut spans = Vec::new();
    let mut open = None;
    for character in text.chars() {
        match (character, open) {
            (OPEN, None) => open = Some(clean.len()),
            (CLOSE, Some(start)) => {
                spans.push(start..clean.len());
                open = None;
            }
            (OPEN | CLOSE, _) => return Err(TextError::Mask { message: "{% generation %} blocks are nested or not closed".into() }),
            _ => clean.push(character),
        }
    }
    match open {
        None => Ok(Rendered { text: clean, spans }),
        Some(_) => Err(TextError::Mask { message: "a {% generation %} block is not closed".into() }),
    }
}
