use std::{cell::Cell, fmt};

use rlflow_api::{DataFile, StageError, StageResult};
use serde::{
    Deserializer,
    de::{DeserializeSeed, SeqAccess, Visitor},
};
use serde_json::Value;

use crate::data_file::{Flow, LineCounter, data_error, for_each_line, read_error, with_file};

/// Calls `visit` with every row of a JSON file and its line: the elements of an array, or one value per line. Rows are
/// parsed one at a time, so that the file may be larger than memory.
pub(crate) fn read_json(file: &DataFile, visit: &mut dyn FnMut(u64, Value) -> StageResult<Flow>) -> StageResult<()> {
    with_file(file, |input| {
        let (mut input, line) = LineCounter::new(input);
        match input.peek().map_err(|error| read_error(file, error))? {
            Some(b'[') => read_array(file, input, &line, visit),
            _ => {
                let before = line.get() - 1;
                for_each_line(file, &mut std::io::BufReader::new(input), |number, text| {
                    if text.trim().is_empty() {
                        return Ok(Flow::Continue(()));
                    }
                    let number = number + before;
                    let value = serde_json::from_str(text).map_err(|error| broken(file, number, &error, text))?;
                    visit(number, value)
                })
            }
        }
    })
}

fn broken(file: &DataFile, line: u64, error: &serde_json::Error, text: &str) -> StageError {
    let excerpt: String = text.chars().take(60).collect();
    let dots = if excerpt.len() < text.len() { "..." } else { "" };
    let what = error.to_string();
    // The parser's own position counts from the start of the line; ours is the file's.
    let what = what.rsplit_once(" at line ").map_or(what.as_str(), |(what, _)| what);
    let message = format!("broken JSON at column {}: {what}: `{excerpt}{dots}`", error.column());
    data_error(file, Some(line), message, Some("each line must be one JSON object, or the file one array of objects"))
}

fn read_array(
    file: &DataFile,
    input: LineCounter<'_>,
    line: &Cell<u64>,
    visit: &mut dyn FnMut(u64, Value) -> StageResult<Flow>,
) -> StageResult<()> {
    let mut stopped = None;
    let mut parser = serde_json::Deserializer::from_reader(input);
    let parsed = parser.deserialize_seq(Rows { line, visit, stopped: &mut stopped }).and_then(|()| parser.end());
    match (stopped, parsed) {
        (Some(result), _) => result,
        (None, Ok(())) => Ok(()),
        (None, Err(error)) if error.is_io() => Err(read_error(file, error.into())),
        (None, Err(error)) => {
            let what = error.to_string();
            let what = what.rsplit_once(" at line ").map_or(what.as_str(), |(what, _)| what);
            Err(data_error(file, Some(line.get()), format!("broken JSON at column {}: {what}", error.column()), None))
        }
    }
}

struct Rows<'a> {
    line: &'a Cell<u64>,
    visit: &'a mut dyn FnMut(u64, Value) -> StageResult<Flow>,
    /// How the reading ended, if before the end of the array.
    stopped: &'a mut Option<StageResult<()>>,
}

impl<'de> Visitor<'de> for Rows<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of rows")
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut rows: A) -> Result<(), A::Error> {
        while rows.next_element_seed(Row(&mut self))?.is_some() {}
        Ok(())
    }
}

struct Row<'a, 'b>(&'a mut Rows<'b>);

impl<'de> DeserializeSeed<'de> for Row<'_, '_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        // The parser has looked at the row's first byte and no further: this is its line.
        let line = self.0.line.get();
        let value = <Value as serde::Deserialize>::deserialize(deserializer)?;
        let stopped = match (self.0.visit)(line, value) {
            Ok(Flow::Continue(())) => return Ok(()),
            Ok(Flow::Break(())) => Ok(()),
            Err(error) => Err(error),
        };
        *self.0.stopped = Some(stopped);
        Err(serde::de::Error::custom("stopped"))
    }
}
