use std::{ops::Range, sync::Arc};

use minijinja::{Environment, ErrorKind, Value, context, value::Kwargs};
use serde_json::json;

use crate::{Message, TextError, python_json, tokenizer_config::TOKEN_KEYS};

/// Begins a `{% generation %}` block in rendered text.
const OPEN: char = '\u{FDD0}';
/// Ends one.
const CLOSE: char = '\u{FDD1}';
/// Put into a special token's name where a message quotes it, so that the quote is not taken for the token.
pub(crate) const BREAK: char = '\u{FDD2}';

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
        let mut environment = Environment::new();
        // The environment that transformers renders chat templates in (`chat_template_utils.py`).
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_formatter(print_as_python);
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", |message: String| -> Result<Value, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_function("strftime_now", |format: String| strftime_fixed(&format));
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

    /// Renders `messages`; `add_generation_prompt` ends the text where the assistant begins to speak.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<Rendered, TextError> {
        for message in messages {
            check_reserved(&message.content)?;
        }
        let mut variables = serde_json::Map::new();
        for (name, token) in &self.special_tokens {
            variables.insert(name.clone(), json!(token));
        }
        let special_tokens = Value::from_serialize(&variables);
        let messages = Value::from_serialize(messages);
        let variables = context! { messages, add_generation_prompt, tools => (), documents => (), ..special_tokens };
        let template = self.environment.get_template("chat").map_err(|error| template_error(&error, &self.source))?;
        let text = template.render(variables).map_err(|error| template_error(&error, &self.source))?;
        take_spans(text)
    }
}

fn check_reserved(text: &str) -> Result<(), TextError> {
    match text.chars().find(|found| matches!(*found, OPEN | CLOSE)) {
        None => Ok(()),
        Some(found) => Err(TextError::Reserved { code: found as u32 }),
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

/// Lists and dictionaries are printed as Python does; the rest as Jinja.
fn print_as_python(out: &mut minijinja::Output<'_>, state: &minijinja::State<'_, '_>, value: &Value) -> Result<(), minijinja::Error> {
    let shown = matches!(value.kind(), minijinja::value::ValueKind::Seq | minijinja::value::ValueKind::Map);
    match shown.then(|| serde_json::to_value(value)) {
        Some(Ok(json)) => out.write_str(&python_json::repr(&json)).map_err(minijinja::Error::from),
        _ => minijinja::escape_formatter(out, state, value),
    }
}

/// Python's `json.dumps` with the arguments that transformers' `tojson` takes; unlike Jinja's own it escapes no HTML.
fn to_json(value: &Value, arguments: Kwargs) -> Result<String, minijinja::Error> {
    let bad = |error: serde_json::Error| minijinja::Error::new(ErrorKind::BadSerialization, error.to_string());
    let json = serde_json::to_value(value).map_err(bad)?;
    let style = python_json::Style {
        indent: arguments.get::<Option<usize>>("indent")?,
        ensure_ascii: arguments.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: arguments.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        separators: arguments.get::<Option<Vec<String>>>("separators")?,
    };
    arguments.assert_all_used()?;
    Ok(python_json::dump(&json, &style))
}

/// `strftime` of a fixed day (the one that Llama 3.1's template falls back to): a result must not depend on when it
/// was made, or the same workflow would give other tokens tomorrow.
fn strftime_fixed(format: &str) -> Result<String, minijinja::Error> {
    let bad = |error: jiff::Error| minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {error}"));
    jiff::fmt::strtime::format(format, jiff::civil::date(2024, 7, 26).at(0, 0, 0, 0)).map_err(bad)
}
