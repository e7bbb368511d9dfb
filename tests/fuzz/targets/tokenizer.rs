//! See `rlflow_fuzz::tokenizer`.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| rlflow_fuzz::tokenizer::check(input));
