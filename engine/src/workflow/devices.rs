use rlflow_api::DeviceSpec;

use super::{
    WorkflowError,
    error::Collector,
    node::{Data, Node, Table},
    source::Span,
};
use crate::{DeviceInfo, suggest::did_you_mean};

/// Most GPUs that a workflow may declare.
const MAX_DEVICES: i128 = 65_536;
const KEYS: [&str; 2] = ["count", "memory"];
const EXAMPLE: &str = "write `cuda = { count = 8, memory = \"80 GB\" }` or `cpu = { memory = \"512 GB\" }`";

/// The devices of a `[devices]` table: memory that the workflow may plan with, whatever this machine has.
pub(crate) fn devices(node: &Node, errors: &mut Collector) -> Vec<DeviceInfo> {
    let Some(table) = node.as_table() else {
        let message = format!("`devices` must be a table, found {}", node.found());
        errors.add(node.span, WorkflowError::new("wrong_type", message).with_hint(EXAMPLE));
        return Vec::new();
    };
    let mut devices = Vec::new();
    for (name, entry) in table {
        let message = match (name.as_str(), entry.node.as_table()) {
            ("cpu" | "cuda", Some(of)) => {
                devices.extend(of_kind(name, of, entry.key, errors));
                continue;
            }
            ("cpu" | "cuda", None) => format!("`devices.{name}` must be a table, found {}", entry.node.found()),
            _ => format!("`[devices]` knows `cpu` and `cuda`, not `{name}`"),
        };
        errors.add(entry.key, WorkflowError::new("unknown_key", message).with_hint(EXAMPLE));
    }
    devices
}

fn of_kind(name: &str, table: &Table, key: Span, errors: &mut Collector) -> Vec<DeviceInfo> {
    for (key, entry) in table.iter().filter(|(key, _)| !KEYS.contains(&key.as_str()) || (name == "cpu" && *key == "count")) {
        let hint = did_you_mean(key, KEYS).filter(|_| key != "count").unwrap_or_else(|| EXAMPLE.into());
        errors.add(entry.key, WorkflowError::new("unknown_key", format!("`devices.{name}` has no `{key}`")).with_hint(hint));
    }
    let count = match table.get("count").map(|entry| &entry.node) {
        None => 1,
        Some(Node { data: Data::Integer(count), .. }) if (1..=MAX_DEVICES).contains(count) => *count as usize,
        Some(other) => {
            let message = format!("`devices.{name}.count` must be a number from 1 to {MAX_DEVICES}, found {}", other.found());
            errors.add(other.span, WorkflowError::new("wrong_type", message));
            return Vec::new();
        }
    };
    let Some(memory) = table.get("memory") else {
        let message = format!("`devices.{name}` needs `memory`: how much a stage may take of it");
        errors.add(key, WorkflowError::new("missing_setting", message).with_hint(EXAMPLE));
        return Vec::new();
    };
    let Some(memory_bytes) = bytes(&memory.node) else {
        let message = format!("`devices.{name}.memory` must be a size, found {}", memory.node.found());
        errors.add(memory.node.span, WorkflowError::new("wrong_type", message).with_hint("write it as \"80 GB\", \"80 GiB\" or in bytes"));
        return Vec::new();
    };
    let spec = |index| if name == "cpu" { DeviceSpec::Cpu } else { DeviceSpec::Cuda(index) };
    (0..count).map(|index| DeviceInfo { spec: spec(index), name: "declared by the workflow".into(), memory_bytes }).collect()
}

/// A size: a number of bytes, or a text with a unit.
fn bytes(node: &Node) -> Option<u64> {
    if let Data::Integer(bytes) = node.data {
        return u64::try_from(bytes).ok().filter(|bytes| *bytes > 0);
    }
    let text = node.as_str()?.trim();
    let (number, unit) = text.split_at(text.find(|c: char| c.is_ascii_alphabetic())?);
    let unit = match unit.to_ascii_lowercase().as_str() {
        "b" => 1.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        "kib" => 1024.0,
        "mib" => 1024.0 * 1024.0,
        "gib" => 1024.0 * 1024.0 * 1024.0,
        "tib" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        _ => return None,
    };
    let size = number.trim().parse::<f64>().ok()? * unit;
    (1.0..1e18).contains(&size).then_some(size as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        let text = |text: &str| bytes(&Node { data: Data::String(text.into()), span: Span::NOWHERE });
        assert_eq!(text("80 GB"), Some(80_000_000_000));
        assert_eq!(text("1.5GiB"), Some(1_610_612_736));
        assert_eq!([text("80"), text("eighty GB"), text("-1 GB"), text("1 GW"), text("")], [None; 5]);
        assert_eq!(bytes(&Node { data: Data::Integer(5), span: Span::NOWHERE }), Some(5));
    }
}
