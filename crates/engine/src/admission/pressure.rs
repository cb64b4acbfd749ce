//! How strained a host may be: pressure by the kernel's own measure (PSI), CPU and link by their use.

use std::fmt;
use types::host::{LinkUse, Load};

/// Limits in percent; a host above one of them takes no guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// CPU pressure, `some avg10`.
    pub cpu_pressure_percent: u32,
    /// Memory pressure, `some avg10`.
    pub memory_pressure_percent: u32,
    /// Memory pressure, `full avg10`.
    pub memory_full_pressure_percent: u32,
    /// I/O pressure, `some avg10`, where the kernel measures it.
    pub io_pressure_percent: u32,
    /// CPU used of what is allotted.
    pub cpu_used_percent: u32,
    /// Link used of its capacity, where that is known, in the busier direction.
    pub link_used_percent: u32,
    /// A host that does not measure the pressure of CPU and memory takes no guest.
    pub demand_pressure: bool,
    /// A host that does not measure its link takes no guest.
    pub demand_link: bool,
    /// A host that does not know what its link carries takes no guest.
    pub demand_link_capacity: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            cpu_pressure_percent: 90,
            memory_pressure_percent: 20,
            memory_full_pressure_percent: 10,
            io_pressure_percent: 90,
            cpu_used_percent: 95,
            link_used_percent: 90,
            demand_pressure: true,
            demand_link: true,
            demand_link_capacity: false,
        }
    }
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Measure {
    /// PSI of CPU.
    CpuPressure,
    /// PSI of memory.
    MemoryPressure,
    /// PSI of memory: nothing could run.
    MemoryFullPressure,
    /// PSI of I/O.
    IoPressure,
    /// CPU used of what is allotted.
    CpuUse,
    /// The migration link.
    LinkUse,
    /// What the migration link carries.
    LinkCapacity,
}

impl fmt::Display for Measure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::CpuPressure => "CPU pressure",
            Self::MemoryPressure => "memory pressure",
            Self::MemoryFullPressure => "full memory pressure",
            Self::IoPressure => "I/O pressure",
            Self::CpuUse => "use of its CPUs",
            Self::LinkUse => "use of its migration link",
            Self::LinkCapacity => "capacity of its migration link",
        })
    }
}

/// Why a host takes no guest.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Strain {
    /// Above a limit.
    #[error("its {measure} is {found_percent:.0} %, {limit_percent} % is the limit")]
    Over {
        /// Of what.
        measure: Measure,
        /// Measured.
        found_percent: f64,
        /// The limit.
        limit_percent: u32,
    },
    /// It does not say.
    #[error("it does not measure the {measure}, which this manager demands")]
    Unmeasured {
        /// What.
        measure: Measure,
    },
    /// The measurement makes no sense, so nothing is believed.
    #[error("its measured load is not usable: the {measure} is no number of percent")]
    NotUsable {
        /// Of what.
        measure: Measure,
    },
}

/// Whether no limit is passed.
///
/// # Errors
/// The first that is.
pub(super) fn check(measured: &Load, limits: Limits) -> Result<(), Strain> {
    use Measure as M;
    let demanded = limits.demand_pressure;
    pressure(M::CpuPressure, measured.cpu_pressure_percent, limits.cpu_pressure_percent, demanded)?;
    pressure(M::MemoryPressure, measured.memory_pressure_percent, limits.memory_pressure_percent, demanded)?;
    let full = measured.memory_full_pressure_percent;
    pressure(M::MemoryFullPressure, full, limits.memory_full_pressure_percent, demanded)?;
    pressure(M::IoPressure, measured.io_pressure_percent, limits.io_pressure_percent, false)?;
    share(M::CpuUse, measured.cpu_cores_used, measured.cpu_cores, limits.cpu_used_percent)?;
    link(measured.link.as_ref(), limits)
}

fn pressure(measure: Measure, found: Option<f64>, limit_percent: u32, demanded: bool) -> Result<(), Strain> {
    match found {
        Some(found_percent) => at_most(measure, found_percent, limit_percent),
        None if demanded => Err(Strain::Unmeasured { measure }),
        None => Ok(()),
    }
}

fn link(found: Option<&LinkUse>, limits: Limits) -> Result<(), Strain> {
    let Some(link) = found else {
        return match limits.demand_link {
            true => Err(Strain::Unmeasured { measure: Measure::LinkUse }),
            false => Ok(()),
        };
    };
    let busier = link.received_bytes_per_s.max(link.sent_bytes_per_s);
    match link.capacity_bytes_per_s {
        Some(capacity) => share(Measure::LinkUse, busier, capacity, limits.link_used_percent),
        None if limits.demand_link_capacity => Err(Strain::Unmeasured { measure: Measure::LinkCapacity }),
        None => Ok(()),
    }
}

/// A part of a whole; without a whole there is no part that could be judged.
fn share(measure: Measure, part: f64, whole: f64, limit_percent: u32) -> Result<(), Strain> {
    if !whole.is_finite() || whole <= 0.0 {
        return Err(Strain::NotUsable { measure });
    }
    at_most(measure, part / whole * 100.0, limit_percent)
}

fn at_most(measure: Measure, found_percent: f64, limit_percent: u32) -> Result<(), Strain> {
    if !found_percent.is_finite() || found_percent < 0.0 {
        return Err(Strain::NotUsable { measure });
    }
    if found_percent > f64::from(limit_percent) {
        return Err(Strain::Over { measure, found_percent, limit_percent });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn calm() -> Load {
        Load {
            cpu_cores: 4.0,
            cpu_cores_used: 1.0,
            cpu_pressure_percent: Some(1.0),
            memory_pressure_percent: Some(0.0),
            memory_full_pressure_percent: Some(0.0),
            link: Some(LinkUse {
                interface: "mig0".to_owned(),
                received_bytes_per_s: 1e6,
                sent_bytes_per_s: 0.0,
                capacity_bytes_per_s: Some(125e6),
            }),
            ..Load::default()
        }
    }

    fn checked(change: impl FnOnce(&mut Load, &mut Limits), expect: &str) {
        let (mut load, mut limits) = (calm(), Limits::default());
        change(&mut load, &mut limits);
        let said = check(&load, limits).map_or_else(|strain| strain.to_string(), |()| "calm".to_owned());
        assert!(said.contains(expect), "{said:?} does not say {expect:?}");
    }

    fn link_of(load: &mut Load, change: impl FnOnce(&mut LinkUse)) {
        load.link.iter_mut().for_each(|link| link.capacity_bytes_per_s = Some(100.0));
        if let Some(link) = &mut load.link {
            change(link);
        }
    }

    #[test]
    fn each_limit_is_named_when_it_is_passed() {
        checked(|_, _| {}, "calm");
        checked(|l, _| l.cpu_pressure_percent = Some(90.5), "its CPU pressure is 90 %, 90 % is the limit");
        checked(|l, _| l.memory_pressure_percent = Some(21.0), "its memory pressure is 21 %");
        checked(|l, _| l.memory_full_pressure_percent = Some(11.0), "its full memory pressure is 11 %");
        checked(|l, _| l.io_pressure_percent = Some(99.0), "its I/O pressure is 99 %");
        checked(|l, _| l.cpu_cores_used = 3.9, "its use of its CPUs is 98 %, 95 % is the limit");
        checked(
            |l, _| link_of(l, |link| (link.received_bytes_per_s, link.sent_bytes_per_s) = (0.0, 91.0)),
            "its use of its migration link is 91 %",
        );
    }

    #[test]
    fn what_is_missing_is_strain_where_it_is_demanded() {
        checked(|l, _| l.cpu_pressure_percent = None, "does not measure the CPU pressure");
        checked(|l, _| l.memory_pressure_percent = None, "does not measure the memory pressure");
        checked(|l, _| l.memory_full_pressure_percent = None, "does not measure the full memory pressure");
        checked(|l, _| l.link = None, "does not measure the use of its migration link");
        checked(|l, _| l.io_pressure_percent = None, "calm");
        let unknown = |l: &mut Load| link_of(l, |link| link.capacity_bytes_per_s = None);
        checked(|l, _| unknown(l), "calm");
        checked(
            |l, limits| {
                unknown(l);
                limits.demand_link_capacity = true;
            },
            "capacity of its migration link",
        );
        checked(
            |l, limits| {
                (l.cpu_pressure_percent, l.memory_pressure_percent, l.link) = (None, None, None);
                l.memory_full_pressure_percent = None;
                (limits.demand_pressure, limits.demand_link) = (false, false);
            },
            "calm",
        );
    }

    #[test]
    fn nothing_that_is_no_number_is_believed() {
        for bad in [f64::NAN, f64::INFINITY, -1.0] {
            checked(|l, _| l.cpu_pressure_percent = Some(bad), "not usable");
            checked(|l, _| l.cpu_cores_used = bad, "not usable");
            checked(|l, _| l.cpu_cores = bad, "not usable");
            checked(|l, _| link_of(l, |link| link.capacity_bytes_per_s = Some(bad)), "not usable");
        }
        checked(|l, _| l.cpu_cores = 0.0, "not usable");
        checked(
            |l, _| link_of(l, |link| (link.received_bytes_per_s, link.sent_bytes_per_s) = (-2.0, -1.0)),
            "not usable",
        );
    }
}
