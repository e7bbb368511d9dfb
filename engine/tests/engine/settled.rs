//! The short way to "nothing to do" agrees with the long one: a note is believed only while nothing that it depends on has changed.

use std::{
    fs::{self, File, FileTimes},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    thread::sleep,
    time::{Duration, Instant},
};

use rlflow_engine::{
    Plan, Registry, Request, RunOptions, history,
    settled::Settled,
    workflow::{LoadOptions, load},
};
use rlflow_store::GcOptions;

use crate::{kinds, world::World};

/// Data by a pattern and by name, a stage in an included file, and a matrix.
const FLOW: &str = r#"
include = ["trunk.toml"]
name = "settled"
edition = 1
seed = 7

[stage.data]
kind = "lines"
sources = [{ path = "texts/*.txt" }, { path = "data.txt" }]

[stage.a]
kind = "trainer"
inputs = { model = "base" }
matrix = { beta = [0.1, 0.2] }

[stage.all]
kind = "collect"
inputs = { models = ["a[*]"] }
"#;
const TRUNK: &str = "[stage.base]\nkind = \"trainer\"\ninputs = { data = \"data\" }\ntrain = { steps = 3 }\n";

fn world() -> World {
    let world = World::new(FLOW);
    fs::create_dir(world.path("texts")).unwrap();
    world.write("texts/b.txt", "four\nfive\n");
    world.write("trunk.toml", TRUNK);
    world
}

fn find_with(world: &World, sets: &[&str]) -> Option<Settled> {
    let sets: Vec<String> = sets.iter().map(|set| (*set).to_owned()).collect();
    Settled::find(&world.path("flow.toml"), &sets, &world.store(), &world.host)
}

fn find(world: &World) -> Option<Settled> {
    find_with(world, &[])
}

/// What the long way says; a workflow that cannot be loaded is not cached.
fn is_cached(world: &World) -> bool {
    let workflow = load(&world.path("flow.toml"), &LoadOptions::default(), &Registry::new(kinds::kinds()));
    workflow
        .is_ok_and(|workflow| Plan::new(&workflow, &world.store(), &world.host, &Request::default()).is_ok_and(|plan| plan.is_all_cached()))
}

/// Runs until there is nothing to do, and until that is noted: not before a change would show in the files' times.
fn settle(world: &World) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !(world.run().is_all_cached() && find(world).is_some()) {
        assert!(Instant::now() < deadline, "nothing was noted");
        sleep(Duration::from_millis(20));
    }
}

fn any_file(folder: &Path) -> PathBuf {
    let path = fs::read_dir(folder).unwrap().next().unwrap().unwrap().path();
    if path.is_dir() { any_file(&path) } else { path }
}

/// A change with what is so after it: whether everything is cached, and whether the note may still say so.
struct Case(&'static str, fn(&World), bool, bool);

const CASES: &[Case] = &[
    Case("nothing", |_| {}, true, true),
    Case("a file that nobody reads", |world| world.write("texts/c.md", "six\n"), true, true),
    Case("a comment", |world| world.edit("seed = 7", "seed = 7 # lucky"), true, false),
    Case("a setting", |world| world.edit("0.2]", "0.3]"), false, false),
    Case("an included file", |world| world.write("trunk.toml", &TRUNK.replace("steps = 3", "steps = 4")), false, false),
    Case("the workflow is broken", |world| world.edit("kind = \"collect\"", "kind = \"colect\""), false, false),
    Case("an included file is gone", |world| fs::remove_file(world.path("trunk.toml")).unwrap(), false, false),
    Case("a data file is touched", |world| world.write("data.txt", "one\ntwo\nthree\n"), true, false),
    Case("another data file", |world| world.write("data.txt", "one\ntwo\nfour!\n"), false, false),
    Case(
        "other content under the old times",
        |world| {
            let modified = fs::metadata(world.path("data.txt")).unwrap().modified().unwrap();
            world.write("data.txt", "ONE\ntwo\nthree\n");
            let file = File::options().write(true).open(world.path("data.txt")).unwrap();
            file.set_times(FileTimes::new().set_modified(modified)).unwrap();
        },
        false,
        false,
    ),
    Case("one file more for the pattern", |world| world.write("texts/a.txt", "zero\n"), false, false),
    Case("one file less", |world| fs::rename(world.path("texts/b.txt"), world.path("texts/b.md")).unwrap(), false, false),
    Case(
        "a link in place of a file, to what is the same",
        |world| {
            fs::rename(world.path("texts/b.txt"), world.path("elsewhere")).unwrap();
            symlink(world.path("elsewhere"), world.path("texts/b.txt")).unwrap();
        },
        true,
        false,
    ),
    Case(
        "a folder in place of a file",
        |world| {
            fs::remove_file(world.path("data.txt")).unwrap();
            fs::create_dir(world.path("data.txt")).unwrap();
        },
        false,
        false,
    ),
    Case(
        "a pipe that nobody writes to",
        |world| {
            fs::remove_file(world.path("trunk.toml")).unwrap();
            rustix::fs::mknodat(
                rustix::fs::CWD,
                world.path("trunk.toml"),
                rustix::fs::FileType::Fifo,
                rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
                0,
            )
            .unwrap();
        },
        false,
        false,
    ),
    Case("a record is gone", |world| fs::remove_file(any_file(&world.path(".rlflow/actions"))).unwrap(), false, false),
    Case(
        "a record is damaged",
        |world| {
            let path = any_file(&world.path(".rlflow/actions"));
            let mut content = fs::read(&path).unwrap();
            *content.last_mut().unwrap() ^= 1;
            fs::remove_file(&path).unwrap();
            fs::write(&path, content).unwrap();
        },
        false,
        false,
    ),
    Case(
        "a stage ran again",
        |world| {
            let request = Request { force: vec!["base".into()], ..Request::default() };
            assert!(world.run_with(&[], &RunOptions { request, ..RunOptions::default() }).ok());
        },
        true,
        false,
    ),
    Case(
        "damage was met",
        |world| {
            let blob = any_file(&world.path(".rlflow/blobs"));
            fs::remove_file(&blob).unwrap();
            fs::write(&blob, "other").unwrap();
            assert!(!world.store().fsck(true).unwrap().is_clean());
        },
        false,
        false,
    ),
    Case(
        "everything was collected",
        |world| {
            fs::remove_dir_all(world.path(".rlflow/uses")).unwrap();
            world.store().gc(&GcOptions { grace: Duration::ZERO, ..GcOptions::default() }).unwrap();
        },
        false,
        false,
    ),
    Case(
        "artifacts were collected, which nobody needs now",
        |world| {
            let options = GcOptions { grace: Duration::ZERO, max_size_bytes: Some(0), ..GcOptions::default() };
            assert!(world.store().gc(&options).unwrap().removed.iter().any(|removed| removed.what == "manifest"));
        },
        true,
        true,
    ),
    Case(
        "the note is cut short",
        |world| {
            let note = any_file(&world.path(".rlflow/settled"));
            let content = fs::read(&note).unwrap();
            fs::remove_file(&note).unwrap();
            fs::write(&note, &content[..content.len() / 2]).unwrap();
        },
        true,
        false,
    ),
    Case("the notes are gone", |world| fs::remove_dir_all(world.path(".rlflow/settled")).unwrap(), true, false),
];

#[test]
fn a_note_holds_until_something_that_it_depends_on_changes() {
    for Case(what, change, cached, noted) in CASES {
        let world = world();
        settle(&world);
        assert_eq!(find(&world).unwrap().stages(), 5, "{what}");
        change(&world);
        // First the short way: the long one may note anew.
        assert_eq!(find(&world).is_some(), *noted, "{what}: the short way");
        assert_eq!(is_cached(&world), *cached, "{what}: the long way");
    }
}

#[test]
fn a_note_answers_who_asks_the_same() {
    let mut world = world();
    settle(&world);
    assert!(find_with(&world, &["stage.base.train.steps=3"]).is_none(), "other arguments");
    world.host.devices[0].memory_bytes += 1;
    assert!(find(&world).is_none(), "another machine");
    world.host.devices[0].memory_bytes -= 1;
    assert!(find(&world).is_some());
    // The same file by another name is another question; so is the whole folder when it moves.
    symlink(world.path("flow.toml"), world.path("other.toml")).unwrap();
    assert!(Settled::find(&world.path("other.toml"), &[], &world.store(), &world.host).is_none());
    // Not everything was asked for: nothing is noted.
    fs::remove_dir_all(world.path(".rlflow/settled")).unwrap();
    sleep(Duration::from_millis(60));
    let some = Request { stages: vec!["a".into()], ..Request::default() };
    assert!(world.plan_of(&some).is_all_cached() && find(&world).is_none());
    assert!(world.plan().is_all_cached() && find(&world).is_some());
}

/// What a run leaves behind is the same on both ways: its log, and what `gc` keeps.
#[test]
fn a_short_run_is_recorded_like_a_long_one() {
    let world = world();
    settle(&world);
    let options = RunOptions { command: vec!["run".into()], jobs: 3, ..RunOptions::default() };
    assert!(world.run_with(&[], &options).is_all_cached());
    let settled = find(&world).unwrap();
    assert!(settled.run(&options.command, options.jobs, Instant::now()).is_some());
    let log = |at: usize| {
        let folder = &world.store().runs().unwrap()[at];
        let text = fs::read_to_string(folder.join("events.jsonl")).unwrap();
        let mut lines: Vec<serde_json::Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        for line in &mut lines {
            for volatile in ["time", "seconds", "run_id"] {
                line.as_object_mut().unwrap().remove(volatile);
            }
        }
        lines
    };
    assert_eq!(log(0), log(1));
    assert_eq!(history::past_runs(&world.store(), 1).unwrap()[0].keys.len(), 5);

    // After a run with other settings, `gc` keeps what that one reached: a short run would not tell it otherwise.
    world.run_with(&["stage.base.train.steps=4"], &RunOptions::default());
    let settled = find(&world).expect("planning needs no run");
    assert!(settled.run(&options.command, options.jobs, Instant::now()).is_none());
    assert!(world.run().is_all_cached());
    assert!(find(&world).unwrap().run(&options.command, options.jobs, Instant::now()).is_some());
    world.store().gc(&GcOptions { grace: Duration::ZERO, ..GcOptions::default() }).unwrap();
    assert!(world.run().is_all_cached() && find(&world).is_some());
}
