//! A migration while it runs: one live line on a terminal, plain lines elsewhere. All on standard error.

use super::text::clean;
use super::time::duration;
use crate::size::format_bytes;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;
use std::io::IsTerminal;
use std::time::{Duration, Instant};
use types::migration::{MigrationState, MigrationView};

/// Plain lines come at most so often while nothing but counters changes.
const PLAIN_EVERY: Duration = Duration::from_secs(2);

/// What is known of the transfer.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Counters {
    total_bytes: u64,
    remaining_bytes: u64,
    bytes_per_second: f64,
}

impl Counters {
    /// From a `progress` event of the source; the target's has no RAM counters and is passed over.
    fn read(detail: &Value) -> Option<Self> {
        let total_bytes = detail.get("ram_total_bytes")?.as_u64().filter(|total| *total > 0)?;
        let remaining_bytes = detail.get("ram_remaining_bytes")?.as_u64()?.min(total_bytes);
        let mbps = detail.get("mbps").and_then(Value::as_f64).unwrap_or(0.0);
        Some(Self { total_bytes, remaining_bytes, bytes_per_second: mbps.max(0.0) * 125_000.0 })
    }

    fn text(self) -> String {
        let done = self.total_bytes - self.remaining_bytes;
        let mut text = format!("{} of {}", format_bytes(done), format_bytes(self.total_bytes));
        if self.bytes_per_second >= 1.0 {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "positive and saturating"
            )]
            let rate = format_bytes(self.bytes_per_second as u64);
            #[expect(clippy::cast_precision_loss, reason = "an estimate for people")]
            let left_ms = self.remaining_bytes as f64 / self.bytes_per_second * 1000.0;
            text.push_str(&format!(", {rate}/s, {} left", estimate(left_ms)));
        }
        text
    }
}

/// An estimate claims no more digits than it has.
fn estimate(ms: f64) -> String {
    if ms < 1000.0 {
        "under 1 s".to_owned()
    } else {
        duration((ms / 1000.0).round() * 1000.0).replace(".00 s", " s")
    }
}

/// Shows how a migration goes on.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
    shown: Option<(MigrationState, bool)>,
    counters: Option<Counters>,
    last_line: Option<Instant>,
}

impl Progress {
    /// Live on a terminal, plain lines otherwise; the bar draws to standard error.
    pub(crate) fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{spinner} {prefix} {bar:14} {wide_msg}")
                .expect("a constant template")
                .progress_chars("=> ");
            let bar = ProgressBar::new(1000).with_style(style);
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        Self { bar, shown: None, counters: None, last_line: None }
    }

    /// A fresh view of the migration.
    pub(crate) fn view(&mut self, view: &MigrationView, now: Instant) {
        let stage = (view.state, view.suspended);
        if self.shown == Some(stage) {
            return;
        }
        self.shown = Some(stage);
        self.draw(now, true);
    }

    /// The counters of a `progress` event.
    pub(crate) fn counters(&mut self, detail: &Value, now: Instant) {
        if let Some(counters) = Counters::read(detail) {
            self.counters = Some(counters);
            self.draw(now, false);
        }
    }

    /// A line that stays.
    pub(crate) fn note(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| super::note(text)),
            None => super::note(text),
        }
    }

    /// Takes the live line away.
    pub(crate) fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn draw(&mut self, now: Instant, stage_changed: bool) {
        let Some((state, suspended)) = self.shown else { return };
        let prefix = if suspended { format!("{state} (suspended)") } else { state.to_string() };
        // Late counters say nothing about the stages after the transfer.
        let counters = self.counters.filter(|_| state == MigrationState::MemoryTransfer);
        let text = counters.map(Counters::text).unwrap_or_default();
        if let Some(bar) = &self.bar {
            bar.set_prefix(prefix);
            bar.set_message(clean(&text));
            bar.set_position(position(state, counters));
            return;
        }
        let due = self.last_line.is_none_or(|at| now.duration_since(at) >= PLAIN_EVERY);
        if stage_changed || due {
            self.last_line = Some(now);
            let separator = if text.is_empty() { "" } else { ": " };
            super::note(&format!("{prefix}{separator}{text}"));
        }
    }
}

/// Where the bar stands, in thousandths: memory is nearly all of it.
fn position(state: MigrationState, counters: Option<Counters>) -> u64 {
    match (state, counters) {
        (MigrationState::MemoryTransfer, Some(c)) => {
            let done = u128::from(c.total_bytes - c.remaining_bytes) * 900 / u128::from(c.total_bytes.max(1));
            50 + u64::try_from(done).unwrap_or(900)
        }
        (MigrationState::Requested | MigrationState::Deciding, _) => 10,
        (MigrationState::Setup, _) => 30,
        (MigrationState::MemoryTransfer, None) => 50,
        (MigrationState::Switchover, _) => 960,
        (MigrationState::Committed, _) => 970,
        (MigrationState::NetworkCleanup, _) => 985,
        _ => 1000,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn counters_are_read_from_the_source_only() {
        let source =
            json!({"ram_total_bytes": 268_435_456, "ram_remaining_bytes": 67_108_864, "mbps": 1000.0});
        assert_eq!(
            Counters::read(&source).map(Counters::text).as_deref(),
            Some("192 MiB of 256 MiB, 119.2 MiB/s, under 1 s left")
        );
        assert_eq!(Counters::read(&json!({"stream_bytes": 5})), None);
        assert_eq!(Counters::read(&json!({"ram_total_bytes": 0, "ram_remaining_bytes": 0})), None);
        let odd = json!({"ram_total_bytes": 10, "ram_remaining_bytes": 99, "mbps": -1});
        assert_eq!(Counters::read(&odd).map(Counters::text).as_deref(), Some("0 B of 10 B"));
    }

    #[test]
    fn the_bar_only_grows_with_the_stages() {
        use MigrationState::{Committed, Completed, MemoryTransfer, NetworkCleanup, Setup, Switchover};
        let full = Counters { total_bytes: 9, remaining_bytes: 0, bytes_per_second: 0.0 };
        let stages = [
            (Setup, None),
            (MemoryTransfer, None),
            (MemoryTransfer, Some(full)),
            (Switchover, None),
            (Committed, None),
            (NetworkCleanup, None),
            (Completed, None),
        ];
        let positions: Vec<_> = stages.iter().map(|(s, c)| position(*s, *c)).collect();
        assert!(positions.is_sorted(), "{positions:?}");
    }
}
