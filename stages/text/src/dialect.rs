//! The dialect of Jinja that chat templates are written in: what transformers' environment offers, printed as Python prints.
//!
//! Not there: tuples (they are lists), the operator `%` for texts, and dictionaries with other keys than texts.

use minijinja::{
    AutoEscape, Environment, Error, ErrorKind, State, Value,
    value::{Kwargs, ValueKind, from_args},
};

use crate::python_json;

/// The environment that transformers renders chat templates in (`chat_template_utils.py`).
pub(crate) fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(method);
    environment.set_formatter(|out, state, value| match printed(value) {
        Some(text) => out.write_str(&text).map_err(Error::from),
        None => minijinja::escape_formatter(out, state, value),
    });
    environment.add_filter("tojson", to_json);
    environment.add_filter("string", |value: &Value| printed(value).unwrap_or_else(|| value.to_string()));
    // minijinja says that nothing can be iterated over.
    environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok() || value.kind() == ValueKind::String);
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", |format: String| strftime_fixed(&format));
    environment
}

/// What Python prints where Jinja in Rust would print something else: lists, dictionaries and floats.
fn printed(value: &Value) -> Option<String> {
    match value.kind() {
        ValueKind::Seq | ValueKind::Map | ValueKind::Iterable => Some(python_json::repr(&serde_json::to_value(value).ok()?)),
        ValueKind::Number if !value.is_integer() => f64::try_from(value.clone()).ok().map(python_json::repr_float),
        _ => None,
    }
}

/// Python's `json.dumps` with the arguments that transformers' `tojson` takes; unlike Jinja's own it escapes no HTML.
fn to_json(value: &Value, arguments: Kwargs) -> Result<String, Error> {
    let bad = |error: serde_json::Error| Error::new(ErrorKind::BadSerialization, error.to_string());
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

/// Methods of Python's `str` that minijinja's own table lacks; for all others that table.
fn method(state: &State<'_, '_>, value: &Value, name: &str, arguments: &[Value]) -> Result<Value, Error> {
    let Some(text) = value.as_str() else { return minijinja_contrib::pycompat::unknown_method_callback(state, value, name, arguments) };
    let pad = |left: bool, right: bool| -> Result<Value, Error> {
        let (width, fill): (usize, Option<char>) = from_args(arguments)?;
        let missing = width.saturating_sub(text.chars().count());
        // As CPython: of an odd number the left side gets more only if the width is odd.
        let before = match (left, right) {
            (true, true) => missing / 2 + (missing & width & 1),
            (true, false) => missing,
            _ => 0,
        };
        let fill = |count: usize| fill.unwrap_or(' ').to_string().repeat(count);
        Ok(format!("{}{text}{}", fill(before), fill(missing - before)).into())
    };
    let list = |parts: &[&str]| Value::from(parts.iter().map(|part| (*part).to_owned()).collect::<Vec<String>>());
    let parted = |found: Option<(&str, &str)>, separator: &str, rest_last: bool| match found {
        Some((before, after)) => list(&[before, separator, after]),
        None if rest_last => list(&["", "", text]),
        None => list(&[text, "", ""]),
    };
    Ok(match name {
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(arguments)?;
            text.strip_prefix(prefix).unwrap_or(text).into()
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(arguments)?;
            text.strip_suffix(suffix).unwrap_or(text).into()
        }
        "partition" => {
            let (separator,): (&str,) = from_args(arguments)?;
            parted(text.split_once(separator), separator, false)
        }
        "rpartition" => {
            let (separator,): (&str,) = from_args(arguments)?;
            parted(text.rsplit_once(separator), separator, true)
        }
        "rsplit" if arguments.len() == 2 => {
            let (separator, most): (&str, usize) = from_args(arguments)?;
            let mut parts: Vec<&str> = text.rsplitn(most.saturating_add(1), separator).collect();
            parts.reverse();
            list(&parts)
        }
        "rsplit" => return method(state, value, "split", arguments),
        "swapcase" => {
            let swap = |letter: char| {
                if letter.is_uppercase() { letter.to_lowercase().collect() } else { letter.to_uppercase().collect::<String>() }
            };
            text.chars().map(swap).collect::<String>().into()
        }
        "zfill" => {
            let (width,): (usize,) = from_args(arguments)?;
            let (sign, digits) = text.split_at(usize::from(text.starts_with(['+', '-'])));
            format!("{sign}{}{digits}", "0".repeat(width.saturating_sub(text.chars().count()))).into()
        }
        "ljust" => pad(false, true)?,
        "rjust" => pad(true, false)?,
        "center" => pad(true, true)?,
        _ => return minijinja_contrib::pycompat::unknown_method_callback(state, value, name, arguments),
    })
}

/// `strftime` of a fixed day (the one that Llama 3.1's template falls back to): a result must not depend on when it
/// was made, or the same workflow would give other tokens tomorrow.
fn strftime_fixed(format: &str) -> Result<String, Error> {
    let bad = |error: jiff::Error| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {error}"));
    jiff::fmt::strtime::format(format, jiff::civil::date(2024, 7, 26).at(0, 0, 0, 0)).map_err(bad)
}
