use std::collections::BTreeMap;

use serde_json::Value;

/// Settings by dotted path. Tables and lists of tables are opened (`sources[0].weight`); lists of plain values are leaves.
pub fn flatten(settings: &Value) -> BTreeMap<String, &Value> {
    let mut flat = BTreeMap::new();
    walk(String::new(), settings, &mut flat);
    flat
}

fn walk<'a>(path: String, value: &'a Value, flat: &mut BTreeMap<String, &'a Value>) {
    match value {
        Value::Object(object) if !object.is_empty() => {
            for (name, member) in object {
                let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                walk(path, member, flat);
            }
        }
        Value::Array(items) if items.iter().any(|item| item.is_object()) => {
            for (at, item) in items.iter().enumerate() {
                walk(format!("{path}[{at}]"), item, flat);
            }
        }
        _ if path.is_empty() => {}
        _ => {
            flat.insert(path, value);
        }
    }
}

/// A setting that differs: path, old value, new value; `Null` where it is absent.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    /// Dotted path.
    pub setting: String,
    /// Old value.
    pub from: Value,
    /// New value.
    pub to: Value,
}

/// What differs between two sets of settings, by path. A setting that is absent on one side and null on the other is equal.
pub fn changes(old: &Value, new: &Value) -> Vec<Change> {
    let (old, new) = (flatten(old), flatten(new));
    let mut paths: Vec<&String> = old.keys().chain(new.keys()).collect();
    paths.sort_unstable();
    paths.dedup();
    paths
        .into_iter()
        .filter_map(|path| {
            let of = |side: &BTreeMap<String, &Value>| side.get(path).map_or(Value::Null, |value| (*value).clone());
            let (from, to) = (of(&old), of(&new));
            (from != to).then(|| Change { setting: path.clone(), from, to })
        })
        .collect()
}

/// A setting's value for people: strings bare, long values shortened.
pub fn display(value: &Value) -> String {
    let text = match value {
        Value::Null => "(unset)".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    if text.chars().count() > 60 { text.chars().take(57).chain("...".chars()).collect() } else { text }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn changes_name_the_deepest_setting() {
        let old =
            json!({ "beta": 0.1, "train": { "lr": 1e-3, "betas": [0.9, 0.95] }, "sources": [{ "weight": 1.0 }], "gone": 1, "null": null });
        let new = json!({ "beta": 0.2, "train": { "lr": 1e-3, "betas": [0.9, 0.99] }, "sources": [{ "weight": 1.0 }, { "weight": 2.0 }] });
        let names: Vec<String> = changes(&old, &new).into_iter().map(|change| change.setting).collect();
        assert_eq!(names, ["beta", "gone", "sources[1].weight", "train.betas"]);
    }

    #[test]
    fn long_values_are_shortened_by_characters() {
        assert_eq!(display(&json!("é".repeat(61))).chars().count(), 60);
        assert_eq!(display(&json!(null)), "(unset)");
    }
}
