//! The files of a finished tokenizer: a `tokenizer.json`, or the directory that it lies in with what belongs to it.

use std::path::{Path, PathBuf};

use rlflow_api::{DataFile, Problem, StageError, StageResult};
use rlflow_text::{TextError, TokenizerConfig as ConfigFile, count_tokens, read_file};

/// Name of the tokenizer in a directory.
const TOKENIZER: &str = "tokenizer.json";
/// What belongs to it there, as transformers reads it.
const CONFIG_FILES: [&str; 3] = ["tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"];
/// Endings of the files that are read of a directory.
pub const ENDINGS: &[&str] = &[TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"];

fn file_name(path: &Path) -> Option<&str> {
    path.file_name()?.to_str()
}

/// The tokenizer among the files that `path` named: the one file, or the one of that name in a directory.
fn tokenizer_among<T>(files: &[T], path: impl Fn(&T) -> &Path) -> Option<&T> {
    match files {
        [file] if !CONFIG_FILES.iter().any(|name| file_name(path(file)) == Some(name)) => Some(file),
        files => files.iter().find(|file| file_name(path(file)) == Some(TOKENIZER)),
    }
}

/// Whether `pattern` names a directory rather than the one file that was found.
pub fn is_directory(pattern: &str, files: &[PathBuf]) -> bool {
    let name = Path::new(pattern).file_name();
    !pattern.contains(['*', '?', '[']) && files.iter().any(|file| file.file_name() != name)
}

/// Number of tokens of the tokenizer that `pattern` names, from its file alone.
///
/// # Errors
/// If it names no such file.
pub fn planned_tokens(pattern: &str, files: &[PathBuf]) -> Result<Option<u64>, Problem> {
    let bad = |message: String| Problem::new("bad_tokenizer", "path", message);
    let convert = "`AutoTokenizer.from_pretrained(DIR).save_pretrained(NEW)` in Python writes one";
    let Some(file) = tokenizer_among(files, PathBuf::as_path) else {
        return Err(bad(format!("the directory `{pattern}` holds no `{TOKENIZER}`")).hint(convert));
    };
    // What cannot be read at all is told when it is hashed.
    let Ok(content) = std::fs::read(file) else { return Ok(None) };
    match count_tokens(&content) {
        Some(tokens) => Ok(Some(tokens)),
        None => Err(bad(format!("`{pattern}` is not a `{TOKENIZER}` of a fast Hugging Face tokenizer")).hint(convert)),
    }
}

/// A tokenizer's file and what is known of its tokens.
pub struct Finished {
    /// Content of the `tokenizer.json`.
    pub tokenizer_json: Vec<u8>,
    /// Special tokens and chat template, as far as files say.
    pub config: ConfigFile,
}

impl Finished {
    /// From the files of `path` and the one of `config`, if there is one. Errors name files as the workflow does.
    ///
    /// # Errors
    /// If one cannot be read or parsed.
    pub fn read(pattern: &str, files: &[DataFile], config: Option<&DataFile>) -> StageResult<Self> {
        let tokenizer = tokenizer_among(files, |file| file.path.as_path());
        let tokenizer = tokenizer.ok_or_else(|| StageError::invalid(format!("`{pattern}` holds no `{TOKENIZER}`")))?;
        let tokenizer_json = read_file(tokenizer)?;
        if let Some(file) = config {
            let config = ConfigFile::parse(&read_file(file)?).map_err(|error| of_file(file, error))?;
            return Ok(Self { tokenizer_json, config });
        }
        let mut contents = Vec::new();
        for file in files {
            if let Some(name) = CONFIG_FILES.into_iter().find(|name| file_name(&file.path) == Some(name)) {
                contents.push((name, read_file(file)?));
            }
        }
        let config = ConfigFile::of_files(contents.iter().map(|(name, content)| (*name, content.as_slice())))
            .map_err(|error| StageError::invalid(format!("{pattern}: {error}")))?;
        Ok(Self { tokenizer_json, config })
    }
}

/// An error about a file, under the name that the workflow gives it.
fn of_file(file: &DataFile, error: TextError) -> StageError {
    let message = match error {
        TextError::Tokenizer { message, .. } => message,
        other => other.to_string(),
    };
    StageError::Data { path: file.name.clone(), line: None, message, hint: None }
}
