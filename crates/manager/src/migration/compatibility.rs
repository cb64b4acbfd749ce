//! Gate `compatibility`: what the target's QEMU can run, against what the VM is on the source. Both hosts are asked; the
//! judgement is `engine::compatibility`.

use crate::core::Manager;
use crate::fleet::Session;
use crate::migration::gates::{Grounds, unexpected};
use api::fleet::{DescribeHypervisor, reply, to_host};
use engine::compatibility::{Incompatibility, Need, judge};
use std::time::Duration;
use types::hypervisor::{Abilities, MAX_ABILITIES_BYTES};
use types::vm::{Accel, VmSpec};
use types::{ErrorCode, Problem};

/// A QEMU that was asked before answers at once; one that was not is started for it, a tenth of a second when the host
/// is not busy.
const DESCRIBE_LIMIT: Duration = Duration::from_secs(10);

/// Whether the target can run the VM as the source runs it; says what was compared.
///
/// # Errors
/// `incompatible-target` with what is missing there, or a host that does not answer.
pub(crate) async fn check(manager: &Manager, grounds: &Grounds) -> Result<String, Problem> {
    let spec = &grounds.vm.spec;
    let machine = machine(grounds)?;
    let hosts =
        (manager.fleet.require(grounds.source.name())?, manager.fleet.require(grounds.target.name())?);
    let (source, target) = tokio::try_join!(ask(&hosts.0, machine, spec), ask(&hosts.1, machine, spec))?;
    let need = Need { machine, cpu_model: &spec.cpu_model };
    judge(need, &source, &target).map_err(|why| refusal(grounds, &why))?;
    let features = source.cpu_features.as_ref().map_or(0, std::collections::BTreeSet::len);
    Ok(format!(
        "{machine} with CPU {} and its {features} features, from {} to {}",
        spec.cpu_model, source.hypervisor, target.hypervisor
    ))
}

/// The exact machine type: the spec may name an alias, which means another machine to each QEMU.
fn machine(grounds: &Grounds) -> Result<&str, Problem> {
    let inventory = grounds.vm.inventory.as_ref();
    inventory.map(|i| i.machine.as_str()).ok_or_else(|| {
        let detail = format!("VM {} has no inventory: its machine type is not known", grounds.vm.spec.name);
        Problem::new(ErrorCode::VmNotRunning, detail).hint("stop and start it, so that it is enrolled")
    })
}

async fn ask(session: &Session, machine: &str, spec: &VmSpec) -> Result<Abilities, Problem> {
    let order = DescribeHypervisor {
        machine: machine.to_owned(),
        cpu_model: spec.cpu_model.clone(),
        accel: match spec.accel {
            Accel::Kvm => "kvm",
            Accel::Tcg => "tcg",
        }
        .to_owned(),
    };
    let bad = |detail: String| {
        let detail = format!("host {}: {detail}", session.host);
        Problem::new(ErrorCode::IncompatibleTarget, detail)
    };
    match session.order(to_host::Body::DescribeHypervisor(order), DESCRIBE_LIMIT).await {
        Ok(reply::Result::Hypervisor(said)) if said.abilities_json.len() > MAX_ABILITIES_BYTES => {
            Err(bad("it says more of its QEMU than any QEMU can".to_owned()))
        }
        Ok(reply::Result::Hypervisor(said)) => serde_json::from_str(&said.abilities_json)
            .map_err(|e| bad(format!("what it says of its QEMU cannot be read: {e}"))),
        Ok(other) => Err(unexpected(&session.host, "describe-hypervisor", &other)),
        // A daemon of an earlier version does not know the question: what it can run is then not known.
        Err(problem) if problem.code == ErrorCode::BadRequest => {
            Err(bad(format!("it cannot say what its QEMU can run ({})", problem.detail))
                .hint("bring the host's daemon up to date"))
        }
        Err(problem) => Err(problem),
    }
}

fn refusal(grounds: &Grounds, why: &Incompatibility) -> Problem {
    let (name, target) = (&grounds.vm.spec.name, grounds.target.name());
    let hint = match why {
        Incompatibility::Machine { .. } => {
            "move it to a host with a newer QEMU, or define the VM with a machine that all hosts know"
        }
        Incompatibility::CpuModel { .. } | Incompatibility::CpuFeatures { .. } => {
            "define the VM with a CPU model that all hosts can give, and start it anew"
        }
        Incompatibility::Unknown { .. } => "see what the host's daemon logs about its QEMU",
    };
    // The host's words are its own, and may be long.
    let text: String = why.to_string().chars().take(1_000).collect();
    Problem::new(ErrorCode::IncompatibleTarget, format!("host {target} cannot run VM {name}: {text}"))
        .hint(hint)
}
