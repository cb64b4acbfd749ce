//! Measured load: of the cgroup subtree in which this host lives, or of the machine when that is the root.
//!
//! Memory and limits are read when asked; CPU and link are rates over the last sampling windows, so that an answer costs
//! no waiting.

mod link;

use crate::cgroup::Group;
use crate::daemon::lock;
use crate::vms::Vms;
use crate::vms::record::Phase;
use link::LinkMeter;
use std::collections::VecDeque;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use types::host::Load;

/// How often CPU and link are looked at.
const WINDOW: Duration = Duration::from_millis(500);
/// The first one.
const FIRST_WINDOW: Duration = Duration::from_millis(20);
/// Windows over which rates are taken: fewer are noise, more are stale at an admission.
const WINDOWS: usize = 4;
/// Version 1 writes "no limit" as a number near 2^63.
const NO_LIMIT_BYTES: u64 = 1 << 60;

/// Measures.
#[derive(Debug, Clone)]
pub struct LoadMeter {
    scope: Scope,
    cpu_cores_used: Arc<Mutex<f64>>,
    link: Option<LinkMeter>,
}

#[derive(Debug, Clone)]
enum Scope {
    Machine,
    Group(Group),
}

impl LoadMeter {
    /// For the group that holds the whole host; the root means the machine.
    #[must_use]
    pub fn new(host: Group) -> Self {
        let measurable = host.v2().or_else(|| host.v1("memory")).is_some_and(|f| f.exists());
        let scope = if host.path().is_empty() || !measurable { Scope::Machine } else { Scope::Group(host) };
        Self { scope, cpu_cores_used: Arc::default(), link: None }
    }

    /// Measures also the interface that has this address; `mbit_per_s` is what it carries, where the kernel does not
    /// know that.
    #[must_use]
    pub fn with_link(self, address: IpAddr, mbit_per_s: Option<u32>) -> Self {
        Self { link: Some(LinkMeter::new(address, mbit_per_s)), ..self }
    }

    /// Samples CPU and link use until dropped.
    pub async fn sample(&self) {
        let mut seen = VecDeque::from([(Instant::now(), self.cpu_seconds())]);
        if let Some(link) = &self.link {
            // Two looks make a rate: the first decision must not find that there is none.
            link.look().await;
            tokio::time::sleep(FIRST_WINDOW).await;
        }
        loop {
            if let Some(link) = &self.link {
                link.look().await;
            }
            tokio::time::sleep(WINDOW).await;
            let now = (Instant::now(), self.cpu_seconds());
            let before = seen.front().copied().unwrap_or(now);
            *lock(&self.cpu_cores_used) =
                (now.1 - before.1).max(0.0) / (now.0 - before.0).as_secs_f64().max(0.001);
            seen.push_back(now);
            if seen.len() > WINDOWS {
                seen.pop_front();
            }
        }
    }

    /// The load now, with the guests of this host.
    #[must_use]
    pub fn load_with(&self, vms: &Vms) -> Load {
        let all = vms.all();
        let runs = all.iter().filter(|i| i.record().phase == Phase::Running && i.process().is_alive());
        let running = runs.map(|instance| instance.vm()).collect();
        Load { running: Some(running), ..self.load(u32::try_from(all.len()).unwrap_or(u32::MAX)) }
    }

    /// The load now.
    #[must_use]
    pub fn load(&self, vms: u32) -> Load {
        let machine_available = meminfo("MemAvailable:");
        let machine_total = meminfo("MemTotal:");
        let (name, used, limit, pressure) = match &self.scope {
            Scope::Machine => (
                "machine".to_owned(),
                machine_total.saturating_sub(machine_available),
                None,
                Some(PathBuf::from("/proc/pressure")),
            ),
            Scope::Group(group) => {
                (group.path().to_owned(), memory_used(group), memory_limit(group), group.v2())
            }
        };
        let available = match limit {
            Some(limit) => limit.saturating_sub(used).min(machine_available),
            None => machine_available,
        };
        // Where version 2 is not mounted, the machine's pressure is more than that of any group in it.
        let pressure = pressure.filter(|f| f.join("cpu.pressure").exists() || f.join("cpu").exists());
        let pressure = pressure.unwrap_or_else(|| PathBuf::from("/proc/pressure"));
        Load {
            scope: name,
            memory_used_bytes: used,
            memory_available_bytes: available,
            cpu_cores_used: *lock(&self.cpu_cores_used),
            cpu_cores: self.cpu_cores(),
            cpu_pressure_percent: psi(&pressure, "cpu", "some"),
            memory_pressure_percent: psi(&pressure, "memory", "some"),
            memory_full_pressure_percent: psi(&pressure, "memory", "full"),
            io_pressure_percent: psi(&pressure, "io", "some"),
            link: self.link.as_ref().and_then(LinkMeter::used),
            vms,
            running: None,
        }
    }

    fn cpu_seconds(&self) -> f64 {
        match &self.scope {
            Scope::Machine => machine_cpu_seconds(),
            Scope::Group(group) => group_cpu_seconds(group),
        }
    }

    fn cpu_cores(&self) -> f64 {
        #[allow(clippy::cast_precision_loss)]
        let machine = std::thread::available_parallelism().map_or(1.0, |n| n.get() as f64);
        match &self.scope {
            Scope::Machine => machine,
            Scope::Group(group) => cpu_limit(group).map_or(machine, |limit| limit.min(machine)),
        }
    }
}

fn memory_used(group: &Group) -> u64 {
    number(group.v1("memory"), "memory.usage_in_bytes")
        .or_else(|| number(group.v2(), "memory.current"))
        .unwrap_or(0)
}

fn memory_limit(group: &Group) -> Option<u64> {
    number(group.v1("memory"), "memory.limit_in_bytes")
        .filter(|limit| *limit < NO_LIMIT_BYTES)
        .or_else(|| number(group.v2(), "memory.max"))
}

fn cpu_limit(group: &Group) -> Option<f64> {
    if let Some(text) = group.v2().and_then(|f| fs::read_to_string(f.join("cpu.max")).ok()) {
        let (quota, period) = text.trim().split_once(' ')?;
        return Some(quota.parse::<f64>().ok()? / period.parse::<f64>().ok()?);
    }
    let folder = group.v1("cpu");
    let quota = read(folder.as_deref()?, "cpu.cfs_quota_us").parse::<f64>().ok()?;
    let period = read(folder.as_deref()?, "cpu.cfs_period_us").parse::<f64>().ok()?;
    (quota > 0.0).then(|| quota / period)
}

#[allow(clippy::cast_precision_loss)]
fn group_cpu_seconds(group: &Group) -> f64 {
    if let Some(nanoseconds) = number(group.v1("cpuacct"), "cpuacct.usage") {
        return nanoseconds as f64 / 1e9;
    }
    let stat = group.v2().map(|f| read(&f, "cpu.stat")).unwrap_or_default();
    let microseconds = stat.lines().find_map(|l| l.strip_prefix("usage_usec ")?.parse::<u64>().ok());
    microseconds.unwrap_or(0) as f64 / 1e6
}

#[allow(clippy::cast_precision_loss)]
fn machine_cpu_seconds() -> f64 {
    let stat = read(Path::new("/proc"), "stat");
    let ticks: Vec<u64> = stat
        .lines()
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .skip(1)
        .filter_map(|w| w.parse().ok())
        .collect();
    // user nice system idle iowait irq softirq steal: everything but idle and iowait.
    let busy: u64 =
        ticks.iter().take(8).enumerate().filter(|(i, _)| !matches!(i, 3 | 4)).map(|(_, t)| t).sum();
    busy as f64 / rustix::param::clock_ticks_per_second() as f64
}

fn meminfo(key: &str) -> u64 {
    let text = read(Path::new("/proc"), "meminfo");
    let kib = text
        .lines()
        .find_map(|l| l.strip_prefix(key)?.split_whitespace().next()?.parse::<u64>().ok())
        .unwrap_or(0);
    kib.saturating_mul(1024)
}

/// The share of the last ten seconds in which `some` task, or the `full` group, waited for it.
fn psi(folder: &Path, what: &str, kind: &str) -> Option<f64> {
    let text = fs::read_to_string(folder.join(format!("{what}.pressure")))
        .or_else(|_| fs::read_to_string(folder.join(what)))
        .ok()?;
    let line = text.lines().find(|l| l.split(' ').next() == Some(kind))?;
    line.split_whitespace().find_map(|w| w.strip_prefix("avg10=")?.parse().ok())
}

fn number(folder: Option<PathBuf>, file: &str) -> Option<u64> {
    read(&folder?, file).parse().ok()
}

fn read(folder: &Path, file: &str) -> String {
    fs::read_to_string(folder.join(file)).unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::Hierarchies;

    #[test]
    fn the_machine_has_memory_and_cpus() {
        let meter = LoadMeter::new(Hierarchies::detect().group(""));
        let load = meter.load(3);
        assert_eq!((load.scope.as_str(), load.vms), ("machine", 3));
        assert!(load.memory_available_bytes > 0 && load.memory_used_bytes > 0 && load.cpu_cores >= 1.0);
        assert!(meter.cpu_seconds() > 0.0);
        let pressures =
            [load.cpu_pressure_percent, load.memory_pressure_percent, load.memory_full_pressure_percent];
        assert_eq!(
            pressures.iter().all(Option::is_some),
            Path::new("/proc/pressure/cpu").exists(),
            "{load:?}"
        );
    }

    #[test]
    fn pressure_is_read_by_kind_and_what_is_not_there_is_missing() {
        let folder = tempfile::tempdir().expect("a folder");
        let text = "some avg10=1.50 avg60=2.00 avg300=3.00 total=9\nfull avg10=0.25 avg60=0.00 avg300=0.00 total=1\n";
        fs::write(folder.path().join("memory.pressure"), text).expect("a file");
        fs::write(folder.path().join("io.pressure"), "some avg10=x\n").expect("a file");
        let read = |what, kind| psi(folder.path(), what, kind);
        assert_eq!((read("memory", "some"), read("memory", "full")), (Some(1.5), Some(0.25)));
        assert_eq!((read("io", "some"), read("io", "full"), read("cpu", "some")), (None, None, None));
    }

    #[tokio::test]
    async fn the_use_of_a_cpu_shows_within_the_windows() {
        let meter = LoadMeter::new(Hierarchies::detect().group(""));
        let (sampler, ended) = (meter.clone(), Arc::new(std::sync::atomic::AtomicBool::new(false)));
        let stop = ended.clone();
        let busy = std::thread::spawn(move || {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                std::hint::black_box(0);
            }
        });
        let sampling = tokio::spawn(async move { sampler.sample().await });
        let since = Instant::now();
        while meter.load(0).cpu_cores_used < 0.5 {
            assert!(since.elapsed() < Duration::from_secs(20), "{:?}", meter.load(0));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        sampling.abort();
        ended.store(true, std::sync::atomic::Ordering::Relaxed);
        busy.join().expect("it only counts");
    }

    #[test]
    fn a_group_is_measured_and_its_limit_counts() {
        let group = Hierarchies::detect().group(&format!("outrider-test-load-{}", std::process::id()));
        if group.create().is_err() || group.v2().or_else(|| group.v1("memory")).is_none() {
            eprintln!("SKIPPED: no cgroup can be made here");
            return;
        }
        if let Some(folder) = group.v1("memory") {
            fs::write(folder.join("memory.limit_in_bytes"), "67108864").expect("a limit can be set");
            let load = LoadMeter::new(group.clone()).load(0);
            assert_eq!(load.scope, group.path());
            assert!(load.memory_available_bytes <= 64 << 20, "{load:?}");
        }
        group.remove().expect("it is empty");
    }
}
