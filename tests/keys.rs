//! Every setting of every real stage kind, as the quickstart uses them: identity settings change their stage's action key, execution
//! settings never do, and spelling every default out changes nothing. So does every data file, and the seed of kinds that draw.
//! What is tried comes from the kinds' schemas: a new setting, or a new setting that names files, cannot be forgotten.

use std::{collections::BTreeSet, fs, path::Path};

use rlflow_api::DeviceSpec;
use rlflow_engine::{
    DeviceInfo, Host, Plan, Registry, Request,
    docs::{Place, key_table, kinds_markdown},
    workflow::{LoadOptions, Workflow, load},
};
use rlflow_store::{Digest, Store};

#[path = "chain/fixture.rs"]
#[allow(dead_code, reason = "the harness `chain` uses the rest")]
mod fixture;
#[path = "../engine/tests/engine/vary.rs"]
mod vary;

use fixture::{Fixture, SHRINK};
use vary::{Mark, check_key_table, spell_out, vary, write_and_load};

/// Workflows between which every setting has a second value: the quickstart, and a stage of it with what lets others vary.
const BASES: &[(&str, &[&str])] = &[
    ("", &[]),
    ("corpus", &["stage.corpus.sources=[{ path = \"quickstart/corpus.jsonl\", weight = 1.0, epochs = 1.0 }]"]),
    ("corpus", &["stage.corpus.heldout_sources=[{ path = \"quickstart/corpus.jsonl\" }]"]),
    ("instructions", &["stage.instructions.heldout_sources=[{ path = \"quickstart/instructions.jsonl\" }]"]),
    ("pretrain", &["stage.pretrain.train={ epochs = 2.0 }"]),
    ("pretrain", &["stage.pretrain.train={ steps = 100, schedule = \"wsd\", decay_steps = 10 }"]),
    ("sft", &["stage.sft.train={ epochs = 2.0 }"]),
    ("reward_model", &["stage.reward_model.train={ epochs = 2.0 }"]),
    ("dpo", &["stage.dpo.train={ epochs = 2.0 }"]),
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

/// What the quickstart does not use: a checkpoint, and a tokenizer of it.
const OTHERS: &str = r#"
[stage.imported]
kind = "import"
path = "checkpoint"
[stage.finished]
kind = "tokenizer"
path = "checkpoint/tokenizer.json"
config = "checkpoint/tokenizer_config.json"
chat_template_file = "checkpoint/chat_template.jinja"
"#;

/// The quickstart, shrunk, with its results: what each stage reads is known, so that each has a key.
struct World {
    fixture: Fixture,
    registry: Registry,
    store: Store,
    host: Host,
}

impl World {
    fn new() -> Self {
        let fixture = Fixture::new();
        fixture.run("store", &[]).succeeded();
        fs::write(fixture.path("others.toml"), OTHERS).unwrap();
        fs::create_dir(fixture.path("checkpoint")).unwrap();
        for entry in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/hf_models/qwen3")).unwrap() {
            let entry = entry.unwrap();
            fs::copy(entry.path(), fixture.path("checkpoint").join(entry.file_name())).unwrap();
        }
        let store = Store::open(&fixture.path("store")).unwrap();
        // Whatever a setting asks for fits.
        let cpu = DeviceInfo { spec: DeviceSpec::Cpu, name: "test".into(), memory_bytes: u64::MAX / 4 };
        let host = Host { devices: vec![cpu], numerics: "test".into(), no_gpu: None, crew: None };
        Self { fixture, registry: Registry::new(rlflow_stages::kinds()), store, host }
    }

    /// File, the only stage that is looked at (all, if empty), and settings.
    fn bases(&self) -> impl Iterator<Item = (&'static str, &'static str, Vec<&'static str>)> {
        let quickstart = BASES.iter().map(|(name, sets)| ("quickstart.toml", *name, [SHRINK, sets].concat()));
        quickstart.chain([("others.toml", "", Vec::new())])
    }

    fn load(&self, file: &str, sets: &[&str]) -> Result<Workflow, String> {
        let sets = LoadOptions { sets: sets.iter().map(|set| (*set).to_owned()).collect() };
        load(&self.fixture.path(file), &sets, &self.registry).map_err(|errors| errors.to_string())
    }

    /// The keys of all stages; none of those below one that has no result.
    fn keys(&self, workflow: &Workflow) -> Vec<Option<Digest>> {
        let plan = Plan::new(workflow, &self.store, &self.host, &Request::default()).unwrap_or_else(|error| panic!("{error}"));
        let mut keys = vec![None; workflow.stages.len()];
        plan.stages.iter().for_each(|planned| keys[planned.stage] = planned.key);
        keys
    }
}

#[test]
fn identity_settings_and_no_others_enter_the_key() {
    let world = World::new();
    let registry = &world.registry;
    let mut free: BTreeSet<(String, String)> = BTreeSet::new();
    for (file, name, sets) in world.bases() {
        let workflow = world.load(file, &sets).unwrap_or_else(|errors| panic!("{sets:?}: {errors}"));
        let keys = world.keys(&workflow);
        let spelled = write_and_load(&spell_out(&workflow), &world.fixture.path("spelled.toml"), registry).unwrap();
        assert_eq!(world.keys(&spelled), keys, "{sets:?}: with every default spelled out");
        for varied in vary(&workflow, &world.fixture.path("varied.toml"), registry, |stage| name.is_empty() || stage == name) {
            let stage = &workflow.stages[varied.stage];
            let Some(changed) = varied.workflow else { continue };
            let what = format!("{}.{}, which is marked {:?} ({sets:?})", stage.name, varied.setting, varied.mark);
            let (old, new) = (keys[varied.stage].expect(&what), world.keys(&changed)[varied.stage].expect(&what));
            assert_eq!(old == new, varied.mark == Mark::Execution, "{what}");
            free.extend(with_tables(&varied.setting).into_iter().map(|setting| (stage.kind.name().to_owned(), setting)));
        }
    }
    // One that cannot be varied in any of them needs a base of its own.
    let table = key_table(registry);
    let identity = table.into_iter().filter(|entry| entry.place == Place::Key).map(|entry| (entry.kind.to_owned(), entry.setting));
    let stuck: Vec<_> = identity.filter(|setting| !free.contains(setting)).collect();
    assert!(stuck.is_empty(), "no other value of these was tried: {stuck:?}");
}

#[test]
fn every_data_file_and_the_seed_of_kinds_that_draw_enter_the_key() {
    let world = World::new();
    let (mut flipped, mut seeded) = (BTreeSet::new(), BTreeSet::new());
    for (file, name, sets) in world.bases() {
        let workflow = world.load(file, &sets).unwrap();
        let keys = world.keys(&workflow);
        for (at, stage) in workflow.stages.iter().enumerate().filter(|(_, stage)| name.is_empty() || stage.name == name) {
            let seed = format!("stage.{}.seed=77", stage.name);
            let other = world.load(file, &[&sets[..], &[&seed]].concat()).unwrap();
            assert_eq!(world.keys(&other)[at] != keys[at], stage.kind.draws(), "{seed}");
            seeded.insert(stage.kind.name());
            for (source, path) in
                stage.file_patterns.iter().zip(&stage.files).flat_map(|(source, paths)| paths.iter().map(move |path| (source, path)))
            {
                let content = fs::read(path).unwrap();
                // The first byte, the last, and some between. Planning reads some files, too: what it refuses has no key.
                let mut tried = 0;
                for byte in (0..=20).map(|part| part * (content.len() - 1) / 20) {
                    let mut other = content.clone();
                    other[byte] ^= 1;
                    fs::write(path, other).unwrap();
                    let Ok(changed) = world.load(file, &sets) else { continue };
                    assert_ne!(world.keys(&changed)[at].unwrap(), keys[at].unwrap(), "{}: byte {byte} of {}", stage.name, path.display());
                    tried += 1;
                }
                assert!(tried > 0, "{} was never read with another byte", path.display());
                fs::write(path, &content).unwrap();
                flipped.extend(with_tables(&source.setting).into_iter().map(|setting| (stage.kind.name(), setting)));
            }
        }
        assert_eq!(world.keys(&world.load(file, &sets).unwrap()), keys, "with the old contents again");
    }
    let all: BTreeSet<&str> = world.registry.iter().map(|kind| kind.name()).collect();
    assert_eq!(seeded, all);
    let paths = key_table(&world.registry).into_iter().filter(|entry| entry.place == Place::Path);
    let forgotten: Vec<_> = paths.filter(|entry| !flipped.contains(&(entry.kind, entry.setting.clone()))).collect();
    assert!(forgotten.is_empty(), "no file of these was changed: {forgotten:?}");
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
    let registry = Registry::new(rlflow_stages::kinds());
    let table = check_key_table(&registry);
    let place = |kind: &str, setting: &str| {
        table.iter().find(|entry| (entry.kind, entry.setting.as_str()) == (kind, setting)).map(|entry| entry.place)
    };
    assert_eq!(place("dpo", "beta"), Some(Place::Key));
    assert_eq!(place("dpo", "precision"), Some(Place::Key));
    assert_eq!(place("dpo", "zero"), Some(Place::Execution));
    assert_eq!(place("ppo", "snapshot_keep"), Some(Place::Execution));
    let written = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("stages/KINDS.md")).unwrap();
    assert!(written == kinds_markdown(&registry), "stages/KINDS.md is old: `rlflow schema --markdown > stages/KINDS.md` makes it");
}
