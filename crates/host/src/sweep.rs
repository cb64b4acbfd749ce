//! Ending what nobody holds: the processes of a group, then the group and the folder that were theirs (I12).

use crate::cgroup::Group;
use crate::process::{Process, ProcessId};
use rustix::process::Signal;
use std::path::Path;
use std::time::Duration;

/// A process that was killed is gone within this, or hangs in the kernel.
const KILL_TIMEOUT: Duration = Duration::from_secs(3);
/// A cgroup can be removed a moment after its last process has ended.
const REMOVE_TRIES: u32 = 50;
const REMOVE_PAUSE: Duration = Duration::from_millis(20);

/// Ends every process of a group by force; gives those that live on.
pub async fn end_all(group: &Group) -> Vec<u32> {
    for pid in group.processes() {
        let held = ProcessId::of(pid).and_then(|id| Process::adopt(&id));
        // Only what is still in the group after it was held: the pid may have been reused in between.
        if let Ok(Some(process)) = held
            && group.processes().contains(&pid)
        {
            end_process(&process).await;
        }
    }
    group.processes()
}

/// Ends one process by force; says so when it lives on.
pub async fn end_process(process: &Process) {
    let pid = process.id().pid;
    if let Err(error) = process.signal(Signal::KILL) {
        tracing::error!(%error, pid, "cannot end a process");
    }
    if tokio::time::timeout(KILL_TIMEOUT, process.exited()).await.is_err() {
        tracing::error!(pid, "a process lives on after it was killed");
    }
}

/// Removes an empty group, for which the kernel may need a moment.
pub async fn remove_group(group: &Group) {
    for attempt in 1..=REMOVE_TRIES {
        match group.remove() {
            Ok(()) => return,
            Err(error) if attempt == REMOVE_TRIES => {
                tracing::warn!(%error, cgroup = group.path(), "cannot remove cgroup");
            }
            Err(_) => tokio::time::sleep(REMOVE_PAUSE).await,
        }
    }
}

/// Removes a folder with everything in it; one that is not there is fine.
pub fn remove_folder(folder: &Path) {
    if let Err(error) = std::fs::remove_dir_all(folder)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(folder = %folder.display(), %error, "cannot remove folder");
    }
}

/// At the daemon's start: ends what an earlier one started in children of a group, and removes them and the folder of
/// their logs.
pub async fn end_orphans(group: &Group, logs: &Path) {
    remove_folder(logs);
    for child in group.children() {
        end_all(&child).await;
        remove_group(&child).await;
    }
}
