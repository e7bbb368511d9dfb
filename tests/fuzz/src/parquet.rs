//! Parquet files: all columns, and one.

use rlflow_api::StageError;
use rlflow_text::{Flow, TextSplit, read_documents, read_rows};

use super::scratch::data_file;

/// A few bytes may stand for any number of rows.
const MAX_ROWS: usize = 2_000;

/// Fails on a panic.
pub fn check(input: &[u8]) {
    let file = data_file("a.parquet", input);
    let mut left = MAX_ROWS;
    let read = read_rows(&file, false, |_, row| {
        assert!(row.is_object());
        left -= 1;
        Ok(if left == 0 { Flow::Break(()) } else { Flow::Continue(()) })
    });
    if let Err(error) = read {
        assert!(matches!(error, StageError::Data { .. }), "{error}");
    }
    let mut left = MAX_ROWS;
    drop(read_documents(&file, TextSplit::File, "text", |_, _| {
        left = left.checked_sub(1).ok_or(StageError::Interrupted)?;
        Ok(())
    }));
}
