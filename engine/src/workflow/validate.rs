use std::cmp::Ordering;

use serde_json::Value;

use super::{
    node::{Data, Node, Table, quoted},
    shape::{Additional, SettingsShape, Shape, ShapeId, Type},
    source::Span,
};
use crate::suggest::{closest, did_you_mean};

/// Deepest nesting of settings; only a schema that refers to itself without end gets there.
const MAX_DEPTH: usize = 200;

/// Something in a stage's settings that its schema refuses.
#[derive(Debug, Clone)]
pub(crate) struct Finding {
    pub code: &'static str,
    pub span: Span,
    /// Dotted path of the setting (`train.lr`, `sources[0].path`).
    pub path: String,
    pub message: String,
    pub hint: Option<String>,
    /// Of a number that is out of range, the nearest that is not.
    pub nearest: Option<Value>,
}

/// Checks `settings` against `shape`. Everything wrong with them is found, not only the first.
pub(crate) fn validate(shape: &SettingsShape, settings: &Table, span: Span) -> Vec<Finding> {
    let mut checker = Checker { shape, path: String::new(), depth: 0, quiet: false };
    let mut findings = Vec::new();
    checker.table(shape.root, settings, span, false, &mut findings);
    findings
}

/// What a setting takes, in words: `an integer from 0 to 3 or `auto``.
pub(crate) fn type_text(shape: &SettingsShape, id: ShapeId) -> String {
    Checker { shape, path: String::new(), depth: 0, quiet: false }.expected(id)
}

struct Checker<'a> {
    shape: &'a SettingsShape,
    path: String,
    depth: usize,
    /// Whether only the number of findings matters: trying the branches of a union spells nothing out.
    quiet: bool,
}

impl Checker<'_> {
    /// Checks `node`. Keys that `id` does not name are fine if `open`: something else speaks about them.
    fn node(&mut self, id: ShapeId, node: &Node, open: bool, out: &mut Vec<Finding>) {
        if self.depth >= MAX_DEPTH {
            return out.push(self.finding("wrong_type", node.span, "is nested too deeply".into()));
        }
        self.depth += 1;
        match &node.data {
            Data::Table(table) => self.table(id, table, node.span, open, out),
            _ => self.value(id, node, out),
        }
        self.depth -= 1;
    }

    /// A finding that says nothing.
    fn silent(&self, code: &'static str, span: Span) -> Finding {
        Finding { code, span, path: String::new(), message: String::new(), hint: None, nearest: None }
    }

    /// Whether one of `group` takes what `check` checks, without a word about why the others do not.
    fn any_takes(&mut self, group: &[ShapeId], mut check: impl FnMut(&mut Self, ShapeId, &mut Vec<Finding>)) -> bool {
        let was_quiet = std::mem::replace(&mut self.quiet, true);
        let mut findings = Vec::new();
        let taken = group.iter().any(|branch| {
            findings.clear();
            check(self, *branch, &mut findings);
            findings.is_empty()
        });
        self.quiet = was_quiet;
        taken
    }

    fn finding(&self, code: &'static str, span: Span, predicate: String) -> Finding {
        Finding { code, span, path: self.path.clone(), message: format!("`{}` {predicate}", self.path), hint: None, nearest: None }
    }

    fn wrong_type(&self, id: ShapeId, node: &Node) -> Finding {
        if self.quiet {
            return self.silent("wrong_type", node.span);
        }
        let finding = self.finding("wrong_type", node.span, format!("must be {}, found {}", self.expected(id), node.found()));
        Finding { hint: self.repair(id, node), ..finding }
    }

    /// The value that was probably meant.
    fn repair(&self, id: ShapeId, node: &Node) -> Option<String> {
        let types = self.types(id);
        match &node.data {
            Data::Float(float) if types.contains(&Type::Integer) && float.fract() == 0.0 && float.abs() < 1e15 => {
                Some(format!("write `{}`", *float as i64))
            }
            Data::String(text) if types.iter().any(|kind| matches!(kind, Type::Integer | Type::Number)) => {
                text.trim().parse::<f64>().ok().filter(|number| number.is_finite()).map(|_| format!("write {} without quotes", text.trim()))
            }
            Data::String(text) if types.contains(&Type::Boolean) && matches!(text.as_str(), "true" | "false") => {
                Some(format!("write {text} without quotes"))
            }
            Data::Datetime(text) if types.contains(&Type::String) => Some(format!("put quotes around it: \"{text}\"")),
            Data::Integer(_) | Data::Float(_) | Data::Bool(_) if types.contains(&Type::String) && self.names(id).is_empty() => {
                Some("put quotes around it".into())
            }
            Data::String(_) | Data::Integer(_) | Data::Float(_) if types.contains(&Type::Array) => {
                Some("put it into a list: `[...]`".into())
            }
            _ => None,
        }
    }

    /// A value that is no table.
    fn value(&mut self, id: ShapeId, node: &Node, out: &mut Vec<Finding>) {
        let shape = &self.shape[id];
        let before = out.len();
        if !shape.types.is_empty() && !shape.types.iter().any(|kind| fits(*kind, &node.data)) {
            return out.push(self.wrong_type(id, node));
        }
        if let Some(allowed) = &shape.allowed
            && !allowed.iter().any(|allowed| equals(allowed, &node.data))
        {
            return out.push(self.not_allowed(node, allowed));
        }
        match &node.data {
            Data::Integer(integer) => self.integer(shape, *integer, node.span, out),
            Data::Float(float) => self.float(shape, *float, node.span, out),
            Data::String(text) => self.text(shape, text, node.span, out),
            Data::Array(items) => self.list(shape, items, node.span, out),
            _ => {}
        }
        for part in &shape.all_of {
            self.node(*part, node, false, out);
        }
        if out.len() == before {
            for group in &shape.any_of {
                self.one_of(id, group, node, false, out);
            }
        }
    }

    fn not_allowed(&self, node: &Node, allowed: &[Value]) -> Finding {
        if self.quiet {
            return self.silent("unknown_value", node.span);
        }
        let names: Vec<&str> = allowed.iter().filter_map(Value::as_str).collect();
        let listed = one_of_values(allowed);
        let code = if node.as_str().is_some() || names.is_empty() { "unknown_value" } else { "wrong_type" };
        let finding = self.finding(code, node.span, format!("must be {listed}, found {}", node.found()));
        let hint = node.as_str().and_then(|text| did_you_mean(text, names.iter().copied()));
        Finding { hint, ..finding }
    }

    fn integer(&self, shape: &Shape, integer: i128, span: Span, out: &mut Vec<Finding>) {
        if integer < i128::from(i64::MIN) || integer > i128::from(u64::MAX) {
            return out.push(self.finding("out_of_range", span, format!("is out of range: {}", long_number(&integer.to_string()))));
        }
        self.number(shape, integer as f64, &integer.to_string(), span, out);
    }

    fn float(&self, shape: &Shape, float: f64, span: Span, out: &mut Vec<Finding>) {
        if !float.is_finite() {
            return out.push(self.finding("out_of_range", span, format!("must be a finite number, found {float}")));
        }
        if shape.single_precision && float.abs() > f64::from(f32::MAX) {
            return out.push(self.finding("out_of_range", span, format!("is too large for single precision: {float:e}")));
        }
        self.number(shape, float, &float.to_string(), span, out);
    }

    fn number(&self, shape: &Shape, number: f64, text: &str, span: Span, out: &mut Vec<Finding>) {
        let outside = shape.minimum.is_some_and(|minimum| number < minimum)
            || shape.exclusive_minimum.is_some_and(|minimum| number <= minimum)
            || shape.maximum.is_some_and(|maximum| number > maximum)
            || shape.exclusive_maximum.is_some_and(|maximum| number >= maximum);
        if outside {
            // A bound of the machine type is noise, unless it is the one that was passed.
            let is_above = shape.maximum.is_some_and(|maximum| number > maximum);
            let range = if is_above { range_with(shape, shape.maximum) } else { range_text(shape) }.unwrap_or_default();
            let finding = self.finding("out_of_range", span, format!("must be {range}, found {}", long_number(text)));
            out.push(Finding { nearest: nearest(shape, number), ..finding });
        }
    }

    fn text(&self, shape: &Shape, text: &str, span: Span, out: &mut Vec<Finding>) {
        let length = text.chars().count() as u64;
        if shape.min_length.is_some_and(|minimum| length < minimum) {
            let message = if text.is_empty() { "must not be empty".into() } else { format!("is too short: {}", quoted(text)) };
            out.push(self.finding("out_of_range", span, message));
        } else if let Some(maximum) = shape.max_length.filter(|maximum| length > *maximum) {
            out.push(self.finding("out_of_range", span, format!("is longer than {maximum} characters: {}", quoted(text))));
        }
    }

    fn list(&mut self, shape: &Shape, items: &[Node], span: Span, out: &mut Vec<Finding>) {
        let length = items.len() as u64;
        if let Some(minimum) = shape.min_items.filter(|minimum| length < *minimum) {
            let message =
                if length == 0 { "must not be empty".into() } else { format!("must have at least {minimum} items, has {length}") };
            out.push(self.finding("out_of_range", span, message));
        } else if let Some(maximum) = shape.max_items.filter(|maximum| length > *maximum) {
            out.push(self.finding("out_of_range", span, format!("must have at most {maximum} items, has {length}")));
        }
        for (index, item) in items.iter().enumerate() {
            if let Some(id) = shape.prefix_items.get(index).copied().or(shape.items) {
                let length = self.path.len();
                self.path.push_str(&format!("[{index}]"));
                self.node(id, item, false, out);
                self.path.truncate(length);
            }
        }
    }

    fn table(&mut self, id: ShapeId, table: &Table, span: Span, open: bool, out: &mut Vec<Finding>) {
        let shape = &self.shape[id];
        if !shape.types.is_empty() && !shape.types.contains(&Type::Object) {
            return out.push(self.wrong_type(id, &Node::table(Table::default(), span)));
        }
        if let Some(allowed) = &shape.allowed {
            return out.push(self.not_allowed(&Node::table(Table::default(), span), allowed));
        }
        // Parts that speak about the same table leave unknown keys to their whole.
        let wrapper = self.shape.is_wrapper(id);
        let before = out.len();
        for (name, field) in &shape.properties {
            if let Some(entry) = table.get(name) {
                self.at_key(name, |checker, out| checker.node(*field, &entry.node, false, out), out);
            }
        }
        for name in shape.required.iter().filter(|name| !table.contains_key(*name)) {
            // A misspelled key is one error, not a missing one and an unknown one.
            let misspelled =
                !self.quiet && table.keys().any(|key| !shape.fields.contains_key(key) && closest(key, known(shape)) == Some(name));
            if !misspelled {
                out.push(self.missing(id, name, span));
            }
        }
        if !wrapper || shape.all_of.is_empty() && shape.any_of.is_empty() {
            let closed = match shape.additional {
                Additional::Forbidden => true,
                Additional::Unsaid => !shape.fields.is_empty(),
                Additional::Any | Additional::Shape(_) => false,
            };
            for (name, entry) in table.iter().filter(|(name, _)| !shape.fields.contains_key(*name)) {
                match shape.additional {
                    Additional::Shape(id) => self.at_key(name, |checker, out| checker.node(id, &entry.node, false, out), out),
                    _ if closed && !open => out.push(self.unknown_key(id, name, entry.key)),
                    _ => {}
                }
            }
        }
        // Borrowing the node again as a whole would copy it, so parts check the same table.
        let inner_open = open || !wrapper;
        for part in &shape.all_of {
            self.table(*part, table, span, inner_open, out);
        }
        if out.len() == before || !wrapper {
            for group in &shape.any_of {
                self.one_table_of(id, group, table, span, inner_open, out);
            }
        }
    }

    fn at_key(&mut self, name: &str, check: impl FnOnce(&mut Self, &mut Vec<Finding>), out: &mut Vec<Finding>) {
        let length = self.path.len();
        if length > 0 {
            self.path.push('.');
        }
        self.path.push_str(name);
        check(self, out);
        self.path.truncate(length);
    }

    fn missing(&mut self, id: ShapeId, name: &str, span: Span) -> Finding {
        if self.quiet {
            return self.silent("missing_setting", span);
        }
        let path = if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) };
        let expected = self.shape[id].properties.get(name).map(|field| self.expected(*field));
        let message = format!("needs the setting `{path}`");
        Finding {
            code: "missing_setting",
            span,
            path,
            message,
            hint: expected.map(|expected| format!("add `{name} = ...`, {expected}")),
            nearest: None,
        }
    }

    fn unknown_key(&self, id: ShapeId, name: &str, span: Span) -> Finding {
        if self.quiet {
            return self.silent("unknown_key", span);
        }
        let path = if self.path.is_empty() { name.to_owned() } else { format!("{}.{name}", self.path) };
        let message = format!("has no setting `{path}`");
        let fields = &self.shape[id].fields;
        let hint = did_you_mean(name, fields.keys().map(String::as_str)).or_else(|| self.elsewhere(id, name)).or_else(|| {
            let known: Vec<_> = fields.keys().map(|name| format!("`{name}`")).collect();
            (!known.is_empty() && known.len() <= 30).then(|| format!("known here: {}", known.join(", ")))
        });
        Finding { code: "unknown_key", span, path, message, hint, nearest: None }
    }

    /// A table of the same stage that has a setting called `name`: `lr` belongs in `train`.
    fn elsewhere(&self, id: ShapeId, name: &str) -> Option<String> {
        let root = &self.shape[self.shape.root].fields;
        if !self.path.is_empty() && root.contains_key(name) {
            return Some(format!("`{name}` stands in the stage itself, outside of `{}`", self.path));
        }
        let (table, _) = root.iter().find(|(_, id)| self.shape[**id].fields.contains_key(name))?;
        if *table == self.path {
            // Another branch of the union has it.
            let tag = self.shape[id].properties.iter().find_map(|(tag, field)| match self.shape[*field].allowed.as_deref() {
                Some([Value::String(value)]) => Some(format!("{tag} = \"{value}\"")),
                _ => None,
            });
            return tag.map(|tag| format!("`{name}` means nothing with {tag}"));
        }
        Some(format!("`{name}` belongs in `{table}`: `{table}.{name}`"))
    }

    fn one_of(&mut self, id: ShapeId, group: &[ShapeId], node: &Node, open: bool, out: &mut Vec<Finding>) {
        if self.any_takes(group, |checker, branch, findings| checker.node(branch, node, open, findings)) {
            return;
        }
        if self.quiet {
            return out.push(self.silent("wrong_type", node.span));
        }
        let mut tried = Vec::new();
        for &branch in group {
            let mut findings = Vec::new();
            self.node(branch, node, open, &mut findings);
            tried.push((branch, findings));
        }
        // The branches that would take a value of this type know better what is wrong with it.
        let mut close: Vec<_> = tried.into_iter().filter(|(branch, _)| self.takes(*branch, &node.data)).collect();
        match close.len() {
            1 if close[0].1.iter().any(|finding| finding.path != self.path || finding.code != "unknown_value") => {
                out.append(&mut close[0].1)
            }
            0 => out.push(self.wrong_type(id, node)),
            _ => {
                let code = if close.iter().any(|(_, findings)| findings.iter().any(|f| f.code == "unknown_value")) {
                    "unknown_value"
                } else {
                    close[0].1[0].code
                };
                let message = format!("must be {}, found {}", self.expected(id), node.found());
                let names: Vec<String> = self.names(id);
                let hint = node.as_str().and_then(|text| did_you_mean(text, names.iter().map(String::as_str)));
                out.push(Finding { hint, ..self.finding(code, node.span, message) });
            }
        }
    }

    fn one_table_of(&mut self, id: ShapeId, group: &[ShapeId], table: &Table, span: Span, open: bool, out: &mut Vec<Finding>) {
        if self.any_takes(group, |checker, branch, findings| checker.table(branch, table, span, open, findings)) {
            return;
        }
        if self.quiet {
            return out.push(self.silent("wrong_type", span));
        }
        let mut best: Option<Vec<Finding>> = None;
        // Branches between which nothing decides: `{ cuda = 2, cpu = 2 }` is as good, or bad, for one as for the other.
        let mut tied: Vec<ShapeId> = Vec::new();
        for &branch in group {
            let mut findings = Vec::new();
            self.table(branch, table, span, open, &mut findings);
            // The branch whose tag (`kind = "cosine"`) agrees, or that knows most of the keys, is the one meant.
            let score = |findings: &[Finding]| {
                let wrong_tag = findings.iter().any(|finding| matches!(finding.code, "unknown_value"));
                let wrong_kind = findings.iter().any(|finding| finding.path == self.path && finding.code == "wrong_type");
                (wrong_kind, wrong_tag, findings.len())
            };
            match best.as_ref().map(|best| score(&findings).cmp(&score(best))) {
                None | Some(Ordering::Less) => (best, tied) = (Some(findings), vec![branch]),
                Some(Ordering::Equal) => tied.push(branch),
                Some(Ordering::Greater) => {}
            }
        }
        let Some(mut best) = best else { return };
        let required =
            |branch: &ShapeId| self.shape[*branch].required.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(" with ");
        let names: Vec<String> = tied.iter().map(required).collect();
        let about_keys = best.iter().all(|finding| matches!(finding.code, "missing_setting" | "unknown_key"));
        let known = |name: &&String| tied.iter().any(|branch| self.shape[*branch].fields.contains_key(*name));
        if tied.len() > 1 && about_keys && !names.contains(&String::new()) && table.keys().all(|name| known(&name)) {
            let found: Vec<String> = table.keys().map(|name| format!("`{name}`")).collect();
            let found = if found.is_empty() { "neither".to_owned() } else { found.join(" and ") };
            let message = format!("must have {}, and only one of them; found {found}", names.join(" or "));
            return out.push(self.finding("wrong_type", span, message));
        }
        let none_takes_tables = group.iter().all(|branch| !self.takes(*branch, &Data::Table(Table::default())));
        if none_takes_tables {
            return out.push(self.wrong_type(id, &Node::table(Table::default(), span)));
        }
        out.append(&mut best);
    }

    /// Whether a value of this TOML type could ever do.
    fn takes(&self, id: ShapeId, data: &Data) -> bool {
        let types = self.types(id);
        types.is_empty() || types.iter().any(|kind| fits(*kind, data))
    }

    /// JSON types that `id` may have; empty for any.
    fn types(&self, id: ShapeId) -> Vec<Type> {
        self.collect_types(id, 0).unwrap_or_default()
    }

    fn collect_types(&self, id: ShapeId, depth: usize) -> Option<Vec<Type>> {
        let shape = &self.shape[id];
        if !shape.types.is_empty() {
            return Some(shape.types.clone());
        }
        if let Some(allowed) = &shape.allowed {
            return Some(allowed.iter().map(type_of).collect());
        }
        if depth > 16 {
            return None;
        }
        if let Some(types) = shape.all_of.iter().find_map(|part| self.collect_types(*part, depth + 1)) {
            return Some(types);
        }
        let group = shape.any_of.first()?;
        let mut types = Vec::new();
        for branch in group {
            types.extend(self.collect_types(*branch, depth + 1)?);
        }
        Some(types)
    }

    /// Every word that `id` allows.
    fn names(&self, id: ShapeId) -> Vec<String> {
        let mut names = Vec::new();
        let (mut open, mut steps) = (vec![id], 0);
        while let Some(id) = open.pop() {
            let shape = &self.shape[id];
            names.extend(shape.allowed.iter().flatten().filter_map(Value::as_str).map(str::to_owned));
            steps += 1;
            if steps < 100 {
                open.extend(shape.all_of.iter().chain(shape.any_of.iter().flatten()));
            }
        }
        names
    }

    /// What `id` takes, in words.
    fn expected(&self, id: ShapeId) -> String {
        let (mut words, mut values) = (Vec::new(), Vec::new());
        self.expected_words(id, 0, &mut words, &mut values);
        if !values.is_empty() {
            words.push(one_of_values(&values));
        }
        if words.is_empty() { "something else".into() } else { words.join(" or ") }
    }

    fn expected_words(&self, id: ShapeId, depth: usize, words: &mut Vec<String>, values: &mut Vec<Value>) {
        let shape = &self.shape[id];
        let mut say = |text: String| {
            if !words.contains(&text) {
                words.push(text);
            }
        };
        if let Some(allowed) = &shape.allowed {
            return values.extend(allowed.iter().cloned());
        }
        for kind in &shape.types {
            match kind {
                Type::Null => {}
                Type::Boolean => say("true or false".into()),
                Type::Integer => say(with_range("an integer", shape)),
                Type::Number => say(with_range("a number", shape)),
                Type::String => say("a text".into()),
                Type::Object => say("a table".into()),
                Type::Array => match shape.items.filter(|_| depth < 4) {
                    Some(items) => say(format!("a list (each {})", self.expected(items))),
                    None => say("a list".into()),
                },
            }
        }
        if shape.types.is_empty() && depth < 8 {
            for part in shape.all_of.iter().chain(shape.any_of.iter().flatten()) {
                self.expected_words(*part, depth + 1, words, values);
            }
        }
    }
}

/// The bound that `number` is beyond; none if the range ends before it.
fn nearest(shape: &Shape, number: f64) -> Option<Value> {
    let below = shape.minimum.filter(|bound| number < *bound);
    let bound = below.or(shape.maximum.filter(|bound| number > *bound))?;
    let is_whole = shape.types.contains(&Type::Integer) && bound.fract() == 0.0 && bound.abs() < 9e15;
    Some(if is_whole { Value::from(bound as i64) } else { Value::from(bound) })
}

fn known(shape: &Shape) -> impl Iterator<Item = &str> {
    shape.fields.keys().map(String::as_str)
}

fn with_range(what: &str, shape: &Shape) -> String {
    match range_text(shape) {
        Some(range) => format!("{what} {range}"),
        None => what.into(),
    }
}

/// The range of a number in words: `at least 0`, `from 0 to 1`, `above 0 and at most 1`.
pub(crate) fn range_text(shape: &Shape) -> Option<String> {
    // Bounds that only say which machine type holds the value would be noise.
    let is_type_bound =
        |bound: &f64| bound.abs() >= 65535.0 && (bound.abs().log2().fract() == 0.0 || (bound.abs() + 1.0).log2().fract() == 0.0);
    range_with(shape, shape.maximum.filter(|bound| !is_type_bound(bound)))
}

fn range_with(shape: &Shape, upper_bound: Option<f64>) -> Option<String> {
    if let (None, Some(lower), None, Some(upper)) = (shape.exclusive_minimum, shape.minimum, shape.exclusive_maximum, upper_bound) {
        return Some(format!("from {lower} to {upper}"));
    }
    let lower = match (shape.exclusive_minimum, shape.minimum) {
        (Some(bound), _) => Some(format!("above {bound}")),
        (None, Some(bound)) => Some(format!("at least {bound}")),
        _ => None,
    };
    let upper = match (shape.exclusive_maximum, upper_bound) {
        (Some(bound), _) => Some(format!("below {bound}")),
        (None, Some(bound)) => Some(format!("at most {bound}")),
        _ => None,
    };
    match (lower, upper) {
        (Some(lower), Some(upper)) => Some(format!("{lower} and {upper}")),
        (lower, upper) => lower.or(upper).or_else(|| shape.maximum.map(|bound| format!("at most {bound}"))),
    }
}

fn one_of_values(allowed: &[Value]) -> String {
    let shown: Vec<String> = allowed
        .iter()
        .filter(|value| !value.is_null())
        .map(|value| format!("`{}`", value.as_str().map_or_else(|| value.to_string(), str::to_owned)))
        .collect();
    match &shown[..] {
        [one] => one.clone(),
        many => format!("one of {}", many.join(", ")),
    }
}

fn type_of(value: &Value) -> Type {
    match value {
        Value::Null => Type::Null,
        Value::Bool(_) => Type::Boolean,
        Value::Number(number) if number.is_f64() => Type::Number,
        Value::Number(_) => Type::Integer,
        Value::String(_) => Type::String,
        Value::Array(_) => Type::Array,
        Value::Object(_) => Type::Object,
    }
}

fn fits(kind: Type, data: &Data) -> bool {
    match data {
        Data::Null => kind == Type::Null,
        Data::Bool(_) => kind == Type::Boolean,
        Data::Integer(_) => matches!(kind, Type::Integer | Type::Number),
        Data::Float(_) => kind == Type::Number,
        Data::String(_) => kind == Type::String,
        Data::Datetime(_) => false,
        Data::Array(_) => kind == Type::Array,
        Data::Table(_) => kind == Type::Object,
    }
}

fn equals(allowed: &Value, data: &Data) -> bool {
    match (allowed, data) {
        (Value::Null, Data::Null) => true,
        (Value::Bool(allowed), Data::Bool(flag)) => allowed == flag,
        (Value::String(allowed), Data::String(text)) => allowed == text,
        (Value::Number(allowed), Data::Integer(integer)) => {
            allowed.as_i128() == Some(*integer) || allowed.as_f64() == Some(*integer as f64)
        }
        (Value::Number(allowed), Data::Float(float)) => allowed.as_f64() == Some(*float),
        _ => false,
    }
}

/// A number as text, shortened where a file holds hundreds of digits.
fn long_number(text: &str) -> String {
    if text.len() <= 40 { text.to_owned() } else { format!("{}…", &text[..40]) }
}
