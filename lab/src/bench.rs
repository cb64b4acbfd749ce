//! The benchmark: plain QEMU's migrations side by side. Outrider's own column comes with the demo.

use std::process::ExitCode;

use anyhow::{Result, bail};

/// Runs the benchmark.
pub fn run(_arguments: &[String]) -> Result<ExitCode> {
    bail!("the benchmark is not written yet")
}
