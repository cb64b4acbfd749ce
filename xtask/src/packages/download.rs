//! Packages that are downloaded and unpacked into the lab's cache, beside whatever the machine has installed.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use super::{Apt, RELEASE};
use crate::run;

/// Folder of the guest's kernel and busybox.
pub(super) const GUEST: &str = "unpacked";
/// Folder of the QEMU of the release itself. The lab looks for it by this name.
pub(super) const OLDER_QEMU: &str = "qemu72";
/// The package that depends on the newest cloud kernel.
const KERNEL_META: &str = "linux-image-cloud-amd64";
/// Written last, so that a broken attempt is repeated.
const MARK: &str = ".complete";

/// Packages that belong together.
pub(super) struct Bundle {
    folder: &'static str,
    packages: fn(&Apt) -> Result<Vec<String>>,
}

const BUNDLES: [Bundle; 2] = [
    Bundle { folder: GUEST, packages: guest_packages },
    Bundle { folder: OLDER_QEMU, packages: older_qemu_packages },
];

/// What is not there in full.
pub(super) fn missing(cache: &Path) -> Vec<&'static Bundle> {
    BUNDLES.iter().filter(|bundle| !cache.join(bundle.folder).join(MARK).exists()).collect()
}

/// Downloads a bundle and unpacks it.
pub(super) fn fetch(apt: &Apt, cache: &Path, bundle: &Bundle) -> Result<()> {
    let packages = (bundle.packages)(apt)?;
    let list = packages.join(" ");
    eprintln!("packages: downloading {list}, only to be unpacked");
    let (debs, unpacked) = (cache.join("debs"), cache.join(bundle.folder));
    for folder in [&debs, &unpacked] {
        remove_folder(folder)?;
        fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    }
    let mut download = apt.command("apt-get");
    download.args(["download", "--quiet", "-o", "APT::Sandbox::User=root"]).args(&packages);
    run::quiet(download.current_dir(&debs))?;
    for entry in fs::read_dir(&debs).with_context(|| format!("listing {}", debs.display()))? {
        let deb = entry.with_context(|| format!("listing {}", debs.display()))?.path();
        run::quiet(Command::new("dpkg-deb").arg("--extract").arg(&deb).arg(&unpacked))?;
    }
    remove_folder(&debs)?;
    let mark = unpacked.join(MARK);
    fs::write(&mark, list).with_context(|| format!("writing {}", mark.display()))
}

fn guest_packages(apt: &Apt) -> Result<Vec<String>> {
    let depends = run::quiet(apt.command("apt-cache").args(["depends", KERNEL_META]))?;
    let kernel = depends.lines().find_map(|line| line.trim().strip_prefix("Depends: "));
    let kernel = kernel.with_context(|| format!("{KERNEL_META} depends on no kernel"))?;
    Ok(vec![kernel.to_owned(), "busybox-static".to_owned()])
}

/// The program and the folders that it reads at start. Naming the release leaves the backports aside.
fn older_qemu_packages(_apt: &Apt) -> Result<Vec<String>> {
    let names = ["qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios", "ipxe-qemu"];
    Ok(names.map(|name| format!("{name}/{RELEASE}")).to_vec())
}

fn remove_folder(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", folder.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_bundle_is_there_only_with_its_mark() {
        let cache = std::env::temp_dir().join(format!("outrider-xtask-{}", std::process::id()));
        let folders = |bundles: Vec<&Bundle>| bundles.iter().map(|b| b.folder).collect::<Vec<_>>();
        fs::create_dir_all(cache.join(GUEST)).unwrap();
        assert_eq!(folders(missing(&cache)), [GUEST, OLDER_QEMU]);
        fs::write(cache.join(GUEST).join(MARK), "").unwrap();
        assert_eq!(folders(missing(&cache)), [OLDER_QEMU]);
        fs::remove_dir_all(&cache).unwrap();
    }
}
