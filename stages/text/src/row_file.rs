use rlflow_api::{DataFile, StageResult};
use serde_json::Value;

use crate::{
    csv_rows::read_csv,
    data_file::{DataFormat, Flow, data_error, for_each_line, with_file},
    json_rows::read_json,
    parquet::read_parquet,
};

/// Calls `visit` with every row of `file` and its line (of a Parquet file its number), until that breaks. Rows are read one at a time, so that
/// the file may be larger than memory.
///
/// | format | a row is |
/// |---|---|
/// | JSON lines, JSON array | a value |
/// | CSV, TSV | an object of texts, named by the header; empty cells are left out |
/// | Parquet | an object; nulls are left out |
/// | plain text, if `lines` | the text of a line that is not blank |
pub fn read_rows(file: &DataFile, lines: bool, mut visit: impl FnMut(u64, Value) -> StageResult<Flow>) -> StageResult<()> {
    let format = DataFormat::of_file(file)?;
    if let Some(message) = format.no_rows(lines) {
        return Err(data_error(file, None, message, None));
    }
    match format {
        DataFormat::Json => read_json(file, &mut visit),
        DataFormat::Csv { delimiter } => read_csv(file, delimiter, &mut visit),
        DataFormat::Parquet => read_parquet(file, None, &mut visit),
        DataFormat::Text | DataFormat::Html => with_file(file, |input| {
            for_each_line(file, input, |line, text| match text.trim() {
                "" => Ok(Flow::Continue(())),
                text => visit(line, Value::String(text.to_owned())),
            })
        }),
    }
}
