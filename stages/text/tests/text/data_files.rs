//! Data files of every format: what is read of them, and what is said of those that are damaged.

use std::{fs, io::Write, ops::Deref, path::Path};

use rlflow_api::{ArtifactType, DataFile, RunContext, StageError, testing};
use rlflow_text::{
    BpeOptions, ChatTemplate, ChatTokenizer, CorpusOptions, CorpusSource, Flow, RowCounts, RowError, RowSettings, Split, TextDataset,
    TextSplit, TokenizerConfig, TokenizerOptions, UsableRow, build_corpus, complete_tokenizer, convert_rows, question_digest,
    read_documents, read_rows, rows, train_bpe,
};
use serde_json::{Value, json};

/// A folder with data files.
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

    fn rows(&self, name: &str, content: impl AsRef<[u8]>) -> Result<Vec<(u64, Value)>, Told> {
        all_rows(&self.write(name, content))
    }

    fn documents(&self, name: &str, content: impl AsRef<[u8]>, split: TextSplit) -> Result<Vec<String>, Told> {
        let mut texts = Vec::new();
        read_documents(&self.write(name, content), split, "text", |_, text| {
            texts.push(text.map_or_else(|reason| format!("unusable: {reason}"), str::to_owned));
            Ok(())
        })
        .map_err(told)?;
        Ok(texts)
    }

    fn with_context<T>(&self, files: &[Vec<DataFile>], work: impl FnOnce(&RunContext<'_>) -> T) -> T {
        let mut tokenizer = self.store.artifact(ArtifactType::Tokenizer.name());
        tokenizer.put("note", b"only its stage's name matters here").unwrap();
        self.bench.with_context("test", 1, &[("tokenizer", &tokenizer.publish().unwrap())], files, work)
    }

    fn warnings(&self) -> Vec<String> {
        let warnings = self.bench.warnings();
        self.take_events();
        warnings
    }

    /// Reads prompts as the stage does, with a tokenizer of this chat template. Returns the prompts of both splits.
    fn prompts(&self, settings: Value, files: &[Vec<DataFile>], template: Option<&str>) -> Result<(RowCounts, [Vec<String>; 2]), Told> {
        let settings: RowSettings = serde_json::from_value(settings).unwrap();
        let tokenizer = tokenizer(template);
        let convert = |row: &Value| -> Result<UsableRow<String>, RowError> {
            let prompt = rows::prompt(row, &rows::PromptFields::default())?;
            let text = prompt.messages[0].content.clone();
            let question = question_digest(&prompt.messages);
            tokenizer.encode_prompt(&settings.with_system(prompt.messages))?;
            Ok(UsableRow { format: prompt.format, question, row: text })
        };
        let mut splits = [Vec::new(), Vec::new()];
        let counts = self.with_context(files, |context| {
            convert_rows(context, &settings, true, convert, |split, text| {
                splits[split as usize].push(text);
                Ok(())
            })
        });
        Ok((counts.map_err(told)?, splits))
    }
}

fn tokenizer(template: Option<&str>) -> ChatTokenizer {
    let options = TokenizerOptions { chat_template: template.map(str::to_owned), ..TokenizerOptions::default() };
    let special_tokens = options.trained_special_tokens();
    let bpe = BpeOptions { vocab_size: 300, min_frequency: 2, split_digits: true, special_tokens };
    let json = train_bpe(["Hello there"].into_iter(), &bpe).unwrap();
    let (json, config) = complete_tokenizer(json, TokenizerConfig::trained(), &options).unwrap();
    ChatTokenizer::from_json(&json, &config).unwrap()
}

/// An error as the user reads it.
#[derive(Debug)]
struct Told {
    line: Option<u64>,
    text: String,
}

fn told(error: StageError) -> Told {
    let hint = error.hint().map(|hint| format!(" | {hint}")).unwrap_or_default();
    let line = if let StageError::Data { line, .. } = &error { *line } else { None };
    Told { line, text: format!("{error}{hint}") }
}

fn all_rows(file: &DataFile) -> Result<Vec<(u64, Value)>, Told> {
    let mut rows = Vec::new();
    read_rows(file, false, |line, row| {
        rows.push((line, row));
        Ok(Flow::Continue(()))
    })
    .map_err(told)?;
    Ok(rows)
}

fn gz(content: &[u8]) -> Vec<u8> {
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    packed.write_all(content).unwrap();
    packed.finish().unwrap()
}

fn zst(content: &[u8]) -> Vec<u8> {
    zstd::encode_all(content, 3).unwrap()
}

fn fixture(name: &str) -> DataFile {
    testing::data_file(&Path::new("tests/parquet").join(name))
}

fn values(rows: Vec<(u64, Value)>) -> Vec<Value> {
    rows.into_iter().map(|(_, row)| row).collect()
}

#[test]
fn every_format_gives_the_same_rows() {
    let bench = Bench::new();
    let expected = [
        (2, json!({"instruction": "Add", "input": "1, 2", "output": "3"})),
        (3, json!({"instruction": "Say \"hi\"\nloud", "output": "hi"})),
        (5, json!({"instruction": "说明", "output": "好"})),
    ];
    let csv = "instruction,input,output\nAdd,\"1, 2\",3\n\"Say \"\"hi\"\"\nloud\",,hi\n说明,,好\n";
    assert_eq!(bench.rows("a.csv", csv).unwrap(), expected);
    assert_eq!(bench.rows("a.csv.gz", gz(csv.as_bytes())).unwrap(), expected);
    assert_eq!(bench.rows("a.csv.zst", zst(csv.as_bytes())).unwrap(), expected);
    let tsv = "instruction\tinput\toutput\nAdd\t1, 2\t3\n\"Say \"\"hi\"\"\nloud\"\t\thi\n说明\t\t好";
    assert_eq!(bench.rows("a.tsv", tsv).unwrap(), expected);
    // The mark, line ends and blank lines of other systems.
    let foreign = format!("\u{feff}{}\r\n", csv.replace('\n', "\r\n").replace("\r\nloud", "\nloud"));
    assert_eq!(bench.rows("b.csv", foreign).unwrap(), expected);

    let values = values(expected.to_vec());
    let lines = values.iter().map(|row| format!("{row}\r\n")).collect::<String>();
    let read = bench.rows("a.jsonl", format!("\u{feff}\n{lines}")).unwrap();
    assert_eq!(read.iter().map(|(line, _)| *line).collect::<Vec<_>>(), [2, 3, 4]);
    assert_eq!(self::values(read), values);
    let array = format!("\u{feff}{}", serde_json::to_string_pretty(&values).unwrap().replace('\n', "\r\n"));
    assert_eq!(self::values(bench.rows("a.json.gz", gz(array.as_bytes())).unwrap()), values);

    // What CSV can hold becomes conversations and preferences like rows of JSON.
    let preference = &bench.rows("p.csv", "prompt,chosen,rejected,margin,note\nq,good,bad,1.5,\n").unwrap()[0].1;
    let preference = rows::preference(preference).unwrap();
    assert_eq!((preference.answers[0].content.as_str(), preference.margin), ("good", Some(1.5)));
    let pair = &bench.rows("c.csv", "prompt,completion\n12,30\n").unwrap()[0].1;
    assert_eq!(rows::conversation(pair).unwrap().messages[0].content, "12");
    let no_answer = &bench.rows("c.csv", "prompt,completion\nx,\n").unwrap()[0].1;
    assert!(rows::conversation(no_answer).unwrap_err().contains("the row has prompt"));
}

/// Expected rows are what PyArrow reads (parquet/make.py).
#[test]
fn parquet_of_every_writer_gives_the_same_rows() {
    let lines = fs::read_to_string("tests/parquet/rows.jsonl").unwrap();
    let expected: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(expected.len(), 60);
    let numbered: Vec<(u64, Value)> = (1..).zip(expected.clone()).collect();
    for name in ["snappy", "zstd_v2", "gzip_plain", "delta", "prefix_v2"] {
        let read = all_rows(&fixture(&format!("{name}.parquet"))).unwrap();
        for (read, expected) in read.iter().zip(&numbered) {
            assert_eq!(read, expected, "{name}");
        }
        assert_eq!(read.len(), 60, "{name}");
    }
    let mut without_maps = expected.clone();
    without_maps.iter_mut().for_each(|row| drop(row.as_object_mut().unwrap().remove("labels")));
    assert_eq!(values(all_rows(&fixture("polars.parquet")).unwrap()), without_maps);
    assert_eq!(all_rows(&fixture("no_rows.parquet")).unwrap(), []);
    assert!(all_rows(&fixture("brotli.parquet")).unwrap_err().text.contains("packed with Brotli; expected Snappy"));

    // Documents come from one column.
    let mut prompts = Vec::new();
    read_documents(&fixture("snappy.parquet"), TextSplit::File, "prompt", |_, text| {
        prompts.push(text.map(str::to_owned));
        Ok(())
    })
    .unwrap();
    let texts: Vec<Option<&str>> = expected.iter().map(|row| row.get("prompt").and_then(Value::as_str)).collect();
    assert_eq!(prompts.iter().map(|text| text.as_deref().ok()).collect::<Vec<_>>(), texts);
    // Reading may stop.
    let mut seen = 0;
    let stop = |_, _| {
        seen += 1;
        Ok(if seen == 7 { Flow::Break(()) } else { Flow::Continue(()) })
    };
    read_rows(&fixture("polars.parquet"), false, stop).unwrap();
    assert_eq!(seen, 7);
}

#[test]
fn damaged_parquet_is_told_and_nothing_worse() {
    let bench = Bench::new();
    let whole = fs::read("tests/parquet/zstd_v2.parquet").unwrap();
    for (name, content, reason) in [
        ("text.parquet", b"{\"prompt\": \"q\"}\n".to_vec(), "does not begin as Parquet"),
        ("cut.parquet", whole[..whole.len() - 9].to_vec(), "truncated"),
        ("short.parquet", b"PAR1".to_vec(), "truncated"),
        ("length.parquet", b"PAR1\xff\xff\xff\x7fPAR1".to_vec(), "shorter than its metadata"),
    ] {
        let told = bench.rows(name, content).unwrap_err();
        assert!(told.text.starts_with(name) && told.text.contains(reason), "{}", told.text);
    }
    assert!(bench.rows("a.jsonl", &whole).unwrap_err().text.contains("name it `.parquet`"));
    assert!(bench.rows("a.parquet.gz", gz(&whole)).unwrap_err().text.contains("packed inside"));
    // Every byte in turn, in the files that together have every encoding: an error or other rows, never a panic.
    for name in ["zstd_v2", "delta", "prefix_v2"] {
        let whole = fs::read(format!("tests/parquet/{name}.parquet")).unwrap();
        let mut failed = 0;
        for at in (0..whole.len()).step_by(43) {
            let mut damaged = whole.clone();
            damaged[at] ^= [0x01, 0x80, 0xff][at % 7 % 3];
            let mut left = 1000;
            let file = bench.write("damaged.parquet", damaged);
            let result = read_rows(&file, false, |_, _| {
                left -= 1;
                Ok(if left == 0 { Flow::Break(()) } else { Flow::Continue(()) })
            });
            failed += usize::from(result.is_err());
        }
        assert!(failed > whole.len() / 430, "{name}: {failed}");
    }
}

#[test]
fn bytes_that_are_no_text_are_named_with_their_line() {
    let bench = Bench::new();
    for (name, content, line, reason) in [
        ("a.jsonl", b"{\"a\": 1}\n{\"a\": \"\xff\"}\n".as_slice(), 2, "byte 0xff at offset 16 is not UTF-8"),
        ("b.jsonl", b"{\"a\": 1}\r\n\r\n{\"a\": \"\0\"}\n", 3, "NUL byte at offset 19"),
        ("c.json", b"[{\"a\": 1},\n {\"a\": \"\xff\"}]", 2, "column"),
        ("d.json", b"[{\"a\": 1},\n\0 {\"a\": 2}]", 2, "column"),
        ("e.csv", b"a,b\n1,2\n3,\xff\n", 3, "byte 0xff at column `b` is not UTF-8"),
        ("f.csv", b"a,b\n1,2\n\"x\n\0\n\",4\n5,6\n", 3, "NUL byte at column `a`"),
        ("g.csv", b"a\n1\n\0\n2\n", 3, "NUL byte"),
        ("h.csv", b"a,\xffb\n1,2\n", 1, "column 2 of the header"),
        ("i.csv", b"\xff\xfea\0,\0", 1, "UTF-16"),
        ("j.tsv", b"a\tb\n1\n", 2, "the row has 1 cells, the header has 2"),
        ("k.csv", b"a,a\n1,2\n", 1, "two columns are called `a`"),
        ("l.csv", b"a,b\n1,2\n3,\"open\n4,5\n6,7\n", 3, "a quote of the row that begins here is not closed"),
        ("m.csv", b"a\n\"open", 2, "not closed"),
    ] {
        let told = bench.rows(name, content).unwrap_err();
        assert!(told.line == Some(line) && told.text.contains(reason), "{name}: {told:?}");
        let packed = bench.rows(&format!("{name}.gz"), gz(content)).unwrap_err();
        assert_eq!((packed.line, packed.text), (told.line, told.text.replacen(name, &format!("{name}.gz"), 1)));
    }
    for (name, content, line, reason) in [
        ("a.txt", b"\xef\xbb\xbfok\r\nb\0d\n".as_slice(), 2, "NUL byte at offset 5"),
        ("b.html", b"<p>ok\n<p>\xe9\n", 2, "byte 0xe9 at offset 9 is not UTF-8"),
        ("c.html", b"<p>ok\n<p>\0\n", 2, "NUL byte"),
        ("d.txt", b"a\0b\0", 1, "UTF-16 without its mark"),
    ] {
        let told = bench.documents(name, content, TextSplit::File).unwrap_err();
        assert!(told.line == Some(line) && told.text.contains(reason), "{name}: {told:?}");
    }
    assert_eq!(bench.documents("e.txt", "\u{feff}a\r\nb\r\n\r\nc", TextSplit::Paragraph).unwrap(), ["a\nb", "c"]);
    // A row that is never closed does not fill the memory.
    let endless = format!("a,b\n1,\"{}", "x,\n".repeat(25 << 20));
    let told = bench.rows("endless.csv.zst", zst(endless.as_bytes())).unwrap_err();
    assert!(told.line == Some(2) && told.text.contains("not closed"), "{told:?}");
}

#[test]
fn how_a_file_is_packed_must_be_what_its_name_says() {
    let bench = Bench::new();
    let row = b"{\"text\": \"some text that is long enough to be cut\"}\n".repeat(50);
    let (gzip, zstd) = (gz(&row), zst(&row));
    for (name, content, reason) in [
        ("a.jsonl.gz", row.as_slice(), "is not gzip, though its name ends in `.gz` | fetch it again, or take `.gz` off its name"),
        ("b.jsonl.gz", &zstd, "is not gzip, though its name ends in `.gz` | it is Zstandard: name it `.zst`"),
        ("c.jsonl.zst", &gzip, "is not Zstandard, though its name ends in `.zst` | it is gzip: name it `.gz`"),
        ("d.jsonl.zst", b"x", "is not Zstandard"),
        ("e.jsonl", &gzip, "packed with gzip, though its name does not say so | add `.gz`"),
        ("f.txt", &zstd, "packed with Zstandard"),
        ("g.jsonl.gz", &gzip[..gzip.len() - 9], "truncated"),
        ("h.jsonl.gz", &gzip[..gzip.len() / 2], "truncated"),
        ("i.jsonl.gz", &gzip[..3], "truncated"),
        ("j.jsonl.gz", &gzip[..1], "truncated"),
        ("k.jsonl.zst", &zstd[..zstd.len() - 4], "truncated"),
        ("l.jsonl.zst", &zstd[..2], "truncated"),
    ] {
        let told = bench.documents(name, content, TextSplit::File).unwrap_err();
        assert!(told.line.is_none() && told.text.starts_with(name) && told.text.contains(reason), "{name}: {told:?}");
    }
    let mut damaged = gzip.clone();
    *damaged.last_mut().unwrap() ^= 1;
    assert!(bench.rows("m.jsonl.gz", &damaged).unwrap_err().text.contains("cannot be unpacked"));
    // Several members and frames are one file.
    assert_eq!(bench.rows("n.jsonl.gz", [gzip.clone(), gz(b"{}"), gz(b"")].concat()).unwrap().len(), 51);
    assert_eq!(bench.rows("o.jsonl.zst", [zstd.clone(), zst(b"{}")].concat()).unwrap().len(), 51);
    assert_eq!(bench.rows("p.jsonl.gz", "").unwrap().len(), 0);
}

#[test]
fn web_pages_become_documents() {
    let bench = Bench::new();
    let page = "<html><head><title>t</title><script>var x = '<p>';</script></head><body><h1>One &amp; two</h1>\r\n<p>First\r\npart.<p>Second.</body></html>";
    assert_eq!(bench.documents("a.html", page, TextSplit::Paragraph).unwrap(), ["One & two", "First part.", "Second."]);
    assert_eq!(bench.documents("a.htm.gz", gz(page.as_bytes()), TextSplit::File).unwrap(), ["One & two\n\nFirst part.\n\nSecond."]);
    assert_eq!(bench.documents("b.html", "<script>x</script>", TextSplit::File).unwrap(), [""; 0]);
    assert!(bench.rows("a.html", page).unwrap_err().text.contains("rows cannot be read from a web page"));

    let csv = "id,text\n1,one\n2,\n3,\"two\nlines\"\n";
    assert_eq!(bench.documents("a.csv", csv, TextSplit::File).unwrap(), ["one", "unusable: no field `text` (it has id)", "two\nlines"]);
    let files = [bench.write("c.csv", csv), bench.write("d.html", page)];
    let source = CorpusSource { files: &files, field: "text", split: TextSplit::File, weight: None, epochs: None, heldout: false };
    let options = CorpusOptions { heldout: 0.0, max_documents: None, max_bytes: None, max_unusable: 0.5, max_document_bytes: None };
    let artifact = bench.with_context(&[files.to_vec()], |context| build_corpus(context, &[source], &options)).unwrap();
    let texts: Vec<String> = TextDataset::load(&artifact, Split::Train).unwrap().documents().map(str::to_owned).collect();
    assert_eq!(texts, ["one", "two\nlines", "One & two\n\nFirst part.\n\nSecond."]);
}

#[test]
fn empty_files_are_called_empty() {
    let bench = Bench::new();
    let settings = json!({"sources": [{"path": "x"}]});
    let (full, blank) = (bench.write("full.jsonl", "{\"prompt\": \"q\"}\n"), bench.write("blank.jsonl", " \r\n\n"));
    for (name, content, reason) in [
        ("a.jsonl", Vec::new(), "the file is empty"),
        ("b.csv", Vec::new(), "the file is empty"),
        ("c.parquet", Vec::new(), "the file is empty"),
        ("d.jsonl.gz", Vec::new(), "the file is empty"),
        ("e.json.zst", Vec::new(), "the file is empty"),
        ("f.txt", Vec::new(), "the file is empty"),
        ("g.json", b"[ ]".to_vec(), "the file has no rows"),
        ("h.csv", b"prompt\n".to_vec(), "the file has no rows"),
        ("i.jsonl.gz", gz(b"\n"), "the file has no rows"),
    ] {
        let file = bench.write(name, content);
        let told = bench.prompts(settings.clone(), &[vec![file.clone()]], None).unwrap_err();
        assert!(told.text.starts_with(&format!("{name}: {reason} |")), "{told:?}");
        let told = bench.prompts(settings.clone(), &[vec![file.clone(), blank.clone()]], None).unwrap_err();
        assert!(told.text.starts_with(&format!("{name}: {reason}; neither has the other file anything")), "{told:?}");
        bench.warnings();
        bench.prompts(settings.clone(), &[vec![full.clone(), file]], None).unwrap();
        assert!(bench.warnings().contains(&format!("{name}: {reason}")), "{name}");
    }
}

#[test]
fn max_rows_limits_the_rows_to_train_on() {
    let bench = Bench::new();
    let rows = |name: &str, range: std::ops::Range<u32>| -> String {
        range.map(|at| json!({"prompt": format!("{name} {at}")}).to_string() + "\n").collect()
    };
    let files = [
        vec![bench.write("a.jsonl", rows("a", 0..30))],
        vec![bench.write("b.jsonl", format!("{}{{\"x\": 1}}\n{}", rows("b", 0..3), rows("b", 3..2000)) + "{broken")],
        vec![bench.write("h.jsonl", rows("h", 0..25))],
    ];
    let settings = |heldout: f64, max_rows: Option<u64>| {
        let sources = json!([{"path": "a.jsonl"}, {"path": "b.jsonl"}]);
        let mut settings = json!({"sources": sources, "heldout_sources": [{"path": "h.jsonl"}], "heldout": heldout});
        max_rows.into_iter().for_each(|most| settings["max_rows"] = most.into());
        settings
    };
    // Held-out sources are read whole, whatever the limit; what follows the last row that is wanted is not even looked at.
    let (counts, [train, heldout]) = bench.prompts(settings(0.0, Some(35)), &files, None).unwrap();
    assert_eq!((counts.train, counts.heldout, counts.unusable, counts.rows), (35, 25, 1, 61));
    assert_eq!((train[0].as_str(), train[34].as_str(), heldout[24].as_str()), ("a 0", "b 4", "h 24"));
    // Rows that the share holds out do not count, so that a share never makes the training part smaller.
    let (counts, [train, heldout]) = bench.prompts(settings(0.3, Some(35)), &files, None).unwrap();
    assert_eq!((train.len(), counts.train), (35, 35));
    assert!(heldout.len() > 25 + 5, "{}", heldout.len());
    let (counts, _) = bench.prompts(settings(0.3, Some(1300)), &files, None).unwrap();
    assert_eq!(counts.train, 1300);
    // Without a limit all is read, and the broken line found.
    assert_eq!(bench.prompts(settings(0.0, None), &files, None).unwrap_err().line, Some(2002));
}

#[test]
fn a_template_that_cannot_be_rendered_is_told_before_any_row() {
    let bench = Bench::new();
    // The rows are broken too, but nothing is said of them.
    let files = [vec![bench.write("a.jsonl", "{broken")]];
    let settings = json!({"sources": [{"path": "a.jsonl"}]});
    for (template, reason) in [
        ("{{ bos_token }}\n{{ nothing.here }}", "line 2 of the template: `{{ nothing.here }}`"),
        ("{{ raise_exception('Not for you') }}", "Not for you (line 1 of the template"),
        ("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", "line 1 of the template"),
    ] {
        let told = bench.prompts(settings.clone(), &files, Some(template)).unwrap_err();
        assert!(told.text.starts_with("the chat template of `tokenizer` cannot be used: ") && told.text.contains(reason), "{told:?}");
        assert!(told.text.contains("| mend the chat template that comes with `tokenizer`") && !told.text.contains("a.jsonl"), "{told:?}");
        assert!(ChatTemplate::check(template).unwrap_err().to_string().contains(reason), "{template}");
    }
    assert!(ChatTemplate::check("a\n{% for %}").unwrap_err().to_string().contains("line 2 of the template: `{% for %}`"));
    for good in ["{{ bos_token + messages[0].content }}", "{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}", ""]
    {
        ChatTemplate::check(good).unwrap();
    }

    // One that takes no system message is at odds with the stage's own.
    let no_system = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{{ m.content }}{% endfor %}";
    let with_system = json!({"sources": [{"path": "a.jsonl"}], "system": "Be brief."});
    let told = bench.prompts(with_system, &files, Some(no_system)).unwrap_err();
    assert!(told.text.contains("System role not supported") && told.text.contains("remove `system`"), "{told:?}");
    // One that takes the plainest conversation but none of the rows.
    let files = [vec![bench.write("b.jsonl", "{\"prompt\": \"a long question\"}\n{\"prompt\": \"another one\"}\n")]];
    let short = "{% if messages[-1].content | length > 9 %}{{ raise_exception('Too long') }}{% endif %}{{ messages[-1].content }}";
    let told = bench.prompts(settings.clone(), &files, Some(short)).unwrap_err();
    assert!(told.text.starts_with("the chat template of `tokenizer` refuses all of 2 rows: Too long (line 1"), "{told:?}");
    // Where it takes some, the others are unusable rows.
    let files = [vec![bench.write("b.jsonl", "{\"prompt\": \"a long question\"}\n{\"prompt\": \"short\"}\n")]];
    let (counts, _) = bench.prompts(settings, &files, Some(short)).unwrap();
    assert_eq!((counts.rows, counts.unusable), (2, 1));
    assert!(bench.warnings().iter().any(|text| text.contains("b.jsonl:1: chat template: Too long")));

    // A template without what the assistant says can be rendered, but nothing can be learned from it.
    let silent = tokenizer(Some("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"));
    let chat = [rlflow_text::Message::user("Hello"), rlflow_text::Message::assistant("Hi!")];
    assert!(silent.encode_conversation(&chat).unwrap_err().to_string().contains("leaves out what the assistant says"));
}
