//! What a micro-probe came to: work that the target really did a moment ago, against the least that is demanded and
//! against what it did before. It finds a host that is overloaded now; a host that lies about the time can lie about
//! this too.

use types::host::Probe;

/// The least that is demanded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Demands {
    /// Memory that is touched for the first time, MiB per second.
    pub touch_mib_per_s_min: u32,
    /// CPU time that the probe got while it computed, in percent of the time that passed.
    pub cpu_share_percent_min: u32,
    /// Of the work that the host did before (the median), in percent.
    pub history_percent_min: u32,
}

impl Default for Demands {
    /// Generous: an idle machine of ten years ago passes them tenfold.
    fn default() -> Self {
        Self { touch_mib_per_s_min: 100, cpu_share_percent_min: 20, history_percent_min: 20 }
    }
}

/// Fewer probes than this are no history.
const HISTORY_MIN: usize = 5;

/// Why a host is too weak now.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Weakness {
    /// It did less than was asked for.
    #[error("it touched {touched_bytes} of the {asked_bytes} bytes that it was asked to")]
    Unfinished {
        /// Touched.
        touched_bytes: u64,
        /// Asked for.
        asked_bytes: u64,
    },
    /// Memory came slowly.
    #[error("it touched memory at {found:.0} MiB/s, at least {demanded:.0} are demanded")]
    SlowMemory {
        /// MiB per second.
        found: f64,
        /// MiB per second.
        demanded: f64,
    },
    /// It got little of a CPU.
    #[error("it got {found:.0} % of a CPU, at least {demanded} % are demanded")]
    LittleCpu {
        /// Percent.
        found: f64,
        /// Percent.
        demanded: u32,
    },
    /// It did far less than before.
    #[error(
        "it did {found:.0} units of work per millisecond; it did {before:.0} before, and at least {demanded} % of that are demanded"
    )]
    SlowerThanBefore {
        /// Units per millisecond.
        found: f64,
        /// The median of what it did before.
        before: f64,
        /// Percent.
        demanded: u32,
    },
    /// Its numbers make no sense.
    #[error("what it says of its probe makes no sense")]
    NotUsable,
}

/// Whether the host is strong enough now. `history` holds the work rates (units per millisecond) of earlier probes.
///
/// # Errors
/// What is too weak.
pub fn judge_probe(
    asked_bytes: u64,
    found: &Probe,
    history: &[f64],
    demands: Demands,
) -> Result<(), Weakness> {
    if found.touched_bytes < asked_bytes {
        return Err(Weakness::Unfinished { touched_bytes: found.touched_bytes, asked_bytes });
    }
    let rates = (found.touch_mib_per_s(), found.cpu_share_percent(), found.units_per_ms());
    let (Some(touch), Some(share), Some(work)) = rates else { return Err(Weakness::NotUsable) };
    let demanded = f64::from(demands.touch_mib_per_s_min);
    if asked_bytes > 0 && touch < demanded {
        return Err(Weakness::SlowMemory { found: touch, demanded });
    }
    if share < f64::from(demands.cpu_share_percent_min) {
        return Err(Weakness::LittleCpu { found: share, demanded: demands.cpu_share_percent_min });
    }
    let Some(before) = median(history) else { return Ok(()) };
    if work < before * f64::from(demands.history_percent_min) / 100.0 {
        return Err(Weakness::SlowerThanBefore {
            found: work,
            before,
            demanded: demands.history_percent_min,
        });
    }
    Ok(())
}

fn median(history: &[f64]) -> Option<f64> {
    let mut sorted: Vec<f64> = history.iter().copied().filter(|rate| rate.is_finite()).collect();
    if sorted.len() < HISTORY_MIN {
        return None;
    }
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ASKED: u64 = 32 << 20;

    fn check(change: impl FnOnce(&mut Probe), history: &[f64], expect: &str) {
        // 32 MiB in 20 ms; 5 ms of work with a CPU of its own.
        let mut probe = Probe {
            touched_bytes: ASKED,
            touch_us: 20_000,
            work_units: 5_000,
            work_us: 5_000,
            cpu_us: 4_900,
        };
        change(&mut probe);
        let said = judge_probe(ASKED, &probe, history, Demands::default())
            .map_or_else(|w| w.to_string(), |()| "strong".to_owned());
        assert!(said.contains(expect), "{said:?} does not say {expect:?}");
    }

    #[test]
    fn a_host_that_is_slow_now_is_found() {
        check(|_| {}, &[], "strong");
        check(|p| p.touched_bytes = ASKED - 1, &[], "touched 33554431 of the 33554432 bytes");
        check(|p| p.touch_us = 400_000, &[], "touched memory at 80 MiB/s, at least 100");
        check(|p| p.cpu_us = 500, &[], "it got 10 % of a CPU, at least 20 %");
        check(|p| p.work_units = 500, &[], "strong");
        check(|p| p.work_units = 500, &[1_000.0; 4], "strong");
        check(
            |p| p.work_units = 500,
            &[1_000.0; 5],
            "it did 100 units of work per millisecond; it did 1000 before",
        );
        check(|p| p.work_units = 1_500, &[1_000.0; 5], "strong");
    }

    #[test]
    fn numbers_that_make_no_sense_are_no_strength() {
        check(|p| p.touch_us = 0, &[], "makes no sense");
        check(|p| p.work_us = 0, &[], "makes no sense");
        // More CPU time than time.
        check(|p| p.cpu_us = 20_000, &[], "makes no sense");
        check(|p| p.work_units = 0, &[f64::NAN; 9], "strong");
    }
}
