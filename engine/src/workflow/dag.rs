use petgraph::{
    Direction,
    graph::{DiGraph, NodeIndex},
    visit::Dfs,
};

/// The edges between stages, by index. Acyclic once a workflow is loaded.
#[derive(Debug, Clone, Default)]
pub struct Dag {
    graph: DiGraph<(), ()>,
}

impl Dag {
    /// Of `nodes` stages with `edges` from a stage to one that needs it.
    pub fn new(nodes: usize, edges: impl IntoIterator<Item = (usize, usize)>) -> Self {
        let mut graph = DiGraph::with_capacity(nodes, nodes);
        (0..nodes).for_each(|_| {
            graph.add_node(());
        });
        let mut pairs: Vec<_> = edges.into_iter().filter(|(from, to)| *from < nodes && *to < nodes).collect();
        pairs.sort_unstable();
        pairs.dedup();
        pairs.into_iter().for_each(|(from, to)| {
            graph.add_edge(NodeIndex::new(from), NodeIndex::new(to), ());
        });
        Self { graph }
    }

    /// Number of stages.
    pub fn len(&self) -> usize {
        self.graph.node_count()
    }

    /// Whether there is no stage.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Stages that `stage` needs directly, each once, ascending.
    pub fn inputs(&self, stage: usize) -> Vec<usize> {
        self.neighbours(stage, Direction::Incoming)
    }

    /// Stages that need `stage` directly, each once, ascending.
    pub fn dependents(&self, stage: usize) -> Vec<usize> {
        self.neighbours(stage, Direction::Outgoing)
    }

    fn neighbours(&self, stage: usize, direction: Direction) -> Vec<usize> {
        let mut found: Vec<_> = self.graph.neighbors_directed(NodeIndex::new(stage), direction).map(NodeIndex::index).collect();
        found.sort_unstable();
        found
    }

    /// For each stage whether it is one of `stages` or needed by one of them, directly or not.
    pub fn ancestors(&self, stages: &[usize]) -> Vec<bool> {
        let mut reached = vec![false; self.len()];
        let reversed = petgraph::visit::Reversed(&self.graph);
        let mut search = Dfs::empty(reversed);
        for &stage in stages.iter().filter(|stage| **stage < self.len()) {
            search.move_to(NodeIndex::new(stage));
            while let Some(node) = search.next(reversed) {
                reached[node.index()] = true;
            }
        }
        reached
    }

    /// For each stage whether it is one of `stages` or needs one of them, directly or not.
    pub fn descendants(&self, stages: &[usize]) -> Vec<bool> {
        let mut reached = vec![false; self.len()];
        let mut search = Dfs::empty(&self.graph);
        for &stage in stages.iter().filter(|stage| **stage < self.len()) {
            search.move_to(NodeIndex::new(stage));
            while let Some(node) = search.next(&self.graph) {
                reached[node.index()] = true;
            }
        }
        reached
    }

    /// An order in which every stage comes after its inputs, smallest index first where there is a choice. Stages on
    /// or below a cycle are left out.
    pub fn order(&self) -> Vec<usize> {
        let mut waiting: Vec<usize> = (0..self.len()).map(|stage| self.degree(stage, Direction::Incoming)).collect();
        let mut ready: std::collections::BinaryHeap<_> =
            (0..self.len()).filter(|stage| waiting[*stage] == 0).map(std::cmp::Reverse).collect();
        let mut order = Vec::with_capacity(self.len());
        while let Some(std::cmp::Reverse(stage)) = ready.pop() {
            order.push(stage);
            for next in self.graph.neighbors(NodeIndex::new(stage)).map(NodeIndex::index) {
                waiting[next] -= 1;
                if waiting[next] == 0 {
                    ready.push(std::cmp::Reverse(next));
                }
            }
        }
        order
    }

    fn degree(&self, stage: usize, direction: Direction) -> usize {
        self.graph.neighbors_directed(NodeIndex::new(stage), direction).count()
    }

    /// One cycle from each knot of stages that need each other, in edge order and starting with its smallest index.
    pub fn cycles(&self) -> Vec<Vec<usize>> {
        let mut cycles: Vec<_> = petgraph::algo::tarjan_scc(&self.graph).iter().filter_map(|knot| self.cycle_in(knot)).collect();
        cycles.sort();
        cycles
    }

    /// The shortest cycle through the smallest stage of a strongly connected component, if it has one.
    fn cycle_in(&self, knot: &[NodeIndex]) -> Option<Vec<usize>> {
        let start = *knot.iter().min()?;
        let inside: std::collections::HashSet<_> = knot.iter().copied().collect();
        let mut came_from = std::collections::HashMap::new();
        let mut queue = std::collections::VecDeque::from([start]);
        while let Some(node) = queue.pop_front() {
            let mut next: Vec<_> = self.graph.neighbors(node).filter(|next| inside.contains(next)).collect();
            next.sort_unstable();
            for next in next {
                if next == start {
                    let mut cycle = vec![node.index()];
                    let mut at = node;
                    while at != start {
                        at = came_from[&at];
                        cycle.push(at.index());
                    }
                    cycle.reverse();
                    return Some(cycle);
                }
                if let std::collections::hash_map::Entry::Vacant(entry) = came_from.entry(next) {
                    entry.insert(node);
                    queue.push_back(next);
                }
            }
        }
        None
    }
}
