//! Clocks and timers: HPET, i8254 and the RTC. Times themselves are free: a timer in the past fires at once.

use crate::inspect::devices::rule::Expect::{AtMost, Check, Pinned, SignedWithin};
use crate::inspect::devices::rule::{Breach, Fields, ValueRule, required};

/// The rules on the clocks.
pub const RULES: &[ValueRule] = &[
    // How many timers follow; the array has 32 (CVE-2013-4527). The name changed between versions.
    ValueRule::shape("hpet", "num_timers_save", Pinned),
    ValueRule::shape("hpet", "num_timers", Pinned),
    // A timer's own number, a bit in the status and the choice of its interrupt.
    ValueRule::identity("hpet_timer", "tn", Pinned),
    ValueRule::index("hpet_timer", "period", Check(period_advances)),
    // Divides: zero ends the process. A count of zero is written as 65536.
    ValueRule::index("pit channel", "count", SignedWithin(1, 0x1_0000)),
    // The register that the next access means, of 128.
    ValueRule::index("mc146818rtc", "cmos_index", AtMost(127)),
];

const PERIODIC: u64 = 1 << 3;
const NARROW: u64 = 1 << 8;

/// A periodic timer of 32 bits adds its period, modulo 2³², until it is past now: a multiple of 2³² never gets there.
fn period_advances(fields: &Fields<'_, '_>) -> Result<(), Breach> {
    let (config, period) = (required(fields, "config")?, required(fields, "period")?);
    let narrow = config & (PERIODIC | NARROW) == PERIODIC | NARROW;
    if narrow && period != 0 && period.trailing_zeros() >= 32 {
        return Err(Breach::by_number("a period that advances a 32-bit timer", period));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_narrow_periodic_timer_can_stand_still() {
        let judge = |config: u64, period: u64| {
            let (config, period) = (config.to_be_bytes(), period.to_be_bytes());
            period_advances(&Fields { fields: &[("config", &config), ("period", &period)] }).is_ok()
        };
        assert!(!judge(PERIODIC | NARROW, 1 << 32));
        assert!(judge(PERIODIC | NARROW, 0));
        assert!(judge(PERIODIC | NARROW, 1));
        assert!(judge(PERIODIC, 1 << 32));
        assert!(judge(NARROW, 1 << 32));
        assert!(period_advances(&Fields { fields: &[("period", &[0])] }).is_err());
    }
}
