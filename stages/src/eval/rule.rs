use regex::Regex;
use rlflow_api::Problem;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How an answer must agree with the reference answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum AnswerMatch {
    /// It contains the reference as whole words, in any case.
    #[default]
    Contains,
    /// It is the reference, white space at the ends and case apart.
    Exact,
    /// What follows the last `####`, or else its last number, is the reference (GSM8K).
    Number,
    /// Nothing is asked.
    Ignore,
}

/// A rule by which an answer is right. All parts must hold.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct Rule {
    /// How it must agree with the reference answer: `contains`, `exact`, `number` or `ignore`.
    pub answer: AnswerMatch,
    /// Regular expression that it must match (Rust's `regex` syntax).
    pub pattern: Option<String>,
    /// Longest right answer.
    #[schemars(extend("x-unit" = "words"), range(min = 1))]
    pub max_words: Option<usize>,
}

/// A rule ready to use.
pub struct CompiledRule {
    answer: AnswerMatch,
    pattern: Option<Regex>,
    max_words: Option<usize>,
}

impl Rule {
    /// Problems; `prefix` is the table's name.
    pub fn check(&self, prefix: &str) -> Vec<Problem> {
        match self.compile() {
            Ok(rule) if rule.asks_nothing() => vec![
                Problem::new("conflicting_settings", prefix, "with answer = \"ignore\" alone every answer is right")
                    .hint("add `pattern` or `max_words`, or remove the rule"),
            ],
            Ok(_) => Vec::new(),
            Err(message) => vec![Problem::new("bad_pattern", format!("{prefix}.pattern"), message)],
        }
    }

    /// Compiles the pattern.
    pub fn compile(&self) -> Result<CompiledRule, String> {
        let pattern = self
            .pattern
            .as_deref()
            .map(Regex::new)
            .transpose()
            .map_err(|error| format!("`pattern` is not a regular expression: {error}"))?;
        Ok(CompiledRule { answer: self.answer, pattern, max_words: self.max_words })
    }
}

impl CompiledRule {
    fn asks_nothing(&self) -> bool {
        self.answer == AnswerMatch::Ignore && self.pattern.is_none() && self.max_words.is_none()
    }

    /// Whether it can tell right from wrong for a prompt with this reference answer.
    pub fn judges(&self, reference: Option<&str>) -> bool {
        self.answer == AnswerMatch::Ignore || reference.is_some()
    }

    /// Whether `text` is right; `reference` is the right answer, if there is one.
    pub fn holds(&self, text: &str, reference: Option<&str>) -> bool {
        let text = text.trim();
        let agrees = reference.is_none_or(|reference| self.agrees(text, reference.trim()));
        agrees
            && self.pattern.as_ref().is_none_or(|pattern| pattern.is_match(text))
            && self.max_words.is_none_or(|max| text.split_whitespace().count() <= max)
    }

    fn agrees(&self, text: &str, reference: &str) -> bool {
        match self.answer {
            AnswerMatch::Ignore => true,
            AnswerMatch::Exact => text.to_lowercase() == reference.to_lowercase(),
            AnswerMatch::Contains => contains_words(&text.to_lowercase(), &reference.to_lowercase()),
            AnswerMatch::Number => final_number(text).is_some_and(|number| Some(number) == final_number(reference)),
        }
    }
}

/// Whether `words` stands in `text` with no letter or digit touching its ends.
fn contains_words(text: &str, words: &str) -> bool {
    if words.is_empty() {
        return false;
    }
    let is_inner = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
    text.match_indices(words)
        .any(|(at, found)| !is_inner(text[..at].chars().next_back()) && !is_inner(text[at + found.len()..].chars().next()))
}

fn final_number(text: &str) -> Option<String> {
    let tail = text.rsplit_once("####").map_or(text, |(_, tail)| tail);
    let numbers = tail.split(|c: char| !(c.is_ascii_digit() || "-.,".contains(c)));
    let last = numbers
        .map(|number| number.replace(',', ""))
        .map(|number| number.trim_end_matches('.').to_owned())
        .rfind(|number| number.chars().any(|c| c.is_ascii_digit()))?;
    Some(last.parse::<f64>().map_or(last.clone(), |value| value.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(answer: AnswerMatch, pattern: Option<&str>, max_words: Option<usize>) -> CompiledRule {
        Rule { answer, pattern: pattern.map(str::to_owned), max_words }.compile().unwrap()
    }

    #[test]
    fn every_part_must_hold() {
        let short = rule(AnswerMatch::Contains, Some("help!$"), Some(6));
        assert!(!short.holds("The boat is Green. Happy to help!", Some("green")), "seven words");
        let both = rule(AnswerMatch::Contains, Some("help!$"), Some(7));
        assert!(both.holds("The boat is Green. Happy to help!", Some("green")));
        assert!(!both.holds("The boat is Green.", Some("green")));
        assert!(!both.holds("The boat is red. Happy to help!", Some("green")));
    }

    #[test]
    fn words_are_whole() {
        let contains = rule(AnswerMatch::Contains, None, None);
        assert!(contains.holds("In May.", Some("May")) && contains.holds("a red barn", Some("red barn")));
        assert!(!contains.holds("Maybe.", Some("May")) && !contains.holds("scarred", Some("red")));
        assert!(contains.holds("答案：北京。", Some("北京")) && !contains.holds("在北京城", Some("北京")));
        assert!(contains.holds("Maybe in May", Some("may")), "a later occurrence counts");
    }

    #[test]
    fn numbers_are_read_as_gsm8k_writes_them() {
        let number = rule(AnswerMatch::Number, None, None);
        assert!(number.holds("So 3 + 4 = 7.\n#### 1,234", Some("... #### 1234")));
        assert!(number.holds("The answer is 7.", Some("7")) && number.holds("It is 7.0", Some("7")));
        assert!(!number.holds("7 and then 8", Some("7")) && !number.holds("none", Some("7")));
    }
}
