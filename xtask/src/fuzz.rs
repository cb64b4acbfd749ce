//! `cargo xtask fuzz`: coverage-guided fuzzing of everything that reads a peer's bytes.
//!
//! The runner (`fuzz/runner`) is built with the compiler's own coverage counters, which a stable compiler gives when it
//! is told to pass for an unstable one; nothing else is built so. New inputs go to `target/fuzz/corpus`; `--keep`
//! takes those that reach new code into `fuzz/corpus`, which the tests replay.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Mutex;
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};

use crate::run::{self, Workspace};

const PLATFORM: &str = "x86_64-unknown-linux-gnu";
const COVERAGE: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
                        -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
                        -Cllvm-args=-sanitizer-coverage-pc-table \
                        -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1";
/// Executions of all targets together, unless `--runs` says otherwise.
const DEFAULT_RUNS: u64 = 1_000_000;
/// Targets, their share in a thousand of the executions, and the longest input in bytes. Whole streams take a hundred
/// times as long as frames do.
const TARGETS: [(&str, u64, usize); 11] = [
    ("return_path", 215, 4096),
    ("frames", 215, 4096),
    ("qmp", 198, 8192),
    ("catalogue", 130, 16384),
    ("tpm_structures", 75, 1024),
    ("multifd", 50, 65536),
    ("event_log", 50, 16384),
    ("main_channel", 25, 65536),
    ("evidence", 20, 8192),
    ("whole_stream", 12, 128),
    ("device_state", 10, 65536),
];

/// What is asked for.
#[derive(Debug, PartialEq, Eq)]
struct Request {
    runs: u64,
    seed: u64,
    keep: bool,
    targets: Vec<String>,
}

impl Request {
    fn parse(arguments: &[String]) -> Result<Self> {
        let mut request = Self { runs: DEFAULT_RUNS, seed: 1, keep: false, targets: Vec::new() };
        let mut words = arguments.iter();
        while let Some(word) = words.next() {
            let mut number = || {
                let next = words.next().with_context(|| format!("{word} needs a number"))?;
                next.parse().with_context(|| format!("{word} {next}"))
            };
            match word.as_str() {
                "--runs" => request.runs = number()?,
                "--seed" => request.seed = number()?,
                "--keep" => request.keep = true,
                name if TARGETS.iter().any(|(known, ..)| *known == name) => {
                    request.targets.push(name.to_owned())
                }
                other => bail!("fuzz has no option or target {other:?}; targets: {}", names()),
            }
        }
        ensure!(request.runs > 0, "nothing would be run");
        Ok(request)
    }
}

fn names() -> String {
    TARGETS.map(|(name, ..)| name).join(", ")
}

/// `cargo xtask fuzz [TARGET…] [--runs N] [--seed S] [--keep]`: ends with a line of counts; fails on the first finding.
pub(crate) fn run(workspace: &Workspace, arguments: &[String]) -> Result<ExitCode> {
    let request = Request::parse(arguments)?;
    let runner = build(workspace)?;
    let chosen = |name: &str| request.targets.is_empty() || request.targets.iter().any(|t| t == name);
    let targets: Vec<_> = TARGETS.into_iter().filter(|(name, ..)| chosen(name)).collect();
    let shares: u64 = targets.iter().map(|(_, share, _)| share).sum();
    let (todo, done) = (Mutex::new(targets.into_iter()), Mutex::new(Map::new()));
    let jobs = thread::available_parallelism().map_or(1, usize::from);
    let outcomes: Vec<Result<()>> = thread::scope(|scope| {
        let worker = || -> Result<()> {
            loop {
                let next = todo.lock().ok().and_then(|mut todo| todo.next());
                let Some((name, share, longest)) = next else { return Ok(()) };
                let runs = (request.runs * share).div_ceil(shares);
                let fuzzer = Fuzzer { workspace, runner: &runner, name, longest };
                let executions = fuzzer.run(runs, request.seed)?;
                if request.keep {
                    fuzzer.keep()?;
                }
                done.lock().ok().and_then(|mut done| done.insert(name.to_owned(), json!(executions)));
            }
        };
        let workers: Vec<_> = (0..jobs).map(|_| scope.spawn(worker)).collect();
        workers
            .into_iter()
            .map(|w| w.join().unwrap_or_else(|_| bail!("a worker of the fuzzers died")))
            .collect()
    });
    outcomes.into_iter().collect::<Result<()>>()?;
    let by_target = done.into_inner().unwrap_or_default();
    let executions: u64 = by_target.values().filter_map(Value::as_u64).sum();
    println!("{}", json!({"executions": executions, "findings": 0, "by_target": by_target}));
    Ok(ExitCode::SUCCESS)
}

fn build(workspace: &Workspace) -> Result<PathBuf> {
    let target = workspace.target.join("fuzz");
    let mut build = workspace.cargo();
    build.current_dir(workspace.root.join("fuzz/runner"));
    build.args(["build", "--quiet", "--locked", "--release", "--target", PLATFORM]);
    build.env("RUSTC_BOOTSTRAP", "1").env("RUSTFLAGS", COVERAGE).env("CARGO_TARGET_DIR", &target);
    run::step(&mut build)?;
    Ok(target.join(PLATFORM).join("release/fuzz"))
}

/// One target's fuzzer.
struct Fuzzer<'a> {
    workspace: &'a Workspace,
    runner: &'a PathBuf,
    name: &'static str,
    longest: usize,
}

impl Fuzzer<'_> {
    fn kept(&self) -> PathBuf {
        self.workspace.root.join("fuzz/corpus").join(self.name)
    }

    fn working(&self) -> PathBuf {
        self.workspace.target.join("fuzz/corpus").join(self.name)
    }

    fn command(&self) -> Command {
        let mut command = self.workspace.command(self.runner);
        command.env("OUTRIDER_FUZZ_TARGET", self.name).stdin(Stdio::null()).stdout(Stdio::null());
        command.arg(format!("-max_len={}", self.longest));
        command
    }

    /// Runs so often; gives how often it ran.
    fn run(&self, runs: u64, seed: u64) -> Result<u64> {
        let (working, found) = (self.working(), self.workspace.target.join("fuzz/found"));
        for folder in [&working, &found] {
            fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        }
        let mut command = self.command();
        // An input that needs more memory or time than these is a finding.
        command.args(["-print_final_stats=1", "-timeout=10", "-rss_limit_mb=2048", "-malloc_limit_mb=64"]);
        command.arg(format!("-runs={runs}")).arg(format!("-seed={seed}"));
        command.arg(format!("-artifact_prefix={}/{}-", found.display(), self.name));
        command.arg(&working).arg(self.kept());
        eprintln!("fuzz: {}: {runs} executions", self.name);
        let output = command.stderr(Stdio::piped()).output().context("starting the fuzzer")?;
        let said = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            let tail: Vec<&str> = said.lines().rev().take(30).collect();
            let tail: Vec<&str> = tail.into_iter().rev().collect();
            bail!("{} found something ({}):\n{}", self.name, output.status, tail.join("\n"));
        }
        let count = said.lines().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
        count.and_then(|text| text.trim().parse().ok()).context("the fuzzer did not say how often it ran")
    }

    /// Takes what reaches new code into the repository.
    fn keep(&self) -> Result<()> {
        let mut command = self.command();
        command.args(["-set_cover_merge=1"]).arg(self.kept()).arg(self.working());
        let output = command.stderr(Stdio::piped()).output().context("starting the fuzzer")?;
        ensure!(output.status.success(), "merging the corpus of {}: {}", self.name, output.status);
        Ok(())
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
        let asked = parse("qmp --runs 7 frames --seed 3 --keep").unwrap();
        let targets = vec!["qmp".to_owned(), "frames".to_owned()];
        assert_eq!(asked, Request { runs: 7, seed: 3, keep: true, targets });
        for wrong in ["nothing", "--runs", "--runs x", "--runs 0", "--seed"] {
            assert!(parse(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn the_shares_are_a_whole_and_every_target_has_a_corpus() {
        assert_eq!(TARGETS.iter().map(|(_, share, _)| share).sum::<u64>(), 1000);
        let root = Workspace::locate().unwrap().root;
        for (name, ..) in TARGETS {
            assert!(root.join("fuzz/corpus").join(name).is_dir(), "{name}");
        }
    }
}
