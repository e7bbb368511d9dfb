use std::collections::{HashMap, HashSet};

use indexmap::IndexMap;
use rlflow_api::setting;
use serde_json::{Map, Value};

use crate::canonical;

/// Index of a shape in a [`SettingsShape`].
pub(crate) type ShapeId = usize;

/// What a kind's settings may look like: its JSON Schema, compiled once so that checking ten thousand stages looks up
/// no keyword by name. Covers what `schemars` generates for config types.
#[derive(Debug)]
pub(crate) struct SettingsShape {
    shapes: Vec<Shape>,
    pub root: ShapeId,
}

/// A mark that keeps a setting out of the key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mark {
    Execution,
    Path,
}

#[derive(Debug, Default)]
pub(crate) struct Shape {
    /// JSON types it may have; empty for any.
    pub types: Vec<Type>,
    /// `enum` and `const`.
    pub allowed: Option<Vec<Value>>,
    pub minimum: Option<f64>,
    pub exclusive_minimum: Option<f64>,
    pub maximum: Option<f64>,
    pub exclusive_maximum: Option<f64>,
    /// Stored as `f32`.
    pub single_precision: bool,
    pub min_length: Option<u64>,
    pub max_length: Option<u64>,
    pub min_items: Option<u64>,
    pub max_items: Option<u64>,
    pub properties: IndexMap<String, ShapeId>,
    pub required: Vec<String>,
    pub additional: Additional,
    pub items: Option<ShapeId>,
    pub prefix_items: Vec<ShapeId>,
    /// Must all hold: `$ref` and `allOf`.
    pub all_of: Vec<ShapeId>,
    /// One of each group must hold: `anyOf` and `oneOf`.
    pub any_of: Vec<Vec<ShapeId>>,
    /// Its own mark or that of what it refers to.
    pub mark: Option<Mark>,
    /// `description`, its own or that of what it refers to.
    pub doc: Option<String>,
    /// `default`.
    pub default: Option<Value>,
    /// `x-unit`.
    pub unit: Option<String>,
    /// Whether anything in it is marked.
    pub has_marks: bool,
    /// Every key that it may have, from itself and from all that it refers to.
    pub fields: IndexMap<String, ShapeId>,
    /// What its items look like, from itself and from all that it refers to.
    pub element: Option<ShapeId>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Additional {
    /// Not said: closed if the shape names properties, open if not (`#[serde(flatten)]` cannot say it).
    #[default]
    Unsaid,
    Any,
    Forbidden,
    Shape(ShapeId),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Type {
    Null,
    Boolean,
    Integer,
    Number,
    String,
    Array,
    Object,
}

impl Type {
    fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "null" => Self::Null,
            "boolean" => Self::Boolean,
            "integer" => Self::Integer,
            "number" => Self::Number,
            "string" => Self::String,
            "array" => Self::Array,
            "object" => Self::Object,
            _ => return None,
        })
    }
}

impl std::ops::Index<ShapeId> for SettingsShape {
    type Output = Shape;

    fn index(&self, id: ShapeId) -> &Shape {
        &self.shapes[id]
    }
}

impl SettingsShape {
    /// Compiles the schema of a config type.
    pub fn compile(schema: &Value) -> Self {
        let mut compiler = Compiler { schema, shapes: Vec::new(), by_pointer: HashMap::new() };
        let root = compiler.shape(schema);
        let mut compiled = Self { shapes: compiler.shapes, root };
        compiled.derive();
        compiled
    }

    /// Fills in what follows from what a shape refers to.
    fn derive(&mut self) {
        for id in 0..self.shapes.len() {
            let parts = self.parts(id);
            self.shapes[id].mark = parts.iter().find_map(|part| self.shapes[*part].mark);
            self.shapes[id].doc = parts.iter().find_map(|part| self.shapes[*part].doc.clone());
            self.shapes[id].unit = parts.iter().find_map(|part| self.shapes[*part].unit.clone());
            let mut fields: IndexMap<String, Vec<ShapeId>> = IndexMap::new();
            for &part in &parts {
                for (name, field) in &self.shapes[part].properties {
                    let same = fields.entry(name.clone()).or_default();
                    if !same.contains(field) {
                        same.push(*field);
                    }
                }
            }
            let elements: Vec<_> =
                parts.iter().flat_map(|part| self.shapes[*part].items.iter().chain(&self.shapes[*part].prefix_items).copied()).collect();
            let fields = fields.into_iter().map(|(name, same)| (name, self.either(same))).collect();
            self.shapes[id].fields = fields;
            self.shapes[id].element = (!elements.is_empty()).then(|| self.either(elements));
        }
        let with_marks: Vec<bool> = (0..self.shapes.len()).map(|id| self.reaches_mark(id)).collect();
        for (shape, has_marks) in self.shapes.iter_mut().zip(with_marks) {
            shape.has_marks = has_marks;
        }
    }

    /// A shape that is one of `same`.
    fn either(&mut self, same: Vec<ShapeId>) -> ShapeId {
        if let [one] = same[..] {
            return one;
        }
        let mark = same.iter().find_map(|id| self.shapes[*id].mark);
        let fields = same.iter().flat_map(|id| self.shapes[*id].fields.clone()).collect();
        let element = same.iter().find_map(|id| self.shapes[*id].element);
        self.shapes.push(Shape { any_of: vec![same], mark, fields, element, ..Shape::default() });
        self.shapes.len() - 1
    }

    /// `id` and everything that speaks about the same value.
    fn parts(&self, id: ShapeId) -> Vec<ShapeId> {
        let (mut parts, mut seen, mut open) = (Vec::new(), HashSet::new(), vec![id]);
        while let Some(id) = open.pop() {
            if seen.insert(id) {
                parts.push(id);
                let shape = &self.shapes[id];
                open.extend(shape.any_of.iter().flatten().rev());
                open.extend(shape.all_of.iter().rev());
            }
        }
        parts
    }

    fn reaches_mark(&self, id: ShapeId) -> bool {
        let (mut seen, mut open) = (HashSet::new(), vec![id]);
        while let Some(id) = open.pop() {
            let shape = &self.shapes[id];
            if shape.mark.is_some() {
                return true;
            }
            if seen.insert(id) {
                open.extend(shape.fields.values().chain(&shape.element).chain(&shape.all_of).chain(shape.any_of.iter().flatten()));
                open.extend(match shape.additional {
                    Additional::Shape(id) => Some(id),
                    _ => None,
                });
            }
        }
        false
    }

    /// Whether the shape says nothing but what it refers to.
    pub fn is_wrapper(&self, id: ShapeId) -> bool {
        let shape = &self.shapes[id];
        shape.properties.is_empty() && shape.required.is_empty() && shape.all_of.len() + shape.any_of.len() <= 1
    }

    /// Appends the canonical JSON of what of normalised `settings` can change the result: all but settings marked as
    /// execution or as paths, and those at the dotted paths `skip`.
    pub fn write_identity(&self, settings: &Value, skip: &[&str], out: &mut Vec<u8>) {
        self.write(Some(self.root), settings, skip, out);
    }

    fn write(&self, id: Option<ShapeId>, value: &Value, skip: &[&str], out: &mut Vec<u8>) {
        let Some(shape) = id.map(|id| &self.shapes[id]).filter(|shape| shape.has_marks) else {
            return canonical::write_without(value, skip, out);
        };
        match (value, shape.element) {
            (Value::Object(object), _) => {
                let other = match shape.additional {
                    Additional::Shape(id) => Some(id),
                    _ => None,
                };
                let field = |name: &str| shape.fields.get(name).copied().or(other);
                let is_identity = |field: Option<ShapeId>| field.is_none_or(|field| self.shapes[field].mark.is_none());
                let members = object.iter().map(|(name, value)| (name, field(name), value));
                let mut members: Vec<_> =
                    members.filter(|(name, field, _)| is_identity(*field) && !skip.contains(&name.as_str())).collect();
                members.sort_unstable_by_key(|(name, _, _)| *name);
                out.push(b'{');
                for (at, (name, field, member)) in members.into_iter().enumerate() {
                    canonical::separate(at, out);
                    canonical::string(name, out);
                    out.push(b':');
                    self.write(field, member, &canonical::below(skip, name), out);
                }
                out.push(b'}');
            }
            (Value::Array(items), Some(element)) => canonical::list(items, out, |item, out| self.write(Some(element), item, &[], out)),
            _ => canonical::write_without(value, skip, out),
        }
    }
}

struct Compiler<'a> {
    schema: &'a Value,
    shapes: Vec<Shape>,
    by_pointer: HashMap<&'a str, ShapeId>,
}

impl<'a> Compiler<'a> {
    fn shape(&mut self, schema: &'a Value) -> ShapeId {
        let id = self.shapes.len();
        self.shapes.push(Shape::default());
        self.fill(id, schema);
        id
    }

    fn reference(&mut self, pointer: &'a str) -> Option<ShapeId> {
        if let Some(id) = self.by_pointer.get(pointer) {
            return Some(*id);
        }
        let target = self.schema.pointer(pointer.strip_prefix('#')?)?;
        let id = self.shapes.len();
        self.shapes.push(Shape::default());
        self.by_pointer.insert(pointer, id);
        self.fill(id, target);
        Some(id)
    }

    fn list(&mut self, schema: &'a Map<String, Value>, keyword: &str) -> Vec<ShapeId> {
        schema.get(keyword).and_then(Value::as_array).map(|list| list.iter().map(|one| self.shape(one)).collect()).unwrap_or_default()
    }

    fn fill(&mut self, id: ShapeId, schema: &'a Value) {
        let Value::Object(schema) = schema else { return };
        let number = |keyword: &str| schema.get(keyword).and_then(Value::as_f64);
        let count = |keyword: &str| schema.get(keyword).and_then(Value::as_u64);
        let text = |keyword: &str| schema.get(keyword).and_then(Value::as_str);
        let format = text("format");
        let types = match schema.get("type") {
            Some(Value::String(name)) => Type::parse(name).into_iter().collect(),
            Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).filter_map(Type::parse).collect(),
            _ => Vec::new(),
        };
        let allowed = match (schema.get("const"), schema.get("enum")) {
            (Some(value), _) => Some(vec![value.clone()]),
            (None, Some(Value::Array(values))) => Some(values.clone()),
            _ => None,
        };
        let mut shape = Shape {
            types,
            allowed,
            minimum: number("minimum").or(format.and_then(smallest)),
            exclusive_minimum: number("exclusiveMinimum"),
            maximum: number("maximum").or(format.and_then(largest)),
            exclusive_maximum: number("exclusiveMaximum"),
            single_precision: format == Some("float"),
            min_length: count("minLength"),
            max_length: count("maxLength"),
            min_items: count("minItems"),
            max_items: count("maxItems"),
            mark: match text(setting::MARK) {
                Some(setting::EXECUTION) => Some(Mark::Execution),
                Some(setting::PATH) => Some(Mark::Path),
                _ => None,
            },
            doc: text("description").map(str::to_owned),
            default: schema.get("default").cloned(),
            unit: text(setting::UNIT).map(str::to_owned),
            ..Shape::default()
        };
        if let Some(Value::Object(properties)) = schema.get("properties") {
            shape.properties = properties.iter().map(|(name, property)| (name.clone(), self.shape(property))).collect();
        }
        if let Some(Value::Array(required)) = schema.get("required") {
            shape.required = required.iter().filter_map(Value::as_str).map(str::to_owned).collect();
        }
        shape.additional = match schema.get("additionalProperties").or_else(|| schema.get("unevaluatedProperties")) {
            None => Additional::Unsaid,
            Some(Value::Bool(true)) => Additional::Any,
            Some(Value::Bool(false)) => Additional::Forbidden,
            Some(schema) => Additional::Shape(self.shape(schema)),
        };
        shape.items = schema.get("items").filter(|items| items.is_object()).map(|items| self.shape(items));
        shape.prefix_items = self.list(schema, "prefixItems");
        shape.all_of = self.list(schema, "allOf");
        shape.all_of.extend(text("$ref").and_then(|pointer| self.reference(pointer)));
        shape.any_of = ["anyOf", "oneOf"].iter().map(|keyword| self.list(schema, keyword)).filter(|group| !group.is_empty()).collect();
        self.shapes[id] = shape;
    }
}

/// The largest value that a machine type holds, by its name in schemas.
fn largest(format: &str) -> Option<f64> {
    Some(match format {
        "uint8" => f64::from(u8::MAX),
        "uint16" => f64::from(u16::MAX),
        "uint32" => f64::from(u32::MAX),
        "int8" => f64::from(i8::MAX),
        "int16" => f64::from(i16::MAX),
        "int32" => f64::from(i32::MAX),
        _ => return None,
    })
}

fn smallest(format: &str) -> Option<f64> {
    Some(match format {
        "int8" => f64::from(i8::MIN),
        "int16" => f64::from(i16::MIN),
        "int32" => f64::from(i32::MIN),
        _ => return None,
    })
}
