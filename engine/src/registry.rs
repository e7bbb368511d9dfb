use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, OnceLock},
};

use rlflow_api::Kind;

use crate::workflow::shape::SettingsShape;

/// The newest edition that this build knows: what a workflow without `edition` gets.
pub const NEWEST_EDITION: u32 = 1;

/// The stage kinds that workflows may use, by name.
///
/// The JSON Schema of a kind is generated and compiled once, when the first stage of that kind is checked.
pub struct Registry {
    kinds: Vec<Registered>,
    by_name: HashMap<&'static str, usize>,
    newest_edition: u32,
}

struct Registered {
    kind: &'static dyn Kind,
    shape: OnceLock<Arc<SettingsShape>>,
}

impl Registry {
    /// Of `kinds`, in the order in which they are documented. The last of two kinds with one name wins.
    pub fn new(kinds: Vec<&'static dyn Kind>) -> Self {
        let by_name = kinds.iter().enumerate().map(|(index, kind)| (kind.name(), index)).collect();
        let kinds = kinds.into_iter().map(|kind| Registered { kind, shape: OnceLock::new() }).collect();
        Self { kinds, by_name, newest_edition: NEWEST_EDITION }
    }

    /// The same with another newest edition.
    pub fn with_newest_edition(self, newest_edition: u32) -> Self {
        Self { newest_edition, ..self }
    }

    /// The newest edition that workflows may name, and the one they get without naming any.
    pub fn newest_edition(&self) -> u32 {
        self.newest_edition
    }

    /// The kind called `name`.
    pub fn get(&self, name: &str) -> Option<&'static dyn Kind> {
        self.by_name.get(name).map(|index| self.kinds[*index].kind)
    }

    /// Every kind, in order.
    pub fn iter(&self) -> impl Iterator<Item = &'static dyn Kind> + '_ {
        self.kinds.iter().map(|registered| registered.kind)
    }

    /// The compiled schema of the kind called `name`.
    pub(crate) fn shape(&self, name: &str) -> Option<Arc<SettingsShape>> {
        let registered = &self.kinds[*self.by_name.get(name)?];
        Some(registered.shape.get_or_init(|| Arc::new(SettingsShape::compile(registered.kind.schema().as_value()))).clone())
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter().map(|kind| kind.name())).finish()
    }
}
