//! Taps: one per network interface of a VM, made before QEMU starts and removed after it ends.

use crate::error::HostError;
use types::{ErrorCode, Problem};

/// Name of a tap: `ot` and 52 bits of a hash over the VM's id, the epoch and the number of the interface; the kernel
/// takes 15 bytes.
#[must_use]
pub fn name(vm: types::VmId, epoch: types::Epoch, index: usize) -> String {
    let mut hasher = blake3::Hasher::new_derive_key("outrider 2026 tap name");
    hasher.update(vm.as_bytes()).update(&epoch.0.to_be_bytes()).update(&(index as u64).to_be_bytes());
    let digits = hex::encode(&hasher.finalize().as_bytes()[..7]);
    format!("ot{}", &digits[..13])
}

/// Makes a tap and puts it on a bridge.
///
/// # Errors
/// The bridge does not exist, or the daemon may not make taps.
pub async fn create(tap: &str, bridge: &str, user: Option<&str>) -> Result<(), Problem> {
    remove(tap).await;
    let mut add = vec!["tuntap", "add", "dev", tap, "mode", "tap"];
    if let Some(user) = user {
        add.extend(["user", user]);
    }
    ip(&add).await?;
    let joined = async {
        ip(&["link", "set", "dev", tap, "master", bridge]).await?;
        ip(&["link", "set", "dev", tap, "up"]).await
    };
    if let Err(problem) = joined.await {
        remove(tap).await;
        return Err(problem.hint(format!("does the bridge {bridge} exist on this host?")));
    }
    Ok(())
}

/// Removes a tap; one that is not there is fine.
pub async fn remove(tap: &str) {
    if std::path::Path::new("/proc/net/dev").exists() && !exists(tap) {
        return;
    }
    if let Err(problem) = ip(&["link", "del", "dev", tap]).await {
        tracing::warn!(tap, %problem, "cannot remove tap");
    }
}

/// Whether it is there.
#[must_use]
pub fn exists(tap: &str) -> bool {
    std::fs::read_to_string("/proc/net/dev").is_ok_and(|text| {
        text.lines().any(|l| l.trim_start().strip_prefix(tap).is_some_and(|r| r.starts_with(':')))
    })
}

async fn ip(arguments: &[&str]) -> Result<(), Problem> {
    let output = tokio::process::Command::new("ip")
        .args(arguments)
        .stdin(std::process::Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(|source| HostError::Program { program: "ip".to_owned(), source }.problem())?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(Problem::new(ErrorCode::Internal, format!("`ip {}` failed: {}", arguments.join(" "), said.trim())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use types::{Epoch, VmId};

    #[test]
    fn names_differ_by_every_part_and_fit_the_kernel() {
        let mut names = std::collections::BTreeSet::new();
        for last in 0..4 {
            let mut id = [7; 16];
            id[15] = last;
            for epoch in [1, 1 + (1 << 12), 1 + (1 << 32)] {
                names.extend((0..8).map(|index| name(VmId::from_bytes(id), Epoch(epoch), index)));
            }
        }
        assert_eq!(names.len(), 4 * 3 * 8);
        assert!(names.iter().all(|name| name.len() == 15));
    }
}
