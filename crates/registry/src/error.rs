//! What can go wrong with the registry, and its public code.

use types::{ErrorCode, Problem};

/// Why a registry operation failed. Nothing of its transaction took effect, unless it says that this is
/// unknown.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The database can't be read or written: disk full, read-only, locked, broken. The manager fails closed.
    #[error("the registry cannot {operation}")]
    Unavailable {
        /// The transaction or step.
        operation: &'static str,
        /// What the database said.
        #[source]
        source: sqlx::Error,
    },
    /// The connection to the server was lost while it committed, and the server could not be asked since: all
    /// of the transaction happened, or nothing. A writing transaction that begins later finds out: it begins
    /// only after this one has ended, and sees what it did.
    #[error("it is not known whether the registry could {operation}")]
    CommitUnknown {
        /// The transaction.
        operation: &'static str,
        /// How the connection was lost.
        #[source]
        source: sqlx::Error,
    },
    /// A statement of the transaction had failed, and it went on all the same: a defect. Nothing is
    /// committed.
    #[error("cannot {operation}: a statement of the transaction failed before")]
    Spoilt {
        /// The transaction.
        operation: &'static str,
    },
    /// A unique constraint holds already what was to be added.
    #[error("{what} exists already")]
    Exists {
        /// What.
        what: String,
    },
    /// A row holds what this version cannot read: never skipped over.
    #[error("the registry holds a malformed {what}: {detail}")]
    Malformed {
        /// Which column.
        what: &'static str,
        /// Why.
        detail: String,
    },
}

impl RegistryError {
    pub(crate) fn from_sqlx(operation: &'static str, source: sqlx::Error) -> Self {
        Self::Unavailable { operation, source }
    }

    /// A violated unique constraint becomes [`Self::Exists`], all else [`Self::Unavailable`].
    pub(crate) fn on_insert(
        operation: &'static str,
        what: impl FnOnce() -> String,
        source: sqlx::Error,
    ) -> Self {
        match source.as_database_error() {
            Some(e) if e.is_unique_violation() => Self::Exists { what: what() },
            _ => Self::Unavailable { operation, source },
        }
    }

    pub(crate) fn malformed(what: &'static str, detail: impl std::fmt::Display) -> Self {
        Self::Malformed { what, detail: detail.to_string() }
    }

    /// The public code.
    #[must_use]
    pub const fn code(&self) -> ErrorCode {
        match self {
            Self::Unavailable { .. } | Self::CommitUnknown { .. } | Self::Malformed { .. } => {
                ErrorCode::RegistryUnavailable
            }
            Self::Spoilt { .. } => ErrorCode::Internal,
            Self::Exists { .. } => ErrorCode::AlreadyExists,
        }
    }
}

impl From<RegistryError> for Problem {
    fn from(error: RegistryError) -> Self {
        let mut detail = error.to_string();
        let mut cause = std::error::Error::source(&error);
        while let Some(inner) = cause {
            detail.push_str(": ");
            detail.push_str(&inner.to_string());
            cause = inner.source();
        }
        let problem = Self::new(error.code(), detail);
        match &error {
            RegistryError::CommitUnknown { .. } => problem.hint(
                "it may have happened: look (`migration list`, `vm list`, `audit list`) before you ask for it again, \
                 and see that the database server is up and can be reached",
            ),
            RegistryError::Unavailable { .. } | RegistryError::Malformed { .. } => problem.hint(
                "nothing was changed; SQLite: make room on, or repair, the manager's state folder; PostgreSQL: see \
                 that the server is up, can be reached and takes writes; then try again",
            ),
            RegistryError::Spoilt { .. } | RegistryError::Exists { .. } => problem,
        }
    }
}

/// SQLite's "busy" and "locked"; PostgreSQL's serialization failure, deadlock, and lock or statement
/// time-out: worth another try when the transaction begins.
pub(crate) fn is_busy(error: &sqlx::Error) -> bool {
    let busy = ["5", "6", "261", "262", "517", "40001", "40P01", "55P03", "57014"];
    database_code(error).is_some_and(|code| busy.contains(&code.as_str()))
}

/// The connection is gone: the server was stopped, killed or restarted, or ended the session.
pub(crate) fn is_lost(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(error) => error.kind() != std::io::ErrorKind::TimedOut,
        _ => database_code(error).is_some_and(|code| {
            ["57P01", "57P02", "57P03", "57P05", "25P03"].contains(&code.as_str()) || code.starts_with("08")
        }),
    }
}

fn database_code(error: &sqlx::Error) -> Option<String> {
    error.as_database_error().and_then(|e| e.code().map(std::borrow::Cow::into_owned))
}
