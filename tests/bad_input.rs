//! Every wrong workflow file under `tests/bad_input` with its whole report, as the command line prints it.

use std::{fs, path::Path};

use rlflow_engine::{
    Registry,
    workflow::{LoadOptions, load},
};

#[test]
fn wrong_files_are_reported_whole() {
    // Tests run in the folder of the package, so that no machine's paths get into the snapshots.
    let folder = Path::new("tests/bad_input");
    let registry = Registry::new(rlflow_stages::kinds());
    let chain = folder.join("parts/chain.part");
    if let Err(errors) = load(&chain, &LoadOptions::default(), &registry) {
        panic!("the chain that the others break is broken itself:\n{errors}");
    }
    let mut paths: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
    paths.sort();
    assert!(paths.len() >= 60, "only {} files", paths.len());
    let mut accepted = Vec::new();
    insta::with_settings!({ snapshot_path => "bad_input/expected", prepend_module_to_snapshot => false, omit_expression => true }, {
        for path in &paths {
            match load(path, &LoadOptions::default(), &registry) {
                Ok(_) => accepted.push(path.display().to_string()),
                Err(errors) => insta::assert_snapshot!(path.file_stem().unwrap().to_str().unwrap(), errors.to_string()),
            }
        }
    });
    assert!(accepted.is_empty(), "accepted: {accepted:?}");
}
