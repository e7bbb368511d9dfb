use std::fmt::Write;

use super::{Drawing, Node};
use crate::workflow::{Dag, Workflow};

const LINE_HEIGHT: f64 = 16.0;
const CHARACTER: f64 = 7.2;
const PADDING: f64 = 12.0;
const GAP: f64 = 28.0;
const LAYER_GAP: f64 = 56.0;
const MARGIN: f64 = 16.0;
/// Rounds of straightening: each moves every layer towards its neighbours once down and once up.
const ROUNDS: usize = 8;
/// Above this many bends, long edges are drawn straight: nobody can follow them anyway.
const MAX_BENDS: usize = 20_000;

/// Something that takes room in a layer: a node, or the bend of an edge that passes through.
struct Slot {
    node: Option<usize>,
    width: f64,
    height: f64,
    x: f64,
    above: Vec<usize>,
    below: Vec<usize>,
}

/// A layered drawing (Sugiyama): layers by longest path, orders by barycentres, edges bent around what is between.
struct Layout {
    slots: Vec<Slot>,
    layers: Vec<Vec<usize>>,
    /// Slots that each edge passes, top down.
    routes: Vec<Vec<usize>>,
}

impl Layout {
    fn new(drawing: &Drawing) -> Self {
        let mut pairs: Vec<(usize, usize)> = drawing.edges.iter().map(|(from, to, _)| (*from, *to)).collect();
        pairs.dedup();
        let dag = Dag::new(drawing.nodes.len(), pairs.iter().copied());
        let mut layer_of = vec![0; drawing.nodes.len()];
        for node in dag.order() {
            layer_of[node] = dag.inputs(node).iter().map(|input| layer_of[*input] + 1).max().unwrap_or(0);
        }
        let depth = layer_of.iter().max().map_or(0, |deepest| deepest + 1);
        let mut layout = Self { slots: Vec::new(), layers: vec![Vec::new(); depth], routes: Vec::new() };
        for (index, node) in drawing.nodes.iter().enumerate() {
            let (width, height) = size(node);
            layout.slot(Some(index), width, height, layer_of[index]);
        }
        let bends: usize = pairs.iter().map(|(from, to)| (layer_of[*to] - layer_of[*from]).saturating_sub(1)).sum();
        for (from, to) in pairs {
            let mut route = vec![from];
            if bends <= MAX_BENDS {
                for layer in layer_of[from] + 1..layer_of[to] {
                    route.push(layout.slot(None, 2.0, 0.0, layer));
                }
            }
            route.push(to);
            for pair in route.windows(2) {
                layout.slots[pair[0]].below.push(pair[1]);
                layout.slots[pair[1]].above.push(pair[0]);
            }
            layout.routes.push(route);
        }
        layout.arrange();
        layout
    }

    fn slot(&mut self, node: Option<usize>, width: f64, height: f64, layer: usize) -> usize {
        self.slots.push(Slot { node, width, height, x: 0.0, above: Vec::new(), below: Vec::new() });
        self.layers[layer].push(self.slots.len() - 1);
        self.slots.len() - 1
    }

    /// Orders the layers, then moves their slots towards what they are connected to.
    fn arrange(&mut self) {
        for layer in 0..self.layers.len() {
            self.spread(layer);
        }
        for round in 0..ROUNDS {
            let may_reorder = round < ROUNDS / 2;
            for layer in 1..self.layers.len() {
                self.pull(layer, true, may_reorder);
            }
            for layer in (0..self.layers.len().saturating_sub(1)).rev() {
                self.pull(layer, false, may_reorder);
            }
        }
        let left = self.slots.iter().map(|slot| slot.x - slot.width / 2.0).fold(f64::INFINITY, f64::min);
        self.slots.iter_mut().for_each(|slot| slot.x += MARGIN - left);
    }

    /// Sets the slots of a layer side by side around zero.
    fn spread(&mut self, layer: usize) {
        let total: f64 = self.layers[layer].iter().map(|slot| self.slots[*slot].width + GAP).sum();
        let mut x = -total / 2.0;
        for &slot in &self.layers[layer] {
            let slot = &mut self.slots[slot];
            slot.x = x + slot.width / 2.0;
            x += slot.width + GAP;
        }
    }

    fn pull(&mut self, layer: usize, from_above: bool, may_reorder: bool) {
        let wished: Vec<(f64, usize)> = self.layers[layer]
            .iter()
            .map(|&index| {
                let slot = &self.slots[index];
                let near = if from_above { &slot.above } else { &slot.below };
                let mean = near.iter().map(|other| self.slots[*other].x).sum::<f64>() / near.len().max(1) as f64;
                (if near.is_empty() { slot.x } else { mean }, index)
            })
            .collect();
        let mut wished = wished;
        if may_reorder {
            wished.sort_by(|a, b| a.0.total_cmp(&b.0));
            self.layers[layer] = wished.iter().map(|(_, slot)| *slot).collect();
        }
        // As far right as wishes and neighbours push, and as far left: the middle of the two is fair to both sides.
        let room = |a: usize, b: usize, slots: &[Slot]| (slots[a].width + slots[b].width) / 2.0 + GAP;
        let mut right: Vec<f64> = wished.iter().map(|(x, _)| *x).collect();
        let mut left = right.clone();
        for at in 1..wished.len() {
            right[at] = right[at].max(right[at - 1] + room(wished[at - 1].1, wished[at].1, &self.slots));
        }
        for at in (1..wished.len()).rev() {
            left[at - 1] = left[at - 1].min(left[at] - room(wished[at - 1].1, wished[at].1, &self.slots));
        }
        for (at, (_, slot)) in wished.iter().enumerate() {
            self.slots[*slot].x = (right[at] + left[at]) / 2.0;
        }
    }
}

fn size(node: &Node) -> (f64, f64) {
    let lines = node.details();
    let longest = lines.iter().map(|line| line.chars().count()).chain([node.title().chars().count() + 1]).max().unwrap_or(0);
    (longest as f64 * CHARACTER + 2.0 * PADDING, (lines.len() + 1) as f64 * LINE_HEIGHT + PADDING)
}

/// The workflow as one SVG image that needs nothing else. `statuses` as for [`super::mermaid`].
pub fn svg(workflow: &Workflow, statuses: &[&str]) -> String {
    let drawing = Drawing::new(workflow, statuses);
    let layout = Layout::new(&drawing);
    let heights: Vec<f64> =
        layout.layers.iter().map(|layer| layer.iter().map(|slot| layout.slots[*slot].height).fold(0.0, f64::max)).collect();
    let mut middle = vec![0.0; layout.slots.len()];
    let mut y = MARGIN;
    for (layer, height) in layout.layers.iter().zip(&heights) {
        layer.iter().for_each(|slot| middle[*slot] = y + height / 2.0);
        y += height + LAYER_GAP;
    }
    let width = layout.slots.iter().map(|slot| slot.x + slot.width / 2.0).fold(0.0, f64::max) + MARGIN;
    let height = (y - LAYER_GAP + MARGIN).max(2.0 * MARGIN);
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width:.0} {height:.0}\" width=\"{width:.0}\" height=\"{height:.0}\" \
         role=\"img\" font-family=\"system-ui, sans-serif\" font-size=\"12\">\n<title>{}</title>\n\
         <defs><marker id=\"arrow\" viewBox=\"0 0 8 8\" refX=\"7\" refY=\"4\" markerWidth=\"7\" markerHeight=\"7\" orient=\"auto\">\
         <path d=\"M0 0L8 4L0 8z\" fill=\"#888888\"/></marker></defs>\n",
        escaped(&workflow.name)
    );
    for route in &layout.routes {
        let _ =
            writeln!(text, "<path d=\"{}\" fill=\"none\" stroke=\"#888888\" marker-end=\"url(#arrow)\"/>", curve(&layout, &middle, route));
    }
    for (index, slot) in layout.slots.iter().enumerate() {
        if let Some(node) = slot.node {
            write_node(&mut text, &drawing.nodes[node], slot, middle[index]);
        }
    }
    text + "</svg>\n"
}

/// A smooth line through the slots of a route, leaving and arriving vertically.
fn curve(layout: &Layout, middle: &[f64], route: &[usize]) -> String {
    let end = |slot: usize, sign: f64| middle[slot] + sign * layout.slots[slot].height / 2.0;
    let mut path = String::new();
    for (index, pair) in route.windows(2).enumerate() {
        let (x, y) = (layout.slots[pair[0]].x, end(pair[0], 1.0));
        let (to_x, to_y) = (layout.slots[pair[1]].x, end(pair[1], -1.0));
        if index == 0 {
            let _ = write!(path, "M{x:.1} {y:.1}");
        }
        let half = (y + to_y) / 2.0;
        let _ = write!(path, "C{x:.1} {half:.1} {to_x:.1} {half:.1} {to_x:.1} {to_y:.1}");
    }
    path
}

fn write_node(text: &mut String, node: &Node, slot: &Slot, middle: f64) {
    let (fill, border) = node.colours().unwrap_or(("#ffffff", "#555555"));
    let (left, top) = (slot.x - slot.width / 2.0, middle - slot.height / 2.0);
    let _ = writeln!(
        text,
        "<g><rect x=\"{left:.1}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{:.1}\" rx=\"6\" fill=\"{fill}\" stroke=\"{border}\"/>",
        slot.width, slot.height
    );
    let mut y = top + PADDING / 2.0 + LINE_HEIGHT * 0.75;
    let mut line = |content: &str, style: &str| {
        let _ = writeln!(text, "<text x=\"{:.1}\" y=\"{y:.1}\" text-anchor=\"middle\" {style}>{}</text>", slot.x, escaped(content));
        y += LINE_HEIGHT;
    };
    line(&node.title(), "font-weight=\"600\" fill=\"#111111\"");
    node.details().iter().for_each(|detail| line(detail, "fill=\"#555555\""));
    text.push_str("</g>\n");
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
