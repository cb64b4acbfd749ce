//! The host daemon: drives QEMU, measures load, keeps a journal, spawns VM agents, and is the shell around the
//! hand-over's machines. It holds privileges and never touches a byte of the stream.
//!
//! ```text
//!  manager <── session ── orders ──> migrations ──> source / target shell ──> engine::handover
//!                 ^          │                          │ effects
//!                 │          v                          v
//!              outbox       vms (QEMU, freezer)   journal, agents, channel, peer
//! ```
//!
//! | module | job |
//! |---|---|
//! | [`config`], [`folders`], [`identity`], [`mod@join`] | who this host is, and where its things are |
//! | [`qmp`], [`qemu`], [`vms`] | QEMU: monitor, command line, life cycle, adoption |
//! | [`cgroup`], [`freezer`], [`process`], [`sweep`], [`load`] | the kernel's side: groups, freezing with proof, pid descriptors |
//! | [`journal`], [`daemon`], [`outbox`] | what is written down, shared, and told |
//! | [`probe`] | a moment's work, to prove that there is room for more |
//! | [`checkpoints`], [`holdings`] | what a manager signed of its log, and all that one must know that forgot |
//! | [`agents`], [`scanner`], [`channel`], [`peer`] | processes and sockets of one migration |
//! | [`migration`] | the hand-over |
//! | [`session`], [`orders`], `rpc` | the manager |
//! | [`platform`] | the TPM |

pub mod agents;
pub mod cgroup;
pub mod channel;
pub mod checkpoints;
pub mod config;
pub mod daemon;
pub mod error;
pub mod folders;
pub mod freezer;
pub mod holdings;
pub mod identity;
pub mod join;
pub mod journal;
pub mod load;
pub mod migration;
pub mod orders;
pub mod outbox;
pub mod peer;
pub mod platform;
pub mod probe;
pub mod process;
pub mod qemu;
pub mod qmp;
mod rpc;
pub mod scanner;
pub mod session;
pub mod sweep;
pub mod vms;

pub use config::{Config, JoinConfig, PortRange};
pub use join::join;

use crate::agents::AgentSpawner;
use crate::cgroup::Hierarchies;
use crate::checkpoints::Checkpoints;
use crate::daemon::{Daemon, JournalStore};
use crate::error::chain;
use crate::folders::{Folders, private_folder};
use crate::identity::{HostIdentity, IdentityFolder};
use crate::journal::Journal;
use crate::load::LoadMeter;
use crate::migration::registry::Migrations;
use crate::migration::source::fresh_nonce;
use crate::outbox::Outbox;
use crate::peer::PeerSide;
use crate::probe::Prober;
use crate::scanner::ScannerSpawner;
use crate::session::{SessionKeeper, certificate_warning};
use crate::vms::instance::Instance;
use crate::vms::{Settings, Vms};
use api::fleet::{VmEvent, to_manager};
use std::sync::{Arc, Mutex};
use tokio::sync::{mpsc, watch};
use types::{ErrorCode, Problem};

/// Runs the daemon until `shutdown`. QEMUs run on afterwards, and are adopted by the next start.
///
/// # Errors
/// The host has not joined, its journal is damaged (also while it runs), a VM's record can't be read, another daemon uses its folder, or a folder can't be used.
pub async fn run(config: Config, shutdown: impl Future<Output = ()> + Send) -> Result<(), Problem> {
    config.check()?;
    let identity = IdentityFolder::new(&config.state_folder).load()?;
    if let Some(warning) = certificate_warning(&identity) {
        tracing::warn!("{warning}");
    }
    let folders = Folders::create(&config.state_folder, &config.run_folder).map_err(|e| e.problem())?;
    let _lock = folders.lock()?;
    private_folder(&folders.state.join("migrations")).map_err(|e| e.problem())?;
    let (daemon, ended) = assemble(&config, &identity, folders)?;
    daemon.spawner.end_orphans().await;
    daemon.scanners.end_orphans().await;
    daemon.prober.sweep().await;
    // A VM that is still frozen under a vote is held first, and decided about by its hand-over.
    daemon.vms.adopt().await.map_err(|e| e.problem())?;
    let migrations = Migrations::new(daemon.clone());
    migrations.recover();
    end_stray_targets(&daemon, &migrations).await;
    match daemon.vms.binary().await {
        Ok(binary) => daemon.vms.identify(&binary).await,
        // VMs that run here are none the worse for it; orders that need it say so again.
        Err(problem) => tracing::warn!(%problem, "no VM can be started or received here"),
    }
    daemon.spawner.refill();
    if let Some(platform) = daemon.platform.clone() {
        tokio::spawn(async move { platform.warm_up().await });
    }
    daemon.prober.refill();
    let meter = LoadMeter::new(Hierarchies::detect().group(&config.cgroup).parent())
        .with_link(config.migration_address, config.link_mbit_per_s);
    let sampler = meter.clone();
    let keeper = SessionKeeper::new(daemon.clone(), identity, &config, meter, migrations);
    tracing::info!(host = %daemon.name, vms = daemon.vms.all().len(), "host daemon runs");
    let ended = tokio::select! {
        () = shutdown => Ok(()),
        () = keeper.keep() => Ok(()),
        () = sampler.sample() => Ok(()),
        () = tell_ends(daemon.clone(), ended) => Ok(()),
        problem = daemon.broke() => Err(problem),
    };
    daemon.spawner.end_spare().await;
    daemon.prober.sweep().await;
    // Agents end with this process's sockets; a source that is not frozen then resumes by itself.
    tracing::info!("host daemon ends; VMs run on");
    ended
}

fn assemble(
    config: &Config,
    identity: &HostIdentity,
    folders: Folders,
) -> Result<(Arc<Daemon>, mpsc::UnboundedReceiver<Arc<Instance>>), Problem> {
    let name = match &config.name {
        Some(name) if *name != identity.joined.name => {
            let text =
                format!("the configuration names {name}, but this host joined as {}", identity.joined.name);
            return Err(Problem::new(ErrorCode::BadConfiguration, text));
        }
        _ => identity.joined.name.clone(),
    };
    let fresh = fresh_nonce().map_err(|e| Problem::new(ErrorCode::Internal, e.to_string()))?;
    let (journal, entries) = Journal::open(&folders.journal(), identity.signing.clone(), fresh)
        .map_err(|e| Problem::new(ErrorCode::WrongState, chain(&e)))?;
    let settings = Settings {
        qemu: config.qemu_binary.clone(),
        user: config.qemu_user.clone(),
        serial_log: config.serial_log,
        folders: folders.clone(),
        cgroup: config.cgroup.clone(),
    };
    let (vms, ended) = Vms::new(settings);
    let group = Hierarchies::detect().group(&config.cgroup);
    let spawner =
        AgentSpawner::new(config.agent_binary.clone(), group.child("agents"), folders.run.join("agents"));
    let daemon = Daemon {
        name,
        key: identity.signing.clone(),
        permit_keys: Mutex::new(identity.joined.key_ring()),
        checkpoints: Arc::new(Checkpoints::open(&folders.state)?),
        journal: Mutex::new(JournalStore::new(journal, entries)),
        broken: watch::Sender::new(None),
        vms,
        prober: Prober::new(spawner.clone(), group.child("probes")),
        spawner,
        scanners: ScannerSpawner::new(
            config.scanner_binary.clone(),
            config.signature_rules.clone(),
            Hierarchies::detect().group(&config.cgroup).child("scanners"),
            folders.run.join("scanners"),
        ),
        idle_agents: Mutex::default(),
        outbox: Outbox::default(),
        folders,
        migration_address: config.migration_address,
        data_ports: config.data_ports,
        peers: PeerSide { identity: identity.tls.clone(), ca: identity.ca.clone() },
        platform: config.platform(),
        trust_domain: identity.joined.trust_domain.clone(),
        require_attested_peer: config.require_attested_peer,
    };
    Ok((Arc::new(daemon), ended))
}

/// A QEMU that waits for a migration of which the journal knows nothing, or which has ended: nothing is in it, unless
/// the journal says that it was told to run.
async fn end_stray_targets(daemon: &Arc<Daemon>, migrations: &Arc<Migrations>) {
    for instance in daemon.vms.all() {
        let record = instance.record();
        if let vms::record::Phase::Incoming { migration } = record.phase
            && !migrations.is_open(migration)
        {
            if migrations.was_run(migration) {
                if let Err(error) = instance.change(vms::record::Phase::Running, record.epoch) {
                    tracing::error!(error = chain(&error), "the VM's record is not up to date");
                }
                continue;
            }
            tracing::warn!(%migration, vm = %record.spec.name, "QEMU of a migration that is not open; ended");
            daemon.vms.end(&instance).await;
        }
    }
}

/// Tells the manager of QEMUs that ended without an order.
async fn tell_ends(daemon: Arc<Daemon>, mut ended: mpsc::UnboundedReceiver<Arc<Instance>>) {
    while let Some(instance) = ended.recv().await {
        if instance.is_end_expected() {
            continue;
        }
        let record = instance.record();
        tracing::warn!(vm = %record.spec.name, "QEMU ended by itself");
        daemon.outbox.push(to_manager::Body::VmEvent(VmEvent {
            vm: record.spec.uuid.to_string(),
            state: "dead".to_owned(),
            detail: format!("QEMU of {} ended by itself (epoch {})", record.spec.name, record.epoch.0),
        }));
    }
    std::future::pending::<()>().await;
}
