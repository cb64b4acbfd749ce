//! What can go wrong with the registry, and its public code.

use types::{ErrorCode, Problem};

/// Why a registry operation failed. Nothing of its transaction took effect.
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
            Self::Unavailable { .. } | Self::Malformed { .. } => ErrorCode::RegistryUnavailable,
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
        match error.code() {
            ErrorCode::RegistryUnavailable => problem.hint(
                "nothing was changed; make room on, or repair, the manager's state folder, and try again",
            ),
            _ => problem,
        }
    }
}

/// SQLite's "busy" and "locked", and PostgreSQL's serialization failures: worth another try.
pub(crate) fn is_busy(error: &sqlx::Error) -> bool {
    let Some(code) = error.as_database_error().and_then(|e| e.code().map(|c| c.into_owned())) else {
        return false;
    };
    matches!(code.as_str(), "5" | "6" | "261" | "262" | "517" | "40001" | "40P01")
}
