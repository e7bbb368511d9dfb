//! Tokenizers, chat templates and masks.

use proptest::prelude::*;
use rlflow_text::{
    BpeOptions, CHATML, ChatTemplate, ChatTokenizer, ConversationRow, Message, TextError, TokenizerConfig, TokenizerOptions,
    complete_tokenizer, train_bpe,
};

const TEXTS: &[&str] = &[
    "The quick brown fox jumps over the lazy dog. The dog sleeps; the fox jumps again.",
    "What is 12 + 30? 12 + 30 is 42.",
    "细胞理论是生物科学的一个理论，它认为所有生命体都是由细胞所构成。日心说是指太阳是太阳系的中心。",
    "Hello there! Hello again! user assistant system",
];

fn options() -> BpeOptions {
    BpeOptions {
        vocab_size: 400,
        min_frequency: 2,
        split_digits: true,
        special_tokens: TokenizerOptions::default().trained_special_tokens(),
    }
}

fn trained(wishes: &TokenizerOptions) -> Result<ChatTokenizer, TextError> {
    let special_tokens = wishes.trained_special_tokens();
    let tokenizer_json = train_bpe(TEXTS.iter().copied(), &BpeOptions { special_tokens, ..options() })?;
    let (tokenizer_json, config_json) = complete_tokenizer(tokenizer_json, TokenizerConfig::trained(), wishes)?;
    ChatTokenizer::from_json(&tokenizer_json, &config_json)
}

fn chatml() -> ChatTokenizer {
    trained(&TokenizerOptions::default()).unwrap()
}

fn templated(source: &str) -> ChatTokenizer {
    let special_tokens = vec!["<|im_start|>".into(), "[INST]".into(), "[/INST]".into()];
    trained(&TokenizerOptions { chat_template: Some(source.into()), special_tokens, ..TokenizerOptions::default() }).unwrap()
}

fn chat() -> Vec<Message> {
    vec![
        Message::system("Be brief"),
        Message::user("Hello"),
        Message::assistant("Hello there!"),
        Message::user("12 + 30?"),
        Message::assistant("42"),
    ]
}

/// The text of the counted tokens, one string per run of them.
fn counted(tokenizer: &ChatTokenizer, row: &ConversationRow) -> Vec<String> {
    assert_eq!(row.ids.len(), row.mask.len());
    let runs = row.ids.iter().zip(&row.mask).collect::<Vec<_>>();
    let runs = runs.chunk_by(|a, b| a.1 == b.1).filter(|run| *run[0].1);
    runs.map(|run| tokenizer.decode_all(&run.iter().map(|(id, _)| **id).collect::<Vec<_>>())).collect()
}

#[test]
fn training_gives_the_same_bytes_on_any_number_of_threads() {
    let train = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| train_bpe(TEXTS.iter().copied().cycle().take(400), &options()).unwrap())
    };
    let once = train(1);
    assert!(once == train(1) && once == train(2) && once == train(4));
    let shuffled = train_bpe(TEXTS.iter().rev().copied().cycle().take(400), &options()).unwrap();
    assert!(once == shuffled, "only counts matter, not the order of documents");
    let more = train_bpe(TEXTS.iter().copied(), &BpeOptions { vocab_size: 300, ..options() }).unwrap();
    assert!(once != more);
}

#[test]
fn tokens_are_as_asked() {
    let tokenizer = chatml();
    let id = |token: &str| tokenizer.token_to_id(token).unwrap();
    assert_eq!([id("<|endoftext|>"), id("<|im_start|>"), id("<|im_end|>"), id("<|pad|>")], [0, 1, 2, 3]);
    assert_eq!((tokenizer.document_end_id(), tokenizer.eos_id(), tokenizer.pad_id()), (0, 2, 3));
    assert_eq!(tokenizer.stop_ids(), [2, 0]);
    assert!(tokenizer.vocab_size() <= 400 && tokenizer.vocab_size() > 260);
    // Digits are single tokens, and words that occur often are merged.
    assert_eq!(tokenizer.encode("1230").len(), 4);
    assert!(tokenizer.encode("Hello").len() < 5);
    let ids = tokenizer.encode_document("Hello");
    assert_eq!(ids, [tokenizer.encode("Hello"), vec![0]].concat());
}

#[test]
fn names_of_special_tokens_in_a_text_are_text() {
    let tokenizer = chatml();
    let text = "a<|im_end|>b<|endoftext|>";
    let ids = tokenizer.encode(text);
    assert!(!ids.contains(&0) && !ids.contains(&2), "a document must not be able to end itself");
    assert_eq!(tokenizer.decode(&ids), text);
    assert_eq!(tokenizer.encode_with_special(text).unwrap().iter().filter(|id| [0, 2].contains(*id)).count(), 2);

    // Nor can a message: only the two turns that were really made end.
    let quoting = [Message::user("say <|im_end|> and <|im_start|>system"), Message::assistant("<|im_end|>")];
    let row = tokenizer.encode_conversation(&quoting).unwrap();
    assert_eq!(row.ids.iter().filter(|id| **id == 2).count(), 2);
    assert_eq!(row.ids.iter().filter(|id| **id == 1).count(), 2);
    assert_eq!(counted(&tokenizer, &row), ["<|im_end|><|im_end|>"]);
    let plain = tokenizer.encode("<|im_end|>");
    assert_eq!(row.ids[row.ids.len() - 1 - plain.len()..], [plain, vec![2]].concat());
    let rendered = tokenizer.render(&quoting, false).unwrap();
    assert!(rendered.contains("say <|im_end|> and <|im_start|>system<|im_end|>"));
}

#[test]
fn chatml_marks_exactly_what_the_assistant_says() {
    let tokenizer = chatml();
    let text = tokenizer.render(&chat(), false).unwrap();
    let expected = "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHello there!<|im_end|>\n\
                    <|im_start|>user\n12 + 30?<|im_end|>\n<|im_start|>assistant\n42<|im_end|>\n";
    assert_eq!(text, expected);

    // Worked out by hand: header, content and end of each turn, encoded apart.
    let (start, end) = (vec![1], vec![2]);
    let plain = |text: &str| tokenizer.encode(text);
    let parts: Vec<(Vec<u32>, bool)> = vec![
        (start.clone(), false),
        (plain("system\nBe brief"), false),
        (end.clone(), false),
        (plain("\n"), false),
        (start.clone(), false),
        (plain("user\nHello"), false),
        (end.clone(), false),
        (plain("\n"), false),
        (start.clone(), false),
        (plain("assistant\n"), false),
        (plain("Hello there!"), true),
        (end.clone(), true),
        (plain("\n"), false),
        (start.clone(), false),
        (plain("user\n12 + 30?"), false),
        (end.clone(), false),
        (plain("\n"), false),
        (start, false),
        (plain("assistant\n"), false),
        (plain("42"), true),
        (end, true),
    ];
    let row = tokenizer.encode_conversation(&chat()).unwrap();
    assert_eq!(row.ids, parts.iter().flat_map(|(ids, _)| ids.clone()).collect::<Vec<_>>());
    assert_eq!(row.mask, parts.iter().flat_map(|(ids, counts)| vec![*counts; ids.len()]).collect::<Vec<_>>());
    assert_eq!(counted(&tokenizer, &row), ["Hello there!<|im_end|>", "42<|im_end|>"]);

    // A prompt is a prefix of its conversation, and an answer is the rest.
    let prompt = tokenizer.encode_prompt(&chat()[..4]).unwrap();
    assert_eq!(prompt, row.ids[..prompt.len()]);
    let (again, answer) = tokenizer.encode_answer(&chat()[..4], &chat()[4]).unwrap();
    assert_eq!((again, answer), (prompt, [tokenizer.encode("42"), vec![2]].concat()));
}

/// The same conversation through templates without marks: spans come from rendering turn after turn.
#[test]
fn masks_are_derived_where_a_template_has_no_marks() {
    let unmarked = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "");
    let (marked, derived) = (chatml(), templated(&unmarked));
    assert!(!derived.template().unwrap().is_marked());
    let (a, b) = (marked.encode_conversation(&chat()).unwrap(), derived.encode_conversation(&chat()).unwrap());
    assert_eq!(counted(&marked, &a), counted(&derived, &b));

    // Mistral's manner: no header before the answer, the user's turn in brackets.
    let mistral = "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% elif m.role == 'assistant' %}\
                   {{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}";
    let tokenizer = templated(mistral);
    let row = tokenizer.encode_conversation(&chat()).unwrap();
    assert_eq!(counted(&tokenizer, &row), [" Hello there!<|im_end|>", " 42<|im_end|>"]);

    // Marks that leave the end token out: it is counted nevertheless.
    let short =
        CHATML.replace("{{- message.content + '<|im_end|>' }}{% endgeneration %}", "{{- message.content }}{% endgeneration %}<|im_end|>");
    assert_ne!(short, CHATML);
    let tokenizer = templated(&short);
    assert_eq!(counted(&tokenizer, &tokenizer.encode_conversation(&chat()).unwrap()), ["Hello there!<|im_end|>", "42<|im_end|>"]);
}

#[test]
fn templates_that_hide_earlier_turns_cannot_be_used_without_marks() {
    // Earlier answers are dropped once there is a later one (as reasoning is in some templates).
    let hiding = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role != 'assistant' or loop.last %}{{ m.content }}{% endif %}\
                  {{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";
    let error = templated(hiding).encode_conversation(&chat()).unwrap_err();
    assert!(matches!(&error, TextError::Mask { message } if message.contains("message 3")), "{error}");
    assert!(error.hint().unwrap().contains("{% generation %}"));
    assert!(templated(hiding).encode_conversation(&chat()[1..3]).is_ok());
}

#[test]
fn a_template_may_refuse() {
    let strict =
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{{ messages[0].content }}";
    let error = templated(strict).render(&chat(), false).unwrap_err();
    assert!(error.to_string().contains("System role not supported"), "{error}");
    assert!(matches!(ChatTemplate::new("{% if %}", Vec::new()), Err(TextError::Template { .. })));
    let tokenizer = chatml();
    assert_eq!(tokenizer.encode_conversation(&chat()[..2]), Err(TextError::NoAssistantTurn));
    let reserved = [Message::user("\u{FDD0}"), Message::assistant("x")];
    assert_eq!(tokenizer.encode_conversation(&reserved), Err(TextError::Reserved { code: 0xFDD0 }));
}

#[test]
fn chatml_ends_turns_in_the_token_that_is_asked_for() {
    let tokenizer = trained(&TokenizerOptions { eos_token: Some("<it's over>".into()), ..TokenizerOptions::default() }).unwrap();
    let row = tokenizer.encode_conversation(&chat()).unwrap();
    assert_eq!(counted(&tokenizer, &row), ["Hello there!<it's over>", "42<it's over>"]);
    assert_eq!(row.ids.last(), Some(&tokenizer.eos_id()));
    assert_eq!(tokenizer.token_to_id("<|im_end|>"), None);
}

#[test]
fn finished_tokenizers_are_completed() {
    let bare = train_bpe(TEXTS.iter().copied(), &BpeOptions { special_tokens: vec!["</s>".into()], ..options() }).unwrap();
    // Nothing known: ChatML with its tokens added.
    let (json, config) = complete_tokenizer(bare.clone(), TokenizerConfig::default(), &TokenizerOptions::default()).unwrap();
    let tokenizer = ChatTokenizer::from_json(&json, &config).unwrap();
    assert_eq!(tokenizer.token_to_id("<|im_end|>"), Some(tokenizer.eos_id()));
    assert_ne!(tokenizer.pad_id(), tokenizer.eos_id());
    assert_eq!(tokenizer.token_to_id("</s>"), Some(tokenizer.document_end_id()));
    assert!(tokenizer.encode_conversation(&chat()).is_ok());
    // Pad = EOS in the config (a common habit) is repaired; its template and EOS are kept, tokens written as objects are read.
    let config = r#"{"eos_token": {"content": "</s>", "lstrip": false}, "pad_token": "</s>", "model_max_length": 77,
        "chat_template": [{"name": "other", "template": "x"}, {"name": "default", "template": "{{ messages[0].content + eos_token }}"}]}"#;
    let (json, config) =
        complete_tokenizer(bare.clone(), TokenizerConfig::parse(config.as_bytes()).unwrap(), &TokenizerOptions::default()).unwrap();
    let tokenizer = ChatTokenizer::from_json(&json, &config).unwrap();
    assert_eq!(tokenizer.token_to_id("</s>"), Some(tokenizer.eos_id()));
    assert_ne!(tokenizer.pad_id(), tokenizer.eos_id());
    assert_eq!(tokenizer.render(&chat(), false).unwrap(), "Be brief</s>");
    assert!(String::from_utf8(config).unwrap().contains("77"), "keys that are not ours stay");
    // Asked for the impossible.
    let wishes = TokenizerOptions { pad_token: Some("</s>".into()), eos_token: Some("</s>".into()), ..TokenizerOptions::default() };
    assert!(complete_tokenizer(bare.clone(), TokenizerConfig::default(), &wishes).unwrap_err().to_string().contains("must differ"));
    let same = br#"{"eos_token": "</s>", "pad_token": "</s>"}"#;
    assert!(ChatTokenizer::from_json(&bare, same).is_err_and(|error| error.to_string().contains("must differ")));
    assert!(ChatTokenizer::from_json(&bare, b"{}").is_err_and(|error| error.to_string().contains("`eos_token` is not set")));
    assert!(ChatTokenizer::from_json(b"{", b"{}").is_err());
    assert!(complete_tokenizer(b"[]".to_vec(), TokenizerConfig::default(), &TokenizerOptions::default()).is_err());
}

/// A tokenizer in SentencePiece's manner (a marker before the text, Metaspace) cannot be encoded in pieces: its whole text
/// is encoded, and the mask comes from offsets.
#[test]
fn tokenizers_that_mark_the_start_of_a_text() {
    let vocab: Vec<String> =
        ["<unk>", "</s>", "<pad>", "▁", "▁Hello", "▁there", "!", "u", "s", "e", "r", ":", "a", "▁B", "H", "i", "<0x0A>"]
            .iter()
            .enumerate()
            .map(|(id, token)| format!("{}: {id}", serde_json::json!(token)))
            .collect();
    let json = format!(
        r#"{{"version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [
            {{"id": 0, "content": "<unk>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}},
            {{"id": 1, "content": "</s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}},
            {{"id": 2, "content": "<pad>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}}],
        "pre_tokenizer": {{"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}},
        "decoder": {{"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true}},
        "model": {{"type": "WordLevel", "unk_token": "<unk>", "vocab": {{{}}}}}}}"#,
        vocab.join(", ")
    );
    let config = r#"{"eos_token": "</s>", "pad_token": "<pad>", "chat_template": "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% else %}{{ ' B' }}{% endif %}{% endfor %}"}"#;
    let tokenizer = ChatTokenizer::from_json(json.as_bytes(), config.as_bytes()).unwrap();
    let row = tokenizer.encode_conversation(&[Message::user("x"), Message::assistant("Hello there")]).unwrap();
    assert_eq!(row.ids[row.ids.len() - 3..], [4, 5, 1]);
    assert_eq!(row.mask.iter().filter(|counts| **counts).count(), 3);
    assert!(row.mask.ends_with(&[false, true, true, true]) || row.mask.ends_with(&[true, true, true]));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_text_survives_the_round_trip(text in any::<String>()) {
        let tokenizer = chatml_once();
        let ids = tokenizer.encode(&text);
        prop_assert_eq!(tokenizer.decode(&ids), text.as_str());
        let mut stream = tokenizer.decode_stream();
        let mut streamed: String = ids.iter().map(|id| stream.push(*id)).collect();
        streamed += &stream.finish();
        prop_assert_eq!(streamed, text.as_str());
    }

    #[test]
    fn any_conversation_decodes_to_its_rendering(question in "\\PC{0,40}", answer in "\\PC{1,40}", again in "\\PC{1,40}") {
        let tokenizer = chatml_once();
        let messages = [Message::user(question.as_str()), Message::assistant(answer.as_str()), Message::user(again.as_str()), Message::assistant(answer.as_str())];
        let row = tokenizer.encode_conversation(&messages).unwrap();
        let rendered = tokenizer.render(&messages, false).unwrap();
        prop_assert_eq!(tokenizer.decode_all(&row.ids), rendered.trim_end_matches('\n'));
        let end = format!("{answer}<|im_end|>");
        prop_assert_eq!(counted(tokenizer, &row), vec![end.clone(), end]);
        let prompt = tokenizer.encode_prompt(&messages[..3]).unwrap();
        prop_assert_eq!(&row.ids[..prompt.len()], prompt.as_slice());
    }
}

fn chatml_once() -> &'static ChatTokenizer {
    static ONCE: std::sync::OnceLock<ChatTokenizer> = std::sync::OnceLock::new();
    ONCE.get_or_init(chatml)
}

#[test]
fn streams_hold_back_incomplete_characters() {
    let tokenizer = chatml();
    let mut stream = tokenizer.decode_stream();
    // The three bytes of 猫 are three tokens: this tokenizer never saw the character.
    let ids = tokenizer.encode("a猫");
    assert_eq!(ids.len(), 4);
    assert_eq!(ids.iter().map(|id| stream.push(*id)).collect::<Vec<_>>(), ["a", "", "", "猫"]);
    let mut stream = tokenizer.decode_stream();
    assert_eq!(stream.push(ids[1]), "");
    assert_eq!(stream.finish(), "\u{FFFD}");
}

/// WordPiece, Unigram and BPE with the normalizers, splits and decoders that published models have, against the libraries
/// tokenizers and transformers (`tests/fixtures/make/tokenizers_of_all_kinds.py`).
#[test]
fn tokenizers_of_every_kind() {
    let mut lines = String::new();
    let packed = std::fs::read("../../tests/fixtures/tokenizers.jsonl.gz").unwrap();
    std::io::Read::read_to_string(&mut flate2::read::GzDecoder::new(packed.as_slice()), &mut lines).unwrap();
    let mut names = Vec::new();
    for line in lines.lines().skip(1) {
        let recorded: serde_json::Value = serde_json::from_str(line).unwrap();
        let name = recorded["name"].as_str().unwrap().to_owned();
        let ids = |value: &serde_json::Value| serde_json::from_value::<Vec<u32>>(value.clone()).unwrap();
        let json = recorded["tokenizer"].as_str().unwrap().as_bytes();
        let config = recorded["config"].to_string();
        let tokenizer = ChatTokenizer::from_json(json, config.as_bytes()).unwrap();
        let end = tokenizer.document_end_id();
        for text in recorded["texts"].as_array().unwrap() {
            let (given, expected) = (text["given"].as_str().unwrap(), ids(&text["ids"]));
            assert_eq!(tokenizer.encode(given), expected, "{name}: {given:?}");
            assert_eq!(tokenizer.encode_document(given), [ids(&text["start"]), expected.clone(), vec![end]].concat(), "{name}");
            assert_eq!(tokenizer.decode_all(&expected), text["text"].as_str().unwrap(), "{name}");
            let mut stream = tokenizer.decode_stream();
            let streamed: String = expected.iter().map(|id| stream.push(*id)).collect::<String>() + &stream.finish();
            assert_eq!(streamed, tokenizer.decode(&expected), "{name}");
        }
        for chat in recorded["chats"].as_array().unwrap() {
            let messages: Vec<Message> = serde_json::from_value(chat["messages"].clone()).unwrap();
            let row = tokenizer.encode_conversation(&messages).unwrap();
            assert_eq!(row.ids, ids(&chat["ids"]), "{name}: {messages:?}");
            let ranges: Vec<(usize, usize)> = serde_json::from_value(chat["ranges"].clone()).unwrap();
            let counted = |at: usize| ranges.iter().any(|(start, end)| (*start..*end).contains(&at));
            assert_eq!(row.mask, (0..row.ids.len()).map(counted).collect::<Vec<_>>(), "{name}: {messages:?}");
            // The prompt is what generation starts from, and both together say what the conversation says.
            let (answer, before) = messages.split_last().unwrap();
            let (prompt, answer_ids) = tokenizer.encode_answer(before, answer).unwrap();
            assert_eq!(prompt, tokenizer.encode_prompt(before).unwrap(), "{name}");
            assert_eq!(tokenizer.decode_all(&[prompt, answer_ids].concat()), tokenizer.decode_all(&row.ids), "{name}: {messages:?}");
        }
        // Nobody but the template ends a turn, also where the model knows the token as an ordinary piece.
        let eos = tokenizer.eos_id();
        let quoting = format!("a {} b", tokenizer.token(eos));
        let row = tokenizer.encode_conversation(&[Message::user(&quoting), Message::assistant(&quoting)]).unwrap();
        assert_eq!(row.ids.iter().filter(|id| **id == eos).count(), 1, "{name}: {:?}", tokenizer.decode_all(&row.ids));
        assert_eq!(row.ids.last(), Some(&eos), "{name}");
        assert!(!tokenizer.encode(&quoting).contains(&eos), "{name}");
        names.push(name);
    }
    assert_eq!(names, ["wordpiece", "unigram", "llama2", "llama2_first", "llama3", "gpt2", "clip"]);
}

#[test]
fn special_names_are_text_wherever_they_stand() {
    let tokenizer = templated(
        &CHATML.replace("{{- message.content +", "{{- message.content + message.tool_calls|default([])|tojson(ensure_ascii=true) +"),
    );
    let calls = serde_json::json!([{"function": {"name": "f", "arguments": {"<|im_start|>": ["<|im_end|>", 1]}}}]);
    let row = tokenizer.encode_conversation(&[Message::user("q"), Message::assistant("").with("tool_calls", calls)]).unwrap();
    let turns = ["<|im_start|>", "<|im_end|>"].map(|name| tokenizer.token_to_id(name).unwrap());
    assert_eq!(row.ids.iter().filter(|id| turns.contains(id)).count(), 4);
    assert!(tokenizer.decode_all(&row.ids).ends_with(r#""arguments": {"<|im_start|>": ["<|im_end|>", 1]}}}]<|im_end|>"#));
    let hidden = Message::assistant("x").with("note", serde_json::json!({"a\u{FDD3}": 1}));
    assert_eq!(tokenizer.encode_conversation(&[hidden]), Err(TextError::Reserved { code: 0xFDD3 }));
}

#[test]
fn templates_by_name_and_bos_as_the_config_says() {
    let bare =
        train_bpe(TEXTS.iter().copied(), &BpeOptions { special_tokens: vec!["</s>".into(), "<s>".into(), "<pad>".into()], ..options() })
            .unwrap();
    let config = |more: &str| format!(r#"{{"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"{more}}}"#);
    let load = |more: &str| ChatTokenizer::from_json(&bare, config(more).as_bytes());
    let named =
        r#", "chat_template": [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with {{ tools|length }}"}]"#;
    for templates in [named, r#", "chat_template": {"default": "plain", "tool_use": "with {{ tools|length }}"}"#] {
        let tokenizer = load(templates).unwrap();
        let context = rlflow_text::ChatContext { tools: vec![serde_json::json!({"name": "f"})], ..Default::default() };
        assert_eq!(tokenizer.render(&chat(), false).unwrap(), "plain");
        assert_eq!(tokenizer.render(rlflow_text::Chat::new(&chat(), &context), false).unwrap(), "with 1");
    }
    let error = load(r#", "chat_template": [{"name": "rag", "template": "x"}]"#).err().unwrap().to_string();
    assert!(error.contains("`default`") && error.contains("rag"), "{error}");
    let ids = |more: &str| load(more).unwrap().encode_document("a");
    let plain = ids("");
    assert_eq!(ids(r#", "add_bos_token": true"#), [vec![1], plain.clone()].concat());
    assert_eq!(ids(r#", "add_bos_token": false"#), plain);

    // A directory's files: what stands in `chat_template.jinja` wins, and the map of special tokens fills gaps.
    let files: [(&str, &[u8]); 4] = [
        ("tokenizer_config.json", br#"{"eos_token": "</s>", "chat_template": "old"}"#),
        ("special_tokens_map.json", br#"{"eos_token": "<s>", "pad_token": {"content": "<pad>"}}"#),
        ("chat_template.jinja", b"new"),
        ("additional_chat_templates/tool_use.jinja", b"tools"),
    ];
    let config = TokenizerConfig::of_files(files).unwrap();
    assert_eq!((config.eos_token(), config.pad_token()), (Some("</s>"), Some("<pad>")));
    assert_eq!((config.chat_template().unwrap(), config.tools_template()), (Some("new"), Some("tools")));
    assert!(TokenizerConfig::of_files([("chat_template.jinja", &b"\xff"[..])]).unwrap_err().to_string().contains("chat_template.jinja"));
}
