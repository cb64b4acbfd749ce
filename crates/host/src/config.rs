//! The daemon's configuration: one TOML file; unknown keys are errors.

use crate::error::{HostError, chain};
use crate::platform::{Address, Platform};
use crate::vms::record::SLOT_BYTES_MAX;
use serde::Deserialize;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use types::{ErrorCode, HostName, Problem};

/// Longest path that a UNIX socket address holds with its final zero, less what the daemon appends: a slot and the
/// longest name of a socket in it.
const RUN_FOLDER_BYTES_MAX: usize = 108 - 1 - "/".len() - SLOT_BYTES_MAX - "/stream".len();

/// Configuration of `outrider host run`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Name of this host; from the state folder (as joined) when left out.
    #[serde(default)]
    pub name: Option<HostName>,
    /// `address:port` of the manager; from the state folder (as joined) when left out.
    #[serde(default)]
    pub manager: Option<String>,
    /// Keys, certificate, journal and VM records; mode 0700.
    #[serde(default = "default_state_folder")]
    pub state_folder: PathBuf,
    /// Sockets; mode 0700, with a short path.
    #[serde(default = "default_run_folder")]
    pub run_folder: PathBuf,
    /// QEMU; `qemu-system-x86_64` from PATH when left out.
    #[serde(default)]
    pub qemu_binary: Option<PathBuf>,
    /// The VM agent; `outrider-agent` beside the running executable when left out.
    #[serde(default)]
    pub agent_binary: Option<PathBuf>,
    /// The scanner of signatures; `outrider-scanner` beside the running executable when left out.
    #[serde(default)]
    pub scanner_binary: Option<PathBuf>,
    /// Rules for the scanner: a file, or a folder with files `*.yar` and `*.yara`.
    #[serde(default)]
    pub signature_rules: Option<PathBuf>,
    /// Address on the migration network: targets listen here, sources dial from here.
    pub migration_address: IpAddr,
    /// What the interface with that address carries each way, in Mbit/s; as the kernel knows it when left out.
    #[serde(default)]
    pub link_mbit_per_s: Option<u32>,
    /// Ports for VM agents and for "please renounce", open only under a permit.
    #[serde(default)]
    pub data_ports: PortRange,
    /// Cgroup under which VMs and agents live. Its parent is what counts as this host's load (the machine, when
    /// the parent is the root).
    #[serde(default = "default_cgroup")]
    pub cgroup: String,
    /// User under which QEMU runs; the daemon's own when left out.
    #[serde(default)]
    pub qemu_user: Option<String>,
    /// The TPM with which this host proves itself: `device:/dev/tpmrm0`, or the socket of a swtpm (`unix:`, `tcp:`).
    #[serde(default)]
    pub tpm: Option<Address>,
    /// The firmware's event log, which explains what the TPM holds; the kernel's, where the TPM is a device.
    #[serde(default)]
    pub tpm_event_log: Option<PathBuf>,
    /// Refuse permits whose other host did not prove its platform.
    #[serde(default)]
    pub require_attested_peer: bool,
    /// Write guests' serial consoles to `serial.log` beside their sockets. Unbounded: for the lab.
    #[serde(default)]
    pub serial_log: bool,
}

/// What `outrider host join` needs.
#[derive(Debug, Clone)]
pub struct JoinConfig {
    /// The TPM with which this host proves itself, if it is to.
    pub tpm: Option<Address>,
    /// The firmware's event log.
    pub tpm_event_log: Option<PathBuf>,
    /// The token that `outrider host add` printed.
    pub token: String,
    /// Where keys and certificate are stored.
    pub state_folder: PathBuf,
    /// Dial this address instead of the one in the token.
    pub manager: Option<String>,
}

/// A range of TCP ports, written `first-last`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub struct PortRange {
    /// The first.
    pub first: u16,
    /// The last.
    pub last: u16,
}

impl Default for PortRange {
    fn default() -> Self {
        Self { first: 7450, last: 7499 }
    }
}

impl TryFrom<String> for PortRange {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        let parsed = text.split_once('-').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
        match parsed {
            Some((first, last)) if first > 0 && first <= last => Ok(Self { first, last }),
            _ => Err(format!("{text:?} is not a range of ports such as \"7450-7499\"")),
        }
    }
}

fn default_state_folder() -> PathBuf {
    "/var/lib/outrider/host".into()
}
fn default_run_folder() -> PathBuf {
    "/run/outrider".into()
}
fn default_cgroup() -> String {
    "outrider".to_owned()
}

impl Config {
    /// From the text of a configuration file.
    ///
    /// # Errors
    /// `bad-configuration`, with the key and line.
    pub fn parse(text: &str) -> Result<Self, Problem> {
        let config: Self = toml::from_str(text)
            .map_err(|e| Problem::new(ErrorCode::BadConfiguration, e.to_string().trim_end().to_owned()))?;
        config.check()?;
        Ok(config)
    }

    /// From a file.
    ///
    /// # Errors
    /// `bad-configuration` when it can't be read or is wrong.
    pub fn load(path: &Path) -> Result<Self, Problem> {
        let text = std::fs::read_to_string(path).map_err(|e| {
            let error = HostError::file("cannot read configuration file", path, e);
            Problem::new(ErrorCode::BadConfiguration, chain(&error))
        })?;
        Self::parse(&text).map_err(|mut problem| {
            problem.detail = format!("{}: {}", path.display(), problem.detail);
            problem
        })
    }

    /// The TPM, as far as one is named.
    #[must_use]
    pub fn platform(&self) -> Option<Platform> {
        let address = self.tpm.clone()?;
        Some(Platform::new(address, self.tpm_event_log.clone(), &self.state_folder))
    }

    /// What the types do not say.
    ///
    /// # Errors
    /// `bad-configuration`.
    pub fn check(&self) -> Result<(), Problem> {
        let bad = |text: String| Err(Problem::new(ErrorCode::BadConfiguration, text));
        if !self.state_folder.is_absolute() || !self.run_folder.is_absolute() {
            return bad("state_folder and run_folder must be absolute paths".to_owned());
        }
        if self.signature_rules.as_ref().is_some_and(|path| !path.is_absolute()) {
            return bad("signature_rules must be an absolute path".to_owned());
        }
        if self.run_folder.as_os_str().len() > RUN_FOLDER_BYTES_MAX {
            return bad(format!(
                "run_folder is {} bytes long; socket paths leave it at most {RUN_FOLDER_BYTES_MAX}",
                self.run_folder.as_os_str().len()
            ));
        }
        let part_is_plain = |part: &str| {
            !part.is_empty()
                && part != "."
                && part != ".."
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.@".contains(&b))
        };
        if !self.cgroup.split('/').all(part_is_plain) {
            return bad(format!("cgroup {:?} is not a relative path of plain names", self.cgroup));
        }
        if self.migration_address.is_unspecified() {
            return bad("migration_address must be one address, never all of them".to_owned());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_fill_a_short_file() {
        let config = Config::parse("migration_address = '10.0.0.1'").expect("the shortest file");
        assert_eq!(config.data_ports, PortRange { first: 7450, last: 7499 });
        assert_eq!(config.cgroup, "outrider");
    }

    #[test]
    fn wrong_files_are_bad_configuration() {
        for (text, says) in [
            ("migration_address = '10.0.0.1'\nport = 1", "unknown field `port`"),
            ("", "missing field `migration_address`"),
            ("migration_address = '10.0.0.1'\ndata_ports = '9-8'", "not a range of ports"),
            ("migration_address = '10.0.0.1'\ncgroup = '../x'", "plain names"),
            ("migration_address = '0.0.0.0'", "one address"),
            ("migration_address = '10.0.0.1'\nrun_folder = 'x'", "absolute"),
            ("migration_address = '10.0.0.1'\nsignature_rules = 'x'", "absolute"),
        ] {
            let problem = Config::parse(text).expect_err(text);
            assert_eq!(problem.code, ErrorCode::BadConfiguration);
            assert!(problem.detail.contains(says), "{}", problem.detail);
        }
    }
}
