//! Taps: one per network interface of a VM, made before QEMU starts and removed after it ends.

use crate::error::HostError;
use types::{ErrorCode, Problem};

/// Name of a tap: `ot`, eight digits of the VM's id, epoch modulo 2^12, number of the interface; 15 bytes at most.
#[must_use]
pub fn name(vm: types::VmId, epoch: types::Epoch, index: usize) -> String {
    format!("ot{}{:03x}{index:x}", &hex::encode(vm.as_bytes())[..8], epoch.0 & 0xfff)
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
