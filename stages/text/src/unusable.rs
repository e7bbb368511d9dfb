use rlflow_api::{DataFile, RunContext, StageError, StageResult};

/// Examples that are shown.
const SHOWN: usize = 5;

/// Rows that cannot be used: how many, and the first few with the reason.
#[derive(Debug, Default)]
pub struct Unusable {
    count: u64,
    examples: Vec<(String, u64, String)>,
}

impl Unusable {
    /// Counts a row.
    pub fn add(&mut self, file: &DataFile, line: u64, reason: String) {
        self.count += 1;
        // One example of each reason says more than five of the first.
        let known = self.examples.iter().any(|(_, _, known)| *known == reason);
        if self.examples.len() < SHOWN && !known {
            self.examples.push((file.name.clone(), line, reason));
        }
    }

    /// How many.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Warns of them, or fails if they are more than `max_share` of `rows`.
    pub fn settle(&self, context: &RunContext<'_>, rows: u64, max_share: f64) -> StageResult<()> {
        let Some((path, line, reason)) = self.examples.first() else { return Ok(()) };
        if self.count as f64 > max_share * rows as f64 {
            return Err(StageError::Data {
                path: path.clone(),
                line: Some(*line),
                message: format!(
                    "{} of {rows} rows cannot be used, more than max_unusable = {max_share} allows; the first: {reason}",
                    self.count
                ),
                hint: Some("mend the rows, or raise `max_unusable` if the rest is enough".into()),
            });
        }
        let examples: Vec<String> = self.examples.iter().map(|(path, line, reason)| format!("\n  {path}:{line}: {reason}")).collect();
        let more = if self.count > self.examples.len() as u64 { "\n  ..." } else { "" };
        context.warning(format!("{} of {rows} rows cannot be used and are left out:{}{more}", self.count, examples.concat()));
        Ok(())
    }
}
