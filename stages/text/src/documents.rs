use std::io::BufRead;

use rlflow_api::{DataFile, StageResult};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    data_file::{DataFormat, for_each_line, with_file},
    json_rows::read_rows,
};

/// What one document of a plain text file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TextSplit {
    /// The whole file.
    File,
    /// What stands between blank lines.
    #[default]
    Paragraph,
    /// A line.
    Line,
}

/// Calls `visit` with the line and text of every document of `file`; `Err` is a row without text, with the reason.
/// One document at a time is held. Line ends are `\n`; documents of plain text are trimmed of blank lines, and blank ones left out.
pub fn read_documents(
    file: &DataFile,
    split: TextSplit,
    field: &str,
    mut visit: impl FnMut(u64, Result<&str, String>) -> StageResult<()>,
) -> StageResult<()> {
    match DataFormat::of_file(file)? {
        DataFormat::Text => with_file(file, |input| split_text(file, input, split, |line, text| visit(line, Ok(text)))),
        DataFormat::Json => read_rows(file, |line, row| match row.get(field) {
            Some(Value::String(text)) => visit(line, Ok(text)),
            Some(other) => visit(line, Err(format!("`{field}` is {}, expected text", kind_of(other)))),
            None => visit(line, Err(no_field(&row, field))),
        }),
    }
}

/// Why `row` has no `field`, with the fields that it has.
pub(crate) fn no_field(row: &Value, field: &str) -> String {
    match row {
        Value::Object(map) => {
            let names: Vec<&str> = map.keys().map(String::as_str).take(8).collect();
            format!("no field `{field}` (it has {})", if names.is_empty() { "none".into() } else { names.join(", ") })
        }
        other => format!("{}, expected an object with the field `{field}`", kind_of(other)),
    }
}

/// What a JSON value is, for messages.
pub(crate) fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

fn split_text(
    file: &DataFile,
    input: &mut dyn BufRead,
    split: TextSplit,
    mut visit: impl FnMut(u64, &str) -> StageResult<()>,
) -> StageResult<()> {
    let (mut document, mut start) = (String::new(), 1);
    for_each_line(file, input, |number, line| {
        match split {
            TextSplit::Line if line.trim().is_empty() => return Ok(()),
            TextSplit::Line => return visit(number, line),
            TextSplit::Paragraph if line.trim().is_empty() => {
                if !document.is_empty() {
                    visit(start, &document)?;
                    document.clear();
                }
                return Ok(());
            }
            TextSplit::File if document.is_empty() && line.trim().is_empty() => return Ok(()),
            _ => {}
        }
        if document.is_empty() {
            start = number;
        } else {
            document.push('\n');
        }
        document.push_str(line);
        Ok(())
    })?;
    let rest = document.trim_end_matches('\n');
    if rest.trim().is_empty() { Ok(()) } else { visit(start, rest) }
}
