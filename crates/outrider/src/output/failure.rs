//! How an error is shown: what, why, what to do; once.

use super::text::{Tone, bold, clean, toned};
use crate::args::Format;
use crate::error::Error;
use serde::Serialize;
use types::Problem;

#[derive(Serialize)]
struct Document<'a> {
    error: ErrorView<'a>,
}

#[derive(Serialize)]
struct ErrorView<'a> {
    code: &'a str,
    detail: &'a str,
    hint: Option<&'a str>,
}

/// Shows an error: text on standard error, or the document on standard output.
pub(crate) fn print(error: &Error, format: Format) {
    let problem = error.problem();
    match format {
        Format::Json => super::print_json(&Document { error: view(&problem) }),
        Format::Table => anstream::eprint!("{}", render(&problem)),
    }
}

fn view(problem: &Problem) -> ErrorView<'_> {
    ErrorView { code: problem.code.as_str(), detail: &problem.detail, hint: problem.hint.as_deref() }
}

fn render(problem: &Problem) -> String {
    let mut text = format!("{} {} [{}]\n", toned(Tone::Bad, "error:"), clean(&problem.detail), problem.code);
    if let Some(hint) = &problem.hint {
        text.push_str(&format!("{} {}\n", bold("what to do:"), clean(hint)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use types::ErrorCode;

    #[test]
    fn an_error_says_what_why_and_what_to_do() {
        let problem =
            Problem::new(ErrorCode::InsufficientCapacity, "host-b lacks room\u{1b}[2J").hint("free some");
        let text = anstream::adapter::strip_str(&render(&problem)).to_string();
        assert_eq!(
            text,
            "error: host-b lacks room\\u{1b}[2J [insufficient-capacity]\nwhat to do: free some\n"
        );
    }

    #[test]
    fn the_document_of_an_error_is_stable() {
        let with = Problem::new(ErrorCode::PolicyDenied, "no").hint("ask");
        let without = Problem::new(ErrorCode::Internal, "oops");
        let json = |p| serde_json::to_string(&Document { error: view(p) }).expect("serialises");
        assert_eq!(json(&with), r#"{"error":{"code":"policy-denied","detail":"no","hint":"ask"}}"#);
        assert_eq!(json(&without), r#"{"error":{"code":"internal","detail":"oops","hint":null}}"#);
    }
}
