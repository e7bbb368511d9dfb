//! The fuzz target of workflow files, over what it starts from and what it found: it builds, and nothing breaks it.

#[path = "../../../tests/fuzz/src/folder.rs"]
mod folder;
#[path = "../../../tests/fuzz/src/inputs.rs"]
mod inputs;
#[path = "../../../tests/fuzz/src/kinds.rs"]
#[allow(missing_docs)]
mod kinds;
#[path = "../../../tests/fuzz/src/workflow.rs"]
mod workflow;

#[test]
fn nothing_that_was_found_breaks_the_target() {
    let kept = inputs::inputs("workflow").iter().filter(|input| workflow::check(input)).count();
    assert!(kept >= 4, "only {kept} are worth keeping");
    std::fs::remove_dir_all(folder::FOLDER.path()).unwrap();
}
