use std::{ops::Range, sync::Arc};

use rlflow_api::{Artifact, ArtifactBuilder, Digest, StageResult};
use rlflow_store::Hasher;
use tokenizers::Tokenizer;

use crate::{
    Chat, ChatContext, ChatTemplate, ConversationRow, DecodeStream, Message, Rendered, TextError, TokenizerConfig,
    chat_encoder::ChatEncoder, chat_template::BREAK,
};

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
    encoder: ChatEncoder,
    template: Option<ChatTemplate>,
    /// For conversations with tools, where the tokenizer has one apart.
    tools_template: Option<ChatTemplate>,
    digest: Digest,
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

        let highest_id = plain.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        let document_start = document_start(&plain, &config).map_err(bad)?;
        let encoder = ChatEncoder::new(&plain);
        plain.set_encode_special_tokens(true);
        let parse = |source: &str| ChatTemplate::new(source, config.special_tokens());
        let template = config.chat_template()?.map(parse).transpose()?;
        let tools_template = config.tools_template().map(parse).transpose()?;
        let digest = Hasher::new().update(Digest::of(tokenizer_json).as_bytes()).update(Digest::of(config_json).as_bytes()).finish();
        Ok(Self(Arc::new(Inner {
            vocab_size: highest_id,
            plain,
            encoder,
            template,
            tools_template,
            digest,
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

    /// Name of the token with this id, as it stands in the vocabulary; empty for ids that it does not have.
    pub fn token(&self, id: u32) -> String {
        self.0.plain.id_to_token(id).unwrap_or_default()
    }

    /// The chat template, if there is one.
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.0.template.as_ref()
    }

    /// Ids of a text. The names of special tokens are text like any other: a document cannot end itself.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let encoder = &self.0.encoder;
        let ids = self.0.plain.encode_fast(text, false).map_err(|error| error.to_string()).and_then(|encoding| {
            let ids = encoding.get_ids();
            // Models that know special tokens as ordinary pieces too.
            match ids.iter().any(|id| encoder.is_special(*id)) && encoder.names_special(text) {
                true => Ok(encoder.encode(&encoder.protect(text), &[]).map_err(|error| error.to_string())?.ids),
                false => Ok(ids.to_vec()),
            }
        });
        // Only models that lack both byte fallback and an unknown token can fail; what they cannot say is left out.
        ids.unwrap_or_else(|error| {
            tracing::warn!(error, "text cannot be encoded");
            Vec::new()
        })
    }

    /// Ids of a document: what the tokenizer puts before a text (BOS, for most nothing), the text, and the token that ends a document.
    pub fn encode_document(&self, text: &str) -> Vec<u32> {
        let mut ids = self.0.document_start.clone();
        ids.extend(self.encode(text));
        ids.push(self.document_end_id());
        ids
    }

    /// Ids of a text in which the names of special tokens stand for the tokens.
    pub fn encode_with_special(&self, text: &str) -> Result<Vec<u32>, TextError> {
        Ok(self.0.encoder.encode(text, &[])?.ids)
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
        DecodeStream::new(self.clone())
    }

    /// The conversation as the model sees it.
    pub fn render<'a>(&self, chat: impl Into<Chat<'a>>, add_generation_prompt: bool) -> Result<String, TextError> {
        Ok(self.rendered(&Protected::new(&self.0.encoder, chat.into())?.chat(), add_generation_prompt)?.text.replace(BREAK, ""))
    }

    /// Ids of a prompt, up to where the assistant begins to speak.
    pub fn encode_prompt<'a>(&self, chat: impl Into<Chat<'a>>) -> Result<Vec<u32>, TextError> {
        self.encode_with_special(&self.rendered(&Protected::new(&self.0.encoder, chat.into())?.chat(), true)?.text)
    }

    /// Ids and mask of a conversation, up to the end of its last assistant turn: what `apply_chat_template` of transformers gives, with
    /// its `assistant_masks` where the template has `{% generation %}` blocks.
    pub fn encode_conversation<'a>(&self, chat: impl Into<Chat<'a>>) -> Result<ConversationRow, TextError> {
        let protected = Protected::new(&self.0.encoder, chat.into())?;
        let chat = protected.chat();
        let Some(last) = chat.messages.iter().rposition(Message::is_assistant) else { return Err(TextError::NoAssistantTurn) };
        let rendered = self.assistant_spans(&chat, 0..last + 1)?;
        let end = rendered.spans.last().map_or(0, |span| span.end);
        let row = self.0.encoder.encode(&rendered.text[..end], &rendered.spans)?;
        if row.mask.contains(&true) {
            return Ok(row);
        }
        match chat.messages.iter().any(|message| message.is_assistant() && message.says_something()) {
            true => Err(TextError::Mask { message: "it leaves out what the assistant says".into() }),
            false => Err(TextError::NoAssistantTurn),
        }
    }

    /// Ids of a prompt and of an answer to it, the token that ends the turn included. The prompt's are those of [`Self::encode_prompt`],
    /// so that the model is taught what it will be asked for.
    pub fn encode_answer<'a>(&self, prompt: impl Into<Chat<'a>>, answer: &Message) -> Result<(Vec<u32>, Vec<u32>), TextError> {
        let prompt = prompt.into();
        if !answer.is_assistant() {
            return Err(TextError::NoAssistantTurn);
        }
        let messages: Vec<Message> = prompt.messages.iter().chain([answer]).cloned().collect();
        let protected = Protected::new(&self.0.encoder, Chat { messages: &messages, ..prompt })?;
        let (chat, last) = (protected.chat(), messages.len() - 1);
        let before = self.rendered(&chat.with_messages(&chat.messages[..last]), true)?.text;
        let rendered = self.assistant_spans(&chat, last..last + 1)?;
        let through = &rendered.text[..rendered.spans.last().map_or(0, |span| span.end)];

        let prompt_ids = self.encode_with_special(&before)?;
        if let Some(rest) = through.strip_prefix(before.as_str()).filter(|rest| !rest.is_empty()) {
            // Where the last token of the prompt would swallow the beginning of the answer, the answer is encoded apart.
            let both = self.encode_with_special(through)?;
            let answer =
                both.strip_prefix(prompt_ids.as_slice()).map_or_else(|| self.0.encoder.encode_rest(rest), |ids| Ok(ids.to_vec()))?;
            if !answer.is_empty() {
                return Ok((prompt_ids, answer));
            }
        }
        Err(TextError::Mask { message: "the rendered conversation does not begin with the rendered prompt".into() })
    }

    fn template_for(&self, chat: &Chat<'_>) -> Result<&ChatTemplate, TextError> {
        let for_tools = self.0.tools_template.as_ref().filter(|_| chat.context.is_some_and(|context| !context.tools.is_empty()));
        let no_template = || TextError::Template { message: "the tokenizer has none; set `chat_template` on its stage".into() };
        for_tools.or(self.0.template.as_ref()).ok_or_else(no_template)
    }

    fn rendered(&self, chat: &Chat<'_>, add_generation_prompt: bool) -> Result<Rendered, TextError> {
        self.template_for(chat)?.render(*chat, add_generation_prompt)
    }

    /// The rendered conversation with the byte ranges of those assistant turns that are among `wanted`, their end tokens included.
    fn assistant_spans(&self, chat: &Chat<'_>, wanted: Range<usize>) -> Result<Rendered, TextError> {
        let rendered = self.rendered(chat, false)?;
        let mut rendered = if self.template_for(chat)?.is_marked() {
            rendered
        } else {
            let spans = self.derive_spans(chat, &rendered.text, wanted)?;
            Rendered { spans, ..rendered }
        };
        // A template may close its block before the token that ends the turn; the model must learn to end it.
        let eos = self.token(self.eos_id());
        for span in &mut rendered.spans {
            if !rendered.text[span.clone()].trim_end().ends_with(&eos) && rendered.text[span.end..].starts_with(&eos) {
                span.end += eos.len();
            }
        }
        rendered.spans.retain(|span| !span.is_empty());
        Ok(rendered)
    }

    /// What each assistant turn adds to the rendering of the turns before it.
    fn derive_spans(&self, chat: &Chat<'_>, text: &str, wanted: Range<usize>) -> Result<Vec<Range<usize>>, TextError> {
        let eos = self.token(self.eos_id());
        let mut spans = Vec::new();
        for at in wanted.filter(|at| chat.messages[*at].is_assistant()) {
            let before = self.rendered(&chat.with_messages(&chat.messages[..at]), true)?.text;
            let through = self.rendered(&chat.with_messages(&chat.messages[..=at]), false)?.text;
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
}

/// A conversation in which the names of special tokens are broken.
struct Protected<'a> {
    given: Chat<'a>,
    messages: Option<Vec<Message>>,
    context: Option<ChatContext>,
}

impl<'a> Protected<'a> {
    fn new(encoder: &ChatEncoder, given: Chat<'a>) -> Result<Self, TextError> {
        let messages = encoder.protect_messages(given.messages)?;
        let context = given.context.map(|context| encoder.protect_context(context)).transpose()?;
        Ok(Self { given, messages, context })
    }

    fn chat(&self) -> Chat<'_> {
        Chat { messages: self.messages.as_deref().unwrap_or(self.given.messages), context: self.context.as_ref() }
    }
}

/// What the tokenizer puts before a text. Its config may say so apart from its post-processor; then the config is followed, as by transformers.
fn document_start(tokenizer: &Tokenizer, config: &TokenizerConfig) -> Result<Vec<u32>, String> {
    if let Some(adds) = config.add_bos_token() {
        let bos = config.bos_token().filter(|_| adds).and_then(|token| tokenizer.token_to_id(token));
        return Ok(bos.into_iter().collect());
    }
    let ids = |special: bool| tokenizer.encode_fast("a", special).map(|encoding| encoding.get_ids().to_vec());
    let (with, without) = (ids(true).map_err(|error| error.to_string())?, ids(false).map_err(|error| error.to_string())?);
    let at = with.windows(without.len().max(1)).position(|window| window == without).unwrap_or(0);
    Ok(with[..at].to_vec())
}
