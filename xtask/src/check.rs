//! `cargo xtask check`: the quality gate. Every step runs; the summary names each that failed.

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};

use crate::run::{self, Workspace};
use crate::{arrows, primitives, rules};

/// Pinned by nothing but its lock file; installed where it is missing, which takes some minutes once.
const DENY: &str = "cargo-deny";

type Step = (&'static str, fn(&Workspace) -> Result<()>);

const STEPS: [Step; 7] = [
    ("format", format),
    ("arrows between rooms", arrows::check),
    ("hand-over primitives", primitives::check),
    ("inspector's rules", rules::check),
    ("lints", lints),
    ("documentation", documentation),
    ("licences, bans, sources", supply_chain),
];

/// Runs every step, or those whose name contains one of the words.
pub(crate) fn run(workspace: &Workspace, words: &[String]) -> Result<ExitCode> {
    let wanted = |name: &str| words.is_empty() || words.iter().any(|word| name.contains(word.as_str()));
    let steps: Vec<&Step> = STEPS.iter().filter(|(name, _)| wanted(name)).collect();
    ensure!(!steps.is_empty(), "no step of the check is called {words:?}");
    let mut failed = Vec::new();
    for (name, step) in &steps {
        eprintln!("== {name}");
        if let Err(error) = step(workspace) {
            eprintln!("FAILED {name}: {error:#}");
            failed.push(*name);
        }
    }
    if failed.is_empty() {
        eprintln!("check: {} steps passed", steps.len());
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("check: failed: {}", failed.join("; "));
    Ok(ExitCode::FAILURE)
}

fn format(workspace: &Workspace) -> Result<()> {
    run::step(workspace.cargo().args(["fmt", "--all", "--check"]))
}

fn lints(workspace: &Workspace) -> Result<()> {
    let clippy = ["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"];
    run::step(workspace.cargo().args(clippy))?;
    let scanner =
        ["clippy", "--quiet", "--package", "outrider-signature", "--features", "yara", "--all-targets"];
    run::step(workspace.cargo().args(scanner).args(["--", "-D", "warnings"]))
}

fn documentation(workspace: &Workspace) -> Result<()> {
    let mut doc = workspace.cargo();
    doc.args(["doc", "--quiet", "--workspace", "--no-deps", "--document-private-items"]);
    run::step(doc.env("RUSTDOCFLAGS", "-D warnings -A rustdoc::private_intra_doc_links"))
}

/// The advisory database is not asked for: it is not part of what the project's machines can reach.
fn supply_chain(workspace: &Workspace) -> Result<()> {
    if !run::works(workspace.cargo().args(["deny", "--version"])) {
        run::step(workspace.cargo().args(["install", "--quiet", "--locked", DENY]))
            .context("installing cargo-deny")?;
    }
    run::step(workspace.cargo().args(["deny", "--log-level", "warn", "check", "licenses", "bans", "sources"]))
}
