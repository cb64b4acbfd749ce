//! Which VMs have a QEMU here, or are about to have one. A VM is claimed before anything is done for it, so that two
//! orders can never start two QEMUs of it (I1).

use super::Started;
use super::instance::Instance;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::watch;
use types::{Epoch, ErrorCode, Problem, VmId};

/// The outcome of a start, for everybody who ordered it.
pub(super) type Late = watch::Receiver<Option<Result<Started, Problem>>>;

/// What lives here and what is being started.
#[derive(Debug, Default)]
pub(super) struct Table {
    /// By slot.
    pub(super) held: BTreeMap<String, Arc<Instance>>,
    /// At most one per VM, whatever the epoch.
    underway: BTreeMap<VmId, Underway>,
}

#[derive(Debug)]
struct Underway {
    epoch: Epoch,
    /// Of a start; a target that is being prepared is awaited by its own hand-over alone.
    outcome: Option<Late>,
}

/// The table, shared with the claims on it.
#[derive(Debug, Clone, Default)]
pub(super) struct SharedTable(Arc<Mutex<Table>>);

/// The right to start a QEMU of a VM; given back when it is dropped, however its holder ends.
#[derive(Debug)]
pub(super) struct Claim {
    table: SharedTable,
    vm: VmId,
}

/// What becomes of an order to start.
pub(super) enum Admission {
    /// It runs already.
    Before(Started),
    /// The same order is being carried out.
    Underway(Late),
    /// Nobody else does it.
    Yours(Claim, watch::Sender<Option<Result<Started, Problem>>>, Late),
}

impl SharedTable {
    pub(super) fn lock(&self) -> MutexGuard<'_, Table> {
        // Every change is a single insertion or removal.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Admits an order to start, in one step.
    pub(super) fn admit_start(&self, vm: VmId, epoch: Epoch) -> Result<Admission, Problem> {
        let mut table = self.lock();
        if let Some(underway) = table.underway.get(&vm) {
            return match &underway.outcome {
                Some(late) if underway.epoch == epoch => Ok(Admission::Underway(late.clone())),
                _ => Err(being_started(underway.epoch)),
            };
        }
        if let Some(instance) = table.held.values().find(|i| i.vm() == vm) {
            return super::started_before(instance, epoch).map(Admission::Before);
        }
        let (sender, late) = watch::channel(None);
        table.underway.insert(vm, Underway { epoch, outcome: Some(late.clone()) });
        Ok(Admission::Yours(Claim { table: self.clone(), vm }, sender, late))
    }

    /// Claims a VM of which a target is prepared.
    pub(super) fn claim(&self, vm: VmId, epoch: Epoch) -> Result<Claim, Problem> {
        let mut table = self.lock();
        if let Some(underway) = table.underway.get(&vm) {
            return Err(being_started(underway.epoch));
        }
        if let Some(instance) = table.held.values().find(|i| i.vm() == vm) {
            return Err(super::held_already(&instance.record()));
        }
        table.underway.insert(vm, Underway { epoch, outcome: None });
        Ok(Claim { table: self.clone(), vm })
    }
}

impl Table {
    /// The QEMU of a VM, unless one is being started.
    pub(super) fn settled(&self, vm: VmId) -> Result<Option<Arc<Instance>>, Problem> {
        if let Some(underway) = self.underway.get(&vm) {
            let text = format!("the VM is being started here under epoch {}", underway.epoch.0);
            return Err(Problem::new(ErrorCode::WrongState, text).hint("try again in half a minute"));
        }
        Ok(self.held.values().find(|i| i.vm() == vm).cloned())
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.table.lock().underway.remove(&self.vm);
    }
}

/// Waits for the outcome of a start.
pub(super) async fn settled(mut late: Late) -> Result<Started, Problem> {
    // Whoever started it is gone without a word: what is left of the VM is unknown.
    let lost = || Problem::new(ErrorCode::VmAlreadyRunning, "the start of the VM broke off on this host");
    let settled = late.wait_for(Option::is_some).await.map_err(|_| lost())?;
    settled.clone().unwrap_or_else(|| Err(lost()))
}

fn being_started(epoch: Epoch) -> Problem {
    let text = format!("this host is starting the VM already, under epoch {}", epoch.0);
    Problem::new(ErrorCode::VmAlreadyRunning, text)
}
