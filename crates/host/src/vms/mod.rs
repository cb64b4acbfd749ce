//! The VMs of this host: starting, stopping, preparing a target, adopting after a restart, cleaning up.
//!
//! A QEMU lives in its own session and cgroup and outlives the daemon. Its record is durable before it is started;
//! its cgroup is named in the record, so that a process whose id was never written down is found all the same.

pub mod instance;
pub mod record;
mod table;

use crate::cgroup::{Group, Hierarchies};
use crate::error::HostError;
use crate::folders::{self, Folders, last_words, private_folder};
use crate::freezer::{Freezer, FreezerKind};
use crate::process::{Process, Spawn};
use crate::qemu::binary::Binary;
use crate::qemu::catalogue::{CatalogueError, Catalogues, Shape};
use crate::qemu::command::{DEVICES_MAX, Launch, Paths, Purpose, arguments};
use crate::qemu::{inventory, tap};
use crate::sweep;
use instance::Instance;
use record::{Phase, Record};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::{Arc, MutexGuard};
use std::time::Duration;
use table::{Admission, SharedTable, Table};
use tokio::sync::mpsc;
use types::hypervisor::Abilities;
use types::inventory::Inventory;
use types::vm::{Accel, FileRef, VmSpec};
use types::{Digest, Epoch, ErrorCode, HandoverKey, Problem, VmId};

/// Touching a large guest's memory takes seconds before the monitor answers.
const START_TIMEOUT: Duration = Duration::from_secs(25);
const START_POLL: Duration = Duration::from_millis(5);
/// A polite `quit` gets this long before the kill.
const QUIT_TIMEOUT: Duration = Duration::from_secs(3);

/// The VMs of this host.
#[derive(Debug)]
pub struct Vms {
    qemu: Option<PathBuf>,
    binary: tokio::sync::Mutex<Option<Binary>>,
    user: Option<String>,
    serial_log: bool,
    folders: Folders,
    group: Group,
    catalogues: Arc<Catalogues>,
    table: SharedTable,
    ended: mpsc::UnboundedSender<Arc<Instance>>,
}

/// How the VMs are run.
#[derive(Debug, Clone)]
pub struct Settings {
    /// QEMU, when not from PATH.
    pub qemu: Option<PathBuf>,
    /// User of QEMU.
    pub user: Option<String>,
    /// Whether consoles are logged.
    pub serial_log: bool,
    /// The daemon's folders.
    pub folders: Folders,
    /// Cgroup of the VMs.
    pub cgroup: String,
}

/// A VM that was started.
#[derive(Debug, Clone)]
pub struct Started {
    /// What its stream will look like.
    pub inventory: Inventory,
    /// QEMU's process.
    pub pid: u32,
}

impl Vms {
    /// With the receiver of instances that have ended and were cleaned up (one message per QEMU, so its length is
    /// bounded by the number of QEMUs ever started).
    #[must_use]
    pub fn new(settings: Settings) -> (Arc<Self>, mpsc::UnboundedReceiver<Arc<Instance>>) {
        let (ended, receiver) = mpsc::unbounded_channel();
        let group = Hierarchies::detect().group(&settings.cgroup);
        let vms = Self {
            catalogues: Catalogues::new(&settings.folders, group.clone(), settings.user.clone()),
            qemu: settings.qemu,
            binary: tokio::sync::Mutex::default(),
            user: settings.user,
            serial_log: settings.serial_log,
            folders: settings.folders,
            group,
            table: SharedTable::default(),
            ended,
        };
        (Arc::new(vms), receiver)
    }

    /// Everything that lives here.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Instance>> {
        self.lock().held.values().cloned().collect()
    }

    /// The QEMU that holds a VM under an epoch.
    #[must_use]
    pub fn find(&self, vm: VmId, epoch: Epoch) -> Option<Arc<Instance>> {
        self.lock().held.values().find(|i| i.record().epoch == epoch && i.vm() == vm).cloned()
    }

    /// The QEMU in which a VM runs here (not one that waits for a migration).
    #[must_use]
    pub fn running(&self, vm: VmId) -> Option<Arc<Instance>> {
        self.lock().held.values().find(|i| i.vm() == vm && i.record().phase == Phase::Running).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock()
    }

    /// Starts a VM. Repeating the order is harmless, also while it is being carried out: both are answered the same.
    /// It is carried out to its end whether or not its caller waits.
    ///
    /// # Errors
    /// What is missing or wrong, in an operator's words. `vm-already-running`: something of it is, or may be, here.
    /// Any other code: nothing of it is left here.
    pub async fn start(self: &Arc<Self>, spec: &VmSpec, epoch: Epoch) -> Result<Started, Problem> {
        let late = match self.table.admit_start(spec.uuid, epoch)? {
            Admission::Before(started) => return Ok(started),
            Admission::Underway(late) => late,
            Admission::Yours(claim, sender, late) => {
                let (vms, spec) = (self.clone(), spec.clone());
                tokio::spawn(async move {
                    let outcome = vms.start_claimed(&spec, epoch).await;
                    drop(claim);
                    sender.send_replace(Some(outcome));
                });
                late
            }
        };
        table::settled(late).await
    }

    async fn start_claimed(self: &Arc<Self>, spec: &VmSpec, epoch: Epoch) -> Result<Started, Problem> {
        self.expect_nothing_of(spec.uuid)?;
        let binary = self.check(spec).await?;
        let machine = binary.machine(&spec.machine)?;
        let record = self.draft(spec, epoch, machine.clone(), Phase::Starting);
        // The dry run goes on while QEMU starts; the guest waits for both.
        let (launched, shape) =
            tokio::join!(self.launch(record, &binary), self.checked_shape(spec, &machine, &binary));
        let instance = launched?;
        let shape = match shape {
            Ok(shape) => shape,
            Err(error) => return Err(self.undo(&instance, error.problem()).await),
        };
        match self.let_go(&instance, epoch, &binary, &shape).await {
            Ok(inventory) => Ok(Started { inventory, pid: instance.process().id().pid }),
            Err(error) => Err(self.undo(&instance, error.problem()).await),
        }
    }

    async fn let_go(
        &self,
        instance: &Instance,
        epoch: Epoch,
        binary: &Binary,
        shape: &Shape,
    ) -> Result<Inventory, HostError> {
        let monitor = instance.monitor().await?;
        let machine = instance.record().machine;
        let inventory = inventory::enrol(&monitor, &machine, &binary.hypervisor, shape).await?;
        instance.learned(inventory.clone())?;
        // Running is on record before the guest runs: a crash in between leaves a paused guest that the manager
        // takes for running, never a running one that is ended as half-built.
        instance.change(Phase::Running, epoch)?;
        monitor.execute("cont", json!({})).await?;
        Ok(inventory)
    }

    /// Reads the QEMU program once, so that no migration waits for that.
    pub async fn identify(&self, binary: &Binary) {
        if let Err(error) = self.catalogues.identify(binary).await {
            tracing::warn!(problem = %error.problem(), "no VM can be started or received here");
        }
    }

    /// What this host's QEMU makes of a VM's devices; made now unless it is known.
    ///
    /// # Errors
    /// What is missing or wrong; nothing is left behind.
    pub async fn shape(&self, spec: &VmSpec, machine: &str) -> Result<Arc<Shape>, Problem> {
        let binary = self.binary().await?;
        let machine = binary.machine(machine)?;
        let key = self.catalogues.key(&binary, &machine, spec).await.map_err(|e| e.problem())?;
        if let Some(shape) = self.catalogues.known(key).await {
            return Ok(shape);
        }
        // A key names the files by what the spec says that they are.
        self.check(spec).await?;
        self.catalogues.make(key, &binary, &machine, spec).await.map_err(|e| e.problem())
    }

    /// What this host's QEMU can run, and which CPU features a VM with this machine type, CPU model and accelerator
    /// would have here.
    ///
    /// # Errors
    /// There is no QEMU, or it does not answer. That the CPU can't be found out is part of the answer.
    pub async fn abilities(
        &self,
        machine: &str,
        cpu_model: &str,
        accel: Accel,
    ) -> Result<Abilities, Problem> {
        let binary = self.binary().await?;
        let features = if !binary.machines().contains(machine) {
            Err(format!("its QEMU has no machine {machine}"))
        } else if !binary.cpu_models().contains(cpu_model) {
            Err(format!("its QEMU has no CPU model {cpu_model}"))
        } else if accel == Accel::Kvm && !Path::new("/dev/kvm").exists() {
            Err("it has no /dev/kvm".to_owned())
        } else {
            let found = self.catalogues.cpu_features(&binary, machine, cpu_model, accel).await;
            found.map_err(|problem| problem.detail)
        };
        let (cpu_features, cpu_missing) = match features {
            Ok(features) => (Some((*features).clone()), String::new()),
            Err(why) => (None, why),
        };
        Ok(Abilities {
            hypervisor: binary.hypervisor.clone(),
            machines: binary.machines().clone(),
            cpu_models: binary.cpu_models().clone(),
            cpu_features,
            cpu_missing,
        })
    }

    /// The same of a spec that has been checked.
    async fn checked_shape(
        &self,
        spec: &VmSpec,
        machine: &str,
        binary: &Binary,
    ) -> Result<Arc<Shape>, CatalogueError> {
        let key = self.catalogues.key(binary, machine, spec).await?;
        self.catalogues.make(key, binary, machine, spec).await
    }

    /// Starts a QEMU that waits, paused, for the stream of a migration.
    ///
    /// # Errors
    /// What is missing or wrong; nothing is left behind.
    pub async fn prepare(
        self: &Arc<Self>,
        spec: &VmSpec,
        key: &HandoverKey,
        inventory: &Inventory,
    ) -> Result<Arc<Instance>, Problem> {
        let claim = self.table.claim(spec.uuid, key.target_epoch)?;
        let (vms, spec, key, inventory) = (self.clone(), spec.clone(), *key, inventory.clone());
        // In its own task: a caller that is cancelled must not leave a QEMU that nobody holds.
        let work = tokio::spawn(async move {
            let _claim = claim;
            vms.prepare_claimed(&spec, &key, inventory).await
        });
        work.await.map_err(|e| Problem::new(ErrorCode::Internal, e.to_string()))?
    }

    async fn prepare_claimed(
        self: &Arc<Self>,
        spec: &VmSpec,
        key: &HandoverKey,
        inventory: Inventory,
    ) -> Result<Arc<Instance>, Problem> {
        self.expect_nothing_of(spec.uuid)?;
        let binary = self.check(spec).await?;
        let machine = binary.machine(&inventory.machine)?;
        let phase = Phase::Incoming { migration: key.migration };
        let mut record = self.draft(spec, key.target_epoch, machine, phase);
        record.inventory = Some(inventory);
        self.launch(record, &binary).await
    }

    /// Checks everything that can be known to fail before QEMU is started.
    async fn check(&self, spec: &VmSpec) -> Result<Binary, Problem> {
        spec.validate().map_err(|text| Problem::new(ErrorCode::BadRequest, text))?;
        if spec.nics.len() > DEVICES_MAX || spec.disks.len() > DEVICES_MAX {
            let text = format!("a VM has at most {DEVICES_MAX} interfaces and {DEVICES_MAX} disks");
            return Err(Problem::new(ErrorCode::BadRequest, text));
        }
        if spec.tpm {
            return Err(Problem::new(ErrorCode::BadRequest, "a virtual TPM is not supported yet"));
        }
        if spec.accel == Accel::Kvm && !Path::new("/dev/kvm").exists() {
            return Err(Problem::new(ErrorCode::HypervisorFailed, "this host has no /dev/kvm")
                .hint("enable virtualisation, or set `accel = \"tcg\"` in the VM's spec"));
        }
        let files: Vec<_> = spec.kernel.iter().chain(&spec.initrd).cloned().collect();
        tokio::task::spawn_blocking(move || files.iter().try_for_each(check_file))
            .await
            .map_err(|e| Problem::new(ErrorCode::Internal, e.to_string()))??;
        for disk in &spec.disks {
            if !Path::new(&disk.path).exists() {
                let text = format!("disk image {} does not exist on this host", disk.path);
                return Err(Problem::new(ErrorCode::BadRequest, text));
            }
        }
        self.binary().await
    }

    /// The QEMU at hand. Asking it takes a tenth of a second, so it is asked once.
    ///
    /// # Errors
    /// It is missing.
    pub async fn binary(&self) -> Result<Binary, Problem> {
        let mut known = self.binary.lock().await;
        let binary = Binary::find(self.qemu.as_deref(), known.take()).await?;
        *known = Some(binary.clone());
        Ok(binary)
    }

    fn draft(&self, spec: &VmSpec, epoch: Epoch, machine: String, phase: Phase) -> Record {
        Record {
            slot: record::slot(spec.uuid, epoch),
            spec: spec.clone(),
            epoch,
            machine,
            phase,
            process: None,
            taps: (0..spec.nics.len()).map(|index| tap::name(spec.uuid, epoch, index)).collect(),
            inventory: None,
        }
    }

    /// Record first, then cgroup, folder, taps, process, monitor; undone in full when any of it fails.
    async fn launch(self: &Arc<Self>, mut record: Record, binary: &Binary) -> Result<Arc<Instance>, Problem> {
        self.expect_free(&record)?;
        let (folder, group) = (self.folders.run.join(&record.slot), self.group.child(&record.slot));
        record.save(&self.folders.records()).map_err(|e| e.problem())?;
        let process = match self.spawn(&record, binary, &folder, &group).await {
            Ok(process) => process,
            Err(problem) => {
                let swept = self.sweep(&record).await;
                return Err(if swept { problem } else { may_be_here(&problem) });
            }
        };
        record.process = Some(process.id().clone());
        let saved = record.save(&self.folders.records());
        let instance = self.hold(record, process);
        let ready = match saved {
            Ok(()) => self.answering(&instance).await,
            Err(error) => Err(error.problem()),
        };
        match ready {
            Ok(()) => Ok(instance),
            Err(problem) => Err(self.undo(&instance, problem).await),
        }
    }

    /// Whether the place of a new QEMU is free: nothing may be overwritten or deleted that another one lives on.
    fn expect_free(&self, record: &Record) -> Result<(), Problem> {
        let taken = |text: String| Problem::new(ErrorCode::VmAlreadyRunning, text);
        let folder = self.folders.records();
        let path = record.path(&folder);
        if self.lock().held.contains_key(&record.slot) || path.try_exists().unwrap_or(true) {
            let text = format!("this host has a record of {} already: {}", record.spec.name, path.display());
            return Err(taken(text).hint("restart the host daemon, which takes its QEMU back or cleans up"));
        }
        let others = Record::load_all(&folder).map_err(|e| taken(e.problem().detail))?;
        if let Some(other) = others.iter().find(|o| o.taps.iter().any(|tap| record.taps.contains(tap))) {
            let text =
                format!("a tap of {} would have the name of one of {}", record.spec.name, other.spec.name);
            return Err(Problem::new(ErrorCode::WrongState, text));
        }
        Ok(())
    }

    /// Ends what could not be started in full; says so if it can't be ended either.
    async fn undo(&self, instance: &Arc<Instance>, problem: Problem) -> Problem {
        self.end(instance).await;
        if instance.process().is_alive() { may_be_here(&problem) } else { problem }
    }

    async fn spawn(
        &self,
        record: &Record,
        binary: &Binary,
        folder: &Path,
        group: &Group,
    ) -> Result<Process, Problem> {
        let prepare = || -> Result<(), HostError> {
            private_folder(folder)?;
            group.create()
        };
        prepare().map_err(|e| e.problem())?;
        if let Some(user) = &self.user {
            folders::give(folder, user).await?;
        }
        for (name, nic) in record.taps.iter().zip(&record.spec.nics) {
            tap::create(name, &nic.bridge, self.user.as_deref()).await?;
        }
        let launch = Launch {
            spec: &record.spec,
            machine: &record.machine,
            folder,
            taps: &record.taps,
            purpose: match record.phase {
                Phase::Incoming { .. } => Purpose::Incoming,
                Phase::Starting | Phase::Running => Purpose::Run,
            },
            serial_log: self.serial_log,
        };
        Spawn {
            program: &binary.path,
            arguments: arguments(&launch),
            environment: vec![],
            group,
            user: self.user.as_deref(),
            input: std::process::Stdio::null(),
            log: &Paths::new(folder).log,
        }
        .start()
        .map_err(|e| e.problem())
    }

    /// Waits until the monitor answers, or QEMU has ended and said why.
    async fn answering(&self, instance: &Instance) -> Result<(), Problem> {
        let work = async {
            while instance.process().is_alive() {
                if instance.paths().monitor.exists() && instance.monitor().await.is_ok() {
                    return Ok(());
                }
                tokio::time::sleep(START_POLL).await;
            }
            Err(Problem::new(
                ErrorCode::HypervisorFailed,
                format!("QEMU ended at its start: {}", last_words(&instance.paths().log)),
            ))
        };
        tokio::time::timeout(START_TIMEOUT, work)
            .await
            .map_err(|_| Problem::new(ErrorCode::HypervisorFailed, "QEMU's monitor did not answer in time"))?
    }

    /// Takes a live process under management: from here on its end is noticed and cleaned up after.
    fn hold(self: &Arc<Self>, record: Record, process: Process) -> Arc<Instance> {
        let group = self.group.child(&record.slot);
        let freezer = Freezer::new(FreezerKind::best(&group), &group, process.clone());
        let folder = self.folders.run.join(&record.slot);
        let slot = record.slot.clone();
        let instance =
            Arc::new(Instance::new(record, self.folders.records(), process, freezer, group, folder));
        self.lock().held.insert(slot.clone(), instance.clone());
        let (vms, held) = (self.clone(), instance.clone());
        tokio::spawn(async move {
            held.process().exited().await;
            held.clean_up().await;
            {
                let mut table = vms.lock();
                if table.held.get(&slot).is_some_and(|now| Arc::ptr_eq(now, &held)) {
                    table.held.remove(&slot);
                }
            }
            // The daemon is going down when nobody listens.
            vms.ended.send(held).ok();
        });
        instance
    }

    /// Stops a VM for good. Repeating the order is harmless.
    ///
    /// # Errors
    /// It is being started, is held under another epoch, lives without being held, or can't be ended.
    pub async fn stop(&self, vm: VmId, epoch: Epoch) -> Result<(), Problem> {
        let Some(instance) = self.lock().settled(vm)? else {
            return self.expect_nothing_of(vm);
        };
        let held = instance.record().epoch;
        // A later epoch is the registry's right: an attempt that never reached this host burnt some.
        if epoch < held {
            let text = format!("this host holds the VM under epoch {}, later than {}", held.0, epoch.0);
            return Err(Problem::new(ErrorCode::WrongState, text));
        }
        instance.expect_end();
        if let Ok(monitor) = instance.monitor().await {
            // QEMU may close the connection before it has answered: what counts is that it ends.
            monitor.execute_within("quit", json!({}), QUIT_TIMEOUT).await.ok();
            tokio::time::timeout(QUIT_TIMEOUT, instance.process().exited()).await.ok();
        }
        instance.kill().await.map_err(|e| e.problem())?;
        self.gone(&instance).await;
        Ok(())
    }

    /// What is not held may live all the same: no process may be left in any cgroup of the VM, nor by its records.
    fn expect_nothing_of(&self, vm: VmId) -> Result<(), Problem> {
        let here = |text: String| {
            Problem::new(ErrorCode::VmAlreadyRunning, text)
                .hint("restart the host daemon, which takes its QEMU back or ends it")
        };
        let mut records = Record::load_all(&self.folders.records()).map_err(|e| here(e.problem().detail))?;
        records.retain(|record| record.spec.uuid == vm);
        for record in &records {
            let process = record.process.as_ref().map_or(Ok(None), Process::adopt);
            if !matches!(process, Ok(None)) {
                return Err(here(format!("a QEMU of {} that nobody holds lives here", record.spec.name)));
            }
        }
        let prefix = record::slot_prefix(vm);
        for group in self.group.children() {
            let name = group.path().rsplit('/').next().unwrap_or_default();
            let of_vm = name.starts_with(&prefix) || records.iter().any(|r| r.slot == name);
            if of_vm && let [pid, ..] = group.processes()[..] {
                return Err(here(format!("process {pid} is still in the VM's cgroup {}", group.path())));
            }
        }
        Ok(())
    }

    /// Ends a QEMU of which nothing is worth keeping (never one that may hold the only copy of a guest).
    pub async fn end(&self, instance: &Arc<Instance>) {
        if let Err(error) = instance.kill().await {
            tracing::error!(%error, "cannot end QEMU");
        }
        self.gone(instance).await;
    }

    /// Waits until what has ended is cleaned up.
    async fn gone(&self, instance: &Instance) {
        let slot = instance.record().slot;
        for _ in 0..500 {
            if !self.lock().held.contains_key(&slot) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        tracing::error!(slot, "what an ended QEMU left behind is still there");
    }

    /// After a restart: takes back every QEMU that lives, and cleans up after those that do not.
    ///
    /// # Errors
    /// A record can't be read: then nobody can say which VMs live here, and the daemon must not.
    pub async fn adopt(self: &Arc<Self>) -> Result<(), HostError> {
        for record in Record::load_all(&self.folders.records())? {
            let process = match &record.process {
                Some(id) => Process::adopt(id)?,
                None => None,
            };
            match process {
                Some(process) if record.phase != Phase::Starting => {
                    tracing::info!(vm = %record.spec.name, pid = process.id().pid, "QEMU adopted");
                    self.hold(record, process);
                }
                _ => {
                    self.sweep(&record).await;
                }
            }
        }
        self.catalogues.sweep().await;
        Ok(())
    }

    /// Removes what is left of a QEMU that is not held: a half-started one is ended, by its cgroup. Whether
    /// nothing of it lives any more; its record stays otherwise.
    async fn sweep(&self, record: &Record) -> bool {
        let group = self.group.child(&record.slot);
        if let pids @ [_, ..] = &group.processes()[..] {
            tracing::warn!(?pids, slot = record.slot, "half-started QEMU is ended");
        }
        let rest = sweep::end_all(&group).await;
        if !rest.is_empty() {
            tracing::error!(?rest, slot = record.slot, "a half-started QEMU cannot be ended");
            return false;
        }
        for name in &record.taps {
            tap::remove(name).await;
        }
        sweep::remove_folder(&self.folders.run.join(&record.slot));
        sweep::remove_group(&group).await;
        folders::remove_file(&record.path(&self.folders.records()));
        true
    }
}

fn started_before(instance: &Instance, epoch: Epoch) -> Result<Started, Problem> {
    let record = instance.record();
    match (record.phase, record.inventory) {
        // One that has just ended and is being cleaned up after does not run.
        (Phase::Running, Some(inventory)) if record.epoch == epoch && instance.process().is_alive() => {
            Ok(Started { inventory, pid: instance.process().id().pid })
        }
        _ => Err(held_already(&instance.record())),
    }
}

fn held_already(record: &Record) -> Problem {
    Problem::new(
        ErrorCode::VmAlreadyRunning,
        format!("this host holds {} already, under epoch {}", record.spec.name, record.epoch.0),
    )
}

/// A failed start of which something may be left: its code must not read as "nothing of it is here".
fn may_be_here(problem: &Problem) -> Problem {
    let text = format!("the VM could not be started, and what was started of it cannot be ended: {problem}");
    Problem::new(ErrorCode::VmAlreadyRunning, text).hint("restart the host daemon, which ends it")
}

fn check_file(file: &FileRef) -> Result<(), Problem> {
    let path = Path::new(&file.path);
    let bad = |text: String| Problem::new(ErrorCode::BadRequest, text);
    let mut hasher = blake3::Hasher::new();
    std::fs::File::open(path)
        .and_then(|opened| hasher.update_reader(opened).map(|_| ()))
        .map_err(|e| bad(format!("cannot read {}: {e}", file.path)))?;
    let found = Digest(*hasher.finalize().as_bytes());
    if found == file.blake3 {
        return Ok(());
    }
    Err(bad(format!("{} has BLAKE3 {found}, the VM's spec says {}", file.path, file.blake3))
        .hint("install the right file on this host, or define the VM anew"))
}
