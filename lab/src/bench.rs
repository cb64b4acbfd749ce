//! The benchmark: plain QEMU over TCP, QEMU's own TLS, and Outrider, side by side in interleaved rounds.
//!
//! These machines are noisy, so single figures say nothing: every mode runs once in each round, and medians and
//! ratios to plain TCP are printed. CPU time is that of both hosts' cgroups, so it holds QEMU, agents and daemons
//! alike (and the guest).

mod figures;

use std::fs;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use serde_json::json;

use crate::client;
use crate::fleet::{Fleet, Guest, Programs};
use crate::guest::{GuestImage, GuestLoad};
use crate::net::Machine;
use crate::plain::{Pair, Transport};
use crate::process;
use crate::vm::VmOptions;
use figures::{Mode, Sample, summary};

/// Boot and fill on a busy machine.
const READY_LIMIT: Duration = Duration::from_secs(180);
/// A migration of a few GiB on a busy machine.
const MIGRATION_LIMIT: Duration = Duration::from_secs(300);

/// Compare Outrider with plain QEMU.
#[derive(Debug, Clone, Parser)]
#[command(name = "bench")]
struct Options {
    /// Interleaved rounds.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Guest memory, in MiB.
    #[arg(long, default_value_t = 1024)]
    memory_mib: u32,
    /// How much of it holds random data, in MiB.
    #[arg(long, default_value_t = 512)]
    fill_mib: u32,
    /// `table` or `json`.
    #[arg(long, default_value = "table")]
    output: String,
}

/// Runs the benchmark.
pub fn run(arguments: &[String]) -> Result<ExitCode> {
    let words = std::iter::once("bench".to_owned()).chain(arguments.iter().cloned());
    let options = match Options::try_parse_from(words) {
        Ok(options) => options,
        Err(error) => error.exit(),
    };
    if let Some(reason) = crate::require::missing() {
        bail!("the benchmark cannot run here: {reason}");
    }
    let image = GuestImage::locate()?;
    let fleet = Fleet::ready(&Programs::locate()?)?;
    let mut samples = Vec::new();
    for round in 1..=options.rounds {
        for mode in Mode::ALL {
            eprintln!("round {round} of {}: {}", options.rounds, mode.name());
            let sample = match mode {
                Mode::Tcp => plain(&fleet, &image, &options, Transport::Tcp),
                Mode::Tls => plain(&fleet, &image, &options, Transport::Tls),
                Mode::Outrider => outrider(&fleet, &image, &options, round),
            };
            samples.push((mode, sample.with_context(|| format!("round {round}, {}", mode.name()))?));
        }
    }
    let summary = summary(&samples);
    if options.output == "json" {
        let document = json!({"rounds": options.rounds, "memory_mib": options.memory_mib,
            "fill_mib": options.fill_mib, "modes": summary});
        println!("{}", serde_json::to_string_pretty(&document)?);
    } else {
        println!("{}", figures::table(&summary, options.rounds, options.memory_mib, options.fill_mib));
    }
    Ok(ExitCode::SUCCESS)
}

fn load(options: &Options) -> GuestLoad {
    GuestLoad { fill_mib: options.fill_mib, ..GuestLoad::default() }
}

fn plain(fleet: &Fleet, image: &GuestImage, options: &Options, transport: Transport) -> Result<Sample> {
    let vm = VmOptions { memory_mib: options.memory_mib, load: load(options), ..VmOptions::new("plain") };
    let mut pair = Pair::start_for(&fleet.net, image, &vm, transport)?;
    let before = hosts_cpu_ms(fleet)?;
    let outcome = pair.migrate()?;
    let cpu_ms = hosts_cpu_ms(fleet)? - before;
    #[allow(clippy::cast_precision_loss)]
    Ok(Sample {
        total_ms: outcome.total_ms as f64,
        downtime_ms: outcome.stop_to_resume_ms,
        cpu_ms,
        transferred_bytes: outcome.transferred_bytes as f64,
    })
}

fn outrider(fleet: &Fleet, image: &GuestImage, options: &Options, round: usize) -> Result<Sample> {
    let guest = Guest {
        memory_mib: u64::from(options.memory_mib),
        load: load(options),
        ..Guest::new(&format!("bench-{round}"))
    };
    fleet.define(&guest, image)?;
    fleet.start_vm(&guest, Machine::HostA)?;
    process::wait_for("the guest to serve", READY_LIMIT, || {
        let node = fleet.net.node(Machine::Client);
        Ok(client::secret(node, client::guest_address()).ok())
    })?;
    let before = hosts_cpu_ms(fleet)?;
    let started = Instant::now();
    let id = fleet.migrate(&guest.name, Machine::HostB)?;
    let ends = ["completed", "failed", "terminated", "refused", "needs-operator"];
    let shown = fleet.wait_migration(&id, &ends, MIGRATION_LIMIT)?;
    let waited = started.elapsed();
    let cpu_ms = hosts_cpu_ms(fleet)? - before;
    ensure!(shown["state"] == "completed", "the migration {}: {}", shown["state"], shown["problem"]);
    fleet.json(&["vm", "stop", &guest.name])?;
    let number = |key: &str| shown[key].as_f64().with_context(|| format!("the migration has no {key}"));
    ensure!(number("total_ms")? <= waited.as_secs_f64() * 1e3 + 50.0, "total_ms exceeds what the lab waited");
    Ok(Sample {
        total_ms: number("total_ms")?,
        downtime_ms: number("downtime_ms")?,
        cpu_ms,
        transferred_bytes: number("transferred_bytes")?,
    })
}

/// CPU time of everything on both hosts so far, in milliseconds.
fn hosts_cpu_ms(fleet: &Fleet) -> Result<f64> {
    let mut sum = 0.0;
    for host in Machine::HOSTS {
        let name = fleet.net.node(host).cgroup().path().display().to_string();
        let name = name.trim_start_matches('/').to_owned();
        let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];
        let text = roots.iter().find_map(|root| fs::read_to_string(format!("{root}/{name}/cpu.stat")).ok());
        let text = text.with_context(|| format!("no cpu.stat of cgroup {name}"))?;
        let usage = text.lines().find_map(|line| line.strip_prefix("usage_usec "));
        let usage: f64 =
            usage.context("cpu.stat has no usage_usec")?.trim().parse().context("reading usage_usec")?;
        sum += usage / 1e3;
    }
    Ok(sum)
}
