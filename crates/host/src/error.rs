//! What can go wrong in the daemon, and the public code of each.

use std::path::{Path, PathBuf};
use types::{ErrorCode, Problem};

/// An operation of the daemon that failed.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// A file or folder could not be used.
    #[error("{operation} {}", path.display())]
    File {
        /// What was tried, e.g. `cannot write`.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A system call failed.
    #[error("{operation}")]
    System {
        /// What was tried.
        operation: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A program that the daemon needs could not be started.
    #[error("cannot run {program}")]
    Program {
        /// The program.
        program: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// QEMU's monitor refused or did not answer.
    #[error("QEMU's monitor: {0}")]
    Qmp(#[from] crate::qmp::QmpError),
    /// The journal can't be trusted or can't be written.
    #[error(transparent)]
    Journal(#[from] crate::journal::JournalError),
    /// Already in the words of an operator.
    #[error(transparent)]
    Problem(#[from] Problem),
}

impl HostError {
    /// A file operation that failed.
    pub fn file(operation: &'static str, path: &Path, source: impl Into<std::io::Error>) -> Self {
        Self::File { operation, path: path.to_owned(), source: source.into() }
    }

    /// A system call that failed.
    pub fn system(operation: impl Into<String>, source: impl Into<std::io::Error>) -> Self {
        Self::System { operation: operation.into(), source: source.into() }
    }

    /// As people and scripts see it; the whole chain of causes is in the text.
    #[must_use]
    pub fn problem(&self) -> Problem {
        let code = match self {
            Self::Problem(problem) => return problem.clone(),
            Self::File { .. } | Self::System { .. } => ErrorCode::Internal,
            Self::Program { .. } => ErrorCode::MissingProgram,
            Self::Qmp(_) => ErrorCode::HypervisorFailed,
            Self::Journal(_) => ErrorCode::WrongState,
        };
        Problem::new(code, chain(self))
    }
}

/// An error and its causes in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        text.push_str(": ");
        text.push_str(&inner.to_string());
        cause = inner.source();
    }
    text
}
