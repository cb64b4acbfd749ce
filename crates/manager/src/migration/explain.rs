//! What would become of a migration: every gate of a decision is asked, and nothing is written, spawned or moved. (A host
//! that is found not to be what it should is flagged, whatever it was asked for.)
//!
//! The answer holds for the moment in which it is given. The gates are those of the decision itself; what only a real
//! migration can show (agents that start, a target that is prepared, a stream that passes) is not among them.

use crate::attestation;
use crate::core::Manager;
use crate::http::Caller;
use crate::migration::gates::{self, Grounds};
use crate::migration::{Facts, compatibility, request};
use crate::policy::plans;
use crate::vms;
use api::http::{Explanation, Gate, GateOutcome, Migrate};
use attest::Purpose;
use registry::{HostRow, MigrationRow};
use std::fmt::Display;
use std::sync::Arc;
use types::{ErrorCode, HostName, Problem};

/// The gates in the order in which they are asked.
const NAMES: [&str; 11] = [
    "stream",
    "request",
    "source-identity",
    "target-identity",
    "source-platform",
    "target-platform",
    "policy",
    "devices",
    "compatibility",
    "load",
    "capacity",
];

/// Asks every gate.
///
/// # Errors
/// The registry can't be read, or was set back. A gate that refuses is no error.
pub(crate) async fn explain(
    manager: &Arc<Manager>,
    caller: &Caller,
    order: &Migrate,
) -> Result<Explanation, Problem> {
    manager.must_remember()?;
    let mut asked = Asked::default();
    let features = asked.gate(request::features(&manager.config, order).map(|features| {
        let how = if features.compression.is_empty() { "plain" } else { features.compression.as_str() };
        let text = format!("{} multifd channels, {how}", features.multifd_channels);
        (features, text)
    }))?;
    let mut tx = manager.registry.read("explain a migration").await?;
    request::seen(manager, &mut tx, caller, &order.vm).await?;
    let placed = request::gates(manager, &mut tx, order).await;
    let placed = asked.gate(placed.map(|(vm, source, target)| {
        let text = format!("the VM runs on {source}, both hosts are connected, no migration of it is open");
        ((vm, source, target), text)
    }))?;
    let Some((vm, source, target)) = placed else { return Ok(asked.finish(order, None)) };
    let row = request::intent(caller, &vm, (source, target), features.unwrap_or_default(), order.plan)?;
    let grounds = Grounds::read(&mut tx, &row).await?;
    manager.policies.refresh(&mut tx).await?;
    drop(tx);
    asked.of_hosts(manager, &row, &grounds).await?;
    Ok(asked.finish(order, Some(row.source)))
}

/// What was asked so far.
#[derive(Default)]
struct Asked {
    gates: Vec<Gate>,
}

impl Asked {
    /// Notes a gate's answer; gives what it came to. A registry that can't be read is no answer of a gate.
    fn gate<T>(&mut self, answer: Result<(T, impl Display), Problem>) -> Result<Option<T>, Problem> {
        let (value, outcome, code, detail) = match answer {
            Ok((value, text)) => (Some(value), GateOutcome::Passed, None, text.to_string()),
            Err(problem) if problem.code == ErrorCode::RegistryUnavailable => return Err(problem),
            Err(problem) => (None, GateOutcome::Refused, Some(problem.code), problem.detail),
        };
        let name = NAMES.get(self.gates.len()).copied().unwrap_or_default().to_owned();
        self.gates.push(Gate { name, outcome, code, detail });
        Ok(value)
    }

    async fn of_hosts(
        &mut self,
        manager: &Arc<Manager>,
        row: &MigrationRow,
        grounds: &Grounds,
    ) -> Result<(), Problem> {
        for host in [&grounds.source, &grounds.target] {
            let text = "certificate, address and interfaces are those of its record";
            self.gate(gates::live(manager, host).map(|_| ((), format!("{}: {text}", host.name()))))?;
        }
        for host in [&grounds.source, &grounds.target] {
            self.gate(platform(manager, host).await)?;
        }
        self.gate(permitted(manager, &Facts::of(row)?, grounds).await.map(|text| ((), text)))?;
        self.gate(devices(manager, row).await)?;
        self.gate(compatibility::check(manager, grounds).await.map(|text| ((), text)))?;
        let measured = match manager.fleet.require(&row.target) {
            Ok(session) => gates::trusted(manager, grounds, &session).await,
            Err(problem) => Err(problem),
        };
        let measured = self.gate(measured.map(|measured| {
            let load = &measured.load;
            let mib = load.memory_available_bytes >> 20;
            let text = format!("{} has {mib} MiB to give and runs {} VMs", row.target, load.vms);
            (measured, text)
        }))?;
        let Some(gates::Measured { load, asked_us }) = measured else { return Ok(()) };
        let mut tx = manager.registry.read("explain what is promised").await?;
        let promised = gates::promised_on(&mut tx, row, asked_us).await?;
        drop(tx);
        let need_mib = grounds.vm.spec.memory_bytes >> 20;
        let text = format!("room for {need_mib} MiB and {} vCPUs with head-room", grounds.vm.spec.vcpus);
        self.gate(gates::admit(manager, grounds, promised, &load).map(|()| ((), text)))?;
        Ok(())
    }

    fn finish(mut self, order: &Migrate, source: Option<HostName>) -> Explanation {
        let allowed = self.gates.len() == NAMES.len()
            && self.gates.iter().all(|gate| gate.outcome == GateOutcome::Passed);
        for name in NAMES.iter().skip(self.gates.len()) {
            let (name, detail) =
                ((*name).to_owned(), "not asked: it needs what an earlier gate refused".to_owned());
            self.gates.push(Gate { name, outcome: GateOutcome::NotAsked, code: None, detail });
        }
        Explanation { allowed, vm: order.vm.clone(), source, target: order.target.clone(), gates: self.gates }
    }
}

/// The same question as for a permit, but that no VM agent's key is in it.
async fn platform(manager: &Manager, host: &HostRow) -> Result<((), String), Problem> {
    let name = host.name();
    let session = manager.fleet.require(name)?;
    Ok(match attestation::prove(manager, host, &session, Purpose::HostCheck).await? {
        Some(_) => ((), format!("{name}: its TPM proves the state that is expected")),
        None => ((), format!("{name}: unattested, its record names no TPM")),
    })
}

/// Which policies permit it, and under which plan.
async fn permitted(manager: &Manager, facts: &Facts, grounds: &Grounds) -> Result<String, Problem> {
    let mut tx = manager.registry.read("explain policy").await?;
    let plan = plans::covering(manager, &mut tx, facts, grounds).await?;
    drop(tx);
    let held = manager.policies.in_force();
    let by = gates::authorise(manager, &held.policy, facts, grounds, plan.as_ref())?;
    let under = plan.map_or_else(String::new, |plan| format!(", under plan {}", plan.id));
    Ok(format!("permitted by {}{under}", by.join(", ")))
}

async fn devices(manager: &Arc<Manager>, row: &MigrationRow) -> Result<((), &'static str), Problem> {
    let differences = vms::look_at(manager, &row.source, row.vm).await?.differences?;
    if differences.is_empty() {
        return Ok(((), "the VM has the devices of its spec"));
    }
    let detail = format!("the VM does not have the devices of its spec: {}", differences.join(", "));
    Err(Problem::new(ErrorCode::DevicesDiffer, detail))
}
