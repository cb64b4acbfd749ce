//! What every part of the manager shares.

use crate::anchor::Anchor;
use crate::attestation::{Looks, enrolment::Challenges};
use crate::authority::Authority;
use crate::clock;
use crate::config::Config;
use crate::feed::Feed;
use crate::fleet::Fleet;
use crate::http::Doorkeeper;
use crate::leases::Leases;
use crate::policy::shelf::Shelf;
use crate::trust::{self, Trust};
use registry::{Registry, RegistryError, Tx};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use types::{MigrationId, Name, Problem, Side};

/// The manager's shared parts.
pub(crate) struct Manager {
    pub(crate) config: Config,
    pub(crate) registry: Registry,
    pub(crate) authority: Authority,
    pub(crate) policies: Shelf,
    pub(crate) fleet: Fleet,
    pub(crate) feed: Feed,
    pub(crate) watch: Watch,
    pub(crate) hurry: Hurry,
    pub(crate) ordered: Ordered,
    pub(crate) leases: Leases,
    /// What targets did in micro-probes.
    pub(crate) probes: crate::migration::probe::History,
    /// Of the joins.
    pub(crate) door: Doorkeeper,
    /// At platforms, outside migrations.
    pub(crate) looks: Looks,
    /// Of the TPMs of hosts that join.
    pub(crate) challenges: Challenges,
    pub(crate) anchor: Anchor,
    /// Why the registry is not known to hold everything that it ever said, if so (H10).
    pub(crate) forgetful: Trust,
    /// When this process started, microseconds since the Unix epoch.
    pub(crate) started_us: i64,
    /// `host:port` that join tokens carry.
    pub(crate) advertised: String,
    pub(crate) shutdown: CancellationToken,
    pub(crate) tasks: TaskTracker,
}

impl Manager {
    /// As whom the manager itself acts in the audit log.
    pub(crate) fn actor(&self) -> String {
        format!("manager/{}", self.config.name)
    }

    /// Refuses what must not be decided by a registry that may have forgotten: grants, and starts of VMs.
    ///
    /// # Errors
    /// `audit-broken`.
    pub(crate) fn must_remember(&self) -> Result<(), Problem> {
        self.forgetful.get().map_or(Ok(()), |why| Err(trust::doubtful(&why)))
    }

    /// Begins a writing transaction now.
    pub(crate) async fn begin(&self, name: &'static str) -> Result<Tx, RegistryError> {
        self.registry.begin(name, clock::now_us()).await
    }

    /// Wakes the reconciler of a migration, starting it if it does not run. The wake-up carries nothing: the
    /// reconciler looks at the row.
    pub(crate) fn wake(self: &Arc<Self>, id: MigrationId) {
        if self.shutdown.is_cancelled() {
            return;
        }
        let (notify, fresh) = self.watch.enter(id);
        if fresh {
            let manager = Arc::clone(self);
            self.tasks.spawn(async move { crate::migration::reconcile::run(manager, id).await });
        }
        notify.notify_one();
    }

    /// Wakes every open migration.
    pub(crate) async fn wake_all(self: &Arc<Self>) -> Result<(), RegistryError> {
        for row in self.registry.read("open migrations").await?.open_migrations().await? {
            self.wake(row.id);
        }
        Ok(())
    }
}

/// Between a vote and the commit a guest stands still: what is only news keeps out of the registry's way for a moment.
#[derive(Default)]
pub(crate) struct Hurry(Mutex<Option<Instant>>);

/// A commit follows its votes within milliseconds; news may wait for this long, and no longer.
const HURRY_LIMIT: Duration = Duration::from_millis(100);

impl Hurry {
    fn lock(&self) -> MutexGuard<'_, Option<Instant>> {
        self.0.lock().expect("no holder of this lock can panic: it only copies")
    }

    /// A vote came.
    pub(crate) fn begin(&self) {
        self.lock().get_or_insert_with(Instant::now);
    }

    /// It is decided.
    pub(crate) fn end(&self) {
        *self.lock() = None;
    }

    /// Waits while there is hurry.
    pub(crate) async fn over(&self) {
        while self.lock().is_some_and(|since| since.elapsed() < HURRY_LIMIT) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let mut since = self.lock();
        if since.is_some_and(|s| s.elapsed() >= HURRY_LIMIT) {
            *since = None;
        }
    }
}

/// VMs about which a host has been given an order that it has not answered.
#[derive(Clone, Default)]
pub(crate) struct Ordered(Arc<Mutex<BTreeSet<Name>>>);

/// One such order; over when dropped.
pub(crate) struct Ordering {
    ordered: Ordered,
    vm: Name,
}

impl Ordered {
    fn lock(&self) -> MutexGuard<'_, BTreeSet<Name>> {
        self.0.lock().expect("no holder of this lock can panic: it only moves values in a set")
    }

    /// Whether one is under way about a VM.
    pub(crate) fn is_under_way(&self, vm: &Name) -> bool {
        self.lock().contains(vm)
    }

    /// Begins an order about a VM; `None` while another one is under way.
    pub(crate) fn enter(&self, vm: &Name) -> Option<Ordering> {
        self.lock().insert(vm.clone()).then(|| Ordering { ordered: self.clone(), vm: vm.clone() })
    }
}

impl Drop for Ordering {
    fn drop(&mut self) {
        self.ordered.lock().remove(&self.vm);
    }
}

/// Open migrations in this process: their wake-ups, and what moves too fast for the registry.
#[derive(Default)]
pub(crate) struct Watch {
    entries: Mutex<BTreeMap<MigrationId, Watched>>,
}

#[derive(Default)]
struct Watched {
    notify: Arc<Notify>,
    reconciled: bool,
    progress: Progress,
    sent: BTreeMap<(Side, &'static str), Instant>,
}

/// Counters of a running transfer. They are for people; nothing is decided by them but "no progress".
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Progress {
    /// Received at the target, on the wire.
    pub(crate) wire_bytes: u64,
    /// Largest stream position that either side told.
    pub(crate) stream_bytes: u64,
    /// When the stream last moved.
    pub(crate) moved_us: i64,
    /// The guest's memory, and what is left of it in this pass, as the source's QEMU last told.
    pub(crate) memory_bytes: u64,
    pub(crate) remaining_bytes: u64,
}

impl Watch {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<MigrationId, Watched>> {
        self.entries.lock().expect("no holder of this lock can panic: it only moves values in a map")
    }

    fn enter(&self, id: MigrationId) -> (Arc<Notify>, bool) {
        let mut entries = self.lock();
        let entry = entries.entry(id).or_default();
        let fresh = !std::mem::replace(&mut entry.reconciled, true);
        (Arc::clone(&entry.notify), fresh)
    }

    /// The wake-up of a migration whose reconciler runs.
    pub(crate) fn notify(&self, id: MigrationId) -> Arc<Notify> {
        Arc::clone(&self.lock().entry(id).or_default().notify)
    }

    /// Whether an order may go out now: not twice within `period`. Says yes once, and counts from then.
    pub(crate) fn may_send(&self, id: MigrationId, order: (Side, &'static str), period: Duration) -> bool {
        let mut entries = self.lock();
        let sent = &mut entries.entry(id).or_default().sent;
        let recently = sent.get(&order).is_some_and(|at| at.elapsed() < period);
        if !recently {
            sent.insert(order, Instant::now());
        }
        !recently
    }

    /// A side came back: whatever was on its way to it is lost, and goes out again.
    pub(crate) fn resend_all(&self) {
        for entry in self.lock().values_mut() {
            entry.sent.clear();
        }
    }

    /// Its reconciler ended.
    pub(crate) fn leave(&self, id: MigrationId) {
        self.lock().remove(&id);
    }

    /// Its counters.
    pub(crate) fn progress(&self, id: MigrationId) -> Progress {
        self.lock().get(&id).map(|e| e.progress).unwrap_or_default()
    }

    /// Changes its counters, when it is open in this process.
    pub(crate) fn update(&self, id: MigrationId, change: impl FnOnce(&mut Progress)) {
        if let Some(entry) = self.lock().get_mut(&id) {
            change(&mut entry.progress);
        }
    }
}
