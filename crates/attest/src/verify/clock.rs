//! The TPM's clock and counters never go back (Part 1, "Timing Components"): a TPM that was exchanged, or a
//! copy of a software TPM's state that was put back, shows here.

use serde::{Deserialize, Serialize};

use super::reason::{Reason, ReasonCode};
use crate::structure::ClockInfo;

/// How much of its clock a TPM may lose when it is cut off: it must be written at least every 2^22 ms, about
/// 70 minutes (Part 2, "TPMS_CLOCK_INFO").
const UNSAVED_CLOCK_MS: u64 = 1 << 22;

/// The clock of the last good quote of this host, and what it asks of the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LastSeen {
    /// There was none.
    Never,
    /// Between migrations: a reboot is no fault.
    Earlier(ClockInfo),
    /// Within a migration: what was quoted before the permit must be what still runs.
    SameStart(ClockInfo),
}

/// Compares the clock of a quote with that of the last one.
pub(super) fn check(last_seen: &LastSeen, now: &ClockInfo) -> Option<Reason> {
    let (last, may_have_restarted) = match last_seen {
        LastSeen::Never => return None,
        LastSeen::Earlier(last) => (last, true),
        LastSeen::SameStart(last) => (last, false),
    };
    let starts = |clock: &ClockInfo| (clock.reset_count, clock.restart_count);
    if starts(now) < starts(last) {
        let detail = format!(
            "the TPM's counters went back: {} resets and {} restarts, last seen were {} and {}: another TPM, \
             or an older copy of its state",
            now.reset_count, now.restart_count, last.reset_count, last.restart_count
        );
        return Some(Reason::new(ReasonCode::CounterBackwards, detail));
    }
    let same_start = starts(now) == starts(last);
    let may_lose_ms = if same_start || now.safe { 0 } else { UNSAVED_CLOCK_MS };
    if now.clock_ms.saturating_add(may_lose_ms) < last.clock_ms {
        let detail = format!(
            "the TPM's clock went back: {} ms, last seen was {}: another TPM, or an older copy of its state",
            now.clock_ms, last.clock_ms
        );
        return Some(Reason::new(ReasonCode::ClockBackwards, detail));
    }
    if !same_start && !may_have_restarted {
        let detail =
            "the platform was started anew since it was last appraised; the migration must begin again";
        return Some(Reason::new(ReasonCode::Restarted, detail));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_and_clock_never_go_back() {
        use LastSeen::{Earlier, Never, SameStart};
        use ReasonCode::{ClockBackwards, CounterBackwards, Restarted};
        let last = ClockInfo { clock_ms: 10_000_000, reset_count: 5, restart_count: 3, safe: true };
        let check =
            |clock_ms, reset_count, restart_count, safe, last_seen: fn(ClockInfo) -> LastSeen, expect| {
                let now = ClockInfo { clock_ms, reset_count, restart_count, safe };
                let found = check(&last_seen(last), &now).map(|reason| reason.code);
                assert_eq!(found, expect, "{now:?} {:?}", last_seen(last));
                assert_eq!(check(&Never, &now), None);
            };
        check(10_000_000, 5, 3, true, SameStart, None);
        check(10_000_001, 5, 3, true, SameStart, None);
        check(9_999_999, 5, 3, true, SameStart, Some(ClockBackwards));
        // Not safe excuses nothing while the TPM runs on.
        check(9_999_999, 5, 3, false, SameStart, Some(ClockBackwards));
        check(11_000_000, 4, 9, true, Earlier, Some(CounterBackwards));
        check(11_000_000, 5, 2, true, Earlier, Some(CounterBackwards));
        // A reset begins to count restarts anew.
        check(10_000_000, 6, 0, true, Earlier, None);
        check(10_000_000, 6, 0, true, SameStart, Some(Restarted));
        check(10_000_000, 5, 4, true, SameStart, Some(Restarted));
        check(9_999_999, 6, 0, true, Earlier, Some(ClockBackwards));
        check(10_000_000 - UNSAVED_CLOCK_MS, 6, 0, false, Earlier, None);
        check(10_000_000 - UNSAVED_CLOCK_MS - 1, 6, 0, false, Earlier, Some(ClockBackwards));
    }
}
