use serde_json::Value;

/// Appends the canonical JSON of `value`: object keys sorted by bytes, no white space, strings and numbers as
/// `serde_json` writes them (shortest form that reads back to the same value). Equal values give equal bytes,
/// whatever order their keys came in.
pub fn write(value: &Value, out: &mut Vec<u8>) {
    write_without(value, &[], out);
}

/// The same without the members at the dotted paths `skip`.
pub(crate) fn write_without(value: &Value, skip: &[&str], out: &mut Vec<u8>) {
    match value {
        Value::Null => out.extend_from_slice(b"null"),
        Value::Bool(true) => out.extend_from_slice(b"true"),
        Value::Bool(false) => out.extend_from_slice(b"false"),
        Value::Number(number) => {
            use std::io::Write as _;
            // Writing to a Vec cannot fail.
            let _ = write!(out, "{number}");
        }
        Value::String(text) => string(text, out),
        Value::Array(items) => list(items, out, write),
        Value::Object(object) => {
            let mut members: Vec<_> = object.iter().filter(|(name, _)| !skip.contains(&name.as_str())).collect();
            members.sort_unstable_by(|a, b| a.0.cmp(b.0));
            out.push(b'{');
            for (at, (name, member)) in members.into_iter().enumerate() {
                separate(at, out);
                string(name, out);
                out.push(b':');
                write_without(member, &below(skip, name), out);
            }
            out.push(b'}');
        }
    }
}

/// What of the dotted paths `skip` lies below the member called `name`.
pub(crate) fn below<'a>(skip: &[&'a str], name: &str) -> Vec<&'a str> {
    skip.iter().filter_map(|path| path.strip_prefix(name)?.strip_prefix('.')).collect()
}

/// Appends a list whose items `item` writes.
pub(crate) fn list<T>(items: &[T], out: &mut Vec<u8>, mut item: impl FnMut(&T, &mut Vec<u8>)) {
    out.push(b'[');
    for (at, one) in items.iter().enumerate() {
        separate(at, out);
        item(one, out);
    }
    out.push(b']');
}

/// The canonical JSON of `value`.
pub fn to_vec(value: &Value) -> Vec<u8> {
    let mut out = Vec::new();
    write(value, &mut out);
    out
}

/// Appends `text` as a JSON string.
pub(crate) fn string(text: &str, out: &mut Vec<u8>) {
    // A string always serialises, and a Vec always takes it.
    let _ = serde_json::to_writer(out, text);
}

pub(crate) fn separate(at: usize, out: &mut Vec<u8>) {
    if at > 0 {
        out.push(b',');
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn keys_are_sorted_at_every_depth_and_nothing_else_moves() {
        let text = String::from_utf8(to_vec(&json!({ "b": [2, 1, { "z": null, "a": "é\n" }], "a": 0.1, "B": 1e-5 }))).unwrap();
        assert_eq!(text, r#"{"B":0.00001,"a":0.1,"b":[2,1,{"a":"é\n","z":null}]}"#);
    }

    #[test]
    fn integers_and_floats_stay_apart() {
        assert_ne!(to_vec(&json!(1)), to_vec(&json!(1.0)));
    }
}
