//! The target's shell.

use super::attempt::AttemptFile;
use super::hypervisor;
use super::incoming::Incoming;
use super::link::{AgentLink, channel_problem, next_of, tell_lost};
use super::timers::Timers;
use super::{
    Answer, Control, Crash, Input, Line, Machine, Mirror, PeerAnswer, Work, answer, ms_between, name_of,
    report,
};
use crate::agents::AgentGone;
use crate::channel;
use crate::daemon::{Daemon, IdleAgent, lock};
use crate::peer::PeerServer;
use crate::qmp::QmpError;
use crate::scanner::Scanner;
use crate::vms::instance::Instance;
use crate::vms::record::Phase;
use engine::handover::journal::{Entry, TargetEntry};
use engine::handover::target::{Effect, Event, Order, Outcome, Target};
use engine::handover::{TargetStatus, Verdict};
use serde_json::json;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};
use types::agent::{Descriptor, FromAgent, ToAgent};
use types::handover::{AbortReason, Statement};
use types::inventory::Inventory;
use types::permit::StreamFeatures;
use types::profile::InspectionProfile;
use types::vm::VmSpec;
use types::{ErrorCode, MigrationId, Problem};

/// A daemon that treats its machine as crashed starts again after this long: the disk may have room then.
const CRASH_PAUSE: Duration = Duration::from_secs(1);
/// Sources that ask at once: one, over a connection or two.
const ASKERS_MAX: usize = 8;
/// A guest that does nothing for this long after its resume is not called responsive.
const RESPONSIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// CPU time of vCPUs that counts as "it works again": more than the resume itself costs.
const RESPONSIVE_CPU_NS: u64 = 500_000;

/// What a fresh target needs to start.
#[derive(Debug)]
pub struct Setup {
    /// Its agent.
    pub agent: Option<IdleAgent>,
    /// The permit's token, hexadecimal.
    pub permit: String,
    /// The VM.
    pub spec: VmSpec,
    /// What its stream looks like.
    pub inventory: Inventory,
    /// What the permit lets the stream use.
    pub features: StreamFeatures,
    /// Only this peer may connect.
    pub source_address: IpAddr,
    /// How the stream is inspected; or why it will fail, when that is known: the permit is consumed all the same.
    pub profile: Result<InspectionProfile, Problem>,
    /// Told where the source connects to, or why not.
    pub prepared: oneshot::Sender<Result<Prepared, Problem>>,
}

/// Where the source connects to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prepared {
    /// Agents.
    pub data_address: SocketAddr,
    /// "Please renounce".
    pub peer_address: SocketAddr,
}

/// The shell of one target.
#[derive(Debug)]
pub struct TargetShell {
    daemon: Arc<Daemon>,
    machine: Target,
    instance: Option<Arc<Instance>>,
    setup: Option<Setup>,
    /// Its first effects, for as long as none of them is durable.
    opening: Vec<Effect>,
    ready: Option<(Prepared, oneshot::Sender<Result<Prepared, Problem>>)>,
    inbox: mpsc::Receiver<Input>,
    own_inbox: mpsc::WeakSender<Input>,
    mirror: Mirror,
    agent: Option<AgentLink>,
    scanner: Option<Scanner>,
    incoming: Option<Incoming>,
    peer: Option<mpsc::Receiver<std::io::Result<OwnedFd>>>,
    /// Connections of the source so far.
    peers: u16,
    strangers: Option<mpsc::Receiver<SocketAddr>>,
    accepting: Option<tokio::task::JoinHandle<()>>,
    server: Option<PeerServer>,
    askers: Vec<mpsc::Sender<PeerAnswer>>,
    timers: Timers,
    death_seen: bool,
}

enum Happened {
    Input(Input),
    Packet(Result<FromAgent, AgentGone>),
    Peer(std::io::Result<OwnedFd>),
    Stranger(SocketAddr),
    Timer(engine::handover::TimerKind),
    Died,
    Alone,
}

type Step = Result<Option<Event>, Crash>;

impl TargetShell {
    /// Of a machine that has just been made or recovered.
    #[must_use]
    pub fn new(
        daemon: Arc<Daemon>,
        machine: Target,
        instance: Option<Arc<Instance>>,
        setup: Option<Setup>,
        line: Line,
    ) -> Self {
        let Line { inbox, own: own_inbox, mirror } = line;
        Self {
            daemon,
            machine,
            instance,
            setup,
            opening: Vec::new(),
            ready: None,
            inbox,
            own_inbox,
            mirror,
            agent: None,
            scanner: None,
            incoming: None,
            peer: None,
            peers: 0,
            strangers: None,
            accepting: None,
            server: None,
            askers: Vec::new(),
            timers: Timers::default(),
            death_seen: false,
        }
    }

    fn migration(&self) -> MigrationId {
        self.machine.attempt().key.migration
    }

    fn show(&self) {
        *lock(&self.mirror) = Some(Machine::Target(self.machine.clone()));
    }

    /// Runs to the end of the hand-over.
    pub async fn run(mut self, effects: Vec<Effect>) {
        self.show();
        if self.setup.is_none() {
            self.serve_again().await;
        }
        self.opening.clone_from(&effects);
        let mut work = Work::new(effects);
        loop {
            if let Err(Crash(detail)) = self.drain(&mut work).await {
                tracing::error!(migration = %self.migration(), detail, "the hand-over's step failed; recovering");
                self.not_prepared(&Problem::new(ErrorCode::TargetFailed, detail));
                tokio::time::sleep(CRASH_PAUSE).await;
                work = Work::new(self.recover().await);
                continue;
            }
            if self.machine.outcome().is_some() && self.inbox.is_empty() {
                break;
            }
            let happened = self.happened().await;
            if matches!(happened, Happened::Alone) {
                break;
            }
            self.take(happened, &mut work).await;
        }
        self.close_agent().await;
        AttemptFile::remove(&self.daemon, self.migration());
    }

    async fn drain(&mut self, work: &mut Work<Effect, Event>) -> Result<(), Crash> {
        loop {
            if let Some(effect) = work.effects.pop_front() {
                let (name, began) = (name_of(&effect), Instant::now());
                work.events.extend(self.perform(effect).await?);
                tracing::debug!(migration = %self.migration(), effect = name, took_us = began.elapsed().as_micros());
            } else if let Some(event) = work.events.pop_front() {
                work.effects.extend(self.handle(event, None));
            } else {
                return Ok(());
            }
        }
    }

    fn handle(&mut self, event: Event, reply: Option<Answer>) -> Vec<Effect> {
        let before = self.machine.state_name();
        let name = format!("{event:?}");
        let reaction = self.machine.handle(event);
        self.show();
        if reaction.verdict != Verdict::Ignored {
            let (to, event) = (self.machine.state_name(), name.chars().take(120).collect::<String>());
            tracing::debug!(migration = %self.migration(), from = before, to, event, "target");
        }
        if let Verdict::Refused(refusal) = &reaction.verdict {
            tracing::warn!(migration = %self.migration(), %refusal, state = before, "event refused");
        }
        if let Some(reply) = reply {
            answer(&reaction.verdict, reply);
        }
        reaction.effects
    }

    async fn recover(&mut self) -> Vec<Effect> {
        let migration = self.migration();
        let entries = target_entries(&self.daemon, migration);
        let seen = hypervisor::target_seen(&self.daemon, migration, self.instance.as_deref()).await;
        match Target::recover(&entries, seen) {
            Ok((machine, effects)) => {
                self.machine = machine;
                self.show();
                effects
            }
            // Not even the nonce's use is durable, so nothing was started: the machine stands at its beginning. It is
            // begun again, and fails for want of what it was set up with, so that the registry hears of it.
            Err(_) if entries.is_empty() => self.opening.clone(),
            Err(error) => {
                tracing::error!(%migration, %error, "the hand-over cannot be recovered");
                Vec::new()
            }
        }
    }

    async fn happened(&mut self) -> Happened {
        let Self { inbox, agent, timers, instance, death_seen, peer, strangers, .. } = self;
        let died = async {
            match instance.as_ref().filter(|_| !*death_seen) {
                Some(instance) => instance.process().exited().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            packet = next_of(agent.as_mut()) => Happened::Packet(packet),
            input = inbox.recv() => input.map_or(Happened::Alone, Happened::Input),
            kind = timers.fired() => Happened::Timer(kind),
            Some(accepted) = recv(peer.as_mut()) => Happened::Peer(accepted),
            Some(from) = recv(strangers.as_mut()) => Happened::Stranger(from),
            () = died => Happened::Died,
        }
    }

    async fn take(&mut self, happened: Happened, work: &mut Work<Effect, Event>) {
        match happened {
            Happened::Input(input) => {
                let effects = self.input(input).await;
                work.effects.extend(effects);
            }
            Happened::Packet(Ok(packet)) => {
                let event = self.packet(packet).await;
                work.events.extend(event);
            }
            Happened::Packet(Err(gone)) => {
                tell_lost(&self.daemon, self.migration(), &gone);
                self.close_agent().await;
                work.events.push_back(Event::ChannelLost { detail: gone.to_string() });
            }
            Happened::Peer(accepted) => work.events.extend(self.peer_connected(accepted).await),
            Happened::Stranger(from) => self.tell_stranger(from),
            Happened::Timer(kind) => work.events.push_back(Event::Timer(kind)),
            Happened::Died => {
                self.death_seen = true;
                work.events.push_back(Event::QemuDied);
            }
            Happened::Alone => {}
        }
    }

    async fn input(&mut self, input: Input) -> Vec<Effect> {
        match input {
            Input::Target(key, order, reply) => self.handle(Event::Order { key, order }, Some(reply)),
            Input::Control(control, reply) => self.control(control, reply).await,
            Input::Asked(request, asker) => {
                self.askers.retain(|a| !a.is_closed());
                if self.askers.len() < ASKERS_MAX {
                    self.askers.push(asker);
                }
                self.handle(Event::Asked(request), None)
            }
            Input::ManagerContact => self.handle(Event::ManagerContact, None),
            Input::Source(_, _, reply) => {
                reply.send(Err(Problem::new(ErrorCode::WrongState, "this host is the target"))).ok();
                Vec::new()
            }
            Input::Renounced(_) | Input::TargetStatus(..) => Vec::new(),
        }
    }

    async fn control(&mut self, control: Control, reply: Answer) -> Vec<Effect> {
        let message = match control {
            Control::Suspend => ToAgent::Suspend,
            Control::Resume => ToAgent::Resume,
            Control::Throttle(bytes_per_second) => ToAgent::Throttle { bytes_per_second },
            Control::Terminate => {
                let reason =
                    AbortReason { code: ErrorCode::Terminated, detail: "terminated by order".to_owned() };
                let key = self.machine.attempt().key;
                return self.handle(Event::Order { key, order: Order::Abort { reason } }, Some(reply));
            }
        };
        if let Some(link) = &self.agent {
            // A lost agent is noticed by its own end.
            link.agent().send(&message).await.ok();
        }
        reply.send(Ok(())).ok();
        Vec::new()
    }

    async fn packet(&mut self, packet: FromAgent) -> Option<Event> {
        let migration = self.migration();
        match packet {
            FromAgent::Connected { channel } => {
                let detail = serde_json::to_value(&channel).unwrap_or_default();
                self.daemon.event(migration, "connected", detail);
                // Only now may anything reach QEMU: the peer has proved the key that the permit names (I3).
                let handle = self.incoming.as_mut()?.main()?;
                self.give_hypervisor(0, handle).await
            }
            FromAgent::HypervisorWanted { channel } => {
                let (incoming, instance) = (self.incoming.as_mut()?, self.instance.as_ref()?);
                match incoming.wanted(channel, instance.process()).await {
                    Ok(handle) => self.give_hypervisor(channel, handle).await,
                    Err(problem) => Some(Event::ChannelLost { detail: problem.to_string() }),
                }
            }
            FromAgent::Accepted { evidence, held_us, wire_bytes } => {
                let detail = json!({
                    "stream_bytes": evidence.stream_bytes, "held_us": held_us, "wire_bytes": wire_bytes,
                    "digest": evidence.digest,
                });
                self.daemon.event(migration, "accepted", detail);
                Some(Event::StreamAccepted(evidence))
            }
            FromAgent::Rejected { finding } => {
                let detail = serde_json::to_value(&*finding).unwrap_or_default();
                self.daemon.event(migration, "finding", detail);
                let text =
                    format!("{}: expected {}, found {}", finding.rule, finding.expected, finding.found);
                Some(Event::StreamRejected { detail: text })
            }
            FromAgent::Observed { finding } => {
                let detail = serde_json::to_value(&*finding).unwrap_or_default();
                self.daemon.event(migration, "finding", detail);
                None
            }
            FromAgent::Ended { what, detail, .. } => {
                self.daemon.event(migration, "ended", json!({"what": what, "detail": detail}));
                Some(Event::ChannelLost { detail })
            }
            _ => None,
        }
    }

    async fn give_hypervisor(&self, channel: u16, handle: OwnedFd) -> Option<Event> {
        let link = self.agent.as_ref()?;
        let sent = link.agent().attach(channel, Descriptor::Hypervisor, handle).await;
        sent.err().map(|gone| Event::ChannelLost { detail: gone.to_string() })
    }

    async fn peer_connected(&mut self, accepted: std::io::Result<OwnedFd>) -> Option<Event> {
        let channel = self.peers;
        self.peers += 1;
        let attached = match (accepted, &self.agent) {
            (Ok(handle), Some(link)) => {
                link.agent().attach(channel, Descriptor::Peer, handle).await.map_err(|e| e.to_string())
            }
            (Ok(_), None) => Err("the VM agent is gone".to_owned()),
            (Err(error), _) => Err(error.to_string()),
        };
        attached.err().map(|detail| Event::ChannelLost { detail })
    }

    fn tell_stranger(&self, from: SocketAddr) {
        let finding = json!({
            "rule": "stray-connection", "threat": "", "severity": "warning", "channel": 0, "offset": 0,
            "section": "data port", "expected": "a connection of the source's migration address",
            "found": from.to_string(), "response": "closed",
        });
        self.daemon.event(self.migration(), "finding", finding);
    }

    async fn perform(&mut self, effect: Effect) -> Step {
        match effect {
            Effect::Journal(entry) => {
                self.daemon.journal(Entry::Target(entry)).await.map_err(|e| Crash(e.to_string()))?;
                Ok(None)
            }
            Effect::PrepareQemu { paused } => Ok(Some(self.prepare(paused).await)),
            Effect::Ready => {
                self.tell_ready();
                Ok(None)
            }
            Effect::QueryQemu => match &self.instance {
                Some(instance) => Ok(Some(Event::QemuStatus(hypervisor::target_status(instance).await))),
                None => Ok(Some(Event::QemuDied)),
            },
            Effect::Cont => self.cont().await.map(Some),
            Effect::Announce => {
                self.announce().await;
                Ok(None)
            }
            Effect::Send(statement) => {
                self.send(&statement);
                Ok(None)
            }
            Effect::Answer(status) => {
                self.tell_askers(&PeerAnswer::Status(status));
                Ok(None)
            }
            Effect::KillQemu => self.kill().await.map(Some),
            Effect::CloseAgent => {
                self.close_agent().await;
                Ok(None)
            }
            Effect::SetTimer(kind, after_ms) => {
                self.timers.set(kind, after_ms);
                Ok(None)
            }
            Effect::ClearTimer(kind) => {
                self.timers.clear(kind);
                Ok(None)
            }
            Effect::Report(weight, text) => {
                report(&self.daemon, self.migration(), weight, &text);
                Ok(None)
            }
            Effect::Done(outcome) => {
                self.done(outcome);
                Ok(None)
            }
        }
    }

    async fn prepare(&mut self, paused: bool) -> Event {
        let Some(mut setup) = self.setup.take() else {
            return Event::PrepareFailed { detail: "this daemon was restarted".to_owned() };
        };
        let result = match (setup.profile.clone(), paused) {
            (Err(problem), _) => Err(problem),
            (Ok(_), false) => Err(Problem::new(ErrorCode::Internal, "a target is always started paused")),
            (Ok(profile), true) => self.open(&mut setup, profile).await,
        };
        match result {
            Ok((prepared, facts)) => {
                self.ready = Some((prepared, setup.prepared));
                Event::QemuPrepared(facts)
            }
            Err(problem) => {
                if let Some(idle) = setup.agent.take() {
                    idle.agent.end().await;
                }
                let detail = problem.to_string();
                // Whoever ordered it may be gone.
                setup.prepared.send(Err(problem)).ok();
                Event::PrepareFailed { detail }
            }
        }
    }

    /// QEMU paused and waiting, its agent armed, one port open for one address.
    async fn open(
        &mut self,
        setup: &mut Setup,
        profile: InspectionProfile,
    ) -> Result<(Prepared, engine::handover::QemuFacts), Problem> {
        let key = self.machine.attempt().key;
        let idle = setup
            .agent
            .take()
            .ok_or_else(|| Problem::new(ErrorCode::WrongState, "no VM agent was spawned for it"))?;
        let link = self.agent.insert(AgentLink::new(idle.agent));
        // QEMU starts while the agent is given what it needs; what was started is ended with the attempt.
        let (armed, started) = tokio::join!(
            arm(link, &self.daemon, setup, profile),
            self.daemon.vms.prepare(&setup.spec, &key, &setup.inventory)
        );
        self.instance = started.as_ref().ok().cloned();
        self.scanner = armed?;
        let instance = started?;
        let failed = |e: QmpError| Problem::new(ErrorCode::HypervisorFailed, e.to_string());
        let monitor = instance.monitor().await.map_err(failed)?;
        let socket = instance.paths().stream;
        let connections = setup.features.connections();
        hypervisor::configure_target(&monitor, &socket.display().to_string(), &setup.features)
            .await
            .map_err(failed)?;
        self.incoming = Some(Incoming::of(socket, connections, instance.process()).await?);
        let data_address = self.accept_from(setup.source_address, connections)?;
        let source = self.machine.attempt().source.clone();
        let server = PeerServer::bind(&self.daemon, &source, None, self.own_inbox.clone()).await?;
        let peer_address = server.address();
        self.server = Some(server);
        if let Some(mut file) = AttemptFile::load(&self.daemon, key.migration) {
            file.peer_address = Some(peer_address);
            file.save(&self.daemon).map_err(|e| e.problem())?;
        }
        Ok((Prepared { data_address, peer_address }, hypervisor::facts(&instance)))
    }

    fn accept_from(&mut self, source: IpAddr, connections: u16) -> Result<SocketAddr, Problem> {
        let (listener, address) = channel::listen(self.daemon.migration_address, self.daemon.data_ports)?;
        let (strangers_sender, strangers) = mpsc::channel(16);
        let (sender, peer) = mpsc::channel(1);
        self.strangers = Some(strangers);
        self.peer = Some(peer);
        let work = channel::accept_from(listener, (source, connections), sender, strangers_sender);
        self.accepting = Some(tokio::spawn(work));
        Ok(address)
    }

    /// After a restart: the way on which the source asks is opened again, at the address that it knows.
    async fn serve_again(&mut self) {
        let Some(file) = AttemptFile::load(&self.daemon, self.migration()) else { return };
        let (Some(address), source) = (file.peer_address, file.claims.source.host) else { return };
        match PeerServer::bind(&self.daemon, &source, Some(address), self.own_inbox.clone()).await {
            Ok(server) => self.server = Some(server),
            Err(problem) => tracing::warn!(%problem, "the source can only ask through the manager"),
        }
    }

    fn tell_ready(&mut self) {
        let Some((prepared, reply)) = self.ready.take() else { return };
        let detail = json!({"data_address": prepared.data_address.to_string()});
        self.daemon.event(self.migration(), "prepared", detail);
        reply.send(Ok(prepared)).ok();
    }

    fn not_prepared(&mut self, problem: &Problem) {
        let waiting = match self.setup.take() {
            Some(setup) => {
                if let Some(idle) = setup.agent {
                    tokio::spawn(async move { idle.agent.end().await });
                }
                Some(setup.prepared)
            }
            None => self.ready.take().map(|(_, reply)| reply),
        };
        if let Some(reply) = waiting {
            // Whoever ordered it may be gone.
            reply.send(Err(problem.clone())).ok();
        }
    }

    /// `cont`, of which the machine has made sure that it may be sent.
    async fn cont(&mut self) -> Result<Event, Crash> {
        let Some(instance) = self.instance.clone() else { return Ok(Event::QemuDied) };
        let unknown = |e: QmpError| Crash(format!("whether `cont` was executed is unknown: {e}"));
        let monitor = instance.monitor().await.map_err(unknown)?;
        match monitor.execute("cont", json!({})).await {
            Ok(_) => Ok(Event::ContDone),
            Err(QmpError::Refused { description, .. }) => {
                tracing::error!(migration = %self.migration(), description, "QEMU refused to continue the guest");
                let status = instance.status().await.map_err(unknown)?;
                Ok(Event::ContRefused { still_paused: status == "paused" })
            }
            Err(_) if !instance.process().is_alive() => Ok(Event::QemuDied),
            Err(error) => Err(unknown(error)),
        }
    }

    /// The other side first: its clock measures the downtime.
    async fn announce(&mut self) {
        let at = Instant::now();
        if let Some(link) = &self.agent {
            // A lost agent is noticed by its own end.
            link.agent().send(&ToAgent::AnnounceRunning).await.ok();
        }
        let Some(instance) = self.instance.clone() else { return };
        self.daemon.event(self.migration(), "running", json!({}));
        let epoch = self.machine.attempt().key.target_epoch;
        if let Err(error) = instance.change(Phase::Running, epoch) {
            // The journal holds RUN: a restart finds the VM running all the same.
            tracing::error!(error = crate::error::chain(&error), "the VM's record is not up to date");
        }
        if let Ok(monitor) = instance.monitor().await
            && let Err(error) = hypervisor::announce(&monitor).await
        {
            tracing::warn!(%error, "announce-self");
        }
        let (daemon, migration) = (self.daemon.clone(), self.migration());
        tokio::spawn(async move {
            if let Some(ms) = responsive_after(&instance, at).await {
                daemon.event(migration, "responsive", json!({"ms": ms, "basis": "vcpu-time"}));
            }
        });
    }

    fn send(&mut self, statement: &Statement) {
        let token = self.daemon.send_statement(statement);
        if let (Statement::Renounced(_), Some(token)) = (statement, token) {
            self.tell_askers(&PeerAnswer::Renounced(token));
        }
    }

    fn tell_askers(&mut self, said: &PeerAnswer) {
        // An asker that reads nothing, or is gone, asks again.
        self.askers.retain(|asker| asker.try_send(said.clone()).is_ok());
    }

    async fn kill(&mut self) -> Result<Event, Crash> {
        let instance = self.instance.clone().or_else(|| {
            let key = self.machine.attempt().key;
            self.daemon.vms.find(key.vm, key.target_epoch)
        });
        if let Some(instance) = instance {
            instance.kill().await.map_err(|e| Crash(crate::error::chain(&e)))?;
            self.death_seen = true;
        }
        Ok(Event::QemuDied)
    }

    async fn close_agent(&mut self) {
        self.stop_accepting();
        self.incoming = None;
        if let Some(setup) = self.setup.as_mut()
            && let Some(idle) = setup.agent.take()
        {
            idle.agent.end().await;
        }
        if let Some(link) = self.agent.take() {
            link.agent().end().await;
        }
        if let Some(scanner) = self.scanner.take() {
            scanner.end().await;
        }
    }

    fn stop_accepting(&mut self) {
        if let Some(task) = self.accepting.take() {
            task.abort();
        }
        self.peer = None;
        self.strangers = None;
    }

    fn done(&mut self, outcome: Outcome) {
        self.stop_accepting();
        tracing::info!(migration = %self.migration(), ?outcome, "target done");
    }
}

/// Has the agent take this host's catalogue of the VM's devices, then the permit, then its scanner where the permit
/// asks for signatures: an agent without it takes no peer.
async fn arm(
    link: &mut AgentLink,
    daemon: &Daemon,
    setup: &Setup,
    profile: InspectionProfile,
) -> Result<Option<Scanner>, Problem> {
    // It compiles its rules meanwhile.
    let (armed, scanner) = tokio::join!(give_permit(link, daemon, setup, profile), async {
        if profile.signatures.is_on() { daemon.scanners.spawn().await.map(Some) } else { Ok(None) }
    });
    let Some((scanner, socket, _)) = scanner? else { return armed.map(|()| None) };
    let attached = match armed {
        Ok(()) => link.agent().attach(0, Descriptor::Scanner, socket).await.map_err(channel_problem),
        Err(problem) => Err(problem),
    };
    if attached.is_err() {
        scanner.end().await;
    }
    attached.map(|()| Some(scanner))
}

async fn give_permit(
    link: &mut AgentLink,
    daemon: &Daemon,
    setup: &Setup,
    profile: InspectionProfile,
) -> Result<(), Problem> {
    match daemon.vms.shape(&setup.spec, &setup.inventory.machine).await {
        Ok(shape) => link.agent().attach_catalogue(&shape.catalogue).await?,
        Err(problem) if profile.report_unvouched => {
            tracing::warn!(%problem, "the permit lets devices through that nothing vouches for");
        }
        Err(problem) => return Err(problem),
    }
    link.arm(daemon, setup.permit.clone(), setup.inventory.clone()).await
}

impl Drop for TargetShell {
    fn drop(&mut self) {
        self.stop_accepting();
    }
}

/// From the resume until its vCPUs have used CPU time again.
async fn responsive_after(instance: &Instance, resumed: Instant) -> Option<f64> {
    let threads = vcpu_threads(instance).await?;
    let pid = instance.process().id().pid;
    let used = || threads.iter().map(|tid| cpu_ns(pid, *tid)).sum::<u64>();
    let before = used();
    while resumed.elapsed() < RESPONSIVE_TIMEOUT {
        if used() >= before.saturating_add(RESPONSIVE_CPU_NS) {
            return Some(ms_between(resumed, Instant::now()));
        }
        tokio::time::sleep(Duration::from_micros(500)).await;
    }
    None
}

async fn vcpu_threads(instance: &Instance) -> Option<Vec<u64>> {
    let cpus = instance.monitor().await.ok()?.execute("query-cpus-fast", json!({})).await.ok()?;
    Some(cpus.as_array()?.iter().filter_map(|cpu| cpu["thread-id"].as_u64()).collect())
}

fn cpu_ns(pid: u32, tid: u64) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{tid}/schedstat")).unwrap_or_default();
    text.split(' ').next().and_then(|ns| ns.parse().ok()).unwrap_or(0)
}

/// The journal's entries of a target.
#[must_use]
pub fn target_entries(daemon: &Daemon, migration: MigrationId) -> Vec<TargetEntry> {
    let store = lock(&daemon.journal);
    let targets = store.of(migration).iter().filter_map(|entry| match entry {
        Entry::Target(entry) => Some(entry.clone()),
        Entry::Source(_) => None,
    });
    targets.collect()
}

/// What a daemon without a record of an attempt says of it: no proof of anything.
#[must_use]
pub const fn no_record() -> PeerAnswer {
    PeerAnswer::Status(TargetStatus::NoRecord)
}

async fn recv<T>(receiver: Option<&mut mpsc::Receiver<T>>) -> Option<T> {
    match receiver {
        Some(receiver) => receiver.recv().await,
        None => std::future::pending().await,
    }
}
