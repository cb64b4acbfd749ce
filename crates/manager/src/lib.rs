//! The control manager daemon: it receives requests, decides, signs permits, watches, commits, remembers.
//!
//! | module | job |
//! |---|---|
//! | [`config`](Config) | configuration, strict |
//! | `authority` | state folder, CA, permit key, admin token |
//! | `policy` | Cedar, default deny |
//! | `http` | operators: HTTPS, JSON, events |
//! | `fleet` | hosts: join, attach, sessions |
//! | `hosts`, `vms`, `tokens` | records |
//! | `checkpoints`, `trust`, `restored` | what is signed of the audit log; whether the registry may be decided by; and how it may again |
//! | `leases` | which of several managers works on which migration |
//! | `migration` | from request to report; one reconciler per open migration |
//!
//! Architecture invariants: no hypervisor and no byte of a stream comes here. Every decision is one transaction with
//! its audit entry; effects come after it, from the row. A restarted manager does what the rows say.

mod anchor;
mod attestation;
pub mod audit_file;
mod authority;
pub mod backup;
pub mod bundle;
mod checkpoints;
mod clock;
mod config;
mod core;
mod feed;
mod fleet;
mod hosts;
mod http;
mod leases;
mod migration;
mod policy;
mod restored;
mod tokens;
mod trust;
mod vms;

pub use config::{Admission, Budgets, Config, Demanded};
pub use policy::table as policy_table;

use crate::anchor::Anchor;
use crate::authority::{Authority, StateFolder, admin_token, token_hash};
use crate::core::{Hurry, Manager, Ordered, Watch};
use crate::feed::Feed;
use crate::fleet::{Fleet, FleetService, HostConnection};
use crate::leases::Leases;
use crate::policy::Policy;
use crate::policy::shelf::Shelf;
use api::fleet::fleet_server::FleetServer;
use link::control::{HostListener, LinkError, OperatorListener};
use registry::{ApiToken, Registry};
use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use types::{ErrorCode, Problem};

/// How long open requests may take to end when the manager is told to.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(3);
/// How often old nonces are forgotten and the audit anchor is written down.
const HOUSEKEEPING_PERIOD: Duration = Duration::from_secs(10);
/// gRPC pings that find a host whose machine vanished.
const KEEPALIVE: Duration = Duration::from_secs(5);

/// A manager that listens.
#[derive(Debug, Clone)]
pub struct Running {
    /// Where operators connect.
    pub operators: SocketAddr,
    /// Where hosts connect.
    pub hosts: SocketAddr,
    /// Where the admin's token is.
    pub admin_token_file: PathBuf,
    /// Where the CA's certificate is.
    pub ca_file: PathBuf,
}

/// Runs the manager until `shutdown` resolves.
///
/// # Errors
/// Why it can't start, or stopped: a [`Problem`] with a stable code.
pub async fn run(config: Config, shutdown: impl Future<Output = ()> + Send) -> Result<(), Problem> {
    run_with(config, shutdown, |_| {}).await
}

/// As [`run`]; tells `listening` once both ports are open.
///
/// # Errors
/// As [`run`].
pub async fn run_with(
    config: Config,
    shutdown: impl Future<Output = ()> + Send,
    listening: impl FnOnce(&Running) + Send,
) -> Result<(), Problem> {
    config.validate()?;
    // Parsed before any port is bound: a manager with a bad policy does not start.
    let policy = match &config.policy_folder {
        Some(folder) => Policy::from_folder(folder)?,
        None => Policy::built_in()?,
    };
    let folder = StateFolder::open(&config.state_folder)?;
    let state = folder.path().to_owned();
    let (token, admin_token_file) = admin_token(&state)?;
    let authority = Authority::open(folder, &config)?;
    let database = config.database()?;
    let _database_lock = authority::lock_database(&database)?;
    let registry = Registry::open(&database).await?;
    admit_admin(&registry, &config, &token).await?;
    let policies = Shelf::open(policy, &registry).await?;
    let identity = authority.identity();
    let operators = OperatorListener::bind(config.operator_listen, identity.clone())
        .await
        .map_err(|e| cannot_listen(&e))?;
    let hosts = HostListener::bind(config.hosts_listen, identity, authority.ca())
        .await
        .map_err(|e| cannot_listen(&e))?;
    let advertised = config.advertised(hosts.local_address())?;
    let leases = match config.shares_registry() {
        true => Leases::shared(&registry, &config.name, &advertised).await?,
        false => Leases::alone(),
    };
    let running = Running {
        operators: operators.local_address(),
        hosts: hosts.local_address(),
        admin_token_file,
        ca_file: state.join("ca.pem"),
    };
    let manager = Arc::new(Manager {
        config,
        registry,
        authority,
        policies,
        fleet: Fleet::default(),
        feed: Feed::new(),
        watch: Watch::default(),
        hurry: Hurry::default(),
        ordered: Ordered::default(),
        leases,
        probes: migration::probe::History::default(),
        door: http::Doorkeeper::default(),
        looks: attestation::Looks::default(),
        challenges: attestation::enrolment::Challenges::default(),
        anchor: Anchor::open(&state),
        forgetful: trust::Trust::default(),
        started_us: clock::now_us(),
        advertised,
        shutdown: CancellationToken::new(),
        tasks: TaskTracker::new(),
    });
    recovered(&manager).await?;
    tracing::info!(
        operators = %running.operators, hosts = %running.hosts,
        admin_token = %running.admin_token_file.display(), "the manager is up"
    );
    listening(&running);
    serve(&manager, operators, hosts, shutdown).await
}

fn cannot_listen(error: &LinkError) -> Problem {
    let mut detail = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        detail.push_str(": ");
        detail.push_str(&inner.to_string());
        cause = inner.source();
    }
    Problem::new(error.error_code(), detail)
}

async fn admit_admin(registry: &Registry, config: &Config, token: &str) -> Result<(), Problem> {
    // Each manager makes its own admin token: that of one must not replace another's.
    let name = match config.shares_registry() {
        true => format!("admin-{}", config.name),
        false => "admin".to_owned(),
    };
    let admin = ApiToken { name, role: "admin".to_owned(), expires_at_us: None, tenants: None };
    let hash = token_hash(token);
    // Under the name of before, where the registry was moved to a server since.
    let held = registry.read("admin token").await?.api_token(&hash).await?;
    if held.is_some_and(|held| held.role == admin.role && held.expires_at_us.is_none()) {
        return Ok(());
    }
    let mut tx = registry.begin("admin token", clock::now_us()).await?;
    tx.put_api_token(&hash, &admin).await?;
    tx.audit("manager", "token.admin", &admin.name, serde_json::json!({ "role": "admin" })).await?;
    Ok(tx.commit().await?)
}

/// Looks at the audit log, then wakes every open migration: each goes on from its row.
async fn recovered(manager: &Arc<Manager>) -> Result<(), Problem> {
    let standing = trust::open(manager).await?;
    let mut tx = manager.registry.read("recover").await?;
    let verdict = tx.verify_audit(manager.anchor.of_generation(standing.generation)).await?;
    drop(tx);
    if let Some(why) = manager.anchor.contradicts(standing.generation, manager.config.shares_registry()) {
        migration::handover::distrust(manager, &why, None).await?;
    }
    match verdict {
        registry::AuditVerdict::Whole { .. } if standing.standing != registry::Standing::Trusted => {
            tracing::error!(
                "the registry is to be reconciled before it decides anything new: {}",
                standing.why
            );
            migration::handover::distrust(manager, &standing.why, None).await?;
        }
        registry::AuditVerdict::Whole { .. } if manager.forgetful.get().is_some() => {}
        registry::AuditVerdict::Whole { entries, head } => {
            manager.anchor.follow(standing.generation, entries, head);
        }
        registry::AuditVerdict::Broken { first_bad, detail, .. } => {
            // It goes on: VMs must be recoverable whatever was done to the log. But it decides nothing new.
            tracing::error!(first_bad, "the audit log is broken: {detail}");
            let why = format!("audit entry {first_bad}: {detail}");
            migration::handover::distrust(manager, &why, Some(first_bad)).await?;
        }
    }
    let open = manager.registry.read("recover").await?.open_migrations().await?.len();
    let mut tx = manager.begin("manager started").await?;
    let detail = serde_json::json!({ "version": env!("CARGO_PKG_VERSION"), "open_migrations": open });
    tx.audit(&manager.actor(), "manager.start", manager.config.name.as_str(), detail).await?;
    tx.commit().await?;
    manager.wake_all().await?;
    Ok(())
}

async fn serve(
    manager: &Arc<Manager>,
    operators: OperatorListener,
    hosts: HostListener,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), Problem> {
    let end = manager.shutdown.clone();
    let app = http::router(Arc::clone(manager)).into_make_service_with_connect_info::<http::CallerAddress>();
    let operators =
        axum::serve(http::Door(operators), app).with_graceful_shutdown(end.clone().cancelled_owned());
    let incoming = futures::stream::unfold(hosts, |mut listener| async move {
        let connection = listener.accept().await;
        Some((Ok::<_, std::io::Error>(HostConnection(connection)), listener))
    });
    let service = FleetServer::new(FleetService { manager: Arc::clone(manager) });
    let hosts = tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .serve_with_incoming_shutdown(service, incoming, end.clone().cancelled_owned());
    let operators = tokio::spawn(async move { operators.await });
    let hosts = tokio::spawn(hosts);
    let keeper = Arc::clone(manager);
    let housekeeping = tokio::spawn(async move { keep_house(&keeper).await });

    let superseded = tokio::select! {
        () = shutdown => false,
        () = manager.leases.superseded() => true,
    };
    tracing::info!("the manager ends");
    end.cancel();
    manager.fleet.close_all();
    manager.tasks.close();
    let orderly = async {
        let (operators, hosts) = tokio::join!(operators, hosts);
        manager.tasks.wait().await;
        let failed =
            |e: &dyn std::fmt::Display| Problem::new(ErrorCode::Internal, format!("a server failed: {e}"));
        operators.map_err(|e| failed(&e))?.map_err(|e| failed(&e))?;
        hosts.map_err(|e| failed(&e))?.map_err(|e| failed(&e))
    };
    let ended = tokio::time::timeout(SHUTDOWN_LIMIT, orderly).await;
    housekeeping.abort();
    leases::release(manager).await;
    note_anchor(manager).await;
    manager.registry.close().await;
    if superseded {
        return Err(leases::superseded(&manager.config.name));
    }
    // Connections that do not end are cut: nothing of theirs is half done, since every decision is a transaction.
    ended.unwrap_or(Ok(()))
}

async fn keep_house(manager: &Arc<Manager>) {
    let fresh = manager.authority.keep_fresh(&manager.config);
    let sweep = async {
        loop {
            tokio::time::sleep(HOUSEKEEPING_PERIOD).await;
            note_anchor(manager).await;
            checkpoints::tell_all(manager).await;
            let before_us = clock::now_us() - migration::request::NONCE_MEMORY_US;
            let swept = async {
                let mut tx = manager.begin("sweep nonces").await?;
                tx.sweep_nonces(before_us).await?;
                tx.commit().await
            };
            if let Err(error) = swept.await {
                tracing::warn!("cannot forget old nonces: {error}");
            }
        }
    };
    tokio::join!(fresh, sweep, leases::watch(manager));
}

/// An older state of the database stands where the manager's own was, and it went on running: a server that was restored, or
/// a replica that lagged behind and was put in its place.
async fn set_back(manager: &Manager) {
    let why = "the audit log lacks an entry that this manager has seen in it";
    tracing::error!("the registry was set back: {why}");
    let first_bad = manager.anchor.get().map(|(sequence, _)| sequence);
    if let Err(problem) = migration::handover::distrust(manager, why, first_bad).await {
        tracing::error!("cannot say so in the registry: {problem}");
    }
}

async fn note_anchor(manager: &Manager) {
    // What proves that the registry was set back must not be overtaken by what is appended to it since.
    if manager.forgetful.get().is_some() {
        return trust::look_again(manager).await;
    }
    let looked = async {
        let mut tx = manager.registry.read("anchor").await?;
        let held = match manager.anchor.get() {
            Some((sequence, hash)) => tx.audit_holds(sequence, hash).await?,
            None => true,
        };
        if let Some(row) = tx.audit_log().await? {
            // Another manager may have found out.
            manager.forgetful.follow(&row);
        }
        Ok::<_, registry::RegistryError>((held, tx.audit_head().await?))
    };
    match looked.await {
        Ok((true, (sequence, hash))) if sequence > 0 => manager.anchor.advance(sequence, hash),
        Ok((true, _)) => {}
        Ok((false, _)) => return set_back(manager).await,
        Err(error) => tracing::warn!("cannot read the audit head: {error}"),
    }
    if let Err(problem) = manager.anchor.keep() {
        tracing::warn!("{problem}");
    }
}
