//! Debian packages: finds what is missing, asks, installs it; downloads what the lab only unpacks.
//!
//! The machine's own apt configuration stays as it was: apt is given a temporary list of sources and a
//! folder of its own for what it fetches about them. Kernel and busybox of the guest, and the older QEMU beside
//! the installed one, are only unpacked into the lab's cache (see [`download`]), never installed.

mod download;

use std::fs;
use std::io::{IsTerminal, Write, stderr, stdin};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::run::{self, Workspace};

/// The one release whose packages are known to fit.
const RELEASE: &str = "bookworm";
/// Oldest QEMU whose switchover the project is tested with.
const QEMU_MAJOR: u32 = 10;
/// May packages be installed without a question?
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Consent {
    /// `--yes` was given.
    Given,
    /// Ask, where there is a terminal to ask on.
    Ask,
}

/// A package that must be installed, and where it comes from.
struct Need {
    package: &'static str,
    backports: bool,
    least_major: u32,
}

const NEEDS: [Need; 11] = [
    need("gcc", false, 0),
    need("g++", false, 0),
    need("libc6-dev", false, 0),
    need("iproute2", false, 0),
    need("nftables", false, 0),
    need("swtpm", false, 0),
    need("swtpm-tools", false, 0),
    need("tpm2-tools", false, 0),
    need("qemu-system-x86", true, QEMU_MAJOR),
    need("qemu-utils", true, QEMU_MAJOR),
    // Its programs only: tests make clusters of their own (see `WithoutCluster`).
    need("postgresql-15", false, 15),
];

const fn need(package: &'static str, backports: bool, least_major: u32) -> Need {
    Need { package, backports, least_major }
}

/// Installs what is missing and downloads what is only unpacked.
pub(crate) fn ensure(workspace: &Workspace, consent: Consent) -> Result<()> {
    let missing: Vec<&Need> = NEEDS.iter().filter(|need| !is_installed(need)).collect();
    let cache = workspace.lab_cache();
    let wanted = download::missing(&cache);
    if missing.is_empty() && wanted.is_empty() {
        eprintln!("packages: nothing to install");
    } else {
        require_debian()?;
        let apt = Apt::with_backports(&cache.join("apt"))?;
        if !missing.is_empty() {
            install(&apt, &missing, consent)?;
        }
        for bundle in wanted {
            download::fetch(&apt, &cache, bundle)?;
        }
    }
    ensure_nextest(workspace)
}

/// Where the older QEMU is unpacked.
pub(crate) fn older_qemu_folder(workspace: &Workspace) -> PathBuf {
    workspace.lab_cache().join(download::OLDER_QEMU)
}

/// Where the guest's packages are unpacked.
pub(crate) fn unpacked_folder(workspace: &Workspace) -> PathBuf {
    workspace.lab_cache().join(download::GUEST)
}

fn is_installed(need: &Need) -> bool {
    let format = "${db:Status-Status} ${Version}";
    let mut query = Command::new("dpkg-query");
    query.args(["--show", "--showformat", format, need.package]);
    run::quiet(&mut query).is_ok_and(|said| {
        said.split_once(' ').is_some_and(|(status, version)| {
            status == "installed" && major(version).is_some_and(|major| major >= need.least_major)
        })
    })
}

/// The major number in a Debian version such as `1:10.0.2+ds-2`.
fn major(version: &str) -> Option<u32> {
    let upstream = version.split_once(':').map_or(version, |(_epoch, rest)| rest);
    let digits: String = upstream.chars().take_while(char::is_ascii_digit).collect();
    if digits.is_empty() { Some(0) } else { digits.parse().ok() }
}

fn require_debian() -> Result<()> {
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    let is_ours = release.lines().any(|line| line.trim() == format!("VERSION_CODENAME={RELEASE}"));
    ensure!(
        is_ours,
        "packages are missing (to install: {:?}; to download: what the guest and the older QEMU are made of), and \
         this machine is not Debian 12 ({RELEASE}): install them by hand",
        names(&NEEDS.iter().filter(|need| !is_installed(need)).collect::<Vec<_>>())
    );
    Ok(())
}

fn install(apt: &Apt, missing: &[&Need], consent: Consent) -> Result<()> {
    let list = names(missing);
    ensure!(
        rustix::process::geteuid().is_root(),
        "these packages are missing and only root can install them: {list}"
    );
    ensure!(agreed(&list, consent)?, "not installed: {list}");
    eprintln!("packages: installing {list}");
    let _without_cluster = missing
        .iter()
        .any(|need| need.package.starts_with("postgresql"))
        .then(WithoutCluster::new)
        .transpose()?;
    let (backports, main): (Vec<&Need>, Vec<&Need>) =
        missing.iter().copied().partition(|need| need.backports);
    for (group, suite) in [(main, RELEASE.to_owned()), (backports, format!("{RELEASE}-backports"))] {
        if !group.is_empty() {
            let mut command = apt.command("apt-get");
            command.env("DEBIAN_FRONTEND", "noninteractive");
            command.args([
                "install",
                "--yes",
                "--quiet",
                "--no-install-recommends",
                "--target-release",
                &suite,
            ]);
            command.args(group.iter().map(|need| need.package));
            run::quiet(&mut command)?;
        }
    }
    let still: Vec<&Need> = missing.iter().copied().filter(|need| !is_installed(need)).collect();
    ensure!(still.is_empty(), "apt reported success, yet these are missing: {}", names(&still));
    Ok(())
}

/// While this is there, a PostgreSQL server that is installed makes and starts no database of its own.
struct WithoutCluster {
    file: PathBuf,
}

impl WithoutCluster {
    fn new() -> Result<Self> {
        let folder = Path::new("/etc/postgresql-common/createcluster.d");
        fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        let file = folder.join("outrider-setup.conf");
        fs::write(&file, "create_main_cluster = false\n")
            .with_context(|| format!("writing {}", file.display()))?;
        Ok(Self { file })
    }
}

impl Drop for WithoutCluster {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.file) {
            eprintln!("packages: cannot remove {}: {error}", self.file.display());
        }
    }
}

fn names(needs: &[&Need]) -> String {
    needs.iter().map(|need| need.package).collect::<Vec<_>>().join(" ")
}

fn agreed(list: &str, consent: Consent) -> Result<bool> {
    if consent == Consent::Given || !stdin().is_terminal() {
        return Ok(true);
    }
    eprint!("Install these Debian packages: {list}? [Y/n] ");
    stderr().flush().context("writing the question")?;
    let mut answer = String::new();
    stdin().read_line(&mut answer).context("reading the answer")?;
    Ok(matches!(answer.trim().to_lowercase().as_str(), "" | "y" | "yes"))
}

/// apt with sources of our own.
struct Apt {
    sources: PathBuf,
    lists: PathBuf,
}

impl Apt {
    /// The release and its backports, from the mirror that the machine's own sources name.
    fn with_backports(folder: &Path) -> Result<Self> {
        let apt = Self { sources: folder.join("sources.list"), lists: folder.join("lists") };
        let partial = apt.lists.join("partial");
        fs::create_dir_all(&partial).with_context(|| format!("making {}", partial.display()))?;
        let mirror = own_mirror()?;
        let text = format!("deb {mirror} {RELEASE} main\ndeb {mirror} {RELEASE}-backports main\n");
        fs::write(&apt.sources, text).with_context(|| format!("writing {}", apt.sources.display()))?;
        eprintln!("packages: reading the package lists of {RELEASE} and {RELEASE}-backports");
        run::quiet(apt.command("apt-get").args(["update", "--quiet", "--error-on=any"]))
            .context("reading the package lists (is there a network?)")?;
        Ok(apt)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        for option in [
            format!("Dir::Etc::SourceList={}", self.sources.display()),
            "Dir::Etc::SourceParts=/dev/null".to_owned(),
            format!("Dir::State::Lists={}", self.lists.display()),
            // Caches of *these* lists must not replace the machine's own.
            "Dir::Cache::pkgcache=".to_owned(),
            "Dir::Cache::srcpkgcache=".to_owned(),
        ] {
            command.args(["-o", &option]);
        }
        command
    }
}

/// The mirror of the machine's own sources. Debian's keys are in apt's own folder of trusted keys.
fn own_mirror() -> Result<String> {
    let format = "$(RELEASE)\t$(COMPONENT)\t$(REPO_URI)";
    let targets = ["indextargets", "--format", format, "Created-By: Packages"];
    let said = run::quiet(Command::new("apt-get").args(targets))?;
    let wanted = format!("{RELEASE}\tmain\t");
    match said.lines().find_map(|line| line.strip_prefix(&wanted)) {
        Some(mirror) => Ok(mirror.to_owned()),
        None => bail!("apt's sources on this machine name no mirror of {RELEASE} main"),
    }
}

fn ensure_nextest(workspace: &Workspace) -> Result<()> {
    if run::works(workspace.cargo().args(["nextest", "--version"])) {
        return Ok(());
    }
    run::step(workspace.cargo().args(["install", "--locked", "cargo-nextest"]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_major_number_is_found_behind_an_epoch() {
        let check = |version, expect| assert_eq!(major(version), expect);
        check("1:10.0.2+ds-2+deb13u1~bpo12+1", Some(10));
        check("1:7.2+dfsg-7", Some(7));
        check("6.1.0-3", Some(6));
        check("~weird", Some(0));
    }
}
