//! See `rlflow_fuzz::data_file`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| rlflow_fuzz::data_file::check(input));
