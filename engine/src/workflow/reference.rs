use super::source::Span;

/// The name of another stage as an input names it: `sft`, `sft.model`, `dpo[beta=0.1]`, `dpo[*].model`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Reference {
    /// Stage as in the file.
    pub stage: String,
    /// Which of its matrix points.
    pub points: Points,
    /// Output port, if not the main one.
    pub port: Option<String>,
    /// Where it is written.
    pub span: Span,
}

/// Which points of an expanded stage are meant.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Points {
    /// Nothing said: the same point, or all where the port takes a list.
    Same,
    /// `[*]`.
    All,
    /// `[axis=value,...]`; axes that are left out are as with `Same`.
    At(Vec<(String, String)>),
}

impl Reference {
    /// Reads `text`; nothing if it cannot be a reference.
    pub fn parse(text: &str, span: Span) -> Option<Self> {
        let end = text.find(['[', '.']).unwrap_or(text.len());
        let (stage, rest) = text.split_at(end);
        let (points, rest) = match rest.strip_prefix('[') {
            None => (Points::Same, rest),
            Some(rest) => {
                let (inside, after) = rest.rsplit_once(']')?;
                (parse_points(inside)?, after)
            }
        };
        let port = match rest.strip_prefix('.') {
            Some(port) if !port.is_empty() => Some(port.to_owned()),
            None if rest.is_empty() => None,
            _ => return None,
        };
        (!stage.is_empty()).then(|| Self { stage: stage.to_owned(), points, port, span })
    }

    /// Whether an expanded stage is meant.
    pub fn selects(&self, stage: &super::Stage) -> bool {
        let agrees = |(axis, value): &(String, String)| stage.point.iter().any(|(name, label)| name == axis && same_value(label, value));
        self.stage == stage.base_name
            && match &self.points {
                Points::Same | Points::All => true,
                Points::At(pairs) => pairs.iter().all(agrees),
            }
    }
}

/// Whether a written value means the one that a label names: `1e-4` and `0.0001` are one value.
pub(crate) fn same_value(label: &str, written: &str) -> bool {
    label == written || written.parse::<f64>().is_ok_and(|number| label.parse() == Ok(number))
}

fn parse_points(inside: &str) -> Option<Points> {
    if inside.trim() == "*" {
        return Some(Points::All);
    }
    let pairs: Option<Vec<_>> =
        inside.split(',').map(|pair| pair.split_once('=').map(|(axis, value)| (axis.trim().to_owned(), value.trim().to_owned()))).collect();
    pairs.filter(|pairs| !pairs.is_empty()).map(Points::At)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_is_read() {
        let parse = |text| Reference::parse(text, Span::NOWHERE).map(|found| (found.stage, found.points, found.port));
        assert_eq!(parse("sft"), Some(("sft".into(), Points::Same, None)));
        assert_eq!(parse("sft.model"), Some(("sft".into(), Points::Same, Some("model".into()))));
        assert_eq!(parse("dpo[*]"), Some(("dpo".into(), Points::All, None)));
        let at = Points::At(vec![("beta".into(), "0.1".into()), ("train.lr".into(), "0.001".into())]);
        assert_eq!(parse("dpo[beta=0.1, train.lr=0.001].model"), Some(("dpo".into(), at, Some("model".into()))));
        for wrong in ["", ".model", "sft.", "dpo[", "dpo[]", "dpo[beta]", "dpo[*]x", "[*]"] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }
}
