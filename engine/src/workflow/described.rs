use rlflow_api::{ArtifactMeta, Description, Needs};

/// What a stage will make, as far as planning knows. A kind says it as a [`Description`]; kept is only what was said, as a map
/// with room for more would take three kilobytes of every stage.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Described {
    /// Sorted by port.
    outputs: Box<[(String, ArtifactMeta)]>,
    /// Memory and time.
    pub needs: Needs,
    holds: Box<[(&'static str, Needs)]>,
}

impl Described {
    /// What the output `port` will hold.
    pub fn output(&self, port: &str) -> Option<&ArtifactMeta> {
        self.outputs.iter().find(|(name, _)| name == port).map(|(_, meta)| meta)
    }

    /// Input ports whose stages' models it holds, with memory per rank.
    pub fn holds(&self) -> &[(&'static str, Needs)] {
        &self.holds
    }

    /// Output port and what it will hold, by port.
    pub fn outputs(&self) -> impl Iterator<Item = (&str, &ArtifactMeta)> {
        self.outputs.iter().map(|(port, meta)| (port.as_str(), meta))
    }
}

impl From<Description> for Described {
    fn from(description: Description) -> Self {
        Self { outputs: description.outputs.into_iter().collect(), needs: description.needs, holds: description.holds.into() }
    }
}
