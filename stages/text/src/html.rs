use html5gum::{
    Span, Tokenizer,
    emitters::callback::{CallbackEmitter, CallbackEvent},
};

/// The text of a web page: entities decoded, white space as a browser shows it, block elements as paragraphs between blank lines, list
/// items and table rows as lines. What is not read as text is left out: scripts, styles, the title, form fields, graphics and media.
pub(crate) fn html_text(html: &str) -> String {
    let mut page = Page::default();
    let mut tag: Vec<u8> = Vec::new();
    let mut emitter = CallbackEmitter::new(|event: CallbackEvent<'_>, _: Span<()>| -> Option<std::convert::Infallible> {
        match event {
            CallbackEvent::OpenStartTag { name } => {
                tag.clear();
                tag.extend(name);
            }
            CallbackEvent::CloseStartTag { self_closing } => page.start(&tag, self_closing),
            CallbackEvent::EndTag { name } => page.end(name),
            CallbackEvent::String { value } => page.text(&String::from_utf8_lossy(value)),
            _ => {}
        }
        None
    });
    emitter.naively_switch_states(true);
    // All is told to the emitter; nothing comes out here.
    Tokenizer::new_with_emitter(html, emitter).for_each(drop);
    page.text
}

/// What stands between two pieces of text; the strongest of several counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
enum Gap {
    #[default]
    None,
    Space,
    Line,
    Paragraph,
}

/// What an element is to its text.
enum Role {
    /// Nothing.
    Inline,
    /// Its content is not text.
    LeftOut,
    /// It is set apart on both sides.
    Apart(Gap),
}

fn role(element: &[u8]) -> Role {
    match element {
        b"script" | b"style" | b"title" | b"noscript" | b"template" | b"svg" | b"iframe" | b"noembed" | b"noframes" | b"object"
        | b"canvas" | b"audio" | b"video" | b"select" | b"datalist" | b"textarea" => Role::LeftOut,
        b"td" | b"th" => Role::Apart(Gap::Space),
        b"br" | b"li" | b"dt" | b"dd" | b"tr" => Role::Apart(Gap::Line),
        b"address" | b"article" | b"aside" | b"blockquote" | b"body" | b"caption" | b"center" | b"details" | b"dialog" | b"div" | b"dl"
        | b"fieldset" | b"figcaption" | b"figure" | b"footer" | b"form" | b"h1" | b"h2" | b"h3" | b"h4" | b"h5" | b"h6" | b"head"
        | b"header" | b"hgroup" | b"hr" | b"html" | b"legend" | b"listing" | b"main" | b"menu" | b"nav" | b"ol" | b"p" | b"pre"
        | b"search" | b"section" | b"summary" | b"table" | b"ul" | b"xmp" => Role::Apart(Gap::Paragraph),
        _ => Role::Inline,
    }
}

/// Whether white space within an element is kept.
fn is_preformatted(element: &[u8]) -> bool {
    matches!(element, b"pre" | b"listing" | b"xmp")
}

/// A page as far as it was read.
#[derive(Default)]
struct Page {
    text: String,
    gap: Gap,
    /// An element whose content is left out, and how many of that name are open.
    left_out: Option<(Vec<u8>, usize)>,
    /// Preformatted elements that are open.
    preformatted: usize,
}

impl Page {
    fn start(&mut self, element: &[u8], self_closing: bool) {
        if let Some((name, open)) = &mut self.left_out {
            *open += usize::from(name == element && !self_closing);
            return;
        }
        match role(element) {
            // Only foreign elements can close themselves.
            Role::LeftOut if self_closing && element == b"svg" => {}
            Role::LeftOut => self.left_out = Some((element.to_vec(), 1)),
            Role::Apart(gap) => self.gap = self.gap.max(gap),
            Role::Inline => {}
        }
        self.preformatted += usize::from(is_preformatted(element));
    }

    fn end(&mut self, element: &[u8]) {
        if let Some((name, open)) = &mut self.left_out {
            *open -= usize::from(name == element);
            if *open == 0 {
                self.left_out = None;
            }
            return;
        }
        if let Role::Apart(gap) = role(element) {
            self.gap = self.gap.max(gap);
        }
        self.preformatted = self.preformatted.saturating_sub(usize::from(is_preformatted(element)));
    }

    fn text(&mut self, text: &str) {
        if self.left_out.is_some() || text.is_empty() {
            return;
        }
        if self.preformatted > 0 {
            // A line end right after the tag is no part of the text.
            let text = if self.gap > Gap::None { text.strip_prefix('\n').unwrap_or(text) } else { text };
            return self.push(text);
        }
        for piece in text.split_inclusive(|character: char| character.is_ascii_whitespace()) {
            let word = piece.trim_end_matches(|character: char| character.is_ascii_whitespace());
            if !word.is_empty() {
                self.push(word);
            }
            if word.len() < piece.len() {
                self.gap = self.gap.max(Gap::Space);
            }
        }
    }

    fn push(&mut self, text: &str) {
        let gap = std::mem::take(&mut self.gap);
        let between = match gap {
            _ if self.text.is_empty() => "",
            Gap::None => "",
            Gap::Space => " ",
            Gap::Line => "\n",
            Gap::Paragraph => "\n\n",
        };
        if gap > Gap::Space {
            self.text.truncate(self.text.trim_end_matches([' ', '\t', '\n']).len());
        }
        self.text.push_str(between);
        self.text.push_str(text);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Worked out by hand, after what browsers show.
    #[test]
    fn pages_become_paragraphs() {
        let page = "<!DOCTYPE html><html><head><title>Off</title><style>p { color: red }</style></head>\n<body>\n\
                    <h1>Cells &amp; more</h1>\n<p>All\n   living <b>things</b><i>!</i><p>are <!-- not --> made&nbsp;of c&eacute;lls.<br>Yes&#33;\n\
                    <script>if (a < b) document.write('<p>no</p>');</script>\n\
                    <ul><li>one</li><li>two &lt;3</li></ul>\n<table><tr><td>a</td><td>b</td></tr><tr><td>c</td></tr></table>\n\
                    <pre>\n  let x =\n    1;\n</pre>after</body></html>";
        let expected =
            "Cells & more\n\nAll living things!\n\nare made\u{a0}of célls.\nYes!\n\none\ntwo <3\n\na b\nc\n\n  let x =\n    1;\n\nafter";
        assert_eq!(html_text(page), expected);
    }

    #[test]
    fn what_is_no_text_is_left_out() {
        assert_eq!(html_text("a<svg><g/><svg></svg>x</svg>b<svg/>c<template><p>x</template>d"), "abcd");
        assert_eq!(html_text("a<noscript><p>x</p></noscript> b <select><option>x</select><textarea><p>x</textarea>c"), "a b c");
        // As in browsers, nothing after a script that is never closed is shown.
        assert_eq!(html_text("<p>a</p><script>x <p>b</p>"), "a");
        assert_eq!(html_text("</p></pre></svg>a < b &unknown; &#0; <"), "a < b &unknown; \u{fffd} <");
        assert_eq!(html_text(" \n <p> </p>"), "");
    }
}
