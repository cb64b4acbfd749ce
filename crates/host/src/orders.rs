//! The manager's orders: parsed into types, carried out, answered with the id that they came with.
//!
//! Orders of a hand-over are queued at once and in the order in which they came; what takes long runs in its own task.

use crate::agents::Ready;
use crate::daemon::{Daemon, IdleAgent, lock, now_unix_us};
use crate::error::HostError;
use crate::holdings;
use crate::load::LoadMeter;
use crate::migration::attempt::AttemptFile;
use crate::migration::registry::{Migrations, PrepareOrder, StartOrder};
use crate::migration::source::fresh_nonce;
use crate::migration::{Control, Input, PeerAnswer};
use crate::qemu::plugged;
use crate::vms::record::Record;
use api::fleet::{self, Done, Reply, reply, to_host::Body, to_manager};
use attest::{Binding, Purpose};
use engine::handover::{Resolution, source, target};
use std::str::FromStr;
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot, watch};
use types::handover::{
    AbortReason, HandoverKey, MigrationRequest, PriorRunState, Side, Statement, StreamEvidence,
};
use types::vm::{Accel, VmSpec};
use types::{Digest, Epoch, ErrorCode, MigrationId, Problem, VmId};

/// Agents that wait for a permit; each costs a process.
const IDLE_AGENTS_MAX: usize = 32;
/// A JSON document in an order: specs and inventories are far smaller.
const JSON_BYTES_MAX: usize = 1 << 20;
/// A message of the host protocol has 4 MiB at most, and a longer one would end the session.
const CATALOGUE_MESSAGE_BYTES_MAX: usize = 3 << 20;

/// Carries out orders.
#[derive(Debug, Clone)]
pub struct Orders {
    daemon: Arc<Daemon>,
    migrations: Arc<Migrations>,
    meter: LoadMeter,
    /// BLAKE3 of the SubjectPublicKeyInfo with which this host holds its connection to the manager.
    connection_key: Digest,
}

type Outcome = Result<reply::Result, Problem>;

impl Orders {
    /// For a daemon.
    #[must_use]
    pub fn new(daemon: Arc<Daemon>, migrations: Arc<Migrations>, meter: LoadMeter) -> Self {
        Self { daemon, migrations, meter, connection_key: Digest([0; 32]) }
    }

    /// Says with which key this host holds its connection from now on.
    pub fn connected_with(&mut self, key: Digest) {
        self.connection_key = key;
    }

    /// Takes one order; never waits.
    pub fn take(&self, id: u64, body: Body) {
        let this = self.clone();
        let name = name_of(&body);
        match body {
            // Many and quick: no task.
            Body::QueryLoad(_) => self.reply(id, name, Ok(self.load())),
            Body::StatementStored(_) | Body::Welcome(_) => {}
            Body::Checkpoint(order) => this.checkpoint(order),
            Body::ReportHoldings(order) => holdings::report(&self.daemon, &self.migrations, order.ask),
            Body::StartVm(order) => self.run(id, name, async move { this.start_vm(order).await }),
            Body::StopVm(order) => self.run(id, name, async move { this.stop_vm(order).await }),
            Body::Intent(order) => self.reply(id, name, self.intent(&order)),
            Body::SpawnAgent(order) => self.run(id, name, async move { this.spawn_agent(order).await }),
            Body::Prepare(order) => match self.prepare(order) {
                Ok(late) => self.run(id, name, async move { prepared(late).await }),
                Err(problem) => self.reply(id, name, Err(problem)),
            },
            Body::Start(order) => match self.start(order) {
                Ok(late) => self.run(id, name, async move { settled(late).await.map(|()| done()) }),
                Err(problem) => self.reply(id, name, Err(problem)),
            },
            Body::Renounced(order) => {
                let taken = self.migrations.renounced(order.token, &order.target_daemon_key);
                self.reply(id, name, taken.map(|()| done()));
            }
            Body::InspectVm(order) => self.run(id, name, async move { this.inspect_vm(order).await }),
            Body::Quote(order) => self.run(id, name, async move { this.quote(order).await }),
            Body::MicroProbe(order) => self.run(id, name, async move { this.micro_probe(order).await }),
            Body::DescribeHypervisor(order) => {
                self.run(id, name, async move { this.describe_hypervisor(order).await });
            }
            Body::Renounce(order) => self.reply(id, name, self.renounce(order)),
            Body::Decline(order) => self.reply(id, name, self.decline(&order)),
            hand_over => match self.hand_over(hand_over) {
                Ok(answered) => self.run(id, name, async move {
                    let gone =
                        || Problem::new(ErrorCode::WrongState, "the hand-over has just ended; ask again");
                    answered.await.unwrap_or_else(|_| Err(gone())).map(|()| done())
                }),
                Err(problem) => self.reply(id, name, Err(problem)),
            },
        }
    }

    /// An order of a newer manager.
    pub fn not_understood(&self, id: u64) {
        let problem = Problem::new(ErrorCode::BadRequest, "this host does not understand the order");
        self.reply(id, "unknown", Err(problem));
    }

    fn run(&self, id: u64, name: &'static str, work: impl Future<Output = Outcome> + Send + 'static) {
        let this = self.clone();
        tokio::spawn(async move {
            let outcome = work.await;
            this.reply(id, name, outcome);
        });
    }

    fn reply(&self, id: u64, name: &'static str, outcome: Outcome) {
        if let Err(problem) = &outcome {
            tracing::warn!(order = name, %problem, "order not carried out");
        }
        if id == 0 {
            return;
        }
        let result = outcome.unwrap_or_else(|problem| {
            reply::Result::Error(fleet::Error {
                code: problem.code.to_string(),
                detail: problem.detail,
                hint: problem.hint.unwrap_or_default(),
            })
        });
        self.daemon.outbox.push(to_manager::Body::Reply(Reply { id, result: Some(result) }));
    }

    fn load(&self) -> reply::Result {
        let load_json = serde_json::to_string(&self.meter.load_with(&self.daemon.vms)).unwrap_or_default();
        reply::Result::Load(fleet::LoadReply { load_json })
    }

    /// Written beside the session: votes do not wait for it.
    fn checkpoint(self, order: fleet::Checkpoint) {
        tokio::task::spawn_blocking(move || {
            let keys = lock(&self.daemon.permit_keys).clone();
            if let Some(kept) = self.daemon.checkpoints.take(&order, &keys) {
                self.daemon.outbox.push(to_manager::Body::CheckpointKept(kept));
            }
        });
    }

    async fn start_vm(&self, order: fleet::StartVm) -> Outcome {
        self.daemon.checkpoints.may_accept()?;
        let spec: VmSpec = json("the VM's spec", &order.spec_json)?;
        let started = self.daemon.vms.start(&spec, Epoch(order.epoch)).await?;
        Ok(reply::Result::Started(fleet::Started {
            inventory_json: serde_json::to_string(&started.inventory).unwrap_or_default(),
            machine: started.inventory.machine,
            pid: started.pid,
        }))
    }

    async fn stop_vm(&self, order: fleet::StopVm) -> Outcome {
        let vm = parse("VM", &order.vm)?;
        if self.migrations.holds(vm) {
            let text = "an attempt to move the VM still has something to do to its QEMU here";
            return Err(
                Problem::new(ErrorCode::MigrationInFlight, text).hint("terminate the migration first")
            );
        }
        self.daemon.vms.stop(vm, Epoch(order.epoch)).await.map(|()| done())
    }

    /// What this host's QEMU makes of the devices of a VM that runs here.
    async fn inspect_vm(&self, order: fleet::InspectVm) -> Outcome {
        let vm = parse("VM", &order.vm)?;
        let instance = self
            .daemon
            .vms
            .running(vm)
            .ok_or_else(|| Problem::new(ErrorCode::VmNotRunning, "the VM does not run on this host"))?;
        let record = instance.record();
        // Two answers: that one is not known must neither hide the other nor look like "nothing".
        let (differences, differences_missing) = match instance.differences().await {
            Ok(differences) => (differences, String::new()),
            Err(error) => (vec![], HostError::from(error).problem().detail),
        };
        let (catalogue_json, catalogue_missing) = match self.catalogue_json(&record).await {
            Ok(json) => (json, String::new()),
            Err(problem) => (String::new(), problem.detail),
        };
        Ok(reply::Result::Inspected(fleet::Inspected {
            catalogue_json,
            differences,
            differences_missing,
            catalogue_missing,
        }))
    }

    /// What this host's QEMU can run.
    async fn describe_hypervisor(&self, order: fleet::DescribeHypervisor) -> Outcome {
        let accel = match order.accel.as_str() {
            "kvm" => Accel::Kvm,
            "tcg" => Accel::Tcg,
            other => return Err(bad(format!("{other:?} is no accelerator"))),
        };
        let abilities = self.daemon.vms.abilities(&order.machine, &order.cpu_model, accel).await?;
        let abilities_json = serde_json::to_string(&abilities).map_err(|e| bad(e.to_string()))?;
        Ok(reply::Result::Hypervisor(fleet::Hypervisor { abilities_json }))
    }

    async fn micro_probe(&self, order: fleet::MicroProbe) -> Outcome {
        let probe = self.daemon.prober.probe(order.memory_bytes, order.work_us).await?;
        let probe_json = serde_json::to_string(&probe).map_err(|e| bad(e.to_string()))?;
        Ok(reply::Result::Probed(fleet::Probed { probe_json }))
    }

    async fn catalogue_json(&self, record: &Record) -> Result<String, Problem> {
        let shape = self.daemon.vms.shape(&record.spec, &record.machine).await?;
        let catalogue_json = serde_json::to_string(&shape.catalogue).map_err(|e| bad(e.to_string()))?;
        if catalogue_json.len() > CATALOGUE_MESSAGE_BYTES_MAX {
            let text = format!("the catalogue has {} bytes, too many for one message", catalogue_json.len());
            return Err(Problem::new(ErrorCode::LimitReached, text));
        }
        Ok(catalogue_json)
    }

    /// What this host's TPM says of its state. All that the quote is bound to, but for the nonce, is what this host
    /// itself is and holds: a question in another's name gives a quote that is of no use to him.
    async fn quote(&self, order: fleet::Quote) -> Outcome {
        let platform = self.daemon.platform.as_ref().ok_or_else(|| {
            Problem::new(ErrorCode::AttestationFailed, "this host's configuration names no TPM")
                .hint("set `tpm` in host.toml, e.g. tpm = \"device:/dev/tpmrm0\"")
        })?;
        let selection = json("the selection of PCRs", &order.selection_json)?;
        let about = match order.migration.as_str() {
            "" => None,
            migration => Some((parse("migration", migration)?, side(&order.side)?)),
        };
        let host = format!("spiffe://{}/host/{}", self.daemon.trust_domain, self.daemon.name);
        let (purpose, before_permit) = match about {
            None => (Purpose::HostCheck, false),
            Some(about) => self.purpose(about)?,
        };
        let binding = Binding {
            nonce: parse("nonce", &order.nonce)?,
            purpose,
            host: host.try_into().map_err(|e: &str| bad(e.to_owned()))?,
            host_spki: self.connection_key,
        };
        let evidence = platform.evidence(selection, binding.qualifying_data(), order.event_log).await?;
        if let Some((migration, side)) = about.filter(|_| before_permit) {
            platform.gave(migration, side, evidence.digest());
        }
        Ok(reply::Result::Quoted(fleet::Quoted { evidence: evidence.to_bytes() }))
    }

    /// For a side of a migration, with the key of the VM agent that waits here for its permit (and whether it does), or
    /// works here under it.
    fn purpose(&self, (migration, side): (MigrationId, Side)) -> Result<(Purpose, bool), Problem> {
        let waiting = lock(&self.daemon.idle_agents).get(&(migration, side)).map(|a| a.ready.spki.clone());
        let waits = waiting.is_some();
        let at_work = || {
            let file = AttemptFile::load(&self.daemon, migration)?;
            Some(file.claims.part(side)).filter(|p| p.host == self.daemon.name).map(|p| p.agent_spki.clone())
        };
        let spki = waiting.or_else(at_work).ok_or_else(|| {
            Problem::new(ErrorCode::WrongState, "this host has no VM agent for that migration")
        })?;
        Ok((Purpose::Migration { migration, side, agent_spki: Digest::of(&spki) }, waits))
    }

    /// An operator's wish becomes this host's signed request: only a host that holds the VM makes one.
    fn intent(&self, order: &fleet::Intent) -> Outcome {
        let vm: VmId = parse("VM", &order.vm)?;
        if self.daemon.vms.running(vm).is_none() {
            return Err(Problem::new(ErrorCode::VmNotOnSource, "the VM does not run on this host"));
        }
        let nonce = fresh_nonce().map_err(|e| Problem::new(ErrorCode::Internal, e.to_string()))?;
        self.daemon.send_statement(&Statement::Request(MigrationRequest {
            vm,
            source: self.daemon.name.clone(),
            target: parse("target", &order.target)?,
            nonce,
            timestamp_unix_ms: now_unix_us() / 1000,
            intent: order.intent.clone(),
        }));
        Ok(done())
    }

    /// A VM that has other devices than its spec says does not move: no target would be started with them.
    async fn expect_its_devices(&self, vm: VmId) -> Result<(), Problem> {
        let instance = self
            .daemon
            .vms
            .running(vm)
            .ok_or_else(|| Problem::new(ErrorCode::VmNotOnSource, "the VM does not run on this host"))?;
        let differences = instance.differences().await.map_err(|e| HostError::from(e).problem())?;
        if differences.is_empty() {
            return Ok(());
        }
        Err(plugged::problem(&instance.record().spec, &differences))
    }

    /// Repeating the order is answered with the same key.
    async fn spawn_agent(&self, order: fleet::SpawnAgent) -> Outcome {
        let migration: MigrationId = parse("migration", &order.migration)?;
        let side = side(&order.side)?;
        if let Some(idle) = lock(&self.daemon.idle_agents).get(&(migration, side)) {
            return Ok(agent_ready(&idle.ready));
        }
        if side == Side::Source {
            self.expect_its_devices(parse("VM", &order.vm)?).await?;
        }
        if lock(&self.daemon.idle_agents).len() >= IDLE_AGENTS_MAX {
            return Err(Problem::new(ErrorCode::LimitReached, "too many VM agents wait for a permit here"));
        }
        let (agent, ready) = self.daemon.spawner.spawn(migration, side).await?;
        let answer = agent_ready(&ready);
        let idle = IdleAgent { agent, ready };
        let replaced = lock(&self.daemon.idle_agents).insert((migration, side), idle);
        if let Some(other) = replaced {
            other.agent.end().await;
        }
        self.daemon.expire_agent(migration, side);
        Ok(answer)
    }

    fn prepare(
        &self,
        order: fleet::PrepareTarget,
    ) -> Result<watch::Receiver<Option<Result<crate::migration::target::Prepared, Problem>>>, Problem> {
        let order = PrepareOrder {
            migration: parse("migration", &order.migration)?,
            permit: order.permit,
            spec: json("the VM's spec", &order.spec_json)?,
            inventory: json("the VM's inventory", &order.inventory_json)?,
            source_address: parse("source's migration address", &order.source_migration_address)?,
            source_daemon_key: order.source_daemon_key,
        };
        Ok(self.migrations.prepare(order))
    }

    fn start(
        &self,
        order: fleet::StartSource,
    ) -> Result<watch::Receiver<Option<Result<(), Problem>>>, Problem> {
        let order = StartOrder {
            migration: parse("migration", &order.migration)?,
            permit: order.permit,
            inventory: json("the VM's inventory", &order.inventory_json)?,
            data_address: parse("data address", &order.data_address)?,
            peer_address: parse("peer address", &order.peer_address)?,
        };
        Ok(self.migrations.start(order))
    }

    /// The source's signed request, through the manager; the answer goes to the manager as a statement.
    fn renounce(&self, order: fleet::Renounce) -> Outcome {
        let key: HandoverKey = json("the key", &order.key_json)?;
        let request = self.migrations.verified_ask(order.request)?;
        if request.key != key {
            return Err(Problem::new(ErrorCode::BadRequest, "the request is about another attempt"));
        }
        let (asker, mut answers) = mpsc::channel(4);
        self.migrations.asked(key.migration, request, asker);
        tokio::spawn(async move {
            while let Some(said) = answers.recv().await {
                if let PeerAnswer::Status(status) = said {
                    tracing::info!(migration = %key.migration, ?status, "asked to renounce");
                }
            }
        });
        Ok(done())
    }

    fn decline(&self, order: &fleet::Decline) -> Outcome {
        let attempt = json("the attempt", &order.attempt_json)?;
        let reason = reason(&order.code, &order.detail);
        self.migrations.decline(attempt, side(&order.side)?, reason).map(|()| done())
    }

    /// Queues an order of a hand-over; its verdict comes later.
    fn hand_over(&self, body: Body) -> Result<oneshot::Receiver<Result<(), Problem>>, Problem> {
        let (reply, answered) = oneshot::channel();
        let (migration, input) = match body {
            Body::Commit(order) => {
                let key: HandoverKey = json("the key", &order.key_json)?;
                let evidence: StreamEvidence = json("the evidence", &order.evidence_json)?;
                let commit = target::Order::Commit { evidence, prior: prior(&order.prior)? };
                (key.migration, Input::Target(key, commit, reply))
            }
            Body::Void(order) => {
                let key: HandoverKey = json("the key", &order.key_json)?;
                let void = target::Order::Void { reason: reason(&order.code, &order.detail) };
                (key.migration, Input::Target(key, void, reply))
            }
            Body::Release(order) => {
                let key: HandoverKey = json("the key", &order.key_json)?;
                (key.migration, Input::Source(key, source::Order::Release, reply))
            }
            Body::Fenced(order) => {
                let key: HandoverKey = json("the key", &order.key_json)?;
                let resolution = resolution(&order.resolution)?;
                (key.migration, Input::Source(key, source::Order::Fenced { resolution }, reply))
            }
            Body::Abort(order) => {
                let key: HandoverKey = json("the key", &order.key_json)?;
                let reason = reason(&order.code, &order.detail);
                self.for_side(
                    key,
                    source::Order::Abort { reason: reason.clone() },
                    target::Order::Abort { reason },
                    reply,
                )?
            }
            Body::Present(order) => {
                let key: HandoverKey = json("the key", &order.key_json)?;
                self.for_side(key, source::Order::Present, target::Order::Present, reply)?
            }
            Body::Forget(order) => {
                let migration = parse("migration", &order.migration)?;
                self.daemon.discard_agents(migration);
                let key = self
                    .migrations
                    .key_of(migration)
                    .ok_or_else(|| crate::migration::registry::unknown(migration))?;
                self.for_side(key, source::Order::Close, target::Order::Close, reply)?
            }
            Body::Control(order) => {
                let migration = parse("migration", &order.migration)?;
                (migration, Input::Control(control(&order)?, reply))
            }
            _ => return Err(Problem::new(ErrorCode::BadRequest, "this host does not understand the order")),
        };
        self.migrations.deliver(migration, input)?;
        Ok(answered)
    }

    /// Orders that both sides know: by what this host's journal says that it is.
    fn for_side(
        &self,
        key: HandoverKey,
        to_source: source::Order,
        to_target: target::Order,
        reply: oneshot::Sender<Result<(), Problem>>,
    ) -> Result<(MigrationId, Input), Problem> {
        let side = self
            .migrations
            .side_of(key.migration)
            .ok_or_else(|| crate::migration::registry::unknown(key.migration))?;
        Ok(match side {
            Side::Source => (key.migration, Input::Source(key, to_source, reply)),
            Side::Target => (key.migration, Input::Target(key, to_target, reply)),
        })
    }
}

async fn prepared(
    late: watch::Receiver<Option<Result<crate::migration::target::Prepared, Problem>>>,
) -> Outcome {
    let prepared = settled(late).await?;
    Ok(reply::Result::Prepared(fleet::Prepared {
        data_address: prepared.data_address.to_string(),
        peer_address: prepared.peer_address.to_string(),
    }))
}

async fn settled<T: Clone>(mut late: watch::Receiver<Option<Result<T, Problem>>>) -> Result<T, Problem> {
    let gone = || Problem::new(ErrorCode::WrongState, "the attempt ended before it was ready");
    let settled = late.wait_for(Option::is_some).await.map_err(|_| gone())?;
    settled.clone().unwrap_or_else(|| Err(gone()))
}

fn done() -> reply::Result {
    reply::Result::Done(Done {})
}

fn agent_ready(ready: &Ready) -> reply::Result {
    reply::Result::Agent(fleet::AgentReady { spki_der: ready.spki.clone(), sandbox: ready.sandbox.clone() })
}

fn bad(text: String) -> Problem {
    Problem::new(ErrorCode::BadRequest, text)
}

fn parse<T: FromStr>(what: &str, text: &str) -> Result<T, Problem> {
    text.parse()
        .map_err(|_| bad(format!("{what} {:?} is malformed", text.chars().take(80).collect::<String>())))
}

fn json<T: serde::de::DeserializeOwned>(what: &str, text: &str) -> Result<T, Problem> {
    if text.len() > JSON_BYTES_MAX {
        return Err(bad(format!("{what} is too long")));
    }
    serde_json::from_str(text).map_err(|e| bad(format!("{what} is malformed: {e}")))
}

fn side(text: &str) -> Result<Side, Problem> {
    match text {
        "source" => Ok(Side::Source),
        "target" => Ok(Side::Target),
        _ => Err(bad(format!("{text:?} is no side"))),
    }
}

fn prior(text: &str) -> Result<PriorRunState, Problem> {
    match text {
        "running" => Ok(PriorRunState::Running),
        "paused" => Ok(PriorRunState::Paused),
        _ => Err(bad(format!("{text:?} is no run state"))),
    }
}

fn resolution(text: &str) -> Result<Resolution, Problem> {
    match text {
        "thaw" => Ok(Resolution::Thaw),
        "discard" => Ok(Resolution::Discard),
        _ => Err(bad(format!("{text:?} is no resolution"))),
    }
}

fn reason(code: &str, detail: &str) -> AbortReason {
    let code = code.parse().unwrap_or(ErrorCode::Terminated);
    AbortReason { code, detail: detail.chars().take(1000).collect() }
}

fn control(order: &fleet::Control) -> Result<Control, Problem> {
    match order.order.as_str() {
        "suspend" => Ok(Control::Suspend),
        "resume" => Ok(Control::Resume),
        "terminate" => Ok(Control::Terminate),
        "throttle" => Ok(Control::Throttle(order.bytes_per_second)),
        other => Err(bad(format!("{other:?} is no control order"))),
    }
}

fn name_of(body: &Body) -> &'static str {
    match body {
        Body::Welcome(_) => "welcome",
        Body::StartVm(_) => "start-vm",
        Body::StopVm(_) => "stop-vm",
        Body::Intent(_) => "intent",
        Body::QueryLoad(_) => "query-load",
        Body::SpawnAgent(_) => "spawn-agent",
        Body::Prepare(_) => "prepare-target",
        Body::Start(_) => "start-source",
        Body::Commit(_) => "commit",
        Body::Abort(_) => "abort",
        Body::Release(_) => "release",
        Body::Renounced(_) => "renounced",
        Body::Renounce(_) => "renounce",
        Body::Control(_) => "control",
        Body::Forget(_) => "forget",
        Body::StatementStored(_) => "statement-stored",
        Body::Fenced(_) => "fenced",
        Body::Void(_) => "void",
        Body::Present(_) => "present",
        Body::Decline(_) => "decline",
        Body::InspectVm(_) => "inspect-vm",
        Body::Quote(_) => "quote",
        Body::DescribeHypervisor(_) => "describe-hypervisor",
        Body::MicroProbe(_) => "micro-probe",
        Body::Checkpoint(_) => "checkpoint",
        Body::ReportHoldings(_) => "report-holdings",
    }
}
