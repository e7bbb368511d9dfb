//! See `rlflow_fuzz::workflow`.
#![no_main]

use libfuzzer_sys::{Corpus, fuzz_target};
use rlflow_fuzz::workflow::check;

fuzz_target!(|input: &[u8]| -> Corpus { if check(input) { Corpus::Keep } else { Corpus::Reject } });
