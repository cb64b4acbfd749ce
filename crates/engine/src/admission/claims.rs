//! What a host claims against what it cannot have: its enrolled capacity, and the guests that the registry places
//! there. A host that contradicts either is not believed in anything else.

use super::Measure;
use std::collections::BTreeSet;
use types::VmId;
use types::host::{Capacity, Load};

/// The registry's truth about a host's guests.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Placed {
    /// Guests that run there, and of which nothing is under way.
    pub must_run: BTreeSet<VmId>,
    /// Guests that may run there: those, and all that are being started, stopped or moved, or that failed there.
    pub may_run: BTreeSet<VmId>,
}

/// What does not fit together.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Contradiction {
    /// It says that it has far more memory than was enrolled.
    #[error(
        "it claims {claimed_bytes} bytes of memory, which is more than {limit_percent} % of the {enrolled_bytes} enrolled"
    )]
    MoreMemoryThanEnrolled {
        /// Used and available.
        claimed_bytes: u64,
        /// Enrolled.
        enrolled_bytes: u64,
        /// The limit.
        limit_percent: u32,
    },
    /// It uses more CPUs than it has.
    #[error("it claims to use {used:.1} of {all:.1} CPUs")]
    MoreCpuThanThereIs {
        /// Used.
        used: f64,
        /// All.
        all: f64,
    },
    /// `full` is part of `some`.
    #[error("its full memory pressure is above its memory pressure")]
    FullerThanSome,
    /// Guests that run there are not among those that it says run there.
    #[error("it does not run {} of the guests that the registry places there, {first} among them", .count)]
    GuestsMissing {
        /// How many.
        count: usize,
        /// One of them.
        first: VmId,
    },
    /// It runs guests that the registry does not place there.
    #[error("it runs {} guests that the registry does not place there, {first} among them", .count)]
    GuestsUnknown {
        /// How many.
        count: usize,
        /// One of them.
        first: VmId,
    },
    /// It does not say which guests run there.
    #[error("it does not say which guests run there, which this manager demands")]
    GuestsUnsaid,
    /// A number that is none.
    #[error("its measured load is not usable: the {measure} is no number")]
    NotUsable {
        /// Of what.
        measure: Measure,
    },
}

impl Contradiction {
    /// Whether a change that is under way may have made it: the same question a moment later may be answered otherwise.
    #[must_use]
    pub const fn may_pass(&self) -> bool {
        matches!(self, Self::GuestsMissing { .. } | Self::GuestsUnknown { .. })
    }
}

/// Clock ticks and windows make a little more than all of it.
const CPU_TOLERANCE: f64 = 1.5;
/// Two averages that the kernel makes at different moments.
const PRESSURE_TOLERANCE_PERCENT: f64 = 5.0;

/// Whether a host's claims agree with its record and with the registry. `claim_percent_max` is how much of the enrolled
/// memory it may claim to have; `demand_guests` refuses one that does not say which guests it runs.
///
/// # Errors
/// The first contradiction.
pub fn cross_check(
    capacity: Capacity,
    placed: &Placed,
    measured: &Load,
    (claim_percent_max, demand_guests): (u32, bool),
) -> Result<(), Contradiction> {
    memory(capacity, measured, claim_percent_max)?;
    cpu(measured)?;
    if let (Some(some), Some(full)) =
        (measured.memory_pressure_percent, measured.memory_full_pressure_percent)
        && full > some + PRESSURE_TOLERANCE_PERCENT
    {
        return Err(Contradiction::FullerThanSome);
    }
    guests(placed, measured.running.as_ref(), demand_guests)
}

fn memory(capacity: Capacity, measured: &Load, limit_percent: u32) -> Result<(), Contradiction> {
    let claimed_bytes = measured.memory_used_bytes.saturating_add(measured.memory_available_bytes);
    let limit_bytes = u128::from(capacity.memory_bytes) * u128::from(limit_percent) / 100;
    if u128::from(claimed_bytes) <= limit_bytes {
        return Ok(());
    }
    let enrolled_bytes = capacity.memory_bytes;
    Err(Contradiction::MoreMemoryThanEnrolled { claimed_bytes, enrolled_bytes, limit_percent })
}

fn cpu(measured: &Load) -> Result<(), Contradiction> {
    let (used, all) = (measured.cpu_cores_used, measured.cpu_cores);
    if !used.is_finite() || !all.is_finite() || used < 0.0 || all <= 0.0 {
        return Err(Contradiction::NotUsable { measure: Measure::CpuUse });
    }
    if used > all * CPU_TOLERANCE {
        return Err(Contradiction::MoreCpuThanThereIs { used, all });
    }
    Ok(())
}

fn guests(placed: &Placed, running: Option<&BTreeSet<VmId>>, demanded: bool) -> Result<(), Contradiction> {
    let Some(running) = running else {
        return if demanded { Err(Contradiction::GuestsUnsaid) } else { Ok(()) };
    };
    let mut missing = placed.must_run.difference(running);
    if let Some(first) = missing.next() {
        return Err(Contradiction::GuestsMissing { count: 1 + missing.count(), first: *first });
    }
    let mut unknown = running.difference(&placed.may_run).filter(|vm| !placed.must_run.contains(vm));
    if let Some(first) = unknown.next() {
        return Err(Contradiction::GuestsUnknown { count: 1 + unknown.count(), first: *first });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn vms(numbers: &[u8]) -> BTreeSet<VmId> {
        numbers.iter().map(|n| VmId::from_bytes([*n; 16])).collect()
    }

    fn check(change: impl FnOnce(&mut Load), demand: bool, expect: &str) {
        let capacity = Capacity { memory_bytes: 4 * GIB, vcpus: 4, vms: 4 };
        let placed = Placed { must_run: vms(&[1, 2]), may_run: vms(&[1, 2, 3]) };
        let mut load = Load {
            memory_used_bytes: GIB,
            memory_available_bytes: 3 * GIB,
            cpu_cores: 4.0,
            running: Some(vms(&[1, 2])),
            ..Load::default()
        };
        change(&mut load);
        let said = cross_check(capacity, &placed, &load, (200, demand))
            .map_or_else(|c| c.to_string(), |()| "agrees".to_owned());
        assert!(said.contains(expect), "{said:?} does not say {expect:?}");
    }

    #[test]
    fn claims_are_held_against_the_record() {
        check(|_| {}, true, "agrees");
        check(|l| l.memory_available_bytes = 7 * GIB, true, "agrees");
        check(|l| l.memory_available_bytes = 7 * GIB + 1, true, "more than 200 % of the 4294967296 enrolled");
        check(|l| l.memory_available_bytes = u64::MAX, true, "more than 200 %");
        check(|l| l.cpu_cores_used = 4.4, true, "agrees");
        check(|l| l.cpu_cores_used = 7.0, true, "it claims to use 7.0 of 4.0 CPUs");
        check(|l| l.cpu_cores_used = f64::NAN, true, "not usable");
        check(|l| l.cpu_cores = 0.0, true, "not usable");
        let pressures = |some, full| {
            move |l: &mut Load| {
                (l.memory_pressure_percent, l.memory_full_pressure_percent) = (Some(some), Some(full));
            }
        };
        check(pressures(10.0, 12.0), true, "agrees");
        check(pressures(10.0, 40.0), true, "above its memory pressure");
    }

    #[test]
    fn its_guests_are_held_against_the_registry() {
        check(|l| l.running = Some(vms(&[1, 2, 3])), true, "agrees");
        check(|l| l.running = Some(vms(&[1])), true, "does not run 1 of the guests");
        check(|l| l.running = Some(vms(&[])), true, "does not run 2 of the guests");
        check(|l| l.running = Some(vms(&[1, 2, 9])), true, "runs 1 guests that the registry does not place");
        check(|l| l.running = None, true, "does not say which guests run there");
        check(|l| l.running = None, false, "agrees");
        let missing = Contradiction::GuestsMissing { count: 1, first: VmId::from_bytes([1; 16]) };
        assert!(missing.may_pass() && !Contradiction::FullerThanSome.may_pass());
    }
}
