//! Compatibility: whether the target's QEMU can run what the source's QEMU runs, before anything moves. What a side
//! does not say counts as "no".

use std::collections::BTreeSet;
use types::Side;
use types::hypervisor::Abilities;

/// What the VM was started with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need<'a> {
    /// Exact machine type, from its inventory.
    pub machine: &'a str,
    /// CPU model, from its spec.
    pub cpu_model: &'a str,
}

/// Features that a message names; more of them say no more.
const NAMED_MAX: usize = 12;

/// Why the target can't run it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Incompatibility {
    /// Its QEMU is too old for the machine type, or lost it.
    #[error("machine {machine} is not known to its {hypervisor}; {}", newest_text(.newest.as_deref()))]
    Machine {
        /// The VM's.
        machine: String,
        /// The target's QEMU.
        hypervisor: String,
        /// The newest machine type of the same family that it knows.
        newest: Option<String>,
    },
    /// Its QEMU has no such CPU model.
    #[error("CPU model {cpu_model} is not known to its {hypervisor}")]
    CpuModel {
        /// The VM's.
        cpu_model: String,
        /// The target's QEMU.
        hypervisor: String,
    },
    /// The guest has CPU features on the source that it would not have there.
    #[error("CPU {cpu_model} lacks features there that the guest has now: {}", named(.missing))]
    CpuFeatures {
        /// The VM's model.
        cpu_model: String,
        /// CPUID flags.
        missing: BTreeSet<String>,
    },
    /// A side can't say which CPU features the VM gets.
    #[error("the {side} cannot say which CPU features the VM has there: {why}")]
    Unknown {
        /// Which.
        side: Side,
        /// What it says instead.
        why: String,
    },
}

fn newest_text(newest: Option<&str>) -> String {
    newest.map_or_else(
        || "it knows no machine of that family".to_owned(),
        |name| format!("newest it knows: {name}"),
    )
}

fn named(missing: &BTreeSet<String>) -> String {
    let mut text = missing.iter().take(NAMED_MAX).map(String::as_str).collect::<Vec<_>>().join(", ");
    if missing.len() > NAMED_MAX {
        text.push_str(&format!(" and {} more", missing.len() - NAMED_MAX));
    }
    text
}

/// Whether the target can run what the source runs. More features on the target do no harm: the guest asked once,
/// when it booted.
///
/// # Errors
/// The first thing that does not fit: machine type, CPU model, CPU features.
pub fn judge(need: Need<'_>, source: &Abilities, target: &Abilities) -> Result<(), Incompatibility> {
    let hypervisor = || target.hypervisor.clone();
    if !target.machines.contains(need.machine) {
        let newest = newest_like(need.machine, &target.machines);
        return Err(Incompatibility::Machine {
            machine: need.machine.to_owned(),
            hypervisor: hypervisor(),
            newest,
        });
    }
    if !target.cpu_models.contains(need.cpu_model) {
        let cpu_model = need.cpu_model.to_owned();
        return Err(Incompatibility::CpuModel { cpu_model, hypervisor: hypervisor() });
    }
    let (has, gets) = (features(Side::Source, source)?, features(Side::Target, target)?);
    let missing: BTreeSet<_> = has.difference(gets).cloned().collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(Incompatibility::CpuFeatures { cpu_model: need.cpu_model.to_owned(), missing })
}

fn features(side: Side, of: &Abilities) -> Result<&BTreeSet<String>, Incompatibility> {
    of.cpu_features.as_ref().ok_or_else(|| {
        let why =
            if of.cpu_missing.is_empty() { "it gives no reason".to_owned() } else { of.cpu_missing.clone() };
        Incompatibility::Unknown { side, why }
    })
}

/// The newest machine type of the same family: `pc-q35-10.0` is newer than `pc-q35-9.2`.
fn newest_like(machine: &str, known: &BTreeSet<String>) -> Option<String> {
    let (family, _) = version(machine)?;
    let of_family = known.iter().filter_map(|name| {
        let (other, number) = version(name)?;
        (other == family).then_some((number, name))
    });
    of_family.max().map(|(_, name)| name.clone())
}

/// Family and version: `pc-q35`, `[10, 0]`.
fn version(machine: &str) -> Option<(&str, Vec<u32>)> {
    let (family, number) = machine.rsplit_once('-')?;
    let parts = number.split('.').map(str::parse).collect::<Result<Vec<u32>, _>>().ok()?;
    Some((family, parts))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(words: &str) -> BTreeSet<String> {
        words.split_whitespace().map(str::to_owned).collect()
    }

    fn abilities(version: &str, machines: &str, features: Option<&str>) -> Abilities {
        Abilities {
            hypervisor: format!("qemu/{version}"),
            machines: set(machines),
            cpu_models: set("qemu64 EPYC"),
            cpu_features: features.map(set),
            cpu_missing: if features.is_some() { String::new() } else { "it has no /dev/kvm".to_owned() },
        }
    }

    fn check(need: (&str, &str), source: Option<&str>, target: &Abilities, expect: &str) {
        let source = abilities("10.0.2", "pc-q35-10.0 pc-q35-7.2", source);
        let need = Need { machine: need.0, cpu_model: need.1 };
        let said = judge(need, &source, target).map_or_else(|e| e.to_string(), |()| "fits".to_owned());
        assert_eq!(said, expect);
    }

    #[test]
    fn what_the_target_cannot_run_is_named() {
        let older = abilities("7.2.22", "pc-q35-7.2 pc-q35-6.2 pc-i440fx-7.2 q35 none", Some("fpu sse2"));
        check(("pc-q35-7.2", "qemu64"), Some("fpu sse2"), &older, "fits");
        // More on the target than the guest asked for.
        check(("pc-q35-7.2", "qemu64"), Some("fpu"), &older, "fits");
        let text = "machine pc-q35-10.0 is not known to its qemu/7.2.22; newest it knows: pc-q35-7.2";
        check(("pc-q35-10.0", "qemu64"), Some("fpu"), &older, text);
        let text = "machine microvm is not known to its qemu/7.2.22; it knows no machine of that family";
        check(("microvm", "qemu64"), Some("fpu"), &older, text);
        let text = "CPU model GraniteRapids is not known to its qemu/7.2.22";
        check(("pc-q35-7.2", "GraniteRapids"), Some("fpu"), &older, text);
        let text = "CPU EPYC lacks features there that the guest has now: rdseed, sha-ni";
        check(("pc-q35-7.2", "EPYC"), Some("fpu sha-ni rdseed"), &older, text);
    }

    #[test]
    fn what_a_side_does_not_say_is_no() {
        let silent = abilities("10.0.2", "pc-q35-10.0", None);
        let text = "the target cannot say which CPU features the VM has there: it has no /dev/kvm";
        check(("pc-q35-10.0", "qemu64"), Some("fpu"), &silent, text);
        let speaks = abilities("10.0.2", "pc-q35-10.0", Some("fpu"));
        let text = "the source cannot say which CPU features the VM has there: it has no /dev/kvm";
        check(("pc-q35-10.0", "qemu64"), None, &speaks, text);
        let nothing = Abilities { cpu_features: None, cpu_missing: String::new(), ..speaks };
        let text = "the target cannot say which CPU features the VM has there: it gives no reason";
        check(("pc-q35-10.0", "qemu64"), Some("fpu"), &nothing, text);
    }

    #[test]
    fn versions_are_compared_as_numbers_and_long_lists_are_cut() {
        let known = set("pc-q35-9.2 pc-q35-10.0 pc-q35-10.1 pc-i440fx-11.0 q35");
        assert_eq!(newest_like("pc-q35-11.0", &known).as_deref(), Some("pc-q35-10.1"));
        let many: BTreeSet<String> = (0..20).map(|n| format!("f{n:02}")).collect();
        assert!(named(&many).ends_with("f11 and 8 more"), "{}", named(&many));
    }
}
