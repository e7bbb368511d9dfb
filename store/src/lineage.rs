use std::collections::{HashMap, HashSet, VecDeque};

use serde::Serialize;
use serde_json::Value;

use crate::{ActionRecord, Digest, Result, Store};

/// An artifact, or an ancestor of it, with what made it.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LineageNode {
    /// Manifest digest.
    pub artifact: Digest,
    /// Its type, if the artifact is still there.
    pub artifact_type: Option<String>,
    /// What made it; absent if its action was collected.
    pub maker: Option<Maker>,
}

/// The action behind an artifact.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Maker {
    /// Action key.
    pub key: Digest,
    /// Output port.
    pub port: String,
    /// Stage name.
    pub stage: String,
    /// Stage kind.
    pub kind: String,
    /// The kind's implementation version, as it entered the key.
    pub kind_version: Option<u64>,
    /// Workflow file.
    pub workflow: String,
    /// Version of rlflow.
    pub rlflow_version: String,
    /// Numerics profile.
    pub numerics: String,
    /// Run that made it.
    pub run_id: String,
    /// Seconds since the Unix epoch.
    pub started_at: f64,
    /// Whether it was accepted under this key by a person.
    pub adopted: bool,
    /// Settings of the stage.
    pub settings: Value,
    /// Data files read: path as given, and digest.
    pub files: Vec<(String, Digest)>,
    /// Inputs: port, stage and artifact.
    pub inputs: Vec<LineageEdge>,
}

/// One input of a maker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LineageEdge {
    /// Input port.
    pub port: String,
    /// Stage that it came from.
    pub stage: String,
    /// The artifact.
    pub artifact: Digest,
}

impl Store {
    /// Everything that an artifact was made from, nearest first, back to the digests of raw files. The first node is the artifact itself.
    pub fn lineage(&self, artifact: Digest) -> Result<Vec<LineageNode>> {
        let actions = self.actions()?;
        let mut makers: HashMap<Digest, Vec<(&str, &ActionRecord)>> = HashMap::new();
        for action in &actions {
            for (port, output) in &action.outputs {
                makers.entry(*output).or_default().push((port, action));
            }
        }
        let mut nodes = Vec::new();
        let mut seen = HashSet::from([artifact]);
        let mut open = VecDeque::from([(artifact, None::<String>)]);
        while let Some((artifact, stage)) = open.pop_front() {
            // Equal results may have several makers: take the one that the edge names, else the newest.
            let rank = |(_, action): &&(&str, &ActionRecord)| {
                let provenance = &action.provenance;
                (stage.as_ref() == Some(&provenance.stage), provenance.started_at, action.key)
            };
            let maker = makers
                .get(&artifact)
                .and_then(|found| found.iter().max_by(|a, b| rank(a).partial_cmp(&rank(b)).unwrap_or(std::cmp::Ordering::Equal)));
            let maker = maker.map(|(port, action)| Maker::of(port, action));
            for edge in maker.iter().flat_map(|maker| &maker.inputs) {
                if seen.insert(edge.artifact) {
                    open.push_back((edge.artifact, Some(edge.stage.clone())));
                }
            }
            let artifact_type = self.or_absent(artifact, self.manifest(artifact))?.map(|manifest| manifest.artifact_type);
            nodes.push(LineageNode { artifact, artifact_type, maker });
        }
        Ok(nodes)
    }
}

impl Maker {
    fn of(port: &str, action: &ActionRecord) -> Self {
        let provenance = action.provenance.clone();
        let edges = provenance.inputs.into_iter().flat_map(|(port, inputs)| {
            inputs.into_iter().map(move |(stage, artifact)| LineageEdge { port: port.clone(), stage, artifact })
        });
        Self {
            key: action.key,
            port: port.to_owned(),
            stage: provenance.stage,
            kind: provenance.kind,
            kind_version: action.full_key["version"].as_u64(),
            workflow: provenance.workflow,
            rlflow_version: provenance.rlflow_version,
            numerics: provenance.numerics,
            run_id: provenance.run_id,
            started_at: provenance.started_at,
            adopted: provenance.adopted,
            settings: provenance.settings,
            files: provenance.files,
            inputs: edges.collect(),
        }
    }
}
