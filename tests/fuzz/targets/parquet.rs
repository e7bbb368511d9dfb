//! Parquet files: all columns, and one.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rlflow_api::StageError;
use rlflow_fuzz::data_file;
use rlflow_text::{Flow, TextSplit, read_documents, read_rows};

/// A few bytes may stand for any number of rows.
const MAX_ROWS: usize = 2_000;

fuzz_target!(|input: &[u8]| {
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
});
