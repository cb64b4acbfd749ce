//! Admission: whether a target has room for a guest, by what was **measured** there and by what the registry
//! knows that it promised. A claim is believed only as far as both agree; what is missing counts as full.

mod claims;
mod pressure;
mod probe;

pub use claims::{Contradiction, Placed, cross_check};
pub use pressure::{Limits, Measure, Strain};
pub use probe::{Demands, Weakness, judge_probe};

use types::host::{Capacity, Load};

/// What the guest needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Demand {
    /// Guest memory.
    pub memory_bytes: u64,
    /// Virtual CPUs.
    pub vcpus: u32,
}

/// What is promised on the target already: guests that the registry places there, and reservations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Promised {
    /// Bytes of guest memory.
    pub memory_bytes: u64,
    /// Virtual CPUs.
    pub vcpus: u64,
    /// Guests.
    pub vms: u64,
    /// Of that memory, what was reserved and is not taken on the host yet, so that a measurement does not show it.
    pub pending_bytes: u64,
}

/// How much must be left over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadRoom {
    /// On top of the guest's memory, in percent of it: QEMU's own memory and page tables come to a few percent,
    /// and what is measured is already a moment old.
    pub memory_percent: u32,
    /// How strained the host may be.
    pub limits: Limits,
}

impl Default for HeadRoom {
    fn default() -> Self {
        Self { memory_percent: 10, limits: Limits::default() }
    }
}

/// Why there is no room.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Shortage {
    /// Less memory is available there, measured, than the guest needs.
    #[error(
        "{need_bytes} bytes of memory are needed (head-room included), {available_bytes} are available there by measurement{}",
        pending_text(*.pending_bytes)
    )]
    MeasuredMemory {
        /// With head-room.
        need_bytes: u64,
        /// Measured.
        available_bytes: u64,
        /// Of that, what other migrations have reserved and not taken yet.
        pending_bytes: u64,
    },
    /// The enrolled memory, less what is promised, is too little.
    #[error(
        "{need_bytes} bytes of memory are needed (head-room included), {left_bytes} of the {capacity_bytes} enrolled are not promised to other guests"
    )]
    EnrolledMemory {
        /// With head-room.
        need_bytes: u64,
        /// Not promised.
        left_bytes: u64,
        /// Enrolled.
        capacity_bytes: u64,
    },
    /// The enrolled virtual CPUs, less what is promised, are too few.
    #[error(
        "{need} virtual CPUs are needed, {left} of the {capacity} enrolled are not promised to other guests"
    )]
    Vcpus {
        /// Needed.
        need: u32,
        /// Not promised.
        left: u64,
        /// Enrolled.
        capacity: u32,
    },
    /// It carries as many guests as it may.
    #[error("it carries {promised} guests, {capacity} are enrolled")]
    Guests {
        /// Placed and reserved.
        promised: u64,
        /// Enrolled.
        capacity: u32,
    },
    /// It is strained, or does not say that it is not.
    #[error(transparent)]
    Strained(#[from] Strain),
}

/// Whether the guest fits.
///
/// # Errors
/// The first thing that is short.
pub fn admit(
    demand: Demand,
    capacity: Capacity,
    promised: Promised,
    measured: &Load,
    head_room: HeadRoom,
) -> Result<(), Shortage> {
    let need_bytes = with_head_room(demand.memory_bytes, head_room.memory_percent);
    let left_bytes = capacity.memory_bytes.saturating_sub(promised.memory_bytes);
    if left_bytes < need_bytes {
        return Err(Shortage::EnrolledMemory {
            need_bytes,
            left_bytes,
            capacity_bytes: capacity.memory_bytes,
        });
    }
    let left = u64::from(capacity.vcpus).saturating_sub(promised.vcpus);
    if left < u64::from(demand.vcpus) {
        return Err(Shortage::Vcpus { need: demand.vcpus, left, capacity: capacity.vcpus });
    }
    if promised.vms >= u64::from(capacity.vms) {
        return Err(Shortage::Guests { promised: promised.vms, capacity: capacity.vms });
    }
    let pending_bytes = with_head_room(promised.pending_bytes, head_room.memory_percent);
    let available_bytes = measured.memory_available_bytes;
    if available_bytes.saturating_sub(pending_bytes) < need_bytes {
        return Err(Shortage::MeasuredMemory { need_bytes, available_bytes, pending_bytes });
    }
    Ok(pressure::check(measured, head_room.limits)?)
}

/// Whether a target that took the guest's memory long ago still has what the guest needs beside it: room to work in,
/// and no more strain than a target may have.
///
/// # Errors
/// What it lacks.
pub fn still_holds(demand: Demand, measured: &Load, head_room: HeadRoom) -> Result<(), Shortage> {
    let need_bytes = demand.memory_bytes / 100 * u64::from(head_room.memory_percent);
    let available_bytes = measured.memory_available_bytes;
    if available_bytes < need_bytes {
        return Err(Shortage::MeasuredMemory { need_bytes, available_bytes, pending_bytes: 0 });
    }
    Ok(pressure::check(measured, head_room.limits)?)
}

fn pending_text(pending_bytes: u64) -> String {
    match pending_bytes {
        0 => String::new(),
        bytes => format!(", {bytes} of which are reserved for guests on their way"),
    }
}

fn with_head_room(bytes: u64, percent: u32) -> u64 {
    bytes.saturating_add(bytes / 100 * u64::from(percent))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn load(available: u64, pressure: Option<f64>) -> Load {
        Load {
            memory_available_bytes: available,
            cpu_cores: 4.0,
            cpu_pressure_percent: pressure,
            ..Load::default()
        }
    }

    fn check(promised: Promised, measured: &Load, expect: &str) {
        let demand = Demand { memory_bytes: GIB, vcpus: 2 };
        let capacity = Capacity { memory_bytes: 4 * GIB, vcpus: 4, vms: 2 };
        // What is demanded to be measured at all is tested where it is judged.
        let limits = Limits { demand_pressure: false, demand_link: false, ..Limits::default() };
        let head_room = HeadRoom { limits, ..HeadRoom::default() };
        let said = match admit(demand, capacity, promised, measured, head_room) {
            Ok(()) => "room".to_owned(),
            Err(shortage) => shortage.to_string(),
        };
        assert!(said.contains(expect), "{said:?} does not say {expect:?}");
    }

    #[test]
    fn room_is_what_measurement_and_registry_agree_on() {
        let promised = |memory_bytes, vcpus, vms| Promised { memory_bytes, vcpus, vms, pending_bytes: 0 };
        check(promised(0, 0, 0), &load(2 * GIB, None), "room");
        check(promised(0, 0, 0), &load(2 * GIB, Some(10.0)), "room");
        // The claim of plenty does not help when the registry knows better, nor the other way round.
        check(promised(3 * GIB, 0, 0), &load(100 * GIB, None), "not promised to other guests");
        check(promised(0, 0, 0), &load(GIB, None), "by measurement");
        check(promised(0, 3, 0), &load(2 * GIB, None), "virtual CPUs");
        check(promised(0, 0, 2), &load(2 * GIB, None), "carries 2 guests");
        check(promised(0, 0, 0), &load(2 * GIB, Some(99.0)), "pressure");
        check(promised(0, 0, 0), &load(2 * GIB, Some(f64::NAN)), "not usable");
        check(promised(u64::MAX, u64::MAX, u64::MAX), &load(u64::MAX, None), "not promised");
    }

    #[test]
    fn what_is_reserved_and_not_taken_yet_is_not_there_by_measurement() {
        let promised = |pending_bytes| Promised { pending_bytes, vms: 1, ..Promised::default() };
        check(promised(GIB), &load(3 * GIB, None), "room");
        check(promised(GIB), &load(2 * GIB, None), "of which are reserved for guests on their way");
        check(promised(u64::MAX), &load(u64::MAX, None), "by measurement");
    }

    #[test]
    fn a_target_that_took_the_guest_needs_room_to_work_in() {
        let demand = Demand { memory_bytes: GIB, vcpus: 2 };
        let limits = Limits { demand_pressure: false, demand_link: false, ..Limits::default() };
        let head_room = HeadRoom { limits, ..HeadRoom::default() };
        assert_eq!(still_holds(demand, &load(GIB / 5, Some(10.0)), head_room), Ok(()));
        let short = still_holds(demand, &load(GIB / 20, None), head_room);
        assert!(matches!(short, Err(Shortage::MeasuredMemory { .. })), "{short:?}");
        let strained = still_holds(demand, &load(GIB, Some(95.0)), head_room);
        assert!(matches!(strained, Err(Shortage::Strained(Strain::Over { .. }))), "{strained:?}");
    }
}
