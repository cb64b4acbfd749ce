//! One host's session: orders out, replies in, and when it was last heard.

use crate::clock;
use api::fleet::{Holdings, Reply, ReportHoldings, ToHost, reply, to_host};
use permit::VerifyingKey;
use permit::checkpoint::Checkpoint;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use types::host::{Interface, Load};
use types::{Digest, ErrorCode, HostName, Problem, VmId};

/// Orders that wait for a slow host before it counts as unreachable.
pub(crate) const OUTBOX_ORDERS: usize = 256;
/// Replies awaited at once from one host.
const PENDING_LIMIT: usize = 256;
/// Heartbeats of an idle host.
pub(crate) const HEARTBEAT_IDLE_S: u32 = 10;
/// Heartbeats while it takes part in a migration.
pub(crate) const HEARTBEAT_MIGRATING_S: u32 = 1;
/// Three missed idle heartbeats, and a second for the road.
const SILENCE_LIMIT_US: i64 = (3 * HEARTBEAT_IDLE_S as i64 + 1) * 1_000_000;

/// Parts of what a host holds: 256 VMs each.
const HOLDINGS_PARTS_LIMIT: usize = 64;

/// A live session.
pub(crate) struct Session {
    /// Whose.
    pub(crate) host: HostName,
    /// From where.
    pub(crate) address: IpAddr,
    /// As reported in its hello.
    pub(crate) interfaces: Vec<Interface>,
    /// With which its daemon signs: the one of its record, which it showed in its hello.
    pub(crate) signing_key: VerifyingKey,
    /// BLAKE3 of the SubjectPublicKeyInfo with which it holds this connection: its platform's quotes are bound to it.
    pub(crate) key: Digest,
    outbox: mpsc::Sender<Result<ToHost, Status>>,
    pending: Mutex<BTreeMap<u64, oneshot::Sender<Reply>>>,
    next_id: AtomicU64,
    load: Mutex<Option<Load>>,
    /// The VMs of which the host holds a copy, as it last said.
    held: Mutex<BTreeSet<VmId>>,
    last_seen_us: AtomicI64,
    closed: CancellationToken,
    /// The checkpoint of the audit log that the host holds, as far as is known.
    checkpoint: Mutex<Option<Checkpoint>>,
    contradicted: AtomicBool,
    asking: Mutex<Option<Asking>>,
}

/// An answer that comes in parts.
struct Asking {
    ask: u64,
    parts: Vec<Holdings>,
    done: oneshot::Sender<Vec<Holdings>>,
}

impl Session {
    pub(crate) fn new(
        host: HostName,
        address: IpAddr,
        interfaces: Vec<Interface>,
        signing_key: VerifyingKey,
        key: Digest,
        outbox: mpsc::Sender<Result<ToHost, Status>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            host,
            address,
            interfaces,
            signing_key,
            key,
            outbox,
            pending: Mutex::default(),
            next_id: AtomicU64::new(1),
            load: Mutex::default(),
            held: Mutex::default(),
            last_seen_us: AtomicI64::new(clock::now_us()),
            closed: CancellationToken::new(),
            checkpoint: Mutex::default(),
            contradicted: AtomicBool::new(false),
            asking: Mutex::default(),
        })
    }

    fn pending(&self) -> MutexGuard<'_, BTreeMap<u64, oneshot::Sender<Reply>>> {
        self.pending.lock().expect("no holder of this lock can panic: it only moves values in a map")
    }

    /// Sends an order and waits for its reply.
    ///
    /// # Errors
    /// `host-unreachable` when it does not answer in time, or what the host says against it.
    pub(crate) async fn order(&self, body: to_host::Body, limit: Duration) -> Result<reply::Result, Problem> {
        let what = order_text(&body);
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        {
            let mut pending = self.pending();
            if pending.len() >= PENDING_LIMIT {
                return Err(self.unreachable(format!("owes {PENDING_LIMIT} replies already")));
            }
            pending.insert(id, sender);
        }
        let _forget = Forget { session: self, id };
        self.push(ToHost { id, body: Some(body) })?;
        let reply = tokio::select! {
            () = self.closed.cancelled() => return Err(self.unreachable(format!("disconnected during {what}"))),
            reply = tokio::time::timeout(limit, receiver) => reply,
        };
        let Ok(Ok(reply)) = reply else {
            return Err(self.unreachable(format!("did not answer {what} within {} ms", limit.as_millis())));
        };
        match reply.result {
            Some(reply::Result::Error(e)) => Err(problem_of(&self.host, e)),
            Some(result) => Ok(result),
            None => Err(Problem::new(ErrorCode::Internal, format!("host {} sent an empty reply", self.host))),
        }
    }

    /// Sends what needs no reply.
    ///
    /// # Errors
    /// `host-unreachable`.
    pub(crate) fn tell(&self, body: to_host::Body) -> Result<(), Problem> {
        self.push(ToHost { id: 0, body: Some(body) })
    }

    fn push(&self, message: ToHost) -> Result<(), Problem> {
        self.outbox.try_send(Ok(message)).map_err(|e| {
            if matches!(e, mpsc::error::TrySendError::Full(_)) {
                // It does not read: what it missed cannot be made up for in this session.
                self.close();
            }
            self.unreachable("does not take orders".to_owned())
        })
    }

    fn unreachable(&self, what: String) -> Problem {
        Problem::new(ErrorCode::HostUnreachable, format!("host {} {what}", self.host))
    }

    /// A reply came.
    pub(crate) fn answered(&self, reply: Reply) {
        let waiting = self.pending().remove(&reply.id);
        if let Some(sender) = waiting {
            // Whoever asked may have given up since.
            drop(sender.send(reply));
        }
    }

    /// Something came.
    pub(crate) fn heard(&self) {
        self.last_seen_us.store(clock::now_us(), Ordering::Relaxed);
    }

    /// When something last came.
    pub(crate) fn last_seen_us(&self) -> i64 {
        self.last_seen_us.load(Ordering::Relaxed)
    }

    /// Whether it missed three heartbeats.
    pub(crate) fn is_silent(&self, now_us: i64) -> bool {
        now_us.saturating_sub(self.last_seen_us()) > SILENCE_LIMIT_US
    }

    /// The load it last reported.
    pub(crate) fn load(&self) -> Option<Load> {
        self.load.lock().expect("no holder of this lock can panic: it only copies").clone()
    }

    /// Keeps a reported load, for views. Decisions ask anew.
    pub(crate) fn loaded(&self, load: Load) {
        *self.load.lock().expect("no holder of this lock can panic: it only copies") = Some(load);
    }

    fn held(&self) -> MutexGuard<'_, BTreeSet<VmId>> {
        self.held.lock().expect("no holder of this lock can panic: it only moves values in a set")
    }

    /// The host says that it holds a copy of a VM, running or not.
    pub(crate) fn holds(&self, vm: VmId) {
        self.held().insert(vm);
    }

    /// The host says that its copy of a VM is gone.
    pub(crate) fn holds_no_more(&self, vm: VmId) {
        self.held().remove(&vm);
    }

    /// Whether the host last said that it holds a copy of a VM.
    pub(crate) fn is_holding(&self, vm: VmId) -> bool {
        self.held().contains(&vm)
    }

    fn asking(&self) -> MutexGuard<'_, Option<Asking>> {
        self.asking.lock().expect("no holder of this lock can panic: it only moves values in a list")
    }

    /// Asks the host for everything that it holds. Of two who ask at once, the first is left without an answer.
    ///
    /// # Errors
    /// `host-unreachable`.
    pub(crate) async fn ask_holdings(&self, limit: Duration) -> Result<Vec<Holdings>, Problem> {
        let ask = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (done, answer) = oneshot::channel();
        *self.asking() = Some(Asking { ask, parts: Vec::new(), done });
        self.tell(to_host::Body::ReportHoldings(ReportHoldings { ask }))?;
        match tokio::time::timeout(limit, answer).await {
            Ok(Ok(parts)) => Ok(parts),
            _ => Err(self.unreachable("did not say what it holds".to_owned())),
        }
    }

    /// A part of the answer. One that is longer than any is dropped, and with it the question.
    pub(crate) fn told_holdings(&self, part: Holdings) {
        let mut asking = self.asking();
        let Some(mut open) = asking.take_if(|open| open.ask == part.ask) else { return };
        let last = part.last;
        open.parts.push(part);
        if last {
            // Whoever asked may have given up.
            open.done.send(open.parts).unwrap_or_default();
        } else if open.parts.len() < HOLDINGS_PARTS_LIMIT {
            *asking = Some(open);
        }
    }

    fn kept(&self) -> MutexGuard<'_, Option<Checkpoint>> {
        self.checkpoint.lock().expect("no holder of this lock can panic: it only moves a value")
    }

    /// The checkpoint that the host holds, as far as is known.
    pub(crate) fn checkpoint(&self) -> Option<Checkpoint> {
        self.kept().clone()
    }

    /// The host holds this one now.
    pub(crate) fn keeps_checkpoint(&self, checkpoint: Option<Checkpoint>) {
        *self.kept() = checkpoint;
    }

    /// Whether this is the first time that it says that a checkpoint contradicts what it holds.
    pub(crate) fn first_contradiction(&self) -> bool {
        !self.contradicted.swap(true, Ordering::Relaxed)
    }

    /// Ends the session.
    pub(crate) fn close(&self) {
        self.closed.cancel();
    }

    /// Resolves when the session is to end.
    pub(crate) async fn ended(&self) {
        self.closed.cancelled().await;
    }
}

struct Forget<'a> {
    session: &'a Session,
    id: u64,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.session.pending().remove(&self.id);
    }
}

fn problem_of(host: &HostName, error: api::fleet::Error) -> Problem {
    // A code that this version does not know must not be taken for a success, nor for a code of ours.
    let code = error.code.parse().unwrap_or(ErrorCode::Internal);
    let detail: String = error.detail.chars().take(1_000).collect();
    let problem = Problem::new(code, format!("host {host}: {detail}"));
    if error.hint.is_empty() {
        problem
    } else {
        problem.hint(error.hint.chars().take(1_000).collect::<String>())
    }
}

/// The name of an order, for messages.
pub(crate) fn order_text(body: &to_host::Body) -> &'static str {
    use to_host::Body as B;
    match body {
        B::Welcome(_) => "welcome",
        B::StartVm(_) => "start-vm",
        B::StopVm(_) => "stop-vm",
        B::Intent(_) => "intent",
        B::QueryLoad(_) => "query-load",
        B::SpawnAgent(_) => "spawn-agent",
        B::Prepare(_) => "prepare-target",
        B::Start(_) => "start-source",
        B::Commit(_) => "commit",
        B::Abort(_) => "abort",
        B::Release(_) => "release",
        B::Renounced(_) => "renounced",
        B::Renounce(_) => "renounce",
        B::Control(_) => "control",
        B::Forget(_) => "forget",
        B::StatementStored(_) => "statement-stored",
        B::Fenced(_) => "fenced",
        B::Void(_) => "void",
        B::Present(_) => "present",
        B::Decline(_) => "decline",
        B::InspectVm(_) => "inspect-vm",
        B::Quote(_) => "quote",
        B::DescribeHypervisor(_) => "describe-hypervisor",
        B::MicroProbe(_) => "micro-probe",
        B::Checkpoint(_) => "checkpoint",
        B::ReportHoldings(_) => "report-holdings",
    }
}
