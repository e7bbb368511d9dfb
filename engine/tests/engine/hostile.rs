//! Users' machines: disks that are full or read-only, strange names, links, strict umasks, clocks that go back.

use std::{
    env,
    ffi::OsStr,
    fs::{self, File},
    os::unix::{
        ffi::OsStrExt,
        fs::{PermissionsExt, symlink},
    },
    path::Path,
    process::Command,
    time::{Duration, SystemTime},
};

use rlflow_api::CancelToken;
use rlflow_engine::{
    EngineError, Registry, RunOptions, Summary,
    event::Events,
    workflow::{LoadOptions, load},
};
use rlflow_store::{Store, StoreError};
use serde_json::json;
use tempfile::TempDir;

use crate::{
    kinds,
    mounted::Mounted,
    world::{CHAIN, World, outcomes},
};

fn try_run(world: &World) -> Result<Summary, EngineError> {
    let store = Store::open(&world.path(".rlflow"))?;
    rlflow_engine::run(&world.load(), &store, &world.host, &RunOptions::default(), &Events::default(), &CancelToken::default())
}

/// What kept a run from its end.
fn complaint(run: &Result<Summary, EngineError>) -> Option<String> {
    match run {
        Ok(summary) => summary.stages.iter().find_map(|stage| stage.error.clone()),
        Err(error) => Some(error.to_string()),
    }
}

/// A world whose store is a link to a file system of its own.
fn world_on(disk: &Mounted, workflow: &str) -> World {
    let world = World::new(workflow);
    symlink(disk.path(), world.path(".rlflow")).unwrap();
    world
}

#[test]
fn a_full_disk_is_told_loses_nothing_and_the_next_run_goes_on() {
    let chain = CHAIN.replace("train = { steps = 20 }", "train = { steps = 20 }\nsnapshot_every = 4");
    let mut size = 8;
    let Some(disk) = Mounted::tmpfs(size << 10) else {
        return println!("skipped: no tmpfs can be mounted here (needs root)");
    };
    let whole = World::new(&chain).run();
    let world = world_on(&disk, &chain);
    let mut refused = 0;
    let mut finished: Vec<String> = Vec::new();
    let last = loop {
        let run = try_run(&world);
        let began = world.ran();
        assert!(began.iter().all(|stage| !finished.contains(stage)), "{size} KiB: {began:?} ran again though {finished:?} were finished");
        if let Ok(summary) = &run {
            finished.extend(summary.stages.iter().filter(|stage| stage.error.is_none()).map(|stage| stage.name.clone()));
        }
        let Some(message) = complaint(&run) else { break run.unwrap() };
        assert!(message.contains("No space left on device"), "{size} KiB: {message}");
        refused += 1;
        // The record of each run takes some of it.
        size += 64;
        assert!(size < 8 << 10, "the work never fits");
        disk.remount(&format!("size={size}k"));
    };
    assert!(refused > 3, "the disk was full only {refused} times");
    for (last, whole) in last.stages.iter().zip(&whole.stages) {
        assert_eq!((&last.name, &last.outputs), (&whole.name, &whole.outputs));
    }
    assert!(world.store().fsck(false).unwrap().is_clean());
    assert!(world.run().is_all_cached());
}

#[test]
fn a_read_only_disk_serves_what_it_has_and_says_what_it_cannot_do() {
    let Some(disk) = Mounted::tmpfs(16 << 20) else {
        return println!("skipped: no tmpfs can be mounted here (needs root)");
    };
    let world = world_on(&disk, CHAIN);
    assert!(world.run().ok());
    world.ran();
    disk.remount("ro");
    assert!(world.run().is_all_cached() && world.plan().is_all_cached());
    world.edit("beta = 0.2", "beta = 0.3");
    assert_eq!(world.planned()[0], "b run: beta changed: 0.2 -> 0.3");
    let message = complaint(&try_run(&world)).unwrap();
    assert!(message.contains("Read-only file system"), "{message}");
    assert_eq!(world.ran(), [""; 0], "a stage ran whose result could not be kept");
    disk.remount("rw");
    assert!(world.run().ok());
    assert_eq!(world.ran(), ["b", "all"]);
}

/// Names the world of a child process.
const WORLD: &str = "RLFLOW_TEST_HOSTILE_WORLD";

/// Not a test: what child processes of the test below do.
#[test]
#[ignore = "run by other tests"]
fn child() {
    if let Some(folder) = env::var_os(WORLD) {
        let run = try_run(&World::at(Path::new(&folder)));
        println!("told: {:?}", complaint(&run));
    }
}

#[test]
fn a_strict_umask_a_home_and_a_scratch_folder_that_cannot_be_written_do_no_harm() {
    let world = World::new(CHAIN);
    let mut command = Command::new("sh");
    command.args(["-c", "umask 077; exec \"$0\" --exact hostile::child --ignored --nocapture"]).arg(env::current_exe().unwrap());
    for variable in ["HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TMPDIR"] {
        command.env(variable, "/proc/nowhere");
    }
    let output = command.env(WORLD, world.path("")).output().unwrap();
    let told = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    assert!(told.contains("told: None"), "{told}");
    let mut open = vec![world.path(".rlflow")];
    while let Some(path) = open.pop() {
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!(metadata.permissions().mode() & 0o077, 0, "{} is open to others", path.display());
        if metadata.is_dir() {
            open.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
    }
    assert!(world.run().is_all_cached());
}

#[test]
fn folders_and_files_may_have_any_name_that_text_can_write() {
    let owned = TempDir::new().unwrap();
    let folder = owned.path().join("mit Leerzeichen [1]").join("données ✓ 'x' \"y\" #%{}");
    fs::create_dir_all(folder.join("теxte")).unwrap();
    let world = World::at(&folder);
    world.write("flow.toml", &CHAIN.replace("path = \"data.txt\"", "path = \"теxte/*.txt\""));
    let files = ["ein text.txt", "it's [a] \"file\".txt", "naïve\nline.txt", "日本.txt"];
    for file in files {
        world.write(&format!("теxte/{file}"), "one\ntwo\n");
    }
    let first = world.run();
    assert!(first.ok(), "{:?}", outcomes(&first));
    assert!(world.run().is_all_cached());
    let record = world.store().action(first.stages[0].key.unwrap()).unwrap().unwrap();
    let read: Vec<&str> = record.provenance.files.iter().map(|(name, _)| name.strip_prefix("теxte/").unwrap()).collect();
    assert_eq!(read, files);
    for file in files {
        world.write(&format!("теxte/{file}"), "one\n2\n");
        let planned = world.planned();
        assert!(planned[0].starts_with("data run: ") && planned[0].contains(file), "{planned:?}");
        world.write(&format!("теxte/{file}"), "one\ntwo\n");
        assert!(world.plan().is_all_cached());
    }
}

#[test]
fn links_are_followed_and_what_they_point_to_counts() {
    let world = World::new(CHAIN);
    fs::rename(world.path("data.txt"), world.path("first.txt")).unwrap();
    world.write("second.txt", "four\nfive\nsix\n");
    let point_to = |target: &str| {
        let _ = fs::remove_file(world.path("data.txt"));
        symlink(target, world.path("data.txt")).unwrap();
    };
    point_to("first.txt");
    assert!(world.run().ok() && world.run().is_all_cached());
    point_to("second.txt");
    assert!(world.planned()[0].starts_with("data run: data file data.txt changed"), "{:?}", world.planned());
    point_to("./first.txt");
    assert!(world.plan().is_all_cached(), "the same content by another way");
    let refused = |target: &str| {
        point_to(target);
        let options = rlflow_engine::workflow::LoadOptions::default();
        let kinds = rlflow_engine::Registry::new(crate::kinds::kinds());
        rlflow_engine::workflow::load(&world.path("flow.toml"), &options, &kinds).map(drop).unwrap_err().to_string()
    };
    assert!(refused("nothing.txt").contains("`data.txt` is a link to nothing"));
    assert!(refused("data.txt").contains("`data.txt` cannot be read: "), "a link to itself");
}

#[test]
fn a_clock_that_went_back_deceives_nobody() {
    let world = World::new(CHAIN);
    // The data was written, and the first run made, by a clock a year ahead.
    let ahead = Duration::from_secs(365 * 24 * 3600);
    let future = SystemTime::UNIX_EPOCH + 100 * ahead;
    let write = |content: &str| {
        world.write("data.txt", content);
        File::options().write(true).open(world.path("data.txt")).unwrap().set_modified(future).unwrap();
    };
    write("one\ntwo\nthree\n");
    world.run();
    let store = world.store();
    for mut record in store.actions().unwrap() {
        record.provenance.started_at += ahead.as_secs_f64();
        store.put_action(&record).unwrap();
    }
    let runs = store.runs().unwrap();
    let name = |path: &Path| path.file_name().map(OsStr::to_os_string).unwrap().into_string().unwrap();
    let year: u32 = name(&runs[0])[..4].parse().unwrap();
    fs::rename(&runs[0], runs[0].with_file_name(name(&runs[0]).replacen(&year.to_string(), &(year + 1).to_string(), 1))).unwrap();
    drop(store);
    // Compared with what was used last, not with what the clock calls newest.
    world.edit("beta = 0.1", "beta = 0.3");
    assert!(world.run().ok());
    world.edit("beta = 0.3", "beta = 0.4\nfail_at = 3");
    assert!(world.planned()[0].starts_with("a run: beta changed: 0.3 -> 0.4"), "{:?}", world.planned());
    assert!(!world.run().ok());
    // The newest run is the one that ran last.
    assert_eq!(world.plan().stages[2].error.as_deref(), Some("step 3 was told to fail"));
    let log = rlflow_engine::history::past_runs(&world.store(), 3).unwrap();
    assert_eq!(log.iter().map(|run| json!(run.ok)).collect::<Vec<_>>(), [json!(false), json!(true), json!(true)]);
    // Equal size and equal time, and yet it changed.
    write("one\ntwo\nTHREE\n");
    assert!(world.planned()[0].starts_with("data run: data file data.txt changed"), "{:?}", world.planned());
}

#[test]
fn a_store_that_is_no_folder_is_a_clear_error() {
    let world = World::new(CHAIN);
    world.write(".rlflow", "a file");
    let error = Store::open(&world.path(".rlflow")).err().unwrap();
    assert!(matches!(error, StoreError::Io { .. }) && error.to_string().contains(".rlflow"), "{error}");
}

/// A name that is not UTF-8 is an error where a pattern matches it: passed over in silence, its data would be missing.
#[test]
fn names_that_are_not_utf8_are_told_where_a_pattern_meets_them() {
    let load = |world: &World, pattern: &str| {
        world.write("flow.toml", &CHAIN.replace("\"data.txt\"", &format!("{pattern:?}")));
        let loaded = load(&world.path("flow.toml"), &LoadOptions::default(), &Registry::new(kinds::kinds()));
        loaded.map(|workflow| workflow.stages[0].files[0].len()).map_err(|errors| errors.to_json()["errors"][0].clone())
    };
    let strange = |world: &World, folder: &str| world.path(folder).join(OsStr::from_bytes(b"caf\xe9.txt"));
    let world = World::new(CHAIN);
    fs::create_dir_all(world.path("texts/deep/er")).unwrap();
    for name in ["texts/a.txt", "texts/deep/a.txt", "texts/deep/er/a.txt"] {
        world.write(name, "one\n");
    }
    assert_eq!(load(&world, "texts/**/*.txt").unwrap(), 3);
    for (folder, pattern) in [("texts", "texts/*.txt"), ("texts/deep/er", "texts/**/*.txt"), ("texts/deep", "texts/*/caf?.txt")] {
        fs::write(strange(&world, folder), "two\n").unwrap();
        let error = load(&world, pattern).unwrap_err();
        assert_eq!(error["code"], "unreadable_file", "{error}");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains("caf\u{fffd}.txt") && message.contains("not UTF-8") && error["line"].is_u64(), "{error}");
        // Where no pattern meets it, it is nobody's business.
        assert!(load(&world, "texts/**/a.txt").is_ok() && load(&world, "data.txt").is_ok());
        fs::remove_file(strange(&world, folder)).unwrap();
    }
    fs::create_dir(strange(&world, "texts/deep")).unwrap();
    fs::write(strange(&world, "texts/deep").join("a.txt"), "two\n").unwrap();
    for pattern in ["texts/deep/*/a.txt", "texts/**/a.txt"] {
        assert_eq!(load(&world, pattern).unwrap_err()["code"], "unreadable_file", "{pattern}");
    }
    // Folders above the workflow may have any name.
    let inside = world.path("").join(OsStr::from_bytes(b"f\xfcr uns"));
    fs::create_dir(&inside).unwrap();
    let moved = World::at(&inside);
    moved.write("flow.toml", CHAIN);
    moved.write("data.txt", "one\n");
    assert!(moved.run().ok() && moved.run().is_all_cached() && moved.plan().is_all_cached());
}
