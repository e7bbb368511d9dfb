//! Why a stage runs: the same in every command that says it.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::SystemTime,
};

use serde_json::Value;

use crate::{World, statuses, stderr, stdout};

/// `stage status: reason` of the first stage that runs. `plan`, `status`, `run` and `log` tell scripts the same reason, to the last member,
/// and people the same words.
fn reason(world: &World) -> String {
    let [plan, status] = ["plan", "status"].map(|command| world.json(&[command, "flow.toml", "--json"]));
    assert_eq!(plan, status);
    let first = plan["stages"].as_array().unwrap().iter().find(|stage| !stage["reason"].is_null()).unwrap();
    let (name, reason) = (first["name"].as_str().unwrap(), &first["reason"]);
    let text = reason["text"].as_str().unwrap();
    for command in ["plan", "status"] {
        let table = stdout(&world.rlflow(&[command, "flow.toml"]));
        assert!(table.lines().any(|line| line.starts_with(name) && line.contains(text)), "{command}: {table}");
    }
    let output = world.rlflow(&["run", "flow.toml", "--json"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let events: Vec<Value> = stdout(&output).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for event in ["stage_started", "stage_finished"] {
        let told = events.iter().find(|told| told["event"] == event && told["stage"] == name).unwrap();
        assert_eq!(told["reason"], *reason, "{event}");
    }
    let of = |stages: &Value, key: &str| stages.as_array().unwrap().iter().find(|stage| stage[key] == name).unwrap()["reason"].clone();
    assert_eq!(of(&events.last().unwrap()["stages"], "name"), *reason);
    assert_eq!(of(&world.json(&["log", "--json"])["runs"][0]["stages"], "stage"), *reason);
    format!("{name} {}: {text}", first["status"].as_str().unwrap())
}

/// Every file below a folder, with its size and when it was written.
fn listing(folder: &Path) -> BTreeMap<PathBuf, (u64, SystemTime)> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let metadata = fs::symlink_metadata(&path).unwrap();
        if metadata.is_dir() {
            found.extend(listing(&path));
        } else {
            found.insert(path, (metadata.len(), metadata.modified().unwrap()));
        }
    }
    found
}

/// The largest blob of the store.
fn largest_blob(world: &World) -> PathBuf {
    listing(&world.path(".rlflow/blobs")).into_iter().max_by_key(|(_, (size_bytes, _))| *size_bytes).unwrap().0
}

/// Replaces the content of every file below a folder of the store. What is stored is read-only.
fn rewrite(folder: &Path, change: impl Fn(&mut Vec<u8>)) {
    for path in listing(folder).into_keys() {
        let mut content = fs::read(&path).unwrap();
        change(&mut content);
        fs::remove_file(&path).unwrap();
        fs::write(&path, content).unwrap();
    }
}

#[test]
fn every_command_gives_the_same_reason() {
    let world = World::new();
    let edit = |from: &str, to: &str| {
        let text = fs::read_to_string(world.path("flow.toml")).unwrap();
        assert!(text.contains(from), "`{from}` is not in the workflow");
        fs::write(world.path("flow.toml"), text.replace(from, to)).unwrap();
    };
    let [a, b] = ["texts/a.txt", "texts/b.txt"].map(|name| world.path(name));
    assert_eq!(reason(&world), "corpus run: never ran");
    edit("seed = 1", "seed = 2");
    assert_eq!(reason(&world), "corpus run: seed changed: 1 -> 2");
    edit("vocab_size = 300", "vocab_size = 310");
    assert_eq!(reason(&world), "tokenizer run: vocab_size changed: 300 -> 310");
    let text = fs::read_to_string(&a).unwrap();
    fs::write(&a, text.replace("ships", "boats")).unwrap();
    assert_eq!(reason(&world), "corpus run: data file texts/a.txt changed");
    fs::write(&b, text.replace("Line", "Row")).unwrap();
    assert_eq!(reason(&world), "corpus run: data file texts/b.txt was added");
    let contents = [&a, &b].map(|path| fs::read(path).unwrap());
    fs::write(&a, &contents[1]).unwrap();
    fs::write(&b, &contents[0]).unwrap();
    assert_eq!(reason(&world), "corpus run: its data files are read in another order or as another format");
    fs::remove_file(&b).unwrap();
    assert_eq!(reason(&world), "corpus run: data file texts/b.txt was removed");
    edit("[stage.tokenizer]", "[stage.other]\nkind = \"corpus\"\nsources = [{ path = \"other.txt\" }]\n\n[stage.tokenizer]");
    fs::write(world.path("other.txt"), text.replace("small", "short")).unwrap();
    assert_eq!(reason(&world), "other run: never ran");
    edit("corpus = \"corpus\"", "corpus = \"other\"");
    assert_eq!(reason(&world), "tokenizer run: input corpus now comes from other instead of corpus");

    // What the store lost.
    world.rlflow(&["gc", "--grace", "0s", "--max-size", "1kB"]);
    edit("vocab_size = 310", "vocab_size = 305");
    assert_eq!(reason(&world), "other run: its result text is missing from the store and tokenizer must read it");
    let blob = largest_blob(&world);
    let mut content = fs::read(&blob).unwrap();
    content[0] ^= 1;
    // Blobs are read-only.
    fs::remove_file(&blob).unwrap();
    fs::write(&blob, content).unwrap();
    assert!(world.rlflow(&["fsck", "--repair"]).status.success());
    let damaged = reason(&world);
    assert!(damaged.ends_with(" was found damaged and set aside"), "{damaged}");
    assert_eq!(world.json(&["fsck", "--json"])["ok"], true);
}

/// Only a run sets aside what it makes again: who asks what it would do gets one answer, however often.
#[test]
fn looking_at_damage_changes_neither_the_store_nor_the_reason() {
    let world = World::new();
    let store = world.path(".rlflow");
    assert!(world.rlflow(&["run", "flow.toml", "-q"]).status.success());
    let expect = |expected: &str| {
        let before = listing(&store);
        let looks = ["plan", "plan", "status", "plan"].map(|command| world.json(&[command, "flow.toml", "--json"]));
        assert!(looks.iter().all(|look| *look == looks[0]), "{looks:?}");
        assert_eq!(listing(&store), before);
        assert_eq!(reason(&world), expected);
    };
    // Every blob lost its last byte.
    rewrite(&store.join("blobs"), |content| _ = content.pop());
    fs::write(world.path("flow.toml"), crate::WORKFLOW.replace("vocab_size = 300", "vocab_size = 305")).unwrap();
    expect("corpus run: its result text is damaged and tokenizer must read it");
    assert!(!listing(&store.join("damaged")).is_empty(), "the run left no evidence");
    assert_eq!(statuses(&world.json(&["plan", "flow.toml", "--json"])), ["cached", "cached"]);
    // In every record a bit flipped: they count as none, which is told.
    rewrite(&store.join("actions"), |content| *content.last_mut().unwrap() ^= 1);
    assert!(stderr(&world.rlflow(&["plan", "flow.toml"])).contains("is damaged"));
    expect("corpus run: never ran");
    assert!(listing(&store.join("damaged")).into_keys().any(|path| path.to_string_lossy().contains("damaged/action-")));
}
