use rlflow_api::{DataFile, RunContext, StageError};

use crate::data_file::data_error;

/// Files in which nothing was found.
#[derive(Debug, Default)]
pub(crate) struct EmptyFiles(Vec<DataFile>);

impl EmptyFiles {
    /// Adds a file without rows or documents.
    pub fn add(&mut self, file: &DataFile) {
        self.0.push(file.clone());
    }

    /// The error if there is nothing in any file; `what` is `rows` or `documents`.
    pub fn error(&self, what: &str) -> StageError {
        let Some(first) = self.0.first() else { return StageError::invalid(format!("there are no files to read {what} from")) };
        let rest = match self.0.len() - 1 {
            0 => String::new(),
            1 => "; neither has the other file anything".to_owned(),
            more => format!("; neither has any of the other {more} files anything"),
        };
        data_error(first, None, format!("{}{rest}", reason(first, what)), Some("check what wrote the file, and the path"))
    }

    /// Names them where others have something.
    pub fn warn(&self, context: &RunContext<'_>, what: &str) {
        if let Some(first) = self.0.first() {
            let rest = if self.0.len() > 1 { format!(" (and so for {} more files)", self.0.len() - 1) } else { String::new() };
            context.warning(format!("{}: {}{rest}", first.name, reason(first, what)));
        }
    }
}

fn reason(file: &DataFile, what: &str) -> String {
    if file.size_bytes == 0 { "the file is empty".into() } else { format!("the file has no {what}") }
}
