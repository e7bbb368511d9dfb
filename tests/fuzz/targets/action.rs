//! See `rlflow_fuzz::action`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| rlflow_fuzz::action::check(input));
