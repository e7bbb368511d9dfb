use std::{fmt, ops::Range, sync::Arc};

use miette::{Diagnostic, LabeledSpan, MietteError, SourceCode, SourceSpan, SpanContents};
use serde_json::{Value, json};

use super::source::{Source, Sources, Span};

/// Longest piece of a source line that is printed, in characters.
const MAX_SHOWN_COLUMNS: usize = 160;

/// One thing that is wrong with a workflow, found before anything runs.
#[derive(Debug, Clone)]
pub struct WorkflowError {
    /// Stable code, such as `unknown_key`.
    pub code: &'static str,
    /// What is wrong, with the offending text.
    pub message: String,
    /// The file (or `--set` argument) that it stands in; empty if it stands nowhere.
    pub file: String,
    /// Line, counted from 1; 0 if it stands nowhere.
    pub line: u32,
    /// Column in characters, counted from 1; 0 if it stands nowhere.
    pub column: u32,
    /// What to do.
    pub hint: Option<String>,
    /// The offending bytes of the file.
    pub span: Option<Range<u32>>,
    source: Option<Arc<Source>>,
}

impl WorkflowError {
    /// An error that has no place in a file. Control characters of what the message quotes are replaced: it may be printed as it is.
    pub fn new(code: &'static str, message: impl Into<String>) -> Self {
        Self {
            code,
            message: without_controls(message.into()),
            file: String::new(),
            line: 0,
            column: 0,
            hint: None,
            span: None,
            source: None,
        }
    }

    /// The same with a hint.
    pub fn with_hint(self, hint: impl Into<String>) -> Self {
        Self { hint: Some(without_controls(hint.into())), ..self }
    }

    /// The same about a stage.
    pub(crate) fn about(self, stage: &str) -> Self {
        Self { message: without_controls(format!("stage `{stage}`: {}", self.message)), ..self }
    }

    /// The same about the whole of `file`.
    pub fn in_file(self, file: impl Into<String>) -> Self {
        Self { file: file.into(), line: 1, column: 1, ..self }
    }

    /// The same at a place.
    pub(crate) fn at(self, sources: &Sources, span: Span) -> Self {
        let Some(source) = sources.get(span.source) else { return self };
        let (line, column) = source.position(span.start as usize);
        let range = span.start..span.end;
        let (line, column) = (line as u32, column as u32);
        Self { file: source.name.clone(), line, column, span: Some(range), source: Some(source.clone()), ..self }
    }

    /// The error as scripts see it.
    pub fn to_json(&self) -> Value {
        json!({
            "code": self.code,
            "message": self.message,
            "file": (!self.file.is_empty()).then_some(&self.file),
            "line": (self.line > 0).then_some(self.line),
            "column": (self.column > 0).then_some(self.column),
            "hint": self.hint,
        })
    }
}

impl fmt::Display for WorkflowError {
    /// Only the message: [`WorkflowErrors`] prints the rest.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for WorkflowError {}

/// Lends a source to miette under its name.
impl SourceCode for Source {
    fn read_span<'a>(&'a self, span: &SourceSpan, before: usize, after: usize) -> Result<Box<dyn SpanContents<'a> + 'a>, MietteError> {
        let contents = self.printable().read_span(span, before, after)?;
        Ok(Box::new(miette::MietteSpanContents::new_named(
            self.name.chars().map(printable).collect(),
            contents.data(),
            *contents.span(),
            contents.line(),
            contents.column(),
            contents.line_count(),
        )))
    }
}

impl Diagnostic for WorkflowError {
    fn code<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        Some(Box::new(self.code))
    }

    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        self.hint.as_ref().map(|hint| Box::new(hint) as Box<dyn fmt::Display>)
    }

    fn source_code(&self) -> Option<&dyn SourceCode> {
        // miette panics on columns beyond 65,535, and nobody reads a snippet that wide.
        self.source.as_deref().filter(|_| self.column < WIDEST_SNIPPET).map(|source| source as &dyn SourceCode)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        let span = self.span.clone()?;
        self.source_code()?;
        Some(Box::new(std::iter::once(LabeledSpan::new_with_span(None, SourceSpan::from(span.start as usize..span.end as usize)))))
    }
}

/// Column up to which a report shows the line itself.
const WIDEST_SNIPPET: u32 = 10_000;

/// Everything that is wrong with a workflow, in the order of its files. Displayed as plain text, one block each;
/// as a [`Diagnostic`] with the sources.
#[derive(Debug, Clone, Default)]
pub struct WorkflowErrors(Vec<WorkflowError>);

impl WorkflowErrors {
    /// Of `errors`, as they stand.
    pub fn new(errors: Vec<WorkflowError>) -> Self {
        Self(errors)
    }

    /// The errors.
    pub fn iter(&self) -> std::slice::Iter<'_, WorkflowError> {
        self.0.iter()
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// `{"errors": [...]}`, as `--json` prints it.
    pub fn to_json(&self) -> Value {
        json!({ "errors": self.0.iter().map(WorkflowError::to_json).collect::<Vec<_>>() })
    }
}

impl From<WorkflowError> for WorkflowErrors {
    fn from(error: WorkflowError) -> Self {
        Self(vec![error])
    }
}

impl<'a> IntoIterator for &'a WorkflowErrors {
    type Item = &'a WorkflowError;
    type IntoIter = std::slice::Iter<'a, WorkflowError>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl fmt::Display for WorkflowErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.0.iter().enumerate() {
            if index > 0 {
                writeln!(f)?;
            }
            write_plain(error, f)?;
        }
        Ok(())
    }
}

/// One error with its line of the source:
///
/// ```text
/// error[unknown_key]: stage `dpo` (kind `dpo`) has no setting `betta`
///   --> rlhf.toml:12:1
///    |
/// 12 | betta = 0.1
///    | ^^^^^
///   hint: did you mean `beta`?
/// ```
fn write_plain(error: &WorkflowError, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    writeln!(f, "error[{}]: {}", error.code, error.message)?;
    if !error.file.is_empty() {
        write!(f, "  --> {}", error.file.chars().map(printable).collect::<String>())?;
        if error.span.is_some() {
            write!(f, ":{}:{}", error.line, error.column)?;
        }
        writeln!(f)?;
    }
    if let (Some(source), Some(span)) = (&error.source, &error.span) {
        let text = source.line(error.line as usize);
        let column = error.column as usize;
        // A line may be a whole minified file: only the piece around the span is shown.
        let skipped = (column - 1).saturating_sub(MAX_SHOWN_COLUMNS / 2);
        let shown: String = text.chars().skip(skipped).take(MAX_SHOWN_COLUMNS).map(printable).collect();
        let width = error.line.to_string().len();
        let marked = source
            .text
            .get(span.start as usize..span.end as usize)
            .map_or(1, |marked| marked.lines().next().unwrap_or("").chars().count())
            .max(1);
        let offset = column - 1 - skipped;
        let marked = marked.min(shown.chars().count().saturating_sub(offset)).max(1);
        writeln!(f, "{:width$} |", "")?;
        writeln!(f, "{} | {shown}", error.line)?;
        writeln!(f, "{:width$} | {:offset$}{}", "", "", "^".repeat(marked))?;
    }
    if let Some(hint) = &error.hint {
        writeln!(f, "  hint: {hint}")?;
    }
    Ok(())
}

fn without_controls(text: String) -> String {
    let harmful = |character: char| character.is_control() && character != '\n';
    if text.contains(harmful) {
        text.chars().map(|character| if character == '\n' { character } else { printable(character) }).collect()
    } else {
        text
    }
}

fn printable(character: char) -> char {
    match character {
        '\t' => ' ',
        character if character.is_control() => '\u{fffd}',
        character => character,
    }
}

impl std::error::Error for WorkflowErrors {}

impl Diagnostic for WorkflowErrors {
    fn related<'a>(&'a self) -> Option<Box<dyn Iterator<Item = &'a dyn Diagnostic> + 'a>> {
        Some(Box::new(self.0.iter().map(|error| error as &dyn Diagnostic)))
    }
}

/// Errors as they are found; [`Collector::finish`] sorts them by place and drops repetitions (one wrong default is one
/// error, however many stages it is laid under).
#[derive(Default)]
pub(crate) struct Collector {
    found: Vec<(Span, WorkflowError)>,
}

impl Collector {
    pub fn add(&mut self, span: Span, error: WorkflowError) {
        self.found.push((span, error));
    }

    pub fn len(&self) -> usize {
        self.found.len()
    }

    pub fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    pub fn finish(mut self, sources: &Sources) -> WorkflowErrors {
        self.found.sort_by_key(|(span, _)| *span);
        let mut seen = std::collections::HashSet::new();
        let placed = self.found.into_iter().filter_map(|(span, error)| {
            let known = sources.get(span.source).is_some();
            (!known || seen.insert((span, error.code))).then(|| error.at(sources, span))
        });
        WorkflowErrors(placed.collect())
    }
}
