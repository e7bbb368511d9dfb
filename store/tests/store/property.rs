use std::collections::BTreeMap;

use proptest::prelude::*;
use rlflow_store::{Digest, Dtype, Store, canonical_json};
use serde_json::{Value, json};

use crate::support::fast_store;

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".*".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 40, 6, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::vec((".*", inner), 0..6).prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
        ]
    })
}

/// The same value with every object's keys inserted in reverse.
fn reversed(value: &Value) -> Value {
    match value {
        Value::Array(items) => items.iter().map(reversed).collect(),
        Value::Object(map) => {
            let pairs: Vec<_> = map.iter().map(|(key, value)| (key.clone(), reversed(value))).collect();
            Value::Object(pairs.into_iter().rev().collect())
        }
        other => other.clone(),
    }
}

/// Names that might lead elsewhere, and some that do not.
fn entry_name() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        3 => "[a-zé]{1,5}",
        1 => Just("..".to_owned()),
        1 => Just(".".to_owned()),
        1 => Just(String::new()),
        1 => "[A-Za-z]:",
        1 => prop_oneof![Just("~"), Just("\\"), Just("..\\"), Just("a\0"), Just("\n"), Just("...")].prop_map(str::to_owned),
        1 => (250..260_usize).prop_map(|length| "n".repeat(length)),
    ];
    prop_oneof![4 => prop::collection::vec(part, 1..5).prop_map(|parts| parts.join("/")), 1 => ".*"]
}

fn contents() -> impl Strategy<Value = BTreeMap<String, Vec<u8>>> {
    prop::collection::btree_map("[a-z]{1,8}(/[a-z.]{1,4}x){0,2}", prop::collection::vec(any::<u8>(), 0..300), 0..12)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn canonical_json_keeps_the_value_and_forgets_the_order(value in any_json()) {
        let bytes = canonical_json(&value);
        prop_assert_eq!(&bytes, &canonical_json(&reversed(&value)));
        let again: Value = serde_json::from_slice(&bytes).unwrap();
        prop_assert_eq!(canonical_json(&again), bytes);
        prop_assert_eq!(again, value);
    }

    #[test]
    fn whatever_is_published_is_read_back(contents in contents(), metadata in any_json(), seed in any::<u64>()) {
        let (_folder, store) = fast_store();
        let publish = |reverse: bool| {
            let mut builder = store.artifact("text");
            let mut names: Vec<_> = contents.keys().collect();
            if reverse {
                names.reverse();
            }
            for name in names {
                let content = &contents[name];
                if content.len() as u64 % 2 == seed % 2 {
                    builder.put_tensor(name, Dtype::U8, &[content.len() as u64], content).unwrap();
                } else {
                    builder.put(name, content).unwrap();
                }
            }
            builder.metadata(metadata.clone());
            builder.publish().unwrap()
        };
        let digest = publish(false).digest();
        prop_assert_eq!(publish(true).digest(), digest);
        let artifact = Store::open(store.folder()).unwrap().open_artifact(digest).unwrap().unwrap();
        prop_assert_eq!(artifact.manifest().entries.len(), contents.len());
        for (name, content) in &contents {
            let found = artifact.read(name).unwrap();
            prop_assert_eq!(&*found, &**content);
        }
        let report = store.fsck(false).unwrap();
        prop_assert!(report.is_clean());
        let distinct: std::collections::BTreeSet<_> = contents.values().collect();
        prop_assert_eq!(report.blobs, distinct.len());
    }

    #[test]
    fn no_entry_leads_out_of_its_artifact(name in entry_name()) {
        let (_folder, store) = fast_store();
        let accepted = store.artifact("text").put(&name, b"x").is_ok();
        // Somebody else's manifest, whose digest is right.
        let entry = json!({"name": name, "digest": Digest::of(b"x"), "size_bytes": 1});
        let bytes = canonical_json(&json!({"format": 1, "artifact_type": "text", "entries": [entry], "metadata": {}}));
        let hex = Digest::of(&bytes).to_string();
        store.put_blob(b"x").unwrap();
        let folder = store.folder().join("manifests").join(&hex[..2]);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join(&hex), &bytes).unwrap();
        prop_assert_eq!(store.open_artifact(Digest::of(&bytes)).is_ok(), accepted, "reading and writing disagree about {:?}", name);
        prop_assert_eq!(store.contains_artifact(Digest::of(&bytes)), accepted);
        prop_assert_eq!(store.fsck(false).unwrap().is_clean(), accepted);
        if accepted {
            let base = std::path::Path::new("/base");
            let inside: Vec<_> = base.join(&name).strip_prefix(base).unwrap().components().map(|part| part.as_os_str().to_owned()).collect();
            let parts: Vec<_> = name.split('/').map(std::ffi::OsString::from).collect();
            prop_assert_eq!(inside, parts, "{:?} is not a plain path inside", name);
            prop_assert!(!name.contains(['\\', '\0']) && !name.split('/').any(|part| part == ".."));
        }
    }

    #[test]
    fn arbitrary_bytes_in_place_of_records_are_never_served(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let (_folder, store) = fast_store();
        let digest = Digest::of(&bytes);
        let name = digest.to_string();
        for family in ["manifests", "actions"] {
            let folder = store.folder().join(family).join(&name[..2]);
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join(&name), &bytes).unwrap();
        }
        prop_assert!(store.open_artifact(digest).is_err());
        prop_assert!(!store.contains_artifact(digest));
        prop_assert!(store.action(digest).unwrap().is_none());
        prop_assert!(store.outputs(digest).unwrap().is_none());
    }
}
