//! Control groups: where QEMUs and agents live, how load is measured, what the freezer holds.
//!
//! Version 2 may be mounted alone, or beside version 1 (then usually under `unified`, without controllers but
//! with the freezer, which is part of its core). A [`Group`] is one path in every hierarchy at hand.

use crate::error::HostError;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Version 1 controllers that matter here.
const V1_CONTROLLERS: [&str; 4] = ["freezer", "memory", "cpu", "cpuacct"];

/// The hierarchies that are mounted.
#[derive(Debug, Clone, Default)]
pub struct Hierarchies {
    v2: Option<PathBuf>,
    v1: BTreeMap<&'static str, PathBuf>,
}

/// One group, in every hierarchy.
#[derive(Debug, Clone)]
pub struct Group {
    hierarchies: Hierarchies,
    path: String,
}

impl Hierarchies {
    /// What this process sees mounted.
    #[must_use]
    pub fn detect() -> Self {
        Self::parse(&fs::read_to_string("/proc/self/mounts").unwrap_or_default())
    }

    fn parse(mounts: &str) -> Self {
        let mut found = Self::default();
        for line in mounts.lines() {
            let mut words = line.split(' ').skip(1);
            let (Some(at), Some(kind), Some(options)) = (words.next(), words.next(), words.next()) else {
                continue;
            };
            match kind {
                "cgroup2" => found.v2 = found.v2.or_else(|| Some(at.into())),
                "cgroup" => {
                    for controller in V1_CONTROLLERS {
                        if options.split(',').any(|o| o == controller) {
                            found.v1.entry(controller).or_insert_with(|| at.into());
                        }
                    }
                }
                _ => {}
            }
        }
        found
    }

    /// The group at `path` (relative, without leading slash; empty is the root).
    #[must_use]
    pub fn group(&self, path: &str) -> Group {
        Group { hierarchies: self.clone(), path: path.to_owned() }
    }
}

impl Group {
    /// Its path, as configured.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.path
    }

    /// The group below it with this name.
    #[must_use]
    pub fn child(&self, name: &str) -> Self {
        let path = if self.path.is_empty() { name.to_owned() } else { format!("{}/{name}", self.path) };
        Self { hierarchies: self.hierarchies.clone(), path }
    }

    /// The group above it.
    #[must_use]
    pub fn parent(&self) -> Self {
        let path = self.path.rsplit_once('/').map_or("", |(parent, _)| parent);
        Self { hierarchies: self.hierarchies.clone(), path: path.to_owned() }
    }

    /// Its folder in version 2, if that is mounted.
    #[must_use]
    pub fn v2(&self) -> Option<PathBuf> {
        self.hierarchies.v2.as_ref().map(|root| root.join(&self.path))
    }

    /// Its folder in version 1 under `controller`, if that is mounted.
    #[must_use]
    pub fn v1(&self, controller: &str) -> Option<PathBuf> {
        self.hierarchies.v1.get(controller).map(|root| root.join(&self.path))
    }

    fn folders(&self) -> Vec<PathBuf> {
        let mut all: Vec<_> = self.v2().into_iter().collect();
        for controller in V1_CONTROLLERS {
            if let Some(folder) = self.v1(controller)
                && !all.contains(&folder)
            {
                all.push(folder);
            }
        }
        all
    }

    /// Makes it everywhere.
    ///
    /// # Errors
    /// The folder that could not be made.
    pub fn create(&self) -> Result<(), HostError> {
        for folder in self.folders() {
            fs::create_dir_all(&folder).map_err(|e| HostError::file("cannot make cgroup", &folder, e))?;
        }
        Ok(())
    }

    /// The groups below it, in any hierarchy.
    #[must_use]
    pub fn children(&self) -> Vec<Self> {
        let mut names: Vec<_> = self
            .folders()
            .iter()
            .filter_map(|folder| fs::read_dir(folder).ok())
            .flat_map(|all| all.flatten().filter(|e| e.path().is_dir()).collect::<Vec<_>>())
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        names.sort();
        names.dedup();
        names.iter().map(|name| self.child(name)).collect()
    }

    /// The files into which a process writes its id to join.
    #[must_use]
    pub fn procs_files(&self) -> Vec<PathBuf> {
        self.folders().into_iter().map(|folder| folder.join("cgroup.procs")).collect()
    }

    /// Processes in it, in any hierarchy.
    #[must_use]
    pub fn processes(&self) -> Vec<u32> {
        let mut all: Vec<u32> = self
            .procs_files()
            .iter()
            .filter_map(|file| fs::read_to_string(file).ok())
            .flat_map(|text| text.lines().filter_map(|l| l.parse().ok()).collect::<Vec<_>>())
            .collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Whether the kernel ended a process in it for want of memory.
    #[must_use]
    pub fn ran_out_of_memory(&self) -> bool {
        let v2 = self.v2().map(|folder| folder.join("memory.events"));
        let v1 = self.v1("memory").map(|folder| folder.join("memory.oom_control"));
        let told = v2.into_iter().chain(v1).filter_map(|file| fs::read_to_string(file).ok());
        told.flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>())
            .any(|line| line.strip_prefix("oom_kill ").is_some_and(|count| count.trim() != "0"))
    }

    /// Removes it everywhere, if it is empty. A group that is gone already is fine.
    ///
    /// # Errors
    /// The folder that is still in use.
    pub fn remove(&self) -> Result<(), HostError> {
        for folder in self.folders() {
            remove_folder(&folder)?;
        }
        Ok(())
    }
}

fn remove_folder(folder: &Path) -> Result<(), HostError> {
    match fs::remove_dir(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(HostError::file("cannot remove cgroup", folder, e))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_layouts_are_understood() {
        let hybrid = Hierarchies::parse(
            "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
             cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,cpu,cpuacct 0 0\n\
             cgroup /sys/fs/cgroup/freezer cgroup rw,freezer 0 0\n\
             cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n",
        );
        let group = hybrid.group("a/b");
        assert_eq!(group.v2(), Some("/sys/fs/cgroup/unified/a/b".into()));
        assert_eq!(group.v1("cpuacct"), Some("/sys/fs/cgroup/cpu,cpuacct/a/b".into()));
        assert_eq!(group.v1("memory"), None);
        assert_eq!(group.folders().len(), 3, "cpu and cpuacct share one");
        let alone = Hierarchies::parse("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n").group("a");
        assert_eq!(alone.parent().path(), "");
        assert_eq!(alone.folders(), [PathBuf::from("/sys/fs/cgroup/a")]);
        assert!(Hierarchies::parse("").group("a").folders().is_empty());
    }
}
