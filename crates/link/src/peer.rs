//! Daemon to daemon: the direct way on which a source that holds its frozen VM asks the target to renounce, also
//! when no manager can be reached.
//!
//! The listener exists only while a hand-over is open, is closed by dropping it, and lets in one named host. What
//! is said on it is signed by itself (`permit::statement`); this is the wrapper, not the proof.

use std::net::SocketAddr;
use std::task::{Context, Poll};

use tokio::sync::mpsc;
use types::HostName;

use crate::ca::CaCertificate;
use crate::channel::TlsFault;
use crate::control::{LinkError, Listening, Refusal, TlsConn, client_config, dial, server_config};
use crate::identity::LiveIdentity;
use crate::provider::control_provider;
use crate::verify::{Anchor, ClientVerifier, Expect, ServerVerifier};

/// What both ends speak, or nothing.
const PROTOCOL: &[u8] = b"outrider-handover/1";

/// Waits for one host, while a hand-over with it is open.
#[derive(Debug)]
pub struct PeerListener(Listening);

impl PeerListener {
    /// Listens for `peer` only.
    ///
    /// # Errors
    /// [`LinkError::Bind`] or [`LinkError::Configuration`].
    pub async fn bind(
        address: SocketAddr,
        identity: LiveIdentity,
        ca: &CaCertificate,
        peer: &HostName,
    ) -> Result<Self, LinkError> {
        let verifier = ClientVerifier::new(ca, Expect::Host(peer.clone()), true, control_provider())
            .map_err(|error| LinkError::Configuration(TlsFault(error)))?;
        let config = server_config(Some(verifier), identity, PROTOCOL)?;
        Listening::bind(address, config, Some(PROTOCOL)).await.map(Self)
    }
}

crate::control::listener!(PeerListener);

/// Connects to `peer`'s daemon.
///
/// # Errors
/// Why not.
pub async fn connect(
    address: SocketAddr,
    identity: &LiveIdentity,
    ca: &CaCertificate,
    peer: &HostName,
) -> Result<TlsConn, LinkError> {
    let anchor = Anchor::Ca(ca.clone());
    let verifier = ServerVerifier::new(anchor, Expect::Host(peer.clone()), &control_provider());
    let config = client_config(verifier, Some(identity.clone()), PROTOCOL)?;
    dial(&address.to_string(), config, PROTOCOL).await
}
