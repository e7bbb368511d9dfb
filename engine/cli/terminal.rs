use std::{
    borrow::Cow,
    io::{IsTerminal, Write},
};

use crate::failure::Stdout;

/// Writes a piece of a model's text to stdout as it comes. False once the reader has gone away.
pub fn write_piece(text: &str) -> bool {
    let text = if std::io::stdout().is_terminal() { visible(text) } else { Cow::Borrowed(text) };
    Stdout.write_all(text.as_bytes()).and_then(|()| Stdout.flush()).is_ok()
}

/// `text` with control characters in pictures, so that what a model writes can neither move the cursor nor talk to the
/// terminal. Line breaks and tabs stay.
pub fn visible(text: &str) -> Cow<'_, str> {
    let is_safe = |character: char| !character.is_control() || matches!(character, '\n' | '\t');
    if text.chars().all(is_safe) {
        return Cow::Borrowed(text);
    }
    let picture = |character: char| match character {
        _ if is_safe(character) => character,
        '\u{7f}' => '\u{2421}',
        '\0'..='\u{1f}' => char::from_u32(0x2400 + u32::from(character)).unwrap_or(char::REPLACEMENT_CHARACTER),
        _ => char::REPLACEMENT_CHARACTER,
    };
    Cow::Owned(text.chars().map(picture).collect())
}

#[cfg(test)]
mod tests {
    use super::visible;

    #[test]
    fn escape_sequences_are_shown_and_not_sent() {
        assert_eq!(visible("a\u{1b}[2Jb\r\u{7f}\u{9b}"), "a␛[2Jb␍␡\u{fffd}");
        assert_eq!(visible("zwei\tWörter\n机器"), "zwei\tWörter\n机器");
    }
}
