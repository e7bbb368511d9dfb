use std::{ops::Range, sync::Arc};

use rlflow_api::{Artifact, ArtifactBuilder, Digest, StageResult};
use rlflow_store::Hasher;
use tokenizers::Tokenizer;

use crate::{ChatTemplate, ConversationRow, Message, Rendered, TextError, TokenizerConfig, chat_template::BREAK};

/// Entry that holds the tokenizer itself, in Hugging Face's format.
pub const TOKENIZER_ENTRY: &str = "tokenizer.json";
/// Entry that holds pad and EOS token and the chat template, in Hugging Face's format.
pub const CONFIG_ENTRY: &str = "tokenizer_config.json";

/// Tokens that end a document in tokenizers whose EOS ends a turn.
const DOCUMENT_ENDS: &[&str] = &["<|endoftext|>", "<|end_of_text|>", "<|end▁of▁sentence|>", "</s>", "<eos>"];

/// A tokenizer with its chat template. Cheap to clone; safe to share between threads.
///
/// An artifact of type `tokenizer`, and every checkpoint, holds it in two entries: `tokenizer.json` and `tokenizer_config.json`.
#[derive(Clone)]
pub struct ChatTokenizer(Arc<Inner>);

struct Inner {
    /// Takes special tokens' names in a text for text.
    plain: Tokenizer,
    /// Finds special tokens in a text; only for tokenizers whose pieces cannot be encoded one by one.
    whole: Option<Tokenizer>,
    template: Option<ChatTemplate>,
    digest: Digest,
    /// Special tokens by name, longest name first.
    special: Vec<(String, u32)>,
    /// First bytes of their names.
    special_starts: [bool; 256],
    pad_id: u32,
    eos_id: u32,
    document_end_id: u32,
    document_start: Vec<u32>,
    vocab_size: usize,
    tokenizer_json: Vec<u8>,
    config_json: Vec<u8>,
}

impl ChatTokenizer {
    /// From the entries of a tokenizer artifact or of a checkpoint.
    pub fn load(artifact: &Artifact) -> StageResult<Self> {
        Ok(Self::from_json(&artifact.read(TOKENIZER_ENTRY)?, &artifact.read(CONFIG_ENTRY)?)?)
    }

    /// From the content of `tokenizer.json` and `tokenizer_config.json`. The latter must name pad and EOS token, and
    /// they must be different.
    pub fn from_json(tokenizer_json: &[u8], config_json: &[u8]) -> Result<Self, TextError> {
        let bad = |message: String| TextError::Tokenizer { file: TOKENIZER_ENTRY, message };
        let bad_config = |message: String| TextError::Tokenizer { file: CONFIG_ENTRY, message };
        let mut plain = Tokenizer::from_bytes(tokenizer_json).map_err(|error| bad(error.to_string()))?;
        plain.with_padding(None);
        plain.with_truncation(None).map_err(|error| bad(error.to_string()))?;
        let config = TokenizerConfig::parse(config_json)?;

        let id_of = |setting: &str, token: Option<&str>| {
            let token = token.ok_or_else(|| bad_config(format!("`{setting}` is not set")))?;
            plain.token_to_id(token).ok_or_else(|| bad_config(format!("`{setting}` is `{token}`, which the tokenizer does not have")))
        };
        let eos_id = id_of("eos_token", config.eos_token())?;
        let pad_id = id_of("pad_token", config.pad_token())?;
        if pad_id == eos_id {
            return Err(bad_config(format!(
                "`pad_token` and `eos_token` are both `{}`; they must differ",
                config.eos_token().unwrap_or_default()
            )));
        }
        let ends = DOCUMENT_ENDS.iter().filter_map(|token| plain.token_to_id(token));
        let document_end_id = ends.into_iter().find(|id| *id != pad_id).unwrap_or(eos_id);

        let mut special: Vec<(String, u32)> = plain
            .get_added_tokens_decoder()
            .into_iter()
            .filter(|(_, token)| token.special)
            .map(|(id, token)| (token.content, id))
            .collect();
        special.sort_by(|a, b| b.0.len().cmp(&a.0.len()).then_with(|| a.0.cmp(&b.0)));

        special.retain(|(name, _)| !name.is_empty());
        let mut special_starts = [false; 256];
        special.iter().for_each(|(name, _)| special_starts[usize::from(name.as_bytes()[0])] = true);

        let highest_id = plain.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        let document_start = document_start(&plain).map_err(bad)?;
        let whole = match encodes_piecewise(&plain) {
            true => None,
            false => Some(plain.clone()),
        };
        plain.set_encode_special_tokens(true);
        let template = config.chat_template().map(|source| ChatTemplate::new(source, config.special_tokens())).transpose()?;
        let digest = Hasher::new().update(Digest::of(tokenizer_json).as_bytes()).update(Digest::of(config_json).as_bytes()).finish();
        Ok(Self(Arc::new(Inner {
            vocab_size: highest_id,
            plain,
            whole,
            template,
            digest,
            special,
            special_starts,
            pad_id,
            eos_id,
            document_end_id,
            document_start,
            tokenizer_json: tokenizer_json.to_vec(),
            config_json: config_json.to_vec(),
        })))
    }

    /// Adds the tokenizer's entries to `builder`: every checkpoint carries them.
    pub fn store(&self, builder: &mut ArtifactBuilder) -> StageResult<()> {
        builder.put(TOKENIZER_ENTRY, &self.0.tokenizer_json)?;
        builder.put(CONFIG_ENTRY, &self.0.config_json)?;
        Ok(())
    }

    /// Digest of tokenizer and chat template: two that differ must not meet in one stage.
    pub fn digest(&self) -> Digest {
        self.0.digest
    }

    /// One more than the highest id.
    pub fn vocab_size(&self) -> usize {
        self.0.vocab_size
    }

    /// Fills rows; never a target, and different from every stop token.
    pub fn pad_id(&self) -> u32 {
        self.0.pad_id
    }

    /// Ends a turn.
    pub fn eos_id(&self) -> u32 {
        self.0.eos_id
    }

    /// Ends a document; the same as [`Self::eos_id`] in tokenizers that have only one.
    pub fn document_end_id(&self) -> u32 {
        self.0.document_end_id
    }

    /// Tokens that end generation.
    pub fn stop_ids(&self) -> Vec<u32> {
        let (eos, end) = (self.eos_id(), self.document_end_id());
        if eos == end { vec![eos] } else { vec![eos, end] }
    }

    /// Id of the token with this name.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.0.plain.token_to_id(token)
    }

    /// The chat template, if there is one.
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.0.template.as_ref()
    }

    /// Ids of a text. The names of special tokens are text like any other: a document cannot end itself.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        match self.0.plain.encode_fast(text, false) {
            Ok(encoding) => encoding.get_ids().to_vec(),
            // Only models that lack both byte fallback and an unknown token can fail; what they cannot say is left out.
            Err(error) => {
                tracing::warn!(%error, "text cannot be encoded");
                Vec::new()
            }
        }
    }

    /// Ids of a document: what the tokenizer puts before a text (BOS, for most nothing), the text, and the token that ends a document.
    pub fn encode_document(&self, text: &str) -> Vec<u32> {
        let mut ids = self.0.document_start.clone();
        ids.extend(self.encode(text));
        ids.push(self.document_end_id());
        ids
    }

    /// Ids of a text in which the names of special tokens stand for the tokens: what a chat template renders.
    pub fn encode_with_special(&self, text: &str) -> Vec<u32> {
        if let Some(whole) = &self.0.whole {
            return whole.encode_fast(text, false).map(|encoding| encoding.get_ids().to_vec()).unwrap_or_default();
        }
        let mut ids = Vec::new();
        let mut rest = text;
        while let Some((start, length, id)) = self.next_special(rest) {
            ids.extend(self.encode_unbroken(&rest[..start]));
            ids.push(id);
            rest = &rest[start + length..];
        }
        ids.extend(self.encode_unbroken(rest));
        ids
    }

    /// The first special token in `text`, the longest if several begin there: where, how long, which.
    fn next_special(&self, text: &str) -> Option<(usize, usize, u32)> {
        let bytes = text.as_bytes();
        let mut candidates = (0..bytes.len()).filter(|at| self.0.special_starts[usize::from(bytes[*at])]);
        candidates.find_map(|start| {
            let found = self.0.special.iter().find(|(name, _)| bytes[start..].starts_with(name.as_bytes()));
            found.map(|(name, id)| (start, name.len(), *id))
        })
    }

    fn encode_unbroken(&self, text: &str) -> Vec<u32> {
        match text {
            "" => Vec::new(),
            text if text.contains(BREAK) => self.encode(&text.replace(BREAK, "")),
            text => self.encode(text),
        }
    }

    /// The text of `ids` without special tokens. Bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        self.decode_as(ids, true)
    }

    /// The text of `ids` with the names of special tokens.
    pub fn decode_all(&self, ids: &[u32]) -> String {
        self.decode_as(ids, false)
    }

    fn decode_as(&self, ids: &[u32], skip_special_tokens: bool) -> String {
        self.0.plain.decode(ids, skip_special_tokens).unwrap_or_else(|error| {
            tracing::warn!(%error, "ids cannot be decoded");
            String::new()
        })
    }

    /// Decodes ids one by one, giving text only where characters are complete.
    pub fn decode_stream(&self) -> DecodeStream {
        DecodeStream { tokenizer: self.clone(), ids: Vec::new(), start: 0, given: 0 }
    }

    /// The conversation as the model sees it.
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, TextError> {
        Ok(self.rendered(messages, add_generation_prompt)?.text.replace(BREAK, ""))
    }

    fn rendered(&self, messages: &[Message], add_generation_prompt: bool) -> Result<Rendered, TextError> {
        let no_template = || TextError::Template { message: "the tokenizer has none; set `chat_template` on its stage".into() };
        let template = self.0.template.as_ref().ok_or_else(no_template)?;
        let quotes = |text: &str| self.0.whole.is_none() && self.next_special(text).is_some();
        let mut safe = None;
        for (at, message) in messages.iter().enumerate() {
            if message.content.contains(BREAK) {
                return Err(TextError::Reserved { code: BREAK as u32 });
            }
            if quotes(&message.content) {
                safe.get_or_insert_with(|| messages.to_vec())[at].content = self.break_special(&message.content);
            }
        }
        template.render(safe.as_deref().unwrap_or(messages), add_generation_prompt)
    }

    /// `text` with every special token's name broken after its first character.
    fn break_special(&self, text: &str) -> String {
        let mut broken = String::with_capacity(text.len() + 8);
        let mut rest = text;
        while let Some((start, _, _)) = self.next_special(rest) {
            let first = rest[start..].chars().next().map_or(0, char::len_utf8);
            broken.push_str(&rest[..start + first]);
            broken.push(BREAK);
            rest = &rest[start + first..];
        }
        broken + rest
    }

    /// Ids of a prompt, up to where the assistant begins to speak.
    pub fn encode_prompt(&self, messages: &[Message]) -> Result<Vec<u32>, TextError> {
        Ok(self.encode_with_special(&self.rendered(messages, true)?.text))
    }

    /// Ids and mask of a conversation, up to the end of its last assistant turn.
    pub fn encode_conversation(&self, messages: &[Message]) -> Result<ConversationRow, TextError> {
        if !messages.iter().any(Message::is_assistant) {
            return Err(TextError::NoAssistantTurn);
        }
        let rendered = self.assistant_spans(messages)?;
        let row = match &self.0.whole {
            None => self.encode_pieces(&rendered),
            Some(whole) => encode_whole(whole, &rendered)?,
        };
        if row.mask.contains(&true) {
            return Ok(row);
        }
        match messages.iter().any(|message| message.is_assistant() && !message.content.trim().is_empty()) {
            true => Err(TextError::Mask { message: "it leaves out what the assistant says".into() }),
            false => Err(TextError::NoAssistantTurn),
        }
    }

    /// Ids of a prompt and of an answer to it, the token that ends the turn included.
    pub fn encode_answer(&self, prompt: &[Message], answer: &Message) -> Result<(Vec<u32>, Vec<u32>), TextError> {
        let prompt_ids = self.encode_prompt(prompt)?;
        let messages: Vec<Message> = prompt.iter().chain([answer]).cloned().collect();
        let row = self.encode_conversation(&messages)?;
        match row.ids.strip_prefix(prompt_ids.as_slice()) {
            Some(answer) if !answer.is_empty() => Ok((prompt_ids, answer.to_vec())),
            _ => Err(TextError::Mask { message: "the rendered conversation does not begin with the rendered prompt".into() }),
        }
    }

    /// The rendered conversation with the byte ranges of assistant turns, their end tokens included.
    fn assistant_spans(&self, messages: &[Message]) -> Result<Rendered, TextError> {
        let rendered = self.rendered(messages, false)?;
        let mut rendered = if self.0.template.as_ref().is_some_and(ChatTemplate::is_marked) {
            rendered
        } else {
            let spans = self.derive_spans(messages, &rendered.text)?;
            Rendered { spans, ..rendered }
        };
        // A template may close its block before the token that ends the turn; the model must learn to end it.
        let eos = self.eos_token();
        for span in &mut rendered.spans {
            if !rendered.text[span.clone()].trim_end().ends_with(&eos) && rendered.text[span.end..].starts_with(&eos) {
                span.end += eos.len();
            }
        }
        rendered.spans.retain(|span| !span.is_empty());
        Ok(rendered)
    }

    fn eos_token(&self) -> String {
        self.0.plain.id_to_token(self.0.eos_id).unwrap_or_default()
    }

    /// What each assistant turn adds to the rendering of the turns before it.
    fn derive_spans(&self, messages: &[Message], text: &str) -> Result<Vec<Range<usize>>, TextError> {
        let eos = self.eos_token();
        let mut spans = Vec::new();
        for (at, _) in messages.iter().enumerate().filter(|(_, message)| message.is_assistant()) {
            let before = self.rendered(&messages[..at], true)?.text;
            let through = self.rendered(&messages[..=at], false)?.text;
            let Some(turn) = through.strip_prefix(before.as_str()) else {
                return Err(TextError::Mask { message: format!("rendering message {} changes what comes before it", at + 1) });
            };
            // White space after the end token belongs to the template.
            let length = turn.rfind(&eos).filter(|_| !eos.is_empty()).map_or(turn.len(), |start| start + eos.len());
            let span = before.len()..before.len() + length;
            if text.get(..span.end) != Some(&through[..span.end]) {
                return Err(TextError::Mask { message: format!("messages after message {} change how it is rendered", at + 1) });
            }
            spans.push(span);
        }
        Ok(spans)
    }

    /// Encodes between the bounds of spans, so that no token lies on both sides and a prompt's ids are a prefix of its conversation's.
    fn encode_pieces(&self, rendered: &Rendered) -> ConversationRow {
        let mut row = ConversationRow::default();
        let mut done = 0;
        for span in &rendered.spans {
            for (range, counts) in [(done..span.start, false), (span.clone(), true)] {
                let ids = self.encode_with_special(&rendered.text[range]);
                row.mask.extend(std::iter::repeat_n(counts, ids.len()));
                row.ids.extend(ids);
            }
            done = span.end;
        }
        row
    }
}

/// Encodes at once and finds the counted tokens by their place in the text.
fn encode_whole(tokenizer: &Tokenizer, rendered: &Rendered) -> Result<ConversationRow, TextError> {
    let end = rendered.spans.last().map_or(0, |span| span.end);
    let encoding = tokenizer.encode(&rendered.text[..end], false).map_err(|error| TextError::Mask { message: error.to_string() })?;
    let counts = |(start, end): &(usize, usize)| rendered.spans.iter().any(|span| span.start <= *start && *end <= span.end && start < end);
    let mask = encoding.get_offsets().iter().map(counts).collect();
    Ok(ConversationRow { ids: encoding.get_ids().to_vec(), mask })
}

/// Whether pieces of a text can be encoded one by one: no marker is put before each of them.
fn encodes_piecewise(tokenizer: &Tokenizer) -> bool {
    let ids = |text: &str| tokenizer.encode_fast(text, false).map(|encoding| encoding.get_ids().to_vec()).ok();
    let pieces = |text: &[&str]| text.iter().map(|piece| ids(piece)).collect::<Option<Vec<_>>>().map(|ids| ids.concat());
    ids("x\nfoo").is_some() && ids("x\nfoo") == pieces(&["x", "\n", "foo"])
}

/// What the tokenizer puts before a text.
fn document_start(tokenizer: &Tokenizer) -> Result<Vec<u32>, String> {
    let ids = |special: bool| tokenizer.encode_fast("a", special).map(|encoding| encoding.get_ids().to_vec());
    let (with, without) = (ids(true).map_err(|error| error.to_string())?, ids(false).map_err(|error| error.to_string())?);
    let at = with.windows(without.len().max(1)).position(|window| window == without).unwrap_or(0);
    Ok(with[..at].to_vec())
}

/// Decodes a stream of ids. A character whose bytes are spread over several tokens is held back until it is complete.
pub struct DecodeStream {
    tokenizer: ChatTokenizer,
    ids: Vec<u32>,
    /// Ids before this one are not looked at any more.
    start: usize,
    /// Ids before this one have been given as text.
    given: usize,
}

impl DecodeStream {
    /// Adds an id and returns the text that is now complete, perhaps none.
    pub fn push(&mut self, id: u32) -> String {
        self.ids.push(id);
        let text = self.pending();
        if text.is_empty() || text.ends_with('\u{FFFD}') {
            return String::new();
        }
        // Some decoders look one token back (a space before a word), so the newest piece stays as context.
        self.start = self.given;
        self.given = self.ids.len();
        text
    }

    /// The rest: incomplete characters become U+FFFD.
    pub fn finish(mut self) -> String {
        let text = self.pending();
        self.ids.clear();
        text
    }

    fn pending(&self) -> String {
        let known = self.tokenizer.decode(&self.ids[self.start..self.given]);
        let all = self.tokenizer.decode(&self.ids[self.start..]);
        all.strip_prefix(known.as_str()).unwrap_or_default().to_owned()
    }
}
