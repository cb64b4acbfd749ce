//! Why a channel was refused or broke, in words an operator and a detector can act on.

use std::fmt;
use std::io;

use rustls::{AlertDescription, CertificateError, Error as TlsError};

/// A refusal or failure of a permit-bound channel. After any of them the channel is dead.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChannelError {
    /// The permit names something that is not an Ed25519 key, or our own key for the peer.
    #[error("the peer key named for the channel is unusable: {why}")]
    PeerKeyUnusable {
        /// What is wrong with it.
        why: &'static str,
    },
    /// The peer presented a key that the permit does not name.
    #[error("the peer presented a key that the permit does not name")]
    WrongPeerKey,
    /// The peer named the right key, or none, but did not prove that it holds it.
    #[error("the peer did not prove possession of its key")]
    KeyNotProven(#[source] TlsFault),
    /// The peer's ALPN value is missing or is not this permit's digest and this channel's number.
    #[error("the peer is not bound to this permit and channel (ALPN)")]
    WrongBinding,
    /// The peer lacks TLS 1.3, raw public keys or the key exchange asked for.
    #[error("the peer cannot speak the channel's protocol")]
    Incompatible(#[source] TlsFault),
    /// The bytes are not TLS.
    #[error("the peer does not speak TLS")]
    NotTls(#[source] TlsFault),
    /// A record that was not made with this connection's keys: a replay, or altered on the way.
    #[error("a record does not belong to this connection (replayed or altered)")]
    ForeignRecord,
    /// The peer refused us.
    #[error("the peer refused the channel with alert {alert}")]
    RefusedByPeer {
        /// TLS alert, by its name.
        alert: String,
    },
    /// The peer broke the protocol in some other way.
    #[error("the peer broke the TLS protocol")]
    Misbehaved(#[source] TlsFault),
    /// The peer sent more than a handshake can need.
    #[error("the handshake exceeded {limit_bytes} bytes")]
    HandshakeTooLarge {
        /// The bound.
        limit_bytes: usize,
    },
    /// The peer did not finish the handshake in time.
    #[error("the handshake was not finished before its deadline")]
    HandshakeTimeout,
    /// The connection ended without close_notify: whatever came before may be incomplete.
    #[error("the connection ended without a close: its data may be incomplete")]
    Truncated,
    /// Bytes were to be sent or opened before the handshake was done, or after the close.
    #[error("the channel is not open for {operation}")]
    NotOpen {
        /// What was asked.
        operation: &'static str,
    },
    /// An earlier error made the channel unusable.
    #[error("the channel failed earlier and carries nothing more")]
    Dead,
    /// The receive buffer is full of bytes that were not opened.
    #[error("the receive buffer is full: open what was received first")]
    ReceiveBufferFull,
    /// The socket failed.
    #[error("{operation} on the channel's socket failed")]
    Io {
        /// The system call.
        operation: &'static str,
        /// Its error.
        #[source]
        source: io::Error,
    },
    /// Anything else inside the TLS library (out of random numbers, exhausted keys).
    #[error("the TLS library failed")]
    Library(#[source] TlsFault),
}

impl ChannelError {
    /// Stable code for findings, logs and the API.
    pub fn code(&self) -> &'static str {
        match self {
            Self::PeerKeyUnusable { .. } => "channel-peer-key-unusable",
            Self::WrongPeerKey => "channel-wrong-key",
            Self::KeyNotProven(_) => "channel-key-not-proven",
            Self::WrongBinding => "channel-wrong-binding",
            Self::Incompatible(_) => "channel-incompatible",
            Self::NotTls(_) => "channel-not-tls",
            Self::ForeignRecord => "channel-foreign-record",
            Self::RefusedByPeer { .. } => "channel-refused-by-peer",
            Self::Misbehaved(_) => "channel-peer-misbehaved",
            Self::HandshakeTooLarge { .. } => "channel-handshake-too-large",
            Self::HandshakeTimeout => "channel-handshake-timeout",
            Self::Truncated => "channel-truncated",
            Self::NotOpen { .. } => "channel-not-open",
            Self::Dead => "channel-dead",
            Self::ReceiveBufferFull => "channel-receive-buffer-full",
            Self::Io { .. } => "channel-io",
            Self::Library(_) => "channel-tls-library",
        }
    }

    pub(super) fn from_tls(error: TlsError) -> Self {
        match error {
            TlsError::InvalidCertificate(CertificateError::ApplicationVerificationFailure) => {
                Self::WrongPeerKey
            }
            TlsError::InvalidCertificate(_) | TlsError::NoCertificatesPresented => {
                Self::KeyNotProven(TlsFault(error))
            }
            TlsError::NoApplicationProtocol => Self::WrongBinding,
            // A server that shares no ALPN value with us says so by this alert.
            TlsError::AlertReceived(AlertDescription::NoApplicationProtocol) => Self::WrongBinding,
            TlsError::AlertReceived(alert) => Self::RefusedByPeer { alert: format!("{alert:?}") },
            TlsError::PeerIncompatible(_) => Self::Incompatible(TlsFault(error)),
            TlsError::InvalidMessage(_) => Self::NotTls(TlsFault(error)),
            TlsError::DecryptError => Self::ForeignRecord,
            TlsError::PeerMisbehaved(_)
            | TlsError::InappropriateMessage { .. }
            | TlsError::InappropriateHandshakeMessage { .. }
            | TlsError::PeerSentOversizedRecord => Self::Misbehaved(TlsFault(error)),
            other => Self::Library(TlsFault(other)),
        }
    }

    pub(super) fn io(operation: &'static str, errno: rustix::io::Errno) -> Self {
        Self::Io { operation, source: errno.into() }
    }
}

/// The TLS library's own words, kept for the error chain without naming the library to callers.
#[derive(Debug)]
pub struct TlsFault(pub(crate) TlsError);

impl fmt::Display for TlsFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for TlsFault {}
