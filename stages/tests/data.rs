//! The kinds that read data: from files to typed artifacts.

use std::{collections::BTreeMap, fs, io::Write, ops::Deref, path::PathBuf};

use rlflow_api::{
    Artifact, DataFile, DataSource, DescribeContext, Digest, Kind, Placement, RunContext, StageError, StageEvent, StageResult, StoreError,
    testing,
};
use rlflow_text::{
    ChatTokenizer, ConversationDataset, PreferenceDataset, PromptDataset, Split, TextDataset, TokenDataset, tokenize_corpus,
};
use serde_json::{Value, json};

/// A folder with data and a store.
struct Bench {
    _folder: tempfile::TempDir,
    bench: testing::Bench,
}

impl Deref for Bench {
    type Target = testing::Bench;

    fn deref(&self) -> &testing::Bench {
        &self.bench
    }
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self { bench: testing::Bench::new(folder.path()).unwrap(), _folder: folder }
    }

    fn write_rows(&self, name: &str, rows: &[Value]) {
        let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
        self.write(name, lines.join("\n"));
    }

    fn with_context<T>(
        &self,
        seed: u64,
        inputs: &[(&str, &Artifact)],
        files: &[Vec<DataFile>],
        work: impl FnOnce(&RunContext<'_>) -> T,
    ) -> T {
        self.bench.with_context("test", seed, inputs, files, work)
    }

    /// Runs a kind and returns its only output. Paths in its settings name files of the folder.
    fn run(&self, kind: &dyn Kind, settings: Value, inputs: &[(&str, &Artifact)]) -> StageResult<Artifact> {
        self.run_with(1, kind, settings, inputs)
    }

    fn run_with(&self, seed: u64, kind: &dyn Kind, settings: Value, inputs: &[(&str, &Artifact)]) -> StageResult<Artifact> {
        let stage = kind.parse(&settings).unwrap();
        assert!(kind.check(&stage).is_empty(), "{:?}", kind.check(&stage));
        let files: Vec<Vec<DataFile>> = kind.data_sources(&stage).iter().map(|source| self.found(source)).collect();
        let outputs = self.with_context(seed, inputs, &files, |context| kind.run(&stage, context))?;
        assert_eq!(outputs.len(), 1);
        Ok(outputs.into_values().next().unwrap())
    }

    /// The file that a source names, or those of a directory that are wanted of it.
    fn found(&self, source: &DataSource) -> Vec<DataFile> {
        let path = self.path(&source.pattern);
        if !path.is_dir() {
            return vec![testing::data_file(&path)];
        }
        let mut files: Vec<PathBuf> = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.retain(|file| source.endings.iter().any(|ending| file.to_string_lossy().ends_with(ending)));
        files.sort();
        files.iter().map(|file| testing::data_file(file)).collect()
    }

    fn corpus(&self, settings: Value) -> StageResult<Artifact> {
        self.run(kind("corpus"), settings, &[])
    }

    /// Last value of every metric since the last call.
    fn metrics(&self) -> BTreeMap<String, f64> {
        let metrics = self.take_events().into_iter().filter_map(|event| match event {
            StageEvent::Metrics { values, .. } => Some(values),
            _ => None,
        });
        metrics.flatten().collect()
    }

    fn tokenizer(&self) -> Artifact {
        self.write("tokens.txt", "Hello there.\n\nHello again, what is 12 + 30?\n\n你好，世界。\n\n");
        let corpus = self.corpus(json!({"sources": [{"path": "tokens.txt"}], "heldout": 0.0})).unwrap();
        self.run(kind("tokenizer"), json!({"vocab_size": 300}), &[("corpus", &corpus)]).unwrap()
    }
}

fn kind(name: &str) -> &'static dyn Kind {
    rlflow_stages::kinds().into_iter().find(|kind| kind.name() == name).unwrap()
}

fn documents(artifact: &Artifact, split: Split) -> Vec<String> {
    TextDataset::load(artifact, split).unwrap().documents().map(str::to_owned).collect()
}

/// All documents, sorted: what there is, whatever the split.
fn everything(artifact: &Artifact) -> Vec<String> {
    let mut all = [documents(artifact, Split::Train), documents(artifact, Split::HeldOut)].concat();
    all.sort();
    all
}

fn data_error(result: StageResult<Artifact>) -> (String, Option<u64>, String) {
    match result.map(|_| ()).unwrap_err() {
        StageError::Data { path, line, message, .. } => (path, line, message),
        other => panic!("{other}"),
    }
}

fn gz(content: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(content).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn text_is_split_normalised_and_deduplicated() {
    let bench = Bench::new();
    // A byte order mark, CRLF, blank lines with spaces, the same paragraph twice, and twice again in other Unicode forms.
    bench.write("a.txt", "\u{feff}one\r\ntwo\r\n\r\n  \r\ncaf\u{e9}\n\none\ntwo\n\n\ncafe\u{301}\n你好\n");
    let artifact = bench.corpus(json!({"sources": [{"path": "a.txt"}], "heldout": 0.0})).unwrap();
    assert_eq!(documents(&artifact, Split::Train), ["one\ntwo", "caf\u{e9}", "caf\u{e9}\n你好"]);
    let metrics = bench.metrics();
    assert_eq!((metrics["documents"], metrics["duplicates"], metrics["heldout_documents"]), (4.0, 1.0, 0.0));

    let lines = bench.corpus(json!({"sources": [{"path": "a.txt", "split": "line"}], "heldout": 0.0})).unwrap();
    assert_eq!(documents(&lines, Split::Train), ["one", "two", "caf\u{e9}", "你好"]);
    let file = bench.corpus(json!({"sources": [{"path": "a.txt", "split": "file"}], "heldout": 0.0})).unwrap();
    assert_eq!(documents(&file, Split::Train), ["one\ntwo\n\n  \ncaf\u{e9}\n\none\ntwo\n\n\ncaf\u{e9}\n你好"]);
}

#[test]
fn every_json_container_gives_the_same_corpus() {
    let bench = Bench::new();
    let rows: Vec<Value> = ["first", "第二", "th\"ird\n"].iter().map(|text| json!({"id": 1, "body": text})).collect();
    bench.write_rows("a.jsonl", &rows);
    let lines = fs::read(bench.path("a.jsonl")).unwrap();
    bench.write("b.json", serde_json::to_vec_pretty(&rows).unwrap());
    bench.write("c.jsonl.gz", [gz(&lines[..10]), gz(&lines[10..])].concat());
    bench.write("d.jsonl.zst", zstd::encode_all(lines.as_slice(), 3).unwrap());
    bench.write("e.jsonl", [b"\xef\xbb\xbf\r\n".as_slice(), &lines, b"\r\n\r\n"].concat());
    let digests: Vec<Digest> = ["a.jsonl", "b.json", "c.jsonl.gz", "d.jsonl.zst", "e.jsonl"]
        .iter()
        .map(|path| bench.corpus(json!({"sources": [{"path": path, "field": "body"}]})).unwrap().digest())
        .collect();
    assert!(digests.iter().all(|digest| *digest == digests[0]), "equal results have equal digests: {digests:?}");
}

#[test]
fn held_out_documents_do_not_depend_on_their_neighbours() {
    let bench = Bench::new();
    let text = |range: std::ops::Range<usize>| range.map(|number| format!("document {number}\n\n")).collect::<String>();
    bench.write("a.txt", text(0..1000));
    bench.write("b.txt", text(500..1500));
    let heldout = |sources: Value| {
        let artifact = bench.corpus(json!({"sources": sources, "heldout": 0.1})).unwrap();
        let heldout = documents(&artifact, Split::HeldOut);
        let train = documents(&artifact, Split::Train);
        assert!(heldout.iter().all(|document| !train.contains(document)));
        heldout.into_iter().collect::<std::collections::BTreeSet<_>>()
    };
    let (a, b) = (heldout(json!([{"path": "a.txt"}])), heldout(json!([{"path": "b.txt"}])));
    assert!((60..140).contains(&a.len()), "{}", a.len());
    let both = heldout(json!([{"path": "b.txt"}, {"path": "a.txt"}]));
    assert_eq!(both, a.union(&b).cloned().collect());

    // A source that is held out wins over the same documents elsewhere, wherever it stands.
    let settings = json!({"sources": [{"path": "a.txt"}], "heldout_sources": [{"path": "b.txt"}], "heldout": 0.0});
    let artifact = bench.corpus(settings).unwrap();
    assert_eq!((documents(&artifact, Split::Train).len(), documents(&artifact, Split::HeldOut).len()), (500, 1000));

    // Of few documents one is held out all the same, and always the same one.
    bench.write("few.txt", "x\n\ny\n\nz");
    bench.write("wef.txt", "z\n\ny\n\nx");
    let few = |path: &str| documents(&bench.corpus(json!({"sources": [{"path": path}], "heldout": 0.001})).unwrap(), Split::HeldOut);
    assert_eq!(few("few.txt").len(), 1);
    assert_eq!(few("few.txt"), few("wef.txt"));
}

#[test]
fn the_mixture_is_drawn_and_recorded() {
    let bench = Bench::new();
    bench.write("a.txt", (0..300).map(|number| format!("a{number}\n")).collect::<String>());
    bench.write("b.txt", (0..20).map(|number| format!("b{number}\n")).collect::<String>());
    let settings = |weights: Value| {
        json!({"heldout": 0.0, "sources": [
            {"path": "a.txt", "split": "line", "weight": weights[0]}, {"path": "b.txt", "split": "line", "weight": weights[1], "epochs": 2.5},
        ]})
    };
    let artifact = bench.corpus(settings(json!([3, 1]))).unwrap();
    let train = documents(&artifact, Split::Train);
    let b = train.iter().filter(|document| document.starts_with('b')).count();
    assert_eq!((train.len(), b), (350, 50));
    let mixture: Value = serde_json::from_slice(&artifact.read("mixture.json").unwrap()).unwrap();
    let (first, second) = (&mixture["sources"][0], &mixture["sources"][1]);
    assert_eq!((first["weight"].as_f64(), second["weight"].as_f64()), (Some(0.75), Some(0.25)));
    assert_eq!((first["drawn"].as_u64(), second["drawn"].as_u64()), (Some(300), Some(50)));
    assert_eq!((first["epochs"].as_f64(), second["epochs"].as_f64()), (Some(1.0), Some(2.5)));
    let drawn_bytes: usize = train.iter().filter(|document| document.starts_with('b')).map(String::len).sum();
    assert_eq!(second["drawn_bytes"].as_u64(), Some(drawn_bytes as u64));
    assert_eq!(bench.metrics()["source1/epochs"], 2.5);
    // A document that is drawn twice is stored once.
    assert!(artifact.read("text").unwrap().len() < train.iter().map(String::len).sum());
    // Weights are only relative; the seed matters.
    assert_eq!(bench.corpus(settings(json!([6, 2]))).unwrap().manifest().entry("train"), artifact.manifest().entry("train"));
    let other = bench.run_with(2, kind("corpus"), settings(json!([3, 1])), &[]).unwrap();
    assert_ne!(documents(&other, Split::Train), train);
    assert_eq!(everything(&other).len(), 350);

    let capped = json!({"heldout": 0.0, "max_documents": 2000, "sources": [{"path": "a.txt", "split": "line", "weight": 1}, {"path": "b.txt", "split": "line", "weight": 1}]});
    let train = documents(&bench.corpus(capped).unwrap(), Split::Train);
    let a = train.iter().filter(|document| document.starts_with('a')).count();
    assert_eq!(train.len(), 2000);
    assert!((900..1100).contains(&a), "{a}");
}

#[test]
fn one_long_document_can_be_weighed_and_held_out_in_parts() {
    let bench = Bench::new();
    let text: String = (0..400).map(|number| format!("Sentence number {number} stands here. ")).collect();
    bench.write("long.txt", &text);
    bench.write("short.txt", (0..200).map(|number| format!("line {number}\n")).collect::<String>());
    let whole = bench.corpus(json!({"sources": [{"path": "long.txt"}]})).unwrap();
    assert_eq!(everything(&whole).len(), 1);
    let cut = bench.corpus(json!({"sources": [{"path": "long.txt"}], "max_document_bytes": 200, "heldout": 0.1})).unwrap();
    assert_eq!(everything(&cut).concat().len(), text.len());
    assert!(everything(&cut).iter().all(|document| document.len() <= 200) && !documents(&cut, Split::HeldOut).is_empty());
    // One document against 200: its weight means 200 passes, which is worth a word.
    let sources = json!([{"path": "long.txt", "weight": 1}, {"path": "short.txt", "split": "line", "weight": 1}]);
    bench.corpus(json!({"sources": sources, "heldout": 0.0})).unwrap();
    assert!(bench.warnings().iter().any(|text| text.contains("long.txt: its 1 documents are passed")));
}

#[test]
fn bad_files_are_named_with_the_place() {
    let bench = Bench::new();
    let corpus = |path: &str| data_error(bench.corpus(json!({"sources": [{"path": path}]})));

    bench.write("broken.jsonl", "{\"text\": \"a\"}\n\n{\"text\": \"b\"\n{\"text\": \"c\"}\n");
    let (path, line, message) = corpus("broken.jsonl");
    assert_eq!((path.as_str(), line), ("broken.jsonl", Some(3)));
    assert!(message.contains("broken JSON") && message.contains("{\"text\": \"b\""), "{message}");

    bench.write("broken.json", "[\n {\"text\": \"a\"},\n {\"text\": \"b\"\n]\n");
    assert_eq!(corpus("broken.json").1, Some(4));
    bench.write("after.json", "[{\"text\": \"a\"}]\n\n{\"text\": \"b\"}");
    assert_eq!(corpus("after.json").1, Some(3));

    bench.write("latin1.txt", b"good line\ncaf\xe9\n");
    let (_, line, message) = corpus("latin1.txt");
    assert_eq!(line, Some(2));
    assert!(message.contains("0xe9") && message.contains("offset 13"), "{message}");
    bench.write("utf16.txt", b"\xff\xfea\0b\0");
    assert!(corpus("utf16.txt").2.contains("UTF-16"));

    let whole = gz("{\"text\": \"some text that is long enough to be cut\"}\n".repeat(50).as_bytes());
    bench.write("cut.jsonl.gz", &whole[..whole.len() - 12]);
    assert!(corpus("cut.jsonl.gz").2.contains("truncated"));
    let whole = zstd::encode_all("{\"text\": \"some text\"}\n".repeat(50).as_bytes(), 3).unwrap();
    bench.write("cut.jsonl.zst", &whole[..whole.len() - 4]);
    assert!(corpus("cut.jsonl.zst").2.contains("truncated"));
    bench.write("not.jsonl.gz", "{\"text\": \"plain\"}\n");
    assert!(corpus("not.jsonl.gz").2.contains("not gzip"));

    for (name, content) in [("empty.txt", ""), ("blank.txt", " \n\n\r\n"), ("empty.jsonl", ""), ("empty.json", "[]")] {
        bench.write(name, content);
        assert!(corpus(name).2.contains(if content.is_empty() { "the file is empty" } else { "no documents" }), "{name}");
    }

    bench.write("other.jsonl", "{\"title\": \"a\", \"body\": \"b\"}\n");
    let (_, line, message) = corpus("other.jsonl");
    assert_eq!(line, Some(1));
    assert!(message.contains("no field `text` (it has title, body)"), "{message}");
    bench.write("some.jsonl", "{\"text\": \"a\"}\n{\"text\": null}\n{\"text\": \"c\"}\n");
    let artifact = bench.corpus(json!({"sources": [{"path": "some.jsonl"}]})).unwrap();
    assert_eq!(everything(&artifact), ["a", "c"]);
    assert!(bench.warnings().iter().any(|text| text.contains("1 of 3 rows") && text.contains("some.jsonl:2: `text` is null")));
}

#[test]
fn a_file_that_changed_after_planning_is_not_used() {
    let bench = Bench::new();
    bench.write("a.jsonl", "{\"text\": \"a\"}\n");
    let kind = kind("corpus");
    let stage = kind.parse(&json!({"sources": [{"path": "a.jsonl"}]})).unwrap();
    let files = [vec![testing::data_file(&bench.path("a.jsonl"))]];
    // Even where the new content is broken: that it changed explains more.
    for content in ["{\"text\": \"b\"}\n", "{\"text\": "] {
        bench.write("a.jsonl", content);
        let result = bench.with_context(1, &[], &files, |context| kind.run(&stage, context));
        assert!(matches!(result, Err(StageError::Store(StoreError::ChangedWhileRead { .. }))));
    }
    bench.write("a.jsonl", "{\"text\": \"a\"}\n");
    bench.cancel.cancel();
    let result = bench.with_context(1, &[], &files, |context| kind.run(&stage, context));
    assert!(matches!(result, Err(StageError::Interrupted)));
}

#[test]
fn planning_finds_what_cannot_work() {
    let corpus = kind("corpus");
    let problems = |settings: Value| corpus.check(&corpus.parse(&settings).unwrap());
    let partly = problems(json!({"sources": [{"path": "a", "weight": 1}, {"path": "b"}]}));
    assert_eq!((partly[0].setting.as_str(), partly.len()), ("sources[1]", 1));
    assert!(!problems(json!({"sources": [{"path": "a", "weight": 0}]})).is_empty());
    assert!(!problems(json!({"sources": [{"path": "a", "epochs": 0}]})).is_empty());
    assert!(corpus.parse(&json!({"sources": [{"path": "a", "wieght": 1}]})).is_err_and(|error| error.contains("wieght")));

    let describe = |name: &str, settings: Value, file: &str| {
        let kind = kind(name);
        let (inputs, files) = (BTreeMap::new(), [vec![PathBuf::from(file)]]);
        kind.describe(
            &kind.parse(&settings).unwrap(),
            &DescribeContext { stage: "s", inputs: &inputs, files: &files, placement: &Placement::default() },
        )
    };
    let source = |path: &str| json!({"sources": [{"path": path}]});
    assert!(describe("corpus", source("a.txt"), "a.txt").is_ok());
    for (name, file) in [("corpus", "a.docx"), ("instructions", "a.txt"), ("prompts", "a.html"), ("preferences", "a.parquet.gz")] {
        let problems = describe(name, source(file), file).unwrap_err();
        assert_eq!((problems[0].code, problems[0].setting.as_str()), ("unsupported_format", "sources[0].path"), "{name}");
    }
    assert!(describe("prompts", source("a.txt.gz"), "a.txt.gz").is_ok());
    assert_eq!(describe("tokenizer", json!({}), "x").unwrap_err()[0].setting, "inputs.corpus");

    let tokenizer = kind("tokenizer");
    let problems = |settings: Value| tokenizer.check(&tokenizer.parse(&settings).unwrap());
    assert_eq!(problems(json!({"pad_token": "<x>", "eos_token": "<x>"}))[0].setting, "pad_token");
    assert_eq!(problems(json!({"chat_template": "{% for %}"}))[0].code, "bad_template");
    assert_eq!(problems(json!({"config": "c.json"}))[0].setting, "config");
    // What only training uses is refused beside a finished tokenizer, and not in its key.
    for (setting, value) in [("vocab_size", json!(4096)), ("min_frequency", json!(2)), ("split_digits", json!(true))] {
        assert_eq!(problems(json!({"path": "tokenizer.json", setting: value}))[0].setting, setting);
        let settings = |settings: Value| tokenizer.parse(&settings).unwrap().settings().clone();
        assert_eq!(settings(json!({}))[setting], value);
        assert_eq!(settings(json!({"path": "tokenizer.json"})).get(setting), None);
    }
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name).display().to_string();
    fs::write(file("words.txt"), "not a tokenizer").unwrap();
    for name in ["words.txt", "tokenizer_config.json"] {
        let problem = &describe("tokenizer", json!({"path": file(name)}), &file(name)).unwrap_err()[0];
        assert_eq!((problem.code, problem.setting.as_str()), ("bad_tokenizer", "path"), "{name}");
    }
}

#[test]
fn tokenizers_come_from_a_corpus_or_a_file() {
    let bench = Bench::new();
    let trained = bench.tokenizer();
    assert_eq!(bench.tokenizer().digest(), trained.digest());
    let metrics = bench.metrics();
    assert!(metrics["bytes_per_token"] > 1.0 && metrics["vocab_size"] <= 300.0);

    bench.write("tokenizer.json", &*trained.read("tokenizer.json").unwrap());
    bench.write("tokenizer_config.json", &*trained.read("tokenizer_config.json").unwrap());
    let settings = json!({"path": "tokenizer.json", "config": "tokenizer_config.json"});
    let read = bench.run(kind("tokenizer"), settings, &[]).unwrap();
    assert_eq!(read.digest(), trained.digest(), "nothing had to be added");
    let tokenizer = ChatTokenizer::load(&trained).unwrap();
    assert_eq!(tokenizer.decode(&tokenizer.encode("你好，世界。")), "你好，世界。");

    bench.write("template.jinja", "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}");
    let settings = json!({"path": "tokenizer.json", "config": "tokenizer_config.json", "chat_template_file": "template.jinja"});
    let other = ChatTokenizer::load(&bench.run(kind("tokenizer"), settings, &[]).unwrap()).unwrap();
    assert_ne!(other.digest(), tokenizer.digest(), "the template is part of the digest");
    assert_eq!(other.render(&[rlflow_text::Message::user("x")], false).unwrap(), "x<|im_end|>");

    // The directory of a Hugging Face tokenizer, whose `chat_template.jinja` counts.
    fs::create_dir(bench.path("hf")).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(bench.path(name), bench.path("hf").join(name)).unwrap();
    }
    let directory = |bench: &Bench| bench.run(kind("tokenizer"), json!({"path": "hf"}), &[]);
    assert_eq!(directory(&bench).unwrap().digest(), trained.digest());
    fs::copy(bench.path("template.jinja"), bench.path("hf/chat_template.jinja")).unwrap();
    assert_eq!(ChatTokenizer::load(&directory(&bench).unwrap()).unwrap().digest(), other.digest());

    // Errors name the file that is meant, as the workflow does.
    let error = |settings: Value| bench.run(kind("tokenizer"), settings, &[]).unwrap_err().to_string();
    bench.write("broken.json", "{");
    let told = error(json!({"path": "tokenizer.json", "config": "broken.json"}));
    assert!(told.contains("broken.json") && !told.contains("tokenizer_config.json"), "{told}");
    bench.write("mine.json", "{}");
    let told = error(json!({"path": "mine.json"}));
    assert!(told.contains("mine.json") && !told.contains("tokenizer.json:"), "{told}");
}

#[test]
fn a_tokenised_corpus_has_every_document_with_its_end() {
    let bench = Bench::new();
    let tokenizer = ChatTokenizer::load(&bench.tokenizer()).unwrap();
    bench.write("a.txt", (0..500).map(|number| format!("paragraph {number} 猫\n\n")).collect::<String>());
    let corpus = bench.corpus(json!({"sources": [{"path": "a.txt", "epochs": 1.5}], "heldout": 0.1})).unwrap();
    let tokenise = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        bench.clear_memos();
        pool.install(|| bench.with_context(1, &[], &[], |context| tokenize_corpus(context, &corpus, &tokenizer)).unwrap())
    };
    let tokens = tokenise(1);
    assert_eq!(tokenise(2).digest(), tokens.digest());
    for split in [Split::Train, Split::HeldOut] {
        let (text, ids) = (TextDataset::load(&corpus, split).unwrap(), TokenDataset::load(&tokens, split).unwrap());
        assert_eq!(text.len(), ids.len());
        for index in 0..text.len() {
            let (last, document) = ids.document(index).split_last().unwrap();
            assert_eq!((tokenizer.decode(document).as_str(), *last), (text.document(index), tokenizer.document_end_id()));
        }
        assert_eq!(ids.total_tokens(), (0..ids.len()).map(|index| ids.document(index).len() as u64).sum::<u64>());
        assert_eq!(tokens.manifest().metadata["tokens"][split.entry()], ids.total_tokens());
    }
    assert_eq!(bench.memos(), 1);
    bench.with_context(1, &[], &[], |context| tokenize_corpus(context, &corpus, &tokenizer)).unwrap();
    assert_eq!(bench.memos(), 1, "kept, not made again");
    assert!(TokenDataset::load(&corpus, Split::Train).is_err_and(|error| error.to_string().contains("expected `tokens`")));
}

#[test]
fn instructions_of_all_formats_in_one_stage() {
    let bench = Bench::new();
    let tokenizer = bench.tokenizer();
    bench.write_rows(
        "a.jsonl",
        &[
            json!({"instruction": "你好", "input": "", "output": "世界。"}),
            json!({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]}),
            json!({"conversations": [{"from": "human", "value": "q"}]}),
            json!({"nothing": 1}),
        ],
    );
    bench.write("b.json", json!([{"prompt": "p", "completion": "c"}, {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}], "system": "own"}]).to_string());
    let settings = json!({"sources": [{"path": "a.jsonl"}, {"path": "b.json"}], "heldout": 0.0, "system": "S"});
    let artifact = bench.run(kind("instructions"), settings.clone(), &[("tokenizer", &tokenizer)]).unwrap();
    let warnings = bench.warnings();
    assert!(
        warnings
            .iter()
            .any(|text| text.contains("2 of 6 rows") && text.contains("a.jsonl:3: no assistant turn") && text.contains("a.jsonl:4: ")),
        "{warnings:?}"
    );
    let metrics = bench.metrics();
    assert_eq!((metrics["rows"], metrics["unusable_rows"], metrics["rows/alpaca"], metrics["rows/sharegpt"]), (6.0, 2.0, 1.0, 1.0));

    let (data, tokenizer) = (ConversationDataset::load(&artifact, Split::Train).unwrap(), ChatTokenizer::load(&tokenizer).unwrap());
    assert_eq!((data.len(), ConversationDataset::load(&artifact, Split::HeldOut).unwrap().len()), (4, 0));
    let texts: Vec<String> = data.rows().map(|row| tokenizer.decode_all(&row.ids)).collect();
    let system = "<|im_start|>system\nS<|im_end|>\n";
    assert_eq!(texts[0], format!("{system}<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n世界。<|im_end|>"));
    assert!(texts[3].starts_with("<|im_start|>system\nown<|im_end|>\n<|im_start|>user\nx"));
    let counted: Vec<u32> = std::iter::zip(data.row(1).ids, data.row(1).mask).filter(|(_, counts)| *counts).map(|(id, _)| id).collect();
    assert_eq!(tokenizer.decode_all(&counted), "b<|im_end|>d<|im_end|>");
    assert_eq!(artifact.manifest().metadata["tokenizer"], tokenizer.digest().to_string());

    // More unusable rows than allowed.
    let strict = json!({"sources": [{"path": "a.jsonl"}], "max_unusable": 0.4});
    let (path, line, message) = data_error(bench.run(kind("instructions"), strict, &[("tokenizer", &bench.tokenizer())]));
    assert_eq!((path.as_str(), line), ("a.jsonl", Some(3)));
    assert!(
        message.contains("2 of 4 rows") && message.contains("max_unusable = 0.4") && message.contains("no assistant turn"),
        "{message}"
    );
    let few = json!({"sources": [{"path": "a.jsonl"}], "max_rows": 2, "heldout": 0.0});
    let few = bench.run(kind("instructions"), few, &[("tokenizer", &bench.tokenizer())]).unwrap();
    assert_eq!(ConversationDataset::load(&few, Split::Train).unwrap().len(), 2);
}

#[test]
fn preferences_keep_their_order_and_margins() {
    let bench = Bench::new();
    let tokenizer = bench.tokenizer();
    bench.write_rows(
        "a.jsonl",
        &[
            json!({"prompt": "q", "chosen": "good", "rejected": "bad", "margin": 1.5}),
            json!({"chosen": "\n\nHuman: Hi\n\nAssistant: Yes", "rejected": "\n\nHuman: Hi\n\nAssistant: No"}),
            json!({"prompt": "q", "answers": ["x", "y", "z"], "scores": [1, 3, 2]}),
        ],
    );
    let settings = json!({"sources": [{"path": "a.jsonl"}], "heldout": 0.0});
    let artifact = bench.run(kind("preferences"), settings, &[("tokenizer", &tokenizer)]).unwrap();
    let tokenizer = ChatTokenizer::load(&tokenizer).unwrap();
    let rows: Vec<_> = PreferenceDataset::load(&artifact, Split::Train).unwrap().rows().collect();
    let text = |ids: &[u32]| tokenizer.decode_all(ids);
    let read: Vec<(String, Vec<String>, Option<f32>)> =
        rows.iter().map(|row| (text(&row.prompt), row.answers.iter().map(|answer| text(answer)).collect(), row.margin)).collect();
    let prompt = |question: &str| format!("<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n");
    let answers = |answers: &[&str]| answers.iter().map(|answer| format!("{answer}<|im_end|>")).collect::<Vec<_>>();
    assert_eq!(read[0], (prompt("q"), answers(&["good", "bad"]), Some(1.5)));
    assert_eq!(read[1], (prompt("Hi"), answers(&["Yes", "No"]), None));
    assert_eq!(read[2], (prompt("q"), answers(&["y", "z", "x"]), None));
    assert_eq!(bench.metrics()["answers"], 7.0);
}

#[test]
fn prompts_carry_text_and_answers() {
    let bench = Bench::new();
    let tokenizer = bench.tokenizer();
    bench.write("a.txt", "What is 1 + 1?\r\n\n你好？\n");
    bench.write_rows("b.jsonl", &[json!({"question": "What is 6 * 7?", "answer": "6 * 7 = 42\n#### 42"}), json!({"prompt": "p"})]);
    let settings = json!({"sources": [{"path": "a.txt"}, {"path": "b.jsonl"}], "heldout": 0.0});
    let artifact = bench.run(kind("prompts"), settings, &[("tokenizer", &tokenizer)]).unwrap();
    let chat = ChatTokenizer::load(&tokenizer).unwrap();
    let data = PromptDataset::load(&artifact, Split::Train).unwrap();
    assert_eq!(data.rows().iter().map(|row| row.text.as_str()).collect::<Vec<_>>(), ["What is 1 + 1?", "你好？", "What is 6 * 7?", "p"]);
    assert_eq!(data.row(2).answer.as_deref(), Some("6 * 7 = 42\n#### 42"));
    assert_eq!(chat.decode_all(&data.row(1).ids), "<|im_start|>user\n你好？<|im_end|>\n<|im_start|>assistant\n");

    let settings = json!({"sources": [{"path": "b.jsonl"}], "heldout": 0.0, "answer_field": "answer", "answer_after": "####"});
    let artifact = bench.run(kind("prompts"), settings, &[("tokenizer", &tokenizer)]).unwrap();
    let data = PromptDataset::load(&artifact, Split::Train).unwrap();
    assert_eq!((data.len(), data.row(0).answer.as_deref()), (1, Some("42")));
}

/// One question is on one side everywhere: what is asked in the evaluation was never answered in training.
#[test]
fn a_question_is_held_out_in_every_stage_alike() {
    let bench = Bench::new();
    let tokenizer = bench.tokenizer();
    let question = |number: usize| format!("question {number}");
    let rows = |row: fn(String) -> Value| (0..300).map(|number| row(question(number))).collect::<Vec<Value>>();
    bench.write_rows("i.jsonl", &rows(|question| json!({"instruction": question, "output": "a"})));
    bench.write_rows("c.jsonl", &rows(|question| json!({"prompt": question, "chosen": "a", "rejected": "b"})));
    bench.write_rows(
        "p.jsonl",
        &rows(|question| json!({"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": question}]})),
    );
    let run = |name: &str, file: &str| {
        let settings = json!({"sources": [{"path": file}], "heldout": 0.2});
        bench.run(kind(name), settings, &[("tokenizer", &tokenizer)]).unwrap()
    };
    let (instructions, preferences, prompts) = (run("instructions", "i.jsonl"), run("preferences", "c.jsonl"), run("prompts", "p.jsonl"));
    let held: Vec<Vec<u8>> = [&instructions, &preferences, &prompts].map(|artifact| artifact.read("heldout").unwrap().to_vec()).to_vec();
    assert!((30..90).contains(&(held[0].len() / 8)), "{}", held[0].len() / 8);
    assert!(held[0] == held[1] && held[1] == held[2]);
}
