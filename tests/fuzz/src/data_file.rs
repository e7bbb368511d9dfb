//! Data files of every format but Parquet: documents, and rows with everything that reads rows. The first byte of the input says which
//! format, how it is packed and how it is split; the rest is the content.

use std::io::Write;

use rlflow_api::StageError;
use rlflow_text::{Flow, TextSplit, read_documents, read_rows, rows};

use super::scratch::data_file;

const FORMATS: [&str; 6] = ["txt", "html", "jsonl", "json", "csv", "tsv"];
/// A few bytes may stand for any number of rows.
const MAX_ROWS: usize = 20_000;

/// Fails on a panic.
pub fn check(input: &[u8]) {
    let Some((choice, content)) = input.split_first() else { return };
    let choice = usize::from(*choice);
    let (format, packing) = (FORMATS[choice % 6], choice / 6 % 5);
    let split = [TextSplit::File, TextSplit::Paragraph, TextSplit::Line][choice / 30 % 3];
    let file = match packing {
        0 => data_file(&format!("a.{format}"), content),
        1 => data_file(&format!("a.{format}.gz"), content),
        2 => data_file(&format!("a.{format}.zst"), content),
        3 => {
            let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            packed.write_all(content).expect("memory can be written");
            data_file(&format!("a.{format}.gz"), &packed.finish().expect("memory can be written"))
        }
        _ => data_file(&format!("a.{format}.zst"), &zstd::encode_all(content, 1).expect("memory can be packed")),
    };

    let mut left = MAX_ROWS;
    let documents = read_documents(&file, split, "text", |line, _| {
        assert!(line > 0);
        left = left.checked_sub(1).ok_or(StageError::Interrupted)?;
        Ok(())
    });
    tell(documents);

    let fields = rows::PromptFields { answer: None, answer_after: Some("#".into()) };
    let mut left = MAX_ROWS;
    let read = read_rows(&file, true, |line, row| {
        assert!(line > 0);
        drop((rows::conversation(&row), rows::preference(&row), rows::prompt(&row, &fields)));
        left -= 1;
        Ok(if left == 0 { Flow::Break(()) } else { Flow::Continue(()) })
    });
    tell(read);
}

/// What is told must name the file.
fn tell(result: Result<(), StageError>) {
    match result {
        Ok(()) | Err(StageError::Interrupted) => {}
        Err(StageError::Data { path, .. }) => assert!(path.starts_with("a.")),
        Err(other) => panic!("{other}"),
    }
}
