//! State folders: they hold keys, so nobody else may look in, and they must not be full.

use super::Check;
use crate::size::format_bytes;
use rustix::fs::statvfs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Below this a registry or a journal may soon be unable to write, and then nothing is decided.
const ROOM_WARN_BYTES: u64 = 256 << 20;

/// Mode, owner and room of a state folder.
pub(super) fn state(check: &'static str, folder: &Path) -> Vec<Check> {
    let shown = folder.display();
    let metadata = match std::fs::symlink_metadata(folder) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return vec![Check::ok(check, format!("{shown} is not there yet; the daemon makes it"))];
        }
        Err(error) => {
            return vec![Check::fail(check, format!("{shown}: {error}"), "run this command as root")];
        }
    };
    vec![mode(check, folder, &metadata), room(check, folder)]
}

fn mode(check: &'static str, folder: &Path, metadata: &std::fs::Metadata) -> Check {
    let shown = folder.display();
    let bits = metadata.mode() & 0o777;
    if !metadata.is_dir() {
        Check::fail(check, format!("{shown} is no folder"), "move it away")
    } else if bits & 0o077 != 0 {
        Check::fail(
            check,
            format!("{shown} has mode {bits:04o}; others can reach the keys in it"),
            format!("chmod 0700 {shown}"),
        )
    } else if metadata.uid() != rustix::process::geteuid().as_raw() {
        Check::warn(
            check,
            format!("{shown} belongs to user {}", metadata.uid()),
            "run the daemon and this command as that user",
        )
    } else {
        Check::ok(check, format!("{shown}, mode {bits:04o}"))
    }
}

fn room(check: &'static str, folder: &Path) -> Check {
    match statvfs(folder) {
        Ok(stat) => {
            let free_bytes = stat.f_bavail.saturating_mul(stat.f_frsize);
            let found = format!("{} free", format_bytes(free_bytes));
            if free_bytes < ROOM_WARN_BYTES {
                Check::warn(check, found, "free some: a daemon that cannot write refuses every migration")
            } else {
                Check::ok(check, found)
            }
        }
        Err(error) => Check::warn(check, format!("free space is unknown: {error}"), "check it by hand"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::Status;
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_folder_that_others_can_enter_fails() {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("state");
        assert_eq!(state("s", &folder)[0].status, Status::Ok);
        std::fs::create_dir(&folder).unwrap();
        for (mode, status) in [(0o700, Status::Ok), (0o750, Status::Fail), (0o701, Status::Fail)] {
            std::fs::set_permissions(&folder, PermissionsExt::from_mode(mode)).unwrap();
            assert_eq!(state("s", &folder)[0].status, status, "{mode:o}");
        }
    }
}
