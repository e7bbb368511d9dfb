//! A workflow file, `--set` arguments and an included file, by `workflow::load`. The input is split at lines that begin with `#%`:
//! before the first is the workflow file, a part after `#%set` is an argument, and one after `#%part` is `part.toml`.

use std::{fs, sync::LazyLock};

use rlflow_engine::{
    Registry,
    workflow::{LoadOptions, load},
};

use super::{folder::FOLDER, kinds};

static REGISTRY: LazyLock<Registry> = LazyLock::new(|| {
    fs::create_dir_all(FOLDER.path().join("data")).expect("a folder can be made");
    fs::write(FOLDER.path().join("data/a.txt"), "a").expect("a file can be written");
    Registry::new(kinds::all())
});

/// False for inputs that are not worth keeping.
pub fn check(input: &[u8]) -> bool {
    // Searching the machine's own files tells nothing about the parser and lasts for ever.
    if input.windows(2).any(|pair| pair == b"**" || pair == b"..")
        || input.windows(2).any(|pair| pair[1] == b'/' && matches!(pair[0], b'"' | b'\'' | b'='))
    {
        return false;
    }
    let registry = &*REGISTRY;
    let mut options = LoadOptions::default();
    let (mut main, mut part) = (Vec::new(), Vec::new());
    for (at, piece) in split(input).into_iter().enumerate() {
        if at == 0 {
            main = piece.to_vec();
        } else if let Some(argument) = piece.strip_prefix(b"set") {
            options.sets.push(String::from_utf8_lossy(argument).trim().to_owned());
        } else if let Some(text) = piece.strip_prefix(b"part") {
            part = text.to_vec();
        }
    }
    let path = FOLDER.path().join("workflow.toml");
    fs::write(&path, main).expect("a file can be written");
    fs::write(FOLDER.path().join("part.toml"), part).expect("a file can be written");
    match load(&path, &options, registry) {
        Ok(workflow) => assert!(!workflow.stages.is_empty()),
        // What is told must be tellable.
        Err(errors) => assert!(!errors.to_string().is_empty()),
    }
    true
}

fn split(input: &[u8]) -> Vec<&[u8]> {
    let mut pieces = Vec::new();
    let mut rest = input;
    while let Some(at) = rest.windows(3).position(|window| window == b"\n#%") {
        pieces.push(&rest[..at]);
        rest = &rest[at + 3..];
    }
    pieces.push(rest);
    pieces
}
