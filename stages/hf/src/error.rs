use rlflow_api::StageError;

/// Something wrong with a checkpoint directory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{file}: {message}")]
pub struct HfError {
    /// The file, as messages name it.
    pub file: String,
    /// What is wrong with it.
    pub message: String,
    /// What to do.
    pub hint: Option<String>,
}

impl HfError {
    /// An error without a hint.
    pub fn new(file: impl Into<String>, message: impl Into<String>) -> Self {
        Self { file: file.into(), message: message.into(), hint: None }
    }

    /// The same with a hint.
    pub fn hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(hint.into()), ..self }
    }
}

impl From<HfError> for StageError {
    fn from(HfError { file, message, hint }: HfError) -> Self {
        Self::Data { path: file, line: None, message, hint }
    }
}

/// `items` in a sentence: the first few, and how many more there are.
pub(crate) fn listed<'a>(items: impl IntoIterator<Item = &'a str>) -> String {
    const SHOWN: usize = 8;
    let items: Vec<&str> = items.into_iter().collect();
    let shown: Vec<String> = items.iter().take(SHOWN).map(|item| format!("`{}`", item.chars().take(200).collect::<String>())).collect();
    let more = items.len().saturating_sub(SHOWN);
    if more > 0 { format!("{} and {more} more", shown.join(", ")) } else { shown.join(", ") }
}
