//! The source's shell.

use super::attempt::AttemptFile;
use super::hypervisor::{self, RunLog};
use super::link::{AgentLink, channel_problem, next_of, tell_lost};
use super::timers::Timers;
use super::{
    Answer, Control, Crash, Input, Line, Machine, Mirror, PeerAnswer, Work, answer, ms_between, name_of,
    report,
};
use crate::agents::AgentGone;
use crate::channel::{self, HypervisorListener};
use crate::daemon::IdleAgent;
use crate::daemon::{Daemon, lock};
use crate::qmp::{Events, Heard, Qmp};
use crate::vms::instance::Instance;
use crate::vms::record::Phase;
use engine::handover::journal::{Entry, SourceEntry};
use engine::handover::source::{Effect, Event, Order, Outcome, Source};
use engine::handover::{QemuFacts, RenunciationProof, Verdict};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};
use types::agent::{Descriptor, FromAgent, ToAgent};
use types::handover::{AbortReason, PriorRunState, Statement};
use types::inventory::Inventory;
use types::permit::StreamFeatures;
use types::{Epoch, ErrorCode, MigrationId, Nonce, Problem};

/// The two agents shake hands in milliseconds; the target's may wait for its own daemon.
const CONNECTED_TIMEOUT: Duration = Duration::from_secs(6);
/// The agent proves at once; it gives up on its own a second after the end of the stream.
const PROOF_TIMEOUT: Duration = Duration::from_millis(800);
/// People watch the progress; QEMU's monitor has other things to do.
const PROGRESS_PERIOD: Duration = Duration::from_millis(150);
/// A daemon that treats its machine as crashed starts again after this long: the disk may have room then.
const CRASH_PAUSE: Duration = Duration::from_secs(1);

/// What a fresh source needs to start.
#[derive(Debug)]
pub struct Setup {
    /// Its agent, armed with nothing yet.
    pub agent: IdleAgent,
    /// The permit's token, hexadecimal.
    pub permit: String,
    /// What the stream looks like.
    pub inventory: Inventory,
    /// What the permit lets it use.
    pub features: StreamFeatures,
    /// The target's data port.
    pub data_address: SocketAddr,
    /// Told how the start went.
    pub started: oneshot::Sender<Result<(), Problem>>,
}

/// The shell of one source.
#[derive(Debug)]
pub struct SourceShell {
    daemon: Arc<Daemon>,
    machine: Source,
    instance: Option<Arc<Instance>>,
    setup: Option<Setup>,
    /// Its first effects, for as long as none of them is durable.
    opening: Vec<Effect>,
    inbox: mpsc::Receiver<Input>,
    own_inbox: mpsc::WeakSender<Input>,
    mirror: Mirror,
    agent: Option<AgentLink>,
    monitor: Option<Qmp>,
    events: Option<Events>,
    run_log: RunLog,
    timers: Timers,
    progress: mpsc::Receiver<Value>,
    progress_sender: mpsc::Sender<Value>,
    counters: (u64, u64),
    death_seen: bool,
    marks: Marks,
}

/// Moments of the switchover, for the downtime and its parts.
#[derive(Debug, Default)]
struct Marks {
    stopped: Option<Instant>,
    end_of_stream: Option<Instant>,
    voted: Option<Instant>,
}

/// Something happened.
enum Happened {
    Input(Input),
    Heard(Heard),
    Packet(Result<FromAgent, AgentGone>),
    Timer(engine::handover::TimerKind),
    Progress(Value),
    Died,
    /// The daemon is going down.
    Alone,
}

type Step = Result<Option<Event>, Crash>;

impl SourceShell {
    /// Of a machine that has just been made or recovered.
    #[must_use]
    pub fn new(
        daemon: Arc<Daemon>,
        machine: Source,
        instance: Option<Arc<Instance>>,
        setup: Option<Setup>,
        line: Line,
    ) -> Self {
        let Line { inbox, own: own_inbox, mirror } = line;
        let (progress_sender, progress) = mpsc::channel(1);
        Self {
            daemon,
            machine,
            instance,
            setup,
            opening: Vec::new(),
            inbox,
            own_inbox,
            mirror,
            agent: None,
            monitor: None,
            events: None,
            run_log: RunLog::default(),
            timers: Timers::default(),
            progress,
            progress_sender,
            counters: (0, 0),
            death_seen: false,
            marks: Marks::default(),
        }
    }

    fn migration(&self) -> MigrationId {
        self.machine.attempt().key.migration
    }

    fn show(&self) {
        *lock(&self.mirror) = Some(Machine::Source(self.machine.clone()));
    }

    /// Runs to the end of the hand-over.
    pub async fn run(mut self, effects: Vec<Effect>) {
        self.show();
        self.opening.clone_from(&effects);
        let mut work = Work::new(effects);
        loop {
            if let Err(Crash(detail)) = self.drain(&mut work).await {
                tracing::error!(migration = %self.migration(), detail, "the hand-over's step failed; recovering");
                tokio::time::sleep(CRASH_PAUSE).await;
                work = Work::new(self.recover());
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

    /// Effects one after the other; then the events that they brought; until there is nothing left.
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
            tracing::debug!(migration = %self.migration(), from = before, to, event, "source");
        }
        if let Verdict::Refused(refusal) = &reaction.verdict {
            tracing::warn!(migration = %self.migration(), %refusal, state = before, "event refused");
        }
        if let Some(reply) = reply {
            answer(&reaction.verdict, reply);
        }
        reaction.effects
    }

    /// What a restarted daemon does.
    fn recover(&mut self) -> Vec<Effect> {
        let migration = self.migration();
        let entries: Vec<SourceEntry> = source_entries(&self.daemon, migration);
        let seen = hypervisor::source_seen(&self.daemon, migration, self.instance.as_deref());
        match Source::recover(&entries, seen) {
            Ok((machine, effects)) => {
                self.machine = machine;
                self.show();
                effects
            }
            // Nothing is durable yet, so nothing was done: the machine stands at its beginning. It is begun again, and
            // fails for want of what it was set up with, so that the registry hears of it.
            Err(_) if entries.is_empty() => {
                if let Some(setup) = self.setup.take() {
                    tokio::spawn(async move { setup.agent.agent.end().await });
                }
                self.opening.clone()
            }
            Err(error) => {
                tracing::error!(%migration, %error, "the hand-over cannot be recovered");
                Vec::new()
            }
        }
    }

    async fn happened(&mut self) -> Happened {
        let Self { inbox, events, agent, timers, progress, instance, death_seen, .. } = self;
        let died = async {
            match instance.as_ref().filter(|_| !*death_seen) {
                Some(instance) => instance.process().exited().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            heard = next_heard(events.as_mut()) => Happened::Heard(heard),
            packet = next_of(agent.as_mut()) => Happened::Packet(packet),
            input = inbox.recv() => input.map_or(Happened::Alone, Happened::Input),
            kind = timers.fired() => Happened::Timer(kind),
            Some(value) = progress.recv() => Happened::Progress(value),
            () = died => Happened::Died,
        }
    }

    async fn take(&mut self, happened: Happened, work: &mut Work<Effect, Event>) {
        match happened {
            Happened::Input(input) => {
                let effects = self.input(input).await;
                work.effects.extend(effects);
            }
            Happened::Heard(heard) => work.events.extend(self.heard(&heard)),
            Happened::Packet(Ok(packet)) => work.events.extend(self.packet(packet)),
            Happened::Packet(Err(gone)) => {
                self.agent_lost(&gone).await;
                work.events.push_back(Event::ChannelLost { detail: gone.to_string() });
            }
            Happened::Timer(kind) => work.events.push_back(Event::Timer(kind)),
            Happened::Progress(migration) => self.tell_progress(&migration),
            Happened::Died => {
                self.death_seen = true;
                work.events.push_back(Event::QemuDied);
            }
            Happened::Alone => {}
        }
    }

    async fn input(&mut self, input: Input) -> Vec<Effect> {
        match input {
            Input::Source(key, order, reply) => self.handle(Event::Order { key, order }, Some(reply)),
            Input::Control(control, reply) => self.control(control, reply).await,
            Input::Renounced(proof) => self.handle(Event::Renounced(proof), None),
            Input::TargetStatus(key, status) => self.handle(Event::TargetStatus { key, status }, None),
            Input::ManagerContact => self.handle(Event::ManagerContact, None),
            Input::Target(_, _, reply) => {
                reply.send(Err(Problem::new(ErrorCode::WrongState, "this host is the source"))).ok();
                Vec::new()
            }
            Input::Asked(..) => Vec::new(),
        }
    }

    async fn control(&mut self, control: Control, reply: Answer) -> Vec<Effect> {
        let key = self.machine.attempt().key;
        let order = match control {
            Control::Suspend => Order::Suspend,
            Control::Resume => Order::Resume,
            Control::Terminate => {
                let reason =
                    AbortReason { code: ErrorCode::Terminated, detail: "terminated by order".to_owned() };
                Order::Abort { reason }
            }
            Control::Throttle(bytes_per_second) => {
                if let Some(link) = &self.agent {
                    link.agent().send(&ToAgent::Throttle { bytes_per_second }).await.ok();
                }
                reply.send(Ok(())).ok();
                return Vec::new();
            }
        };
        self.handle(Event::Order { key, order }, Some(reply))
    }

    fn heard(&mut self, heard: &Heard) -> Option<Event> {
        self.run_log.hear(heard);
        match heard {
            Heard::Event(event) => match event.name.as_str() {
                "STOP" => {
                    self.stopped(event.at);
                    Some(Event::GuestStopped)
                }
                "RESUME" => {
                    self.marks = Marks::default();
                    Some(Event::GuestResumed)
                }
                "MIGRATION" => match event.data["status"].as_str() {
                    Some(status @ ("failed" | "cancelled")) => {
                        Some(Event::MigrationFailed { detail: format!("QEMU's migration ended as {status}") })
                    }
                    _ => None,
                },
                _ => None,
            },
            Heard::Lost => None,
            Heard::Closed => {
                self.events = None;
                None
            }
        }
    }

    /// The downtime begins.
    fn stopped(&mut self, at: Instant) {
        if self.marks.stopped.is_none() {
            self.marks.stopped = Some(at);
            self.daemon.event(self.migration(), "stopped", json!({}));
        }
    }

    fn packet(&mut self, packet: FromAgent) -> Option<Event> {
        let migration = self.migration();
        match packet {
            FromAgent::Progress { stream_bytes, wire_bytes, .. } => {
                self.counters = (stream_bytes, wire_bytes);
                None
            }
            FromAgent::EndOfStream { evidence, idle_us } => {
                self.marks.end_of_stream = Some(Instant::now());
                let detail = json!({"stream_bytes": evidence.stream_bytes, "idle_us": idle_us});
                self.daemon.event(migration, "end-of-stream", detail);
                Some(Event::EndOfStream(evidence))
            }
            FromAgent::PeerRunning { round_trip_us } => {
                self.tell_downtime(round_trip_us);
                None
            }
            FromAgent::Rejected { finding } => {
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

    async fn agent_lost(&mut self, gone: &AgentGone) {
        if let Some(link) = self.agent.take() {
            tracing::warn!(migration = %self.migration(), %gone, "agent");
            tell_lost(&self.daemon, self.migration(), gone);
            link.agent().end().await;
        }
    }

    #[allow(clippy::cast_precision_loss)]
    fn tell_downtime(&mut self, round_trip_us: u64) {
        let (Some(stopped), now) = (self.marks.stopped, Instant::now()) else { return };
        let back_ms = round_trip_us as f64 / 2000.0;
        let end = self.marks.end_of_stream.unwrap_or(stopped).max(stopped);
        let voted = self.marks.voted.unwrap_or(end).max(end);
        let part = |name: &str, ms: f64| json!({"name": name, "duration_ms": ms});
        let detail = json!({
            "downtime_ms": ms_between(stopped, now) - back_ms,
            "round_trip_us": round_trip_us,
            "parts": [
                part("device-state", ms_between(stopped, end)),
                part("freeze-and-prove", ms_between(end, voted)),
                part("commit-and-run", ms_between(voted, now) - back_ms),
            ],
        });
        self.daemon.event(self.migration(), "peer-running", detail);
    }

    fn tell_progress(&self, migration: &Value) {
        let detail = hypervisor::progress(migration, self.counters.0, self.counters.1);
        self.daemon.event(self.migration(), "progress", detail);
    }

    async fn perform(&mut self, effect: Effect) -> Step {
        match effect {
            Effect::Journal(entry) => self.journal(entry).await,
            Effect::StartMigration => Ok(self.start_migration().await),
            Effect::SuspendRelay => Ok(self.relay(&ToAgent::Suspend, "suspended").await),
            Effect::ResumeRelay => Ok(self.relay(&ToAgent::Resume, "resumed").await),
            Effect::Freeze => Ok(Some(self.freeze().await)),
            Effect::Prove { prior } => Ok(Some(self.prove(prior).await)),
            Effect::TellAgentFrozen => {
                if let Some(link) = &self.agent {
                    // A lost agent is noticed by its own end.
                    link.agent().send(&ToAgent::Frozen).await.ok();
                }
                Ok(None)
            }
            Effect::Send(statement) => {
                self.send(&statement);
                Ok(None)
            }
            Effect::Present(proof) => {
                self.daemon.present(&proof.token);
                Ok(None)
            }
            Effect::AskRenounce(statement) => {
                self.ask_renounce(&statement);
                Ok(None)
            }
            Effect::CloseAgent => {
                self.close_agent().await;
                Ok(None)
            }
            Effect::Thaw => self.thaw().await,
            Effect::YankOrCancel { prior } => Ok(self.yank_or_cancel(prior).await),
            Effect::KillFrozenQemu(facts) => Ok(Some(self.kill_frozen(&facts).await)),
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
            Effect::Done(outcome) => self.done(outcome),
        }
    }

    async fn journal(&mut self, entry: SourceEntry) -> Step {
        self.daemon.journal(Entry::Source(entry)).await.map_err(|e| Crash(e.to_string()))?;
        Ok(None)
    }

    fn send(&mut self, statement: &Statement) {
        let migration = self.migration();
        match statement {
            Statement::Frozen(_) if self.marks.voted.is_none() => {
                self.marks.voted = Some(Instant::now());
                self.daemon.event(migration, "frozen", json!({}));
            }
            Statement::NoVote(no) => {
                let detail = json!({"code": no.reason.code, "detail": no.reason.detail});
                self.daemon.event(migration, "failed", detail);
            }
            Statement::Released(_) => self.daemon.event(migration, "released", json!({})),
            Statement::Thawed(_) => self.daemon.event(migration, "thawed", json!({})),
            _ => {}
        }
        self.daemon.send_statement(statement);
    }

    /// Arms the agent, connects it to the target's, and has QEMU migrate into it. Nothing leaves QEMU before the
    /// target's agent has proved its key (I3).
    async fn start_migration(&mut self) -> Option<Event> {
        let Some(setup) = self.setup.take() else {
            return Some(Event::MigrationFailed { detail: "this daemon was restarted".to_owned() });
        };
        let result = self.connect_and_migrate(&setup).await;
        let event =
            result.as_ref().err().map(|problem| Event::MigrationFailed { detail: problem.to_string() });
        setup.started.send(result).ok();
        event
    }

    async fn connect_and_migrate(&mut self, setup: &Setup) -> Result<(), Problem> {
        let link = self.agent.insert(AgentLink::new(setup.agent.agent.clone()));
        link.arm(&self.daemon, setup.permit.clone(), setup.inventory.clone()).await?;
        // One after the other: the target numbers them as they come.
        for channel in 0..setup.features.connections() {
            let peer = channel::connect(self.daemon.migration_address, setup.data_address).await?;
            link.agent().attach(channel, Descriptor::Peer, peer).await.map_err(channel_problem)?;
        }
        let connected = link
            .await_packet(CONNECTED_TIMEOUT, |packet| match packet {
                FromAgent::Connected { channel } => Some(Ok(channel.clone())),
                FromAgent::Ended { detail, .. } => {
                    Some(Err(Problem::new(ErrorCode::ChannelFailed, detail.clone())))
                }
                _ => None,
            })
            .await
            .map_err(channel_problem)??;
        let migration = self.machine.attempt().key.migration;
        self.daemon.event(migration, "connected", serde_json::to_value(&connected).unwrap_or_default());
        self.migrate(&setup.features).await
    }

    async fn migrate(&mut self, features: &StreamFeatures) -> Result<(), Problem> {
        let gone = || Problem::new(ErrorCode::HypervisorFailed, "QEMU is gone");
        let failed = |e: crate::qmp::QmpError| Problem::new(ErrorCode::HypervisorFailed, e.to_string());
        let instance = self.instance.clone().ok_or_else(gone)?;
        let monitor = instance.monitor().await.map_err(failed)?;
        // Before `migrate`: not one STOP or RESUME may be missed.
        self.events = Some(monitor.events());
        self.monitor = Some(monitor.clone());
        hypervisor::configure_source(&monitor, features).await.map_err(failed)?;
        let path = instance.paths().stream;
        let listener = HypervisorListener::bind(&path)?;
        let uri = format!("unix:{}", path.display());
        hypervisor::start(&monitor, &uri).await.map_err(failed)?;
        // The main connection is the first; QEMU opens the others when that one stands.
        let streams = listener.accept_all(instance.process(), features.connections()).await;
        crate::folders::remove_file(&path);
        let link = self.agent.as_ref().ok_or_else(gone)?;
        for (channel, stream) in (0u16..).zip(streams?) {
            link.agent().attach(channel, Descriptor::Hypervisor, stream).await.map_err(channel_problem)?;
        }
        self.watch_progress(&instance);
        Ok(())
    }

    /// In its own task: a stalled `device` state blocks the monitor, and must not block the shell.
    fn watch_progress(&self, instance: &Arc<Instance>) {
        let (instance, sender) = (Arc::downgrade(instance), self.progress_sender.downgrade());
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(PROGRESS_PERIOD).await;
                let (Some(instance), Some(sender)) = (instance.upgrade(), sender.upgrade()) else { return };
                // A frozen QEMU does not answer, and a reconnection to it would hang.
                if instance.freezer().is_frozen() || !instance.process().is_alive() {
                    return;
                }
                let Ok(migration) = instance.migration().await else { return };
                let over = !matches!(migration["status"].as_str(), Some("setup" | "active" | "device"));
                if over || sender.send(migration).await.is_err() {
                    return;
                }
            }
        });
    }

    async fn relay(&mut self, order: &ToAgent, kind: &str) -> Option<Event> {
        let sent = match &self.agent {
            Some(link) => link.agent().send(order).await,
            None => Err(AgentGone::new("there is none")),
        };
        match sent {
            Ok(()) => {
                self.daemon.event(self.migration(), kind, json!({}));
                None
            }
            Err(gone) => Some(Event::ChannelLost { detail: gone.to_string() }),
        }
    }

    async fn freeze(&mut self) -> Event {
        let Some(instance) = &self.instance else {
            return Event::FreezeFailed { detail: "QEMU is gone".to_owned() };
        };
        match instance.freezer().freeze().await {
            Ok(()) => Event::FreezeConfirmed,
            Err(error) => Event::FreezeFailed { detail: crate::error::chain(&error) },
        }
    }

    async fn prove(&mut self, prior: PriorRunState) -> Event {
        match self.proof(prior).await {
            Ok(()) => Event::ProofOk,
            Err(detail) => Event::ProofFailed { detail },
        }
    }

    async fn proof(&mut self, prior: PriorRunState) -> Result<(), String> {
        if !self.instance.as_ref().is_some_and(|i| i.freezer().is_frozen()) {
            return Err("QEMU is not frozen".to_owned());
        }
        let nonce = fresh_nonce().map_err(|e| e.to_string())?;
        let link = self.agent.as_mut().ok_or("the VM agent is gone")?;
        link.agent().send(&ToAgent::Prove { nonce }).await.map_err(|e| e.to_string())?;
        link.await_packet(PROOF_TIMEOUT, |packet| match packet {
            FromAgent::Proven { nonce: echoed } if *echoed == nonce => Some(Ok(())),
            FromAgent::NotProven { nonce: echoed, detail } if *echoed == nonce => Some(Err(detail.clone())),
            FromAgent::Ended { detail, .. } => Some(Err(detail.clone())),
            _ => None,
        })
        .await
        .map_err(|e| e.to_string())??;
        // What QEMU had said before the freeze is in the socket; it can say no more.
        let monitor = self.monitor.as_ref().ok_or("there is no monitor")?;
        monitor.drained().await.map_err(|e| e.to_string())?;
        while let Some(heard) = self.events.as_mut().and_then(Events::ready) {
            if let Heard::Event(event) = &heard
                && event.name == "STOP"
            {
                self.stopped(event.at);
            }
            self.run_log.hear(&heard);
        }
        self.run_log.proves_stopped(prior)
    }

    async fn thaw(&mut self) -> Step {
        let Some(instance) = self.instance.as_ref().filter(|i| i.process().is_alive()) else {
            return Ok(None);
        };
        instance.freezer().thaw().await.map_err(|e| Crash(crate::error::chain(&e)))?;
        Ok(None)
    }

    async fn yank_or_cancel(&mut self, prior: PriorRunState) -> Option<Event> {
        let instance = self.instance.as_ref().filter(|i| i.process().is_alive())?;
        match hypervisor::yank_or_cancel(instance, prior).await {
            Ok(()) => Some(Event::Cancelled),
            Err(error) => {
                // The machine asks again.
                tracing::warn!(migration = %self.migration(), error = crate::error::chain(&error), "cancel");
                None
            }
        }
    }

    /// RELEASE acts only on exactly the journalled process, and only on a frozen one.
    async fn kill_frozen(&mut self, facts: &QemuFacts) -> Event {
        let refused = |detail: &str| Event::KillRefused { detail: detail.to_owned() };
        let Some(instance) = &self.instance else { return Event::QemuDied };
        if !instance.process().is_alive() {
            return Event::QemuDied;
        }
        if hypervisor::facts(instance) != *facts {
            return refused("the process at hand is not the journalled one");
        }
        if !instance.freezer().is_frozen() {
            return refused("the process to be destroyed is not frozen");
        }
        match instance.kill().await {
            Ok(()) => Event::QemuDied,
            Err(error) => refused(&crate::error::chain(&error)),
        }
    }

    /// Directly, and through the manager.
    /// Only who holds its frozen QEMU at this moment may ask: a renunciation on the word of a source whose copy is gone
    /// would leave none (H7).
    fn ask_renounce(&self, statement: &Statement) {
        let holds = |i: &Arc<Instance>| i.process().is_alive() && i.freezer().is_frozen();
        if !self.instance.as_ref().is_some_and(holds) {
            tracing::error!(migration = %self.migration(), "the frozen QEMU is gone; nothing is asked of the target");
            return;
        }
        let Ok(request) = permit::statement::sign(&self.daemon.key, statement) else { return };
        let key = self.machine.attempt().key;
        self.daemon.ask_renounce(&key, request.as_bytes());
        let Some(file) = AttemptFile::load(&self.daemon, key.migration) else { return };
        let (daemon, inbox) = (self.daemon.clone(), self.own_inbox.clone());
        let token = request.as_bytes().to_vec();
        tokio::spawn(async move {
            let answers = crate::peer::ask(&daemon, &file, token).await;
            let Some(inbox) = inbox.upgrade() else { return };
            for said in answers {
                let input = match said {
                    PeerAnswer::Renounced(token) => match verify_renunciation(&file, token) {
                        Some(proof) => Input::Renounced(proof),
                        None => continue,
                    },
                    PeerAnswer::Status(status) => Input::TargetStatus(key, status),
                };
                inbox.send(input).await.ok();
            }
        });
    }

    async fn close_agent(&mut self) {
        if let Some(setup) = self.setup.take() {
            setup.agent.agent.end().await;
        }
        if let Some(link) = self.agent.take() {
            link.agent().end().await;
        }
    }

    fn done(&mut self, outcome: Outcome) -> Step {
        if outcome == Outcome::Kept
            && let Some(instance) = self.instance.as_ref().filter(|i| i.process().is_alive())
        {
            // A void burns the target's epoch too.
            let epoch = Epoch(self.machine.attempt().key.target_epoch.0.saturating_add(1));
            instance.change(Phase::Running, epoch).map_err(|e| Crash(e.to_string()))?;
        }
        tracing::info!(migration = %self.migration(), ?outcome, "source done");
        Ok(None)
    }
}

/// A renunciation as a proof, when the target that the permit names signed it.
#[must_use]
pub fn verify_renunciation(file: &AttemptFile, token: Vec<u8>) -> Option<RenunciationProof> {
    let key = file.daemon_key(types::Side::Target)?;
    renunciation(&key, token)
}

/// The same with a key that the caller trusts.
#[must_use]
pub fn renunciation(key: &permit::VerifyingKey, token: Vec<u8>) -> Option<RenunciationProof> {
    let signed = permit::SignedStatement::from_bytes(token.clone()).ok()?;
    match permit::statement::verify(&signed, key).ok()? {
        Statement::Renounced(renunciation) => Some(RenunciationProof { renunciation, token }),
        _ => None,
    }
}

/// The journal's entries of a source.
#[must_use]
pub fn source_entries(daemon: &Daemon, migration: MigrationId) -> Vec<SourceEntry> {
    let store = lock(&daemon.journal);
    let sources = store.of(migration).iter().filter_map(|entry| match entry {
        Entry::Source(entry) => Some(entry.clone()),
        Entry::Target(_) => None,
    });
    sources.collect()
}

async fn next_heard(events: Option<&mut Events>) -> Heard {
    match events {
        Some(events) => events.next().await,
        None => std::future::pending().await,
    }
}

/// 128 bits from the kernel.
///
/// # Errors
/// The kernel has none.
pub fn fresh_nonce() -> std::io::Result<Nonce> {
    let mut bytes = [0; 16];
    let n = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    if n == bytes.len() {
        Ok(Nonce::from_bytes(bytes))
    } else {
        Err(std::io::ErrorKind::UnexpectedEof.into())
    }
}
