//! The fuzz targets of manifests and actions, over what they start from and what they found: they build, and nothing breaks them.

#[path = "../../../tests/fuzz/src/action.rs"]
mod action;
#[path = "../../../tests/fuzz/src/folder.rs"]
mod folder;
#[path = "../../../tests/fuzz/src/inputs.rs"]
mod inputs;
#[path = "../../../tests/fuzz/src/manifest.rs"]
mod manifest;

#[test]
fn nothing_that_was_found_breaks_a_target() {
    for (name, check) in [("action", action::check as fn(&[u8])), ("manifest", manifest::check)] {
        inputs::inputs(name).iter().for_each(|input| check(input));
    }
    std::fs::remove_dir_all(folder::FOLDER.path()).unwrap();
}
