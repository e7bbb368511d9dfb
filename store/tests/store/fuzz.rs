//! The fuzz targets of manifests and actions, over the beginnings that they start from: they build, and none of those breaks them.

#[path = "../../../tests/fuzz/src/action.rs"]
mod action;
#[path = "../../../tests/fuzz/src/folder.rs"]
mod folder;
#[path = "../../../tests/fuzz/src/manifest.rs"]
mod manifest;

#[test]
fn no_beginning_breaks_a_target() {
    let seeds = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/seeds");
    let mut tried = 0;
    for (name, check) in [("action", action::check as fn(&[u8])), ("manifest", manifest::check)] {
        for seed in std::fs::read_dir(seeds.join(name)).unwrap() {
            check(&std::fs::read(seed.unwrap().path()).unwrap());
            tried += 1;
        }
    }
    assert!(tried >= 7, "only {tried} beginnings are there");
    std::fs::remove_dir_all(folder::FOLDER.path()).unwrap();
}
