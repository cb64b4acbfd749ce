//! Configuration: TOML, every key documented here, unknown keys are errors.

mod admission;

pub use admission::{Admission, Demanded};

use registry::Database;
use serde::Deserialize;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use types::permit::MAX_MULTIFD_CHANNELS;
use types::profile::InspectionProfile;
use types::{ErrorCode, Name, Problem};

/// Configuration of the manager.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// State folder: registry, CA, permit key, admin token. Mode 0700.
    pub state_folder: PathBuf,
    /// Name of this manager. Each manager of a shared registry needs one of its own.
    pub name: Name,
    /// Where the registry is: a path or `sqlite:PATH`, or `postgres://USER@HOST/DATABASE` for several managers. Without
    /// it, `registry.db` in the state folder.
    #[serde(deserialize_with = "database")]
    pub registry: Option<Database>,
    /// File with the password of the database's user.
    pub registry_password_file: Option<PathBuf>,
    /// Trust domain of the identities that it issues.
    pub trust_domain: String,
    /// Where operators connect (HTTPS).
    pub operator_listen: SocketAddr,
    /// Where hosts connect (gRPC over mutual TLS).
    pub hosts_listen: SocketAddr,
    /// `host:port` that join tokens tell hosts to dial; needed when `hosts_listen` is a wildcard address.
    pub hosts_advertise: Option<String>,
    /// Names and addresses in the certificate that operators see, besides the listening address and loopback.
    pub operator_names: Vec<String>,
    /// Folder of `*.cedar` policy files; the built-in policy when absent.
    pub policy_folder: Option<PathBuf>,
    /// How long a join token is good.
    pub join_token_minutes: u32,
    /// Room that a target must keep on top of what a guest needs.
    pub head_room_memory_percent: u32,
    /// Most CPU pressure (PSI) of a target.
    pub head_room_cpu_pressure_percent: u32,
    /// Most migrations at once, over the whole fleet.
    pub concurrent_migrations: u32,
    /// Multifd channels of a migration for which none were asked.
    pub multifd_channels: u16,
    /// Most multifd channels that may be asked for.
    pub multifd_channels_max: u16,
    /// How streams are inspected, as permits say it: `strict`, with `+signatures` or `+signatures-complete`,
    /// and then
    /// `+report-unvouched`.
    #[serde(deserialize_with = "profile")]
    pub inspection_profile: InspectionProfile,
    /// What a target must show.
    pub admission: Admission,
    /// Budgets that permits carry.
    pub budgets: Budgets,
}

/// What a permit allows at most.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Budgets {
    /// From the permit to the start of the transfer.
    pub start_s: u64,
    /// From the permit to the end of the transfer.
    pub run_s: u64,
    /// Bytes of stream, as a multiple of the guest's memory: a pre-copy that needs more does not converge.
    pub stream_memory_multiple: u64,
    /// Downtime before the source asks for an abort.
    pub downtime_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            state_folder: PathBuf::from("/var/lib/outrider/manager"),
            name: "manager".parse().expect("a constant that follows the rule of names"),
            registry: None,
            registry_password_file: None,
            trust_domain: "outrider".to_owned(),
            operator_listen: SocketAddr::from(([0, 0, 0, 0], 7443)),
            hosts_listen: SocketAddr::from(([0, 0, 0, 0], 7444)),
            hosts_advertise: None,
            operator_names: Vec::new(),
            policy_folder: None,
            join_token_minutes: 60,
            head_room_memory_percent: 10,
            head_room_cpu_pressure_percent: 90,
            concurrent_migrations: 64,
            multifd_channels: 0,
            multifd_channels_max: MAX_MULTIFD_CHANNELS,
            inspection_profile: InspectionProfile::default(),
            admission: Admission::default(),
            budgets: Budgets::default(),
        }
    }
}

impl Default for Budgets {
    fn default() -> Self {
        Self { start_s: 60, run_s: 3_600, stream_memory_multiple: 16, downtime_ms: 5_000 }
    }
}

fn profile<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<InspectionProfile, D::Error> {
    String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
}

fn bad_configuration(detail: String) -> Problem {
    Problem::new(ErrorCode::BadConfiguration, detail)
}

fn database<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Database>, D::Error> {
    String::deserialize(deserializer)?.parse().map(Some).map_err(serde::de::Error::custom)
}

/// What is wrong, with the line that it is in, but without a URL that stands there: a password may be in any part of it,
/// also where it does not belong.
fn without_passwords(text: &str) -> String {
    let hide = |line: &str| match line.split_once("://") {
        Some((head, _)) => format!("{head}://***"),
        None => line.to_owned(),
    };
    text.lines().map(hide).collect::<Vec<_>>().join("\n")
}

impl Config {
    /// Reads a configuration.
    ///
    /// # Errors
    /// `bad-configuration`, naming the key and the line.
    pub fn from_toml(text: &str) -> Result<Self, Problem> {
        let config: Self =
            toml::from_str(text).map_err(|e| bad_configuration(without_passwords(&e.to_string())))?;
        config.validate()?;
        Ok(config)
    }

    /// Reads a configuration file.
    ///
    /// # Errors
    /// `bad-configuration`, naming the file and the key.
    pub fn from_file(path: &Path) -> Result<Self, Problem> {
        let text = std::fs::read_to_string(path).map_err(|e| {
            Problem::new(ErrorCode::BadConfiguration, format!("cannot read {}: {e}", path.display()))
        })?;
        Self::from_toml(&text).map_err(|mut problem| {
            problem.detail = format!("{}: {}", path.display(), problem.detail);
            problem
        })
    }

    /// The registry's database, with its password.
    ///
    /// # Errors
    /// `bad-configuration`: the password file cannot be used.
    pub fn database(&self) -> Result<Database, Problem> {
        let file = || Database::Sqlite(self.state_folder.join("registry.db"));
        let database = self.registry.clone().unwrap_or_else(file);
        match &self.registry_password_file {
            None => Ok(database),
            Some(path) => database
                .with_password_file(path)
                .map_err(|e| bad_configuration(format!("registry_password_file: {e}"))),
        }
    }

    /// Whether other managers may use the registry as well.
    pub(crate) fn shares_registry(&self) -> bool {
        matches!(self.registry, Some(Database::Postgres(_)))
    }

    /// Checks what the types do not say.
    ///
    /// # Errors
    /// `bad-configuration`.
    pub fn validate(&self) -> Result<(), Problem> {
        let bad = |detail: &str| Err(Problem::new(ErrorCode::BadConfiguration, detail));
        let domain_byte = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b".-_".contains(&b);
        if self.trust_domain.is_empty() || !self.trust_domain.bytes().all(domain_byte) {
            return bad("trust_domain must be made of a-z, 0-9, '.', '-' and '_'");
        }
        if !(1..=7 * 24 * 60).contains(&self.join_token_minutes) {
            return bad("join_token_minutes must be 1 to 10080");
        }
        if self.budgets.start_s == 0
            || self.budgets.start_s > 600
            || self.budgets.run_s < self.budgets.start_s
        {
            return bad("budgets.start_s must be 1 to 600, and budgets.run_s at least as long");
        }
        if self.multifd_channels_max > MAX_MULTIFD_CHANNELS
            || self.multifd_channels > self.multifd_channels_max
        {
            return bad("multifd_channels_max must be 0 to 16, and multifd_channels no more than it");
        }
        if self.budgets.stream_memory_multiple == 0 || self.concurrent_migrations == 0 {
            return bad("budgets.stream_memory_multiple and concurrent_migrations must be at least 1");
        }
        self.admission.validate().or_else(|why| bad(&why))
    }

    /// `host:port` for join tokens, given the port that is really listened on.
    ///
    /// # Errors
    /// `bad-configuration` when nothing but a wildcard address is known.
    pub fn advertised(&self, listening: SocketAddr) -> Result<String, Problem> {
        if let Some(text) = &self.hosts_advertise {
            return Ok(text.clone());
        }
        if listening.ip().is_unspecified() {
            let detail = format!("hosts cannot dial {listening}");
            return Err(Problem::new(ErrorCode::BadConfiguration, detail)
                .hint("set hosts_advertise to the host:port at which hosts reach this manager"));
        }
        Ok(listening.to_string())
    }

    /// Addresses for the operators' certificate.
    pub(crate) fn certificate_addresses(&self) -> Vec<IpAddr> {
        let mut addresses: Vec<IpAddr> = self.operator_names.iter().filter_map(|n| n.parse().ok()).collect();
        addresses.extend([IpAddr::from([127, 0, 0, 1]), "::1".parse().expect("a constant address")]);
        for listen in [self.operator_listen, self.hosts_listen] {
            if !listen.ip().is_unspecified() {
                addresses.push(listen.ip());
            }
        }
        addresses.sort_unstable();
        addresses.dedup();
        addresses
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn check(text: &str, expect: Result<(), &str>) {
        match (Config::from_toml(text), expect) {
            (Ok(_), Ok(())) => {}
            (Err(problem), Err(part)) => {
                assert_eq!(problem.code, ErrorCode::BadConfiguration);
                assert!(problem.detail.contains(part), "{} does not name {part}", problem.detail);
            }
            (got, expect) => panic!("{text}: {got:?}, expected {expect:?}"),
        }
    }

    #[test]
    fn unknown_keys_and_bad_values_are_named() {
        check("", Ok(()));
        check("state_folder = \"/tmp/x\"\n[budgets]\nstart_s = 30", Ok(()));
        check("stat = \"/tmp/x\"", Err("stat"));
        check("[budgets]\nstart = 3", Err("start"));
        check("operator_listen = \"nowhere\"", Err("operator_listen"));
        check("trust_domain = \"A B\"", Err("trust_domain"));
        check("join_token_minutes = 0", Err("join_token_minutes"));
        check("[admission]\ndemand = []\nprobe_mib = 0", Ok(()));
        check("[admission]\ndemand = [\"luck\"]", Err("luck"));
        check("[admission]\nprobe_mib = 65", Err("admission.probe_mib"));
        check("[admission]\nprobe_work_us = 20001", Err("probe_work_us"));
        check("[admission]\nprobe_cpu_percent = 101", Err("probe_cpu_percent"));
        check("[admission]\nclaim_percent = 99", Err("admission.claim_percent"));
        check("name = \"Bad Name\"", Err("name"));
        check("multifd_channels = 4", Ok(()));
        check("multifd_channels_max = 17", Err("multifd_channels_max"));
        check("multifd_channels = 4\nmultifd_channels_max = 2", Err("multifd_channels_max"));
        check("inspection_profile = \"strict+report-unvouched\"", Ok(()));
        check("inspection_profile = \"strict+signatures-complete+report-unvouched\"", Ok(()));
        check(
            "inspection_profile = \"strict+signatures+signatures-complete\"",
            Err("is no inspection profile"),
        );
        check("registry = \"postgres://outrider@localhost/outrider\"", Ok(()));
        check("registry = \"/srv/registry.db\"", Ok(()));
        check("registry = \"mysql://u@h/d\"", Err("registry"));
        check("registry = \"postgres://u@db.example/d?sslmode=require\"", Err("verify-full"));
        check("inspection_profile = \"lax\"", Err("\"lax\" is no inspection profile"));
    }

    #[test]
    fn a_password_in_a_url_shows_in_no_message() {
        for text in [
            "registry = \"mysql://u:hunter2@h/d\"",
            "registry = \"postgres://u:hunter2@h/d?sslmode=prefer\"",
            "registry = \"postgres://u:hunter2@h/d",
            "registry = \"postgres://u:hu@nter2@h/d\" x",
            "registry = \"postgres://u@h/d?password=hunter2\"",
            "registry = \"postgres://u:hunter2/d\"",
            "registri = \"postgres://u:hunter2@h/d\"",
            "registry = [\"postgres://u:hunter2@h/d\"]",
        ] {
            let problem = Config::from_toml(text).unwrap_err();
            assert!(!problem.detail.contains("nter2"), "{}", problem.detail);
        }
        let config = Config::from_toml("registry = \"postgres://u:hunter2@localhost/d\"").unwrap();
        assert!(!format!("{config:?}").contains("hunter2"));
        let twice = Config { registry_password_file: Some("/nowhere".into()), ..config };
        assert!(twice.database().unwrap_err().detail.contains("registry_password_file"));
        let of_sqlite = Config { registry_password_file: Some("/nowhere".into()), ..Config::default() };
        assert!(of_sqlite.database().unwrap_err().detail.contains("no password"));
    }
}
