use std::{
    collections::HashMap,
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use rlflow_api::DataSource;
use serde::{Deserialize, Serialize};

use super::{
    WorkflowError,
    node::quoted,
    read::{plain, similar_file},
};

/// Most files that one data source may name.
const MAX_FILES: usize = 100_000;
/// Deepest folder that is looked into.
const MAX_DEPTH: usize = 32;

/// A data source as it was looked for, and what was found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Lookup {
    /// Folder of the file that names it.
    pub folder: PathBuf,
    pattern: String,
    directory: bool,
    endings: Vec<String>,
    /// The files, sorted.
    pub files: Vec<PathBuf>,
}

impl Lookup {
    /// The same as seen from anywhere. Nothing where the current folder is not known.
    pub fn absolute(&self) -> Option<Self> {
        let absolute = |path: &PathBuf| std::path::absolute(path).ok();
        // The folder of `file.toml` is "", which is no path.
        let folder = absolute(&Path::new(".").join(&self.folder))?;
        Some(Self { folder, files: self.files.iter().map(absolute).collect::<Option<_>>()?, ..self.clone() })
    }

    /// Whether the same files are found now. For one that is absolute.
    pub fn finds_the_same(&self) -> bool {
        let endings: Vec<&str> = self.endings.iter().map(String::as_str).collect();
        let found = find(&self.folder, &self.pattern, self.directory, &endings);
        let absolute = |path: &PathBuf| std::path::absolute(path).ok();
        found.is_ok_and(|found| found.iter().map(absolute).eq(self.files.iter().cloned().map(Some)))
    }
}

/// What is looked for where: folder, pattern, whether it is a directory, endings.
type Wanted = (PathBuf, String, bool, &'static [&'static str]);

/// Finds data files; each path is looked up once, however many stages name it.
#[derive(Default)]
pub(crate) struct Finder {
    found: HashMap<Wanted, Result<Vec<PathBuf>, WorkflowError>>,
}

impl Finder {
    /// The files that `source` names, sorted; `folder` is where the file stands that says so.
    pub fn find(&mut self, source: &DataSource, folder: &Path) -> Result<Vec<PathBuf>, WorkflowError> {
        let DataSource { pattern, directory, endings, .. } = source;
        let wanted = (folder.to_owned(), pattern.clone(), *directory, *endings);
        self.found.entry(wanted).or_insert_with(|| find(folder, pattern, *directory, endings)).clone()
    }

    /// Everything that was found.
    pub fn into_lookups(self) -> Vec<Lookup> {
        let lookup = |((folder, pattern, directory, endings), found): (Wanted, Result<Vec<PathBuf>, WorkflowError>)| {
            let endings = endings.iter().map(|ending| (*ending).to_owned()).collect();
            Some(Lookup { folder, pattern, directory, endings, files: found.ok()? })
        };
        self.found.into_iter().filter_map(lookup).collect()
    }
}

fn find(folder: &Path, pattern: &str, is_directory: bool, endings: &[&str]) -> Result<Vec<PathBuf>, WorkflowError> {
    let path = folder.join(pattern);
    if is_directory || !endings.is_empty() && path.is_dir() { directory(&path, pattern, endings) } else { files(folder, pattern) }
}

fn files(folder: &Path, pattern: &str) -> Result<Vec<PathBuf>, WorkflowError> {
    if pattern.trim().is_empty() {
        return Err(WorkflowError::new("missing_file", "the path of a data file must not be empty"));
    }
    let path = folder.join(pattern);
    // A file may well be called `a[1].txt`.
    if !pattern.contains(['*', '?', '[']) || fs::symlink_metadata(&path).is_ok() {
        return file(&path, pattern).map(|()| vec![path]);
    }
    let bad = |message: String| WorkflowError::new("missing_file", format!("{} is no pattern for files: {message}", quoted(pattern)));
    let whole = match (Path::new(pattern).is_absolute(), folder.to_str()) {
        (true, _) => pattern.to_owned(),
        (false, Some("")) => pattern.to_owned(),
        (false, Some(folder)) => format!("{}/{pattern}", glob::Pattern::escape(folder)),
        (false, None) => return Err(bad("the folder's name is not UTF-8".into())),
    };
    let mut found = Vec::new();
    for path in glob::glob(&whole).map_err(|error| bad(error.msg.into()))? {
        let path = path.map_err(|error| {
            let message = format!("`{}` cannot be read: {}", error.path().display(), plain(error.error()));
            WorkflowError::new("unreadable_file", message)
        })?;
        if fs::metadata(&path).is_ok_and(|metadata| metadata.is_dir()) {
            continue;
        }
        file(&path, &path.display().to_string())?;
        found.push(path);
        if found.len() > MAX_FILES {
            return Err(bad(format!("it matches more than {MAX_FILES} files")));
        }
    }
    if let Some(path) = passed_over(&whole) {
        let message = format!("`{}` matches {}, but its name is not UTF-8", path.display(), quoted(pattern));
        return Err(WorkflowError::new("unreadable_file", message).with_hint("rename it, or write a pattern that it does not match"));
    }
    if found.is_empty() {
        let error = WorkflowError::new("missing_file", format!("no file matches `{pattern}`"));
        return Err(error.with_hint(format!("looked in `{}`", folder_name(folder))));
    }
    found.sort();
    Ok(found)
}

/// A file or folder that `pattern` matches but `glob` passes over in silence, because its name is not UTF-8: data would be missing
/// without a word.
fn passed_over(pattern: &str) -> Option<PathBuf> {
    let components: Vec<&str> = pattern.split('/').collect();
    let folders = |pattern: &str| glob::glob(pattern).into_iter().flatten().flatten().filter(|path| path.is_dir());
    for (at, component) in components.iter().enumerate().filter(|(_, component)| component.contains(['*', '?', '['])) {
        let is_last = at + 1 == components.len();
        let above = match (at, components[..at].join("/")) {
            (0, _) => ".".to_owned(),
            (_, above) if above.is_empty() => "/".to_owned(),
            (_, above) => above,
        };
        let is_deep = *component == "**";
        let matched = glob::Pattern::new(component).ok()?;
        let below = is_deep.then(|| folders(&format!("{above}/**"))).into_iter().flatten();
        for entry in folders(&above).chain(below).filter_map(|folder| fs::read_dir(folder).ok()).flatten().flatten() {
            let name = entry.file_name();
            if name.to_str().is_none() && (is_deep || matched.matches(&name.to_string_lossy())) && (is_last || entry.path().is_dir()) {
                return Some(entry.path());
            }
        }
    }
    None
}

/// Whether `path` is a file that can be opened.
fn file(path: &Path, shown: &str) -> Result<(), WorkflowError> {
    let metadata = fs::metadata(path).map_err(|error| unavailable(path, shown, &error))?;
    if metadata.is_dir() {
        return Err(WorkflowError::new("not_a_file", format!("`{shown}` is a directory, where a file belongs"))
            .with_hint(format!("write `{}/*` for the files in it", shown.trim_end_matches('/'))));
    }
    // Opening a pipe would wait for its writer.
    if !metadata.is_file() {
        return Err(WorkflowError::new("not_a_file", format!("`{shown}` is not a regular file")));
    }
    fs::File::open(path).map(drop).map_err(|error| unavailable(path, shown, &error))
}

fn unavailable(path: &Path, shown: &str, error: &std::io::Error) -> WorkflowError {
    match error.kind() {
        ErrorKind::NotFound | ErrorKind::NotADirectory => {
            let is_link = fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_symlink());
            let message = if is_link { format!("`{shown}` is a link to nothing") } else { format!("there is no file `{shown}`") };
            let looked =
                || format!("looked in `{}`; paths are relative to the workflow file", folder_name(path.parent().unwrap_or(Path::new(""))));
            WorkflowError::new("missing_file", message).with_hint(similar_file(path).unwrap_or_else(looked))
        }
        _ => WorkflowError::new("unreadable_file", format!("`{shown}` cannot be read: {}", plain(error))),
    }
}

fn folder_name(folder: &Path) -> String {
    if folder.as_os_str().is_empty() { ".".into() } else { folder.display().to_string() }
}

fn is_wanted(path: &Path, endings: &[&str]) -> bool {
    let name = path.file_name().map(|name| name.to_string_lossy()).unwrap_or_default();
    endings.is_empty() || endings.iter().any(|ending| name.ends_with(ending))
}

/// The files in the directory `path`: those directly in it whose names have one of the endings, or all at any depth.
fn directory(path: &Path, shown: &str, endings: &[&str]) -> Result<Vec<PathBuf>, WorkflowError> {
    if shown.trim().is_empty() {
        return Err(WorkflowError::new("missing_file", "the path of a directory must not be empty"));
    }
    let metadata = fs::metadata(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => {
            let error = WorkflowError::new("missing_file", format!("there is no directory `{shown}`"));
            match similar_file(path) {
                Some(hint) => error.with_hint(hint),
                None => error,
            }
        }
        _ => unavailable(path, shown, &error),
    })?;
    if !metadata.is_dir() {
        return Err(WorkflowError::new("not_a_directory", format!("`{shown}` is a file, where a directory belongs")));
    }
    let mut found = Vec::new();
    let mut open = vec![(path.to_owned(), 0)];
    while let Some((folder, depth)) = open.pop() {
        let entries = fs::read_dir(&folder).map_err(|error| unavailable(&folder, &folder.display().to_string(), &error))?;
        for entry in entries.flatten() {
            let entry = entry.path();
            match fs::metadata(&entry) {
                Ok(metadata) if metadata.is_dir() && endings.is_empty() && depth < MAX_DEPTH => open.push((entry, depth + 1)),
                Ok(metadata) if metadata.is_file() && is_wanted(&entry, endings) => found.push(entry),
                _ => {}
            }
            if found.len() > MAX_FILES {
                return Err(WorkflowError::new("not_a_file", format!("`{shown}` holds more than {MAX_FILES} files")));
            }
        }
    }
    if found.is_empty() {
        let error = WorkflowError::new("missing_file", format!("the directory `{shown}` holds no files"));
        let looked_for = || format!("files that would be read end in {}", endings.join(", "));
        return Err(if endings.is_empty() { error } else { error.with_hint(looked_for()) });
    }
    found.sort();
    Ok(found)
}
