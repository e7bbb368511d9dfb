//! Damage to what is stored: never served, found as a whole, and made good by one round of publishing.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use proptest::prelude::*;
use rlflow_store::{Artifact, Digest, Dtype, GcOptions, Retain, SnapshotLimit, Store, StoreError};
use serde_json::json;

use crate::support::{action, fast_store, key};

fn blob_path(store: &Store, digest: Digest) -> PathBuf {
    path_in(store, "blobs", digest)
}

fn path_in(store: &Store, family: &str, digest: Digest) -> PathBuf {
    let name = digest.to_string();
    store.folder().join(family).join(&name[..2]).join(&name)
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

fn flip(path: &Path, at: usize, bit: u8) {
    let mut bytes = fs::read(path).unwrap();
    let at = at % bytes.len();
    bytes[at] ^= 1 << bit;
    // Stored content is read-only.
    fs::remove_file(path).unwrap();
    fs::write(path, bytes).unwrap();
}

fn publish(store: &Store, name: &str) -> Artifact {
    let mut builder = store.artifact("policy");
    for tensor in 0..3_u8 {
        let content: Vec<u8> = name.bytes().cycle().take(1000).chain([tensor]).collect();
        builder.put_tensor(&format!("layer.{tensor}"), Dtype::U8, &[1001], &content).unwrap();
    }
    builder.publish().unwrap()
}

fn blobs(artifact: &Artifact) -> Vec<Digest> {
    artifact.manifest().entries.iter().map(|entry| entry.digest).collect()
}

#[test]
fn all_that_is_damaged_in_what_is_open_is_set_aside_at_once() {
    let (_folder, store) = fast_store();
    let digests = ["sft", "rm", "closed"].map(|name| publish(&store, name).digest());
    let [sft, rm] = [0, 1].map(|at| store.open_artifact(digests[at]).unwrap().unwrap());
    let closed = blobs(&store.open_artifact(digests[2]).unwrap().unwrap());
    let all: Vec<Digest> = blobs(&sft).into_iter().chain(blobs(&rm)).collect();
    all.iter().chain(&closed).for_each(|digest| flip(&blob_path(&store, *digest), 500, 3));

    let hex = sft.digest().to_string();
    let manifest = store.folder().join("manifests").join(&hex[..2]).join(&hex);
    fs::File::open(manifest).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();

    assert!(matches!(sft.read("layer.1"), Err(StoreError::Damaged { what: "blob", .. })));
    store.gc(&GcOptions { grace: Duration::from_secs(3600), ..GcOptions::default() }).unwrap();
    assert!(all.iter().all(|digest| !blob_path(&store, *digest).exists()), "damage is left for the next run to find");
    assert!(closed.iter().all(|digest| blob_path(&store, *digest).exists()), "what is not open was read");
    let later = Store::open(store.folder()).unwrap();
    for store in [&store, &later] {
        assert_eq!(digests.map(|digest| store.is_set_aside(digest)), [true, true, false]);
        assert!(store.open_artifact(sft.digest()).unwrap().is_none() && !store.contains_artifact(rm.digest()));
    }
    for (name, artifact) in [("sft", &sft), ("rm", &rm)] {
        assert_eq!(publish(&later, name).digest(), artifact.digest());
        artifact.verify().unwrap();
        assert!(!store.is_set_aside(artifact.digest()) && !later.is_set_aside(artifact.digest()));
    }
}

#[test]
fn who_only_looks_touches_nothing_and_who_makes_it_again_sets_it_aside() {
    let (_folder, store) = fast_store();
    let [cut, flipped] = ["cut", "flipped"].map(|name| publish(&store, name));
    for artifact in [("sft", &cut), ("rm", &flipped)] {
        store.put_action(&action(artifact.0, &[("model", artifact.1.digest())])).unwrap();
    }
    let blob = blob_path(&store, blobs(&cut)[0]);
    let content = fs::read(&blob).unwrap();
    fs::remove_file(&blob).unwrap();
    fs::write(&blob, &content[..500]).unwrap();
    flip(&path_in(&store, "manifests", flipped.digest()), 100, 0);
    flip(&path_in(&store, "actions", key("rm")), 200, 0);

    let before = listing(store.folder());
    let later = Store::open(store.folder()).unwrap();
    let set_aside = || [&cut, &flipped].map(|artifact| later.is_set_aside(artifact.digest()));
    for _ in 0..2 {
        for artifact in [&cut, &flipped] {
            assert!(!later.contains_artifact(artifact.digest()) && later.shows_damage(artifact.digest()).unwrap());
            later.lineage(artifact.digest()).unwrap();
        }
        assert!(!later.shows_damage(key("never made")).unwrap());
        assert_eq!(later.outputs(key("sft")).unwrap().unwrap()["model"], cut.digest());
        assert!(later.outputs(key("rm")).unwrap().is_none() && later.action(key("rm")).unwrap().is_none());
        assert!(later.last_action("a.toml", "rm", "sft").unwrap().is_none());
        assert_eq!(later.actions().unwrap().len(), 1);
        later.usage().unwrap();
        later.gc(&GcOptions { dry_run: true, ..GcOptions::default() }).unwrap();
        assert!(!later.fsck(false).unwrap().is_clean());
        assert_eq!((listing(store.folder()), set_aside()), (before.clone(), [false, false]));
    }

    for artifact in [&cut, &flipped] {
        later.set_aside_damage(artifact.digest());
    }
    later.put_action(&action("rm", &[("model", flipped.digest())])).unwrap();
    let damaged = |what: &str| {
        let names = fs::read_dir(store.folder().join("damaged")).unwrap().map(|entry| entry.unwrap().file_name());
        names.filter(|name| name.to_string_lossy().starts_with(what)).count()
    };
    assert_eq!((set_aside(), ["blob-", "manifest-", "action-"].map(damaged)), ([true, true], [1, 2, 1]));
    for (name, artifact) in [("cut", &cut), ("flipped", &flipped)] {
        assert_eq!(publish(&later, name).digest(), artifact.digest());
    }
    assert_eq!(set_aside(), [false, false]);
    assert!(later.fsck(false).unwrap().is_clean());
}

#[test]
fn what_is_published_again_never_shares_damage_that_nobody_has_met() {
    let (folder, store) = fast_store();
    let file = folder.path().join("data.txt");
    fs::write(&file, vec![b'x'; 300_000]).unwrap();
    let publish = |store: &Store| {
        let mut builder = store.artifact("text");
        builder.put("a", b"content").unwrap();
        builder.put_tensor("t", Dtype::U8, &[400_000], &vec![7; 400_000]).unwrap();
        builder.put_file("data", &file).unwrap();
        let artifact = builder.publish().unwrap();
        (artifact, store.put_blob(b"series").unwrap())
    };
    let (artifact, series) = publish(&store);
    let stored: Vec<Digest> = blobs(&artifact).into_iter().chain([series]).collect();
    stored.iter().for_each(|digest| flip(&blob_path(&store, *digest), 3, 0));
    let other = Store::open(store.folder()).unwrap();
    let mut sharing = other.artifact("text");
    let entry = artifact.manifest().entry("t").unwrap();
    assert!(matches!(sharing.share(entry), Err(StoreError::Missing { .. } | StoreError::Damaged { .. })));
    // In the process that wrote them, and in one that knows nothing of them.
    for store in [store, other] {
        let (again, _) = publish(&store);
        again.verify().unwrap();
        assert_eq!(&*store.blob(series).unwrap().unwrap(), b"series");
        stored.iter().for_each(|digest| flip(&blob_path(&store, *digest), 3, 0));
    }
}

/// Where a flipped bit may lie: lengths around those at which reading and hashing change their ways.
fn length() -> impl Strategy<Value = usize> {
    prop_oneof![4 => 1..3000_usize, 1 => (256 << 10) - 2..(256 << 10) + 3_usize, 1 => (512 << 10) - 2..(512 << 10) + 3_usize]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn no_flipped_bit_is_ever_served(
        lengths in prop::collection::vec((length(), any::<u8>()), 1..5),
        damaged in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), 0..8_u8), 1..4),
        shared in any::<bool>(),
        by in 0..5_u8,
    ) {
        let (_folder, store) = fast_store();
        let contents: Vec<Vec<u8>> = lengths.iter().map(|(length, byte)| (0..*length).map(|n| byte.wrapping_add((n % 253) as u8)).collect()).collect();
        let set = store.snapshots(key("prefix"));
        let build = || {
            let mut builder = set.builder();
            for (at, content) in contents.iter().enumerate() {
                if at % 2 == 0 {
                    builder.put(&at.to_string(), content).unwrap();
                } else {
                    builder.put_tensor(&at.to_string(), Dtype::U8, &[content.len() as u64], content).unwrap();
                }
            }
            builder
        };
        let artifact = build().publish().unwrap();
        if shared {
            build().publish().unwrap();
        }
        let snapshot = set.save(1, Retain::Keep, json!({}), build(), SnapshotLimit::default()).unwrap();
        for (which, at, bit) in &damaged {
            let content = which.get(&contents);
            flip(&blob_path(&store, Digest::of(content)), at.index(content.len()), *bit);
        }
        // Two flips may undo each other.
        let is_damaged = |content: &Vec<u8>| fs::read(blob_path(&store, Digest::of(content))).map_or(true, |found| found != *content);
        let lost: Vec<bool> = contents.iter().map(is_damaged).collect();
        let reader = Store::open(store.folder()).unwrap();
        let opened = reader.open_artifact(artifact.digest()).unwrap().unwrap();
        for (at, content) in contents.iter().enumerate() {
            let entry = opened.manifest().entry(&at.to_string()).unwrap();
            let served = match by {
                0 => opened.read(&at.to_string()).ok().map(|blob| blob.to_vec()),
                1 => reader.blob(Digest::of(content)).ok().flatten().map(|blob| blob.to_vec()),
                2 => artifact.read(&at.to_string()).ok().map(|blob| blob.to_vec()),
                3 => reader.snapshots(key("prefix")).open(&snapshot).ok().map(|state| state.read(&at.to_string()).unwrap().to_vec()),
                _ => {
                    let mut builder = reader.artifact("text");
                    let shared = builder.share(entry).is_ok();
                    let published = shared.then(|| builder.publish().unwrap());
                    published.map(|artifact| artifact.read(&at.to_string()).unwrap().to_vec())
                }
            };
            match served {
                Some(found) => prop_assert!(!lost[at] && found == *content, "a damaged blob was served"),
                None => prop_assert!(if by == 3 { lost.contains(&true) } else { lost[at] }, "an intact blob was refused"),
            }
        }
        prop_assert_eq!(build().publish().unwrap().digest(), artifact.digest());
        prop_assert!(artifact.verify().is_ok());
        let found: Vec<Vec<u8>> = (0..contents.len()).map(|at| artifact.read(&at.to_string()).unwrap().to_vec()).collect();
        prop_assert_eq!(found, contents);
    }
}
