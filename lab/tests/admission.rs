//! Admission by what is measured: a target whose cgroup is loaded refuses a VM, the load stays where it is, and the VM
//! that was not moved keeps its work rate. Without the load the same request goes through.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use outrider_lab::fleet::{Fleet, Guest, Programs};
use outrider_lab::guest::GuestImage;
use outrider_lab::net::Machine::{HostA, HostB};
use outrider_lab::observer::Observer;
use outrider_lab::{process, require};
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::Value;

/// Of each 100 ms of one CPU, for everything of the loaded host.
const CPU_QUOTA_US: u64 = 40_000;
const MEMORY_LIMIT_MIB: u64 = 640;
/// With this the guest's 256 MiB do not fit under the limit.
const HOG_MIB: u64 = 420;
/// A load is measured over two seconds, and a debug build on a busy machine answers slowly.
const SEEN_LIMIT: Duration = Duration::from_secs(60);
/// One window of the comparison, and how many pairs of them.
const WINDOW: Duration = Duration::from_millis(1_500);
const PAIRS: usize = 12;
/// What the VM must keep of its work rate.
const KEPT_MIN: f64 = 0.95;

fn run(test: impl FnOnce() -> Result<()>) {
    if require::skip(require::missing()) {
        return;
    }
    test().unwrap_or_else(|error| panic!("{error:?}"));
}

/// Processes that load the cgroup of a host; ended when dropped.
struct Hog {
    child: Child,
}

impl Hog {
    /// In a cgroup of its own below the host's.
    fn start(fleet: &Fleet, script: &str) -> Result<Self> {
        let group = fleet.net.node(HostB).cgroup().child("hog");
        group.create()?;
        let enter: String =
            group.entrances().iter().map(|file| format!("echo $$ >{} || exit 1; ", file.display())).collect();
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "sh", "-c"]).arg(format!("{enter}{script}"));
        command.process_group(0).stdin(Stdio::null()).stdout(Stdio::null());
        Ok(Self { child: command.spawn().context("starting a load")? })
    }

    fn signal(&self, signal: Signal) {
        let group = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        // One that has ended already needs no signal.
        let _gone = group.map(|group| kill_process_group(group, signal));
    }
}

impl Drop for Hog {
    fn drop(&mut self) {
        self.signal(Signal::CONT);
        self.signal(Signal::KILL);
        let _reaped = self.child.wait();
    }
}

/// Limits on everything of a host, in whichever hierarchy has the controller.
fn limit(fleet: &Fleet, files: &[(&str, String)]) -> Result<()> {
    let path = fleet.net.node(HostB).cgroup();
    let (mut set, tree) = (0, path.tree());
    for (file, value) in files {
        let own = tree.iter().filter(|folder| folder.ends_with(path.path()));
        for folder in own.filter(|folder| folder.join(file).exists()) {
            fs::write(folder.join(file), value).with_context(|| format!("setting {file}"))?;
            set += 1;
        }
    }
    ensure!(set > 0, "none of {files:?} is there");
    Ok(())
}

fn limit_cpu(fleet: &Fleet, quota_us: Option<u64>) -> Result<()> {
    let v1 = quota_us.map_or_else(|| "-1".to_owned(), |quota| quota.to_string());
    let v2 = quota_us.map_or_else(|| "max 100000".to_owned(), |quota| format!("{quota} 100000"));
    limit(fleet, &[("cpu.cfs_quota_us", v1), ("cpu.max", v2)])
}

fn limit_memory(fleet: &Fleet, mib: Option<u64>) -> Result<()> {
    let v1 = mib.map_or_else(|| "-1".to_owned(), |mib| (mib << 20).to_string());
    let v2 = mib.map_or_else(|| "max".to_owned(), |mib| (mib << 20).to_string());
    limit(fleet, &[("memory.limit_in_bytes", v1), ("memory.max", v2)])
}

/// What each gate says of moving the VM to the loaded host.
fn explained(fleet: &Fleet, vm: &str) -> Result<Value> {
    let arguments = ["migrate", vm, "--to", HostB.name(), "--dry-run", "--output", "json"];
    fleet.outrider(&arguments)?.json()
}

fn refusal(explained: &Value) -> Option<&Value> {
    explained["gates"].as_array()?.iter().find(|gate| gate["outcome"] == "refused")
}

/// The dry run refuses by this within the time that a measurement needs, and so does the request itself.
fn refused(fleet: &Fleet, vm: &str, why: &str) -> Result<()> {
    let began = Instant::now();
    let detail = process::wait_for(&format!("admission to refuse: {why}"), SEEN_LIMIT, || {
        let explained = explained(fleet, vm)?;
        let gate = refusal(&explained).filter(|gate| gate["code"] == "insufficient-capacity").cloned();
        Ok(gate.and_then(|g| g["detail"].as_str().filter(|d| d.contains(why)).map(str::to_owned)))
    })?;
    eprintln!("refused after {:.1} s: {detail}", began.elapsed().as_secs_f64());
    let shown = fleet.wait_migration(&fleet.migrate(vm, HostB)?, &["refused"], SEEN_LIMIT)?;
    ensure!(shown["problem"]["code"] == "insufficient-capacity", "{shown}");
    Ok(())
}

/// The guest's work per second over a window.
fn rate(observer: &Observer, window: Duration) -> Result<f64> {
    let counter = || {
        let runs = observer.report().verdict.runs;
        runs.iter()
            .filter_map(|copy| copy.counters)
            .map(|(_, last)| last)
            .max()
            .context("the guest counts nothing")
    };
    let (began, first) = (Instant::now(), counter()?);
    thread::sleep(window);
    Ok((counter()? - first) as f64 / began.elapsed().as_secs_f64())
}

fn median(mut rates: Vec<f64>) -> f64 {
    rates.sort_by(f64::total_cmp);
    rates[rates.len() / 2]
}

#[test]
fn a_loaded_target_refuses_and_the_vm_keeps_its_work_rate() {
    run(|| {
        let fleet = Fleet::ready(&Programs::locate()?)?;
        let (guest, image) = (Guest::new("kept"), GuestImage::locate()?);
        fleet.define(&guest, &image)?;
        fleet.start_vm(&guest, HostA)?;
        let observer = Observer::start(&fleet.net, guest.uuid)?;
        observer.wait_running_on(&[HostA], SEEN_LIMIT)?;
        process::wait_for("the calm target to be admitted", SEEN_LIMIT, || {
            Ok((explained(&fleet, &guest.name)?["allowed"] == true).then_some(()))
        })?;

        limit_cpu(&fleet, Some(CPU_QUOTA_US))?;
        let hog = Hog::start(&fleet, "while :; do :; done")?;
        refused(&fleet, &guest.name, "CPU")?;
        // Interleaved, so that whatever else the machine does falls on both.
        let (mut with, mut without) = (Vec::new(), Vec::new());
        for _ in 0..PAIRS {
            hog.signal(Signal::CONT);
            with.push(rate(&observer, WINDOW)?);
            hog.signal(Signal::STOP);
            without.push(rate(&observer, WINDOW)?);
        }
        let (with, without) = (median(with), median(without));
        let kept = with / without;
        eprintln!(
            "work per second, medians of {PAIRS}: {with:.0} beside the load, {without:.0} without: {:.1} %",
            kept * 100.0
        );
        ensure!(kept >= KEPT_MIN, "the VM kept {:.1} % of its work rate", kept * 100.0);
        drop(hog);
        limit_cpu(&fleet, None)?;

        limit_memory(&fleet, Some(MEMORY_LIMIT_MIB))?;
        // `tail` keeps a line that does not end in memory.
        let hog = Hog::start(&fleet, &format!("(head -c {HOG_MIB}M /dev/zero; sleep 1000) | tail"))?;
        refused(&fleet, &guest.name, "by measurement")?;
        drop(hog);
        limit_memory(&fleet, None)?;

        // Without the load it goes.
        process::wait_for("the calm target to be admitted again", SEEN_LIMIT, || {
            let explained = explained(&fleet, &guest.name)?;
            Ok((explained["allowed"] == true).then_some(()))
        })?;
        let ends = ["completed", "failed", "refused", "terminated"];
        let shown = fleet.wait_migration(&fleet.migrate(&guest.name, HostB)?, &ends, SEEN_LIMIT)?;
        ensure!(shown["state"] == "completed", "{shown}");
        eprintln!("permit decision {} ms", shown["permit_decision_ms"]);
        observer.wait_running_on(&[HostB], SEEN_LIMIT)?;
        let report = observer.stop();
        ensure!(report.verdict.copies == 1, "{} copies ran at once", report.verdict.copies);
        Ok(())
    });
}
