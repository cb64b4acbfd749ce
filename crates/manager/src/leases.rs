//! Which of the managers that share a registry works on which migration.
//!
//! Whoever takes a request in holds the lease from that moment. A manager that finds an open migration which
//! nobody holds takes it when a host of it is connected here, or when nobody has come for it for a while.
//! Every manager says regularly that it is there, and prolongs what it holds; one that cannot, stops working
//! on it before others may begin. A registry of one manager (SQLite) has no leases.
//!
//! That no decision is made twice does not rest on this but on the registry's transactions: two reconcilers
//! of one migration would be wasteful, and spoil it at worst.

use crate::clock;
use crate::core::Manager;
use registry::{Acquired, Holder, Lease, Registry, Tx};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use types::{ErrorCode, MigrationId, Name, Problem};

/// How long others keep off a migration whose manager has fallen silent.
const LEASE_LIMIT: Duration = Duration::from_secs(6);
/// How often leases are prolonged: two of three may fail.
const RENEW_PERIOD: Duration = Duration::from_secs(2);
/// How long a migration that nobody holds waits for a manager that has its hosts.
const VACANT_US: i64 = 6_000_000;
/// How soon a migration that another manager holds is looked at again.
pub(crate) const LOOK_AGAIN: Duration = Duration::from_secs(1);

fn limit_us() -> i64 {
    i64::try_from(LEASE_LIMIT.as_micros()).unwrap_or(i64::MAX)
}

/// What this process holds.
pub(crate) struct Leases {
    /// `None`: nobody else is there.
    shared: Option<Holder>,
    held: Mutex<BTreeMap<MigrationId, Held>>,
    /// Another process runs under this manager's name.
    superseded: Notify,
}

struct Held {
    lease: Lease,
    /// By this process's own clock, and counted from before it was asked for: sooner than anybody else may
    /// begin.
    until: Instant,
}

impl Leases {
    /// Of a manager that has the registry for itself.
    pub(crate) fn alone() -> Self {
        Self { shared: None, held: Mutex::default(), superseded: Notify::new() }
    }

    /// Of a manager that shares the registry: from now on an earlier process of its name is superseded.
    ///
    /// # Errors
    /// The registry fails.
    pub(crate) async fn shared(registry: &Registry, name: &Name, address: &str) -> Result<Self, Problem> {
        let mut tx = registry.begin("a manager starts", clock::now_us()).await?;
        let holder = tx.manager_started(name, address, env!("CARGO_PKG_VERSION")).await?;
        tx.commit().await?;
        Ok(Self { shared: Some(holder), ..Self::alone() })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<MigrationId, Held>> {
        self.held.lock().expect("no holder of this lock can panic: it only moves values in a map")
    }

    /// Takes the lease of a migration that this manager has just added, in the same transaction. The returned
    /// value is for [`Leases::keep`], once that is committed.
    ///
    /// # Errors
    /// The registry fails, or this process is superseded.
    pub(crate) async fn take_new(&self, tx: &mut Tx, id: MigrationId) -> Result<Option<Taken>, Problem> {
        let Some(holder) = &self.shared else { return Ok(None) };
        self.take(tx, holder, id).await.map(|taken| match taken {
            Outcome::Ours(taken) => Some(taken),
            Outcome::Elsewhere | Outcome::Closed => None,
        })
    }

    async fn take(&self, tx: &mut Tx, holder: &Holder, id: MigrationId) -> Result<Outcome, Problem> {
        let until = Instant::now() + LEASE_LIMIT;
        match tx.lease_acquire(id, holder, limit_us()).await? {
            Acquired::Held(lease) => Ok(Outcome::Ours(Taken(Held { lease, until }))),
            Acquired::Elsewhere(_) => Ok(Outcome::Elsewhere),
            Acquired::NotOpen => Ok(Outcome::Closed),
            Acquired::Superseded => {
                self.superseded.notify_one();
                Err(superseded(&holder.manager))
            }
        }
    }

    /// Remembers a lease whose transaction is committed.
    pub(crate) fn keep(&self, taken: Option<Taken>) {
        if let Some(Taken(held)) = taken {
            self.lock().insert(held.lease.migration, held);
        }
    }

    /// Resolves when another process was started under this manager's name.
    pub(crate) async fn superseded(&self) {
        self.superseded.notified().await;
    }

    fn holds(&self, id: MigrationId) -> bool {
        self.lock().get(&id).is_some_and(|held| Instant::now() < held.until)
    }
}

/// A lease that is taken in a transaction which is not committed yet.
pub(crate) struct Taken(Held);

enum Outcome {
    Ours(Taken),
    Elsewhere,
    Closed,
}

/// The problem of a process whose name another one took.
pub(crate) fn superseded(name: &Name) -> Problem {
    let detail = format!("another process runs as manager {name} on this registry");
    Problem::new(ErrorCode::WrongState, detail).hint("give each manager of a registry a name of its own")
}

/// Whether this manager is to work on a migration now; takes the lease where that is right.
///
/// # Errors
/// The registry fails, or this process is superseded.
pub(crate) async fn ours(manager: &Manager, id: MigrationId) -> Result<bool, Problem> {
    let leases = &manager.leases;
    let Some(holder) = &leases.shared else { return Ok(true) };
    if leases.holds(id) {
        return Ok(true);
    }
    // Looked at before the writers' lock is taken: most are another manager's.
    if !is_for_us(manager, holder, id).await? {
        return Ok(false);
    }
    let mut tx = manager.begin("take a lease").await?;
    let outcome = leases.take(&mut tx, holder, id).await?;
    tx.commit().await?;
    match outcome {
        Outcome::Ours(taken) => {
            tracing::info!(migration = %id, "this manager works on it");
            leases.keep(Some(taken));
            Ok(true)
        }
        Outcome::Elsewhere => Ok(false),
        // What is left to do for a closed one may be done by all.
        Outcome::Closed => Ok(true),
    }
}

async fn is_for_us(manager: &Manager, holder: &Holder, id: MigrationId) -> Result<bool, Problem> {
    let mut tx = manager.registry.read("look at a lease").await?;
    let Some(row) = tx.migration(id).await?.filter(|row| row.open) else { return Ok(true) };
    if manager.fleet.session(&row.source).is_some() || manager.fleet.session(&row.target).is_some() {
        return Ok(tx.lease_elsewhere(id, holder).await?.is_none());
    }
    let now_us = tx.shared_clock_us().await?;
    let vacant_us = match tx.lease(id).await? {
        Some(lease) if lease.holder.manager == holder.manager => return Ok(true),
        Some(lease) => now_us - lease.expires_at_us,
        None => VACANT_US,
    };
    Ok(vacant_us >= VACANT_US && tx.lease_elsewhere(id, holder).await?.is_none())
}

/// Says regularly that this manager is there, prolongs its leases, and looks for migrations that nobody
/// holds. Ends when another process took its name.
pub(crate) async fn watch(manager: &Arc<Manager>) {
    let Some(holder) = &manager.leases.shared else { return };
    loop {
        tokio::time::sleep(RENEW_PERIOD).await;
        match renew(manager, holder).await {
            Ok(true) => {}
            Ok(false) => return manager.leases.superseded.notify_one(),
            Err(problem) => tracing::warn!("cannot prolong this manager's leases: {problem}"),
        }
        if let Err(error) = manager.wake_all().await {
            tracing::warn!("cannot look for open migrations: {error}");
        }
    }
}

async fn renew(manager: &Manager, holder: &Holder) -> Result<bool, Problem> {
    let until = Instant::now() + LEASE_LIMIT;
    let mut tx = manager.begin("prolong leases").await?;
    if !tx.manager_seen(holder).await? {
        return Ok(false);
    }
    tx.sweep_leases().await?;
    tx.leases_renew(holder, limit_us()).await?;
    let ours: BTreeMap<MigrationId, Lease> =
        tx.leases().await?.into_iter().filter(|l| l.holder == *holder).map(|l| (l.migration, l)).collect();
    tx.commit().await?;
    let mut held = manager.leases.lock();
    // Taken meanwhile, in a transaction of its own: not in this picture, and good for its own time.
    held.retain(|id, h| ours.contains_key(id) || Instant::now() < h.until);
    for (id, lease) in ours {
        held.insert(id, Held { lease, until });
    }
    Ok(true)
}

/// Lets go of everything: managers that have the hosts go on at once. The rows stay, so that this one, if it
/// is only restarted, comes before those that do not have them.
pub(crate) async fn release(manager: &Manager) {
    let Some(holder) = &manager.leases.shared else { return };
    let released = async {
        let mut tx = manager.begin("let go of leases").await?;
        tx.leases_renew(holder, 0).await?;
        tx.commit().await
    };
    if let Err(error) = released.await {
        tracing::warn!("cannot let go of leases; others take them over when their time is over: {error}");
    }
}
