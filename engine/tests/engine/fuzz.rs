//! The fuzz target of workflow files, over the beginnings that it starts from: it builds, and none of them breaks it.

#[path = "../../../tests/fuzz/src/folder.rs"]
mod folder;
#[path = "../../../tests/fuzz/src/kinds.rs"]
#[allow(missing_docs)]
mod kinds;
#[path = "../../../tests/fuzz/src/workflow.rs"]
mod workflow;

#[test]
fn no_beginning_breaks_the_target() {
    let seeds = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/seeds/workflow");
    let mut kept = 0;
    for seed in std::fs::read_dir(seeds).unwrap() {
        kept += usize::from(workflow::check(&std::fs::read(seed.unwrap().path()).unwrap()));
    }
    assert!(kept >= 4, "only {kept} are worth keeping");
    std::fs::remove_dir_all(folder::FOLDER.path()).unwrap();
}
