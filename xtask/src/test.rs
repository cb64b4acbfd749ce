//! `cargo xtask test`: every test of the workspace, and an honest count of what was skipped; then a hundredth of
//! each long count, unless only some tests are asked for.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::evidence;
use crate::packages;
use crate::run::{self, Workspace};

/// With this argument a skipped test is a failure: what the project's own machines use.
const DENY_SKIPS: &str = "--deny-skips";

/// Everything that does not need the scanner's engine, which takes minutes to build.
const WITHOUT_ENGINE: [&str; 4] = ["--workspace", "--exclude", "outrider-signature", "--no-tests=pass"];
/// The one room that does, on its own, so that no other room is built with features that only the engine wants.
const WITH_ENGINE: [&str; 5] = ["--package", "outrider-signature", "--features", "yara", "--no-tests=pass"];

/// Builds the programs that tests start, runs the tests, reports the skips.
pub(crate) fn run(workspace: &Workspace, arguments: &[String]) -> Result<ExitCode> {
    run::build_binaries(workspace, "dev")?;
    run::build_scanner(workspace)?;
    let skips = workspace.lab_cache().join("skips");
    forget(&skips)?;
    let (ours, theirs): (Vec<&String>, Vec<&String>) = arguments.iter().partition(|word| *word == DENY_SKIPS);
    let nextest = |what: &[&str]| {
        let mut nextest = workspace.cargo();
        nextest.args(["nextest", "run"]).args(what).args(&theirs).env("OUTRIDER_SKIPS", &skips);
        let older = packages::older_qemu_folder(workspace);
        nextest.env("OUTRIDER_OLD_QEMU", older.join("usr")).env("OUTRIDER_TEST_QEMUS", with_firmware(&older));
        run::step(&mut nextest)
    };
    let outcomes = [nextest(&WITHOUT_ENGINE), nextest(&WITH_ENGINE)];
    let skipped = fs::read_to_string(&skips).unwrap_or_default();
    for line in skipped.lines() {
        eprintln!("SKIPPED {line}");
    }
    let count = skipped.lines().count();
    eprintln!("skipped tests: {count}");
    outcomes.into_iter().collect::<Result<()>>()?;
    let denied = count > 0 && !ours.is_empty();
    let shown = !theirs.is_empty() || evidence::test(workspace)?;
    Ok(ExitCode::from(u8::from(denied || !shown)))
}

/// The older QEMU's program, and where its firmware is: it is unpacked, not installed.
fn with_firmware(folder: &Path) -> String {
    let usr = folder.join("usr");
    let firmware = ["share/qemu", "share/seabios", "lib/ipxe/qemu"].map(|at| usr.join(at));
    let options: Vec<String> = firmware.iter().map(|at| format!("-L {}", at.display())).collect();
    format!("{} {}", usr.join("bin/qemu-system-x86_64").display(), options.join(" "))
}

fn forget(skips: &Path) -> Result<()> {
    match fs::remove_file(skips) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", skips.display()))
        }
        _ => Ok(()),
    }
}
