use std::{fs, path::Path};

use super::*;
use crate::testing::registry;

/// Folder of the wrong workflow files, relative to the crate, so that no machine's paths get into snapshots.
const BAD_INPUT: &str = "tests/bad_input";

fn failing(path: &Path, sets: &[&str]) -> String {
    let options = LoadOptions { sets: sets.iter().map(|set| (*set).to_owned()).collect() };
    match load(path, &options, &registry()) {
        Ok(_) => panic!("{} was accepted", path.display()),
        Err(errors) => errors.to_string(),
    }
}

/// Every file under `tests/bad_input` with its report.
#[test]
fn wrong_files_are_reported_whole() {
    let mut paths: Vec<_> = fs::read_dir(BAD_INPUT).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
    paths.sort();
    assert!(paths.len() >= 30);
    for path in paths {
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let report = failing(&path, &[]);
        insta::with_settings!({ snapshot_path => "../../tests/bad_input/expected", prepend_module_to_snapshot => false, omit_expression => true }, {
            insta::assert_snapshot!(name, report);
        });
    }
}
