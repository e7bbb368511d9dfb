//! What the crates' own tests try a target with.

use std::{fs, path::Path};

/// The beginnings of a target, and inputs that it found its way to from them: `found/TARGET` has one a line, in hexadecimal.
pub fn inputs(target: &str) -> Vec<Vec<u8>> {
    let mut above = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().map(|folder| folder.join("tests/fuzz"));
    let folder = above.find(|folder| folder.join("seeds").is_dir()).expect("the crate is in the repository");
    let seeds = fs::read_dir(folder.join("seeds").join(target)).expect("the target has seeds");
    let mut inputs: Vec<Vec<u8>> = seeds.map(|seed| fs::read(seed.unwrap().path()).unwrap()).collect();
    let found = fs::read_to_string(folder.join("found").join(target)).expect("the target has found something");
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    inputs.extend(found.lines().map(|line| line.as_bytes().chunks(2).map(byte).collect()));
    inputs
}
