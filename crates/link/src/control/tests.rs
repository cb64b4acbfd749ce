#![allow(clippy::unwrap_used)]
//! Who gets in, who is refused, and by which name.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use types::Name;

use super::*;
use crate::ca::{Ca, Subject};
use crate::identity::{IdentityKey, LiveIdentity, PeerIdentity, Role, TlsIdentity};
use crate::peer::{self, PeerListener};

const DAY: Duration = Duration::from_secs(24 * 3600);

struct World {
    ca: Ca,
    _folder: TempDir,
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ca = Ca::load_or_create(folder.path(), &"lab".parse().unwrap(), SystemTime::now()).unwrap();
        Self { ca, _folder: folder }
    }

    fn identity_at(&self, role: Role, name: &str, now: SystemTime) -> TlsIdentity {
        let name: Name = name.parse().unwrap();
        let key = IdentityKey::generate().unwrap();
        let subject = Subject { role, name: &name, addresses: &[], dns_names: &[] };
        let issued = self.ca.issue(&subject, &key.signing_request().unwrap(), now).unwrap();
        TlsIdentity::from_pem(&issued.chain_pem, &key.to_pem()).unwrap()
    }

    fn live(&self, role: Role, name: &str) -> LiveIdentity {
        LiveIdentity::new(self.identity_at(role, name, SystemTime::now()))
    }

    fn host(&self, name: &str) -> LiveIdentity {
        self.live(Role::Host, name)
    }

    async fn host_listener(&self, identity: LiveIdentity) -> (HostListener, String) {
        let listener = HostListener::bind(any_port(), identity, self.ca.certificate()).await.unwrap();
        let address = listener.local_address().to_string();
        (listener, address)
    }

    async fn manager(&self) -> (HostListener, String) {
        self.host_listener(self.live(Role::Manager, "m1")).await
    }
}

fn any_port() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

async fn echo(mut near: TlsConn, mut far: TlsConn) {
    near.write_all(b"over the wire").await.unwrap();
    near.flush().await.unwrap();
    let mut got = [0; 13];
    far.read_exact(&mut got).await.unwrap();
    assert_eq!(&got, b"over the wire");
}

/// A server's refusal of our certificate reaches us with the first read: TLS 1.3 lets the client finish first.
async fn refused_by_server(connected: Result<TlsConn, LinkError>) -> bool {
    match connected {
        Err(_) => true,
        Ok(mut connection) => !matches!(connection.read(&mut [0; 1]).await, Ok(1)),
    }
}

fn uri(connection: &TlsConn) -> Option<String> {
    connection.peer().map(PeerIdentity::uri)
}

#[tokio::test]
async fn a_host_and_the_manager_recognise_each_other() {
    let world = World::new();
    let (mut listener, address) = world.manager().await;
    let host = world.host("host-a");
    let near = connect_manager(&address, &host, world.ca.certificate()).await.unwrap();
    let far = listener.accept().await;
    assert_eq!(uri(&near).as_deref(), Some("spiffe://lab/manager/m1"));
    assert_eq!(uri(&far).as_deref(), Some("spiffe://lab/host/host-a"));
    assert_eq!(far.peer().unwrap().expect_host().unwrap().host.as_str(), "host-a");
    assert_eq!(near.peer_address(), listener.local_address());
    echo(near, far).await;
}

#[tokio::test]
async fn a_joining_host_pins_the_ca_by_its_fingerprint() {
    let world = World::new();
    let (mut listener, address) = world.manager().await;
    let (near, ca) = connect_pinned(&address, &world.ca.certificate().fingerprint()).await.unwrap();
    assert_eq!(&ca, world.ca.certificate());
    let far = listener.accept().await;
    assert_eq!(uri(&far), None, "it has no identity yet");
    echo(near, far).await;

    let refused = connect_pinned(&address, &[0; 32]).await.unwrap_err();
    assert_eq!(refused.code(), "link-bad-certificate");
    // Somebody who shows our CA's certificate but was not certified by it.
    let (impostor, key, name) = (World::new(), IdentityKey::generate().unwrap(), "m1".parse().unwrap());
    let subject = Subject::manager(&name, &[], &[]);
    let issued = impostor.ca.issue(&subject, &key.signing_request().unwrap(), SystemTime::now()).unwrap();
    let leaf = issued.chain_pem.strip_suffix(impostor.ca.certificate().pem()).unwrap();
    let chain = format!("{leaf}{}", world.ca.certificate().pem());
    let identity = LiveIdentity::new(TlsIdentity::from_pem(&chain, &key.to_pem()).unwrap());
    let (_listener, address) = impostor.host_listener(identity).await;
    let refused = connect_pinned(&address, &world.ca.certificate().fingerprint()).await.unwrap_err();
    assert_eq!(refused.code(), "link-bad-certificate");
}

#[tokio::test]
async fn only_hosts_of_our_ca_get_into_the_host_port() {
    let (world, stranger) = (World::new(), World::new());
    let (mut listener, address) = world.manager().await;
    let mut refusals = listener.take_refusals().unwrap();
    let expired = world.identity_at(Role::Host, "host-a", SystemTime::now() - 2 * DAY);
    let cases = [
        (stranger.host("host-a"), "link-bad-certificate"),
        (LiveIdentity::new(expired), "link-bad-certificate"),
        (world.live(Role::Operator, "ann"), "link-wrong-peer"),
        // A manager's certificate is not good for dialling at all.
        (world.live(Role::Manager, "m2"), "link-bad-certificate"),
    ];
    for (identity, code) in cases {
        let connected = connect_manager(&address, &identity, world.ca.certificate()).await;
        assert!(refused_by_server(connected).await, "{identity:?}");
        let refusal = refusals.recv().await.unwrap();
        assert_eq!(refusal.code, code, "{}", refusal.detail);
        assert!(refusal.peer_address.ip().is_loopback());
    }
    // And the listener still serves.
    let near = connect_manager(&address, &world.host("host-a"), world.ca.certificate()).await.unwrap();
    echo(near, listener.accept().await).await;
}

#[tokio::test]
async fn nobody_but_a_manager_of_our_ca_is_taken_for_the_manager() {
    let (world, stranger) = (World::new(), World::new());
    let host = world.host("host-a");
    let ca = world.ca.certificate();
    let (_listener, address) = world.host_listener(world.host("host-b")).await;
    assert_eq!(connect_manager(&address, &host, ca).await.unwrap_err().code(), "link-wrong-peer");
    let refused = connect_pinned(&address, &ca.fingerprint()).await.unwrap_err();
    assert_eq!(refused.code(), "link-wrong-peer");
    let (_listener, address) = stranger.manager().await;
    assert_eq!(connect_manager(&address, &host, ca).await.unwrap_err().code(), "link-bad-certificate");
    let expired = world.identity_at(Role::Manager, "m1", SystemTime::now() - 2 * DAY);
    let (_listener, address) = world.host_listener(LiveIdentity::new(expired)).await;
    assert_eq!(connect_manager(&address, &host, ca).await.unwrap_err().code(), "link-bad-certificate");
}

#[tokio::test]
async fn operators_reach_their_port_and_no_other() {
    let world = World::new();
    let mut operators = OperatorListener::bind(any_port(), world.live(Role::Manager, "m1")).await.unwrap();
    let address = operators.local_address().to_string();
    let ca = world.ca.certificate();
    let near = connect_operator(&address, ca).await.unwrap();
    echo(near, operators.accept().await).await;
    assert_eq!(
        connect_operator(&address, World::new().ca.certificate()).await.unwrap_err().code(),
        "link-bad-certificate"
    );
    let (_listener, hosts) = world.manager().await;
    assert_eq!(connect_operator(&hosts, ca).await.unwrap_err().code(), "link-wrong-protocol");
    let crossed = connect_manager(&address, &world.host("host-a"), ca).await.unwrap_err();
    assert_eq!(crossed.code(), "link-wrong-protocol");
}

#[tokio::test]
async fn an_identity_is_renewed_while_its_listener_runs() {
    let world = World::new();
    let expired = world.identity_at(Role::Manager, "m1", SystemTime::now() - 2 * DAY);
    let identity = LiveIdentity::new(expired);
    let (mut listener, address) = world.host_listener(identity.clone()).await;
    let host = world.host("host-a");
    assert!(identity.current().needs_renewal(SystemTime::now()));
    assert!(connect_manager(&address, &host, world.ca.certificate()).await.is_err());
    identity.replace(world.identity_at(Role::Manager, "m1", SystemTime::now())).unwrap();
    let near = connect_manager(&address, &host, world.ca.certificate()).await.unwrap();
    echo(near, listener.accept().await).await;
    assert!(identity.replace(world.identity_at(Role::Host, "m1", SystemTime::now())).is_err());
}

#[tokio::test]
async fn garbage_and_half_open_handshakes_are_bounded_and_reported() {
    let world = World::new();
    let (mut listener, address) = world.manager().await;
    let mut refusals = listener.take_refusals().unwrap();
    assert!(listener.take_refusals().is_none());
    let mut noise = TcpStream::connect(&address).await.unwrap();
    noise.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    assert_eq!(refusals.recv().await.unwrap().code, "link-handshake");

    let mut silent = Vec::new();
    for _ in 0..=HALF_OPEN_PER_ADDRESS_LIMIT {
        silent.push(TcpStream::connect(&address).await.unwrap());
    }
    assert_eq!(refusals.recv().await.unwrap().code, "link-too-many-half-open");
    // Another address of the same machine still gets in.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
    let mut other = socket.connect(listener.local_address()).await.unwrap();
    other.write_all(&[0; 16]).await.unwrap();
    assert_eq!(refusals.recv().await.unwrap().code, "link-handshake");
    // And the silent ones are cut off when their time is up, which makes room.
    for _ in 0..HALF_OPEN_PER_ADDRESS_LIMIT {
        assert_eq!(refusals.recv().await.unwrap().code, "link-timeout");
    }
    let near = connect_manager(&address, &world.host("host-a"), world.ca.certificate()).await.unwrap();
    echo(near, listener.accept().await).await;
}

#[tokio::test]
async fn an_occupied_or_silent_port_is_named() {
    let world = World::new();
    let (listener, address) = world.manager().await;
    let taken =
        HostListener::bind(listener.local_address(), world.live(Role::Manager, "m1"), world.ca.certificate());
    let error = taken.await.unwrap_err();
    assert_eq!((error.code(), error.error_code()), ("link-bind", types::ErrorCode::AddressInUse));
    drop(listener);
    // The port closes with its listener.
    loop {
        match connect_operator(&address, world.ca.certificate()).await {
            Err(error @ LinkError::Connect { .. }) => {
                assert_eq!(error.error_code(), types::ErrorCode::ManagerUnreachable);
                break;
            }
            _ => tokio::task::yield_now().await,
        }
    }
}

#[tokio::test]
async fn a_hand_over_s_port_lets_in_the_other_host_and_nobody_else() {
    let world = World::new();
    let ca = world.ca.certificate();
    let (a, b, c) = (world.host("host-a"), world.host("host-b"), world.host("host-c"));
    let (name_a, name_b): (Name, Name) = ("host-a".parse().unwrap(), "host-b".parse().unwrap());
    let mut listener = PeerListener::bind(any_port(), b, ca, &name_a).await.unwrap();
    let mut refusals = listener.take_refusals().unwrap();
    let address = listener.local_address();
    let near = peer::connect(address, &a, ca, &name_b).await.unwrap();
    let far = listener.accept().await;
    assert_eq!(uri(&near).as_deref(), Some("spiffe://lab/host/host-b"));
    assert_eq!(uri(&far).as_deref(), Some("spiffe://lab/host/host-a"));
    echo(near, far).await;

    assert!(refused_by_server(peer::connect(address, &c, ca, &name_b).await).await);
    assert_eq!(refusals.recv().await.unwrap().code, "link-wrong-peer");
    let refused = peer::connect(address, &a, ca, &"host-c".parse().unwrap()).await.unwrap_err();
    assert_eq!(refused.code(), "link-wrong-peer");
    assert_eq!(refusals.recv().await.unwrap().code, "link-refused-by-peer");
    // Without a certificate, or for another purpose.
    assert!(connect_pinned(&address.to_string(), &ca.fingerprint()).await.is_err());
    assert!(connect_manager(&address.to_string(), &a, ca).await.is_err());
}
