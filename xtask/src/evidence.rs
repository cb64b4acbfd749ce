//! `cargo xtask evidence`: long counts, run on purpose and kept in the repository as `evidence/NAME.json`.
//!
//! A kind is a name and a program that prints one JSON object of counts on its last line and fails when its claim
//! does. A whole run writes the record, with the code and the machine that it ran on; a share of it writes nothing,
//! and is what `cargo xtask test` runs of each. A record that is older than the code it speaks of is told as such.

mod machine;
mod record;

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::run::{self, Workspace};
use record::Record;

/// A share may take this long, so that the tests stay bearable.
const SHARE_LIMIT: Duration = Duration::from_secs(300);
/// A whole run; more and something hangs.
const WHOLE_LIMIT: Duration = Duration::from_secs(3 * 3600);
/// What `cargo xtask test` runs of each kind: one in so many.
const TEST_SHARE: u64 = 100;
/// The seed of the tests: a failure must come from the change at hand.
const TEST_SEED: u64 = 1;

/// A long count.
struct Kind {
    name: &'static str,
    /// The claim, for the record.
    what: &'static str,
    program: Program,
    /// The option that takes the count, and the count of a whole run.
    count: (&'static str, u64),
    /// The option that takes the seed.
    seed: &'static str,
    /// Folders and files that it speaks of.
    paths: &'static [&'static str],
}

enum Program {
    /// A command of the lab.
    Lab(&'static str),
    /// An example: package, name, features.
    Example(&'static str, &'static str, &'static str),
    /// `cargo xtask fuzz`.
    Fuzz,
}

/// Every kind. A new one is an entry here and a program that ends its output with its counts.
const KINDS: [Kind; 5] = [
    Kind {
        name: "real-migrations",
        what: "fresh migrations between real QEMUs (7.2, 10.0 and both ways between) of VMs of random shapes, \
               through the inspector: none refused, every guest alive",
        program: Program::Lab("inspect-migrations"),
        count: ("--count", 300),
        seed: "--seed",
        paths: &["crates/engine/src/inspect", "crates/wire/src/qemu", "lab/src/inspection"],
    },
    Kind {
        name: "differential",
        what: "mutated streams given to the inspector, those it accepts to stock QEMU as well: completed, or \
               refused in order for a value inside a device's state; a sample of the others counts what QEMU \
               would have taken",
        program: Program::Lab("differential"),
        count: ("--count", 10_000),
        seed: "--seed",
        paths: &["crates/engine/src/inspect", "crates/wire/src/qemu", "lab/src/inspection"],
    },
    Kind {
        name: "fuzz",
        what: "coverage-guided executions of every parser that reads a peer's bytes, whole streams among them: no \
               panic, no hang, no allocation above 64 MiB, any split of the input alike",
        program: Program::Fuzz,
        count: ("--runs", 100_000_000),
        seed: "--seed",
        paths: &["crates/engine/src/inspect", "crates/wire/src", "crates/attest/src", "fuzz/targets"],
    },
    Kind {
        name: "handover-sim",
        what: "simulated hand-overs with faults, every step checked against the invariants",
        program: Program::Example("outrider-engine", "sim", "sim"),
        count: ("--seeds", 10_000_000),
        seed: "--from",
        paths: &["crates/engine/src/handover"],
    },
    Kind {
        name: "handover-model",
        what: "every state of two overlapping migrations of one VM between three hosts with one fault, none of which \
               breaks an invariant; a share stops after so many states",
        program: Program::Example("outrider-engine", "model", "sim"),
        count: ("--states", 100_000_000),
        seed: "--seed",
        paths: &["crates/engine/src/handover"],
    },
];

/// What is asked for on the command line.
#[derive(Debug, PartialEq, Eq)]
enum Request {
    List,
    Check,
    Run { name: String, share: u64, seed: Option<u64> },
}

impl Request {
    fn parse(arguments: &[String]) -> Result<Self> {
        let (mut name, mut share, mut seed) = (None, 1, None);
        let mut words = arguments.iter();
        while let Some(word) = words.next() {
            let mut number = || {
                let next = words.next().with_context(|| format!("{word} needs a number"))?;
                next.parse().with_context(|| format!("{word} {next}"))
            };
            match word.as_str() {
                "--list" => return Ok(Self::List),
                "--check" => return Ok(Self::Check),
                "--share" => share = number()?,
                "--seed" => seed = Some(number()?),
                option if option.starts_with('-') => bail!("evidence has no option {option}"),
                _ if name.is_none() => name = Some(word.clone()),
                _ => bail!("one kind of evidence at a time"),
            }
        }
        ensure!(share > 0, "a share is one in 1 or more");
        Ok(Self::Run { name: name.context("which kind of evidence? (see --list)")?, share, seed })
    }
}

/// `cargo xtask evidence …`
pub(crate) fn run(workspace: &Workspace, arguments: &[String]) -> Result<ExitCode> {
    match Request::parse(arguments)? {
        Request::List => list(),
        Request::Check => check(workspace)?,
        Request::Run { name, share, seed } => {
            let kind = KINDS.iter().find(|kind| kind.name == name);
            let kind = kind.with_context(|| format!("there is no evidence called {name:?} (see --list)"))?;
            let seed = seed.unwrap_or_else(fresh_seed);
            let passed =
                if share == 1 { whole(workspace, kind, seed)? } else { part(workspace, kind, share, seed)? };
            return Ok(ExitCode::from(u8::from(!passed)));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A hundredth of each kind, and whether the records are older than the code; true when all passed.
pub(crate) fn test(workspace: &Workspace) -> Result<bool> {
    let mut passed = true;
    for kind in &KINDS {
        passed &= part(workspace, kind, TEST_SHARE, TEST_SEED)?;
    }
    check(workspace)?;
    Ok(passed)
}

fn list() {
    for kind in &KINDS {
        println!("{:<16} {:>10}  {}", kind.name, kind.count.1, kind.what);
    }
}

/// Prints a warning for each record that is missing or older than its code.
fn check(workspace: &Workspace) -> Result<()> {
    for kind in &KINDS {
        match record::doubts(workspace, kind.name)?.as_slice() {
            [] => eprintln!("evidence: {}: up to date", kind.name),
            doubts => eprintln!("warning: evidence: {}: {}", kind.name, doubts.join("; ")),
        }
    }
    Ok(())
}

/// Evidence of the same seed over and over would show nothing new.
fn fresh_seed() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(1, |since| since.as_secs())
}

fn whole(workspace: &Workspace, kind: &Kind, seed: u64) -> Result<bool> {
    let mut record = Record::begin(workspace, kind.name, kind.what, kind.paths, seed)?;
    let outcome = execute(workspace, kind, 1, seed)?;
    record.end(&outcome);
    let path = record.write(workspace)?;
    eprintln!("evidence: {}: {}, written to {}", kind.name, outcome.word(), path.display());
    Ok(outcome.passed)
}

fn part(workspace: &Workspace, kind: &Kind, share: u64, seed: u64) -> Result<bool> {
    let outcome = execute(workspace, kind, share, seed)?;
    let (word, counts) = (outcome.word(), &outcome.counts);
    eprintln!(
        "evidence: {}, one in {share}: {word} in {:.1} s: {counts}",
        kind.name,
        outcome.took.as_secs_f64()
    );
    Ok(outcome.passed)
}

/// What a program did.
struct Outcome {
    passed: bool,
    counts: Value,
    took: Duration,
}

impl Outcome {
    fn word(&self) -> &'static str {
        if self.passed { "passed" } else { "failed" }
    }
}

fn execute(workspace: &Workspace, kind: &Kind, share: u64, seed: u64) -> Result<Outcome> {
    // A share runs on what the tests have built anyway.
    let profile = if share == 1 { "release" } else { "dev" };
    let mut command = program(workspace, &kind.program, profile)?;
    let (count_option, count) = kind.count;
    let count = count.div_ceil(share).to_string();
    command.args([count_option, &count, kind.seed, &seed.to_string()]);
    eprintln!("evidence: {}: {count}, seed {seed}", kind.name);
    let begun = Instant::now();
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("starting it")?;
    let output = child.stdout.take().context("it has no output")?;
    let last = thread::spawn(move || BufReader::new(output).lines().map_while(Result::ok).last());
    let limit = if share == 1 { WHOLE_LIMIT } else { SHARE_LIMIT };
    let succeeded = wait(&mut child, limit)?;
    let last = last.join().ok().flatten().unwrap_or_default();
    let counts: Value = serde_json::from_str(&last).unwrap_or(Value::Null);
    // A program that counted nothing has shown nothing.
    Ok(Outcome { passed: succeeded && counts.is_object(), counts, took: begun.elapsed() })
}

/// Builds the program; gives the command that runs it.
fn program(workspace: &Workspace, program: &Program, profile: &str) -> Result<Command> {
    let mut build = workspace.cargo();
    build.args(["build", "--quiet", "--profile", profile]);
    let folder = workspace.target.join(if profile == "dev" { "debug" } else { profile });
    let (path, words): (PathBuf, &[&str]) = match program {
        // It builds its own, with instrumentation.
        Program::Fuzz => {
            let this = std::env::current_exe().context("finding this program")?;
            let mut command = workspace.command(this);
            command.arg("fuzz");
            return Ok(command);
        }
        Program::Lab(command) => {
            build.args(["-p", "outrider-lab"]);
            (folder.join("outrider-lab"), &[command])
        }
        Program::Example(package, example, features) => {
            build.args(["-p", package, "--example", example, "--features", features]);
            (folder.join("examples").join(example), &[])
        }
    };
    run::step(&mut build)?;
    let mut command = workspace.command(path);
    command.args(words);
    Ok(command)
}

/// Whether it succeeded. What has not ended by then is killed (and takes the QEMUs that it started along).
fn wait(child: &mut Child, limit: Duration) -> Result<bool> {
    const LOOK: Duration = Duration::from_millis(50);
    let begun = Instant::now();
    loop {
        if let Some(status) = child.try_wait().context("waiting for it")? {
            return Ok(status.success());
        }
        if begun.elapsed() > limit {
            child.kill().context("ending what takes too long")?;
            child.wait().context("waiting for its end")?;
            eprintln!("evidence: not done within {} s", limit.as_secs());
            return Ok(false);
        }
        thread::sleep(LOOK);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn requests_are_read_and_nonsense_is_refused() {
        let parse =
            |line: &str| Request::parse(&line.split_whitespace().map(str::to_owned).collect::<Vec<_>>());
        assert_eq!(parse("--list").unwrap(), Request::List);
        assert_eq!(parse("--check").unwrap(), Request::Check);
        let name = "fuzz".to_owned();
        assert_eq!(parse("fuzz").unwrap(), Request::Run { name: name.clone(), share: 1, seed: None });
        let asked = parse("--share 100 fuzz --seed 7").unwrap();
        assert_eq!(asked, Request::Run { name, share: 100, seed: Some(7) });
        for wrong in ["", "--share", "fuzz --share x", "fuzz --share 0", "fuzz more", "fuzz --never"] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn every_kind_speaks_of_code_that_exists() {
        let root = Workspace::locate().unwrap().root;
        for kind in &KINDS {
            assert!(kind.count.1 > 0 && !kind.paths.is_empty(), "{}", kind.name);
            for path in kind.paths {
                assert!(root.join(path).exists(), "{}: {path}", kind.name);
            }
        }
    }

    #[test]
    fn a_program_that_takes_too_long_is_ended() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        assert!(!wait(&mut child, Duration::from_millis(1)).unwrap());
        assert!(wait(&mut Command::new("true").spawn().unwrap(), SHARE_LIMIT).unwrap());
        assert!(!wait(&mut Command::new("false").spawn().unwrap(), SHARE_LIMIT).unwrap());
    }
}
