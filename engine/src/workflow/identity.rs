use std::{fmt, ops::Deref, sync::OnceLock};

use serde_json::Value;

use super::shape::SettingsShape;
use crate::canonical;

/// Settings of a stage that can change its result. They are kept as the bytes that enter its key, which takes a fraction
/// of what a value takes; the value is made when somebody compares or shows it.
#[derive(Clone, Default)]
pub struct IdentitySettings {
    canonical: Box<[u8]>,
    /// Without the settings that only say when to end, where there are such.
    without_horizon: Option<Box<[u8]>>,
    value: OnceLock<Value>,
}

impl IdentitySettings {
    /// Of normalised settings: less those marked as execution or as paths. `horizon` names those that only say when to end.
    pub(crate) fn of(shape: &SettingsShape, settings: &Value, horizon: &[&str]) -> Self {
        let write = |skip: &[&str]| {
            let mut out = Vec::with_capacity(512);
            shape.write_identity(settings, skip, &mut out);
            out.into_boxed_slice()
        };
        let without_horizon = (!horizon.is_empty()).then(|| write(horizon));
        Self { canonical: write(&[]), without_horizon, value: OnceLock::new() }
    }

    /// Their canonical JSON.
    pub(crate) fn canonical(&self) -> &[u8] {
        &self.canonical
    }

    /// Their canonical JSON without the settings called `horizon`.
    pub(crate) fn write_without(&self, horizon: &[&str], out: &mut Vec<u8>) {
        match &self.without_horizon {
            Some(known) if !horizon.is_empty() => out.extend_from_slice(known),
            _ => canonical::write_without(self, horizon, out),
        }
    }
}

impl From<Value> for IdentitySettings {
    fn from(value: Value) -> Self {
        Self { canonical: canonical::to_vec(&value).into(), without_horizon: None, value: value.into() }
    }
}

impl Deref for IdentitySettings {
    type Target = Value;

    fn deref(&self) -> &Value {
        // What was written as JSON reads back as what it was; nothing is written only of stages that are wrong.
        self.value.get_or_init(|| serde_json::from_slice(&self.canonical).unwrap_or_default())
    }
}

impl PartialEq for IdentitySettings {
    fn eq(&self, other: &Self) -> bool {
        self.canonical == other.canonical
    }
}

impl PartialEq<Value> for IdentitySettings {
    fn eq(&self, other: &Value) -> bool {
        **self == *other
    }
}

impl fmt::Debug for IdentitySettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}
