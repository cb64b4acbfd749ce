//! Why a control connection could not be made.

use std::io;

use rustls::{AlertDescription, CertificateError, Error as TlsError};
use types::ErrorCode;

use crate::channel::TlsFault;
use crate::identity::IdentityError;

/// A connection or listener that did not come about.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// The address can't be listened on.
    #[error("cannot listen on {address}")]
    Bind {
        /// The address.
        address: String,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// Nobody answers there.
    #[error("cannot connect to {address}")]
    Connect {
        /// The address.
        address: String,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The connection was not ready in time.
    #[error("the connection with {address} was not ready within {limit_ms} ms")]
    Timeout {
        /// The address.
        address: String,
        /// The bound.
        limit_ms: u128,
    },
    /// The peer has a good certificate of somebody else.
    #[error("{address} is not who it should be")]
    WrongPeer {
        /// The address.
        address: String,
        /// Who it is.
        #[source]
        source: IdentityError,
    },
    /// The peer's certificate is not of our CA, is expired, or was not proven.
    #[error("the certificate of {address} does not verify")]
    BadCertificate {
        /// The address.
        address: String,
        /// Why.
        #[source]
        source: TlsFault,
    },
    /// The peer has no certificate where one is needed.
    #[error("{address} presented no certificate")]
    NoCertificate {
        /// The address.
        address: String,
    },
    /// The peer refused us.
    #[error("{address} refused the connection with alert {alert}")]
    RefusedByPeer {
        /// The address.
        address: String,
        /// TLS alert, by its name.
        alert: String,
    },
    /// The peer speaks TLS, but not for this purpose.
    #[error("{address} does not speak the protocol {expected} (ALPN)")]
    WrongProtocol {
        /// The address.
        address: String,
        /// What was needed.
        expected: String,
    },
    /// Anything else in the handshake.
    #[error("the TLS handshake with {address} failed")]
    Handshake {
        /// The address.
        address: String,
        /// The error.
        #[source]
        source: io::Error,
    },
    /// Our own configuration can't be used.
    #[error("the TLS configuration cannot be used")]
    Configuration(#[source] TlsFault),
}

impl LinkError {
    /// Stable code for findings and logs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Bind { .. } => "link-bind",
            Self::Connect { .. } => "link-connect",
            Self::Timeout { .. } => "link-timeout",
            Self::WrongPeer { .. } => "link-wrong-peer",
            Self::BadCertificate { .. } => "link-bad-certificate",
            Self::NoCertificate { .. } => "link-no-certificate",
            Self::RefusedByPeer { .. } => "link-refused-by-peer",
            Self::WrongProtocol { .. } => "link-wrong-protocol",
            Self::Handshake { .. } => "link-handshake",
            Self::Configuration(_) => "link-configuration",
        }
    }

    /// The public code for people and scripts, from the point of view of one who dials a manager or listens.
    pub fn error_code(&self) -> ErrorCode {
        match self {
            Self::Bind { source, .. } if source.kind() == io::ErrorKind::AddrInUse => ErrorCode::AddressInUse,
            Self::Bind { .. } => ErrorCode::BadConfiguration,
            Self::Connect { .. } | Self::Timeout { .. } => ErrorCode::ManagerUnreachable,
            Self::Handshake { .. } | Self::WrongProtocol { .. } => ErrorCode::ManagerUnreachable,
            Self::WrongPeer { .. }
            | Self::BadCertificate { .. }
            | Self::NoCertificate { .. }
            | Self::RefusedByPeer { .. } => ErrorCode::Unauthenticated,
            Self::Configuration(_) => ErrorCode::Internal,
        }
    }

    /// Names what went wrong in a handshake; the TLS library hides it in an I/O error.
    pub(crate) fn handshake(address: String, source: io::Error) -> Self {
        let Some(tls) = source.get_ref().and_then(|inner| inner.downcast_ref::<TlsError>()) else {
            return Self::Handshake { address, source };
        };
        match tls {
            TlsError::InvalidCertificate(CertificateError::Other(other)) => {
                match other.0.downcast_ref::<IdentityError>() {
                    Some(identity) => Self::WrongPeer { address, source: identity.clone() },
                    None => Self::BadCertificate { address, source: TlsFault(tls.clone()) },
                }
            }
            TlsError::InvalidCertificate(_) => {
                Self::BadCertificate { address, source: TlsFault(tls.clone()) }
            }
            TlsError::NoCertificatesPresented => Self::NoCertificate { address },
            TlsError::NoApplicationProtocol
            | TlsError::AlertReceived(AlertDescription::NoApplicationProtocol) => {
                Self::WrongProtocol { address, expected: "asked for".to_owned() }
            }
            TlsError::AlertReceived(alert) => Self::RefusedByPeer { address, alert: format!("{alert:?}") },
            _ => Self::Handshake { address, source },
        }
    }
}
