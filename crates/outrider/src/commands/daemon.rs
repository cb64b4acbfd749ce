//! `manager run`, `host run`, `host join`: configuration, logging, signals, and the daemon itself.

use super::{DONE, Outcome};
use crate::args::{Format, HostJoin, HostRun, Log, LogFormat, ManagerRun};
use crate::config::{ConfigError, load_table};
use crate::error::Error;
use crate::output;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;
use types::{ErrorCode, Problem};

const MANAGER_FILE: &str = "/etc/outrider/manager.toml";

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
    file.set("state", text(args.state.as_ref()));
    file.set("name", args.name.clone());
    file.set("operator_listen", args.operator_listen.clone());
    file.set("hosts_listen", args.hosts_listen.clone());
    file.set("hosts_advertise", args.hosts_advertise.clone());
    let config: manager::Config = file.parse()?;
    config.validate().map_err(Error::Daemon)?;
    Ok(config)
}

fn text(path: Option<&PathBuf>) -> Option<String> {
    path.map(|p| p.display().to_string())
}

fn not_built_in() -> Outcome {
    Err(Error::Daemon(Problem::new(
        ErrorCode::Internal,
        "this build of outrider contains no host daemon yet",
    )))
}

pub(super) fn run_host(_args: &HostRun) -> Outcome {
    not_built_in()
}

pub(super) fn join(_args: &HostJoin, _format: Format) -> Outcome {
    not_built_in()
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
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|source| Error::Start { act: "start the asynchronous runtime", source })?
        .block_on(async {
            let shutdown = shutdown().map_err(|source| Error::Start { act: "watch for signals", source })?;
            daemon(shutdown).await.map_err(Error::Daemon)
        })?;
    Ok(DONE)
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
