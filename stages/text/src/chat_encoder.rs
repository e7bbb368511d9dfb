use std::{collections::HashMap, ops::Range};

use serde_json::Value;
use tokenizers::{AddedToken, PostProcessorWrapper, Tokenizer};

use crate::{
    ChatContext, ConversationRow, Message, TextError,
    chat_template::{BREAK, is_reserved},
};

/// Begins the private name of a special token.
const PRIVATE: char = '\u{FDD3}';
/// Hexadecimal digits of private names are this character and the fifteen that follow it.
const DIGITS: u32 = 0xFDE0;

/// Encodes what chat templates render. Special tokens that the template wrote become their ids; their names in what people wrote stay text.
///
/// To tell the two apart, names in messages are broken with [`BREAK`] before they are rendered. What still looks like a special token
/// after rendering is the template's; it gets a private name that only this tokenizer knows, and the breaks are taken out. The text is
/// encoded at once, as transformers does it, so that tokenizers which treat the start of a text differently see what they should.
pub(crate) struct ChatEncoder {
    tokenizer: Tokenizer,
    /// Special tokens by name, longest name first.
    special: Vec<(String, u32)>,
    /// First bytes of their names.
    starts: [bool; 256],
    /// Ids of private names to the ids that they stand for.
    private: HashMap<u32, u32>,
    break_id: Option<u32>,
    /// Whether pieces of a text can be encoded one by one: no marker is put before each of them.
    piecewise: bool,
}

impl ChatEncoder {
    /// For `tokenizer`, which must not pad or truncate.
    pub fn new(tokenizer: &Tokenizer) -> Self {
        let mut tokenizer = tokenizer.clone();
        let added = tokenizer.get_added_tokens_decoder();
        let added = added.into_iter().filter(|(_, token)| token.special && !token.content.is_empty());
        let mut added: Vec<(u32, AddedToken)> = added.collect();
        added.sort_by(|(_, a), (_, b)| b.content.len().cmp(&a.content.len()).then_with(|| a.content.cmp(&b.content)));

        let text = |content: String| AddedToken { content, special: false, single_word: false, ..AddedToken::default() };
        let hidden = |(at, (_, token)): (usize, &(u32, AddedToken))| {
            let AddedToken { lstrip, rstrip, normalized, .. } = *token;
            AddedToken { lstrip, rstrip, normalized, ..text(private_name(at)) }
        };
        let mut names: Vec<AddedToken> = added.iter().enumerate().map(hidden).collect();
        names.push(AddedToken { normalized: false, ..text(BREAK.to_string()) });
        tokenizer.add_tokens(&names);
        tokenizer.set_encode_special_tokens(true);
        // It would only cut white space from offsets: BOS and the like are the template's affair.
        tokenizer.with_post_processor(None::<PostProcessorWrapper>);

        let mut starts = [false; 256];
        added.iter().for_each(|(_, token)| starts[usize::from(token.content.as_bytes()[0])] = true);
        let hidden = added.iter().enumerate().filter_map(|(at, (id, _))| Some((tokenizer.token_to_id(&private_name(at))?, *id)));
        let private = hidden.collect();
        Self {
            piecewise: encodes_piecewise(&tokenizer),
            break_id: tokenizer.token_to_id(BREAK.encode_utf8(&mut [0; 4])),
            special: added.into_iter().map(|(id, token)| (token.content, id)).collect(),
            starts,
            private,
            tokenizer,
        }
    }

    /// The first special token's name in `text`, the longest if several begin there: where, how long, which.
    fn next_special(&self, text: &str) -> Option<(usize, usize, usize)> {
        let bytes = text.as_bytes();
        let mut candidates = (0..bytes.len()).filter(|at| self.starts[usize::from(bytes[*at])]);
        candidates.find_map(|start| {
            let found = self.special.iter().position(|(name, _)| bytes[start..].starts_with(name.as_bytes()));
            found.map(|which| (start, self.special[which].0.len(), which))
        })
    }

    /// Whether `text` holds the name of a special token.
    pub fn names_special(&self, text: &str) -> bool {
        self.next_special(text).is_some()
    }

    /// Whether `id` is a special token's.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.iter().any(|(_, special)| *special == id)
    }

    /// `text` with every special token's name broken after its first character.
    pub fn protect(&self, text: &str) -> String {
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

    /// `messages` with the names of special tokens broken, if there are any.
    pub fn protect_messages(&self, messages: &[Message]) -> Result<Option<Vec<Message>>, TextError> {
        let mut safe = None;
        for (at, message) in messages.iter().enumerate() {
            let mut parts = vec![self.protected(&message.role)?, self.protected(&message.content)?];
            let mut extra = message.extra.clone();
            let mut changed = false;
            for value in extra.values_mut() {
                changed |= self.protect_value(value)?;
            }
            if changed || parts.iter().any(Option::is_some) {
                let (content, role) = (parts.pop().flatten(), parts.pop().flatten());
                let safe = safe.get_or_insert_with(|| messages.to_vec());
                let plain = |part: Option<String>, text: &str| part.unwrap_or_else(|| text.to_owned());
                safe[at] = Message { role: plain(role, &message.role), content: plain(content, &message.content), extra };
            }
        }
        Ok(safe)
    }

    /// The same for what comes with the messages.
    pub fn protect_context(&self, context: &ChatContext) -> Result<ChatContext, TextError> {
        let mut context = context.clone();
        for value in context.tools.iter_mut().chain(&mut context.documents).chain(context.variables.values_mut()) {
            self.protect_value(value)?;
        }
        Ok(context)
    }

    fn protect_value(&self, value: &mut Value) -> Result<bool, TextError> {
        let mut changed = false;
        match value {
            Value::String(text) => {
                if let Some(broken) = self.protected(text)? {
                    *text = broken;
                    changed = true;
                }
            }
            Value::Array(values) => {
                for value in values {
                    changed |= self.protect_value(value)?;
                }
            }
            Value::Object(map) => {
                for value in map.values_mut() {
                    changed |= self.protect_value(value)?;
                }
                // Names are printed too.
                if map.keys().any(|key| self.names_special(key) || key.contains(is_reserved)) {
                    let renamed = std::mem::take(map).into_iter();
                    for (key, value) in renamed {
                        let key = self.protected(&key)?.unwrap_or(key);
                        map.insert(key, value);
                    }
                    changed = true;
                }
            }
            Value::Null | Value::Bool(_) | Value::Number(_) => {}
        }
        Ok(changed)
    }

    fn protected(&self, text: &str) -> Result<Option<String>, TextError> {
        match text.chars().find(|found| is_reserved(*found)) {
            Some(found) => Err(TextError::Reserved { code: found as u32 }),
            None => Ok(self.names_special(text).then(|| self.protect(text))),
        }
    }

    /// Ids of `text`, which a template rendered of protected messages, and which of them lie in `spans`.
    ///
    /// A token counts if any of its text does: one that a span's bound cuts belongs to the span, as in transformers.
    pub fn encode(&self, text: &str, spans: &[Range<usize>]) -> Result<ConversationRow, TextError> {
        let row = self.encode_as(text, spans, false)?;
        // Some models know special tokens as ordinary pieces too: there the broken names have to be encoded in parts.
        if text.contains(BREAK) && self.quoted_as_special(text, &row) { self.encode_as(text, spans, true) } else { Ok(row) }
    }

    /// Whether `row` has more special tokens than the template wrote.
    fn quoted_as_special(&self, text: &str, row: &ConversationRow) -> bool {
        let (mut written, mut rest) = (0, text);
        while let Some((start, length, _)) = self.next_special(rest) {
            written += 1;
            rest = &rest[start + length..];
        }
        row.ids.iter().filter(|id| self.is_special(**id)).count() > written
    }

    fn encode_as(&self, text: &str, spans: &[Range<usize>], keep_breaks: bool) -> Result<ConversationRow, TextError> {
        let (text, spans) = self.hide(text, spans, keep_breaks);
        let encoding = self.tokenizer.encode(text, false).map_err(|error| TextError::Encode { message: error.to_string() })?;
        let mut row = ConversationRow::default();
        for (id, (start, end)) in encoding.get_ids().iter().zip(encoding.get_offsets()) {
            if Some(*id) != self.break_id {
                row.ids.push(self.private.get(id).copied().unwrap_or(*id));
                row.mask.push(spans.iter().any(|span| span.start < *end && *start < span.end));
            }
        }
        Ok(row)
    }

    /// `text` with private names for special tokens and without breaks, and where `spans` are in it.
    fn hide(&self, text: &str, spans: &[Range<usize>], keep_breaks: bool) -> (String, Vec<Range<usize>>) {
        let mut out = String::with_capacity(text.len() + 64);
        let mut bounds: Vec<(usize, usize)> = Vec::new();
        let mut wanted: Vec<usize> = spans.iter().flat_map(|span| [span.start, span.end]).collect();
        wanted.sort_unstable();
        let mut wanted = wanted.into_iter().peekable();
        let mut at = 0;
        let mut copy = |range: Range<usize>, out: &mut String| {
            for (offset, character) in text[range.clone()].char_indices() {
                while let Some(bound) = wanted.next_if(|bound| *bound <= range.start + offset) {
                    bounds.push((bound, out.len()));
                }
                if keep_breaks || character != BREAK {
                    out.push(character);
                }
            }
            while let Some(bound) = wanted.next_if(|bound| *bound <= range.end) {
                bounds.push((bound, out.len()));
            }
        };
        while let Some((start, length, which)) = self.next_special(&text[at..]) {
            copy(at..at + start, &mut out);
            out.push_str(&private_name(which));
            at += start + length;
        }
        copy(at..text.len(), &mut out);
        let place = |wanted: usize| bounds.iter().find(|(bound, _)| *bound == wanted).map_or(out.len(), |(_, place)| *place);
        let spans = spans.iter().map(|span| place(span.start)..place(span.end)).collect();
        (out, spans)
    }

    /// Ids of `text` as they follow upon something else.
    pub fn encode_rest(&self, text: &str) -> Result<Vec<u32>, TextError> {
        let ids = |text: &str| Ok(self.encode(text, &[])?.ids);
        if !self.piecewise {
            // A line end takes the marker that begins a text.
            let (line, both) = (ids("\n")?, ids(&format!("\n{text}"))?);
            if let Some(rest) = both.strip_prefix(line.as_slice()) {
                return Ok(rest.to_vec());
            }
        }
        ids(text)
    }
}

fn private_name(which: usize) -> String {
    let digit = |place: usize| char::from_u32(DIGITS + (which >> (4 * place) & 15) as u32).unwrap_or(PRIVATE);
    let mut name = String::from(PRIVATE);
    name.extend((0..4).rev().map(digit));
    name
}

fn encodes_piecewise(tokenizer: &Tokenizer) -> bool {
    let ids = |text: &str| tokenizer.encode_fast(text, false).map(|encoding| encoding.get_ids().to_vec()).ok();
    let pieces = |text: &[&str]| text.iter().map(|piece| ids(piece)).collect::<Option<Vec<_>>>().map(|ids| ids.concat());
    ids("x\nfoo").is_some() && ids("x\nfoo") == pieces(&["x", "\n", "foo"])
}
