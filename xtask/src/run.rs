//! Running other programs: visibly, and with errors that name the command.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};

/// Where the workspace and its build folder are.
#[derive(Debug)]
pub(crate) struct Workspace {
    /// Root of the workspace.
    pub(crate) root: PathBuf,
    /// Cargo's build folder.
    pub(crate) target: PathBuf,
}

impl Workspace {
    /// Finds them from where xtask was built and what cargo was told.
    pub(crate) fn locate() -> Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .context("xtask's folder has no parent")?
            .to_owned();
        let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from);
        Ok(Self { root, target })
    }

    /// The lab's folder: everything in it can be made again.
    pub(crate) fn lab_cache(&self) -> PathBuf {
        self.target.join("lab")
    }

    /// A command that runs at the workspace's root.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command.current_dir(&self.root);
        command
    }

    /// The cargo that runs this xtask.
    pub(crate) fn cargo(&self) -> Command {
        self.command(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
    }
}

/// Prints the command, runs it, and fails unless it succeeds.
pub(crate) fn step(command: &mut Command) -> Result<()> {
    let line = shown(command);
    eprintln!("$ {line}");
    let status = command.status().with_context(|| format!("starting `{line}`"))?;
    if !status.success() {
        bail!("`{line}` failed ({status})");
    }
    Ok(())
}

/// Runs the command quietly; its output appears only in the error.
pub(crate) fn quiet(command: &mut Command) -> Result<String> {
    let line = shown(command);
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("starting `{line}`"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("`{line}` failed ({}): {}", output.status, said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs the command in the foreground; its exit code becomes ours.
pub(crate) fn hand_over(command: &mut Command) -> Result<ExitCode> {
    let line = shown(command);
    let status = command.status().with_context(|| format!("starting `{line}`"))?;
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::from(4), ExitCode::from))
}

/// Whether the command can be started and succeeds.
pub(crate) fn works(command: &mut Command) -> bool {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// Builds the programs that tests and the demo start: the project's and the lab's.
pub(crate) fn build_binaries(workspace: &Workspace, profile: &str) -> Result<()> {
    step(workspace.cargo().args([
        "build",
        "--quiet",
        "--profile",
        profile,
        "-p",
        "outrider",
        "-p",
        "outrider-agent",
        "-p",
        "outrider-lab",
    ]))
}

/// Builds the scanner of signatures, whose engine takes minutes: only for tests of the whole.
pub(crate) fn build_scanner(workspace: &Workspace) -> Result<()> {
    step(workspace.cargo().args([
        "build",
        "--quiet",
        "-p",
        "outrider-signature",
        "--features",
        "yara",
        "--bin",
        "outrider-scanner",
    ]))
}

fn shown(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy().into_owned())
        .collect::<Vec<_>>()
        .join(" ")
}
