//! The guest image: Debian's cloud kernel and an initramfs with busybox, virtio modules and the guest daemon.

mod cpio;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hasher};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use cpio::Archive;
use flate2::{Compression, GzBuilder};

/// Modules in the order in which they load. `virtio_ring` comes before `virtio`: the other way round the
/// guest has no network card, without a word about it.
const MODULES: [&str; 12] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_mmio",
    "virtio_blk",
    "failover",
    "net_failover",
    "virtio_net",
    "virtio-rng",
    "virtio_balloon",
];

/// The busybox commands that the init script uses.
const APPLETS: [&str; 8] = ["sh", "mount", "mkdir", "insmod", "ip", "cat", "echo", "poweroff"];

/// First program of the guest.
const INIT: &str = r#"#!/bin/sh
export PATH=/bin
mkdir -p /proc /sys /dev
mount -t proc p /proc; mount -t sysfs s /sys; mount -t devtmpfs d /dev
# The counter page must keep its physical place.
echo 0 > /proc/sys/vm/compact_unevictable_allowed
address=10.83.0.50/24
for word in $(cat /proc/cmdline); do
  case $word in outrider.ip=*) address=${word#*=};; esac
done
while read module; do insmod /lib/modules/$module.ko; done < /lib/modules/order
ip link set lo up; ip link set eth0 up; ip addr add $address dev eth0
echo GUEST-UP
guestd
echo GUEST-DAEMON-ENDED; poweroff -f
"#;

/// First program of a guest that only shows that it is alive.
const TICKING_INIT: &str = r#"#!/bin/sh
export PATH=/bin
mkdir -p /proc /sys /dev
mount -t proc p /proc; mount -t sysfs s /sys; mount -t devtmpfs d /dev
while read module; do insmod /lib/modules/$module.ko; done < /lib/modules/order
n=0
while true; do
  for device in /dev/vda /dev/vdb /dev/hwrng; do
    [ -e $device ] && busybox dd if=$device of=/dev/null bs=4096 count=4 2>/dev/null
  done
  n=$((n + 1)); echo TICK $n; busybox sleep 0.1
done
"#;

/// What every guest of the lab has on its kernel command line. `no_timer_check`: an emulated, loaded machine
/// can fail the kernel's timer check and panic. No huge pages: they would move the counter page.
pub const BASE_COMMAND_LINE: &str = "console=ttyS0 quiet no_timer_check panic=-1 transparent_hugepage=never";

/// A finished image.
#[derive(Debug, Clone)]
pub struct GuestImage {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
}

impl GuestImage {
    /// Finds the image that `cargo xtask setup` made: in `OUTRIDER_GUEST`, else in the build folder.
    pub fn locate() -> Result<Self> {
        let folder = match std::env::var_os("OUTRIDER_GUEST") {
            Some(folder) => PathBuf::from(folder),
            None => target_folder()?.join("lab/guest"),
        };
        let image = Self::in_folder(&folder);
        for file in [&image.kernel, &image.initrd] {
            ensure!(file.is_file(), "the guest image is missing: no {}", file.display());
        }
        Ok(image)
    }

    /// The same image with another first program: it uses the disks and says `TICK` on the console, for ever.
    pub fn ticking(&self, folder: &Path) -> Result<Self> {
        let mut archive = Archive::default();
        archive.file("init", TICKING_INIT.as_bytes());
        let overlay = folder.join("overlay.gz");
        compress(&archive.finish(), &overlay)?;
        // The kernel unpacks one archive after the other; later files replace earlier ones.
        let mut bytes = read(&self.initrd)?;
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes.extend(read(&overlay)?);
        let initrd = folder.join("ticking.gz");
        fs::write(&initrd, bytes).with_context(|| format!("writing {}", initrd.display()))?;
        Ok(Self { kernel: self.kernel.clone(), initrd })
    }

    fn in_folder(folder: &Path) -> Self {
        Self { kernel: folder.join("vmlinuz"), initrd: folder.join("initrd.gz") }
    }
}

/// Cargo's build folder.
pub(crate) fn target_folder() -> Result<PathBuf> {
    if let Some(folder) = std::env::var_os("CARGO_TARGET_DIR") {
        return Ok(folder.into());
    }
    // The lab runs from a source tree only, so the place it was built from is the place to look.
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    Ok(root.context("the lab's folder has no parent")?.join("target"))
}

/// Packs the image, unless the one in `out` was made from the same parts.
pub fn make(unpacked: &Path, daemon: &Path, out: &Path) -> Result<GuestImage> {
    let image = GuestImage::in_folder(out);
    let kernel = find(&unpacked.join("boot"), |name| name.starts_with("vmlinuz-"))?;
    let initramfs = initramfs(unpacked, daemon)?;
    let print = fingerprint(&[&fs::read(&kernel).context("reading the kernel")?, &initramfs]);
    let mark = out.join("fingerprint");
    if fs::read_to_string(&mark).is_ok_and(|old| old == print) && GuestImage::in_folder(out).initrd.is_file()
    {
        eprintln!("guest image: up to date in {}", out.display());
        return Ok(image);
    }
    fs::create_dir_all(out).with_context(|| format!("making {}", out.display()))?;
    fs::copy(&kernel, &image.kernel).context("copying the kernel")?;
    compress(&initramfs, &image.initrd)?;
    fs::write(&mark, print).with_context(|| format!("writing {}", mark.display()))?;
    eprintln!("guest image: made in {}", out.display());
    Ok(image)
}

fn initramfs(unpacked: &Path, daemon: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for folder in ["bin", "proc", "sys", "dev", "tmp", "lib", "lib/modules"] {
        archive.folder(folder);
    }
    archive.file("bin/busybox", &read(&unpacked.join("bin/busybox"))?);
    for applet in APPLETS {
        archive.link(&format!("bin/{applet}"), "busybox");
    }
    archive.file("bin/guestd", &read(daemon)?);
    archive.file("init", INIT.as_bytes());
    let modules = unpacked.join("lib/modules");
    for module in MODULES {
        let path = find(&modules, |name| name == format!("{module}.ko"))?;
        archive.file(&format!("lib/modules/{module}.ko"), &read(&path)?);
    }
    archive.file("lib/modules/order", (MODULES.join("\n") + "\n").as_bytes());
    Ok(archive.finish())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("reading {}", path.display()))
}

/// The first file below `folder` whose name fits.
fn find(folder: &Path, fits: impl Fn(&str) -> bool) -> Result<PathBuf> {
    let mut folders = vec![folder.to_owned()];
    while let Some(next) = folders.pop() {
        let entries = fs::read_dir(&next).with_context(|| format!("listing {}", next.display()))?;
        for entry in entries.flatten() {
            let kind = entry.file_type().context("asking for a file's type")?;
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file() && entry.file_name().to_str().is_some_and(&fits) {
                return Ok(entry.path());
            }
        }
    }
    anyhow::bail!("the file looked for is nowhere below {}", folder.display())
}

/// Tells old parts from new ones; it need not resist anybody.
fn fingerprint(parts: &[&[u8]]) -> String {
    let mut hasher = DefaultHasher::new();
    for part in parts {
        hasher.write_usize(part.len());
        hasher.write(part);
    }
    format!("{:016x}", hasher.finish())
}

/// Compresses beside the destination and renames, so that a half-written image never has the name.
fn compress(bytes: &[u8], path: &Path) -> Result<()> {
    let partial = path.with_extension("partial");
    let file = File::create(&partial).with_context(|| format!("making {}", partial.display()))?;
    let mut writer = GzBuilder::new().mtime(0).write(file, Compression::default());
    std::io::Write::write_all(&mut writer, bytes).context("compressing the initramfs")?;
    writer.finish().context("compressing the initramfs")?;
    fs::rename(&partial, path).with_context(|| format!("renaming to {}", path.display()))
}

/// What a guest is asked to do, as words on its kernel command line.
#[derive(Debug, Clone, Default)]
pub struct GuestLoad {
    /// Memory filled with random data, in MiB.
    pub fill_mib: u32,
    /// Working set of the dirtier, in MiB.
    pub working_set_mib: u32,
    /// Rate of the dirtier, in MiB per second.
    pub rate_mib_per_s: u32,
    /// Whether `/dev/vda` is written with sequence numbers.
    pub writes_disk: bool,
}

impl GuestLoad {
    /// The whole kernel command line.
    #[must_use]
    pub fn command_line(&self) -> String {
        let mut line = BASE_COMMAND_LINE.to_owned();
        let words = [("fill", self.fill_mib), ("ws", self.working_set_mib), ("rate", self.rate_mib_per_s)];
        for (name, value) in words.into_iter().filter(|(_, value)| *value > 0) {
            line.push_str(&format!(" outrider.{name}={value}"));
        }
        if self.writes_disk {
            line.push_str(" outrider.disk=/dev/vda");
        }
        line
    }
}

/// The name of a file as text, for messages.
#[must_use]
pub fn file_name(path: &Path) -> String {
    path.file_name().and_then(OsStr::to_str).unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_says_only_what_is_asked_for() {
        let idle = GuestLoad::default().command_line();
        assert_eq!(idle, BASE_COMMAND_LINE);
        let busy = GuestLoad { fill_mib: 64, writes_disk: true, ..GuestLoad::default() };
        let expect = format!("{BASE_COMMAND_LINE} outrider.fill=64 outrider.disk=/dev/vda");
        assert_eq!(busy.command_line(), expect);
    }
}
