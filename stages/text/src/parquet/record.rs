//! Rows put together from columns (Melnik et al., Dremel, VLDB 2010, section 4.3).

use serde_json::{Map, Value};

use super::{
    Result, Source,
    column::{Column, Levels},
    footer::{Content, Footer, Node, Repetition, RowGroup},
};

/// Largest row: a few bytes may claim to repeat an element for ever.
const MAX_ROW_BYTES: usize = 64 << 20;
/// What a value takes beside its text.
const VALUE_BYTES: usize = 128;

/// The rows of a row group.
pub(super) struct Rows<'a> {
    fields: Vec<&'a Node>,
    columns: Columns<'a>,
    left: u64,
}

impl<'a> Rows<'a> {
    /// With only the column `only`, if there is one.
    pub fn new(source: &'a Source<'a>, footer: &'a Footer, group: &'a RowGroup, only: Option<&str>) -> Self {
        let mut fields: Vec<&Node> = footer.fields.iter().collect();
        if let Some(wanted) = footer.fields.iter().find(|field| Some(field.name.as_str()) == only) {
            fields = vec![wanted];
        }
        let columns = footer.leaves.iter().zip(&group.chunks).map(|(leaf, chunk)| Column::new(source, leaf, chunk)).collect();
        Self { fields, columns: Columns { columns, budget: 0 }, left: group.rows }
    }

    /// The next row.
    pub fn next(&mut self) -> Result<Option<Map<String, Value>>> {
        let Some(left) = self.left.checked_sub(1) else { return Ok(None) };
        self.left = left;
        self.columns.budget = MAX_ROW_BYTES;
        let mut row = Map::new();
        for field in &self.fields {
            for leaf in field.leaves.clone() {
                if self.columns.levels(leaf)?.repetition != 0 {
                    return Err(format!("column `{}` does not begin with the row", field.name).into());
                }
            }
            insert(&mut row, field, self.columns.field(field)?);
        }
        Ok(Some(row))
    }
}

fn insert(row: &mut Map<String, Value>, field: &Node, value: Value) {
    if !value.is_null() {
        row.insert(field.name.clone(), value);
    }
}

/// One per leaf of the schema.
struct Columns<'a> {
    columns: Vec<Column<'a>>,
    /// Bytes that the row may still take.
    budget: usize,
}

impl Columns<'_> {
    fn levels(&mut self, leaf: usize) -> Result<Levels> {
        self.columns[leaf].peek()?.ok_or_else(|| "a column has fewer values than there are rows".into())
    }

    fn take(&mut self, leaf: usize) -> Result<Value> {
        let value = self.columns[leaf].take()?;
        let bytes = VALUE_BYTES + value.as_str().map_or(0, str::len);
        self.budget = self.budget.checked_sub(bytes).ok_or_else(|| format!("the row takes more than {MAX_ROW_BYTES} bytes"))?;
        Ok(value)
    }

    /// What the row has of `node`, which may be absent or repeated. That its first leaf is there tells of all.
    fn field(&mut self, node: &Node) -> Result<Value> {
        let there = self.levels(node.leaves.start)?.definition >= node.definition;
        if !there {
            node.leaves.clone().try_for_each(|leaf| self.take(leaf).map(drop))?;
        }
        match (node.repetition, there) {
            (Repetition::Repeated, false) => Ok(Value::Array(Vec::new())),
            (_, false) => Ok(Value::Null),
            (Repetition::Repeated, true) => self.elements(node, |columns| columns.value(node)).map(Value::Array),
            (_, true) => self.value(node),
        }
    }

    /// The elements of a repeated node that has one at least.
    fn elements<T>(&mut self, node: &Node, mut read: impl FnMut(&mut Self) -> Result<T>) -> Result<Vec<T>> {
        let mut elements = Vec::new();
        loop {
            elements.push(read(self)?);
            match self.columns[node.leaves.start].peek()? {
                Some(levels) if levels.repetition > node.repetition_level => {
                    return Err(format!("`{}` repeats what it does not hold", node.name).into());
                }
                Some(levels) if levels.repetition == node.repetition_level => {}
                _ => return Ok(elements),
            }
        }
    }

    /// A node that is there, or one element of it.
    fn value(&mut self, node: &Node) -> Result<Value> {
        match &node.content {
            Content::Leaf => self.take(node.leaves.start),
            Content::Struct(children) => {
                let mut object = Map::new();
                for child in children {
                    insert(&mut object, child, self.field(child)?);
                }
                Ok(Value::Object(object))
            }
            Content::List { repeated, wrapped } => {
                if self.levels(repeated.leaves.start)?.definition < repeated.definition {
                    return self.field(repeated);
                }
                match (&repeated.content, wrapped) {
                    (Content::Struct(children), true) => self.elements(repeated, |columns| columns.field(&children[0])).map(Value::Array),
                    _ => self.field(repeated),
                }
            }
            Content::Map(repeated) => match (self.field(repeated)?, &repeated.content) {
                (Value::Array(pairs), Content::Struct(parts)) => Ok(object_of(pairs, &parts[0].name, &parts[1].name)),
                (other, _) => Ok(other),
            },
        }
    }
}

/// Pairs as an object without those whose value is null, if all keys are text, else as they are.
fn object_of(pairs: Vec<Value>, key: &str, value: &str) -> Value {
    let is_text = |pair: &Value| pair.get(key).is_some_and(Value::is_string);
    if !pairs.iter().all(is_text) {
        return Value::Array(pairs);
    }
    let entry = |mut pair: Value| {
        let value = pair.get_mut(value)?.take();
        Some((pair.get(key)?.as_str()?.to_owned(), value))
    };
    Value::Object(pairs.into_iter().filter_map(entry).collect())
}
