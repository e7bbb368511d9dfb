use std::{fs, path::Path};

use rlflow_api::DeviceSpec;

use super::*;
use crate::testing::registry;

/// Folder of the wrong workflow files, relative to the crate, so that no machine's paths get into snapshots.
const BAD_INPUT: &str = "tests/bad_input";

fn failing(path: &Path, sets: &[&str]) -> String {
    let options = LoadOptions { sets: sets.iter().map(|set| (*set).to_owned()).collect() };
    match load(path, &options, &registry()) {
        Ok(_) => panic!("{} was accepted", path.display()),
        Err(errors) => errors.to_string(),
    }
}

/// Every file under `tests/bad_input` with its report.
#[test]
fn wrong_files_are_reported_whole() {
    let mut paths: Vec<_> = fs::read_dir(BAD_INPUT).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "toml"));
    paths.sort();
    assert!(paths.len() >= 30);
    for path in paths {
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let report = failing(&path, &[]);
        insta::with_settings!({ snapshot_path => "../../tests/bad_input/expected", prepend_module_to_snapshot => false, omit_expression => true }, {
            insta::assert_snapshot!(name, report);
        });
    }
}

/// A folder with data files and workflow files, and what loading gives.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in [("data/b.txt", "b"), ("data/a.txt", "a"), ("data/pairs.jsonl", "{}"), ("checkpoint/config.json", "{}")] {
            fs::create_dir_all(folder.path().join(name).parent().unwrap()).unwrap();
            fs::write(folder.path().join(name), text).unwrap();
        }
        Self(folder)
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    }

    fn load(&self, text: &str) -> Workflow {
        self.load_with(text, &[])
    }

    fn load_with(&self, text: &str, sets: &[&str]) -> Workflow {
        let path = self.write("test.toml", text);
        let options = LoadOptions { sets: sets.iter().map(|set| (*set).to_owned()).collect() };
        load(&path, &options, &registry()).unwrap_or_else(|errors| panic!("{errors}"))
    }

    fn codes(&self, text: &str, sets: &[&str]) -> Vec<&'static str> {
        let path = self.write("test.toml", text);
        let options = LoadOptions { sets: sets.iter().map(|set| (*set).to_owned()).collect() };
        load(&path, &options, &registry()).map(|_| ()).unwrap_err().iter().map(|error| error.code).collect()
    }
}

const CHAIN: &str = r#"
name = "chain"
seed = 42

[defaults]
device = { cpu = 2 }
train = { lr = 0.5 }

[stage.eval]
kind = "eval"
inputs = { models = ["base", "dpo"] }

[stage.corpus]
kind = "corpus"
sources = [{ path = "data/*.txt", weight = 0.6 }, { path = "data/pairs.jsonl" }]

[stage.tokenizer]
kind = "tokenizer"
inputs = { corpus = "corpus" }

[stage.base]
kind = "pretrain"
seed = 7
inputs = { corpus = "corpus.text", tokenizer = "tokenizer" }
train = { steps = 1000, schedule = { decay = 0.2 } }
zero = 2

[stage.preferences]
kind = "preferences"
inputs = { tokenizer = "tokenizer" }
sources = [{ path = "data/pairs.jsonl" }]

[stage.dpo]
kind = "dpo"
inputs = { model = "base", data = "preferences" }
beta = 1
train.lr = 0.25
"#;

fn stage<'a>(workflow: &'a Workflow, name: &str) -> &'a Stage {
    &workflow.stages[workflow.find(name).unwrap()]
}

#[test]
fn a_chain_is_read() {
    let workflow = Folder::new().load(CHAIN);
    assert_eq!((workflow.name.as_str(), workflow.edition, workflow.seed), ("chain", 1, 42));
    let names: Vec<_> = workflow.stages.iter().map(|stage| stage.name.as_str()).collect();
    assert_eq!(names, ["eval", "corpus", "tokenizer", "base", "preferences", "dpo"]);
    assert_eq!(workflow.order, [1, 2, 3, 4, 5, 0]);
    assert_eq!(workflow.dag.inputs(5), [3, 4]);
    assert_eq!(workflow.dag.dependents(3), [0, 5]);
    assert_eq!(workflow.dag.ancestors(&[5]), [false, true, true, true, true, true]);
    assert_eq!(workflow.dag.descendants(&[4]), [true, false, false, false, true, true]);

    let base = stage(&workflow, "base");
    assert_eq!((base.seed, stage(&workflow, "dpo").seed), (7, 42));
    let expected = serde_json::json!({
        "model": { "hidden_size": 64, "heads": 4 },
        // The rate is [defaults]'.
        "train": { "steps": 1000, "lr": 0.5, "batch_size": 32, "schedule": { "decay": 0.2 }, "betas": [0.9, 0.95] },
        "shuffle": false
    });
    assert_eq!(base.identity_settings, expected);
    let set = base.config.settings();
    assert_eq!((&set["device"], &set["zero"]), (&serde_json::json!({ "cpu": 2 }), &serde_json::json!(2)));
    // What enters keys is canonical, as if it were written from the value.
    for stage in &workflow.stages {
        assert_eq!(crate::canonical::to_vec(&stage.identity_settings), stage.identity_settings.canonical());
    }
    let without_steps = |stage: &Stage| {
        let mut out = Vec::new();
        stage.identity_settings.write_without(&["train.steps"], &mut out);
        serde_json::from_slice::<serde_json::Value>(&out).unwrap()
    };
    assert_eq!(without_steps(base)["train"].get("steps"), None);
    assert_eq!(without_steps(base)["train"]["lr"], 0.5);
    // An integer where a float belongs, and the stage's own value over the default's.
    assert_eq!(stage(&workflow, "dpo").identity_settings["beta"].as_f64(), Some(1.0));
    assert!(stage(&workflow, "dpo").identity_settings["beta"].is_f64());
    assert_eq!(stage(&workflow, "dpo").identity_settings["train"]["lr"], 0.25);
    assert_eq!(stage(&workflow, "preferences").identity_settings, serde_json::json!({ "sources": [{ "weight": 1.0 }] }));

    let file_names = |stage: &Stage| -> Vec<Vec<String>> {
        let name = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
        stage.files.iter().map(|files| files.iter().map(name).collect()).collect()
    };
    assert_eq!(file_names(stage(&workflow, "corpus")), [vec!["a.txt", "b.txt"], vec!["pairs.jsonl"]]);
    assert_eq!(stage(&workflow, "eval").inputs["models"], [3, 5].map(|stage| Edge { stage, port: "model".into() }));

    // Two ranks were asked for, and planning may ask again with four.
    assert_eq!(base.described.needs.parameter_bytes, 500);
    let four = Placement { devices: vec![DeviceSpec::Cpu; 4], zero: 2, ..Placement::default() };
    assert_eq!(workflow.describe(3, &four).unwrap().needs.parameter_bytes, 250);
    assert_eq!(base.described.output("model").unwrap().tokenizer.as_ref().unwrap().to_string(), "tokenizer.tokenizer");
    let problem = rlflow_api::Problem::new("cannot_fit", "train.schedule", "it cannot fit").hint("buy more");
    assert_eq!((workflow.error(3, &problem).line, workflow.error(3, &problem).column), (25, 36));
    let problem = rlflow_api::Problem::new("cannot_fit", "inputs.tokenizer", "it cannot fit");
    assert_eq!(workflow.error(3, &problem).line, 24);
}

/// Of stages on other ports nothing is copied: with many of them that would be most of the work.
#[test]
fn only_ports_that_name_kinds_know_how_stages_are_made() {
    let text = r#"
[stage.sft]
kind = "import"
path = "checkpoint"
[stage.actor]
kind = "ppo.actor"
inputs = { model = "sft" }
[stage.ppo]
kind = "ppo"
inputs = { actor = "actor" }
steps = 5
[stage.eval]
kind = "eval"
inputs = { models = ["sft", "ppo"] }
"#;
    let workflow = Folder::new().load(text);
    let gpu = Placement { devices: vec![DeviceSpec::Cuda(3)], ..Placement::default() };
    let known = |stage: &str| -> Vec<(Placement, bool, Vec<String>)> {
        let inputs = workflow.inputs(workflow.find(stage).unwrap(), &|_| gpu.clone(), &|_| None);
        let of_edge = |input: InputMeta| {
            (input.placement, input.settings.is_null(), input.made_of.iter().map(ToString::to_string).collect::<Vec<_>>())
        };
        inputs.into_values().flatten().map(of_edge).collect()
    };
    assert_eq!(known("ppo"), [(gpu.clone(), false, vec!["sft.model".to_owned()])]);
    assert_eq!(known("eval"), vec![(Placement::default(), true, Vec::<String>::new()); 2]);
}

#[test]
fn points_of_a_matrix_are_expanded_joined_and_collected() {
    let text = r#"
[stage.sft]
kind = "import"
path = "checkpoint"
[stage.actor]
kind = "ppo.actor"
matrix = { zero = [1, 2], offload = ["none", "cpu"] }
inputs = { model = "sft" }
[stage.ppo]
kind = "ppo"
matrix = { steps = [5] }
inputs = { actor = "actor" }
[stage.again]
kind = "ppo"
steps = 1
inputs = { actor = "actor[zero=2]" }
[stage.once]
kind = "ppo"
steps = 1
inputs = { actor = "actor[zero=2.0, offload=cpu].role" }
[stage.seeds]
kind = "ppo"
steps = 1
matrix.seed = [3, 4]
inputs = { actor = "actor[zero=1,offload=cpu]" }
[stage.eval]
kind = "eval"
inputs = { models = ["again[*]", "seeds"] }
"#;
    let folder = Folder::new();
    let workflow = folder.load(text);
    let lines: Vec<String> = workflow
        .stages
        .iter()
        .map(|stage| {
            let inputs: Vec<_> = stage.inputs.values().flatten().map(|edge| workflow.stages[edge.stage].name.as_str()).collect();
            format!("{} <- {} (seed {})", stage.name, inputs.join(" "), stage.seed)
        })
        .collect();
    insta::assert_snapshot!("expanded", lines.join("\n"));
    assert_eq!(stage(&workflow, "ppo[zero=1,offload=none,steps=5]").identity_settings, serde_json::json!({ "steps": 5 }));
    assert_eq!(stage(&workflow, "actor[zero=2,offload=cpu]").config.settings()["zero"], 2);

    let select = |names: &[&str]| workflow.select(&names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>());
    assert_eq!(select(&["sft", "eval"]).unwrap().len(), 2);
    assert_eq!(select(&["ppo"]).unwrap().len(), 4);
    assert_eq!(select(&["actor[*]"]).unwrap().len(), 4);
    assert_eq!(select(&["actor[zero=1]"]).unwrap().len(), 2);
    assert_eq!(select(&["actor[offload=cpu,zero=1]"]).unwrap(), [workflow.find("actor[zero=1,offload=cpu]").unwrap()]);
    let error = select(&["evall"]).unwrap_err();
    assert_eq!(error.iter().next().unwrap().hint.as_deref(), Some("did you mean `eval`?"));
    // A matrix is set by its list.
    assert_eq!(folder.load_with(text, &["stage.ppo.matrix.steps=[5, 6]"]).stages.len(), workflow.stages.len() + 4);
}

#[test]
fn included_files_lie_under_and_paths_stay_where_they_are_written() {
    let folder = Folder::new();
    folder.write("shared/data/own.txt", "own");
    folder.write("shared/tokenizer.toml", "[stage.tokenizer]\nkind = \"tokenizer\"\ninputs = { corpus = \"corpus\" }\nvocab_size = 300\n");
    folder.write(
        "shared/base.toml",
        "include = [\"tokenizer.toml\"]\nseed = 1\n[stage.corpus]\nkind = \"corpus\"\nheld_out = 0.2\nsources = [{ path = \"data/own.txt\" }]\n",
    );
    let workflow =
        folder.load("include = [\"shared/base.toml\", \"shared/tokenizer.toml\"]\nseed = 2\n[stage.tokenizer]\nvocab_size = 400\n");
    assert_eq!(workflow.seed, 2);
    assert_eq!(workflow.sources.len(), 3);
    assert_eq!(stage(&workflow, "tokenizer").identity_settings["vocab_size"], 400);
    assert_eq!(stage(&workflow, "corpus").files, [vec![folder.0.path().join("shared/data/own.txt")]]);
    let moved =
        folder.load_with("include = [\"shared/base.toml\"]\n", &["stage.corpus.sources[0].path=data/a.txt", "stage.corpus.held_out=0.3"]);
    assert_eq!(stage(&moved, "corpus").files, [vec![folder.0.path().join("data/a.txt")]]);
    assert_eq!(stage(&moved, "corpus").identity_settings["held_out"], 0.3);
}

#[test]
fn sets_override_and_are_checked_like_the_file() {
    let folder = Folder::new();
    let set = |argument: &str| folder.load_with(CHAIN, &[argument]);
    assert_eq!(stage(&set("stage.dpo.beta=0.2"), "dpo").identity_settings["beta"], 0.2);
    assert_eq!(stage(&set("stage.dpo.device=cuda:1"), "dpo").config.settings()["device"], "cuda:1");
    assert_eq!(stage(&set("stage.base.train.schedule=linear"), "base").identity_settings["train"]["schedule"], "linear");
    assert_eq!(stage(&set("defaults.train.lr=0.125"), "base").identity_settings["train"]["lr"], 0.125);
    assert_eq!(set("seed=5").seed, 5);
    assert_eq!(stage(&set("stage.dpo.seed=9"), "dpo").seed, 9);
    assert_eq!(set("name=\"other\"").name, "other");
    assert_eq!(stage(&set("stage.eval.inputs.models=[\"base\"]"), "eval").inputs["models"].len(), 1);
    assert_eq!(set("stage.corpus.sources=[{ path = 'data/a.txt' }]").stages[1].files.len(), 1);

    let wrong = [
        "stage.dpo.betaa=0.2",
        "stage.dpo.beta=much",
        "stage.dpo.beta=[0.1",
        "stage.dpo.beta=-1",
        "stage.dpo.beta=nan",
        "stage.dppo.beta=0.2",
        "stage.dpo=0.2",
        "dpo.beta=0.2",
        "beta=0.2",
        "stage.dpo.beta",
        "stage.dpo.beta=",
        "=",
        "",
        "defaults=3",
        "defaults.betaa=3",
        "sed=3",
        "seed=-1",
        "stage.corpus.sources[7].path=data/a.txt",
        "stage.corpus.sources[0].path=data/zzz.txt",
        "stage.eval.inputs.models=bass",
        "stage.dpo.kind=dop",
        "include=[\"x\"]",
    ];
    folder.write("test.toml", CHAIN);
    let path = folder.0.path().join("test.toml");
    let reports: Vec<String> = wrong.iter().map(|set| failing(&path, &[set])).collect();
    let shown = reports.join("\n").replace(folder.0.path().to_str().unwrap(), "FOLDER");
    insta::assert_snapshot!("wrong_sets", shown);
}

#[test]
fn editions_freeze_defaults() {
    let folder = Folder::new();
    let path = |edition: &str| {
        folder.write("test.toml", &CHAIN.replace("train = { lr = 0.5 }", "").replace("seed = 42", &format!("seed = 42\n{edition}")))
    };
    let rate = |edition: &str, newest: u32| {
        let workflow = load(&path(edition), &LoadOptions::default(), &registry().with_newest_edition(newest)).unwrap();
        stage(&workflow, "base").identity_settings["train"]["lr"].as_f64().unwrap()
    };
    // An old file means under a newer program what it meant before, whether or not it names its edition's default.
    assert_eq!(rate("edition = 1", 1), 2e-3);
    assert_eq!(rate("edition = 1", 2), 2e-3);
    assert_eq!(rate("edition = 2", 2), 1e-3);
    assert_eq!(rate("", 2), 1e-3);
    // [defaults] lie over the edition's.
    assert_eq!(stage(&folder.load(CHAIN), "base").identity_settings["train"]["lr"], 0.5);
}

#[test]
fn errors_have_stable_json_and_a_rich_form() {
    let folder = Folder::new();
    let path = folder.write("test.toml", "[stage.corpus]\nkind = \"corpus\"\nsources = [{ path = \"data/a.txt\" }]\nheldout = 0.1\n");
    let errors = load(&path, &LoadOptions::default(), &registry()).err().unwrap();
    let expected = serde_json::json!({ "errors": [{
        "code": "unknown_key",
        "message": "stage `corpus` (kind `corpus`) has no setting `heldout`",
        "file": path.to_str().unwrap(),
        "line": 4,
        "column": 1,
        "hint": "did you mean `held_out`?",
    }] });
    assert_eq!(errors.to_json(), expected);
    let mut rich = String::new();
    let handler = miette::GraphicalReportHandler::new_themed(miette::GraphicalTheme::unicode_nocolor());
    handler.render_report(&mut rich, errors.iter().next().unwrap()).unwrap();
    assert!(rich.contains("heldout = 0.1") && rich.contains("did you mean `held_out`?") && rich.contains(":4:1]"), "{rich}");
}

/// A file that is no workflow is not sent to the terminal as it is.
#[test]
fn control_characters_are_not_printed() {
    let folder = Folder::new();
    let path = folder.write("wrong.toml", "na\u{1b}[2J\u{9b}me = \"a\u{7f}\"\r\n\u{8}\n");
    let errors = load(&path, &LoadOptions::default(), &registry()).err().unwrap();
    let mut shown = errors.to_string();
    let handler = miette::GraphicalReportHandler::new_themed(miette::GraphicalTheme::unicode_nocolor());
    errors.iter().for_each(|error| handler.render_report(&mut shown, error).unwrap());
    assert!(shown.contains("na?[2J\u{b7}me"), "{shown}");
    assert!(!shown.contains(|character: char| character.is_control() && character != '\n'), "{shown:?}");
}

mod properties {
    use proptest::prelude::*;

    use super::*;

    /// Settings of `dpo` as written in several ways: each entry is what is written, and what else means the same.
    const SPELLINGS: [[&str; 3]; 6] = [
        ["beta = 0.1", "", "beta = 1e-1 # the default"],
        ["label_smoothing = 0", "label_smoothing = 0.0", ""],
        ["train.batch_size = 32", "train.batch_size = 0x20", ""],
        ["train.lr = 0.001", "\"train\".lr = 1.0e-3", ""],
        ["train.betas = [0.9, 0.95]", "", "train.betas = [\n  9e-1,\n  0.95,\n]"],
        ["train.schedule = \"cosine\"", "", "train.schedule = '''cosine'''"],
    ];

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        /// Order, comments, spelled-out defaults, names and execution settings never change what a key is made of.
        #[test]
        fn spelling_does_not_matter(
            choices in prop::array::uniform6(0_usize..3),
            order in Just((0..8).collect::<Vec<usize>>()).prop_shuffle(),
            lines in Just((0..6).collect::<Vec<usize>>()).prop_shuffle(),
            name in "[A-Za-z0-9_-]{1,12}",
            device in prop::sample::select(vec!["", "device = \"cuda:3\"", "device = { cpu = 8 }", "zero = 3\noffload = \"cpu\""]),
            in_defaults: bool,
        ) {
            prop_assume!(!["a", "b", "c", "d"].contains(&name.as_str()));
            let written: Vec<&str> = lines.iter().map(|line| SPELLINGS[*line][choices[*line]]).collect();
            let (own, defaults) = if in_defaults { (vec![], written) } else { (written, vec![]) };
            let mut tables = [
                "[stage.a]\nkind = \"corpus\"\nsources = [{ path = \"data/a.txt\" }]".to_owned(),
                "[stage.b]\nkind = \"tokenizer\"\ninputs = { corpus = \"a\" }".to_owned(),
                "[stage.c]\nkind = \"pretrain\"\ninputs = { corpus = \"a\", tokenizer = \"b\" }\ntrain.lr = 0.001".to_owned(),
                "[stage.d]\nkind = \"preferences\"\nsources = [{ path = \"data/pairs.jsonl\" }]\ninputs.tokenizer = \"b\"".to_owned(),
                format!("[stage.{name}]\n{device}\n{}\nkind = \"dpo\"\ninputs = {{ data = \"d\", model = \"c\" }}", own.join("\n")),
                format!("[defaults]\n{}", defaults.join("\n")),
                "# a comment".to_owned(),
                String::new(),
            ];
            let original = std::mem::take(&mut tables);
            let text: Vec<&str> = order.iter().map(|index| original[*index].as_str()).collect();
            let workflow = Folder::new().load(&text.join("\n\n"));
            let expected = serde_json::json!({
                "beta": 0.1,
                "label_smoothing": 0.0,
                "train": { "steps": null, "lr": 0.001, "batch_size": 32, "schedule": "cosine", "betas": [0.9, 0.95] }
            });
            prop_assert_eq!(&*stage(&workflow, &name).identity_settings, &expected);
        }

        /// A changed, cut or repeated piece of a good file is loaded or refused, and never panics.
        #[test]
        fn damaged_files_are_refused_politely(
            at in 0_usize..CHAIN.len(),
            length in 0_usize..40,
            piece in prop::sample::select(vec![
                "", "[", "]", "{", "}", "=", "\"", "\n", ".", ",", "[*]", "[a=b]", "matrix = { beta = [1, 2] }\n", "nan", "-9223372036854775808",
                "99999999999999999999999", "1e999", "\u{0}", "é", "include = [\"test.toml\"]\n", "[stage.x]\n", "inputs = 3\n", "1979-05-27",
            ]),
        ) {
            let folder = Folder::new();
            let end = (at + length).min(CHAIN.len());
            let path = folder.write("test.toml", &format!("{}{piece}{}", &CHAIN[..at], &CHAIN[end..]));
            if let Err(errors) = load(&path, &LoadOptions::default(), &registry()) {
                prop_assert!(!errors.is_empty());
                prop_assert!(errors.iter().all(|error| error.code != "internal"), "{}", errors);
            }
        }

        /// So are `--set` arguments of any kind.
        #[test]
        fn any_set_is_refused_politely(argument in "(stage|defaults|seed|)[.]?(dpo|base|)[.]?[a-z.\\[\\]0-9=\"'{}, -]{0,20}") {
            let folder = Folder::new();
            let path = folder.write("test.toml", CHAIN);
            let options = LoadOptions { sets: vec![argument] };
            if let Err(errors) = load(&path, &options, &registry()) {
                prop_assert!(!errors.to_string().is_empty());
            }
        }
    }
}

#[test]
fn deep_and_large_files_are_bounded() {
    let folder = Folder::new();
    let dotted = "a.".repeat(60_000) + "b = 1\n";
    assert_eq!(folder.codes(&dotted, &[]), ["syntax"]);
    let nested = "[stage.x]\nkind = \"corpus\"\nsources = ".to_owned() + &"{ a = ".repeat(5_000) + "1" + &" }".repeat(5_000);
    assert_eq!(folder.codes(&nested, &[])[0], "syntax");
    // Ten files that include the next one twice each: read once each, not 1,024 times.
    for index in 0..10 {
        let next = index + 1;
        folder.write(&format!("{index}.toml"), &format!("include = [\"{next}.toml\", \"./{next}.toml\"]\n"));
    }
    folder.write("10.toml", "[stage.corpus]\nkind = \"corpus\"\nsources = [{ path = \"data/a.txt\" }]\n");
    assert_eq!(folder.load("include = [\"0.toml\"]\n").sources.len(), 12);
    assert_eq!(folder.codes("include = [\"test.toml\"]\n", &[]), ["empty_workflow", "include_cycle"]);
    let set = "stage.dpo.".to_owned() + &"a.".repeat(100_000) + "b=1";
    assert_eq!(folder.codes(CHAIN, &[&set]), ["bad_set"]);
    let axis = "a.".repeat(100_000) + "b";
    assert_eq!(folder.codes(&CHAIN.replace("beta = 1", &format!("matrix = {{ \"{axis}\" = [1] }}")), &[]), ["bad_matrix"]);
}

#[test]
fn a_wrong_number_does_not_hide_checks_that_do_not_concern_it() {
    let folder = Folder::new();
    let codes = |model: &str, steps: &str| {
        let broken = CHAIN.replace("train = { steps = 1000", &format!("model = {model}\ntrain = {{ steps = {steps}"));
        folder.codes(&broken, &[])
    };
    assert_eq!(codes("{ heads = 5 }", "0"), ["indivisible", "out_of_range"]);
    assert_eq!(codes("{ heads = 5 }", "true"), ["indivisible", "wrong_type"]);
    assert_eq!(codes("{ heads = 5, hidden_size = 0 }", "1"), ["out_of_range"], "what would divide nobody knows");
}
