//! Whether the registry may be decided by: kept in its own row, so that neither a restart forgets a doubt nor another
//! manager overlooks it, and here as this process last saw it.

use crate::clock;
use crate::core::Manager;
use registry::{LogRow, ManagerKey, Standing, Tx};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use types::{ErrorCode, HostName, Nonce, Problem};

/// The standing as this process knows it.
#[derive(Default)]
pub(crate) struct Trust {
    doubt: Mutex<Option<String>>,
    accepted_at_us: AtomicI64,
    /// Of the log, as it was last trusted here.
    generation: AtomicU64,
    /// Hosts with a certificate that the registry does not know, while it is in doubt: it may have forgotten them.
    strangers: Mutex<BTreeSet<HostName>>,
}

/// Names of unknown hosts that are kept.
const STRANGERS_LIMIT: usize = 1_000;

impl Trust {
    fn lock(&self) -> MutexGuard<'_, Option<String>> {
        self.doubt.lock().expect("no holder of this lock can panic: it only moves a text")
    }

    /// Why nothing new may be decided, if so.
    pub(crate) fn get(&self) -> Option<String> {
        self.lock().clone()
    }

    /// From now on nothing new is decided. The first reason stays.
    pub(crate) fn doubt(&self, why: &str) {
        self.lock().get_or_insert_with(|| why.to_owned());
    }

    /// As the registry's row has it. A doubt of this process's own stays.
    pub(crate) fn follow(&self, row: &LogRow) {
        self.accepted_at_us.fetch_max(row.accepted_at_us, Ordering::Relaxed);
        match row.standing {
            Standing::Trusted if self.get().is_none() => {
                self.generation.store(row.generation, Ordering::Relaxed)
            }
            Standing::Trusted => {}
            Standing::Restored | Standing::Distrusted => self.doubt(&row.why),
        }
    }

    /// An operator accepted the loss.
    fn accept(&self, row: &LogRow) {
        *self.lock() = None;
        self.strangers_lock().clear();
        self.follow(row);
    }

    fn strangers_lock(&self) -> MutexGuard<'_, BTreeSet<HostName>> {
        self.strangers.lock().expect("no holder of this lock can panic: it only moves names in a set")
    }

    /// A host that the registry does not know has a certificate of this manager's CA.
    pub(crate) fn met_stranger(&self, host: &HostName) {
        let mut strangers = self.strangers_lock();
        if self.get().is_some() && strangers.len() < STRANGERS_LIMIT {
            strangers.insert(host.clone());
        }
    }

    /// Those that were met.
    pub(crate) fn strangers(&self) -> BTreeSet<HostName> {
        self.strangers_lock().clone()
    }

    /// Requests from before the last reconciliation may have been used already, without anybody who remembers.
    ///
    /// # Errors
    /// `stale-request`.
    pub(crate) fn not_burned(&self, timestamp_unix_ms: u64) -> Result<(), Problem> {
        let accepted_ms = u64::try_from(self.accepted_at_us.load(Ordering::Relaxed) / 1_000).unwrap_or(0);
        if timestamp_unix_ms > accepted_ms {
            return Ok(());
        }
        let detail = "the request is from before the registry was reconciled: it may have been used already";
        Err(Problem::new(ErrorCode::StaleRequest, detail).hint("ask again"))
    }
}

/// The problem of deciding by a registry that may have forgotten.
pub(crate) fn doubtful(why: &str) -> Problem {
    let detail = format!("the registry may be older than what it has said: {why}");
    Problem::new(ErrorCode::AuditBroken, detail).hint(
        "restore a current registry, or have it reconciled from the hosts: `outrider audit reconcile` says what is \
         missing, see docs/runbooks/restore.md. VMs that run are not touched",
    )
}

/// Makes sure that the log has a row and this manager's key is known, and takes over how it stands.
///
/// # Errors
/// The registry fails.
pub(crate) async fn open(manager: &Manager) -> Result<LogRow, Problem> {
    let (key_id, public_key) = manager.authority.permit_key();
    let key = ManagerKey { key_id, manager: manager.config.name.to_string(), public_key };
    let mut tx = manager.begin("open the audit log").await?;
    let row = match tx.audit_log().await? {
        Some(row) => row,
        None => {
            let row = LogRow::new(Nonce::from_bytes(clock::random()?), tx.now_us());
            tx.put_audit_log(&row).await?;
            row
        }
    };
    tx.note_manager_key(&key).await?;
    tx.commit().await?;
    manager.forgetful.follow(&row);
    Ok(row)
}

/// Refuses inside a transaction that decides something new: another manager may have found that the log lacks something.
///
/// # Errors
/// `audit-broken`, or the registry fails.
pub(crate) async fn must_be_trusted(tx: &mut Tx) -> Result<(), Problem> {
    match tx.audit_log().await? {
        Some(row) if row.standing != Standing::Trusted => Err(doubtful(&row.why)),
        _ => Ok(()),
    }
}

/// The loss was accepted: what this process remembers of the log begins anew.
pub(crate) async fn reconciled(manager: &Manager, row: &LogRow) {
    let head = async { manager.registry.read("anchor").await?.audit_head().await };
    match head.await {
        Ok((sequence, hash)) => manager.anchor.begin_anew(row.generation, sequence, hash),
        Err(error) => tracing::warn!("cannot read the audit head: {error}"),
    }
    if let Err(problem) = manager.anchor.keep() {
        tracing::warn!("{problem}");
    }
    manager.forgetful.accept(row);
    tracing::warn!(generation = row.generation, "the registry is reconciled; it decides again");
}

/// Looks again while nothing new may be decided: another manager may have had the registry reconciled, and a doubt that could
/// not be written down is written down.
pub(crate) async fn look_again(manager: &Manager) {
    let row = async { manager.registry.read("standing").await?.audit_log().await };
    match row.await {
        Ok(Some(row)) if row.standing == Standing::Trusted => {
            if manager.config.shares_registry()
                && row.generation > manager.forgetful.generation.load(Ordering::Relaxed)
            {
                return reconciled(manager, &row).await;
            }
            let why = manager.forgetful.get().unwrap_or_default();
            if let Err(problem) = crate::migration::handover::distrust(manager, &why, None).await {
                tracing::error!("cannot say in the registry that it was set back: {problem}");
            }
        }
        Ok(_) => {}
        Err(error) => tracing::warn!("cannot look how the registry stands: {error}"),
    }
}

/// Notes a doubt in the row. The first one stays, with its time.
///
/// # Errors
/// The registry fails.
pub(crate) async fn mark(tx: &mut Tx, why: &str, first_bad: Option<u64>) -> Result<(), Problem> {
    let Some(mut row) = tx.audit_log().await? else { return Ok(()) };
    if row.standing == Standing::Trusted {
        (row.standing, row.why, row.since_us) = (Standing::Distrusted, why.to_owned(), tx.now_us());
    }
    row.first_bad = row.first_bad.or(first_bad);
    Ok(tx.put_audit_log(&row).await?)
}
