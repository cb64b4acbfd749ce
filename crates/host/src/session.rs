//! The session with the manager: one stream that this host dials, again and again while there is none. Without it the
//! VMs run on, and a hand-over goes as far as its rules allow.

use crate::config::Config;
use crate::daemon::{Daemon, lock, now_unix_s};
use crate::error::chain;
use crate::identity::{HostIdentity, IdentityFolder};
use crate::join::{chain_pem, joined};
use crate::load::LoadMeter;
use crate::migration::registry::Migrations;
use crate::orders::Orders;
use crate::rpc::{client, interfaces, link_problem, status_problem};
use crate::vms::record::Phase;
use api::fleet::fleet_client::FleetClient;
use api::fleet::{Heartbeat, Hello, JoinRequest, RunningVm, ToManager, Welcome, to_host, to_manager};
use link::control::connect_manager;
use link::identity::{IdentityKey, LiveIdentity, TlsIdentity};
use permit::VerifyingKey;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::sync::{mpsc, watch};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use types::{ErrorCode, Problem};

/// Between two tries to reach the manager: an outage must cost seconds, and a fleet must not hammer.
const RETRY_MIN: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(2);
/// Messages between the outbox and the stream.
const STREAM_MESSAGES: usize = 64;
/// A manager that takes longer to greet is no use.
const WELCOME_TIMEOUT: Duration = Duration::from_secs(10);
/// Heartbeats until the manager says how often it wants them.
const HEARTBEAT_DEFAULT: Duration = Duration::from_secs(1);
/// A manager that takes longer to issue a certificate is asked again at the next look.
const RENEWAL_TIMEOUT: Duration = Duration::from_secs(5);
/// How often the expiry of the certificate is looked at.
const RENEWAL_CHECK: Duration = Duration::from_secs(60);

/// Keeps a session.
#[derive(Debug)]
pub struct SessionKeeper {
    daemon: Arc<Daemon>,
    identity: HostIdentity,
    renewer: Renewer,
    /// One at a time, also across sessions: two would mix their files.
    renewal: Option<tokio::task::JoinHandle<()>>,
    manager: String,
    meter: LoadMeter,
    migrations: Arc<Migrations>,
    orders: Orders,
}

impl SessionKeeper {
    /// For a host that has joined.
    #[must_use]
    pub fn new(
        daemon: Arc<Daemon>,
        identity: HostIdentity,
        config: &Config,
        meter: LoadMeter,
        migrations: Arc<Migrations>,
    ) -> Self {
        let manager = config.manager.clone().unwrap_or_else(|| identity.joined.manager.clone());
        let orders = Orders::new(daemon.clone(), migrations.clone(), meter.clone());
        let renewer = Renewer {
            daemon: daemon.clone(),
            tls: identity.tls.clone(),
            ca_pem: identity.ca.pem().to_owned(),
            folder: IdentityFolder::new(&config.state_folder),
            manager: manager.clone(),
        };
        Self { daemon, identity, renewer, renewal: None, manager, meter, migrations, orders }
    }

    /// Connects, serves, and connects again; never ends.
    pub async fn keep(mut self) {
        let mut pause = RETRY_MIN;
        loop {
            let began = tokio::time::Instant::now();
            let problem = match self.serve().await {
                Ok(()) => Problem::new(ErrorCode::ManagerUnreachable, "the manager closed the session"),
                Err(problem) => problem,
            };
            tracing::warn!(manager = self.manager, %problem, "no manager; the VMs run on");
            if began.elapsed() > RETRY_MAX {
                pause = RETRY_MIN;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY_MAX);
        }
    }

    /// One session, from the connection to its end.
    async fn serve(&mut self) -> Result<(), Problem> {
        let key = self.identity.tls.current().key_digest();
        let connection = connect_manager(&self.manager, &self.identity.tls, &self.identity.ca)
            .await
            .map_err(|e| link_problem(&e))?;
        if self.identity.tls.current().key_digest() != key {
            return Err(Problem::new(ErrorCode::ManagerUnreachable, "the certificate was renewed meanwhile"));
        }
        self.orders.connected_with(key);
        let mut client = client(connection).await?;
        self.daemon.outbox.forget_replies();
        let (sender, receiver) = mpsc::channel(STREAM_MESSAGES);
        let hello = to_manager::Body::Hello(self.hello().await?);
        sender.try_send(ToManager { body: Some(hello) }).ok();
        let attach = client.attach(ReceiverStream::new(receiver));
        let mut incoming = tokio::time::timeout(WELCOME_TIMEOUT, attach)
            .await
            .map_err(|_| Problem::new(ErrorCode::ManagerUnreachable, "the manager does not greet"))?
            .map_err(|status| status_problem(&status))?
            .into_inner();
        let (periods, period) = watch::channel((HEARTBEAT_DEFAULT, HEARTBEAT_DEFAULT));
        let pump = pump(self.daemon.clone(), self.migrations.clone(), self.meter.clone(), sender, period);
        let mut pump = std::pin::pin!(pump);
        // At once, then now and then.
        let mut renewal = tokio::time::interval(RENEWAL_CHECK);
        loop {
            let message = tokio::select! {
                () = &mut pump => return Ok(()),
                _ = renewal.tick() => {
                    self.renew_when_due(&client);
                    continue;
                }
                message = incoming.next() => message,
            };
            match message {
                None => return Ok(()),
                Some(Err(status)) => return Err(status_problem(&status)),
                Some(Ok(order)) => match order.body {
                    Some(to_host::Body::Welcome(welcome)) => self.welcomed(&welcome, &periods),
                    Some(body) => self.orders.take(order.id, body),
                    // From a newer manager: said to be so, if it awaits an answer.
                    None => self.orders.not_understood(order.id),
                },
            }
        }
    }

    async fn hello(&self) -> Result<Hello, Problem> {
        let journal = lock(&self.daemon.journal).id().to_string();
        Ok(Hello {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            boot_id: crate::process::boot_id(),
            journal,
            signing_key: self.daemon.key.verifying_key().as_bytes().to_vec(),
            interfaces: interfaces().await?,
            vms: self.running_vms(),
            // The machines repeat what they have to say as soon as the manager has greeted.
            open_statements: Vec::new(),
            checkpoint: self.daemon.checkpoints.token(),
            checkpoint_refused: self.daemon.checkpoints.contradiction().unwrap_or_default(),
        })
    }

    fn running_vms(&self) -> Vec<RunningVm> {
        let row = |instance: Arc<crate::vms::instance::Instance>| {
            let record = instance.record();
            let state = match record.phase {
                _ if instance.freezer().is_frozen() => "frozen",
                Phase::Incoming { .. } | Phase::Starting => "incoming",
                Phase::Running => "running",
            };
            RunningVm {
                vm: record.spec.uuid.to_string(),
                epoch: record.epoch.0,
                state: state.to_owned(),
                machine: record.machine,
            }
        };
        self.daemon.vms.all().into_iter().map(row).collect()
    }

    fn welcomed(&self, welcome: &Welcome, periods: &watch::Sender<(Duration, Duration)>) {
        tracing::info!(manager = welcome.manager, "attached");
        for key in &welcome.permit_keys {
            let taken = VerifyingKey::from_bytes(&key.public_key)
                .is_ok_and(|verifying| lock(&self.daemon.permit_keys).insert(&key.key_id, verifying));
            if !taken {
                tracing::warn!(key_id = key.key_id, "a permit key of the manager is not usable");
            }
        }
        let seconds = |s: u32| Duration::from_secs(u64::from(s.clamp(1, 60)));
        periods.send_replace((seconds(welcome.heartbeat_idle_s), seconds(welcome.heartbeat_migrating_s)));
        self.migrations.manager_contact();
    }

    /// A certificate whose half-life is over is exchanged for a fresh one, on the strength of the old; beside the
    /// session, whose orders and votes do not wait for it.
    fn renew_when_due(&mut self, client: &FleetClient<Channel>) {
        let under_way = self.renewal.as_ref().is_some_and(|task| !task.is_finished());
        if under_way || !self.identity.tls.current().needs_renewal(SystemTime::now()) {
            return;
        }
        let (renewer, mut client) = (self.renewer.clone(), client.clone());
        self.renewal = Some(tokio::spawn(async move {
            match renewer.renew(&mut client).await {
                Ok(()) => tracing::info!("certificate renewed"),
                Err(problem) => tracing::warn!(%problem, "the certificate could not be renewed"),
            }
        }));
    }
}

/// What a renewal needs.
#[derive(Debug, Clone)]
struct Renewer {
    daemon: Arc<Daemon>,
    tls: LiveIdentity,
    ca_pem: String,
    folder: IdentityFolder,
    manager: String,
}

impl Renewer {
    async fn renew(&self, client: &mut FleetClient<Channel>) -> Result<(), Problem> {
        let internal = |text: String| Problem::new(ErrorCode::Internal, text);
        let key = IdentityKey::generate().map_err(|e| internal(chain(&e)))?;
        let journal = lock(&self.daemon.journal).id().to_string();
        let request = JoinRequest {
            host: self.daemon.name.to_string(),
            token_secret: String::new(),
            csr_der: key.signing_request().map_err(|e| internal(chain(&e)))?,
            signing_key: self.daemon.key.verifying_key().as_bytes().to_vec(),
            journal,
            interfaces: interfaces().await?,
            tpm: None,
        };
        let reply = tokio::time::timeout(RENEWAL_TIMEOUT, client.join(request))
            .await
            .map_err(|_| Problem::new(ErrorCode::ManagerUnreachable, "the manager issues no certificate"))?
            .map_err(|s| status_problem(&s))?
            .into_inner();
        let chain_pem = chain_pem(&reply);
        let renewed = TlsIdentity::from_pem(&chain_pem, &key.to_pem()).map_err(|e| internal(chain(&e)))?;
        let joined = joined(&self.daemon.name, self.manager.clone(), &reply);
        self.folder.store(&joined, &key, &chain_pem, &self.ca_pem)?;
        self.tls.replace(renewed).map_err(|e| internal(chain(&e)))
    }
}

/// From the outbox into the stream, with heartbeats in between; ends when the stream does.
async fn pump(
    daemon: Arc<Daemon>,
    migrations: Arc<Migrations>,
    meter: LoadMeter,
    stream: mpsc::Sender<ToManager>,
    mut periods: watch::Receiver<(Duration, Duration)>,
) {
    let mut sequence = 0;
    let mut last = tokio::time::Instant::now();
    loop {
        let (idle, migrating) = *periods.borrow();
        let period = if migrations.any_open() { migrating } else { idle };
        let due = last + period;
        // Looked at every second, so that an opened migration makes the next one come sooner.
        let look = due.min(tokio::time::Instant::now() + Duration::from_secs(1));
        tokio::select! {
            message = daemon.outbox.next() => {
                if let Err(unsent) = stream.send(message).await {
                    daemon.outbox.put_back(unsent.0);
                    return;
                }
            }
            () = tokio::time::sleep_until(look) => {
                if tokio::time::Instant::now() < due {
                    continue;
                }
                sequence += 1;
                last = tokio::time::Instant::now();
                let load_json = serde_json::to_string(&meter.load_with(&daemon.vms)).unwrap_or_default();
                let beat = to_manager::Body::Heartbeat(Heartbeat { sequence, load_json });
                if stream.send(ToManager { body: Some(beat) }).await.is_err() {
                    return;
                }
            }
            changed = periods.changed() => {
                if changed.is_err() {
                    return;
                }
            }
        }
    }
}

/// When a certificate that is near its end could not be renewed, the host says so before it is locked out.
#[must_use]
pub fn certificate_warning(identity: &HostIdentity) -> Option<String> {
    let end = identity.tls.current().not_after();
    let end_s = end.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    (end_s <= now_unix_s())
        .then(|| "this host's certificate has expired; join again with a new token".to_owned())
}
