//! The beginnings of the fuzz targets, and inputs that were found with them.

#[path = "../../../tests/fuzz/src/hf_config.rs"]
mod hf_config;
#[path = "../../../tests/fuzz/src/safetensors.rs"]
mod safetensors;

fn each_of(target: &str, check: fn(&[u8])) {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fuzz/seeds").join(target);
    let mut count = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let content = std::fs::read(entry.unwrap().path()).unwrap();
        check(&content);
        // And cut anywhere.
        (0..content.len()).for_each(|length| check(&content[..length]));
        count += 1;
    }
    assert!(count >= 3, "{count} seeds of {target}");
}

#[test]
fn every_seed_is_taken_in() {
    each_of("safetensors", safetensors::check);
    each_of("hf_config", hf_config::check);
}
