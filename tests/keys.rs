//! Every setting of every real stage kind, as the quickstart uses them: identity settings change their stage's part of
//! the action key, execution settings never do, and spelling every default out changes nothing.

use rlflow_engine::{
    Registry,
    docs::Place,
    workflow::{LoadOptions, load},
};
use tempfile::TempDir;

#[path = "../engine/tests/engine/vary.rs"]
mod vary;

use vary::{Mark, check_key_table, spell_out, vary, write_and_load};

#[test]
fn identity_settings_and_no_others_enter_the_key() {
    let registry = Registry::new(rlflow_stages::kinds());
    let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("workflows/quickstart.toml");
    let workflow = load(&file, &LoadOptions::default(), &registry).unwrap_or_else(|errors| panic!("{errors}"));
    let folder = TempDir::new().unwrap();
    let spelled = write_and_load(&spell_out(&workflow), &folder.path().join("spelled.toml"), &registry).unwrap();
    for (stage, spelled) in workflow.stages.iter().zip(&spelled.stages) {
        assert_eq!((&stage.name, &stage.identity_settings), (&spelled.name, &spelled.identity_settings));
    }
    let mut stuck = Vec::new();
    let mut varied_settings = 0;
    for varied in vary(&workflow, &folder.path().join("varied.toml"), &registry) {
        let name = format!("{}.{}", workflow.stages[varied.stage].name, varied.setting);
        let Some(changed) = varied.workflow else {
            if varied.mark != Mark::Path {
                stuck.push(name);
            }
            continue;
        };
        let same = changed.stages[varied.stage].identity_settings == workflow.stages[varied.stage].identity_settings;
        assert_eq!(same, varied.mark == Mark::Execution, "{name} is marked {:?}", varied.mark);
        varied_settings += 1;
    }
    // A setting may have no second value beside what the others say: a family of networks with one member, a weight of a loss that another
    // setting chooses. Few do.
    assert!(stuck.len() * 8 < varied_settings, "{} of {varied_settings} settings could not be varied: {stuck:?}", stuck.len());
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
