use std::collections::BTreeMap;

use proptest::prelude::*;
use rlflow_store::{Digest, Dtype, Store, canonical_json};
use serde_json::Value;

use crate::support::new_store;

fn json() -> impl Strategy<Value = Value> {
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

fn contents() -> impl Strategy<Value = BTreeMap<String, Vec<u8>>> {
    prop::collection::btree_map("[a-z]{1,8}(/[a-z.]{1,4}x){0,2}", prop::collection::vec(any::<u8>(), 0..300), 0..12)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn canonical_json_keeps_the_value_and_forgets_the_order(value in json()) {
        let bytes = canonical_json(&value);
        prop_assert_eq!(&bytes, &canonical_json(&reversed(&value)));
        let again: Value = serde_json::from_slice(&bytes).unwrap();
        prop_assert_eq!(canonical_json(&again), bytes);
        prop_assert_eq!(again, value);
    }

    #[test]
    fn whatever_is_published_is_read_back(contents in contents(), metadata in json(), seed in any::<u64>()) {
        let (_folder, store) = new_store();
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
    fn no_flipped_bit_is_ever_served(content in prop::collection::vec(any::<u8>(), 1..2000), at in any::<prop::sample::Index>(), bit in 0..8_u8) {
        let (_folder, store) = new_store();
        let digest = store.put_blob(&content).unwrap();
        let name = digest.to_string();
        let path = store.folder().join("blobs").join(&name[..2]).join(&name);
        let mut damaged = content.clone();
        damaged[at.index(content.len())] ^= 1 << bit;
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, damaged).unwrap();
        prop_assert!(store.blob(digest).is_err());
        prop_assert!(store.blob(digest).unwrap().is_none());
        prop_assert_eq!(store.put_blob(&content).unwrap(), digest);
        let found = store.blob(digest).unwrap().unwrap();
        prop_assert_eq!(&*found, &*content);
    }

    #[test]
    fn arbitrary_bytes_in_place_of_records_are_errors(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let (_folder, store) = new_store();
        let digest = Digest::of(&bytes);
        let name = digest.to_string();
        for family in ["manifests", "actions"] {
            let folder = store.folder().join(family).join(&name[..2]);
            std::fs::create_dir_all(&folder).unwrap();
            std::fs::write(folder.join(&name), &bytes).unwrap();
        }
        prop_assert!(store.open_artifact(digest).is_err());
        prop_assert!(!store.contains_artifact(digest));
        prop_assert!(store.action(digest).is_err());
        prop_assert!(store.outputs(digest).unwrap().is_none());
    }
}
