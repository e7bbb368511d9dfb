//! JSON as Python's `json.dumps` and `repr` write it: models were trained with their spaces and quotes.

use serde_json::{Number, Value};

use crate::chat_template::BREAK;

/// Arguments of `json.dumps`.
#[derive(Debug, Clone, Default)]
pub(crate) struct Style {
    /// Spaces per level; one line if absent.
    pub indent: Option<usize>,
    /// Whether all but ASCII is escaped.
    pub ensure_ascii: bool,
    /// Whether keys are sorted.
    pub sort_keys: bool,
    /// Item and key separators.
    pub separators: Option<Vec<String>>,
}

/// `json.dumps(value, ...)`.
pub(crate) fn dump(value: &Value, style: &Style) -> String {
    let (item, key) = match style.separators.as_deref() {
        Some([item, key]) => (item.as_str(), key.as_str()),
        // With an indent Python drops the space at the end of the line.
        _ => (if style.indent.is_some() { "," } else { ", " }, ": "),
    };
    let mut out = String::new();
    write(&mut out, value, style, item, key, 0);
    out
}

fn write(out: &mut String, value: &Value, style: &Style, item: &str, key: &str, level: usize) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(value) => out.push_str(if *value { "true" } else { "false" }),
        Value::Number(number) => out.push_str(&repr_number(number)),
        Value::String(text) => string(out, text, style.ensure_ascii),
        Value::Array(values) if values.is_empty() => out.push_str("[]"),
        Value::Array(values) => {
            out.push('[');
            for (at, value) in values.iter().enumerate() {
                begin(out, at, style, item, level + 1);
                write(out, value, style, item, key, level + 1);
            }
            end(out, style, level);
            out.push(']');
        }
        Value::Object(map) if map.is_empty() => out.push_str("{}"),
        Value::Object(map) => {
            let mut entries: Vec<_> = map.iter().collect();
            if style.sort_keys {
                entries.sort_by(|a, b| a.0.cmp(b.0));
            }
            out.push('{');
            for (at, (name, value)) in entries.into_iter().enumerate() {
                begin(out, at, style, item, level + 1);
                string(out, name, style.ensure_ascii);
                out.push_str(key);
                write(out, value, style, item, key, level + 1);
            }
            end(out, style, level);
            out.push('}');
        }
    }
}

fn begin(out: &mut String, at: usize, style: &Style, item: &str, level: usize) {
    if at > 0 {
        out.push_str(item);
    }
    end(out, style, level);
}

fn end(out: &mut String, style: &Style, level: usize) {
    if let Some(indent) = style.indent {
        out.push('\n');
        out.extend(std::iter::repeat_n(' ', indent * level));
    }
}

fn string(out: &mut String, text: &str, ensure_ascii: bool) {
    out.push('"');
    for character in text.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            control if control < ' ' => out.push_str(&format!("\\u{:04x}", control as u32)),
            // Taken out again later.
            BREAK => out.push(BREAK),
            other if ensure_ascii && !(' '..='~').contains(&other) => {
                let mut units = [0; 2];
                other.encode_utf16(&mut units).iter().for_each(|unit| out.push_str(&format!("\\u{unit:04x}")));
            }
            other => out.push(other),
        }
    }
    out.push('"');
}

/// `repr(value)`: what a template prints of a list or a dictionary.
pub(crate) fn repr(value: &Value) -> String {
    match value {
        Value::Null => "None".into(),
        Value::Bool(true) => "True".into(),
        Value::Bool(false) => "False".into(),
        Value::Number(number) => repr_number(number),
        Value::String(text) => repr_string(text),
        Value::Array(values) => format!("[{}]", values.iter().map(repr).collect::<Vec<_>>().join(", ")),
        Value::Object(map) => {
            let entries: Vec<String> = map.iter().map(|(key, value)| format!("{}: {}", repr_string(key), repr(value))).collect();
            format!("{{{}}}", entries.join(", "))
        }
    }
}

fn repr_number(number: &Number) -> String {
    match number.as_f64().filter(|_| number.is_f64()) {
        Some(value) => repr_float(value),
        None => number.to_string(),
    }
}

/// `repr` of a float: the fewest digits that read back as it, with an exponent below 1e-4 and from 1e16 on.
pub(crate) fn repr_float(value: f64) -> String {
    let shortest = format!("{value:e}");
    match shortest.split_once('e').and_then(|(digits, exponent)| Some((digits, exponent.parse::<i32>().ok()?))) {
        Some((_, -4..16)) => {
            let plain = value.to_string();
            if plain.contains('.') { plain } else { plain + ".0" }
        }
        Some((digits, exponent)) => format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs()),
        // Python's names of what is no number.
        None => shortest.to_lowercase(),
    }
}

fn repr_string(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::from(quote);
    for character in text.chars() {
        match character {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            control if control < ' ' || control == '\u{7f}' => out.push_str(&format!("\\x{:02x}", control as u32)),
            other if other == quote => out.extend(['\\', other]),
            other => out.push(other),
        }
    }
    out.push(quote);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// Expected texts printed by CPython 3.11's `json.dumps` with the same arguments.
    #[test]
    fn as_python_writes_it() {
        let value = json!({"b": [1, 2.5, null, true], "a": {"x": "中\"<é>\n\u{1}"}, "e": [], "o": {}});
        let dump = |style: Style| dump(&value, &style);
        assert_eq!(dump(Style::default()), "{\"b\": [1, 2.5, null, true], \"a\": {\"x\": \"中\\\"<é>\\n\\u0001\"}, \"e\": [], \"o\": {}}");
        assert_eq!(
            dump(Style { ensure_ascii: true, sort_keys: true, separators: Some(vec![",".into(), ":".into()]), ..Style::default() }),
            "{\"a\":{\"x\":\"\\u4e2d\\\"<\\u00e9>\\n\\u0001\"},\"b\":[1,2.5,null,true],\"e\":[],\"o\":{}}"
        );
        let indented = "{\n  \"b\": [\n    1,\n    2.5,\n    null,\n    true\n  ],\n  \"a\": {\n    \"x\": \"中\\\"<é>\\n\\u0001\"\n  },\n  \"e\": [],\n  \"o\": {}\n}";
        assert_eq!(dump(Style { indent: Some(2), ..Style::default() }), indented);
        let numbers = json!([1e-7, 0.00001, 0.0001, 1e15, 1e16, 1.5e300, -0.0, 123456789012345680.0, 100.0, 12, 0.1]);
        assert_eq!(
            super::dump(&numbers, &Style::default()),
            "[1e-07, 1e-05, 0.0001, 1000000000000000.0, 1e+16, 1.5e+300, -0.0, 1.2345678901234568e+17, 100.0, 12, 0.1]"
        );
        let mut emoji = String::new();
        string(&mut emoji, "😀", true);
        assert_eq!(emoji, "\"\\ud83d\\ude00\"");
    }

    /// Expected texts printed by CPython 3.11's `repr`.
    #[test]
    fn as_python_shows_it() {
        assert_eq!(repr(&json!([1, "a", null, true, 1.0])), "[1, 'a', None, True, 1.0]");
        assert_eq!(repr(&json!({"k": "it's", "q": "'\"", "n": "a\n\\\u{1}é"})), "{'k': \"it's\", 'q': '\\'\"', 'n': 'a\\n\\\\\\x01é'}");
    }
}
