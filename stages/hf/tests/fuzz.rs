//! The beginnings of the fuzz targets, and inputs that were found with them.

#[path = "../../../tests/fuzz/src/hf_config.rs"]
mod hf_config;
#[path = "../../../tests/fuzz/src/inputs.rs"]
mod inputs;
#[path = "../../../tests/fuzz/src/safetensors.rs"]
mod safetensors;

fn each_of(target: &str, check: fn(&[u8])) {
    for content in inputs::inputs(target) {
        check(&content);
        // And cut anywhere.
        (0..content.len()).for_each(|length| check(&content[..length]));
    }
}

#[test]
fn every_seed_is_taken_in() {
    each_of("safetensors", safetensors::check);
    each_of("hf_config", hf_config::check);
}
