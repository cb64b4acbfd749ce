//! Medians and ratios. Pure.

use std::fmt::Write;

use serde::Serialize;

/// What is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    Tcp,
    Tls,
    Outrider,
}

impl Mode {
    pub(super) const ALL: [Self; 3] = [Self::Tcp, Self::Tls, Self::Outrider];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Tcp => "plain TCP",
            Self::Tls => "QEMU TLS",
            Self::Outrider => "Outrider",
        }
    }
}

/// Figures of one migration.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sample {
    pub(super) total_ms: f64,
    pub(super) downtime_ms: f64,
    pub(super) cpu_ms: f64,
    pub(super) transferred_bytes: f64,
}

/// Medians of one mode, and their ratios to plain TCP.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Summary {
    mode: &'static str,
    total_ms: f64,
    total_ratio: f64,
    downtime_ms: f64,
    cpu_s_per_gib: f64,
    cpu_ratio: f64,
}

pub(super) fn summary(samples: &[(Mode, Sample)]) -> Vec<Summary> {
    let of = |mode, value: fn(&Sample) -> f64| {
        median(samples.iter().filter(|(m, _)| *m == mode).map(|(_, s)| value(s)).collect())
    };
    let cpu: fn(&Sample) -> f64 = |s| s.cpu_ms / 1e3 / (s.transferred_bytes / f64::from(1 << 30));
    Mode::ALL
        .iter()
        .map(|&mode| Summary {
            mode: mode.name(),
            total_ms: of(mode, |s| s.total_ms),
            total_ratio: of(mode, |s| s.total_ms) / of(Mode::Tcp, |s| s.total_ms),
            downtime_ms: of(mode, |s| s.downtime_ms),
            cpu_s_per_gib: of(mode, cpu),
            cpu_ratio: of(mode, cpu) / of(Mode::Tcp, cpu),
        })
        .collect()
}

/// NaN for no values: it shows as such, where 0 would look like a figure.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

pub(super) fn table(summary: &[Summary], rounds: usize, memory_mib: u32, fill_mib: u32) -> String {
    let mut text = format!(
        "Medians of {rounds} interleaved rounds; guest of {memory_mib} MiB, {fill_mib} MiB of it random data\n\n\
         | mode | total ms | ratio | downtime ms | CPU s/GiB | ratio |\n|---|---|---|---|---|---|\n"
    );
    for row in summary {
        // Writing to a String can't fail.
        let _infallible = writeln!(
            text,
            "| {} | {:.0} | {:.2} | {:.0} | {:.2} | {:.2} |",
            row.mode, row.total_ms, row.total_ratio, row.downtime_ms, row.cpu_s_per_gib, row.cpu_ratio
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_are_of_the_middle_and_ratios_of_plain_tcp() {
        let sample = |total_ms| Sample {
            total_ms,
            downtime_ms: 1.0,
            cpu_ms: 1000.0,
            transferred_bytes: 1_073_741_824.0,
        };
        let samples = [
            (Mode::Tcp, sample(10.0)),
            (Mode::Tcp, sample(30.0)),
            (Mode::Tcp, sample(20.0)),
            (Mode::Outrider, sample(40.0)),
            (Mode::Outrider, sample(60.0)),
        ];
        let summary = summary(&samples);
        assert_eq!((summary[0].total_ms, summary[2].total_ms), (20.0, 50.0));
        assert_eq!(summary[2].total_ratio, 2.5);
        assert!(summary[1].total_ms.is_nan());
        assert_eq!(summary[0].cpu_s_per_gib, 1.0);
    }
}
