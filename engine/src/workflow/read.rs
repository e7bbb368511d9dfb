use std::{
    collections::HashSet,
    fs,
    io::{ErrorKind, Read},
    path::{Path, PathBuf},
};

use toml::de::DeTable;

use super::{
    WorkflowError,
    error::Collector,
    node::{Data, Entry, Table, merge, quoted, table_from_toml},
    source::{Source, Sources, Span},
};
use crate::suggest::did_you_mean;

/// Largest workflow file, in bytes. Ten thousand stages take about 3 MB.
const MAX_FILE_BYTES: u64 = 64 << 20;
/// Most syntax errors reported of one file: after that many it is probably no TOML at all.
const MAX_SYNTAX_ERRORS: usize = 20;
/// Deepest chain of includes.
const MAX_INCLUDE_DEPTH: usize = 32;

/// Reads a workflow file with everything that it includes.
pub(crate) struct Reader<'a> {
    pub sources: &'a mut Sources,
    pub errors: &'a mut Collector,
    /// Every file read, as it was named.
    pub files: Vec<PathBuf>,
    read: HashSet<PathBuf>,
    stack: Vec<(PathBuf, PathBuf)>,
}

impl<'a> Reader<'a> {
    pub fn new(sources: &'a mut Sources, errors: &'a mut Collector) -> Self {
        Self { sources, errors, files: Vec::new(), read: HashSet::new(), stack: Vec::new() }
    }

    /// The merged content of the file at `path`, or nothing where it cannot be read at all. `from` is the place that
    /// names it, if a file does.
    pub fn file(&mut self, path: &Path, from: Option<Span>) -> Option<Table> {
        let name = path.display().to_string();
        let bytes = match read_bytes(path) {
            Ok(bytes) => bytes,
            Err(error) => {
                match from {
                    Some(span) => self.errors.add(span, error),
                    None => self.errors.add(Span::NOWHERE, error.in_file(name)),
                }
                return None;
            }
        };
        let folder = path.parent().unwrap_or(Path::new("")).to_owned();
        let (text, invalid_at) = match String::from_utf8(bytes) {
            Ok(text) => (text, None),
            Err(error) => {
                let at = error.utf8_error().valid_up_to();
                (String::from_utf8_lossy(error.as_bytes()).into_owned(), Some(at))
            }
        };
        let source = self.sources.add(Source::new(name.clone(), folder.clone(), text));
        let text = self.sources.get(source)?.text.clone();
        self.files.push(path.to_owned());
        if let Some(at) = invalid_at {
            let error = WorkflowError::new("syntax", "the file is not UTF-8 text").with_hint("save it as UTF-8");
            self.errors.add(Span::new(source, at..at + 3), error);
            return None;
        }
        if from.is_none() && is_blank(&text) {
            let error = WorkflowError::new("empty_workflow", "the workflow file is empty")
                .with_hint("a workflow has at least one stage: `[stage.corpus]` with `kind = \"corpus\"`");
            self.errors.add(Span::new(source, 0..0), error);
            return None;
        }
        let own = self.parse(&text, source)?;
        let identity = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        self.read.insert(identity.clone());
        self.stack.push((identity, path.to_owned()));
        let merged = self.with_includes(own, &folder);
        self.stack.pop();
        Some(merged)
    }

    fn parse(&mut self, text: &str, source: u32) -> Option<Table> {
        let (table, errors) = DeTable::parse_recoverable(text);
        let mut fatal = false;
        let mut repeated_stage = None;
        for error in errors.iter().take(MAX_SYNTAX_ERRORS) {
            let range = error.span().unwrap_or(0..0);
            let span = Span::new(source, range.start.min(text.len())..range.end.min(text.len()));
            let duplicate = error.message() == "duplicate key";
            fatal |= !duplicate;
            if duplicate && repeated_stage.is_some_and(|start| !text[start..range.start].contains("\n[")) {
                continue;
            }
            let found = if duplicate { duplicate_error(text, range.clone()) } else { syntax_error(error.message(), text, range.clone()) };
            if found.code == "duplicate_stage" {
                repeated_stage = Some(range.start);
            }
            self.errors.add(span, found);
        }
        // The rest of a file with a repeated key can still be checked; of one that is no TOML, it cannot.
        (!fatal).then(|| table_from_toml(table.get_ref(), source))
    }

    /// Lays `own` over what it includes.
    fn with_includes(&mut self, mut own: Table, folder: &Path) -> Table {
        let Some(include) = own.shift_remove("include") else { return own };
        let mut merged = Table::default();
        let items = match include.node.data {
            Data::Array(items) => items,
            data => vec![super::node::Node { data, span: include.node.span }],
        };
        for item in items {
            let Some(name) = item.as_str() else {
                let message = format!("`include` must be a list of files, found {}", item.found());
                self.errors.add(item.span, WorkflowError::new("wrong_type", message).with_hint("write `include = [\"other.toml\"]`"));
                continue;
            };
            let path = folder.join(name);
            let identity = path.canonicalize().unwrap_or_else(|_| path.clone());
            if let Some(start) = self.stack.iter().position(|(open, _)| *open == identity) {
                let names = self.stack[start..].iter().map(|(_, path)| path).chain([&path]);
                let names: Vec<_> = names.map(|path| path.file_name().unwrap_or(path.as_os_str()).to_string_lossy()).collect();
                let message = format!("files include each other in a circle: {}", names.join(" -> "));
                self.errors.add(item.span, WorkflowError::new("include_cycle", message));
            } else if self.stack.len() >= MAX_INCLUDE_DEPTH {
                let message = format!("files include each other more than {MAX_INCLUDE_DEPTH} deep");
                self.errors.add(item.span, WorkflowError::new("include_cycle", message));
            } else if !self.read.contains(&identity)
                && let Some(table) = self.file(&path, Some(item.span))
            {
                self.lay_over(&mut merged, table);
            }
        }
        self.lay_over(&mut merged, own);
        merged
    }

    /// Merges files: what the including file says wins, but a stage cannot change its kind on the way.
    fn lay_over(&mut self, under: &mut Table, over: Table) {
        if let (Some(below), Some(above)) = (stages(under), stages(&over)) {
            for (name, stage) in above {
                let kind = |stage: &Entry| Some(stage.node.as_table()?.get("kind")?.node.as_str()?.to_owned());
                let Some(existing) = below.get(name) else { continue };
                if let (Some(first), Some(second)) = (kind(existing), kind(stage))
                    && first != second
                {
                    let message = format!("stage `{name}` is a `{first}` in an included file and a `{second}` here");
                    self.errors
                        .add(stage.key, WorkflowError::new("duplicate_stage", message).with_hint("give one of the two another name"));
                }
            }
        }
        merge(under, over);
    }
}

fn stages(table: &Table) -> Option<&Table> {
    table.get("stage")?.node.as_table()
}

/// Whether a file holds nothing but blanks and comments.
fn is_blank(text: &str) -> bool {
    text.trim_start_matches('\u{feff}').lines().all(|line| line.trim().is_empty() || line.trim_start().starts_with('#'))
}

fn duplicate_error(text: &str, range: std::ops::Range<usize>) -> WorkflowError {
    let key = text.get(range.clone()).unwrap_or("").trim();
    let line = text[..range.start.min(text.len())].rfind('\n').map_or(0, |at| at + 1);
    let header: String = text.get(line..range.end).unwrap_or("").split_whitespace().collect();
    if header.strip_prefix("[stage.").is_some_and(|rest| rest == key) {
        WorkflowError::new("duplicate_stage", format!("stage `{key}` stands here a second time"))
            .with_hint("give one of the two another name, or merge them")
    } else {
        WorkflowError::new("duplicate_key", format!("`{key}` stands here a second time")).with_hint("remove one of the two")
    }
}

fn syntax_error(message: &str, text: &str, range: std::ops::Range<usize>) -> WorkflowError {
    let near = text.get(range).map(|near| near.lines().next().unwrap_or("")).filter(|near| !near.is_empty());
    let message = match near {
        Some(near) => format!("this is not TOML: {message}, at {}", quoted(near)),
        None => format!("this is not TOML: {message}"),
    };
    WorkflowError::new("syntax", message)
}

/// The whole file, or what to say about it.
fn read_bytes(path: &Path) -> Result<Vec<u8>, WorkflowError> {
    let shown = path.display();
    let failed = |error: std::io::Error| match error.kind() {
        ErrorKind::NotFound => {
            let error = WorkflowError::new("missing_file", format!("there is no file `{shown}`"));
            match similar_file(path) {
                Some(hint) => error.with_hint(hint),
                None => error,
            }
        }
        _ => WorkflowError::new("unreadable_file", format!("`{shown}` cannot be read: {}", plain(&error))),
    };
    let metadata = fs::metadata(path).map_err(failed)?;
    if metadata.is_dir() {
        return Err(WorkflowError::new("not_a_file", format!("`{shown}` is a directory, not a workflow file"))
            .with_hint("name the TOML file in it"));
    }
    if !metadata.is_file() {
        return Err(WorkflowError::new("not_a_file", format!("`{shown}` is not a regular file")));
    }
    let too_large = || {
        WorkflowError::new("unreadable_file", format!("`{shown}` is larger than {} MB, which no workflow is", MAX_FILE_BYTES >> 20))
            .with_hint("name a TOML file")
    };
    if metadata.len() > MAX_FILE_BYTES {
        return Err(too_large());
    }
    let mut bytes = Vec::with_capacity(metadata.len() as usize);
    let file = fs::File::open(path).map_err(failed)?;
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_FILE_BYTES { Err(too_large()) } else { Ok(bytes) }
}

/// An operating system error without its number.
pub(crate) fn plain(error: &std::io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or(&text).to_lowercase()
}

/// A hint with a file of the same folder that has almost this name.
pub(crate) fn similar_file(path: &Path) -> Option<String> {
    let wanted = path.file_name()?.to_str()?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut names: Vec<String> =
        fs::read_dir(folder).ok()?.take(1000).flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    // A link that leads nowhere is there by this very name.
    names.retain(|name| name != wanted);
    names.sort();
    did_you_mean(wanted, names.iter().map(String::as_str))
}
