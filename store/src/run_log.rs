use std::path::Path;

use serde_json::Value;

use crate::Result;

/// Append-only record of one run: `runs/<id>/events.jsonl`.
pub struct RunLog {}

impl RunLog {
    /// The run's name: sortable by time, unique.
    pub fn id(&self) -> &str {
        todo!()
    }

    /// Folder of the run, for logs and event files.
    pub fn folder(&self) -> &Path {
        todo!()
    }

    /// Appends one event as a line of JSON. Durable at the next [`RunLog::sync`].
    pub fn append(&self, event: &Value) -> Result<()> {
        let _ = event;
        todo!()
    }

    /// Makes what was appended durable.
    pub fn sync(&self) -> Result<()> {
        todo!()
    }
}
