//! Every setting of every real stage kind, as the quickstart uses them: identity settings change their stage's part of
//! the action key, execution settings never do, and spelling every default out changes nothing.

use std::{collections::BTreeSet, fs, path::Path};

use rlflow_engine::{
    Registry,
    docs::{Place, key_table},
    workflow::{LoadOptions, load},
};
use tempfile::TempDir;

#[path = "../engine/tests/engine/vary.rs"]
mod vary;

use vary::{Mark, check_key_table, spell_out, vary, write_and_load};

/// Workflows between which every setting has a second value: the quickstart, and a stage of it with what lets others vary.
const BASES: &[(&str, &[&str])] = &[
    ("", &[]),
    ("corpus", &["stage.corpus.sources=[{ path = \"quickstart/corpus.jsonl\", weight = 1.0, epochs = 1.0 }]"]),
    ("corpus", &["stage.corpus.heldout_sources=[{ path = \"quickstart/corpus.jsonl\" }]"]),
    ("instructions", &["stage.instructions.heldout_sources=[{ path = \"quickstart/instructions.jsonl\" }]"]),
    ("pretrain", &["stage.pretrain.train={ epochs = 2.0 }"]),
    ("pretrain", &["stage.pretrain.train={ steps = 100, schedule = \"wsd\", decay_steps = 10 }"]),
    ("sft", &["stage.sft.train={ steps = 100 }"]),
    ("reward_model", &["stage.reward_model.train={ steps = 100 }"]),
    ("dpo", &["stage.dpo.train={ steps = 100 }"]),
    ("sft", &["stage.sft.lora={}"]),
    ("reward_model", &["stage.reward_model.lora={}"]),
    ("actor", &["stage.actor.lora={}"]),
    ("critic", &["stage.critic.lora={}"]),
    ("dpo", &["stage.dpo.lora={}"]),
    ("dpo", &["stage.dpo.loss=\"robust\""]),
    ("dpo", &["stage.dpo.loss=\"ipo\""]),
    ("dpo", &["stage.dpo.loss=\"simpo\""]),
    ("dpo", &["stage.dpo.loss=\"orpo\""]),
    ("dpo", &["stage.dpo.loss=\"kto\""]),
    ("ppo", &["stage.ppo.kl_estimator=\"k3\"", "stage.ppo.inputs.ptx=\"instructions\"", "stage.ppo.ptx_coef=0.1"]),
    ("ppo", &["stage.ppo.kl_controller={ type = \"adaptive\", target = 6.0, horizon = 10000.0 }"]),
];

#[test]
fn identity_settings_and_no_others_enter_the_key() {
    let registry = Registry::new(rlflow_stages::kinds());
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("workflows/quickstart.toml");
    let folder = TempDir::new().unwrap();
    // The kinds that the quickstart does not use.
    let others = folder.path().join("others.toml");
    let checkpoint = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/hf_models/qwen3");
    fs::write(&others, format!("[stage.imported]\nkind = \"import\"\npath = {checkpoint:?}\n")).unwrap();
    let bases = BASES.iter().map(|(name, sets)| (&file, *name, *sets)).chain([(&others, "imported", &[][..])]);
    let mut free: BTreeSet<(String, String)> = BTreeSet::new();
    for (file, name, sets) in bases {
        let sets = LoadOptions { sets: sets.iter().map(|set| (*set).to_owned()).collect() };
        let workflow = load(file, &sets, &registry).unwrap_or_else(|errors| panic!("{sets:?}: {errors}"));
        let spelled = write_and_load(&spell_out(&workflow), &folder.path().join("spelled.toml"), &registry).unwrap();
        for (stage, spelled) in workflow.stages.iter().zip(&spelled.stages) {
            assert_eq!((&stage.name, &stage.identity_settings), (&spelled.name, &spelled.identity_settings));
        }
        for varied in vary(&workflow, &folder.path().join("varied.toml"), &registry, |stage| name.is_empty() || stage == name) {
            let stage = &workflow.stages[varied.stage];
            let Some(changed) = varied.workflow else { continue };
            let same = changed.stages[varied.stage].identity_settings == stage.identity_settings;
            assert_eq!(same, varied.mark == Mark::Execution, "{}.{} is marked {:?} ({sets:?})", stage.name, varied.setting, varied.mark);
            free.extend(with_tables(&varied.setting).into_iter().map(|setting| (stage.kind.name().to_owned(), setting)));
        }
    }
    // One that cannot be varied in any of them needs a base of its own.
    let table = key_table(&registry);
    let identity = table.into_iter().filter(|entry| entry.place == Place::Key).map(|entry| (entry.kind.to_owned(), entry.setting));
    let stuck: Vec<_> = identity.filter(|setting| !free.contains(setting)).collect();
    assert!(stuck.is_empty(), "no other value of these was tried: {stuck:?}");
}

/// A setting and the tables and lists that it stands in, as the table of settings names them: `sources[0].field` is
/// `sources[].field`, in `sources`.
fn with_tables(setting: &str) -> Vec<String> {
    let numbers = |character: char| character.is_ascii_digit();
    let mut parts: Vec<String> = Vec::new();
    let mut all = Vec::new();
    for part in setting.split('.') {
        let (name, index) = part.split_once('[').map_or((part, false), |(name, rest)| (name, rest.trim_matches(numbers) == "]"));
        parts.push(name.to_owned());
        all.push(parts.join("."));
        if index {
            parts.last_mut().unwrap().push_str("[]");
        }
    }
    all
}

#[test]
fn the_table_of_what_enters_a_key_has_every_setting_of_every_real_kind() {
    let table = check_key_table(&Registry::new(rlflow_stages::kinds()));
    let place = |kind: &str, setting: &str| {
        table.iter().find(|entry| (entry.kind, entry.setting.as_str()) == (kind, setting)).map(|entry| entry.place)
    };
    assert_eq!(place("dpo", "beta"), Some(Place::Key));
    assert_eq!(place("dpo", "precision"), Some(Place::Key));
    assert_eq!(place("dpo", "zero"), Some(Place::Execution));
    assert_eq!(place("ppo", "snapshot_keep"), Some(Place::Execution));
}
