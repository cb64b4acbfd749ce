//! What every part of the daemon shares: who this host is, its keys and journal, its VMs, and the way to the manager.

use crate::agents::{Agent, AgentSpawner, Ready};
use crate::checkpoints::Checkpoints;
use crate::config::PortRange;
use crate::error::chain;
use crate::folders::Folders;
use crate::journal::{Journal, JournalError};
use crate::outbox::Outbox;
use crate::peer::PeerSide;
use crate::platform::Platform;
use crate::probe::Prober;
use crate::scanner::ScannerSpawner;
use crate::vms::Vms;
use api::fleet::{self, to_manager::Body};
use engine::handover::journal::{Entry, NonceLedger, SourceEntry, SourceFact};
use permit::{KeyRing, SigningKey};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::watch;
use types::handover::{Side, Statement};
use types::{ErrorCode, HandoverKey, HostName, MigrationId, Nonce, Problem};

/// A permit follows its agents within seconds, and is good for a minute.
const IDLE_AGENT_LIFE: Duration = Duration::from_secs(120);

/// Shared by every task.
#[derive(Debug)]
pub struct Daemon {
    /// This host.
    pub name: HostName,
    /// Signs statements and the journal.
    pub key: Arc<SigningKey>,
    /// The managers' permit keys, as pinned at join and refreshed by every welcome.
    pub permit_keys: Mutex<KeyRing>,
    /// What the managers signed of their audit log.
    pub checkpoints: Arc<Checkpoints>,
    /// Written before acts.
    pub journal: Mutex<JournalStore>,
    /// Set when the daemon can't go on: its supervisor restarts it, and QEMUs survive that.
    pub broken: watch::Sender<Option<Problem>>,
    /// The VMs.
    pub vms: Arc<Vms>,
    /// Starts VM agents.
    pub spawner: AgentSpawner,
    /// Does micro-probes.
    pub prober: Prober,
    /// Starts scanners, where a permit asks for signatures.
    pub scanners: ScannerSpawner,
    /// Agents that were spawned before their permit.
    pub idle_agents: Mutex<BTreeMap<(MigrationId, Side), IdleAgent>>,
    /// To the manager.
    pub outbox: Outbox,
    /// Where things are.
    pub folders: Folders,
    /// On the migration network.
    pub migration_address: IpAddr,
    /// For agents and for "please renounce".
    pub data_ports: PortRange,
    /// The way to other daemons.
    pub peers: PeerSide,
    /// Its TPM, if it is to prove itself.
    pub platform: Option<Platform>,
    /// Of its id.
    pub trust_domain: String,
    /// Take no part in a migration whose other host did not prove its platform.
    pub require_attested_peer: bool,
}

/// An agent that waits for its permit.
#[derive(Debug)]
pub struct IdleAgent {
    /// The agent.
    pub agent: Agent,
    /// What it said.
    pub ready: Ready,
}

/// The journal with what it says, sorted by migration.
#[derive(Debug)]
pub struct JournalStore {
    journal: Journal,
    entries: BTreeMap<MigrationId, Vec<Entry>>,
    /// Attempts whose VM a later attempt was opened on: they have let go of its QEMU, whatever is seen of the process.
    superseded: BTreeSet<MigrationId>,
    /// Every nonce that was ever consumed here.
    pub ledger: NonceLedger,
}

impl JournalStore {
    /// From an opened journal.
    #[must_use]
    pub fn new(journal: Journal, all: Vec<Entry>) -> Self {
        let ledger = NonceLedger::rebuild(&all);
        let (entries, superseded) = (BTreeMap::new(), BTreeSet::new());
        let mut store = Self { journal, entries, superseded, ledger };
        for entry in all {
            store.remember(entry);
        }
        store
    }

    fn remember(&mut self, entry: Entry) {
        let key = *entry.key();
        if matches!(entry, Entry::Source(SourceEntry { fact: SourceFact::Opened { .. }, .. })) {
            let of_vm = |entries: &Vec<Entry>| entries.first().is_some_and(|e| e.key().vm == key.vm);
            let earlier = self.entries.iter().filter(|(id, e)| **id != key.migration && of_vm(e));
            let earlier: Vec<MigrationId> = earlier.map(|(id, _)| *id).collect();
            self.superseded.extend(earlier);
        }
        self.entries.entry(key.migration).or_default().push(entry);
    }

    /// Whether a later attempt was opened on the QEMU of this one's VM, so that it must be recovered as superseded: an
    /// old attempt that still acts would thaw what the newer one froze.
    #[must_use]
    pub fn superseded(&self, migration: MigrationId) -> bool {
        self.superseded.contains(&migration)
    }

    /// The journal's id.
    #[must_use]
    pub fn id(&self) -> Nonce {
        self.journal.id()
    }

    /// Makes an entry durable.
    ///
    /// # Errors
    /// It is not durable.
    pub fn append(&mut self, entry: Entry) -> Result<(), JournalError> {
        self.journal.append(&entry, now_unix_us())?;
        self.remember(entry);
        Ok(())
    }

    /// What was written about a migration, oldest first.
    #[must_use]
    pub fn of(&self, migration: MigrationId) -> &[Entry] {
        self.entries.get(&migration).map_or(&[], Vec::as_slice)
    }

    /// Every migration that has entries.
    #[must_use]
    pub fn migrations(&self) -> Vec<MigrationId> {
        self.entries.keys().copied().collect()
    }
}

/// A lock whose holder never leaves it half changed.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Daemon {
    /// Makes an entry durable without stalling other tasks.
    ///
    /// # Errors
    /// It is not durable; the step that it announces must not be taken.
    pub async fn journal(self: &Arc<Self>, entry: Entry) -> Result<(), JournalError> {
        let daemon = self.clone();
        let written = tokio::task::spawn_blocking(move || lock(&daemon.journal).append(entry))
            .await
            .expect("appending does not panic, and is not cancelled while the daemon lives");
        if let Err(error @ JournalError::Damaged { .. }) = &written {
            self.broken.send_replace(Some(Problem::new(ErrorCode::WrongState, chain(error))));
        }
        written
    }

    /// Waits until the daemon can't go on.
    pub async fn broke(&self) -> Problem {
        let mut broken = self.broken.subscribe();
        match broken.wait_for(Option::is_some).await.map(|problem| problem.clone()) {
            Ok(Some(problem)) => problem,
            // The sender lives as long as this.
            _ => std::future::pending().await,
        }
    }

    /// Signs a statement and queues it for the manager; gives the token.
    pub fn send_statement(&self, statement: &Statement) -> Option<Vec<u8>> {
        match permit::statement::sign(&self.key, statement) {
            Ok(signed) => {
                let token = signed.as_bytes().to_vec();
                self.outbox.push(Body::Statement(fleet::SignedStatement { token: token.clone() }));
                Some(token)
            }
            Err(error) => {
                tracing::error!(error = chain(&error), "a statement could not be signed");
                None
            }
        }
    }

    /// Shows a target's renunciation to the manager.
    pub fn present(&self, token: &[u8]) {
        self.outbox.push(Body::Statement(fleet::SignedStatement { token: token.to_vec() }));
    }

    /// Asks for the target's renunciation through the manager.
    pub fn ask_renounce(&self, key: &HandoverKey, request: &[u8]) {
        self.outbox.push(Body::AskRenounce(fleet::AskRenounce {
            key_json: serde_json::to_string(key).unwrap_or_default(),
            reason: "the guest is frozen on this host".to_owned(),
            request: request.to_vec(),
        }));
    }

    /// Tells what happens in a migration.
    pub fn event(&self, migration: MigrationId, kind: &str, detail: Value) {
        if kind != "progress" {
            tracing::info!(%migration, kind, %detail, "migration");
        }
        self.outbox.push(Body::Event(fleet::MigrationEvent {
            migration: migration.to_string(),
            at_unix_us: now_unix_us(),
            kind: kind.to_owned(),
            json: detail.to_string(),
        }));
    }

    /// Ends an agent that still waits for its permit after two minutes.
    pub fn expire_agent(self: &Arc<Self>, migration: MigrationId, side: Side) {
        let daemon = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(IDLE_AGENT_LIFE).await;
            if let Some(idle) = daemon.take_agent(migration, side) {
                tracing::warn!(%migration, %side, "no permit came for a VM agent");
                idle.agent.end().await;
            }
        });
    }

    /// Ends agents that still wait for the permit of a migration that has ended.
    pub fn discard_agents(self: &Arc<Self>, migration: MigrationId) {
        for side in [Side::Source, Side::Target] {
            if let Some(idle) = self.take_agent(migration, side) {
                tokio::spawn(async move { idle.agent.end().await });
            }
        }
    }

    /// The agent that waits for the permit of this migration.
    #[must_use]
    pub fn take_agent(&self, migration: MigrationId, side: Side) -> Option<IdleAgent> {
        lock(&self.idle_agents).remove(&(migration, side))
    }
}

/// Microseconds since the Unix epoch.
#[must_use]
pub fn now_unix_us() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

/// Seconds since the Unix epoch.
#[must_use]
pub fn now_unix_s() -> u64 {
    now_unix_us() / 1_000_000
}
