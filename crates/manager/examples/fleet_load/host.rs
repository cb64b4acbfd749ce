//! A host without hypervisors: it attaches, sends heartbeats, and answers what a decision asks.

use crate::platform::Platform;
use api::fleet::fleet_client::FleetClient;
use api::fleet::reply::Result as Outcome;
use api::fleet::{
    AgentReady, Done, Error, Heartbeat, Hello, Hypervisor, Inspected, Interface, LoadReply, Probed, Quoted,
    Reply, RunningVm, SignedStatement, ToHost, ToManager, to_host, to_manager,
};
use attest::{Binding, Purpose};
use hyper_util::rt::TokioIo;
use link::ca::CaCertificate;
use link::control::connect_manager;
use link::identity::{LiveIdentity, TlsIdentity};
use permit::{KeyRing, PermitToken, SigningKey, VerifyingKey};
use serde_json::json;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use types::handover::{MigrationRequest, Renunciation, Statement};
use types::permit::PermitClaims;
use types::{Digest, HostName, MigrationId, Nonce, Side};

/// As daemons do.
const HEARTBEAT: Duration = Duration::from_secs(10);

pub(crate) fn now_us() -> i64 {
    i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros()).unwrap()
}

pub(crate) fn mac(n: u64) -> String {
    let [.., a, b, c] = n.to_be_bytes();
    format!("02:00:00:{a:02x}:{b:02x}:{c:02x}")
}

fn random() -> [u8; 16] {
    let mut bytes = [0; 16];
    aws_lc_rs::rand::fill(&mut bytes).unwrap();
    bytes
}

/// What a host has since it joined.
pub(crate) struct Identity {
    pub(crate) signing: SigningKey,
    pub(crate) journal: Nonce,
    tls: LiveIdentity,
}

impl Identity {
    pub(crate) fn new(n: u64, chain_pem: &str, key_pem: &str) -> Self {
        let mut journal = [9; 16];
        journal[..8].copy_from_slice(&n.to_le_bytes());
        Self {
            signing: SigningKey::generate().unwrap(),
            journal: Nonce::from_bytes(journal),
            tls: LiveIdentity::new(TlsIdentity::from_pem(chain_pem, key_pem).unwrap()),
        }
    }
}

pub(crate) struct LoadHost {
    n: u64,
    name: HostName,
    identity: Identity,
    platform: Arc<Platform>,
    vms: Vec<RunningVm>,
    outbox: mpsc::Sender<ToManager>,
    attached: watch::Sender<bool>,
    permit_keys: Mutex<KeyRing>,
    /// Permits that it was shown, by migration.
    shown: Mutex<BTreeMap<MigrationId, (PermitClaims, Digest)>>,
    /// Keys of the VM agents that it "spawned".
    agents: Mutex<BTreeMap<(MigrationId, Side), Vec<u8>>>,
}

impl LoadHost {
    pub(crate) fn attach(
        n: u64,
        identity: Identity,
        vms: Vec<RunningVm>,
        (ca, port): (CaCertificate, SocketAddr),
        platform: Arc<Platform>,
        connecting: Arc<Semaphore>,
    ) -> Arc<Self> {
        let (outbox, messages) = mpsc::channel(64);
        let host = Arc::new(Self {
            n,
            name: format!("host-{n}").parse().unwrap(),
            identity,
            platform,
            vms,
            outbox,
            attached: watch::Sender::new(false),
            permit_keys: Mutex::default(),
            shown: Mutex::default(),
            agents: Mutex::default(),
        });
        let own = Arc::clone(&host);
        tokio::spawn(async move { own.serve(ca, port, messages, connecting).await });
        host
    }

    pub(crate) async fn attached(&self) {
        self.attached.subscribe().wait_for(|attached| *attached).await.unwrap();
    }

    pub(crate) fn is_attached(&self) -> bool {
        *self.attached.borrow()
    }

    async fn serve(
        self: Arc<Self>,
        ca: CaCertificate,
        port: SocketAddr,
        messages: mpsc::Receiver<ToManager>,
        connecting: Arc<Semaphore>,
    ) {
        self.send(to_manager::Body::Hello(self.hello())).await;
        let place = connecting.acquire().await.unwrap();
        let channel = self.connect(&ca, port).await;
        let attach = FleetClient::new(channel).attach(ReceiverStream::new(messages)).await;
        let mut orders = attach.unwrap().into_inner();
        drop(place);
        // Spread, as those of real hosts are.
        let first = Duration::from_millis(self.n * 7_919 % 10_000);
        let mut beats = tokio::time::interval_at(tokio::time::Instant::now() + first, HEARTBEAT);
        let mut sequence = 0;
        loop {
            tokio::select! {
                order = orders.message() => match order {
                    Ok(Some(order)) => drop(tokio::spawn(Arc::clone(&self).obey(order))),
                    // Lost, which the count at the end shows.
                    _ => break,
                },
                _ = beats.tick() => {
                    sequence += 1;
                    self.send(to_manager::Body::Heartbeat(Heartbeat { sequence, load_json: self.load() })).await;
                }
            }
        }
        self.attached.send_replace(false);
    }

    async fn connect(&self, ca: &CaCertificate, port: SocketAddr) -> Channel {
        loop {
            let (tls, ca) = (self.identity.tls.clone(), ca.clone());
            let connector = tower::service_fn(move |_| {
                let (tls, ca) = (tls.clone(), ca.clone());
                async move {
                    let connection = connect_manager(&port.to_string(), &tls, &ca).await;
                    connection.map(TokioIo::new).map_err(std::io::Error::other)
                }
            });
            if let Ok(channel) =
                Endpoint::from_static("http://manager").connect_with_connector(connector).await
            {
                return channel;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn hello(&self) -> Hello {
        let addresses = vec!["127.0.0.1".to_owned(), "10.7.0.1".to_owned()];
        Hello {
            version: "load".to_owned(),
            boot_id: String::new(),
            journal: self.identity.journal.to_string(),
            signing_key: self.identity.signing.verifying_key().as_bytes().to_vec(),
            interfaces: vec![Interface { name: "eth0".to_owned(), mac: mac(self.n), addresses }],
            vms: self.vms.clone(),
            open_statements: Vec::new(),
            ..Hello::default()
        }
    }

    async fn send(&self, body: to_manager::Body) {
        self.outbox.send(ToManager { body: Some(body) }).await.unwrap();
    }

    async fn state(&self, statement: &Statement) {
        let signed = permit::statement::sign(&self.identity.signing, statement).unwrap();
        self.send(to_manager::Body::Statement(SignedStatement { token: signed.as_bytes().to_vec() })).await;
    }

    async fn obey(self: Arc<Self>, order: ToHost) {
        let Some(body) = order.body else { return };
        let outcome = self.carry_out(body).await;
        if order.id != 0 {
            self.send(to_manager::Body::Reply(Reply { id: order.id, result: Some(outcome) })).await;
        }
    }

    async fn carry_out(&self, body: to_host::Body) -> Outcome {
        use to_host::Body as B;
        match body {
            B::Welcome(welcome) => {
                for key in welcome.permit_keys {
                    let verifying = VerifyingKey::from_bytes(&key.public_key).unwrap();
                    assert!(self.permit_keys.lock().unwrap().insert(&key.key_id, verifying));
                }
                self.attached.send_replace(true);
            }
            B::QueryLoad(_) => return Outcome::Load(LoadReply { load_json: self.load() }),
            B::DescribeHypervisor(_) => {
                let abilities = json!({
                    "hypervisor": "qemu/10.0.2", "machines": ["pc-q35-10.0"], "cpu_models": ["qemu64"],
                    "cpu_features": ["fpu"],
                });
                return Outcome::Hypervisor(Hypervisor { abilities_json: abilities.to_string() });
            }
            B::MicroProbe(_) => {
                let probe = json!({
                    "touched_bytes": 32 << 20, "touch_us": 20_000, "work_units": 5_000, "work_us": 5_000, "cpu_us": 4_900,
                });
                return Outcome::Probed(Probed { probe_json: probe.to_string() });
            }
            B::InspectVm(_) => {
                let catalogue = json!({ "hypervisor": "qemu/10.0.2", "machine": "pc-q35-10.0", "layouts": [], "sections": [] });
                return Outcome::Inspected(Inspected {
                    catalogue_json: catalogue.to_string(),
                    ..Inspected::default()
                });
            }
            B::SpawnAgent(order) => {
                let spki = SigningKey::generate().unwrap().verifying_key().to_spki_der();
                let side = if order.side == "source" { Side::Source } else { Side::Target };
                self.agents.lock().unwrap().insert((order.migration.parse().unwrap(), side), spki.clone());
                return Outcome::Agent(AgentReady { spki_der: spki, sandbox: "load".to_owned() });
            }
            B::Quote(order) => return self.quote(&order),
            B::Intent(order) => {
                self.state(&Statement::Request(MigrationRequest {
                    vm: order.vm.parse().unwrap(),
                    source: self.name.clone(),
                    target: order.target.parse().unwrap(),
                    nonce: Nonce::from_bytes(random()),
                    timestamp_unix_ms: u64::try_from(now_us() / 1_000).unwrap(),
                    intent: order.intent,
                }))
                .await;
            }
            B::Prepare(order) => {
                let token = PermitToken::from_bytes(order.permit).unwrap();
                let keys = self.permit_keys.lock().unwrap().clone();
                let verified =
                    permit::verify(&token, &keys, u64::try_from(now_us() / 1_000_000).unwrap(), 5).unwrap();
                let held = (verified.claims().clone(), verified.digest());
                self.shown.lock().unwrap().insert(held.0.key.migration, held);
                return error("target-failed", "a target of the load generator never prepares");
            }
            B::Abort(order) => return self.renounce(&order.key_json).await,
            B::Void(order) => return self.renounce(&order.key_json).await,
            B::Forget(order) => {
                let id: MigrationId = order.migration.parse().unwrap();
                self.shown.lock().unwrap().remove(&id);
                self.agents.lock().unwrap().retain(|(held, _), _| *held != id);
            }
            _ => {}
        }
        Outcome::Done(Done {})
    }

    fn load(&self) -> String {
        let running: Vec<&str> = self.vms.iter().map(|vm| vm.vm.as_str()).collect();
        json!({
            "scope": "load", "memory_used_bytes": 0, "memory_available_bytes": 1_u64 << 40, "cpu_cores_used": 0.0,
            "cpu_cores": 64.0, "cpu_pressure_percent": 0.0, "memory_pressure_percent": 0.0,
            "memory_full_pressure_percent": 0.0, "vms": running.len(), "running": running,
            "link": {
                "interface": "eth0", "received_bytes_per_s": 0.0, "sent_bytes_per_s": 0.0,
                "capacity_bytes_per_s": null,
            },
        })
        .to_string()
    }

    fn quote(&self, order: &api::fleet::Quote) -> Outcome {
        let purpose = match order.migration.as_str() {
            "" => Purpose::HostCheck,
            id => {
                let (id, side) =
                    (id.parse().unwrap(), if order.side == "source" { Side::Source } else { Side::Target });
                let Some(spki) = self.agents.lock().unwrap().get(&(id, side)).cloned() else {
                    return error("wrong-state", "no agent");
                };
                Purpose::Migration { migration: id, side, agent_spki: Digest::of(&spki) }
            }
        };
        let binding = Binding {
            nonce: order.nonce.parse().unwrap(),
            purpose,
            host: format!("spiffe://outrider/host/{}", self.name).try_into().unwrap(),
            host_spki: self.identity.tls.current().key_digest(),
        };
        let selection = serde_json::from_str(&order.selection_json).unwrap();
        Outcome::Quoted(Quoted { evidence: self.platform.evidence(&selection, &binding) })
    }

    /// The target gives up, as a daemon that failed to prepare does.
    async fn renounce(&self, key_json: &str) -> Outcome {
        let key: types::HandoverKey = serde_json::from_str(key_json).unwrap();
        let held = self.shown.lock().unwrap().get(&key.migration).cloned();
        let Some((claims, permit)) = held.filter(|(claims, _)| claims.target.host == self.name) else {
            return error("unknown-migration", "no record");
        };
        self.state(&Statement::Renounced(Renunciation {
            key: claims.key,
            permit,
            source: claims.source.host,
            target: claims.target.host,
            journal: self.identity.journal,
        }))
        .await;
        Outcome::Done(Done {})
    }
}

fn error(code: &str, detail: &str) -> Outcome {
    Outcome::Error(Error { code: code.to_owned(), detail: detail.to_owned(), hint: String::new() })
}
