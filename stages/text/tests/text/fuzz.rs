//! The fuzz targets of data files and tokenizers, over what they start from and what they found: they build, and nothing breaks them.

#[path = "../../../../tests/fuzz/src/data_file.rs"]
mod data_file;
#[path = "../../../../tests/fuzz/src/folder.rs"]
mod folder;
#[path = "../../../../tests/fuzz/src/inputs.rs"]
mod inputs;
#[path = "../../../../tests/fuzz/src/parquet.rs"]
mod parquet;
#[path = "../../../../tests/fuzz/src/scratch.rs"]
mod scratch;
#[path = "../../../../tests/fuzz/src/tokenizer.rs"]
mod tokenizer;

#[test]
fn nothing_that_was_found_breaks_a_target() {
    for (name, check) in [("data_file", data_file::check as fn(&[u8])), ("parquet", parquet::check), ("tokenizer", tokenizer::check)] {
        inputs::inputs(name).iter().for_each(|input| check(input));
    }
    std::fs::remove_dir_all(folder::FOLDER.path()).unwrap();
}
