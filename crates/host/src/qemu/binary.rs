//! The QEMU program at hand: found once, asked for its version and machine types.

use crate::error::HostError;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use types::{ErrorCode, Problem};

/// `-machine help` takes 50 ms; a program that does not answer is not QEMU.
const ASK_TIMEOUT: Duration = Duration::from_secs(20);

/// A QEMU program and what it can do.
#[derive(Debug, Clone)]
pub struct Binary {
    /// Absolute path.
    pub path: PathBuf,
    /// As inventories name it, e.g. `qemu/10.0.2`.
    pub hypervisor: String,
    /// Where it finds its firmware.
    pub data_folders: Vec<PathBuf>,
    /// When the file was last changed: an upgraded QEMU is asked again.
    changed: Option<SystemTime>,
    machines: BTreeSet<String>,
    aliases: BTreeMap<String, String>,
    cpu_models: BTreeSet<String>,
    cpu_flags: BTreeSet<String>,
}

impl Binary {
    /// Finds the program (in PATH when not configured) and asks it, unless `known` is the same file.
    ///
    /// # Errors
    /// `missing-program`, or it does not answer as QEMU does.
    pub async fn find(configured: Option<&Path>, known: Option<Self>) -> Result<Self, Problem> {
        let path = locate(configured.unwrap_or(Path::new("qemu-system-x86_64")))?;
        let changed = std::fs::metadata(&path).and_then(|m| m.modified()).ok();
        if let Some(known) = known.filter(|k| k.path == path && k.changed == changed && changed.is_some()) {
            return Ok(known);
        }
        let version = ask(&path, &["--version"]).await?;
        let number = version
            .split_once("QEMU emulator version ")
            .and_then(|(_, rest)| rest.split([' ', '\n', '(']).next())
            .filter(|n| n.starts_with(|c: char| c.is_ascii_digit()))
            .ok_or_else(|| {
                Problem::new(ErrorCode::MissingProgram, format!("{} is not QEMU", path.display()))
            })?;
        let hypervisor = format!("qemu/{number}");
        let help = ask(&path, &["-machine", "help"]).await?;
        let (machines, aliases) = parse_machines(&help);
        let data_folders = ask(&path, &["-L", "help"]).await?.lines().map(PathBuf::from).collect();
        let (cpu_models, cpu_flags) = parse_cpus(&ask(&path, &["-cpu", "help"]).await?);
        Ok(Self { path, changed, hypervisor, data_folders, machines, aliases, cpu_models, cpu_flags })
    }

    /// Exact machine types.
    #[must_use]
    pub fn machines(&self) -> &BTreeSet<String> {
        &self.machines
    }

    /// CPU models, with aliases and versions.
    #[must_use]
    pub fn cpu_models(&self) -> &BTreeSet<String> {
        &self.cpu_models
    }

    /// CPUID flags by QEMU's names: what of a CPU's properties a guest can see.
    #[must_use]
    pub fn cpu_flags(&self) -> &BTreeSet<String> {
        &self.cpu_flags
    }

    /// The exact machine type that a name means here.
    ///
    /// # Errors
    /// This QEMU has no such machine.
    pub fn machine(&self, name: &str) -> Result<String, Problem> {
        if let Some(exact) = self.aliases.get(name) {
            return Ok(exact.clone());
        }
        if self.machines.contains(name) {
            return Ok(name.to_owned());
        }
        Err(Problem::new(
            ErrorCode::HypervisorFailed,
            format!("{} ({}) has no machine type {name:?}", self.path.display(), self.hypervisor),
        )
        .hint("name one that `qemu-system-x86_64 -machine help` lists on this host"))
    }
}

fn locate(program: &Path) -> Result<PathBuf, Problem> {
    let found = if program.components().count() > 1 {
        Some(program.to_owned())
    } else {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).map(|folder| folder.join(program)).find(|file| file.is_file())
    };
    found.filter(|file| file.is_file()).ok_or_else(|| {
        Problem::new(ErrorCode::MissingProgram, format!("{} is not installed", program.display()))
            .hint("install qemu-system-x86, or set qemu_binary in the host's configuration")
    })
}

async fn ask(program: &Path, arguments: &[&str]) -> Result<String, Problem> {
    let output = tokio::process::Command::new(program)
        .args(arguments)
        .stdin(std::process::Stdio::null())
        .kill_on_drop(true)
        .output();
    let name = program.display().to_string();
    let output = tokio::time::timeout(ASK_TIMEOUT, output)
        .await
        .map_err(|_| std::io::ErrorKind::TimedOut.into())
        .and_then(|done| done)
        .map_err(|source| HostError::Program { program: name, source }.problem())?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn parse_machines(help: &str) -> (BTreeSet<String>, BTreeMap<String, String>) {
    let mut machines = BTreeSet::new();
    let mut aliases = BTreeMap::new();
    for line in help.lines().skip(1) {
        let Some((name, rest)) = line.split_once(' ') else { continue };
        match rest.split_once("(alias of ").and_then(|(_, exact)| exact.split_once(')')) {
            Some((exact, _)) => {
                aliases.insert(name.to_owned(), exact.to_owned());
            }
            None => {
                machines.insert(name.to_owned());
            }
        }
    }
    (machines, aliases)
}

/// Models, then flags. Older QEMUs write `x86 ` before each model.
fn parse_cpus(help: &str) -> (BTreeSet<String>, BTreeSet<String>) {
    let (models, flags) = help.split_once("Recognized CPUID flags:").unwrap_or((help, ""));
    let model = |line: &str| {
        let mut words = line.split_whitespace();
        let first = words.next().filter(|_| line.starts_with(' ') || line.starts_with("x86 "))?;
        if line.starts_with("x86 ") { words.next() } else { Some(first) }.map(str::to_owned)
    };
    (models.lines().filter_map(model).collect(), flags.split_whitespace().map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_are_read_as_old_and_new_qemus_write_them() {
        let newer = "Available CPUs:\n  486                   (alias configured by machine type)\n  486-v1                \n\
            \x20 EPYC-v1               AMD EPYC Processor\n\nRecognized CPUID flags:\n  3dnow abm\n  aes\n";
        let older = newer.replace("\n  486", "\nx86 486").replace("\n  EPYC", "\nx86 EPYC");
        for help in [newer, &older] {
            let (models, flags) = parse_cpus(help);
            assert_eq!(models.iter().collect::<Vec<_>>(), ["486", "486-v1", "EPYC-v1"]);
            assert_eq!(flags.iter().collect::<Vec<_>>(), ["3dnow", "abm", "aes"]);
        }
        assert_eq!(parse_cpus("no list"), (BTreeSet::new(), BTreeSet::new()));
    }

    #[test]
    fn machine_list_is_read() {
        let help = "Supported machines are:\n\
            microvm              microvm (i386)\n\
            pc                   Standard PC (i440FX + PIIX, 1996) (alias of pc-i440fx-10.0)\n\
            pc-i440fx-10.0       Standard PC (i440FX + PIIX, 1996) (default)\n";
        let (machines, aliases) = parse_machines(help);
        assert!(machines.contains("pc-i440fx-10.0") && machines.contains("microvm"));
        assert_eq!(aliases.get("pc").map(String::as_str), Some("pc-i440fx-10.0"));
    }

    #[tokio::test]
    async fn a_missing_program_is_named() {
        let problem =
            Binary::find(Some(Path::new("/nowhere/qemu")), None).await.expect_err("it is not there");
        assert_eq!(problem.code, ErrorCode::MissingProgram);
        assert!(problem.detail.contains("/nowhere/qemu"));
        let problem = Binary::find(Some(Path::new("/bin/true")), None).await.expect_err("it is not QEMU");
        assert_eq!(problem.code, ErrorCode::MissingProgram);
    }
}
