//! Collection, checking and accounting.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    time::{Duration, SystemTime},
};

use rlflow_store::{Artifact, Digest, Dtype, GcOptions, Retain, SnapshotLimit, Store};
use serde_json::json;

use crate::{
    forks::no_forks,
    support::{action, fast_store, key},
};

const ONLY_NEWEST: SnapshotLimit = SnapshotLimit { newest: 1, bytes: u64::MAX };

const NOW: GcOptions = GcOptions { dry_run: false, keep_last: 1, max_size_bytes: None, grace: Duration::ZERO };

/// Runs a stage that reads `inputs`: two tensors, the first the same for all.
fn run(store: &Store, stage: &str, time: f64, inputs: &[(&str, Digest)]) -> Artifact {
    let mut builder = store.artifact("policy");
    builder.put_tensor("frozen", Dtype::U8, &[1000], &[1; 1000]).unwrap();
    builder.put_tensor("trained", Dtype::U8, &[500], &stage.bytes().cycle().take(500).collect::<Vec<_>>()).unwrap();
    let artifact = builder.publish().unwrap();
    let mut record = action(stage, &[("model", artifact.digest())]);
    record.provenance.started_at = time;
    record.provenance.files = vec![("data.txt".into(), key("data"))];
    let inputs = inputs.iter().map(|(stage, digest)| ((*stage).to_owned(), *digest)).collect();
    record.provenance.inputs.insert("model".into(), inputs);
    store.put_action(&record).unwrap();
    artifact
}

#[test]
fn what_no_root_reaches_goes_and_the_rest_stays() {
    let (_folder, store) = fast_store();
    let base = run(&store, "base", 1.0, &[]);
    let sft = run(&store, "sft", 2.0, &[("base", base.digest())]);
    let old = run(&store, "old", 3.0, &[("base", base.digest())]);
    let pinned = run(&store, "pinned", 4.0, &[("base", base.digest())]);
    store.record_use("a.toml", &[key("old"), key("base")]).unwrap();
    store.record_use("a.toml", &[key("sft")]).unwrap();
    store.pin(pinned.digest(), "for the paper").unwrap();
    let loose = store.put_blob(b"nobody names this").unwrap();

    let two = store.gc(&GcOptions { dry_run: true, keep_last: 2, ..NOW }).unwrap();
    assert!(two.dry_run);
    let names: Vec<_> = two.removed.iter().map(|removed| removed.name.clone()).collect();
    assert_eq!(names, [loose.to_string()], "keeping two states must keep all results");
    let graced = store.gc(&GcOptions { grace: Duration::from_secs(3600), ..NOW }).unwrap();
    assert_eq!(graced.removed, []);

    let planned = store.gc(&GcOptions { dry_run: true, ..NOW }).unwrap();
    assert!(store.contains_artifact(base.digest()), "a dry run removed something");
    let report = store.gc(&NOW).unwrap();
    assert_eq!(report.removed, planned.removed);
    assert_eq!((report.freed_bytes, report.kept_bytes), (planned.freed_bytes, planned.kept_bytes));
    assert!(store.contains_artifact(sft.digest()) && store.contains_artifact(pinned.digest()));
    assert!(!store.contains_artifact(old.digest()) && !store.contains_artifact(base.digest()));
    assert_eq!(store.action(key("old")).unwrap(), None);
    assert!(store.action(key("base")).unwrap().is_some(), "lineage needs the records of ancestors");
    assert!(store.blob(loose).unwrap().is_none());
    assert_eq!(report.kept_blobs, 3, "the frozen tensor and two trained ones");
    assert!(store.fsck(false).unwrap().is_clean());
    let lineage = store.lineage(sft.digest()).unwrap();
    assert_eq!(lineage.len(), 2);
    assert_eq!(lineage[1].maker.as_ref().unwrap().stage, "base");
    assert_eq!(lineage[1].maker.as_ref().unwrap().files, [("data.txt".to_owned(), key("data"))]);
    assert_eq!(lineage[1].artifact_type, None, "the base checkpoint itself was collected");

    assert!(store.unpin(pinned.digest()).unwrap() && !store.unpin(pinned.digest()).unwrap());
    store.gc(&NOW).unwrap();
    assert!(!store.contains_artifact(pinned.digest()) && store.contains_artifact(sft.digest()));
}

#[test]
fn a_size_limit_gives_up_the_oldest_results_first() {
    let (_folder, store) = fast_store();
    let artifacts: Vec<_> = (0..4).map(|n| run(&store, &format!("s{n}"), f64::from(n), &[])).collect();
    let keys: Vec<_> = (0..4).map(|n| key(&format!("s{n}"))).collect();
    store.record_use("a.toml", &keys).unwrap();
    store.pin(keys[0], "").unwrap();
    // The frozen tensor and three trained ones take 2,500 bytes.
    store.gc(&GcOptions { max_size_bytes: Some(2_500), ..NOW }).unwrap();
    let present: Vec<_> = artifacts.iter().map(|artifact| store.contains_artifact(artifact.digest())).collect();
    assert_eq!(present, [true, false, true, true]);
    assert!(store.action(keys[1]).unwrap().is_some(), "the record stays: the result is made again only when it is read");
}

#[test]
fn superseded_snapshots_free_their_tensors_but_never_shared_ones() {
    let _alone = no_forks();
    let (_folder, store) = fast_store();
    let final_tensor = vec![9; 5_000];
    let mut builder = store.artifact("policy");
    builder.put_tensor("w", Dtype::U8, &[5_000], &final_tensor).unwrap();
    let set = store.snapshots(key("prefix"));
    let save = |step: u64, content: &[u8]| {
        let mut state = set.builder();
        state.put_tensor("w", Dtype::U8, &[content.len() as u64], content).unwrap();
        set.save(step, Retain::Latest, json!({}), state, ONLY_NEWEST).unwrap()
    };
    save(1, &[1; 6_000]);
    save(2, &final_tensor);
    let artifact = builder.publish().unwrap();
    save(3, &[3; 7_000]);
    let usage = store.usage().unwrap();
    assert_eq!(usage.physical_bytes, 12_000);
    assert_eq!(&*artifact.read("w").unwrap(), &*final_tensor);
    store.record_use("a.toml", &[key("prefix")]).unwrap();
    store.pin(artifact.digest(), "").unwrap();
    store.gc(&NOW).unwrap();
    assert_eq!(set.list().unwrap().len(), 1);
    store.record_use("a.toml", &[]).unwrap();
    store.gc(&NOW).unwrap();
    assert_eq!(set.list().unwrap().len(), 0);
    assert_eq!(store.usage().unwrap().physical_bytes, 5_000);
}

#[test]
fn an_unpublished_artifact_survives_a_collection_beside_it() {
    let (_folder, store) = fast_store();
    let first = run(&store, "first", 1.0, &[]);
    let mut builder = store.artifact("policy");
    builder.share(first.manifest().entry("trained").unwrap()).unwrap();
    builder.put_tensor("again", Dtype::U8, &[1000], &[1; 1000]).unwrap();
    builder.put("new", b"new").unwrap();
    Store::open(store.folder()).unwrap().gc(&NOW).unwrap();
    assert!(!store.contains_artifact(first.digest()));
    let artifact = builder.publish().unwrap();
    artifact.verify().unwrap();
    assert!(store.contains_artifact(artifact.digest()));
}

#[test]
fn runs_go_when_they_are_old_or_many_but_not_those_behind_kept_results() {
    let _alone = no_forks();
    let (_folder, store) = fast_store();
    let begin = |name: &str| {
        let folder = store.folder().join("runs").join(name);
        fs::create_dir_all(folder.join("tensorboard")).unwrap();
        fs::write(folder.join("events.jsonl"), "{}\n").unwrap();
    };
    // Of years ago: of a kept result, of a pinned one, of a collected one, and of none.
    for (name, stage) in [("a", "kept"), ("b", "pinned"), ("c", "collected"), ("d", "")] {
        let name = format!("20200101T00000{}.000000Z", name.as_bytes()[0] - b'a');
        begin(&name);
        if !stage.is_empty() {
            let mut record = action(stage, &[("model", run(&store, stage, 1.0, &[]).digest())]);
            record.provenance.run_id = name;
            store.put_action(&record).unwrap();
        }
    }
    let live = store.begin_run(&json!({"event": "run"})).unwrap();
    // More than are kept, all of today.
    let today = &live.id()[..9];
    (0..1100).for_each(|n| begin(&format!("{today}{:02}{:02}{:02}.000001Z", n / 3600, n / 60 % 60, n % 60)));
    store.record_use("a.toml", &[key("kept")]).unwrap();
    store.pin(key("pinned"), "").unwrap();
    let names = || -> BTreeSet<String> {
        store.runs().unwrap().iter().map(|run| run.file_name().unwrap().to_string_lossy().into_owned()).collect()
    };
    let before = names();
    store.gc(&GcOptions { grace: Duration::from_secs(3600), ..NOW }).unwrap();
    assert_eq!(names(), before, "a run went in its grace period");
    let report = store.gc(&NOW).unwrap();
    let left = names();
    assert_eq!(report.removed.iter().filter(|removed| removed.what == "run").count(), before.len() - left.len());
    let old = |second: u8| left.contains(&format!("20200101T00000{second}.000000Z"));
    assert_eq!([0, 1, 2, 3].map(old), [true, true, false, false]);
    assert!(left.contains(live.id()), "the record of a run that is not over went");
    assert!((1002..=1003).contains(&left.len()), "{} runs are left", left.len());
    let newest = |names: &BTreeSet<String>| names.iter().rev().take(1000).cloned().collect::<Vec<_>>();
    assert_eq!(newest(&left), newest(&before));
    live.append(&json!({"event": "finished"})).unwrap();
}

#[test]
fn times_that_are_yet_to_come_count_as_young() {
    let (_folder, store) = fast_store();
    let artifact = run(&store, "sft", 1.0, &[]);
    let hex = key("sft").to_string();
    let action = store.folder().join("actions").join(&hex[..2]).join(&hex);
    File::open(&action).unwrap().set_modified(SystemTime::now() + Duration::from_secs(100_000)).unwrap();
    store.gc(&NOW).unwrap();
    artifact.verify().unwrap();
    File::open(&action).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
    store.gc(&NOW).unwrap();
    assert!(!store.contains_artifact(artifact.digest()));
}

#[test]
fn sizes_are_counted_once_where_shared() {
    let (_folder, store) = fast_store();
    run(&store, "base", 1.0, &[]);
    run(&store, "sft", 2.0, &[]);
    let usage = store.usage().unwrap();
    assert_eq!((usage.logical_bytes, usage.physical_bytes, usage.unreferenced_bytes), (3_000, 2_000, 0));
    for stage in &usage.stages {
        assert_eq!((stage.logical_bytes, stage.physical_bytes, stage.shared_bytes), (1_500, 1_500, 1_000), "{}", stage.stage);
    }
}

#[test]
fn fsck_finds_every_kind_of_damage_and_repairs_it() {
    let damages: [(&str, &str); 4] = [("blobs", "blob"), ("manifests", "manifest"), ("actions", "action"), ("partial", "snapshot")];
    for (folder_name, what) in damages {
        let (_folder, store) = fast_store();
        let artifact = run(&store, "sft", 1.0, &[]);
        let set = store.snapshots(key("prefix"));
        let mut state = set.builder();
        state.put("a", b"state").unwrap();
        set.save(1, Retain::Keep, json!({}), state, ONLY_NEWEST).unwrap();
        assert!(store.fsck(false).unwrap().is_clean());
        let shard = fs::read_dir(store.folder().join(folder_name)).unwrap().next().unwrap().unwrap().path();
        let file = fs::read_dir(shard).unwrap().next().unwrap().unwrap().path();
        let mut bytes = fs::read(&file).unwrap();
        let last = bytes.len() - 3;
        bytes[last] ^= 4;
        fs::remove_file(&file).unwrap();
        fs::write(&file, bytes).unwrap();

        let report = store.fsck(false).unwrap();
        assert!(report.problems.iter().any(|problem| problem.what == what && !problem.repaired), "{what}: {:?}", report.problems);
        assert!(file.exists(), "fsck without repair moved something");
        let report = store.fsck(true).unwrap();
        assert!(report.problems.iter().all(|problem| problem.repaired), "{:?}", report.problems);
        assert!(store.fsck(false).unwrap().is_clean(), "{what}: {:?}", store.fsck(false).unwrap());
        let again = run(&store, "sft", 1.0, &[]);
        assert_eq!(again.digest(), artifact.digest());
        again.verify().unwrap();
    }
}
