//! Schema and column chunks, from the end of the file.

use super::{
    MAGIC, Result, Source,
    thrift::{BINARY, I32, I64, LIST, STRUCT, Thrift},
};

/// Deepest schema.
const MAX_DEPTH: usize = 64;
/// Bytes after the metadata: their length and the magic.
const TAIL_BYTES: u64 = 8;

/// What a file says of itself.
pub(super) struct Footer {
    /// The columns of a row, as a tree.
    pub fields: Vec<Node>,
    /// The leaves of the tree, in order.
    pub leaves: Vec<Leaf>,
    pub groups: Vec<RowGroup>,
}

/// A part of every row.
pub(super) struct Node {
    pub name: String,
    pub repetition: Repetition,
    pub content: Content,
    /// Definition level from which on it is there.
    pub definition: u32,
    /// Repetition level of a further element, if it is repeated.
    pub repetition_level: u32,
    /// Leaves below it.
    pub leaves: std::ops::Range<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Repetition {
    Required,
    Optional,
    Repeated,
}

pub(super) enum Content {
    Leaf,
    Struct(Vec<Node>),
    /// Wraps a repeated node; `wrapped` = whose only child is the element.
    List {
        repeated: Box<Node>,
        wrapped: bool,
    },
    /// Wraps a repeated node of a key and a value.
    Map(Box<Node>),
}

/// A column.
pub(super) struct Leaf {
    pub name: String,
    pub physical: Physical,
    pub meaning: Meaning,
    pub max_definition: u32,
    pub max_repetition: u32,
}

/// How values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Physical {
    Boolean,
    Int32,
    Int64,
    Int96,
    Float,
    Double,
    ByteArray,
    /// With its length, at least 1.
    FixedLenByteArray(usize),
}

/// What stored values stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Meaning {
    /// Nothing else than they are; bytes may be text.
    Plain,
    Text,
    Unsigned,
    /// Something that has no JSON.
    Other,
}

/// Rows that are stored together.
pub(super) struct RowGroup {
    pub rows: u64,
    /// One per leaf.
    pub chunks: Vec<Chunk>,
}

/// A column's part of a row group.
pub(super) struct Chunk {
    pub codec: i64,
    /// Where its pages begin in the file.
    pub start: u64,
    pub end: u64,
    /// Values, nulls included.
    pub values: u64,
}

impl Footer {
    pub fn read(source: &Source<'_>) -> Result<Self> {
        let size = source.size_bytes;
        if size < MAGIC.len() as u64 || source.read(0, MAGIC.len() as u64)? != MAGIC {
            return Err("the file does not begin as Parquet files do".into());
        }
        let tail = source.read(size.saturating_sub(TAIL_BYTES), TAIL_BYTES.min(size))?;
        if tail.len() < 8 || &tail[4..] != MAGIC {
            return Err("the file does not end as Parquet files do: it is truncated".into());
        }
        let length = u64::from(u32::from_le_bytes([tail[0], tail[1], tail[2], tail[3]]));
        let start = (size - TAIL_BYTES).checked_sub(length).ok_or("the file is shorter than its metadata: it is truncated")?;
        parse(&source.read(start, length)?, size)
    }
}

fn parse(bytes: &[u8], size: u64) -> Result<Footer> {
    let (mut elements, mut groups, mut encrypted) = (Vec::new(), Vec::new(), false);
    Thrift::new(bytes).fields(|thrift, field| {
        match field {
            (2, LIST) => elements = thrift.list(STRUCT, element)?,
            (4, LIST) => groups = thrift.list(STRUCT, row_group)?,
            (8, STRUCT) => encrypted = true,
            _ => {}
        }
        Ok(())
    })?;
    if encrypted {
        return Err("the file is encrypted".into());
    }
    let mut schema = Schema { elements: elements.into_iter(), leaves: Vec::new() };
    let root = schema.elements.next().ok_or("the file has no schema")?;
    let fields = schema.children(root.children, 0, 0, MAX_DEPTH)?;
    let leaves = schema.leaves;
    let groups = groups.into_iter().map(|group| group.checked(&leaves, size)).collect::<Result<_>>()?;
    Ok(Footer { fields, leaves, groups })
}

/// A node as it is written: in a list, before its children.
#[derive(Default)]
struct Element {
    physical: Option<i64>,
    length: i64,
    repetition: i64,
    name: String,
    children: u64,
    converted: Option<i64>,
    /// Which of the logical types it is, which newer writers give beside or instead of the converted one.
    logical: Option<i64>,
}

fn element(thrift: &mut Thrift<'_>) -> Result<Element> {
    thrift.record(|thrift, element: &mut Element, field| {
        match field {
            (1, I32) => element.physical = Some(thrift.integer()?),
            (2, I32) => element.length = thrift.integer()?,
            (3, I32) => element.repetition = thrift.integer()?,
            (4, BINARY) => element.name = thrift.text()?,
            (5, I32) => element.children = thrift.size()?,
            (6, I32) => element.converted = Some(thrift.integer()?),
            // A union: the field that is there says which type it is.
            (10, STRUCT) => thrift.fields(|_, (id, _)| {
                element.logical = Some(id);
                Ok(())
            })?,
            _ => {}
        }
        Ok(())
    })
}

impl Element {
    fn is_list(&self) -> bool {
        self.converted == Some(3) || self.logical == Some(3)
    }

    fn is_map(&self) -> bool {
        matches!(self.converted, Some(1 | 2)) || self.logical == Some(2)
    }

    fn meaning(&self) -> Meaning {
        match (self.converted, self.logical) {
            // Text, enumerations and JSON.
            (Some(0 | 4 | 19), _) | (None, Some(1 | 4 | 12)) => Meaning::Text,
            (Some(11..=14), _) => Meaning::Unsigned,
            // Decimals, BSON, intervals, UUIDs and half precision.
            (Some(5 | 20 | 21), _) | (None, Some(5 | 13..)) => Meaning::Other,
            _ => Meaning::Plain,
        }
    }

    fn physical(&self) -> Result<Physical> {
        Ok(match self.physical {
            Some(0) => Physical::Boolean,
            Some(1) => Physical::Int32,
            Some(2) => Physical::Int64,
            Some(3) => Physical::Int96,
            Some(4) => Physical::Float,
            Some(5) => Physical::Double,
            Some(6) => Physical::ByteArray,
            Some(7) => match usize::try_from(self.length) {
                Ok(length @ 1..) => Physical::FixedLenByteArray(length),
                _ => return Err(format!("column `{}` has values of length {}", self.name, self.length).into()),
            },
            other => return Err(format!("column `{}` is of the unknown type {other:?}", self.name).into()),
        })
    }
}

/// Builds the tree from the list.
struct Schema {
    elements: std::vec::IntoIter<Element>,
    leaves: Vec<Leaf>,
}

impl Schema {
    fn children(&mut self, count: u64, definition: u32, repetition: u32, depth: usize) -> Result<Vec<Node>> {
        if count == 0 || count > self.elements.len() as u64 {
            return Err("the schema does not fit together".into());
        }
        let depth = depth.checked_sub(1).ok_or("the schema is nested too deep")?;
        (0..count).map(|_| self.node(definition, repetition, depth)).collect()
    }

    fn node(&mut self, mut definition: u32, mut repetition_level: u32, depth: usize) -> Result<Node> {
        let element = self.elements.next().ok_or("the schema does not fit together")?;
        let repetition = match element.repetition {
            0 => Repetition::Required,
            1 => Repetition::Optional,
            2 => Repetition::Repeated,
            other => return Err(format!("`{}` has the unknown repetition {other}", element.name).into()),
        };
        definition += u32::from(repetition != Repetition::Required);
        repetition_level += u32::from(repetition == Repetition::Repeated);
        let first = self.leaves.len();
        let content = if element.children == 0 {
            self.leaves.push(Leaf {
                name: element.name.clone(),
                physical: element.physical()?,
                meaning: element.meaning(),
                max_definition: definition,
                max_repetition: repetition_level,
            });
            Content::Leaf
        } else {
            let children = self.children(element.children, definition, repetition_level, depth)?;
            wrapper(&element, children)
        };
        Ok(Node { name: element.name, repetition, content, definition, repetition_level, leaves: first..self.leaves.len() })
    }
}

/// Takes the layers away that lists and maps have in a schema, after the rules of Parquet's `LogicalTypes.md`.
fn wrapper(element: &Element, mut children: Vec<Node>) -> Content {
    let (list, map) = (element.is_list(), element.is_map());
    if let [only] = children.as_slice()
        && only.repetition == Repetition::Repeated
    {
        let parts = if let Content::Struct(parts) = &only.content { parts.len() } else { 0 };
        if list {
            // Older writers repeat the element itself, under these names.
            let old = only.name == "array" || only.name.ends_with("_tuple");
            return Content::List { wrapped: parts == 1 && !old, repeated: Box::new(children.remove(0)) };
        }
        if map && parts == 2 {
            return Content::Map(Box::new(children.remove(0)));
        }
    }
    Content::Struct(children)
}

#[derive(Default)]
struct WrittenGroup {
    columns: Vec<WrittenChunk>,
    rows: u64,
}

#[derive(Default)]
struct WrittenChunk {
    elsewhere: bool,
    codec: i64,
    values: u64,
    packed_bytes: u64,
    data: u64,
    dictionary: Option<u64>,
}

fn row_group(thrift: &mut Thrift<'_>) -> Result<WrittenGroup> {
    thrift.record(|thrift, group: &mut WrittenGroup, field| {
        match field {
            (1, LIST) => group.columns = thrift.list(STRUCT, column_chunk)?,
            (3, I64) => group.rows = thrift.size()?,
            _ => {}
        }
        Ok(())
    })
}

fn column_chunk(thrift: &mut Thrift<'_>) -> Result<WrittenChunk> {
    thrift.record(|thrift, chunk: &mut WrittenChunk, field| {
        match field {
            (1, BINARY) => chunk.elsewhere = !thrift.text()?.is_empty(),
            (3, STRUCT) => thrift.fields(|thrift, field| {
                match field {
                    (4, I32) => chunk.codec = thrift.integer()?,
                    (5, I64) => chunk.values = thrift.size()?,
                    (7, I64) => chunk.packed_bytes = thrift.size()?,
                    (9, I64) => chunk.data = thrift.size()?,
                    (11, I64) => chunk.dictionary = Some(thrift.size()?),
                    _ => {}
                }
                Ok(())
            })?,
            _ => {}
        }
        Ok(())
    })
}

impl WrittenGroup {
    fn checked(self, leaves: &[Leaf], size: u64) -> Result<RowGroup> {
        if self.columns.len() != leaves.len() {
            return Err(format!("a row group has {} columns, the schema has {}", self.columns.len(), leaves.len()).into());
        }
        let chunk = |(written, leaf): (WrittenChunk, &Leaf)| {
            if written.elsewhere {
                return Err(format!("column `{}` is in another file", leaf.name).into());
            }
            // Some writers say 0 where there is no dictionary.
            let start = written.dictionary.filter(|at| (1..written.data).contains(at)).unwrap_or(written.data);
            let end = start.checked_add(written.packed_bytes).filter(|end| *end <= size);
            let end = end.ok_or_else(|| format!("column `{}` lies behind the end of the file: it is truncated", leaf.name))?;
            Ok(Chunk { codec: written.codec, start, end, values: written.values })
        };
        Ok(RowGroup { rows: self.rows, chunks: self.columns.into_iter().zip(leaves).map(chunk).collect::<Result<_>>()? })
    }
}
