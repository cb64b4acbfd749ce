//! `manager run`, `host run`, `host join`: configuration, logging, signals, and the daemon itself.

use super::{DONE, Outcome, read_input};
use crate::args::{
    Format, HostEk, HostJoin, HostRun, HostSettings, Log, LogFormat, ManagerRun, RegistryPlace,
};
use crate::config::{ConfigError, load_table};
use crate::error::{Error, InputError};
use crate::output;
use serde::Serialize;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;
use types::{ErrorCode, HostName, Problem};

const MANAGER_FILE: &str = "/etc/outrider/manager.toml";
const HOST_FILE: &str = "/etc/outrider/host.toml";
const HOST_STATE: &str = "/var/lib/outrider/host";
/// Tasks that outlive their daemon are given so long.
const LEFTOVER_LIMIT: Duration = Duration::from_secs(1);
/// No join token is longer.
const MAX_TOKEN_BYTES: u64 = 4096;

pub(super) fn run_manager(args: &ManagerRun) -> Outcome {
    let config = manager_config(args)?;
    start_logging(&args.log)?;
    serve(|shutdown| async {
        manager::run_with(config, shutdown, |running| {
            output::note(&format!(
                "operators: https://{}\nhosts:     {}\ntoken:     {}\nCA:        {}",
                running.operators,
                running.hosts,
                running.admin_token_file.display(),
                running.ca_file.display(),
            ));
        })
        .await
    })
}

fn manager_config(args: &ManagerRun) -> Result<manager::Config, Error> {
    let mut file = load_table(args.config.as_deref(), Path::new(MANAGER_FILE), "manager.toml")?;
    file.set("state_folder", text(args.state.as_ref()));
    file.set("name", args.name.clone());
    file.set("operator_listen", args.operator_listen.clone());
    file.set("hosts_listen", args.hosts_listen.clone());
    file.set("hosts_advertise", args.hosts_advertise.clone());
    let config: manager::Config = file.parse()?;
    config.validate().map_err(Error::Daemon)?;
    Ok(config)
}

/// As `manager run` would have it, for what works on its registry.
pub(super) fn registry_config(place: &RegistryPlace) -> Result<manager::Config, Error> {
    let mut file = load_table(place.config.as_deref(), Path::new(MANAGER_FILE), "manager.toml")?;
    file.set("state_folder", text(place.state.as_ref()));
    let config: manager::Config = file.parse()?;
    config.validate().map_err(Error::Daemon)?;
    Ok(config)
}

fn text(path: Option<&PathBuf>) -> Option<String> {
    path.map(|p| p.display().to_string())
}

pub(super) fn run_host(args: &HostRun) -> Outcome {
    let config = host_config(args.config.as_deref(), &args.settings)?;
    start_logging(&args.log)?;
    serve(|shutdown| host::run(config, shutdown))
}

fn host_config(path: Option<&Path>, flags: &HostSettings) -> Result<host::Config, Error> {
    let mut file = load_table(path, Path::new(HOST_FILE), "host.toml")?;
    file.set("state_folder", text(flags.state.as_ref()));
    file.set("run_folder", text(flags.run_folder.as_ref()));
    file.set("manager", flags.manager_address.clone());
    file.set("name", flags.name.as_ref().map(ToString::to_string));
    file.set("migration_address", flags.migration_address.map(|a| a.to_string()));
    file.set("cgroup", flags.cgroup.clone());
    file.set("qemu_binary", text(flags.qemu_binary.as_ref()));
    file.set("agent_binary", text(flags.agent_binary.as_ref()));
    let config: host::Config = file.parse()?;
    config.check().map_err(Error::Daemon)?;
    Ok(config)
}

pub(super) fn join(args: &HostJoin, format: Format) -> Outcome {
    let config = join_config(args)?;
    let name = block_on(async { host::join(&config).await.map_err(Error::Daemon) })?;
    let joined = Joined { host: name, state_folder: config.state_folder };
    output::print(format, &joined, |joined, _| {
        format!(
            "{} has joined; its keys are in {}. Next: outrider host run\n",
            joined.host,
            joined.state_folder.display()
        )
    });
    Ok(DONE)
}

/// The endorsement key's name alone on its line, so that a script can take it.
pub(super) fn ek(args: &HostEk, format: Format) -> Outcome {
    let file = load_table(args.config.as_deref(), Path::new(HOST_FILE), "host.toml")?;
    let configured = if file.is_read() { file.parse::<host::Config>()?.tpm } else { None };
    let address = args.tpm.clone().or(configured).ok_or_else(|| {
        let detail = "no TPM is named";
        let hint = "give --tpm device:/dev/tpmrm0, or set `tpm` in host.toml";
        Error::Daemon(Problem::new(ErrorCode::BadConfiguration, detail).hint(hint))
    })?;
    let name = block_on(async { host::platform::endorsement_key(address).await.map_err(Error::Daemon) })?;
    let key = EndorsementKey { ek_name: name.to_string() };
    output::print(format, &key, |key, _| format!("{}\n", key.ek_name));
    Ok(DONE)
}

/// What `host ek` answers.
#[derive(Serialize)]
struct EndorsementKey {
    ek_name: String,
}

/// What `host join` answers.
#[derive(Serialize)]
struct Joined {
    host: HostName,
    state_folder: PathBuf,
}

/// A host that is told only where to keep its keys needs no configuration file yet; one that is there must be good.
fn join_config(args: &HostJoin) -> Result<host::JoinConfig, Error> {
    let file = load_table(args.config.as_deref(), Path::new(HOST_FILE), "host.toml")?;
    let config = if file.is_read() { Some(file.parse::<host::Config>()?) } else { None };
    let from_file = config.map(|c| (c.state_folder, c.manager, c.tpm, c.tpm_event_log));
    let (folder, manager, tpm, tpm_event_log) =
        from_file.unwrap_or_else(|| (PathBuf::from(HOST_STATE), None, None, None));
    Ok(host::JoinConfig {
        tpm: args.tpm.clone().or(tpm),
        tpm_event_log,
        token: token(&args.token)?,
        state_folder: args.state.clone().unwrap_or(folder),
        manager: args.manager_address.clone().or(manager),
    })
}

/// The token itself, or standard input for `-`.
fn token(argument: &str) -> Result<String, InputError> {
    let text =
        if argument == "-" { read_input(Path::new("-"), MAX_TOKEN_BYTES)? } else { argument.to_owned() };
    Ok(text.trim().to_owned())
}

/// Logs go to standard error, in the form and detail that were asked for.
fn start_logging(log: &Log) -> Result<(), ConfigError> {
    let filter = EnvFilter::try_new(&log.filter).map_err(|error| ConfigError::Setting {
        setting: "--log",
        value: log.filter.clone(),
        reason: error.to_string(),
    })?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match log.log_format {
        LogFormat::Human => builder.with_ansi(std::io::stderr().is_terminal()).init(),
        LogFormat::Json => builder.json().init(),
    }
    Ok(())
}

/// Runs a daemon until it ends, or until SIGTERM or SIGINT asks it to.
fn serve<D>(daemon: impl FnOnce(Shutdown) -> D) -> Outcome
where
    D: Future<Output = Result<(), Problem>>,
{
    block_on(async {
        let shutdown = shutdown().map_err(|source| Error::Start { act: "watch for signals", source })?;
        daemon(shutdown).await.map_err(Error::Daemon)
    })?;
    Ok(DONE)
}

fn block_on<T>(work: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|source| Error::Start { act: "start the asynchronous runtime", source })?;
    let outcome = runtime.block_on(work);
    // What still runs was told to end; a blocking call of it must not keep the process.
    runtime.shutdown_timeout(LEFTOVER_LIMIT);
    outcome
}

type Shutdown = std::pin::Pin<Box<dyn Future<Output = ()> + Send>>;

/// Resolves on the first SIGTERM or SIGINT. Handlers are in place when this returns.
fn shutdown() -> std::io::Result<Shutdown> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(Box::pin(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    }))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::args::{Cli, Command, HostCommand, ManagerCommand};
    use clap::Parser;
    use serde::de::DeserializeOwned;

    fn example(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../packaging").join(name)
    }

    fn manager_run(more: &[&str]) -> ManagerRun {
        match Cli::parse_from([&["outrider", "manager", "run"], more].concat()).command {
            Command::Manager(ManagerCommand::Run(args)) => args,
            other => panic!("{other:?}"),
        }
    }

    fn host_run(more: &[&str]) -> HostRun {
        match Cli::parse_from([&["outrider", "host", "run"], more].concat()).command {
            Command::Host(HostCommand::Run(args)) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_managers_example_shows_the_defaults() {
        let file = example("manager.toml");
        let config = manager_config(&manager_run(&["--config", file.to_str().unwrap()])).unwrap();
        assert_eq!(config, manager::Config::default());
        every_key_is_documented::<manager::Config>("manager.toml", "");
        every_key_is_documented::<manager::Config>("manager.toml", "[budgets]\n");
    }

    #[test]
    fn the_hosts_example_shows_the_defaults() {
        let file = example("host.toml");
        let documented = host_config(Some(&file), &host_run(&[]).settings).unwrap();
        let shortest: host::Config = toml::from_str("migration_address = '10.82.0.11'").unwrap();
        assert_eq!(documented, shortest);
        every_key_is_documented::<host::Config>("host.toml", "");
    }

    /// The error for an unknown key lists the known ones: each stands in the example, set or commented.
    fn every_key_is_documented<T: DeserializeOwned>(name: &str, table: &str) {
        let text = std::fs::read_to_string(example(name)).unwrap();
        let Err(error) = toml::from_str::<T>(&format!("{table}no_such_key = 1")) else {
            panic!("{name}: an unknown key is accepted")
        };
        let keys: Vec<_> = error.message().split('`').skip(3).step_by(2).collect();
        assert!(keys.len() > 3, "{}", error.message());
        for key in keys {
            let is_set = |line: &str| {
                let line = line.trim_start_matches("# ");
                line.starts_with(&format!("{key} =")) || line == format!("[{key}]")
            };
            assert!(text.lines().any(is_set), "packaging/{name} does not document {key}");
        }
    }

    #[test]
    fn flags_win_over_the_file() {
        let file = example("manager.toml");
        let flags = ["--config", file.to_str().unwrap(), "--state", "/x", "--operator-listen", "127.0.0.1:1"];
        let config = manager_config(&manager_run(&flags)).unwrap();
        assert_eq!((config.state_folder, config.operator_listen.port()), (PathBuf::from("/x"), 1));
        let flags = ["--migration-address", "10.0.0.9", "--cgroup", "a/b", "--name", "host-z"];
        let config = host_config(Some(&example("host.toml")), &host_run(&flags).settings).unwrap();
        assert_eq!(config.migration_address.to_string(), "10.0.0.9");
        assert_eq!((config.cgroup.as_str(), config.name.unwrap().as_str()), ("a/b", "host-z"));
    }

    #[test]
    fn a_bad_flag_is_a_configuration_error() {
        let none = tempfile::NamedTempFile::new().unwrap();
        let file = none.path().to_str().unwrap();
        let error =
            manager_config(&manager_run(&["--config", file, "--operator-listen", "nowhere"])).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.problem().detail.contains("operator_listen"), "{}", error.problem().detail);
        let error = host_config(Some(none.path()), &host_run(&[]).settings).unwrap_err();
        assert!(error.problem().detail.contains("migration_address"), "{}", error.problem().detail);
    }
}
