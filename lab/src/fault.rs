//! Faults on purpose: waits for a moment in a daemon's log, cuts the network in one direction, kills what it names,
//! and then asks the outside observer whether the VM ran twice, or not at all.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::client;
use crate::fleet::{Fleet, Guest, Programs};
use crate::guest::{GuestImage, GuestLoad};
use crate::net::Machine;
use crate::observer::{Observer, Report};
use crate::process;

/// A log is looked at this often: the moments that faults aim at last milliseconds.
const LOOK: Duration = Duration::from_micros(200);
/// Moments that a test waits for come within a migration's time.
const MOMENT_LIMIT: Duration = Duration::from_secs(60);
/// After the last fault the VM runs again within this (design: 10 s), and everything else is cleaned up.
pub const RECOVERY_LIMIT: Duration = Duration::from_secs(10);
/// Time in which nothing may happen any more: a second copy that wakes late would be seen.
const AFTERMATH: Duration = Duration::from_secs(2);
/// A host daemon keeps so many agents started ahead.
const SPARE_AGENTS: usize = 1;
/// Boot to serving, on a loaded machine.
const BOOT_LIMIT: Duration = Duration::from_secs(90);
/// Size of the shared disk.
const DISK_BYTES: u64 = 64 << 20;

/// Follows a daemon's log from the moment of its making.
#[derive(Debug)]
pub struct LogWatch {
    file: File,
    pending: Vec<u8>,
}

impl LogWatch {
    /// From now on.
    pub fn new(fleet: &Fleet, machine: Machine) -> Result<Self> {
        let path = fleet.log_file(machine);
        let mut file = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
        file.seek(SeekFrom::End(0)).context("going to the end of a log")?;
        Ok(Self { file, pending: Vec::new() })
    }

    /// From the beginning: the moment may have come already.
    pub fn from_start(fleet: &Fleet, machine: Machine) -> Result<Self> {
        let mut watch = Self::new(fleet, machine)?;
        watch.file.seek(SeekFrom::Start(0)).context("going to the beginning of a log")?;
        Ok(watch)
    }

    /// Waits for a line that holds every word.
    pub fn wait(&mut self, words: &[&str]) -> Result<String> {
        let start = Instant::now();
        loop {
            self.file.read_to_end(&mut self.pending).context("reading a log")?;
            while let Some(end) = self.pending.iter().position(|b| *b == b'\n') {
                let line = String::from_utf8_lossy(&self.pending[..end]).into_owned();
                self.pending.drain(..=end);
                if words.iter().all(|word| line.contains(word)) {
                    return Ok(line);
                }
            }
            ensure!(start.elapsed() < MOMENT_LIMIT, "no log line with {words:?} within {MOMENT_LIMIT:?}");
            thread::sleep(LOOK);
        }
    }

    /// Waits for an event of the migration.
    pub fn event(&mut self, kind: &str) -> Result<String> {
        self.wait(&[&format!("\"kind\":\"{kind}\"")])
    }
}

/// A cut that only waits for the word: starting a program takes longer than a switchover does.
#[derive(Debug)]
pub struct Scissors {
    child: Child,
}

impl Scissors {
    /// Cuts now.
    pub fn cut(mut self) -> Result<()> {
        let rules =
            b"table ip fault { chain out { type filter hook output priority 0; oifname mig0 drop; }; }\n";
        let mut input = self.child.stdin.take().context("nft has no input")?;
        input.write_all(rules).context("writing to nft")?;
        drop(input);
        let status = self.child.wait().context("waiting for nft")?;
        ensure!(status.success(), "nft ended with {status}");
        Ok(())
    }
}

/// A fleet with one watched guest on host-a that writes a shared disk under default image locking.
#[derive(Debug)]
pub struct Trial {
    /// Manager and hosts.
    pub fleet: Fleet,
    /// The VM.
    pub guest: Guest,
    /// Sees what really runs.
    pub observer: Observer,
}

impl Trial {
    /// Everything up, the guest serving.
    pub fn start(name: &str, fill_mib: u32) -> Result<Self> {
        let image = GuestImage::locate()?;
        let fleet = Fleet::ready(&Programs::locate()?)?;
        let disk = fleet.net.run_folder().join("shared.raw");
        File::create(&disk).and_then(|f| f.set_len(DISK_BYTES)).context("making the shared disk")?;
        let load = GuestLoad { fill_mib, writes_disk: true, ..GuestLoad::default() };
        let guest = Guest { load, disk: Some(disk), ..Guest::new(name) };
        fleet.define(&guest, &image)?;
        fleet.start_vm(&guest, Machine::HostA)?;
        let observer = Observer::start(&fleet.net, guest.uuid)?;
        process::wait_for("the guest to serve", BOOT_LIMIT, || {
            Ok(client::secret(fleet.net.node(Machine::Client), client::guest_address()).ok())
        })?;
        observer.wait_running_on(&[Machine::HostA], RECOVERY_LIMIT)?;
        Ok(Self { fleet, guest, observer })
    }

    /// Asks for the migration to host-b.
    pub fn migrate(&self) -> Result<String> {
        self.fleet.migrate(&self.guest.name, Machine::HostB)
    }

    /// Makes ready to drop whatever `machine` sends on the migration network (silently, as a router would).
    pub fn scissors(&self, machine: Machine) -> Result<Scissors> {
        let mut command = self.fleet.net.node(machine).command("nft");
        let child = command.args(["-f", "-"]).stdin(Stdio::piped()).spawn().context("starting nft")?;
        Ok(Scissors { child })
    }

    /// Undoes [`Scissors::cut`].
    pub fn heal(&self, machine: Machine) -> Result<()> {
        process::run(self.fleet.net.node(machine).command("nft").args(["delete", "table", "ip", "fault"]))
            .map(|_| ())
    }

    /// The QEMUs on a host, by number.
    #[must_use]
    pub fn qemus(&self, host: Machine) -> Vec<i32> {
        self.programs_on(host, b"qemu-system-x86_64")
    }

    fn programs_on(&self, host: Machine, name: &[u8]) -> Vec<i32> {
        let is_it = |pid: &i32| {
            let line = process::command_line(*pid).unwrap_or_default();
            // The micro-probe that waits for its order is the agent's program, and carries no stream.
            let probes = line.split(|b| *b == 0).any(|argument| argument == b"--probe");
            process::is_alive(*pid)
                && !probes
                && line.split(|b| *b == 0).next().is_some_and(|program| program.ends_with(name))
        };
        self.fleet.net.node(host).cgroup().pids().into_iter().filter(is_it).collect()
    }

    /// Waits until exactly one copy runs, on one of these hosts; which.
    pub fn wait_one_running(&self, hosts: &[Machine]) -> Result<Machine> {
        let found = process::wait_for("one running copy", RECOVERY_LIMIT, || {
            let running = self.observer.running_on(Duration::from_millis(60));
            let host = hosts.iter().find(|h| running.len() == 1 && running[0] == h.name());
            Ok(host.copied())
        });
        found.with_context(|| self.describe())
    }

    /// Waits until the migration is over, one way or the other.
    pub fn wait_ended(&self, id: &str) -> Result<serde_json::Value> {
        let ends = ["completed", "failed", "terminated", "refused"];
        self.fleet.wait_migration(id, &ends, RECOVERY_LIMIT * 2).with_context(|| self.describe())
    }

    /// Waits until no agent, no second QEMU and no open migration is left.
    pub fn wait_tidy(&self, id: &str) -> Result<serde_json::Value> {
        let shown = self.wait_ended(id)?;
        process::wait_for("agents and spare QEMUs to be gone", RECOVERY_LIMIT, || {
            let busy = |host: &Machine| {
                self.programs_on(*host, b"outrider-agent").len().saturating_sub(SPARE_AGENTS)
            };
            let agents: usize = Machine::HOSTS.iter().map(busy).sum();
            let qemus: usize = Machine::HOSTS.iter().map(|h| self.qemus(*h).len()).sum();
            Ok((agents == 0 && qemus <= 1).then_some(()))
        })
        .with_context(|| self.describe())?;
        Ok(shown)
    }

    /// Looks on for a while, then judges: never two, never back, and running again in time.
    pub fn judge(self) -> Result<Report> {
        thread::sleep(AFTERMATH);
        let description = self.describe();
        let report = self.observer.stop();
        let verdict = &report.verdict;
        ensure!(verdict.copies == 1, "{} copies ran at once\n{description}", verdict.copies);
        ensure!(verdict.counter_monotonic, "guest state went back in time\n{description}");
        let gap_limit_ms = RECOVERY_LIMIT.as_secs_f64() * 1e3;
        ensure!(
            verdict.longest_gap_ms <= gap_limit_ms,
            "no copy ran for {} ms\n{description}",
            verdict.longest_gap_ms
        );
        let open_ms = verdict.open_gap_ms.unwrap_or(f64::INFINITY);
        ensure!(open_ms < 500.0, "no copy has run for {open_ms} ms\n{description}");
        Ok(report)
    }

    /// The whole story, for a failure.
    #[must_use]
    pub fn describe(&self) -> String {
        let mut text = format!("observer: {:#?}\n", self.observer.report().verdict);
        for machine in [Machine::Manager, Machine::HostA, Machine::HostB] {
            text.push_str(&format!("--- {}\n{}\n", machine.name(), self.fleet.log(machine)));
        }
        text
    }

    /// Moves the VM wherever it is not: after a fault this must work.
    pub fn migrate_again(&self, from: Machine) -> Result<()> {
        let to = if from == Machine::HostA { Machine::HostB } else { Machine::HostA };
        let id = self.fleet.migrate(&self.guest.name, to)?;
        let ends = ["completed", "failed", "terminated", "refused", "needs-operator"];
        let shown = self.fleet.wait_migration(&id, &ends, MOMENT_LIMIT)?;
        if shown["state"] != "completed" {
            bail!("the next migration {}: {}\n{}", shown["state"], shown["problem"], self.describe());
        }
        Ok(())
    }
}
