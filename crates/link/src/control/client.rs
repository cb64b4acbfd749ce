//! Connectors: each verifies in the handshake that the peer is who it must be.

use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, TlsStream};

use super::server::expect_protocol;
use super::{LinkError, TlsConn, client_config};
use crate::ca::CaCertificate;
use crate::identity::LiveIdentity;
use crate::provider::control_provider;
use crate::verify::{Anchor, Expect, ServerVerifier};

/// Name resolution, TCP and TLS together; a manager that takes longer counts as unreachable.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A host connects to the manager at `address` (`host:port`); both prove who they are.
///
/// # Errors
/// Why not.
pub async fn connect_manager(
    address: &str,
    identity: &LiveIdentity,
    ca: &CaCertificate,
) -> Result<TlsConn, LinkError> {
    let verifier = verifier(Anchor::Ca(ca.clone()), Expect::AnyManager);
    dial(address, client_config(verifier, Some(identity.clone()), b"h2")?, b"h2").await
}

/// A host that joins connects to the manager at `address`, of which it knows only the CA's fingerprint. The CA's
/// certificate comes back: it is the one to pin from now on.
///
/// # Errors
/// Why not.
pub async fn connect_pinned(
    address: &str,
    ca_fingerprint: &[u8; 32],
) -> Result<(TlsConn, CaCertificate), LinkError> {
    let verifier = verifier(Anchor::Fingerprint(*ca_fingerprint), Expect::AnyManager);
    let connection = dial(address, client_config(verifier, None, b"h2")?, b"h2").await?;
    let sent = connection.certificates().get(1..).unwrap_or_default();
    let ca = Anchor::Fingerprint(*ca_fingerprint).find(sent);
    let missing = || LinkError::NoCertificate { address: address.to_owned() };
    Ok((connection, ca.ok_or_else(missing)?))
}

/// The command line connects to the manager's operator port at `address`.
///
/// # Errors
/// Why not.
pub async fn connect_operator(address: &str, ca: &CaCertificate) -> Result<TlsConn, LinkError> {
    let verifier = verifier(Anchor::Ca(ca.clone()), Expect::AnyManager);
    dial(address, client_config(verifier, None, b"http/1.1")?, b"http/1.1").await
}

fn verifier(anchor: Anchor, expect: Expect) -> Arc<ServerVerifier> {
    ServerVerifier::new(anchor, expect, &control_provider())
}

/// Connects, within [`CONNECT_TIMEOUT`], and insists on `alpn`.
pub(crate) async fn dial(
    address: &str,
    config: Arc<ClientConfig>,
    alpn: &[u8],
) -> Result<TlsConn, LinkError> {
    let timeout =
        || LinkError::Timeout { address: address.to_owned(), limit_ms: CONNECT_TIMEOUT.as_millis() };
    let connected = tokio::time::timeout(CONNECT_TIMEOUT, shake(address, config)).await;
    let connection = connected.map_err(|_| timeout())??;
    expect_protocol(&connection, Some(alpn))?;
    Ok(connection)
}

async fn shake(address: &str, config: Arc<ClientConfig>) -> Result<TlsConn, LinkError> {
    let refused = |source| LinkError::Connect { address: address.to_owned(), source };
    let tcp = TcpStream::connect(address).await.map_err(refused)?;
    tcp.set_nodelay(true).map_err(refused)?;
    let peer_address = tcp.peer_addr().map_err(refused)?;
    // The identity is in the certificate's URI; this name is neither sent nor checked.
    let unused = ServerName::try_from("manager.outrider.invalid").expect("a constant, valid DNS name");
    let stream = TlsConnector::from(config)
        .connect(unused, tcp)
        .await
        .map_err(|source| LinkError::handshake(address.to_owned(), source))?;
    Ok(TlsConn::new(TlsStream::Client(stream), peer_address))
}
