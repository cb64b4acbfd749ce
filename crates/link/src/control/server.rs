//! Listeners: a bound on half-open handshakes, a deadline for each, and a word about every refusal (threats CP-15
//! request flood, DP-17 slot exhaustion).

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::ServerConfig;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::{TlsAcceptor, TlsStream};

use super::config::unusable;
use super::{LinkError, TlsConn, server_config};
use crate::ca::CaCertificate;
use crate::identity::LiveIdentity;
use crate::provider::control_provider;
use crate::verify::{ClientVerifier, Expect};

/// A handshake takes a millisecond and two round trips; who needs longer holds a slot for nothing.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Handshakes at once, over all peers: each takes some 50 KiB.
pub const HALF_OPEN_LIMIT: usize = 128;
/// Handshakes at once from one address, so that one peer can't take every slot.
pub const HALF_OPEN_PER_ADDRESS_LIMIT: usize = 16;
/// Connections that are ready and wait to be accepted.
const READY_LIMIT: usize = 32;
/// Refusals that wait to be read; more are dropped, since a flood must not become a memory leak.
const REFUSAL_LIMIT: usize = 256;
/// After a failed accept (out of descriptors) give others time to close some.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// A connection that was refused: food for the detectors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// From where.
    pub peer_address: SocketAddr,
    /// Stable code: those of [`LinkError::code`], and `link-too-many-half-open`.
    pub code: &'static str,
    /// In words.
    pub detail: String,
}

/// The manager's listener for hosts. A connection either carries the identity of a host of our CA or none at all:
/// without one it is good only for joining.
#[derive(Debug)]
pub struct HostListener(Listening);

impl HostListener {
    /// Listens.
    ///
    /// # Errors
    /// [`LinkError::Bind`] or [`LinkError::Configuration`].
    pub async fn bind(
        address: SocketAddr,
        identity: LiveIdentity,
        ca: &CaCertificate,
    ) -> Result<Self, LinkError> {
        let verifier =
            ClientVerifier::new(ca, Expect::AnyHost, false, control_provider()).map_err(unusable)?;
        let config = server_config(Some(verifier), identity, b"h2")?;
        Listening::bind(address, config, Some(b"h2")).await.map(Self)
    }
}

/// The manager's listener for operators: HTTPS, the operator authenticates by token.
#[derive(Debug)]
pub struct OperatorListener(Listening);

impl OperatorListener {
    /// Listens.
    ///
    /// # Errors
    /// [`LinkError::Bind`] or [`LinkError::Configuration`].
    pub async fn bind(address: SocketAddr, identity: LiveIdentity) -> Result<Self, LinkError> {
        let config = server_config(None, identity, b"http/1.1")?;
        // A client without ALPN speaks HTTP/1.1 anyway.
        Listening::bind(address, config, None).await.map(Self)
    }
}

/// What every listener can do.
macro_rules! listener {
    ($listener:ty) => {
        impl $listener {
            /// Where it listens.
            pub fn local_address(&self) -> SocketAddr {
                self.0.local_address
            }

            /// The next connection whose handshake is done. Waits for ever; a failed handshake is no event here
            /// (see `take_refusals`).
            pub async fn accept(&mut self) -> TlsConn {
                std::future::poll_fn(|cx| self.0.poll_accept(cx)).await
            }

            /// As `accept`, for a stream of connections.
            pub fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<TlsConn> {
                self.0.poll_accept(cx)
            }

            /// The refusals from now on; the first call gets them, later ones nothing. Unread ones are dropped
            /// beyond a bound.
            pub fn take_refusals(&mut self) -> Option<mpsc::Receiver<Refusal>> {
                self.0.refusals.take()
            }
        }
    };
}
pub(crate) use listener;

listener!(HostListener);
listener!(OperatorListener);

/// A listening socket and the task that shakes hands; both end when it is dropped.
#[derive(Debug)]
pub(crate) struct Listening {
    pub(crate) local_address: SocketAddr,
    pub(crate) refusals: Option<mpsc::Receiver<Refusal>>,
    ready: mpsc::Receiver<TlsConn>,
    task: JoinHandle<()>,
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Listening {
    pub(crate) async fn bind(
        address: SocketAddr,
        config: Arc<ServerConfig>,
        alpn: Option<&'static [u8]>,
    ) -> Result<Self, LinkError> {
        let failed = |source| LinkError::Bind { address: address.to_string(), source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let local_address = listener.local_addr().map_err(failed)?;
        let (ready_in, ready) = mpsc::channel(READY_LIMIT);
        let (refused_in, refusals) = mpsc::channel(REFUSAL_LIMIT);
        let door = Door { acceptor: config.into(), alpn, ready: ready_in, refused: refused_in };
        let task = tokio::spawn(accept_loop(listener, door));
        Ok(Self { local_address, refusals: Some(refusals), ready, task })
    }

    pub(crate) fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<TlsConn> {
        match self.ready.poll_recv(cx) {
            Poll::Ready(Some(connection)) => Poll::Ready(connection),
            // The task ends only with us; should it ever die, there is nobody to accept.
            Poll::Ready(None) | Poll::Pending => Poll::Pending,
        }
    }
}

#[derive(Clone)]
struct Door {
    acceptor: TlsAcceptor,
    alpn: Option<&'static [u8]>,
    ready: mpsc::Sender<TlsConn>,
    refused: mpsc::Sender<Refusal>,
}

async fn accept_loop(listener: TcpListener, door: Door) {
    let half_open = Arc::new(Semaphore::new(HALF_OPEN_LIMIT));
    let per_address = PerAddress::default();
    // Owned here, so that unfinished handshakes end with the listener.
    let mut handshakes = JoinSet::new();
    loop {
        let slot = half_open.clone().acquire_owned().await.expect("the semaphore is never closed");
        let (tcp, peer_address) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "accepting a connection failed");
                tokio::time::sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        while handshakes.try_join_next().is_some() {}
        let Some(place) = per_address.enter(peer_address.ip()) else {
            let detail =
                format!("more than {HALF_OPEN_PER_ADDRESS_LIMIT} handshakes at once from this address");
            door.refuse(peer_address, "link-too-many-half-open", detail);
            continue;
        };
        let door = door.clone();
        handshakes.spawn(async move {
            let shaken = door.shake(tcp, peer_address).await;
            drop(place);
            match shaken {
                // Holds its slot until it is accepted: a slow manager is not buried under ready connections.
                Ok(connection) => drop(door.ready.send(connection).await),
                Err(error) => door.refuse(peer_address, error.code(), chain(&error)),
            }
            drop(slot);
        });
    }
}

impl Door {
    async fn shake(&self, tcp: TcpStream, peer_address: SocketAddr) -> Result<TlsConn, LinkError> {
        let address = peer_address.to_string();
        let failed = |source| LinkError::handshake(peer_address.to_string(), source);
        tcp.set_nodelay(true).map_err(failed)?;
        let limit_ms = HANDSHAKE_TIMEOUT.as_millis();
        let shaken = tokio::time::timeout(HANDSHAKE_TIMEOUT, self.acceptor.accept(tcp)).await;
        let stream = shaken.map_err(|_| LinkError::Timeout { address, limit_ms })?.map_err(failed)?;
        let connection = TlsConn::new(TlsStream::Server(stream), peer_address);
        expect_protocol(&connection, self.alpn)?;
        Ok(connection)
    }

    fn refuse(&self, peer_address: SocketAddr, code: &'static str, detail: String) {
        tracing::debug!(%peer_address, code, detail, "connection refused");
        let refusal = Refusal { peer_address, code, detail };
        if self.refused.try_send(refusal).is_err() {
            tracing::trace!("too many refusals wait to be read; one is dropped");
        }
    }
}

/// ALPN is optional in TLS; where it separates protocols it is not.
pub(super) fn expect_protocol(connection: &TlsConn, alpn: Option<&[u8]>) -> Result<(), LinkError> {
    match alpn {
        Some(expected) if connection.protocol() != Some(expected) => Err(LinkError::WrongProtocol {
            address: connection.peer_address().to_string(),
            expected: String::from_utf8_lossy(expected).into_owned(),
        }),
        _ => Ok(()),
    }
}

fn chain(error: &LinkError) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

/// How many handshakes are under way from each address.
#[derive(Clone, Default)]
struct PerAddress(Arc<Mutex<HashMap<IpAddr, usize>>>);

struct Place {
    counts: PerAddress,
    address: IpAddr,
}

impl PerAddress {
    fn enter(&self, address: IpAddr) -> Option<Place> {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(address).or_default();
        if *count >= HALF_OPEN_PER_ADDRESS_LIMIT {
            return None;
        }
        *count += 1;
        Some(Place { counts: self.clone(), address })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.counts.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.address);
            }
        }
    }
}
