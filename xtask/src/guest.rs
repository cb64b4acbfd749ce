//! The guest image: builds the guest daemon as a static program and has the lab pack it.

use anyhow::{Context, Result};

use crate::packages;
use crate::run::{self, Workspace};

/// The guest is an x86-64 machine, whatever runs this.
const GUEST_TARGET: &str = "x86_64-unknown-linux-gnu";

/// Makes the image, or finds that it is up to date.
pub(crate) fn ensure(workspace: &Workspace) -> Result<()> {
    let target = workspace.lab_cache().join("build");
    let mut build = workspace.cargo();
    build
        .args(["build", "--quiet", "--release", "-p", "outrider-lab-guest", "--target", GUEST_TARGET])
        .arg("--target-dir")
        .arg(&target)
        // Naming the target keeps build scripts out of reach of the flags.
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "s")
        .env("CARGO_PROFILE_RELEASE_STRIP", "true");
    run::step(&mut build).context("building the guest daemon")?;
    let daemon = target.join(GUEST_TARGET).join("release/outrider-lab-guest");
    let mut pack = workspace.cargo();
    pack.args(["run", "--quiet", "-p", "outrider-lab", "--", "guest", "--unpacked"])
        .arg(packages::unpacked_folder(workspace))
        .arg("--daemon")
        .arg(daemon)
        .arg("--out")
        .arg(workspace.lab_cache().join("guest"));
    run::step(&mut pack).context("packing the guest image")
}
