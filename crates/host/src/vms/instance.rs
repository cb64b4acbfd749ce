//! One QEMU under this daemon: its process, its freezer, its monitors, its record.

use super::record::{Phase, Record};
use crate::cgroup::Group;
use crate::error::HostError;
use crate::folders::remove_file;
use crate::freezer::Freezer;
use crate::process::Process;
use crate::qemu::command::Paths;
use crate::qemu::{plugged, tap};
use crate::qmp::{Qmp, QmpError};
use crate::sweep;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use types::inventory::Inventory;
use types::{Epoch, VmId};

/// QEMU answers its monitor within this, also when it has just been started on a busy machine.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A live (or just ended) QEMU.
#[derive(Debug)]
pub struct Instance {
    record: Mutex<Record>,
    records: PathBuf,
    process: Process,
    freezer: Freezer,
    group: Group,
    folder: PathBuf,
    monitor: tokio::sync::Mutex<Option<Qmp>>,
    rescue: tokio::sync::Mutex<Option<Qmp>>,
    end_expected: AtomicBool,
}

impl Instance {
    /// Of a record whose process lives.
    #[must_use]
    pub fn new(
        record: Record,
        records: PathBuf,
        process: Process,
        freezer: Freezer,
        group: Group,
        folder: PathBuf,
    ) -> Self {
        let (monitor, rescue) = (tokio::sync::Mutex::default(), tokio::sync::Mutex::default());
        let end_expected = AtomicBool::new(false);
        let record = Mutex::new(record);
        Self { record, records, process, freezer, group, folder, monitor, rescue, end_expected }
    }

    fn lock(&self) -> MutexGuard<'_, Record> {
        // A record is replaced whole: a panic elsewhere can't leave it half changed.
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A copy of its record.
    #[must_use]
    pub fn record(&self) -> Record {
        self.lock().clone()
    }

    /// The VM.
    #[must_use]
    pub fn vm(&self) -> VmId {
        self.lock().spec.uuid
    }

    /// Changes its record, durably before the change is seen.
    ///
    /// # Errors
    /// It can't be written; nothing changed.
    pub fn change(&self, phase: Phase, epoch: Epoch) -> Result<(), HostError> {
        let mut record = self.lock();
        // Epochs only grow: a late word of an earlier attempt must not undo a later one.
        let changed = Record { phase, epoch: record.epoch.max(epoch), ..record.clone() };
        changed.save(&self.records)?;
        *record = changed;
        Ok(())
    }

    /// Keeps its inventory.
    ///
    /// # Errors
    /// It can't be written.
    pub fn learned(&self, inventory: Inventory) -> Result<(), HostError> {
        let mut record = self.lock();
        let changed = Record { inventory: Some(inventory), ..record.clone() };
        changed.save(&self.records)?;
        *record = changed;
        Ok(())
    }

    /// Its process.
    #[must_use]
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Its freezer.
    #[must_use]
    pub fn freezer(&self) -> &Freezer {
        &self.freezer
    }

    /// Kills it by order, and waits until it is gone.
    ///
    /// # Errors
    /// It is not.
    pub async fn kill(&self) -> Result<(), HostError> {
        self.end_expected.store(true, Ordering::SeqCst);
        self.freezer.kill().await
    }

    /// Marks that its end is ordered: no news for anybody.
    pub fn expect_end(&self) {
        self.end_expected.store(true, Ordering::SeqCst);
    }

    /// Whether its end was ordered.
    #[must_use]
    pub fn is_end_expected(&self) -> bool {
        self.end_expected.load(Ordering::SeqCst)
    }

    /// Its sockets.
    #[must_use]
    pub fn paths(&self) -> Paths {
        Paths::new(&self.folder)
    }

    /// The first monitor, connected when needed. A frozen QEMU does not answer.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn monitor(&self) -> Result<Qmp, QmpError> {
        open(&self.monitor, self.paths().monitor, false).await
    }

    /// The second monitor, for commands that must overtake a blocked one.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn rescue(&self) -> Result<Qmp, QmpError> {
        open(&self.rescue, self.paths().rescue, true).await
    }

    /// `query-status`: QEMU's word for how the guest stands.
    ///
    /// # Errors
    /// The monitor failed.
    pub async fn status(&self) -> Result<String, QmpError> {
        let status = self.monitor().await?.execute("query-status", json!({})).await?;
        Ok(status["status"].as_str().unwrap_or_default().to_owned())
    }

    /// `query-migrate`: QEMU's whole answer.
    ///
    /// # Errors
    /// The monitor failed.
    pub async fn migration(&self) -> Result<Value, QmpError> {
        self.monitor().await?.execute("query-migrate", json!({})).await
    }

    /// What was plugged into it, or unplugged, since it was started.
    ///
    /// # Errors
    /// The monitor failed.
    pub async fn differences(&self) -> Result<Vec<String>, QmpError> {
        let spec = self.record().spec;
        plugged::differences(&self.monitor().await?, &spec).await
    }

    /// Removes everything that was made for it, after its process has ended: taps, sockets, cgroup, record (I12).
    pub async fn clean_up(&self) {
        let record = self.record();
        for name in &record.taps {
            tap::remove(name).await;
        }
        let paths = self.paths();
        for file in [&paths.monitor, &paths.rescue, &paths.stream, &paths.log, &paths.serial] {
            remove_file(file);
        }
        if let Err(error) = std::fs::remove_dir(&self.folder)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(folder = %self.folder.display(), %error, "cannot remove folder");
        }
        sweep::remove_group(&self.group).await;
        remove_file(&record.path(&self.records));
    }
}

async fn open(slot: &tokio::sync::Mutex<Option<Qmp>>, path: PathBuf, oob: bool) -> Result<Qmp, QmpError> {
    let mut held = slot.lock().await;
    if let Some(qmp) = held.as_ref().filter(|qmp| qmp.is_open()) {
        return Ok(qmp.clone());
    }
    let (qmp, _) = Qmp::connect(&path, oob, CONNECT_TIMEOUT).await?;
    *held = Some(qmp.clone());
    Ok(qmp)
}
