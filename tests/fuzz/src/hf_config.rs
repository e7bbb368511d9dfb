//! `config.json` of a checkpoint: sizes that planning multiplies, and the same model after it is written again.

use rlflow_hf::{HfConfig, config};
use rlflow_store::Dtype;

/// Fails on a panic, and where a config that was written reads back as another one.
pub fn check(input: &[u8]) {
    let Ok(parsed) = HfConfig::parse(input, None) else { return };
    let HfConfig { model, role } = parsed.clone();
    assert!(model.heads.is_multiple_of(model.kv_heads) && model.head_dim > 0 && model.context > 0 && model.vocab_size > 0);
    assert!(model.parameter_count() > 0);
    let Ok(written) = config::write(&model, role, Dtype::F32, &config::TokenIds::default(), None) else { return };
    assert_eq!(HfConfig::parse(&written, None).expect("what is written can be read"), parsed);
}
