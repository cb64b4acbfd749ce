//! What can go wrong in a command, and which public code and exit code it gets.

use crate::client::ClientError;
use crate::config::ConfigError;
use crate::migration_ref::RefError;
use std::error::Error as StdError;
use std::path::PathBuf;
use types::{ErrorCode, Problem};

/// Everything that ends a command early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// Talking to the manager failed, or it answered with a problem.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A configuration file or a setting is wrong.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A reference to a migration names none or several.
    #[error(transparent)]
    Reference(#[from] RefError),
    /// An input file could not be used.
    #[error(transparent)]
    Input(#[from] InputError),
    /// A daemon ended with a problem.
    #[error("{0}")]
    Daemon(Problem),
    /// The runtime or a signal handler could not be set up.
    #[error("cannot {act}")]
    Start {
        /// What was tried.
        act: &'static str,
        /// Why not.
        source: std::io::Error,
    },
}

/// Why a file that the operator named could not be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InputError {
    /// Not readable.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// Not writable.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// Longer than any honest file of its kind.
    #[error("{} is larger than {limit_bytes} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// The bound.
        limit_bytes: u64,
    },
    /// Not what it should be; the text names key and line.
    #[error("{place}: {reason}")]
    Malformed {
        /// File and line.
        place: String,
        /// What is wrong.
        reason: String,
    },
}

impl Error {
    /// The problem as scripts see it: code, what and why, what to do.
    pub(crate) fn problem(&self) -> Problem {
        match self {
            Self::Client(error) => error.problem(),
            Self::Config(error) => Problem {
                code: ErrorCode::BadConfiguration,
                detail: chain(error).join(": "),
                hint: error.hint(),
            },
            Self::Reference(error) => {
                let code = match error {
                    RefError::Unknown { .. } => ErrorCode::UnknownMigration,
                    RefError::Ambiguous { .. } => ErrorCode::BadRequest,
                };
                Problem::new(code, error.to_string()).hint("list them with: outrider migration list")
            }
            Self::Input(error) => Problem::new(ErrorCode::BadRequest, chain(error).join(": ")),
            Self::Daemon(problem) => problem.clone(),
            Self::Start { .. } => Problem::new(ErrorCode::Internal, chain(self).join(": ")),
        }
    }

    /// The exit code that scripts rely on.
    pub(crate) fn exit_code(&self) -> u8 {
        self.problem().code.exit_code()
    }
}

/// The message of an error and of everything beneath it, outermost first.
pub(crate) fn chain(error: &(dyn StdError + 'static)) -> Vec<String> {
    let mut messages = vec![error.to_string()];
    let mut cause = error.source();
    while let Some(inner) = cause {
        messages.push(inner.to_string());
        cause = inner.source();
    }
    messages
}
