//! Catalogues of VMs' devices: made from this host's own QEMU by a dry run, and kept.
//!
//! ```text
//!  spec, machine, QEMU ──key──> in memory ──miss──> state folder ──miss──> dry run ──> compile, learn
//! ```
//!
//! What a catalogue says depends on the program and its firmware, the machine type and what shapes devices in the
//! spec, and on nothing else: all of that is in the key, so that an upgraded QEMU makes catalogues of its own. Two
//! requests for one key make it once; a request that is given up is carried out all the same, so that nothing is left.

mod cpu;
mod dry_run;
mod key;
mod store;

pub use dry_run::DryRunError;
pub use key::Key;

use crate::cgroup::Group;
use crate::daemon::lock;
use crate::error::{HostError, chain};
use crate::folders::Folders;
use crate::qemu::binary::Binary;
use crate::sweep;
use dry_run::{DryRun, Recording};
use engine::inspect::devices::compile;
use engine::inspect::{LearnError, Learner};
use key::Programs;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use store::Store;
use tokio::sync::Semaphore;
use types::inventory::{DeviceSection, RamBlock};
use types::layout::{Catalogue, MAX_CATALOGUE_BYTES};
use types::vm::VmSpec;
use types::{ErrorCode, Problem};

/// Shapes kept in memory: a fleet has a handful of VM shapes, and the state folder has the rest.
const SHAPES_MAX: usize = 32;
/// Dry runs at once: each is a process that starts, on a host that has guests to run.
const DRY_RUNS_MAX: usize = 2;
/// Dumps of descriptions kept in memory, 800 KB each: one for each machine type in use.
const DUMPS_MAX: usize = 4;

/// What this host's QEMU makes of VMs of one shape.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    /// For the inspector.
    pub catalogue: Catalogue,
    /// Every device section, in stream order.
    pub devices: Vec<DeviceSection>,
    /// RAM blocks, firmware pinned by its content. Lengths are of the dry run, not of any VM.
    pub ram_blocks: Vec<RamBlock>,
}

/// Why there is no catalogue.
#[derive(Debug, thiserror::Error)]
pub enum CatalogueError {
    /// The QEMU program or its firmware can't be read.
    #[error("the QEMU program cannot be identified")]
    Program(#[source] HostError),
    /// There is no recording.
    #[error("the dry run failed")]
    DryRun(#[source] DryRunError),
    /// The recording is none of a VM.
    #[error("the dry run cannot be read")]
    Learn(#[source] LearnError),
    /// The devices can't be described.
    #[error("the catalogue cannot be compiled")]
    Compile(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// What was recorded is not what the key names.
    #[error("QEMU, its firmware or a boot file was exchanged while it was looked at; ask again")]
    Exchanged,
    /// It is of no use to the inspector.
    #[error("the catalogue has {bytes} bytes, the inspector takes {MAX_CATALOGUE_BYTES}")]
    TooLarge {
        /// Its size as a document.
        bytes: usize,
    },
    /// A defect.
    #[error("the work on the catalogue broke off: {0}")]
    Broken(String),
}

impl CatalogueError {
    /// As people and scripts see it.
    #[must_use]
    pub fn problem(&self) -> Problem {
        let text = format!("no catalogue of the VM's devices could be made: {}", chain(self));
        Problem::new(ErrorCode::HypervisorFailed, text)
            .hint("its own QEMU must be able to start the VM's devices and to migrate them to a file")
    }
}

/// A place for the shape of one key; who makes it holds the lock.
type Slot = Arc<tokio::sync::Mutex<Option<Arc<Shape>>>>;

/// The catalogues of this host.
#[derive(Debug)]
pub struct Catalogues {
    store: Store,
    programs: Programs,
    slots: Mutex<BTreeMap<Key, Slot>>,
    dumps: Mutex<BTreeMap<Key, Arc<Vec<u8>>>>,
    cpus: Mutex<BTreeMap<Key, cpu::Features>>,
    cpu_turn: tokio::sync::Mutex<()>,
    turns: Semaphore,
    run_folder: PathBuf,
    group: Group,
    user: Option<String>,
}

impl Catalogues {
    /// Kept in the state folder; dry runs happen in the run folder and in children of `group`, as `user`.
    #[must_use]
    pub fn new(folders: &Folders, group: Group, user: Option<String>) -> Arc<Self> {
        Arc::new(Self {
            store: Store::new(folders.state.join("catalogue")),
            programs: Programs::default(),
            slots: Mutex::default(),
            dumps: Mutex::default(),
            cpus: Mutex::default(),
            cpu_turn: tokio::sync::Mutex::default(),
            turns: Semaphore::new(DRY_RUNS_MAX),
            run_folder: folders.run.clone(),
            group,
            user,
        })
    }

    /// Reads the program, which later keys know by its file's size and times.
    ///
    /// # Errors
    /// It can't be read.
    pub async fn identify(self: &Arc<Self>, binary: &Binary) -> Result<(), CatalogueError> {
        let (own, binary) = (self.clone(), binary.clone());
        let worked = tokio::task::spawn_blocking(move || own.programs.identify(&binary).map(|_| ())).await;
        worked.map_err(|e| CatalogueError::Broken(e.to_string()))?.map_err(CatalogueError::Program)
    }

    /// What names the shape of a VM on this QEMU.
    ///
    /// # Errors
    /// The program or its firmware can't be read.
    pub async fn key(
        self: &Arc<Self>,
        binary: &Binary,
        machine: &str,
        spec: &VmSpec,
    ) -> Result<Key, CatalogueError> {
        let (own, binary, machine, spec) =
            (self.clone(), binary.clone(), machine.to_owned(), key::reduced(spec));
        let work = move || own.programs.identify(&binary).map(|build| key::of(&build, &machine, &spec));
        // A program of 30 MB is read when it is first seen.
        let worked = tokio::task::spawn_blocking(work).await;
        worked.map_err(|e| CatalogueError::Broken(e.to_string()))?.map_err(CatalogueError::Program)
    }

    /// The shape with this key, if it was made before; waits for one that is being made.
    pub async fn known(self: &Arc<Self>, key: Key) -> Option<Arc<Shape>> {
        let slot = self.slot(key);
        let mut held = slot.lock().await;
        self.recall(key, &mut held).await
    }

    async fn recall(self: &Arc<Self>, key: Key, held: &mut Option<Arc<Shape>>) -> Option<Arc<Shape>> {
        if held.is_none() {
            let own = self.clone();
            let loaded = tokio::task::spawn_blocking(move || own.store.load(key)).await;
            *held = loaded.ok().flatten().map(Arc::new);
        }
        held.clone()
    }

    /// The shape with this key, which is that of the spec on this machine type and QEMU. Files that the spec names must
    /// have been checked.
    ///
    /// # Errors
    /// Why there is none; nothing of the attempt is left.
    pub async fn make(
        self: &Arc<Self>,
        key: Key,
        binary: &Binary,
        machine: &str,
        spec: &VmSpec,
    ) -> Result<Arc<Shape>, CatalogueError> {
        let (own, binary, machine, spec) =
            (self.clone(), binary.clone(), machine.to_owned(), key::reduced(spec));
        let slot = self.slot(key);
        // In its own task: a caller that is cancelled must not leave a process that nobody holds.
        let work = tokio::spawn(async move {
            let mut held = slot.lock().await;
            if let Some(shape) = own.recall(key, &mut held).await {
                return Ok(shape);
            }
            let shape = Arc::new(own.made(key, &binary, &machine, &spec).await?);
            *held = Some(shape.clone());
            Ok(shape)
        });
        work.await.map_err(|e| CatalogueError::Broken(e.to_string()))?
    }

    async fn made(
        self: &Arc<Self>,
        key: Key,
        binary: &Binary,
        machine: &str,
        spec: &VmSpec,
    ) -> Result<Shape, CatalogueError> {
        let _turn = self.turns.acquire().await.map_err(|e| CatalogueError::Broken(e.to_string()))?;
        let began = std::time::Instant::now();
        let recording = self.record(binary, machine, spec).await.map_err(CatalogueError::DryRun)?;
        let recorded_ms = began.elapsed().as_millis();
        let (own, binary, named, reduced) = (self.clone(), binary.clone(), machine.to_owned(), spec.clone());
        let work = move || {
            // An upgrade in between would be kept under the older program's key for good.
            let build = own.programs.identify(&binary).map_err(CatalogueError::Program)?;
            if key::of(&build, &named, &reduced) != key {
                return Err(CatalogueError::Exchanged);
            }
            let shape = shape_of(&recording, &binary.hypervisor)?;
            if let Err(error) = own.store.save(key, &shape) {
                // It is made again by the next daemon.
                tracing::warn!(error = chain(&error), "the catalogue cannot be kept");
            }
            Ok(shape)
        };
        let shape =
            tokio::task::spawn_blocking(work).await.map_err(|e| CatalogueError::Broken(e.to_string()))??;
        let (devices, took_ms) = (shape.devices.len(), began.elapsed().as_millis());
        tracing::info!(%key, machine, devices, recorded_ms, took_ms, "catalogue made");
        Ok(shape)
    }

    async fn record(&self, binary: &Binary, machine: &str, spec: &VmSpec) -> Result<Recording, DryRunError> {
        let dump_key = key::of_dump(binary, machine);
        let dump = lock(&self.dumps).get(&dump_key).cloned();
        let dry_run = DryRun {
            binary,
            machine,
            spec,
            run_folder: &self.run_folder,
            group: &self.group,
            user: self.user.as_deref(),
        };
        let recording = dry_run.record(dump).await?;
        let mut dumps = lock(&self.dumps);
        if dumps.len() >= DUMPS_MAX && !dumps.contains_key(&dump_key) {
            dumps.pop_first();
        }
        dumps.insert(dump_key, recording.dump.clone());
        Ok(recording)
    }

    fn slot(&self, key: Key) -> Slot {
        let mut slots = lock(&self.slots);
        if slots.len() >= SHAPES_MAX && !slots.contains_key(&key) {
            // One that nobody is at.
            let idle = slots.iter().find(|(_, slot)| Arc::strong_count(slot) == 1).map(|(key, _)| *key);
            idle.and_then(|key| slots.remove(&key));
        }
        slots.entry(key).or_default().clone()
    }

    /// At the daemon's start: ends and removes dry runs that an earlier one left.
    pub async fn sweep(&self) {
        for group in self.group.children() {
            let name = group.path().rsplit('/').next().unwrap_or_default().to_owned();
            if name.starts_with(dry_run::PREFIX) {
                sweep::end_all(&group).await;
                sweep::remove_group(&group).await;
            }
        }
        let entries = std::fs::read_dir(&self.run_folder).into_iter().flatten().flatten();
        for entry in entries.filter(|e| e.file_name().to_string_lossy().starts_with(dry_run::PREFIX)) {
            sweep::remove_folder(&entry.path());
        }
    }
}

/// What a recording shows.
fn shape_of(recording: &Recording, hypervisor: &str) -> Result<Shape, CatalogueError> {
    let mut learner = Learner::default();
    learner.feed(&recording.stream).map_err(CatalogueError::Learn)?;
    let inventory = learner.finish(hypervisor).map_err(CatalogueError::Learn)?.inventory;
    let catalogue = compile(&recording.stream, Some(&recording.dump), hypervisor)
        .map_err(|e| CatalogueError::Compile(e.into()))?;
    let bytes = serde_json::to_vec(&catalogue).map_err(|e| CatalogueError::Compile(e.into()))?.len();
    if bytes > MAX_CATALOGUE_BYTES {
        return Err(CatalogueError::TooLarge { bytes });
    }
    Ok(Shape { catalogue, devices: inventory.devices, ram_blocks: inventory.ram_blocks })
}
