//! What people and scripts see. Renderers are pure: records and a width in, text out.

pub(crate) mod failure;
pub(crate) mod gates;
pub(crate) mod inspection;
pub(crate) mod layout;
pub(crate) mod lists;
pub(crate) mod platforms;
pub(crate) mod policies;
pub(crate) mod progress;
pub(crate) mod reconciliation;
pub(crate) mod report;
#[cfg(test)]
pub(crate) mod samples;
pub(crate) mod text;
pub(crate) mod time;

use crate::args::Format;
use serde::Serialize;
use std::io::{IsTerminal, Write};

/// Prints a result: as a document, or as the text that `render` makes for the terminal's width.
pub(crate) fn print<T: Serialize>(format: Format, value: &T, render: impl FnOnce(&T, usize) -> String) {
    match format {
        Format::Json => print_json(value),
        Format::Table => print_text(&render(value, stdout_width())),
    }
}

/// One JSON document on standard output.
pub(crate) fn print_json<T: Serialize + ?Sized>(value: &T) {
    let text = serde_json::to_string_pretty(value).expect("documents have string keys and finite numbers");
    write_out(&format!("{text}\n"));
}

/// Text on standard output; colours are removed where nobody would see them.
pub(crate) fn print_text(text: &str) {
    write_out(text);
}

fn write_out(text: &str) {
    let mut out = anstream::stdout().lock();
    // A reader that went away (`| head`) has seen what it wanted.
    drop(out.write_all(text.as_bytes()).and_then(|()| out.flush()));
}

/// A line for people beside the result, on standard error.
pub(crate) fn note(text: &str) {
    anstream::eprintln!("{text}");
}

/// Width of the terminal; nothing is wrapped or cut for a pipe.
pub(crate) fn stdout_width() -> usize {
    let stdout = std::io::stdout();
    if !stdout.is_terminal() {
        return usize::MAX;
    }
    rustix::termios::tcgetwinsize(&stdout).map_or(80, |size| usize::from(size.ws_col).clamp(40, 200))
}
