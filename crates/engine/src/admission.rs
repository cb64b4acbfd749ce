//! Admission: whether a target has room for a guest, by what was **measured** there and by what the registry
//! knows that it promised. A claim is believed only as far as both agree; what is missing counts as full.

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
}

/// How much must be left over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadRoom {
    /// On top of the guest's memory, in percent of it: QEMU's own memory and page tables come to a few percent,
    /// and what is measured is already a moment old.
    pub memory_percent: u32,
    /// Most CPU pressure (PSI `some avg10`), in percent, where the kernel measures it.
    pub cpu_pressure_percent: u32,
}

impl Default for HeadRoom {
    fn default() -> Self {
        Self { memory_percent: 10, cpu_pressure_percent: 90 }
    }
}

/// Why there is no room.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Shortage {
    /// Less memory is available there, measured, than the guest needs.
    #[error(
        "{need_bytes} bytes of memory are needed (head-room included), {available_bytes} are available there by measurement"
    )]
    MeasuredMemory {
        /// With head-room.
        need_bytes: u64,
        /// Measured.
        available_bytes: u64,
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
    /// Its CPUs are overloaded.
    #[error("its CPU pressure is {pressure_percent:.0} %, {limit_percent} % is the limit")]
    CpuPressure {
        /// Measured.
        pressure_percent: f64,
        /// The limit.
        limit_percent: u32,
    },
    /// The measurement makes no sense, so nothing is believed.
    #[error("its measured load is not usable: {detail}")]
    BadMeasurement {
        /// Which.
        detail: &'static str,
    },
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
    if measured.memory_available_bytes < need_bytes {
        let available_bytes = measured.memory_available_bytes;
        return Err(Shortage::MeasuredMemory { need_bytes, available_bytes });
    }
    check_pressure(measured, head_room)
}

fn with_head_room(bytes: u64, percent: u32) -> u64 {
    bytes.saturating_add(bytes / 100 * u64::from(percent))
}

fn check_pressure(measured: &Load, head_room: HeadRoom) -> Result<(), Shortage> {
    let Some(pressure_percent) = measured.cpu_pressure_percent else { return Ok(()) };
    if !pressure_percent.is_finite() || pressure_percent < 0.0 {
        return Err(Shortage::BadMeasurement { detail: "the CPU pressure is not a number of percent" });
    }
    if pressure_percent > f64::from(head_room.cpu_pressure_percent) {
        let limit_percent = head_room.cpu_pressure_percent;
        return Err(Shortage::CpuPressure { pressure_percent, limit_percent });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn load(available: u64, pressure: Option<f64>) -> Load {
        Load {
            scope: "machine".to_owned(),
            memory_used_bytes: 0,
            memory_available_bytes: available,
            cpu_cores_used: 0.0,
            cpu_cores: 4.0,
            cpu_pressure_percent: pressure,
            memory_pressure_percent: None,
            vms: 0,
        }
    }

    fn check(promised: Promised, measured: &Load, expect: &str) {
        let demand = Demand { memory_bytes: GIB, vcpus: 2 };
        let capacity = Capacity { memory_bytes: 4 * GIB, vcpus: 4, vms: 2 };
        let said = match admit(demand, capacity, promised, measured, HeadRoom::default()) {
            Ok(()) => "room".to_owned(),
            Err(shortage) => shortage.to_string(),
        };
        assert!(said.contains(expect), "{said:?} does not say {expect:?}");
    }

    #[test]
    fn room_is_what_measurement_and_registry_agree_on() {
        let promised = |memory_bytes, vcpus, vms| Promised { memory_bytes, vcpus, vms };
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
}
