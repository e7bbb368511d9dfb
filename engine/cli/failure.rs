use std::{
    io::{BufWriter, ErrorKind, Write},
    process::ExitCode,
    sync::atomic::{AtomicBool, Ordering},
};

use miette::{GraphicalReportHandler, GraphicalTheme};
use serde::Serialize;

use rlflow_engine::{
    EngineError,
    workflow::{WorkflowError, WorkflowErrors},
};

use crate::terminal::visible;

/// How a command ended when nothing was wrong with the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Done.
    Done,
    /// A stage failed, or a check found damage.
    Failed,
    /// The user stopped it.
    Interrupted,
}

impl From<Outcome> for ExitCode {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Done => Self::SUCCESS,
            Outcome::Failed => Self::from(1),
            Outcome::Interrupted => Self::from(130),
        }
    }
}

/// Why a command could not do what was asked.
#[derive(Debug)]
pub enum Failure {
    /// The engine says why.
    Engine(EngineError),
    /// The request is wrong in a way that only the command line knows.
    Request {
        /// Stable code.
        code: &'static str,
        /// What is wrong.
        message: String,
        /// What to do.
        hint: Option<String>,
    },
    /// Anything else.
    Other(anyhow::Error),
}

impl Failure {
    /// A wrong request.
    pub fn request(code: &'static str, message: impl Into<String>, hint: impl Into<String>) -> Self {
        Self::Request { code, message: message.into(), hint: Some(hint.into()) }
    }

    /// Says it, as JSON on stdout if that was asked for, and gives the exit code.
    pub fn report(&self, as_json: bool) -> ExitCode {
        let code = match self {
            Self::Engine(EngineError::Workflow(_)) | Self::Request { .. } => 2,
            // Whatever went wrong in the machine, the request was right.
            Self::Engine(_) | Self::Other(_) => 1,
        };
        if as_json {
            let value = match self {
                Self::Engine(error) => error.to_json(),
                Self::Request { code, message, hint } => errors_json(code, message, hint.as_deref()),
                Self::Other(error) => errors_json("error", &format!("{error:#}"), None),
            };
            print_line(&value.to_string());
        } else {
            let plain = |text: String| visible(&text).into_owned();
            say(&match self {
                // The engine leaves no control characters in these; the escape sequences are the colours.
                Self::Engine(EngineError::Workflow(errors)) => render(errors),
                Self::Engine(error) => plain(format!("error: {error}\n")),
                Self::Request { message, hint: None, .. } => plain(format!("error: {message}\n")),
                Self::Request { message, hint: Some(hint), .. } => plain(format!("error: {message}\n  hint: {hint}\n")),
                Self::Other(error) => plain(format!("error: {error:#}\n")),
            });
        }
        ExitCode::from(code)
    }
}

impl<E: Into<EngineError>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Engine(error.into())
    }
}

/// For results that come from neither engine nor store.
pub fn other(error: impl Into<anyhow::Error>) -> Failure {
    Failure::Other(error.into())
}

/// One error that stands in no file.
fn errors_json(code: &'static str, message: &str, hint: Option<&str>) -> serde_json::Value {
    let error = WorkflowError::new(code, message);
    WorkflowErrors::from(match hint {
        Some(hint) => error.with_hint(hint),
        None => error,
    })
    .to_json()
}

fn render(errors: &WorkflowErrors) -> String {
    let theme = if use_color() { GraphicalTheme::unicode() } else { GraphicalTheme::unicode_nocolor() };
    let handler = GraphicalReportHandler::new_themed(theme).with_width(120).with_links(false);
    let mut out = String::new();
    for error in errors {
        if handler.render_report(&mut out, error).is_err() {
            out = format!("{errors}\n");
            break;
        }
    }
    let count = errors.len();
    out + &format!("{count} error{}\n", if count == 1 { "" } else { "s" })
}

/// Whether stderr takes colour.
pub fn use_color() -> bool {
    takes_color(&std::io::stderr())
}

/// Whether a stream takes colour: a terminal does, unless `NO_COLOR` is set.
pub fn takes_color(stream: &impl std::io::IsTerminal) -> bool {
    stream.is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

fn say(text: &str) {
    // There is nobody to tell when stderr is gone.
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// Whether data for stdout were lost.
static LOST: AtomicBool = AtomicBool::new(false);

/// Whether data could not be written to stdout: then the command failed, whatever else it did.
pub fn lost_output() -> bool {
    LOST.load(Ordering::Relaxed)
}

/// Takes in how writing to stdout went, and says it once if data were lost. A reader that went away (`| head`) is not an error.
fn written(result: std::io::Result<()>) {
    if let Err(error) = result
        && !matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::Interrupted)
        && !LOST.swap(true, Ordering::Relaxed)
    {
        say(&format!("error: cannot write to standard output: {error}\n"));
    }
}

/// Standard output for data: what is lost is noted.
pub struct Stdout;

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        std::io::stdout().write(bytes).inspect_err(|error| written(Err(std::io::Error::from(error.kind()))))
    }

    fn flush(&mut self) -> std::io::Result<()> {
        std::io::stdout().flush().inspect_err(|error| written(Err(std::io::Error::from(error.kind()))))
    }
}

/// Writes a line of data to stdout.
pub fn print_line(text: &str) {
    print_as_it_is(&format!("{text}\n"));
}

/// Writes a value as a line of JSON to stdout.
pub fn print_json(value: &impl Serialize) {
    let mut out = BufWriter::with_capacity(1 << 16, std::io::stdout().lock());
    let line = serde_json::to_writer(&mut out, value).map_err(std::io::Error::from);
    written(line.and_then(|()| out.write_all(b"\n")).and_then(|()| out.flush()));
}

/// Writes text for people, which ends itself, to stdout. It may quote names, settings and data: their control characters are shown
/// and not sent.
pub fn print_text(text: &str) {
    print_as_it_is(&visible(text));
}

/// Writes text that ends itself to stdout, escape sequences too: they are our colours, or the text is data for a program.
pub fn print_as_it_is(text: &str) {
    let mut out = std::io::stdout().lock();
    written(out.write_all(text.as_bytes()).and_then(|()| out.flush()));
}

/// Arguments that cannot be parsed.
pub fn usage(error: &clap::Error, as_json: bool) -> ExitCode {
    if as_json && error.use_stderr() {
        let text = error.to_string();
        let (mut message, mut tips) = (Vec::new(), Vec::new());
        for line in text.trim_start_matches("error: ").lines().map(str::trim).take_while(|line| !line.starts_with("Usage:")) {
            match line.strip_prefix("tip: ") {
                Some(tip) => tips.push(tip),
                None if !line.is_empty() && !line.starts_with("For more information") => message.push(line),
                None => {}
            }
        }
        tips.push("see `rlflow --help`");
        print_line(&errors_json("usage", &message.join(" "), Some(&tips.join("; "))).to_string());
    } else if error.use_stderr() {
        // There is nobody to tell when stderr is gone.
        let _ = error.print();
    } else {
        written(error.print());
    }
    ExitCode::from(if error.use_stderr() { 2 } else { u8::from(lost_output()) })
}
