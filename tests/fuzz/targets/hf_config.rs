//! See `rlflow_fuzz::hf_config`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| rlflow_fuzz::hf_config::check(input));
