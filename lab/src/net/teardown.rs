//! Removing everything that a run made, found by its prefix alone, and saying what is still there.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, Once, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::{NAMESPACES, RUN_FOLDER, ip, namespace_inode, run_folder};
use crate::cgroup::{self, Cgroup};
use crate::process;

/// How long killed processes may take to go.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// Prefixes that a signal must remove.
static LIVE: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
static SIGNALS: Once = Once::new();
/// A signal is being carried out: what fails from now on fails because of it.
static ENDING: AtomicBool = AtomicBool::new(false);

/// Whether a signal is removing everything at this moment.
#[must_use]
pub fn is_ending() -> bool {
    ENDING.load(Ordering::Acquire)
}

/// Lets the signal end the process, when there is one; returns at once otherwise.
pub fn yield_to_signal() {
    while is_ending() {
        thread::park_timeout(Duration::from_millis(100));
    }
}

/// Removes everything of this run on SIGINT, SIGTERM and SIGHUP, then ends the process as the signal would have.
pub fn on_signal_destroy(prefix: &str) -> Result<()> {
    ensure!(live().insert(prefix.to_owned()), "a net called {prefix} is up already in this process");
    let mut outcome = Ok(());
    SIGNALS.call_once(|| outcome = install());
    outcome
}

fn install() -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("catching signals")?;
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            if let Some(signal) = signals.forever().next() {
                ENDING.store(true, Ordering::Release);
                eprintln!("lab: signal {signal}: removing everything this run made");
                let prefixes: Vec<String> = live().iter().cloned().collect();
                for prefix in prefixes {
                    if let Err(error) = destroy(&prefix) {
                        eprintln!("lab: {error:#}");
                    }
                }
                std::process::exit(128 + signal);
            }
        })
        .context("starting the signal thread")?;
    Ok(())
}

fn live() -> std::sync::MutexGuard<'static, BTreeSet<String>> {
    LIVE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Kills the run's processes and removes its namespaces, cgroups and files.
pub fn destroy(prefix: &str) -> Result<()> {
    let cgroup = Cgroup::of_run(prefix);
    process::wait_for("the run's processes to end", KILL_LIMIT, || {
        let pids = pids(prefix);
        for pid in &pids {
            process::kill(*pid);
        }
        cgroup.thaw();
        Ok(pids.is_empty().then_some(()))
    })?;
    for namespace in namespaces(prefix) {
        ip(None, &format!("netns del {namespace}\n"))?;
    }
    cgroup.remove()?;
    let folder = run_folder(prefix);
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("removing {}", folder.display()))?;
    }
    // Shared with other runs: only goes when it is empty.
    let _shared = fs::remove_dir(RUN_FOLDER);
    live().remove(prefix);
    Ok(())
}

/// What still exists of a run, in words: processes, namespaces, cgroups, sockets and files.
#[must_use]
pub fn leftovers(prefix: &str) -> Vec<String> {
    let mut left = Vec::new();
    for pid in pids(prefix) {
        let line = process::command_line(pid).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        left.push(format!("process {pid}: {}", line.chars().take(200).collect::<String>()));
    }
    left.extend(namespaces(prefix).iter().map(|name| format!("namespace {name}")));
    let links = fs::read_dir("/sys/class/net").into_iter().flatten().flatten();
    let links = links.filter_map(|entry| entry.file_name().into_string().ok());
    left.extend(links.filter(|name| name.starts_with(prefix)).map(|name| format!("link {name}")));
    left.extend(Cgroup::of_run(prefix).tree().iter().map(|folder| format!("cgroup {}", folder.display())));
    left.extend(files(&run_folder(prefix)).iter().map(|file| format!("file {}", file.display())));
    left
}

/// Runs whose owner (the number in the prefix) is dead.
#[must_use]
pub fn stale_prefixes() -> BTreeSet<String> {
    let names = fs::read_dir(NAMESPACES).into_iter().flatten().flatten();
    let namespaces =
        names.filter_map(|entry| Some(entry.file_name().to_str()?.split_once('-')?.0.to_owned()));
    let folders = fs::read_dir(RUN_FOLDER).into_iter().flatten().flatten();
    let folders = folders.filter_map(|entry| entry.file_name().into_string().ok());
    namespaces
        .chain(folders)
        .chain(cgroup::prefixes())
        .filter(|prefix| owner(prefix).is_some_and(|pid| !process::is_alive(pid)))
        .collect()
}

/// The owner's pid in a prefix of ours: `or` or another two letters, then digits and nothing else.
fn owner(prefix: &str) -> Option<i32> {
    let digits = prefix.strip_prefix("or").or_else(|| prefix.strip_prefix("lb"))?;
    digits.chars().all(|c| c.is_ascii_digit()).then(|| digits.parse().ok())?
}

/// Processes in the run's cgroups or namespaces, this one aside.
fn pids(prefix: &str) -> BTreeSet<i32> {
    let inodes: BTreeSet<u64> = namespaces(prefix)
        .iter()
        .filter_map(|name| namespace_inode(&Path::new(NAMESPACES).join(name)).ok())
        .collect();
    let mut pids = Cgroup::of_run(prefix).pids();
    let inside = |pid: &i32| {
        let link = PathBuf::from(format!("/proc/{pid}/ns/net"));
        namespace_inode(&link).is_ok_and(|inode| inodes.contains(&inode))
    };
    pids.extend(process::all_pids().into_iter().filter(inside));
    let own = i32::try_from(std::process::id()).unwrap_or(0);
    pids.into_iter().filter(|pid| *pid != own && process::is_alive(*pid)).collect()
}

fn namespaces(prefix: &str) -> Vec<String> {
    let start = format!("{prefix}-");
    let names = fs::read_dir(NAMESPACES).into_iter().flatten().flatten();
    let names = names.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| name.starts_with(&start)).collect()
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() && !path.is_symlink() {
            found.extend(files(&path));
        } else {
            found.push(path);
        }
    }
    if found.is_empty() && folder.exists() {
        found.push(folder.to_owned());
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_prefixes_of_the_lab_have_owners() {
        assert_eq!(owner("or123"), Some(123));
        assert_eq!(owner("lb77"), Some(77));
        assert_eq!(owner("or"), None);
        assert_eq!(owner("orchard"), None);
        assert_eq!(owner("docker0"), None);
    }
}
