use std::fs;

use rlflow_store::{Digest, Dtype, LeaseOutcome, Retain, SnapshotLimit, Store, StoreError};
use serde_json::json;

use crate::support::{action, holder, key, new_store};

const ONLY_NEWEST: SnapshotLimit = SnapshotLimit { newest: 1, bytes: u64::MAX };

#[test]
fn a_result_is_found_again_by_another_store_object() {
    let (_folder, store) = new_store();
    let large: Vec<u8> = (0..1_000_000_u32).flat_map(u32::to_le_bytes).collect();
    let mut builder = store.artifact("policy");
    builder.put("config.json", b"{}").unwrap();
    builder.put("empty", b"").unwrap();
    builder.put_tensor("model.w", Dtype::U32, &[1000, 1000], &large).unwrap();
    builder.metadata(json!({"b": 1, "a": {"d": 0.1, "c": null}}));
    let artifact = builder.publish().unwrap();
    store.put_action(&action("sft", &[("model", artifact.digest())])).unwrap();

    let again = Store::open(store.folder()).unwrap();
    let record = again.action(key("sft")).unwrap().unwrap();
    assert_eq!(record, action("sft", &[("model", artifact.digest())]));
    let found = again.open_artifact(record.outputs["model"]).unwrap().unwrap();
    assert_eq!(&*found.read("model.w").unwrap(), &*large);
    assert_eq!(&*found.read("empty").unwrap(), b"");
    assert_eq!(found.manifest(), artifact.manifest());
    assert!(matches!(found.read("nothing"), Err(StoreError::EntryName { .. })));
    assert_eq!(again.action(key("other")).unwrap(), None);
    assert!(again.open_artifact(key("other")).unwrap().is_none());
}

#[test]
fn the_digest_names_canonical_bytes() {
    let (_folder, store) = new_store();
    let publish = |metadata, names: [&str; 2]| {
        let mut builder = store.artifact("text");
        for name in names {
            builder.put(name, name.as_bytes()).unwrap();
        }
        builder.metadata(metadata);
        builder.publish().unwrap().digest()
    };
    let digest = publish(json!({"a": 1, "é": [true]}), ["x", "y"]);
    assert_eq!(digest, publish(serde_json::from_str(r#" {"é" : [ true ], "a":1}"#).unwrap(), ["y", "x"]));
    let (x, y) = (Digest::of(b"x"), Digest::of(b"y"));
    let text = format!(
        r#"{{"artifact_type":"text","entries":[{{"digest":"{x}","name":"x","size_bytes":1}},{{"digest":"{y}","name":"y","size_bytes":1}}],"format":1,"metadata":{{"a":1,"é":[true]}}}}"#
    );
    assert_eq!(digest, Digest::of(text.as_bytes()));
}

#[test]
fn names_that_leave_the_artifact_are_refused() {
    let (_folder, store) = new_store();
    for name in ["", "/etc/passwd", "..", "a/../b", "a//b", "./a", "a\\b", "a\0b", "C:/x", "a/"] {
        let result = store.artifact("text").put(name, b"x");
        assert!(matches!(result, Err(StoreError::EntryName { .. })), "{name:?} was accepted");
    }
    let mut builder = store.artifact("text");
    builder.put("a", b"1").unwrap();
    assert!(builder.put("a", b"1").is_err(), "a name was accepted twice");
    assert!(builder.put_tensor("t", Dtype::F32, &[2], &[0; 7]).is_err(), "7 bytes were accepted as two floats");
}

#[test]
fn damage_is_reported_set_aside_and_repaired_by_writing_again() {
    let (_folder, store) = new_store();
    let publish = || {
        let mut builder = store.artifact("text");
        builder.put("a", b"content").unwrap();
        builder.publish().unwrap()
    };
    let artifact = publish();
    let digest = Digest::of(b"content").to_string();
    let path = store.folder().join("blobs").join(&digest[..2]).join(&digest);
    fs::remove_file(&path).unwrap();
    fs::write(&path, b"cOntent").unwrap();
    assert!(matches!(artifact.read("a"), Err(StoreError::Damaged { what: "blob", .. })));
    assert!(!path.exists());
    assert!(!store.contains_artifact(artifact.digest()));
    assert!(store.open_artifact(artifact.digest()).unwrap().is_none());
    assert_eq!(publish().digest(), artifact.digest());
    assert_eq!(&*artifact.read("a").unwrap(), b"content");
}

#[test]
fn a_lease_has_one_owner() {
    let (_folder, store) = new_store();
    let other = Store::open(store.folder()).unwrap();
    assert_eq!(store.lease_holder(key("k")).unwrap(), None);
    let LeaseOutcome::Acquired(lease) = store.lease(key("k"), &holder("one")).unwrap() else { panic!("a free lease is held") };
    let LeaseOutcome::Held(found) = other.lease(key("k"), &holder("two")).unwrap() else { panic!("a lease has two owners") };
    assert_eq!(found, holder("one"));
    assert_eq!(other.lease_holder(key("k")).unwrap(), Some(holder("one")));
    drop(lease);
    assert_eq!(other.lease_holder(key("k")).unwrap(), None);
    assert!(matches!(other.lease(key("k"), &holder("two")).unwrap(), LeaseOutcome::Acquired(_)));
}

#[test]
fn snapshots_keep_the_newest_and_those_to_keep() {
    let (_folder, store) = new_store();
    let set = store.snapshots(key("prefix"));
    for (step, retain) in [(10, Retain::Latest), (20, Retain::Keep), (30, Retain::Latest), (40, Retain::Latest)] {
        let mut state = set.builder();
        state.put("weights", format!("{step}").as_bytes()).unwrap();
        set.save(step, retain, json!({"steps": 100}), state, ONLY_NEWEST).unwrap();
    }
    let steps: Vec<u64> = set.list().unwrap().iter().map(|snapshot| snapshot.step).collect();
    assert_eq!(steps, [40, 20]);
    let newest = &set.list().unwrap()[0];
    assert_eq!(&*set.open(newest).unwrap().read("weights").unwrap(), b"40");
}

#[test]
fn runs_sort_by_time() {
    let (_folder, store) = new_store();
    let ids: Vec<String> = (0..5).map(|n| store.begin_run(&json!({"n": n})).unwrap().id().to_owned()).collect();
    assert!(ids.is_sorted());
    let newest = store.runs().unwrap().remove(0);
    assert_eq!(fs::read_to_string(newest.join("events.jsonl")).unwrap(), "{\"n\":4}\n");
    // A run that another host began in our future: ours still sorts behind it.
    fs::create_dir(store.folder().join("runs/29991231T235959.000000Z")).unwrap();
    assert_eq!(store.begin_run(&json!({})).unwrap().id(), "29991231T235959.000001Z");
}

#[test]
fn a_folder_with_other_things_is_not_taken_for_a_store() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("thesis.tex"), "x").unwrap();
    assert!(matches!(Store::open(folder.path()), Err(StoreError::Format { .. })));
    fs::write(folder.path().join("VERSION"), "7\n").unwrap();
    assert!(matches!(Store::open(folder.path()), Err(StoreError::Version { .. })));
}

#[test]
fn snapshots_are_kept_by_number_and_size() {
    let (_folder, store) = new_store();
    let steps = |set: &str, limit, retain: &[Retain]| -> Vec<u64> {
        let set = store.snapshots(key(set));
        for (at, retain) in retain.iter().enumerate() {
            let mut state = set.builder();
            // A hundred bytes each, none of them shared.
            state.put("state", &[at as u8; 100]).unwrap();
            set.save(at as u64 + 1, *retain, json!({}), state, limit).unwrap();
        }
        set.list().unwrap().into_iter().map(|snapshot| snapshot.step).collect()
    };
    use Retain::{Keep, Latest};
    let limit = |newest, bytes| SnapshotLimit { newest, bytes };
    assert_eq!(steps("two", limit(2, u64::MAX), &[Latest; 5]), [5, 4]);
    assert_eq!(steps("by size", limit(4, 300), &[Latest; 5]), [5, 4, 3]);
    assert_eq!(steps("too large", limit(4, 1), &[Latest; 5]), [5], "the newest is kept whatever it takes");
    assert_eq!(steps("behind a kept one", limit(3, u64::MAX), &[Latest, Latest, Keep]), [3]);
    assert_eq!(steps("kept", limit(2, u64::MAX), &[Keep, Latest, Latest, Latest]), [4, 3, 1]);
}
