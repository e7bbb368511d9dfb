//! What is printed can neither move the cursor nor talk to the terminal, whatever a workflow, its data and their names hold.

use std::{fs, process::Output};

use crate::{WORKFLOW, World, stderr, stdout};

/// All that was printed, which is UTF-8 and has no control characters but line breaks.
fn told(output: &Output) -> String {
    let told = stdout(output) + &stderr(output);
    assert!(!told.contains(|character: char| character.is_control() && character != '\n'), "{told:?}");
    told
}

#[test]
fn a_file_that_is_no_workflow_is_reported_as_text() {
    let world = World::new();
    let all: Vec<u8> = (0..=255).collect();
    let files: [&[u8]; 10] = [
        b"\x7fELF\x02\x01\x01\0\0\0\0",
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        b"\xff\xfe[\0s\0t\0a\0g\0e\0",
        b"[stage.a]\nkind = \"\x1b[2J\x9b2J\"\n",
        "na\u{1b}[2Jme = \"\u{9b}2J\u{7f}\"\r\n\u{8}".as_bytes(),
        // Written as TOML allows it, and quoted by what is wrong with it.
        b"[stage.a]\nkind = \"\\u001b[2J\\u009b\"\n",
        b"[stage.\"\\u001b[2J\"]\nkind = \"corpus\"\nsources = [{ path = \"\\u001b[2J.txt\" }]\n",
        b"[stage.a]\nkind = \"corpus\"\nsources = [{ path = \"\\u001b[2J.txt\", \"\\u0007\" = 1 }]\n",
        b"include = [\"\\u001b[2J.toml\"]\n",
        &all,
    ];
    // The file's own name is printed too.
    for (content, name) in files.into_iter().zip(["wrong.toml", "wr\u{1b}[2Jong.toml"].into_iter().cycle()) {
        fs::write(world.path(name), content).unwrap();
        for command in ["plan", "run", "status", "graph"] {
            let output = world.rlflow(&[command, name]);
            let shown = told(&output);
            assert_eq!((output.status.code(), stdout(&output).as_str()), (Some(2), ""), "{command}: {shown}");
            assert!(shown.contains("ong.toml") && shown.contains("error"), "{shown}");
        }
        let errors = world.json(&["plan", name, "--json"]);
        for error in errors["errors"].as_array().unwrap() {
            let texts = [&error["message"], &error["hint"]].map(|text| text.as_str().unwrap_or_default());
            assert!(!texts.concat().contains(|character: char| character.is_control() && character != '\n'), "{error}");
        }
    }
}

#[test]
fn names_of_files_and_what_rows_hold_are_shown_and_not_sent() {
    let world = World::new();
    told(&world.rlflow(&["run", "flow.toml"]));
    fs::write(world.path("texts/\u{1b}[2J.txt"), "More of it.\n").unwrap();
    for command in ["plan", "status", "run"] {
        let shown = told(&world.rlflow(&[command, "flow.toml"]));
        assert!(shown.contains("data file texts/␛[2J.txt was added"), "{command}: {shown}");
    }
    for command in [&["show", "flow.toml", "corpus"][..], &["lineage", "flow.toml", "corpus"]] {
        let shown = told(&world.rlflow(command));
        assert!(shown.contains("texts/␛[2J.txt"), "{command:?}: {shown}");
    }
    let set = r#"stage.corpus.sources=[{path="texts/a.txt",field="\u009b2J"}]"#;
    assert!(told(&world.rlflow(&["plan", "flow.toml", "--set", set])).contains("\u{fffd}2J"));

    // An error that quotes the data.
    fs::write(world.path("rows.jsonl"), "{\"\\u001b]0;owned\\u0007\": 1}\n").unwrap();
    fs::write(world.path("flow.toml"), WORKFLOW.replace("texts/*.txt", "rows.jsonl")).unwrap();
    for command in [&["run", "flow.toml"][..], &["run", "flow.toml", "-q"], &["status", "flow.toml"]] {
        let shown = told(&world.rlflow(command));
        assert!(shown.contains("no field `text` (it has ␛]0;owned␇)"), "{command:?}: {shown}");
    }
}
