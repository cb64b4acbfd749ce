//! Project commands: `cargo xtask setup|test|check|fuzz|evidence|demo|bench`.
//!
//! Every command first brings the machine to where it needs it (see [`packages`] and [`guest`]), and says what it runs.

mod arrows;
mod check;
mod evidence;
mod fuzz;
mod guest;
mod packages;
mod primitives;
mod rules;
mod run;
mod test;

use std::process::ExitCode;

use anyhow::Result;
use packages::Consent;
use run::Workspace;

const USAGE: &str = "\
usage: cargo xtask COMMAND

  setup [--yes]        install the missing Debian packages, make the guest image
  test  [--yes] [ARG…] run every test; --deny-skips: a skip is a failure; other ARGs go to cargo-nextest
  check [STEP…]        the quality gate: format, arrows, hand-over primitives, lints, documentation, licences
  fuzz  [TARGET…]      fuzz what reads a peer's bytes; --runs N in all, --seed S, --keep what reaches new code
  evidence NAME        a long count, kept as evidence/NAME.json; --share N: one in N of it, not kept; --seed S
  evidence --list      the kinds; --check: which records are older than the code they speak of
  demo  [--yes] [ARG…] live-migrate a real guest; ARGs go to `outrider-lab demo`
  bench [--yes] [ARG…] the inspector beside memcpy, then migrations beside plain QEMU's; ARGs go to `outrider-lab bench`

  --yes  do not ask before installing packages (nor is anything asked without a terminal)";

fn main() -> ExitCode {
    match dispatch(std::env::args().skip(1).collect()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::from(4)
        }
    }
}

fn dispatch(arguments: Vec<String>) -> Result<ExitCode> {
    let yes = arguments.iter().any(|a| a == "--yes");
    let consent = if yes { Consent::Given } else { Consent::Ask };
    let mut rest = arguments.into_iter().filter(|a| a != "--yes");
    let command = rest.next().unwrap_or_default();
    let rest: Vec<String> = rest.collect();
    let workspace = Workspace::locate()?;
    match command.as_str() {
        "setup" => setup(&workspace, consent).map(|()| ExitCode::SUCCESS),
        "test" => {
            setup(&workspace, consent)?;
            test::run(&workspace, &rest)
        }
        "check" => check::run(&workspace, &rest),
        "fuzz" => fuzz::run(&workspace, &rest),
        "evidence" => evidence(&workspace, consent, &rest),
        "demo" | "bench" => {
            setup(&workspace, consent)?;
            if command == "bench" {
                inspector_speed(&workspace)?;
            }
            lab(&workspace, &command, &rest)
        }
        "help" | "--help" | "-h" => {
            println!("{USAGE}");
            Ok(ExitCode::SUCCESS)
        }
        "" => {
            eprintln!("{USAGE}");
            Ok(ExitCode::from(2))
        }
        other => {
            eprintln!("xtask: there is no command {other:?}\n{USAGE}");
            Ok(ExitCode::from(2))
        }
    }
}

/// The inspector beside memcpy of the same bytes, in one run.
fn inspector_speed(workspace: &Workspace) -> Result<()> {
    let example = ["run", "--quiet", "--release", "-p", "outrider-engine", "--example", "inspect_speed"];
    run::step(workspace.cargo().args(example))
}

fn setup(workspace: &Workspace, consent: Consent) -> Result<()> {
    packages::ensure(workspace, consent)?;
    guest::ensure(workspace)
}

/// Only a run needs the machine prepared.
fn evidence(workspace: &Workspace, consent: Consent, arguments: &[String]) -> Result<ExitCode> {
    if !arguments.iter().any(|word| word == "--list" || word == "--check") {
        setup(workspace, consent)?;
    }
    evidence::run(workspace, arguments)
}

/// Runs `outrider-lab COMMAND`, with the project's binaries built beside it, and hands on its exit code.
fn lab(workspace: &Workspace, command: &str, arguments: &[String]) -> Result<ExitCode> {
    // A benchmark of an unoptimised build says nothing.
    let profile = if command == "bench" { "release" } else { "dev" };
    run::build_binaries(workspace, profile)?;
    let folder = if command == "bench" { "release" } else { "debug" };
    let lab = workspace.target.join(folder).join("outrider-lab");
    run::hand_over(workspace.command(&lab).arg(command).args(arguments))
}
