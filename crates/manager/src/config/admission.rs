//! `[admission]`: what a target must show before it is given a guest. docs/admission.md says what each is worth.

use engine::admission::{Demands, Limits};
use serde::Deserialize;

/// What a host may be asked to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Demanded {
    /// PSI of CPU and memory.
    Pressure,
    /// Use of the migration link.
    Link,
    /// What that link carries.
    LinkCapacity,
    /// Which guests run there.
    RunningVms,
}

/// What a target must show. A limit in percent is the most at which it still takes a guest.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Admission {
    /// A host that does not measure one of these takes no guest.
    pub demand: Vec<Demanded>,
    /// Memory pressure (PSI `some avg10`).
    pub memory_pressure_percent: u32,
    /// Memory pressure (PSI `full avg10`).
    pub memory_full_pressure_percent: u32,
    /// I/O pressure (PSI `some avg10`), where it is measured.
    pub io_pressure_percent: u32,
    /// CPU used of what is allotted.
    pub cpu_used_percent: u32,
    /// Link used of what it carries, where that is known.
    pub link_used_percent: u32,
    /// Memory that a host may claim to have, in percent of its enrolled memory.
    pub claim_percent: u32,
    /// CPU pressure at which a transfer that is under way is ended before it converges.
    pub convergence_cpu_pressure_percent: u32,
    /// How often a target is looked at again in a transfer, seconds.
    pub recheck_s: u32,
    /// Memory that the micro-probe touches on the target; 0 leaves the probe out.
    pub probe_mib: u32,
    /// How long it computes, microseconds.
    pub probe_work_us: u32,
    /// The least MiB per second at which memory must come.
    pub probe_touch_mib_per_s: u32,
    /// The least share of a CPU that the probe must get.
    pub probe_cpu_percent: u32,
    /// The least of what the host did before.
    pub probe_history_percent: u32,
}

/// A probe that takes more memory would itself be a load.
const PROBE_MIB_MAX: u32 = 64;
/// Nor may it hold a CPU for longer, microseconds.
const PROBE_WORK_US_MAX: u32 = 20_000;

/// Half of what a look counts for, so that one of them may fail.
const RECHECK_S_MAX: u32 = 30;

impl Default for Admission {
    fn default() -> Self {
        let (limits, demands) = (Limits::default(), Demands::default());
        Self {
            demand: vec![Demanded::Pressure, Demanded::Link, Demanded::RunningVms],
            memory_pressure_percent: limits.memory_pressure_percent,
            memory_full_pressure_percent: limits.memory_full_pressure_percent,
            io_pressure_percent: limits.io_pressure_percent,
            cpu_used_percent: limits.cpu_used_percent,
            link_used_percent: limits.link_used_percent,
            claim_percent: 1_000,
            convergence_cpu_pressure_percent: 95,
            recheck_s: 20,
            probe_mib: 32,
            probe_work_us: 5_000,
            probe_touch_mib_per_s: demands.touch_mib_per_s_min,
            probe_cpu_percent: demands.cpu_share_percent_min,
            probe_history_percent: demands.history_percent_min,
        }
    }
}

impl Admission {
    /// Whether hosts must measure this.
    pub(crate) fn demands(&self, what: Demanded) -> bool {
        self.demand.contains(&what)
    }

    /// Limits on strain.
    pub(crate) fn limits(&self, cpu_pressure_percent: u32) -> Limits {
        Limits {
            cpu_pressure_percent,
            memory_pressure_percent: self.memory_pressure_percent,
            memory_full_pressure_percent: self.memory_full_pressure_percent,
            io_pressure_percent: self.io_pressure_percent,
            cpu_used_percent: self.cpu_used_percent,
            link_used_percent: self.link_used_percent,
            demand_pressure: self.demands(Demanded::Pressure),
            demand_link: self.demands(Demanded::Link),
            demand_link_capacity: self.demands(Demanded::LinkCapacity),
        }
    }

    /// What a probe must come to.
    pub(crate) const fn probe_demands(&self) -> Demands {
        Demands {
            touch_mib_per_s_min: self.probe_touch_mib_per_s,
            cpu_share_percent_min: self.probe_cpu_percent,
            history_percent_min: self.probe_history_percent,
        }
    }

    pub(super) fn validate(&self) -> Result<(), String> {
        if self.probe_mib > PROBE_MIB_MAX || self.probe_work_us > PROBE_WORK_US_MAX {
            return Err(format!(
                "admission.probe_mib must be 0 to {PROBE_MIB_MAX}, and probe_work_us 1 to {PROBE_WORK_US_MAX}"
            ));
        }
        if self.probe_work_us == 0 || self.probe_cpu_percent > 100 || self.probe_history_percent > 100 {
            return Err("admission.probe_work_us must be at least 1, and probe_cpu_percent and \
                        probe_history_percent at most 100"
                .to_owned());
        }
        if !(1..=RECHECK_S_MAX).contains(&self.recheck_s) {
            return Err(format!(
                "admission.recheck_s must be 1 to {RECHECK_S_MAX}: what was looked at counts for 60 s"
            ));
        }
        if self.claim_percent < 100 {
            return Err(
                "admission.claim_percent must be at least 100: a host has what was enrolled".to_owned()
            );
        }
        Ok(())
    }
}
