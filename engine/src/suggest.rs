/// `did you mean ...?`, if one of `known` is close enough to `text` to be a slip of the pen.
pub(crate) fn did_you_mean<'a>(text: &str, known: impl IntoIterator<Item = &'a str>) -> Option<String> {
    closest(text, known).map(|name| format!("did you mean `{name}`?"))
}

/// The name most like `text`, if any is like it at all.
pub(crate) fn closest<'a>(text: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // Distances grow with the product of the lengths, and nobody misspells a name by writing a novel.
    if text.len() > 200 {
        return None;
    }
    let folded = text.to_lowercase().replace('-', "_");
    let mut best: Option<(f64, &str)> = None;
    for name in known.into_iter().filter(|name| name.len() <= 200) {
        let other = name.to_lowercase().replace('-', "_");
        let longer = folded.chars().count().max(other.chars().count()).max(1);
        let distance = strsim::damerau_levenshtein(&folded, &other);
        let likeness = if other.starts_with(&folded) && folded.len() >= 3 || folded.starts_with(&other) && other.len() >= 3 {
            0.75 + 0.25 * (1.0 - distance as f64 / longer as f64)
        } else {
            1.0 - distance as f64 / longer as f64
        };
        let near = distance <= 1 && longer >= 2 || likeness >= 0.6;
        if near && best.is_none_or(|(best, _)| likeness > best) {
            best = Some((likeness, name));
        }
    }
    best.map(|(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::closest;

    #[test]
    fn slips_are_found_and_strangers_are_not() {
        let known = ["beta", "label_smoothing", "train", "sft", "warmup_steps"];
        assert_eq!(closest("betta", known), Some("beta"));
        assert_eq!(closest("label-smoothing", known), Some("label_smoothing"));
        assert_eq!(closest("sfft", known), Some("sft"));
        assert_eq!(closest("warmup", known), Some("warmup_steps"));
        assert_eq!(closest("zebra_crossing", known), None);
        assert_eq!(closest(&"b".repeat(10_000), known), None);
    }
}
