//! One cgroup per lab host, in every hierarchy that is mounted (v2, and v1's memory, cpu, cpuacct, freezer).

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::process;

/// Everything of the lab is below this folder of each hierarchy.
const TOP: &str = "outrider-lab";
/// The v1 hierarchies that matter for measuring and freezing.
const V1_CONTROLLERS: [&str; 4] = ["memory", "cpu", "cpuacct", "freezer"];
/// How long the kernel may take to let go of a killed process.
const EMPTY_LIMIT: Duration = Duration::from_secs(5);

/// The same path in every mounted hierarchy.
#[derive(Debug, Clone)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// The cgroup of one run of the lab.
    #[must_use]
    pub fn of_run(prefix: &str) -> Self {
        Self { path: Path::new(TOP).join(prefix) }
    }

    /// A cgroup below this one.
    #[must_use]
    pub fn child(&self, name: &str) -> Self {
        Self { path: self.path.join(name) }
    }

    /// The path below each hierarchy's mount point, as a daemon's configuration would name it.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the folders.
    pub fn create(&self) -> Result<()> {
        for root in roots() {
            delegate(&root, &self.path);
            let folder = root.join(&self.path);
            fs::create_dir_all(&folder).with_context(|| format!("making the cgroup {}", folder.display()))?;
        }
        Ok(())
    }

    /// The files into which a process writes its number to enter.
    pub fn entrances(&self) -> Vec<PathBuf> {
        self.folders().iter().map(|folder| folder.join("cgroup.procs")).collect()
    }

    /// Every process in here or below.
    #[must_use]
    pub fn pids(&self) -> BTreeSet<i32> {
        let mut pids = BTreeSet::new();
        for folder in self.tree() {
            let text = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
            pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
        }
        pids
    }

    /// Wakes what is frozen, so that a pending SIGKILL takes effect (v1; under v2 a frozen process dies at once).
    pub fn thaw(&self) {
        for folder in self.tree() {
            let state = folder.join("freezer.state");
            if state.exists() {
                // Gone in the meantime, or never frozen: either way there is nothing to thaw.
                let _absent = fs::write(state, "THAWED");
            }
        }
    }

    /// Removes the folders, deepest first.
    pub fn remove(&self) -> Result<()> {
        let mut left = Vec::new();
        let removed = process::wait_for("empty cgroups", EMPTY_LIMIT, || {
            for folder in self.tree() {
                // Busy until the last process is reaped; the loop looks again.
                let _busy = fs::remove_dir(folder);
            }
            left = self.tree();
            Ok(left.is_empty().then_some(()))
        });
        for root in roots() {
            // Shared with other runs: only goes when it is empty.
            let _shared = fs::remove_dir(root.join(TOP));
        }
        removed.with_context(|| format!("removing the cgroups {left:?}"))
    }

    /// Every existing folder in here and below, deepest first.
    pub fn tree(&self) -> Vec<PathBuf> {
        let mut found = self.folders();
        let mut next = 0;
        while next < found.len() {
            let entries = fs::read_dir(&found[next]).into_iter().flatten().flatten();
            let below: Vec<PathBuf> =
                entries.map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
            found.extend(below);
            next += 1;
        }
        found.reverse();
        found
    }

    fn folders(&self) -> Vec<PathBuf> {
        let folders = roots().into_iter().map(|root| root.join(&self.path));
        folders.filter(|folder| folder.is_dir()).collect()
    }
}

/// The prefixes of all runs that left a cgroup.
#[must_use]
pub fn prefixes() -> BTreeSet<String> {
    let tops = roots().into_iter().map(|root| root.join(TOP));
    tops.filter_map(|top| fs::read_dir(top).ok())
        .flat_map(|entries| entries.flatten())
        .filter(|entry| entry.path().is_dir())
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}

/// Mount points of the hierarchies: each one once, v1 first.
fn roots() -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mut roots: Vec<PathBuf> = mounts.lines().filter_map(root).collect();
    roots.sort();
    roots.dedup();
    roots
}

fn root(mount: &str) -> Option<PathBuf> {
    let fields: Vec<&str> = mount.split(' ').collect();
    let (&place, &kind, &options) = (fields.get(1)?, fields.get(2)?, fields.get(3)?);
    let ours = match kind {
        "cgroup2" => true,
        "cgroup" => options.split(',').any(|option| V1_CONTROLLERS.contains(&option)),
        _ => false,
    };
    ours.then(|| PathBuf::from(place))
}

/// Under v2 a folder has a controller only if every folder above passes it on.
fn delegate(root: &Path, path: &Path) {
    if !root.join("cgroup.subtree_control").exists() {
        return;
    }
    let above = path.ancestors().skip(1).collect::<Vec<_>>();
    for folder in above.into_iter().rev().map(|below| root.join(below)) {
        for controller in ["+memory", "+cpu", "+pids"] {
            // Absent in a hybrid layout, where v1 has it: then there is nothing to pass on.
            let made = fs::create_dir_all(&folder);
            let _absent = made.and_then(|()| fs::write(folder.join("cgroup.subtree_control"), controller));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_hierarchies_that_matter_are_used() {
        let check = |line: &str, expect: Option<&str>| assert_eq!(root(line), expect.map(PathBuf::from));
        check("cgroup2 /sys/fs/cgroup/unified cgroup2 rw,relatime 0 0", Some("/sys/fs/cgroup/unified"));
        check(
            "cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,cpu,cpuacct 0 0",
            Some("/sys/fs/cgroup/cpu,cpuacct"),
        );
        check("cgroup /sys/fs/cgroup/pids cgroup rw,pids 0 0", None);
        check("tmpfs /sys/fs/cgroup tmpfs rw 0 0", None);
    }
}
