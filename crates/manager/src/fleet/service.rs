//! The host protocol's server side: `Join` without a certificate, `Attach` with the host's own.

use super::{inbound, join};
use crate::checkpoints;
use crate::core::Manager;
use crate::fleet::Session;
use crate::fleet::session::{HEARTBEAT_IDLE_S, HEARTBEAT_MIGRATING_S, OUTBOX_ORDERS};
use crate::migration::gates;
use crate::vms;
use api::fleet::fleet_server::Fleet as FleetRpc;
use api::fleet::{
    ChallengeReply, ChallengeRequest, Hello, JoinReply, JoinRequest, PermitKey, ToHost, ToManager, Welcome,
    to_host, to_manager,
};
use futures::Stream;
use link::control::TlsConn;
use link::identity::PeerIdentity;
use registry::{Enrolment, HostRow};
use serde_json::json;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;
use tonic::{Request, Response, Status, Streaming};
use types::host::Interface;
use types::{Digest, ErrorCode, HostName, Nonce, Problem};

/// The hello follows the stream's opening at once.
const HELLO_LIMIT: Duration = Duration::from_secs(10);
/// Interfaces of one host that are looked at.
const INTERFACES_LIMIT: usize = 256;
/// Addresses of one interface that are looked at.
const ADDRESSES_LIMIT: usize = 64;

/// A connection of a host: bytes, and who is at the other end.
pub(crate) struct HostConnection(pub(crate) TlsConn);

/// Who is at the other end, as handlers see it.
#[derive(Debug, Clone)]
pub(crate) struct Caller {
    pub(crate) peer: Option<PeerIdentity>,
    pub(crate) address: SocketAddr,
    /// BLAKE3 of the SubjectPublicKeyInfo of its certificate.
    pub(crate) key: Option<Digest>,
}

impl Connected for HostConnection {
    type ConnectInfo = Caller;
    fn connect_info(&self) -> Caller {
        Caller { peer: self.0.peer().cloned(), address: self.0.peer_address(), key: self.0.peer_key() }
    }
}

impl AsyncRead for HostConnection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for HostConnection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// The service.
pub(crate) struct FleetService {
    pub(crate) manager: Arc<Manager>,
}

type ToHosts = Pin<Box<dyn Stream<Item = Result<ToHost, Status>> + Send>>;

#[tonic::async_trait]
impl FleetRpc for FleetService {
    type AttachStream = ToHosts;

    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinReply>, Status> {
        let caller = caller(&request)?;
        join::join(&self.manager, &caller, request.into_inner()).await.map(Response::new).map_err(status)
    }

    async fn challenge(
        &self,
        request: Request<ChallengeRequest>,
    ) -> Result<Response<ChallengeReply>, Status> {
        let caller = caller(&request)?;
        join::challenge(&self.manager, &caller, request.into_inner()).await.map(Response::new).map_err(status)
    }

    async fn attach(&self, request: Request<Streaming<ToManager>>) -> Result<Response<ToHosts>, Status> {
        let caller = caller(&request)?;
        let mut incoming = request.into_inner();
        let (session, orders, hello) = enter(&self.manager, &caller, &mut incoming).await.map_err(status)?;
        // From here on in a task of its own: a host that hangs up now cancels this call, and its session must not stay
        // behind with nobody who reads it to its end.
        self.manager.fleet.enter(Arc::clone(&session));
        let manager = Arc::clone(&self.manager);
        self.manager.tasks.spawn(async move {
            tracing::info!(host = %session.host, address = %session.address, "host attached");
            inbound::greeted(&manager, &session, hello).await;
            serve(manager, session, incoming).await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(orders))))
    }
}

fn caller<T>(request: &Request<T>) -> Result<Caller, Status> {
    let caller = request.extensions().get::<Caller>().cloned();
    caller.ok_or_else(|| Status::internal("the connection has no identity"))
}

/// A problem as a gRPC status: code and text in the message, as the host's log shows it.
fn status(problem: Problem) -> Status {
    let text = match &problem.hint {
        Some(hint) => format!("{problem} ({hint})"),
        None => problem.to_string(),
    };
    match problem.code {
        ErrorCode::Unauthenticated => Status::unauthenticated(text),
        ErrorCode::Forbidden | ErrorCode::HostMismatch | ErrorCode::AttestationFailed => {
            Status::permission_denied(text)
        }
        ErrorCode::UnknownHost => Status::not_found(text),
        ErrorCode::BadRequest => Status::invalid_argument(text),
        ErrorCode::RegistryUnavailable => Status::unavailable(text),
        _ => Status::failed_precondition(text),
    }
}

/// Interfaces as types, bounded; addresses that are none are dropped.
pub(super) fn interfaces(reported: &[api::fleet::Interface]) -> Vec<Interface> {
    let address = |text: &String| text.parse::<IpAddr>().ok();
    reported
        .iter()
        .take(INTERFACES_LIMIT)
        .map(|i| Interface {
            name: i.name.chars().take(64).collect(),
            mac: i.mac.chars().take(32).collect::<String>().to_ascii_lowercase(),
            addresses: i.addresses.iter().take(ADDRESSES_LIMIT).filter_map(address).collect(),
        })
        .collect()
}

/// Lets a host in: its certificate names it, and address, MACs, key and journal are those of its record.
async fn enter(
    manager: &Arc<Manager>,
    caller: &Caller,
    incoming: &mut Streaming<ToManager>,
) -> Result<(Arc<Session>, mpsc::Receiver<Result<ToHost, Status>>, Hello), Problem> {
    let peer = caller.peer.as_ref().and_then(|p| p.expect_host().ok());
    let host = peer.map(|p| p.host).ok_or_else(|| {
        Problem::new(ErrorCode::Unauthenticated, "attaching needs the certificate of a host")
    })?;
    let hello = hello(incoming).await?;
    let reported = interfaces(&hello.interfaces);
    let row = manager.registry.read("attach").await?.host(&host).await?;
    let row = row.ok_or_else(|| {
        manager.forgetful.met_stranger(&host);
        Problem::new(ErrorCode::UnknownHost, format!("no host is named {host}"))
    })?;
    if let Err(problem) = admissible(&row, caller, &hello, &reported) {
        let mut tx = manager.begin("refuse a host").await?;
        let detail =
            json!({ "code": problem.code, "detail": problem.detail, "address": caller.address.ip() });
        tx.audit(&format!("host/{host}"), "host.attach-refused", host.as_str(), detail).await?;
        tx.commit().await?;
        tracing::warn!(%host, code = %problem.code, "attach refused: {}", problem.detail);
        return Err(problem);
    }
    let (outbox, orders) = mpsc::channel(OUTBOX_ORDERS);
    let signing_key = permit::VerifyingKey::from_bytes(&hello.signing_key)
        .map_err(|e| Problem::new(ErrorCode::HostMismatch, format!("host {host}: {e}")))?;
    let key = caller.key.ok_or_else(|| {
        Problem::new(ErrorCode::Unauthenticated, "the certificate of the connection cannot be read")
    })?;
    let session = Session::new(host.clone(), caller.address.ip(), reported, signing_key, key, outbox);
    for vm in hello.vms.iter().take(vms::REPORTED_LIMIT).filter_map(|vm| vm.vm.parse().ok()) {
        session.holds(vm);
    }
    // Before anything is decided with it: it may know that the log was set back.
    session.keeps_checkpoint(checkpoints::shown(manager, &host, &hello.checkpoint).await?);
    session.tell(to_host::Body::Welcome(welcome(manager)))?;
    let mut tx = manager.begin("host attached").await?;
    tx.host_seen(&host, &hello.version.chars().take(64).collect::<String>(), &session.interfaces).await?;
    let detail = json!({ "address": session.address, "version": hello.version, "boot": hello.boot_id });
    tx.audit(&format!("host/{host}"), "host.attach", host.as_str(), detail).await?;
    tx.commit().await?;
    Ok((session, orders, hello))
}

async fn hello(incoming: &mut Streaming<ToManager>) -> Result<Hello, Problem> {
    let first = tokio::time::timeout(HELLO_LIMIT, incoming.message()).await;
    match first {
        Ok(Ok(Some(ToManager { body: Some(to_manager::Body::Hello(hello)) }))) => Ok(hello),
        _ => Err(Problem::new(ErrorCode::BadRequest, "the first message of a host must be its hello")),
    }
}

fn admissible(row: &HostRow, caller: &Caller, hello: &Hello, reported: &[Interface]) -> Result<(), Problem> {
    let name: &HostName = row.name();
    if row.state == Enrolment::Enrolled {
        return Err(Problem::new(ErrorCode::Forbidden, format!("host {name} has not joined")));
    }
    gates::matches_record(row, caller.address.ip(), reported)?;
    if row.signing_key.as_deref() != Some(&hello.signing_key[..]) {
        let detail = format!("host {name} shows another signing key than it joined with");
        return Err(Problem::new(ErrorCode::HostMismatch, detail));
    }
    // A replaced or restored journal has forgotten what the host promised: nothing that it says is proof any more.
    if row.journal.is_none() || hello.journal.parse::<Nonce>().ok() != row.journal {
        let detail = format!("host {name} has another journal than it joined with");
        return Err(Problem::new(ErrorCode::HostMismatch, detail).hint("enrol it again"));
    }
    Ok(())
}

fn welcome(manager: &Manager) -> Welcome {
    let (key_id, public_key) = manager.authority.permit_key();
    Welcome {
        manager: manager.config.name.to_string(),
        permit_keys: vec![PermitKey { key_id, public_key }],
        heartbeat_idle_s: HEARTBEAT_IDLE_S,
        heartbeat_migrating_s: HEARTBEAT_MIGRATING_S,
    }
}

/// Reads a session to its end, one message after the other.
async fn serve(manager: Arc<Manager>, session: Arc<Session>, mut incoming: Streaming<ToManager>) {
    let (news, backlog) = mpsc::channel(inbound::NEWS_BACKLOG_EVENTS);
    manager.tasks.spawn(inbound::take_news(Arc::clone(&manager), session.host.clone(), backlog));
    let silence = Duration::from_secs(u64::from(3 * HEARTBEAT_IDLE_S + 1));
    let why = loop {
        let message = tokio::select! {
            () = manager.shutdown.cancelled() => break "the manager ends".to_owned(),
            () = session.ended() => break "replaced, or does not read".to_owned(),
            message = tokio::time::timeout(silence, incoming.message()) => message,
        };
        match message {
            Ok(Ok(Some(message))) => {
                session.heard();
                inbound::message(&manager, &session, &news, message).await;
            }
            Ok(Ok(None)) => break "it closed the stream".to_owned(),
            Ok(Err(status)) => break status.message().to_owned(),
            Err(_) => break "three heartbeats missed".to_owned(),
        }
    };
    session.close();
    if manager.fleet.leave(&session) && !manager.shutdown.is_cancelled() {
        tracing::warn!(host = %session.host, "host lost: {why}");
        inbound::lost(&manager, &session.host, &why).await;
    }
}
