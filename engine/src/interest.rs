use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Component, Path, PathBuf},
};

use glob::Pattern;

use crate::workflow::Workflow;

/// What a workflow is read from: which folders to watch, and which changes in them matter.
#[derive(Default)]
pub(crate) struct Interest {
    /// Files as they are named, and what they are where that is a link.
    files: BTreeSet<PathBuf>,
    patterns: Vec<Pattern>,
    /// Folders of which everything matters.
    whole: BTreeSet<PathBuf>,
    /// Folders to watch, and whether with all that is in them. Folders and not files, because editors replace files and
    /// patterns find new ones.
    folders: BTreeMap<PathBuf, bool>,
}

impl Interest {
    /// In a file of which nothing else is known.
    pub fn in_file(path: &Path) -> Self {
        let mut interest = Self::default();
        interest.add_file(path);
        interest
    }

    /// In all that a workflow was read from, and that a pattern may find later.
    pub fn of(workflow: &Workflow) -> Self {
        let mut interest = Self::default();
        let data = workflow.stages.iter().flat_map(|stage| stage.files.iter().flatten());
        let files: BTreeSet<&PathBuf> = workflow.sources.iter().chain(data).collect();
        files.into_iter().for_each(|file| interest.add_file(file));
        let named: BTreeSet<(&str, bool)> = workflow
            .stages
            .iter()
            .flat_map(|stage| &stage.file_patterns)
            .map(|source| (source.pattern.as_str(), source.directory || !source.endings.is_empty()))
            .filter(|(pattern, directory)| *directory || pattern.contains(['*', '?', '[']))
            .collect();
        // A path is relative to the file that it stands in: to whichever of them that is.
        let folders: BTreeSet<PathBuf> = workflow.sources.iter().map(|source| parent(source)).collect();
        for (pattern, directory) in named {
            for folder in &folders {
                if directory {
                    let folder = absolute(&folder.join(pattern));
                    let real = folder.canonicalize().ok();
                    [Some(folder), real].iter().flatten().for_each(|folder| interest.add_folder(folder, true, true));
                } else {
                    interest.add_pattern(folder, pattern);
                }
            }
        }
        interest
    }

    fn add_file(&mut self, path: &Path) {
        // What a link leads to is written to in its own folder.
        for path in [Some(absolute(path)), path.canonicalize().ok()].into_iter().flatten() {
            self.add_folder(&parent(&path), false, false);
            self.files.insert(path);
        }
    }

    fn add_folder(&mut self, folder: &Path, deep: bool, whole: bool) {
        let folder = absolute(folder);
        if !folder.is_dir() {
            return;
        }
        if whole {
            self.whole.insert(folder.clone());
        }
        *self.folders.entry(folder).or_default() |= deep;
    }

    fn add_pattern(&mut self, folder: &Path, pattern: &str) {
        let is_wild = |part: &Component<'_>| part.as_os_str().to_string_lossy().contains(['*', '?', '[']);
        let parts: Vec<Component<'_>> = Path::new(pattern).components().collect();
        let (literal, wild) = parts.split_at(parts.iter().position(is_wild).unwrap_or(parts.len()));
        let base = absolute(&folder.join(literal.iter().collect::<PathBuf>()));
        let wild_path: PathBuf = wild.iter().collect();
        // A change may be told under either name.
        for base in [Some(base.clone()), base.canonicalize().ok()].into_iter().flatten() {
            let Some(whole) = base.to_str().zip(wild_path.to_str()).map(|(base, wild)| format!("{}/{wild}", Pattern::escape(base))) else {
                continue;
            };
            if let Ok(pattern) = Pattern::new(&whole) {
                self.patterns.push(pattern);
                self.add_folder(&base, wild.len() > 1, false);
            }
        }
    }

    /// Folders to watch, and whether with all that is in them.
    pub fn folders(&self) -> impl Iterator<Item = (&Path, bool)> {
        self.folders.iter().map(|(folder, deep)| (folder.as_path(), *deep))
    }

    /// Whether a change of `path` may change the workflow or its data. An empty path stands for anything.
    pub fn concerns(&self, path: &Path) -> bool {
        self.files.contains(path)
            || self.patterns.iter().any(|pattern| pattern.matches_path(path))
            || self.whole.iter().any(|folder| path.starts_with(folder))
            // A folder that came may hold what a pattern finds.
            || self.folders.iter().any(|(folder, deep)| *deep && path.starts_with(folder) && path.is_dir())
            // So does one that went, was moved, or is not named.
            || path.as_os_str().is_empty()
            || self.files.iter().any(|file| file.starts_with(path))
    }
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

fn parent(path: &Path) -> PathBuf {
    match path.parent() {
        Some(folder) if folder != Path::new("") => folder.to_owned(),
        _ => PathBuf::from("."),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::{testing::registry, workflow::load};

    #[test]
    fn what_a_workflow_reads_concerns_it_and_nothing_beside() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        for path in ["flows", "elsewhere", "data/a", "checkpoint/deep"] {
            fs::create_dir_all(root.join(path)).unwrap();
        }
        for path in ["data/a/x.txt", "elsewhere/target.txt", "checkpoint/config.json"] {
            fs::write(root.join(path), "text").unwrap();
        }
        std::os::unix::fs::symlink(root.join("elsewhere/target.txt"), root.join("flows/link.txt")).unwrap();
        let text = "[stage.corpus]\nkind = \"corpus\"\nsources = [{ path = \"../data/*/x.txt\" }, { path = \"link.txt\" }]\n\
             [stage.model]\nkind = \"import\"\npath = \"../checkpoint\"\n";
        fs::write(root.join("flows/flow.toml"), text).unwrap();
        let workflow = load(&root.join("flows/flow.toml"), &Default::default(), &registry()).unwrap();
        let interest = Interest::of(&workflow);
        fs::create_dir_all(root.join("data/new")).unwrap();
        let concerned = [
            "flows/flow.toml",
            "flows/link.txt",
            "elsewhere/target.txt",
            "data/a/x.txt",
            "data/new/x.txt",
            "data/new",
            "data",
            "checkpoint/deep/y",
        ];
        let beside = ["flows/out.log", "flows/.flow.toml.swp", "elsewhere/other.txt", "data/a/y.txt", "data/x.log", "other"];
        assert_eq!(concerned.iter().filter(|path| !interest.concerns(&root.join(path))).collect::<Vec<_>>(), [] as [&&str; 0]);
        assert_eq!(beside.iter().filter(|path| interest.concerns(&root.join(path))).collect::<Vec<_>>(), [] as [&&str; 0]);
        let watched: Vec<(&Path, bool)> = interest.folders().collect();
        for (path, deep) in [("flows", false), ("elsewhere", false), ("data", true), ("checkpoint", true)] {
            assert!(watched.contains(&(&root.join(path), deep)), "{path}: {watched:?}");
        }
    }
}
