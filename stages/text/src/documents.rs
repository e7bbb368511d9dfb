use rlflow_api::{DataFile, StageResult};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    data_file::{DataFormat, Flow, for_each_line, with_file},
    html::html_text,
    parquet::read_parquet,
    row_file::read_rows,
};

/// What one document of a plain text file, or of a web page's text, is.
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
/// One document at a time is held, of web pages the page. Line ends are `\n`; documents of plain text are trimmed of blank lines, and blank
/// ones left out. Lines of a web page are those of its text.
pub fn read_documents(
    file: &DataFile,
    split: TextSplit,
    field: &str,
    mut visit: impl FnMut(u64, Result<&str, String>) -> StageResult<()>,
) -> StageResult<()> {
    let mut documents = Documents { split, text: String::new(), start: 1, visit: &mut |line, text| visit(line, Ok(text)) };
    match DataFormat::of_file(file)? {
        DataFormat::Text => with_file(file, |input| {
            for_each_line(file, input, |number, line| documents.line(number, line).map(Flow::Continue))?;
            documents.finish()
        }),
        DataFormat::Html => with_file(file, |input| {
            let mut html = String::new();
            for_each_line(file, input, |_, line| {
                html.push_str(line);
                html.push('\n');
                Ok(Flow::Continue(()))
            })?;
            let text = html_text(&html);
            text.lines().zip(1..).try_for_each(|(line, number)| documents.line(number, line))?;
            documents.finish()
        }),
        format => {
            let mut visit_row = |line: u64, row: Value| {
                let text = match row.get(field) {
                    Some(Value::String(text)) => Ok(text.as_str()),
                    Some(other) => Err(format!("`{field}` is {}, expected text", kind_of(other))),
                    None => Err(no_field(&row, field)),
                };
                visit(line, text).map(Flow::Continue)
            };
            // Of a table's columns only one need be unpacked.
            match format {
                DataFormat::Parquet => read_parquet(file, Some(field), &mut visit_row),
                _ => read_rows(file, false, visit_row),
            }
        }
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

/// Puts lines together to documents.
struct Documents<'a> {
    split: TextSplit,
    text: String,
    /// Line on which `text` begins.
    start: u64,
    visit: &'a mut dyn FnMut(u64, &str) -> StageResult<()>,
}

impl Documents<'_> {
    fn line(&mut self, number: u64, line: &str) -> StageResult<()> {
        match self.split {
            TextSplit::Line if line.trim().is_empty() => return Ok(()),
            TextSplit::Line => return (self.visit)(number, line),
            TextSplit::Paragraph if line.trim().is_empty() => {
                if !self.text.is_empty() {
                    (self.visit)(self.start, &self.text)?;
                    self.text.clear();
                }
                return Ok(());
            }
            TextSplit::File if self.text.is_empty() && line.trim().is_empty() => return Ok(()),
            _ => {}
        }
        if self.text.is_empty() {
            self.start = number;
        } else {
            self.text.push('\n');
        }
        self.text.push_str(line);
        Ok(())
    }

    fn finish(&mut self) -> StageResult<()> {
        let rest = self.text.trim_end_matches('\n');
        if rest.trim().is_empty() { Ok(()) } else { (self.visit)(self.start, rest) }
    }
}
