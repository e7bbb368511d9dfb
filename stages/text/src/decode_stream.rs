use crate::ChatTokenizer;

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
    pub(crate) fn new(tokenizer: ChatTokenizer) -> Self {
        Self { tokenizer, ids: Vec::new(), start: 0, given: 0 }
    }

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
