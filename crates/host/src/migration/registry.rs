//! The migrations of this host: one task each, found by id; recovered from the journal when the daemon restarts or a
//! late message comes for one that has ended.

use super::attempt::{AttemptFile, attempt, expect_quotes, verify};
use super::source::{self, SourceShell, source_entries};
use super::target::{self, Prepared, TargetShell, target_entries};
use super::{Handle, INBOX_MAX, Input, Line, Machine, Mirror, PeerAnswer, hypervisor};
use crate::daemon::{Daemon, IdleAgent, lock};
use crate::vms::instance::Instance;
use crate::vms::record::Phase;
use engine::handover::journal::{Entry, SourceFact, TargetFact};
use engine::handover::source::{Claim, Source};
use engine::handover::target::Target;
use engine::handover::{Attempt, QemuFacts};
use permit::{PermitRefusal, VerifiedPermit, VerifyingKey};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use tokio::sync::{mpsc, oneshot, watch};
use types::handover::{AbortReason, HandoverKey, PriorRunState, RenounceRequest, Side, Statement};
use types::inventory::Inventory;
use types::permit::StreamFeatures;
use types::profile::{InspectionProfile, UnknownProfile};
use types::vm::VmSpec;
use types::{ErrorCode, MigrationId, Problem, VmId};

/// The migrations.
#[derive(Debug)]
pub struct Migrations {
    daemon: Arc<Daemon>,
    open: Mutex<BTreeMap<MigrationId, Open>>,
}

/// One that has a task.
#[derive(Debug, Clone)]
struct Open {
    vm: VmId,
    side: Side,
    mirror: Mirror,
    handle: Handle,
    prepared: Late<Prepared>,
    started: Late<()>,
}

/// A result that is awaited, by whoever asks.
type Late<T> = watch::Receiver<Option<Result<T, Problem>>>;

/// `PrepareTarget`, parsed.
#[derive(Debug, Clone)]
pub struct PrepareOrder {
    /// The migration.
    pub migration: MigrationId,
    /// The permit's token.
    pub permit: Vec<u8>,
    /// The VM.
    pub spec: VmSpec,
    /// What its stream looks like.
    pub inventory: Inventory,
    /// Only this peer may connect.
    pub source_address: IpAddr,
    /// As the manager knows it; the permit's must be the same.
    pub source_daemon_key: Vec<u8>,
}

/// A target whose permit is consumed.
struct Admitted {
    machine: Target,
    effects: Vec<engine::handover::target::Effect>,
    features: StreamFeatures,
    /// How the stream is inspected; or why it will fail, when that is known.
    profile: Result<InspectionProfile, Problem>,
}

/// `StartSource`, parsed.
#[derive(Debug, Clone)]
pub struct StartOrder {
    /// The migration.
    pub migration: MigrationId,
    /// The permit's token.
    pub permit: Vec<u8>,
    /// What the stream looks like.
    pub inventory: Inventory,
    /// Where the target's agent is.
    pub data_address: SocketAddr,
    /// Where the target's daemon is.
    pub peer_address: SocketAddr,
}

impl Migrations {
    /// None yet.
    #[must_use]
    pub fn new(daemon: Arc<Daemon>) -> Arc<Self> {
        Arc::new(Self { daemon, open: Mutex::default() })
    }

    /// After a restart: every migration that the journal does not say is closed goes on.
    pub fn recover(self: &Arc<Self>) {
        let all = lock(&self.daemon.journal).migrations();
        for migration in all {
            if !self.is_closed(migration) {
                tracing::warn!(%migration, "taking up an open hand-over");
                self.revive(migration);
            }
        }
    }

    /// Whether the hand-over has ended here and at the manager.
    #[must_use]
    pub fn is_closed(&self, migration: MigrationId) -> bool {
        lock(&self.daemon.journal).of(migration).iter().any(|entry| match entry {
            Entry::Source(e) => matches!(e.fact, SourceFact::Closed),
            Entry::Target(e) => matches!(e.fact, TargetFact::Closed),
        })
    }

    /// Whether any has a task: heartbeats are faster then.
    #[must_use]
    pub fn any_open(&self) -> bool {
        !lock(&self.open).is_empty()
    }

    /// Whether an attempt to move the VM may still act on its QEMU here: nobody else may stop it then.
    #[must_use]
    pub fn holds(&self, vm: VmId) -> bool {
        lock(&self.open).values().any(|open| open.vm == vm) && self.claim(vm, None).is_none()
    }

    /// Whether this host, as the target, was told to run the VM and did not renounce it since.
    #[must_use]
    pub fn was_run(&self, migration: MigrationId) -> bool {
        let last = target_entries(&self.daemon, migration).into_iter().rev().find(|entry| {
            matches!(entry.fact, TargetFact::Run { .. } | TargetFact::Renounced { .. } | TargetFact::Lost)
        });
        last.is_some_and(|entry| matches!(entry.fact, TargetFact::Run { .. }))
    }

    /// Whether this one has a task.
    #[must_use]
    pub fn is_open(&self, migration: MigrationId) -> bool {
        lock(&self.open).contains_key(&migration)
    }

    /// The manager is back.
    pub fn manager_contact(&self) {
        let handles: Vec<_> = lock(&self.open).values().map(|o| o.handle.clone()).collect();
        for handle in handles {
            // A full inbox wakes the machine anyway.
            handle.inbox.try_send(Input::ManagerContact).ok();
        }
    }

    /// Which side this host is in a migration that it knows.
    #[must_use]
    pub fn side_of(&self, migration: MigrationId) -> Option<Side> {
        if let Some(open) = lock(&self.open).get(&migration) {
            return Some(open.side);
        }
        lock(&self.daemon.journal).of(migration).first().map(|entry| match entry {
            Entry::Source(_) => Side::Source,
            Entry::Target(_) => Side::Target,
        })
    }

    /// The key of a migration that this host knows.
    #[must_use]
    pub fn key_of(&self, migration: MigrationId) -> Option<HandoverKey> {
        let written = lock(&self.daemon.journal).of(migration).first().map(|entry| *entry.key());
        written.or_else(|| AttemptFile::load(&self.daemon, migration).map(|file| file.claims.key))
    }

    /// Delivers to a migration's task, revived when it has ended. What it carries is dropped when this host never
    /// heard of the migration, which answers `unknown-migration` for it.
    ///
    /// # Errors
    /// This host never heard of it, or its task does not keep up.
    pub fn deliver(self: &Arc<Self>, migration: MigrationId, input: Input) -> Result<(), Problem> {
        let handle = lock(&self.open).get(&migration).map(|o| o.handle.clone());
        let handle = match handle.filter(|h| !h.inbox.is_closed()) {
            Some(handle) => handle,
            None => self.revive(migration).ok_or_else(|| unknown(migration))?,
        };
        handle.inbox.try_send(input).map_err(|_| {
            Problem::new(ErrorCode::WrongState, format!("migration {migration} is busy; try again"))
        })
    }

    /// A request to renounce, from wherever it came.
    pub fn asked(
        self: &Arc<Self>,
        migration: MigrationId,
        request: RenounceRequest,
        asker: mpsc::Sender<PeerAnswer>,
    ) {
        let input = Input::Asked(request, asker.clone());
        if self.deliver(migration, input).is_err() {
            // Whoever asked may be gone.
            asker.try_send(target::no_record()).ok();
        }
    }

    /// The target's renunciation, from the manager.
    ///
    /// # Errors
    /// It is not one, or this host never heard of the migration.
    pub fn renounced(self: &Arc<Self>, token: Vec<u8>, named_key: &[u8]) -> Result<(), Problem> {
        let bad = || Problem::new(ErrorCode::BadRequest, "the renunciation does not verify");
        let key = VerifyingKey::from_bytes(named_key).map_err(|_| bad())?;
        let proof = source::renunciation(&key, token).ok_or_else(bad)?;
        let migration = proof.renunciation.key.migration;
        // The permit's own word on whose key it must be, where it is still at hand.
        if let Some(file) = AttemptFile::load(&self.daemon, migration)
            && file.daemon_key(Side::Target).is_none_or(|k| k.as_bytes() != key.as_bytes())
        {
            return Err(bad());
        }
        self.deliver(migration, Input::Renounced(proof))
    }

    /// Verifies a source's signed request to renounce.
    ///
    /// # Errors
    /// It is none, or not of the source that the permit names.
    pub fn verified_ask(&self, token: Vec<u8>) -> Result<RenounceRequest, Problem> {
        verify_ask(&self.daemon, token)
    }

    /// Prepares a target. Repeating the order is harmless and is answered the same.
    ///
    /// # Errors
    /// The result holds why not.
    pub fn prepare(self: &Arc<Self>, order: PrepareOrder) -> Late<Prepared> {
        if let Some(open) = lock(&self.open).get(&order.migration) {
            return open.prepared.clone();
        }
        let agent = self.daemon.take_agent(order.migration, Side::Target);
        let (sender, prepared) = watch::channel(None);
        match self.admit_target(&order) {
            Ok(Admitted { machine, effects, features, profile }) => {
                let (vm, mirror) = (machine.attempt().key.vm, Mirror::default());
                let (reply, answered) = oneshot::channel();
                let setup = target::Setup {
                    agent,
                    permit: hex::encode(&order.permit),
                    spec: order.spec,
                    inventory: order.inventory,
                    features,
                    source_address: order.source_address,
                    profile,
                    prepared: reply,
                };
                bridge(answered, sender);
                let (inbox, receiver) = mpsc::channel(INBOX_MAX);
                let shell = TargetShell::new(
                    self.daemon.clone(),
                    machine,
                    None,
                    Some(setup),
                    Line { inbox: receiver, own: inbox.downgrade(), mirror: mirror.clone() },
                );
                let (_, started) = watch::channel(None);
                let open = Open {
                    vm,
                    side: Side::Target,
                    mirror,
                    handle: Handle { inbox },
                    prepared: prepared.clone(),
                    started,
                };
                self.spawn(order.migration, open, async move { shell.run(effects).await });
            }
            Err(problem) => {
                discard(agent);
                sender.send_replace(Some(Err(problem)));
            }
        }
        prepared
    }

    /// Everything that must hold before the permit is consumed, and what dooms the attempt although it is.
    fn admit_target(&self, order: &PrepareOrder) -> Result<Admitted, Problem> {
        let daemon = &self.daemon;
        let permit = verify(daemon, &order.permit, Side::Target, order.migration)?;
        let own_journal = lock(&daemon.journal).id();
        if permit.claims().target_journal != own_journal {
            return Err(refused("the permit names another journal than this host's"));
        }
        // A replayed order must not write the file of an attempt that has ended, which nobody would remove.
        if lock(&daemon.journal).ledger.contains(&permit.claims().nonce) {
            return Err(PermitRefusal::Replayed.problem());
        }
        expect_quotes(daemon, &permit, Side::Target)?;
        AttemptFile::new(&permit, None).save(daemon).map_err(|e| e.problem())?;
        let profile = self.dooms_target(&permit, order);
        let mut store = lock(&daemon.journal);
        let (machine, effects) = Target::prepare(attempt(&permit), &mut store.ledger)
            .map_err(|_| PermitRefusal::Replayed.problem())?;
        Ok(Admitted { machine, effects, features: permit.claims().features.clone(), profile })
    }

    /// What is known to fail already; else how the permit wants the stream inspected.
    fn dooms_target(
        &self,
        permit: &VerifiedPermit,
        order: &PrepareOrder,
    ) -> Result<InspectionProfile, Problem> {
        let claims = permit.claims();
        permit.expect_vm(&order.spec.uuid, &order.spec.digest()).map_err(|r| r.problem())?;
        if claims.source.daemon_key != order.source_daemon_key {
            return Err(refused("the permit names another key of the source's daemon than the order"));
        }
        if order.inventory.machine.is_empty() || order.inventory.ram_blocks.is_empty() {
            return Err(Problem::new(ErrorCode::BadRequest, "the VM's inventory is empty"));
        }
        claims.features.check_channels().map_err(|why| refused(&why))?;
        if self.daemon.vms.all().iter().any(|i| i.vm() == claims.key.vm) {
            return Err(Problem::new(
                ErrorCode::VmAlreadyRunning,
                "this host holds a copy of the VM already",
            ));
        }
        let profile: InspectionProfile =
            claims.inspection_profile.parse().map_err(|e: UnknownProfile| refused(&e.to_string()))?;
        if profile.signatures.is_on() {
            self.daemon.scanners.check()?;
        }
        Ok(profile)
    }

    /// Starts a source. Repeating the order is harmless and is answered the same.
    ///
    /// # Errors
    /// The result holds why not.
    pub fn start(self: &Arc<Self>, order: StartOrder) -> Late<()> {
        if let Some(open) = lock(&self.open).get(&order.migration) {
            return open.started.clone();
        }
        let (sender, started) = watch::channel(None);
        let agent = self.daemon.take_agent(order.migration, Side::Source);
        let admitted = self.admit_source(&order);
        match admitted {
            Ok(permit) => {
                let (inbox, receiver) = mpsc::channel(INBOX_MAX);
                let (_, prepared) = watch::channel(None);
                let own = inbox.downgrade();
                let (vm, mirror) = (permit.claims().key.vm, Mirror::default());
                let (handle, started) = (Handle { inbox }, started.clone());
                let open = Open { vm, side: Side::Source, mirror: mirror.clone(), handle, prepared, started };
                let start = StartingSource {
                    migrations: self.clone(),
                    permit,
                    order,
                    line: Line { inbox: receiver, own, mirror },
                };
                self.spawn(start.order.migration, open, async move { start.run(agent, sender).await });
            }
            Err(problem) => {
                discard(agent);
                sender.send_replace(Some(Err(problem)));
            }
        }
        started
    }

    fn admit_source(&self, order: &StartOrder) -> Result<VerifiedPermit, Problem> {
        let daemon = &self.daemon;
        if !lock(&daemon.journal).of(order.migration).is_empty() {
            return Err(Problem::new(ErrorCode::WrongState, "this attempt was started here before"));
        }
        let permit = verify(daemon, &order.permit, Side::Source, order.migration)?;
        expect_quotes(daemon, &permit, Side::Source)?;
        AttemptFile::new(&permit, Some(order.peer_address)).save(daemon).map_err(|e| e.problem())?;
        Ok(permit)
    }

    /// Promises never to take part in an attempt that this host never heard of.
    ///
    /// # Errors
    /// This host knows it, or is not the one that it names.
    pub fn decline(
        self: &Arc<Self>,
        attempt: Attempt,
        side: Side,
        reason: AbortReason,
    ) -> Result<(), Problem> {
        let migration = attempt.key.migration;
        let host = if side == Side::Source { &attempt.source } else { &attempt.target };
        let known =
            !lock(&self.daemon.journal).of(migration).is_empty() || lock(&self.open).contains_key(&migration);
        if known || *host != self.daemon.name {
            return Err(Problem::new(
                ErrorCode::WrongState,
                "this host knows the attempt, or is not named by it",
            ));
        }
        let (inbox, receiver) = mpsc::channel(INBOX_MAX);
        let (_, prepared) = watch::channel(None);
        let (_, started) = watch::channel(None);
        let (own, daemon) = (inbox.downgrade(), self.daemon.clone());
        let mirror = Mirror::default();
        let line = Line { inbox: receiver, own, mirror: mirror.clone() };
        let handle = Handle { inbox };
        let open = Open { vm: attempt.key.vm, side, mirror, handle, prepared, started };
        if side == Side::Source {
            let (machine, effects) = Source::decline(attempt, reason);
            let shell = SourceShell::new(daemon, machine, None, None, line);
            self.spawn(migration, open, async move { shell.run(effects).await });
            return Ok(());
        }
        let declined = Target::decline(attempt, reason, &mut lock(&self.daemon.journal).ledger);
        let (machine, effects) = declined.map_err(|_| PermitRefusal::Replayed.problem())?;
        let shell = TargetShell::new(daemon, machine, None, None, line);
        self.spawn(migration, open, async move { shell.run(effects).await });
        Ok(())
    }

    /// The right to start an attempt on a VM's QEMU: every other attempt on this host has let go of it. One whose
    /// machine is not known yet has not.
    fn claim(&self, vm: VmId, own: Option<MigrationId>) -> Option<Claim> {
        let known: Vec<_> = lock(&self.open)
            .iter()
            .filter(|(id, open)| Some(**id) != own && open.vm == vm)
            .map(|(id, open)| (*id, lock(&open.mirror).clone()))
            .collect();
        // A late message revives the machine of an attempt that has ended; that one has nothing to do to any QEMU.
        let open = known.into_iter().filter(|(id, machine)| machine.is_some() || !closed(&self.daemon, *id));
        let others: Vec<_> = open.map(|(_, machine)| machine).collect::<Option<_>>()?;
        let sources = others.iter().filter_map(|m| match m {
            Machine::Source(source) => Some(source),
            Machine::Target(_) => None,
        });
        let targets = others.iter().filter_map(|m| match m {
            Machine::Target(target) => Some(target),
            Machine::Source(_) => None,
        });
        Claim::new(sources, targets)
    }

    fn spawn(
        self: &Arc<Self>,
        migration: MigrationId,
        open: Open,
        task: impl Future<Output = ()> + Send + 'static,
    ) {
        let own = open.handle.inbox.clone();
        lock(&self.open).insert(migration, open);
        let migrations = self.clone();
        tokio::spawn(async move {
            task.await;
            let mut open = lock(&migrations.open);
            // A revived task may have taken the place.
            if open.get(&migration).is_some_and(|o| o.handle.inbox.same_channel(&own)) {
                open.remove(&migration);
            }
        });
    }

    /// A task from the journal, for a migration that has none.
    fn revive(self: &Arc<Self>, migration: MigrationId) -> Option<Handle> {
        let first = lock(&self.daemon.journal).of(migration).first().cloned()?;
        let (inbox, receiver) = mpsc::channel(INBOX_MAX);
        let (own, daemon) = (inbox.downgrade(), self.daemon.clone());
        let lost =
            || Problem::new(ErrorCode::WrongState, "this daemon was restarted, or the attempt has ended");
        let (_, prepared) = watch::channel(Some(Err(lost())));
        let (_, started) = watch::channel(Some(Err(lost())));
        let handle = Handle { inbox };
        let (vm, mirror) = (first.key().vm, Mirror::default());
        let line = Line { inbox: receiver, own, mirror: mirror.clone() };
        let side = match &first {
            Entry::Source(_) => Side::Source,
            Entry::Target(_) => Side::Target,
        };
        let open = Open { vm, side, mirror, handle: handle.clone(), prepared, started };
        match first {
            Entry::Source(entry) => {
                self.spawn(migration, open, async move {
                    revive_source(daemon, migration, &entry.fact, line).await;
                });
            }
            Entry::Target(entry) => {
                let key = entry.key;
                self.spawn(migration, open, async move {
                    let instance = daemon.vms.find(key.vm, key.target_epoch);
                    let entries = target_entries(&daemon, migration);
                    let seen = hypervisor::target_seen(&daemon, migration, instance.as_deref()).await;
                    match Target::recover(&entries, seen) {
                        Ok((machine, effects)) => {
                            TargetShell::new(daemon, machine, instance, None, line).run(effects).await;
                        }
                        Err(error) => tracing::error!(%migration, %error, "cannot be recovered"),
                    }
                });
            }
        }
        Some(handle)
    }
}

/// Whether the journal says that the attempt has ended on both sides.
fn closed(daemon: &Daemon, migration: MigrationId) -> bool {
    match lock(&daemon.journal).of(migration).last() {
        Some(Entry::Source(entry)) => matches!(entry.fact, SourceFact::Closed),
        Some(Entry::Target(entry)) => matches!(entry.fact, TargetFact::Closed),
        None => false,
    }
}

async fn revive_source(daemon: Arc<Daemon>, migration: MigrationId, first: &SourceFact, line: Line) {
    let instance = match first {
        SourceFact::Opened { qemu, .. } => holder(&daemon, qemu),
        _ => None,
    };
    let entries = source_entries(&daemon, migration);
    match Source::recover(&entries, hypervisor::source_seen(&daemon, migration, instance.as_deref())) {
        Ok((machine, effects)) => {
            SourceShell::new(daemon, machine, instance, None, line).run(effects).await;
        }
        Err(error) => tracing::error!(%migration, %error, "cannot be recovered"),
    }
}

/// The QEMU of a journal entry: exactly that process, or none.
fn holder(daemon: &Daemon, facts: &QemuFacts) -> Option<Arc<Instance>> {
    daemon.vms.all().into_iter().find(|instance| hypervisor::facts(instance) == *facts)
}

struct StartingSource {
    migrations: Arc<Migrations>,
    permit: VerifiedPermit,
    order: StartOrder,
    line: Line,
}

impl StartingSource {
    async fn run(self, agent: Option<IdleAgent>, sender: watch::Sender<Option<Result<(), Problem>>>) {
        let daemon = self.migrations.daemon.clone();
        let key = self.permit.claims().key;
        let ready = ready_source(&daemon, &self.permit, agent.as_ref()).await;
        let ready = ready.and_then(|ready| match self.migrations.claim(key.vm, Some(key.migration)) {
            Some(claim) => Ok((ready, claim)),
            None => Err(Problem::new(
                ErrorCode::MigrationInFlight,
                "an earlier attempt to move the VM still has something to do to its QEMU",
            )),
        });
        match (ready, agent) {
            (Ok(((instance, prior), claim)), Some(agent)) => {
                let (reply, answered) = oneshot::channel();
                bridge(answered, sender);
                let facts = hypervisor::facts(&instance);
                let (machine, effects) = Source::start(claim, attempt(&self.permit), facts, prior);
                let setup = source::Setup {
                    agent,
                    permit: hex::encode(&self.order.permit),
                    inventory: self.order.inventory,
                    features: self.permit.claims().features.clone(),
                    data_address: self.order.data_address,
                    started: reply,
                };
                let (instance, setup) = (Some(instance), Some(setup));
                SourceShell::new(daemon, machine, instance, setup, self.line).run(effects).await;
            }
            (Err(problem), agent) => {
                discard(agent);
                self.decline(problem, sender).await;
            }
            (Ok(_), None) => {}
        }
    }

    /// The permit is good and names this host: the registry waits for a promise never to vote.
    async fn decline(self, problem: Problem, sender: watch::Sender<Option<Result<(), Problem>>>) {
        let reason = AbortReason { code: problem.code, detail: problem.detail.clone() };
        sender.send_replace(Some(Err(problem)));
        let daemon = self.migrations.daemon.clone();
        let (machine, effects) = Source::decline(attempt(&self.permit), reason);
        SourceShell::new(daemon, machine, None, None, self.line).run(effects).await;
    }
}

/// Whether the VM at hand is the one that the permit names, and how it stands.
async fn ready_source(
    daemon: &Daemon,
    permit: &VerifiedPermit,
    agent: Option<&IdleAgent>,
) -> Result<(Arc<Instance>, PriorRunState), Problem> {
    let key = permit.claims().key;
    let agent = agent.ok_or_else(|| Problem::new(ErrorCode::WrongState, "no VM agent was spawned for it"))?;
    permit.expect_agent_key(Side::Source, &agent.ready.spki).map_err(|r| r.problem())?;
    permit.claims().features.check_channels().map_err(|why| refused(&why))?;
    let not_running = || Problem::new(ErrorCode::VmNotRunning, "the VM does not run on this host");
    let instance = daemon.vms.running(key.vm).ok_or_else(not_running)?;
    let record = instance.record();
    permit.expect_vm(&record.spec.uuid, &record.spec.digest()).map_err(|r| r.problem())?;
    if key.source_epoch < record.epoch {
        return Err(refused("the permit's epoch is older than the one under which this host holds the VM"));
    }
    let prior = hypervisor::prior(&instance)
        .await
        .map_err(|e| Problem::new(ErrorCode::HypervisorFailed, e.to_string()))?
        .ok_or_else(not_running)?;
    instance.change(Phase::Running, key.source_epoch).map_err(|e| e.problem())?;
    Ok((instance, prior))
}

/// Verifies a source's signed request against the permit of the attempt.
///
/// # Errors
/// It is none, is about no attempt of this host, or is not of the source that the permit names.
pub fn verify_ask(daemon: &Daemon, token: Vec<u8>) -> Result<RenounceRequest, Problem> {
    let bad = |text: &str| Problem::new(ErrorCode::BadRequest, text);
    let signed =
        permit::SignedStatement::from_bytes(token).map_err(|_| bad("malformed request to renounce"))?;
    // The request names its attempt, whose permit names the key: try the open attempts' keys.
    let folder = daemon.folders.state.join("migrations");
    let files = std::fs::read_dir(folder).map(|all| all.flatten().collect::<Vec<_>>()).unwrap_or_default();
    for file in files {
        let name = file.file_name();
        let Some(migration) = name.to_str().and_then(|n| n.strip_suffix(".json")?.parse().ok()) else {
            continue;
        };
        let Some(attempt) = AttemptFile::load(daemon, migration) else { continue };
        let Some(key) = attempt.daemon_key(Side::Source) else { continue };
        if let Ok(Statement::AskRenounce(request)) = permit::statement::verify(&signed, &key)
            && request.key == attempt.claims.key
        {
            return Ok(request);
        }
    }
    Err(bad("a request to renounce of no source that this host knows"))
}

fn bridge<T: Send + Sync + 'static>(
    answered: oneshot::Receiver<Result<T, Problem>>,
    sender: watch::Sender<Option<Result<T, Problem>>>,
) {
    tokio::spawn(async move {
        let gone = |_| Err(Problem::new(ErrorCode::WrongState, "the attempt ended before it was ready"));
        sender.send_replace(Some(answered.await.unwrap_or_else(gone)));
    });
}

fn discard(agent: Option<IdleAgent>) {
    if let Some(idle) = agent {
        tokio::spawn(async move { idle.agent.end().await });
    }
}

fn refused(text: &str) -> Problem {
    Problem::new(ErrorCode::PermitRefused, text)
}

/// This host never heard of it.
#[must_use]
pub fn unknown(migration: MigrationId) -> Problem {
    Problem::new(ErrorCode::UnknownMigration, format!("this host knows no migration {migration}"))
}
