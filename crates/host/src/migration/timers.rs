//! Monotonic timers of one machine. They wake; they decide nothing.

use engine::handover::TimerKind;
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::Instant;

/// At most one of each kind.
#[derive(Debug, Default)]
pub(crate) struct Timers(BTreeMap<TimerKind, Instant>);

impl Timers {
    pub(crate) fn set(&mut self, kind: TimerKind, after_ms: u64) {
        self.0.insert(kind, Instant::now() + Duration::from_millis(after_ms));
    }

    pub(crate) fn clear(&mut self, kind: TimerKind) {
        self.0.remove(&kind);
    }

    /// Waits for the next to fire; for ever when there is none.
    pub(crate) async fn fired(&mut self) -> TimerKind {
        let Some((kind, at)) = self.0.iter().map(|(k, at)| (*k, *at)).min_by_key(|(_, at)| *at) else {
            return std::future::pending().await;
        };
        tokio::time::sleep_until(at).await;
        self.0.remove(&kind);
        kind
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_earliest_fires_once_and_a_new_one_replaces() {
        let mut timers = Timers::default();
        timers.set(TimerKind::Resend, 1000);
        timers.set(TimerKind::Watchdog, 500);
        timers.set(TimerKind::Resend, 100);
        assert_eq!(timers.fired().await, TimerKind::Resend);
        timers.set(TimerKind::Resend, 900);
        timers.clear(TimerKind::Watchdog);
        assert_eq!(timers.fired().await, TimerKind::Resend);
        assert!(tokio::time::timeout(Duration::from_secs(60), timers.fired()).await.is_err());
    }
}
