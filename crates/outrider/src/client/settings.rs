//! Where the manager is, how it is recognised, and who asks.

use super::ClientError;
use crate::args::Connection;
use link::ca::CaCertificate;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Where a manager on the same machine keeps what it knows.
const DEFAULT_MANAGER_STATE: &str = "/var/lib/outrider/manager";
/// The operators' port of a manager.
const DEFAULT_PORT: u16 = 7443;
/// No token is longer.
const MAX_TOKEN_BYTES: u64 = 4096;
/// No CA file is longer.
const MAX_CA_BYTES: u64 = 256 * 1024;

/// Host and port of the manager.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Endpoint {
    /// As people read it.
    pub(crate) url: String,
    /// Name or address, without brackets.
    pub(crate) host: String,
    /// Port.
    pub(crate) port: u16,
}

impl Endpoint {
    /// Reads `https://host[:port]`; no path, no user.
    pub(crate) fn parse(url: &str) -> Result<Self, ClientError> {
        let bad = |reason| ClientError::BadUrl { url: url.to_owned(), reason };
        let uri: hyper::Uri = url.parse().map_err(|_| bad("it is not a URL"))?;
        if uri.scheme_str() != Some("https") {
            return Err(bad("only https is spoken"));
        }
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(bad("it must end after the port"));
        }
        let authority = uri.authority().ok_or_else(|| bad("it names no host"))?;
        if authority.as_str().contains('@') {
            return Err(bad("it must not hold a user name"));
        }
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        if host.is_empty() {
            return Err(bad("it names no host"));
        }
        let port = match &authority.as_str()[authority.host().len()..] {
            "" => DEFAULT_PORT,
            text => {
                text.trim_start_matches(':').parse().map_err(|_| bad("the port is no number up to 65535"))?
            }
        };
        Ok(Self { url: url.trim_end_matches('/').to_owned(), host, port })
    }

    /// `host:port` for the `Host` header and for look-ups.
    pub(crate) fn authority(&self) -> String {
        if self.host.contains(':') {
            format!("[{}]:{}", self.host, self.port)
        } else {
            format!("{}:{}", self.host, self.port)
        }
    }
}

/// An API token. Never printed.
pub(crate) struct Token(String);

impl Token {
    /// Value of the `Authorization` header.
    pub(crate) fn header(&self) -> String {
        format!("Bearer {}", self.0)
    }

    /// From the file that the operator named, or the one that a manager on this machine wrote.
    pub(crate) fn read(connection: &Connection) -> Result<Self, ClientError> {
        let path = path_or_default(connection.token_file.as_deref(), "admin.token");
        let text = read_bounded(&path, MAX_TOKEN_BYTES)
            .map_err(|source| ClientError::NoToken { path: path.clone(), source })?;
        let token = text.trim();
        if token.is_empty() || !token.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(ClientError::BadToken {
                path,
                reason: "it must be one line of printable characters",
            });
        }
        Ok(Self(token.to_owned()))
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(…)")
    }
}

/// The CA certificate by which the manager is recognised.
pub(crate) fn read_ca(connection: &Connection) -> Result<CaCertificate, ClientError> {
    let path = path_or_default(connection.ca.as_deref(), "ca.pem");
    match read_bounded(&path, MAX_CA_BYTES) {
        Ok(pem) => {
            CaCertificate::from_pem(&pem).map_err(|source| ClientError::BadCa { path, source: source.into() })
        }
        Err(source) => Err(ClientError::NoCa { path, source }),
    }
}

fn path_or_default(explicit: Option<&Path>, file: &str) -> PathBuf {
    explicit.map_or_else(|| Path::new(DEFAULT_MANAGER_STATE).join(file), Path::to_owned)
}

fn read_bounded(path: &Path, limit_bytes: u64) -> std::io::Result<String> {
    let mut text = String::new();
    File::open(path)?.take(limit_bytes + 1).read_to_string(&mut text)?;
    if text.len() as u64 > limit_bytes {
        return Err(std::io::Error::other(format!("it is larger than {limit_bytes} bytes")));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn urls_are_read() {
        for (url, authority) in [
            ("https://manager.example", "manager.example:7443"),
            ("https://10.81.0.1:7443/", "10.81.0.1:7443"),
            ("https://[fd00::1]:9", "[fd00::1]:9"),
        ] {
            assert_eq!(Endpoint::parse(url).unwrap().authority(), authority);
        }
        for bad in
            ["", "manager", "http://m:7443", "https://u@m", "https://m/v1", "https://m?x", "https://m:99999"]
        {
            assert!(matches!(Endpoint::parse(bad), Err(ClientError::BadUrl { .. })), "{bad}");
        }
    }

    #[test]
    fn a_token_is_never_shown() {
        assert_eq!(format!("{:?}", Token("secret".to_owned())), "Token(…)");
    }
}
