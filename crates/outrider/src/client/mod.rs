//! The client of the manager's HTTPS interface: bounded in time and size, problems become errors.

mod api;
mod http;
mod settings;
pub(crate) mod sse;

pub(crate) use api::{Order, next_page};
pub(crate) use http::{Client, EventStream, Health};
pub(crate) use settings::Endpoint;

use link::control::LinkError;
use std::path::PathBuf;
use std::time::Duration;
use types::{ErrorCode, Problem};

/// TCP and TLS together; a manager that is slower is not there.
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// One request with its whole answer; watch streams have no such limit.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);
/// A dry run of a VM on its host; the manager itself gives it 25 s.
const INSPECT_LIMIT: Duration = Duration::from_secs(30);
/// A VM that starts or stops: QEMU, its memory, the digests of its files; the manager itself gives it 60 s.
const VM_LIMIT: Duration = Duration::from_secs(70);
/// Most bytes of an answer: ten thousand hosts fit.
const MAX_ANSWER_BYTES: usize = 32 << 20;

/// Why the manager could not be asked, or what it answered.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    /// The URL is none that can be used.
    #[error("the manager's address {url:?} cannot be used: {reason}")]
    BadUrl {
        /// As given.
        url: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// The CA certificate is missing: without it the manager cannot be recognised.
    #[error("cannot read the manager's CA certificate {}", path.display())]
    NoCa {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The API token is missing.
    #[error("cannot read the API token {}", path.display())]
    NoToken {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The token file holds something else.
    #[error("{} does not hold an API token: {reason}", path.display())]
    BadToken {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: &'static str,
    },
    /// The CA file holds something else.
    #[error("{} does not hold the manager's CA certificate", path.display())]
    BadCa {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: Box<link::identity::IdentityError>,
    },
    /// No name, no route, nobody listens, or it is not the manager that the CA certificate speaks for.
    #[error("no connection with the manager at {url}")]
    NotConnected {
        /// Its address.
        url: String,
        /// Why.
        source: Box<LinkError>,
    },
    /// It does not answer in time.
    #[error("the manager at {url} did not {act} within {limit_s} s")]
    TimedOut {
        /// Its address.
        url: String,
        /// What was awaited.
        act: &'static str,
        /// How long.
        limit_s: u64,
    },
    /// The connection broke in the middle.
    #[error("the connection to the manager at {url} broke")]
    Broken {
        /// Its address.
        url: String,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It answered with a problem document.
    #[error("{0}")]
    Answer(Problem),
    /// It answered with something that this version does not understand.
    #[error("the manager's answer to {request} is not understood: {reason}")]
    BadAnswer {
        /// Method and path.
        request: String,
        /// What is wrong with it.
        reason: String,
    },
}

impl ClientError {
    /// Whether trying again later makes sense because nobody answered at all.
    pub(crate) fn is_unreachable(&self) -> bool {
        self.code() == ErrorCode::ManagerUnreachable
            || matches!(self, Self::Answer(p) if p.code == ErrorCode::RegistryUnavailable)
    }

    /// Whether the request may have been carried out although no answer came.
    pub(crate) fn may_have_arrived(&self) -> bool {
        matches!(self, Self::TimedOut { .. } | Self::Broken { .. } | Self::BadAnswer { .. })
    }

    fn code(&self) -> ErrorCode {
        match self {
            Self::BadUrl { .. } | Self::NoCa { .. } | Self::BadCa { .. } | Self::BadToken { .. } => {
                ErrorCode::BadConfiguration
            }
            Self::NoToken { .. } => ErrorCode::Unauthenticated,
            Self::NotConnected { source, .. } => source.error_code(),
            Self::TimedOut { .. } | Self::Broken { .. } => ErrorCode::ManagerUnreachable,
            Self::Answer(problem) => problem.code,
            Self::BadAnswer { .. } => ErrorCode::Internal,
        }
    }

    /// The problem with its whole chain and what to do.
    pub(crate) fn problem(&self) -> Problem {
        if let Self::Answer(problem) = self {
            return problem.clone();
        }
        Problem {
            code: self.code(),
            detail: crate::error::chain(self).join(": "),
            hint: self.hint().map(str::to_owned),
        }
    }

    fn hint(&self) -> Option<&'static str> {
        match self {
            Self::BadUrl { .. } => Some("write it like https://manager.example:7443"),
            Self::NoCa { .. } | Self::BadCa { .. } => {
                Some("copy ca.pem from the manager's state folder and name it with --ca or OUTRIDER_CA")
            }
            Self::NoToken { .. } | Self::BadToken { .. } => Some(
                "name the file with --token-file or OUTRIDER_TOKEN_FILE; the first `manager run` writes \
                 admin.token into its state folder, readable by root",
            ),
            Self::NotConnected { source, .. } if source.error_code() == ErrorCode::Unauthenticated => {
                Some("something else answers there, or the CA certificate (--ca) is of another manager")
            }
            Self::NotConnected { .. } | Self::TimedOut { .. } | Self::Broken { .. } => Some(
                "is it running? `outrider doctor --role operator` tries the address, the certificate and \
                 the token one by one",
            ),
            Self::BadAnswer { .. } => Some("do this command and the manager have the same version?"),
            Self::Answer(_) => None,
        }
    }
}
