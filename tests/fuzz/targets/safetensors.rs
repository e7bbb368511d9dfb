//! See `rlflow_fuzz::safetensors`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| rlflow_fuzz::safetensors::check(input));
