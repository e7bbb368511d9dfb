//! See `rlflow_fuzz::parquet`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| rlflow_fuzz::parquet::check(input));
