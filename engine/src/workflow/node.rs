use indexmap::IndexMap;
use serde_json::{Map, Number, Value};
use toml::{
    Spanned,
    de::{DeInteger, DeTable, DeValue},
};

use super::source::Span;

/// A TOML value that remembers where it was written.
#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub data: Data,
    pub span: Span,
}

#[derive(Debug, Clone)]
pub(crate) enum Data {
    /// The word `null`, which TOML does not have: only from defaults of an edition.
    Null,
    Bool(bool),
    /// Wide enough to tell what no setting can hold from what one can; saturates.
    Integer(i128),
    Float(f64),
    String(String),
    /// As written.
    Datetime(String),
    Array(Vec<Node>),
    Table(Table),
}

/// Entries in the order of the file. Ten thousand stages have a hundred thousand keys, and whoever writes the file may slow it down.
pub(crate) type Table = IndexMap<String, Entry, foldhash::fast::RandomState>;

#[derive(Debug, Clone)]
pub(crate) struct Entry {
    /// Where the key stands.
    pub key: Span,
    pub node: Node,
}

impl Node {
    pub fn table(table: Table, span: Span) -> Self {
        Self { data: Data::Table(table), span }
    }

    /// A parsed TOML value of source `source`.
    pub fn from_toml(value: &Spanned<DeValue<'_>>, source: u32) -> Self {
        let data = match value.get_ref() {
            DeValue::String(text) => Data::String(text.to_string()),
            DeValue::Integer(integer) => Data::Integer(integer_value(integer)),
            DeValue::Float(float) => Data::Float(float.as_str().parse().unwrap_or(f64::NAN)),
            DeValue::Boolean(flag) => Data::Bool(*flag),
            DeValue::Datetime(datetime) => Data::Datetime(datetime.to_string()),
            DeValue::Array(items) => Data::Array(items.iter().map(|item| Self::from_toml(item, source)).collect()),
            DeValue::Table(table) => Data::Table(table_from_toml(table, source)),
        };
        Self { data, span: Span::new(source, value.span()) }
    }

    /// A value that nobody wrote.
    pub fn from_json(value: &Value) -> Self {
        let data = match value {
            Value::Null => Data::Null,
            Value::Bool(flag) => Data::Bool(*flag),
            Value::Number(number) => match number.as_i128() {
                Some(integer) => Data::Integer(integer),
                None => Data::Float(number.as_f64().unwrap_or(f64::NAN)),
            },
            Value::String(text) => Data::String(text.clone()),
            Value::Array(items) => Data::Array(items.iter().map(Self::from_json).collect()),
            Value::Object(object) => Data::Table(
                object.iter().map(|(key, value)| (key.clone(), Entry { key: Span::NOWHERE, node: Self::from_json(value) })).collect(),
            ),
        };
        Self { data, span: Span::NOWHERE }
    }

    /// As JSON. Integers that JSON cannot hold and floats that are not finite were refused before.
    pub fn to_json(&self) -> Value {
        match &self.data {
            Data::Null => Value::Null,
            Data::Bool(flag) => Value::Bool(*flag),
            Data::Integer(integer) => Number::from_i128(*integer).map_or(Value::Null, Value::Number),
            Data::Float(float) => Number::from_f64(*float).map_or(Value::Null, Value::Number),
            Data::String(text) | Data::Datetime(text) => Value::String(text.clone()),
            Data::Array(items) => Value::Array(items.iter().map(Self::to_json).collect()),
            Data::Table(table) => Value::Object(table_to_json(table)),
        }
    }

    pub fn as_table(&self) -> Option<&Table> {
        match &self.data {
            Data::Table(table) => Some(table),
            _ => None,
        }
    }

    pub fn as_str(&self) -> Option<&str> {
        match &self.data {
            Data::String(text) => Some(text),
            _ => None,
        }
    }

    /// What it is, for messages: `the text "abc"`, `a list`.
    pub fn found(&self) -> String {
        match &self.data {
            Data::Null => "nothing".into(),
            Data::Bool(flag) => format!("`{flag}`"),
            Data::Integer(integer) => format!("the integer {integer}"),
            Data::Float(float) => format!("the number {float:?}"),
            Data::String(text) => format!("the text {}", quoted(text)),
            Data::Datetime(text) => format!("the date {text}"),
            Data::Array(_) => "a list".into(),
            Data::Table(_) => "a table".into(),
        }
    }
}

/// `text` in quotes, shortened if long.
pub(crate) fn quoted(text: &str) -> String {
    let mut short: String = text.chars().take(60).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    format!("{short:?}")
}

pub(crate) fn table_from_toml(table: &DeTable<'_>, source: u32) -> Table {
    let entry = |(key, value): (&Spanned<_>, &Spanned<DeValue<'_>>)| {
        let name: &std::borrow::Cow<'_, str> = key.get_ref();
        (name.to_string(), Entry { key: Span::new(source, key.span()), node: Node::from_toml(value, source) })
    };
    table.iter().map(entry).collect()
}

pub(crate) fn table_to_json(table: &Table) -> Map<String, Value> {
    table.iter().map(|(key, entry)| (key.clone(), entry.node.to_json())).collect()
}

fn integer_value(integer: &DeInteger<'_>) -> i128 {
    let text = integer.as_str();
    i128::from_str_radix(text, integer.radix()).unwrap_or(if text.starts_with('-') { i128::MIN } else { i128::MAX })
}

/// Lays `over` on `under`: tables merge deeply, anything else is replaced.
pub(crate) fn merge(under: &mut Table, over: Table) {
    for (key, entry) in over {
        match under.get_mut(&key) {
            None => {
                under.insert(key, entry);
            }
            Some(existing) => match (&mut existing.node.data, entry.node.data) {
                (Data::Table(below), Data::Table(above)) => {
                    merge(below, above);
                    existing.key = entry.key;
                    existing.node.span = entry.node.span;
                }
                (_, data) => *existing = Entry { key: entry.key, node: Node { data, span: entry.node.span } },
            },
        }
    }
}

/// Most steps of a dotted path that anybody means.
pub(crate) const MAX_STEPS: usize = 64;

/// A step of a dotted path such as `sources[0].path`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    Key(String),
    Index(usize),
}

/// Splits `model.heads` or `sources[0].path`. Unreadable rests become keys.
pub(crate) fn split_path(path: &str) -> Vec<Step> {
    let mut steps = Vec::new();
    for part in path.split('.') {
        let (key, mut rest) = part.split_at(part.find('[').unwrap_or(part.len()));
        if !key.is_empty() {
            steps.push(Step::Key(key.to_owned()));
        }
        while let Some((index, after)) = rest.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            match index.parse() {
                Ok(index) => steps.push(Step::Index(index)),
                Err(_) => steps.push(Step::Key(index.to_owned())),
            }
            rest = after;
        }
    }
    steps
}

/// The span of the deepest part of `path` that is written in `table`, if its first step is.
pub(crate) fn span_of_path(table: &Table, path: &str) -> Option<Span> {
    let mut steps = split_path(path).into_iter();
    let Some(Step::Key(first)) = steps.next() else { return None };
    let mut node = &table.get(&first)?.node;
    for step in steps {
        let next = match (&node.data, &step) {
            (Data::Table(table), Step::Key(key)) => table.get(key).map(|entry| &entry.node),
            (Data::Array(items), Step::Index(index)) => items.get(*index),
            _ => None,
        };
        match next {
            Some(next) if next.span != Span::NOWHERE => node = next,
            _ => break,
        }
    }
    (node.span != Span::NOWHERE).then_some(node.span)
}

/// Whether a dotted path is written, itself and not only what it lies in.
pub(crate) fn is_written(table: &Table, path: &str) -> bool {
    let mut steps = split_path(path).into_iter();
    let Some(Step::Key(first)) = steps.next() else { return false };
    let first = table.get(&first).map(|entry| &entry.node);
    let found = steps.try_fold(first, |node, step| {
        Some(match (&node?.data, &step) {
            (Data::Table(table), Step::Key(key)) => table.get(key).map(|entry| &entry.node),
            (Data::Array(items), Step::Index(index)) => items.get(*index),
            _ => None,
        })
    });
    found.flatten().is_some_and(|node| node.span != Span::NOWHERE)
}
