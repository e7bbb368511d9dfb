//! Users' files: recognised without hashing them again, brought into the store without copying where that is safe, and
//! refused when they change meanwhile.

use std::{
    ffi::OsStr,
    fs::{self, File},
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, PermissionsExt, symlink},
    },
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, SystemTime},
};

use rlflow_store::{Artifact, Digest, Result, Store, StoreError};

use crate::{
    forks::{no_forks, quiet_status},
    mounted::Mounted,
    support::{fast_store, new_store},
};

/// Larger than what a store rather hashes again than waits for.
const LARGE: u64 = 33 << 20;

fn put_file(store: &Store, path: &Path) -> Result<(Artifact, fs::Metadata)> {
    let mut builder = store.artifact("text");
    builder.put_file("data", path)?;
    let artifact = builder.publish()?;
    let name = artifact.manifest().entries[0].digest.to_string();
    let blob = store.folder().join("blobs").join(&name[..2]).join(&name);
    let metadata = fs::symlink_metadata(blob).unwrap();
    assert!(metadata.is_file() && metadata.mode() & 0o222 == 0, "a blob is a link or can be written to");
    Ok((artifact, metadata))
}

#[test]
fn a_touched_file_is_hashed_once_more_and_never_again() {
    let _alone = no_forks();
    let (folder, store) = new_store();
    let path = folder.path().join("data.txt");
    let file = File::create(&path).unwrap();
    file.set_len(LARGE).unwrap();
    let digest = store.file_digest(&path).unwrap();
    assert_eq!(digest.size_bytes, LARGE);
    let again = |store: Store| {
        let before = store.hashed_bytes();
        assert_eq!(store.file_digest(&path).unwrap(), digest);
        store.hashed_bytes() - before
    };
    assert_eq!(store.hashed_bytes(), LARGE);
    assert_eq!(again(store.clone()), 0);
    let root = store.folder().to_owned();
    drop(store);
    let next_process = || again(Store::open(&root).unwrap());
    assert_eq!(next_process(), 0, "an untouched file was hashed again");
    for touched in [SystemTime::now(), SystemTime::UNIX_EPOCH, SystemTime::now() - Duration::from_secs(1000)] {
        file.set_modified(touched).unwrap();
        assert_eq!([next_process(), next_process(), next_process()], [LARGE, 0, 0]);
    }
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!([next_process(), next_process()], [LARGE, 0]);
    // A time that is yet to come: the clock was set back, and the next write might get this very time.
    file.set_modified(SystemTime::now() + Duration::from_secs(1000)).unwrap();
    assert_eq!([next_process(), next_process()], [LARGE, LARGE]);
}

#[test]
fn small_files_are_remembered_once_their_times_have_settled() {
    let (folder, store) = new_store();
    store.expect_lookups(100_000);
    let path = folder.path().join("data.txt");
    fs::write(&path, "abc").unwrap();
    std::thread::sleep(Duration::from_millis(2100));
    (0..3).for_each(|_| assert_eq!(store.file_digest(&path).unwrap().digest, Digest::of(b"abc")));
    assert_eq!(store.hashed_bytes(), 3);
    // Same length, written at once: nothing but the change time may tell.
    fs::write(&path, "abd").unwrap();
    assert_eq!(store.file_digest(&path).unwrap().digest, Digest::of(b"abd"));
}

#[test]
fn names_and_links_of_all_kinds_lead_to_the_content() {
    let (folder, _) = new_store();
    let odd = folder.path().join(OsStr::from_bytes(b"not \xff utf-8 \xc3\xa9\n"));
    fs::create_dir(&odd).unwrap();
    symlink(&odd, folder.path().join("link")).unwrap();
    fs::create_dir(odd.join("real store")).unwrap();
    symlink("real store", odd.join(".rlflow")).unwrap();
    let store = Store::open(&folder.path().join("link/.rlflow")).unwrap();
    let (first, second) = (odd.join("first"), odd.join("second"));
    fs::write(&first, "first").unwrap();
    fs::write(&second, "other").unwrap();
    let link = odd.join("data");
    for target in [&first, &second] {
        let _ = fs::remove_file(&link);
        symlink(target, &link).unwrap();
        let content = fs::read(target).unwrap();
        assert_eq!(store.file_digest(&link).unwrap().digest, Digest::of(&content));
        let (artifact, _) = put_file(&store, &link).unwrap();
        assert_eq!(&*artifact.read("data").unwrap(), &*content);
    }
    // A link to a read-only file may become a name of that file, but never of the link.
    fs::set_permissions(&first, fs::Permissions::from_mode(0o444)).unwrap();
    fs::remove_file(&link).unwrap();
    symlink(&first, &link).unwrap();
    let fresh = Store::open(&odd.join("another store")).unwrap();
    let (artifact, _) = put_file(&fresh, &link).unwrap();
    fs::remove_file(&link).unwrap();
    assert_eq!(&*artifact.read("data").unwrap(), b"first");
    symlink(odd.join("nowhere"), &link).unwrap();
    for error in [store.file_digest(&link).unwrap_err(), put_file(&store, &link).unwrap_err()] {
        assert!(error.to_string().contains("No such file"), "{error}");
    }
    for store in [store, fresh] {
        assert!(store.fsck(false).unwrap().is_clean());
        assert!(store.folder().join("tmp").read_dir().unwrap().next().is_none(), "temporary files are left");
    }
}

#[test]
fn what_nobody_writes_to_is_linked_and_the_rest_copied() {
    let (folder, store) = fast_store();
    let (path, file) = store.scratch().unwrap();
    file.set_len(LARGE).unwrap();
    let (artifact, blob) = put_file(&store, &path).unwrap();
    assert_eq!((blob.ino(), blob.nlink()), (file.metadata().unwrap().ino(), 2), "a scratch file was copied");
    fs::remove_file(&path).unwrap();
    artifact.verify().unwrap();

    let users = folder.path().join("user's file");
    fs::write(&users, b"mine").unwrap();
    let (artifact, blob) = put_file(&store, &users).unwrap();
    assert_ne!(blob.ino(), fs::metadata(&users).unwrap().ino(), "a file that others may write to was linked");
    fs::write(&users, b"changed").unwrap();
    assert_eq!(&*artifact.read("data").unwrap(), b"mine");
    fs::set_permissions(&users, fs::Permissions::from_mode(0o444)).unwrap();
    let (_, blob) = put_file(&store, &users).unwrap();
    assert_eq!(blob.ino(), fs::metadata(&users).unwrap().ino(), "a read-only file was copied");
    assert!(put_file(&store, folder.path()).unwrap_err().to_string().contains("directory"));
}

#[test]
fn a_reflink_shares_its_extents() {
    let Some(disk) = Mounted::with_reflinks() else {
        return println!("skipped: no file system with reflinks can be mounted here (needs root and mkfs.btrfs or mkfs.xfs)");
    };
    const SIZE: u64 = 32 << 20;
    let used = || {
        assert!(quiet_status(Command::new("sync").arg("-f").arg(disk.path())).unwrap().success());
        let found = rustix::fs::statvfs(disk.path()).unwrap();
        (found.f_blocks - found.f_bfree) * found.f_frsize
    };
    let store = Store::open(&disk.path().join("store")).unwrap();
    let path = disk.path().join("data");
    let content: Vec<u8> = (0..SIZE / 8).flat_map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()).collect();
    fs::write(&path, &content).unwrap();
    let before = used();
    let (artifact, blob) = put_file(&store, &path).unwrap();
    assert_ne!(blob.ino(), fs::metadata(&path).unwrap().ino());
    assert!(used() < before + SIZE / 4, "a second copy was made");
    fs::write(&path, b"changed").unwrap();
    assert!(*artifact.read("data").unwrap() == *content);
}

#[test]
fn a_file_that_changes_while_it_is_read_is_refused() {
    let (folder, store) = fast_store();
    let path = folder.path().join("growing.txt");
    File::create(&path).unwrap().set_len(64 << 20).unwrap();
    type Read = fn(&Store, &PathBuf) -> Result<()>;
    let readers: [Read; 2] = [|store, path| store.file_digest(path).map(drop), |store, path| put_file(store, path).map(drop)];
    for read in readers {
        let done = AtomicBool::new(false);
        let result = std::thread::scope(|scope| {
            scope.spawn(|| {
                let file = File::options().write(true).open(&path).unwrap();
                let mut length = file.metadata().unwrap().len();
                while !done.load(Ordering::Relaxed) {
                    length += 1;
                    file.set_len(length).unwrap();
                }
            });
            let result = read(&store, &path);
            done.store(true, Ordering::Relaxed);
            result
        });
        let Err(error @ StoreError::ChangedWhileRead { .. }) = result else { panic!("{result:?}") };
        assert!(error.to_string().contains("growing.txt changed while it was being read; run again"), "{error}");
    }
    assert!(store.fsck(false).unwrap().blobs == 0 && store.folder().join("tmp").read_dir().unwrap().next().is_none());
}
