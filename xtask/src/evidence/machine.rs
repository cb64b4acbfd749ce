//! The machine that a count ran on, as far as it matters to who reads the figures.

use std::fs;
use std::thread;

use serde_json::{Value, json};

/// Model of the processor, cores, kernel.
pub(super) fn describe() -> Value {
    let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    json!({
        "cpu": model(&cpus),
        "cores": thread::available_parallelism().map_or(0, std::num::NonZero::get),
        "kernel": kernel.trim(),
    })
}

fn model(cpus: &str) -> &str {
    let line = cpus.lines().find_map(|line| line.strip_prefix("model name"));
    line.map_or("unknown", |rest| rest.trim_start_matches([' ', '\t', ':']))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_is_found() {
        assert_eq!(model("processor\t: 0\nmodel name\t: Fast(R) 9000\nflags\t: fpu\n"), "Fast(R) 9000");
        assert_eq!(model(""), "unknown");
    }
}
