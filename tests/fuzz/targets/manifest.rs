//! See `rlflow_fuzz::manifest`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| rlflow_fuzz::manifest::check(input));
