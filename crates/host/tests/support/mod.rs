//! A small manager for the tests: joins hosts, signs permits, decides with `engine::handover::decider`. It keeps rows
//! in memory; what it is told to hold back it holds back.
#![allow(clippy::unwrap_used, missing_docs, dead_code, unreachable_pub)]

pub mod host;

use api::fleet::fleet_server::{Fleet, FleetServer};
use api::fleet::{self, ToHost, ToManager, to_host, to_manager};
use base64::Engine;
use engine::handover::decider::{self, Event, HandoverRow, Order};
use engine::handover::{Attempt, RenunciationProof, Resolution, source, target};
use futures::Stream;
use link::ca::{Ca, Subject};
use link::control::{HostListener, TlsConn};
use link::identity::{IdentityKey, LiveIdentity, TlsIdentity};
use permit::{JoinToken, SignedStatement, SigningKey, VerifyingKey};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{Notify, mpsc, oneshot};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;
use tonic::{Request, Response, Status, Streaming};
use types::handover::{AbortReason, HandoverKey, PriorRunState, Statement};
use types::inventory::Inventory;
use types::permit::{HostPart, PermitClaims, StreamFeatures};
use types::vm::VmSpec;
use types::{Digest, Epoch, ErrorCode, HostName, MigrationId, Nonce, Side, VmId};

pub const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Default)]
pub struct World {
    sessions: BTreeMap<String, mpsc::Sender<Result<ToHost, Status>>>,
    keys: BTreeMap<String, (Vec<u8>, String)>,
    /// Digests of the TLS keys of hosts.
    tls_keys: BTreeMap<String, Digest>,
    replies: BTreeMap<u64, oneshot::Sender<fleet::reply::Result>>,
    next_id: u64,
    pub rows: BTreeMap<MigrationId, HandoverRow>,
    pub requests: Vec<Statement>,
    pub events: Vec<(String, String, String, serde_json::Value)>,
    pub vm_events: Vec<(String, String)>,
    pub hellos: Vec<(String, fleet::Hello)>,
    pub certificate_life: Option<Duration>,
    pub renewals: u32,
    /// Asks for a renewal are taken and never answered.
    pub renewals_stall: bool,
    farewells: BTreeMap<MigrationId, u32>,
    /// Kinds of orders that are held back.
    pub hold: Vec<&'static str>,
    /// Of permits; `strict` when not set.
    pub profile: Option<&'static str>,
    /// Statements from daemons are lost.
    pub deaf: bool,
    /// What permits allow.
    pub features: StreamFeatures,
}

#[derive(Clone)]
pub struct Manager {
    pub world: Arc<Mutex<World>>,
    changed: Arc<Notify>,
    ca: Arc<Ca>,
    permit_key: Arc<SigningKey>,
    pub address: SocketAddr,
}

struct Conn(TlsConn);

impl Connected for Conn {
    type ConnectInfo = Option<String>;
    fn connect_info(&self) -> Self::ConnectInfo {
        self.0.peer().map(|p| p.name.to_string())
    }
}
impl AsyncRead for Conn {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        b: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, b)
    }
}
impl AsyncWrite for Conn {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, b: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, b)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

fn random() -> [u8; 16] {
    let mut bytes = [0; 16];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).unwrap();
    bytes
}

fn ders(pem: &str) -> Vec<Vec<u8>> {
    pem.split("-----BEGIN CERTIFICATE-----")
        .skip(1)
        .map(|part| {
            let body: String =
                part.split("-----END").next().unwrap().chars().filter(|c| !c.is_whitespace()).collect();
            base64::engine::general_purpose::STANDARD.decode(body).unwrap()
        })
        .collect()
}

impl Manager {
    pub async fn start(folder: &std::path::Path) -> Self {
        let domain = "test.example".parse().unwrap();
        let ca = Ca::load_or_create(folder, &domain, SystemTime::now()).unwrap();
        let key = IdentityKey::generate().unwrap();
        let name = "manager-1".parse().unwrap();
        let issued = ca
            .issue(&Subject::manager(&name, &[], &[]), &key.signing_request().unwrap(), SystemTime::now())
            .unwrap();
        let identity = LiveIdentity::new(TlsIdentity::from_pem(&issued.chain_pem, &key.to_pem()).unwrap());
        let listener =
            HostListener::bind("127.0.0.1:0".parse().unwrap(), identity, ca.certificate()).await.unwrap();
        let manager = Self {
            world: Arc::default(),
            changed: Arc::default(),
            ca: Arc::new(ca),
            permit_key: Arc::new(SigningKey::generate().unwrap()),
            address: listener.local_address(),
        };
        let incoming = futures::stream::unfold(listener, |mut listener| async move {
            Some((Ok::<_, std::io::Error>(Conn(listener.accept().await)), listener))
        });
        let service = FleetServer::new(Service(manager.clone()));
        tokio::spawn(tonic::transport::Server::builder().add_service(service).serve_with_incoming(incoming));
        let again = manager.clone();
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(Duration::from_millis(300)).await;
                let due = {
                    let mut world = again.world.lock().unwrap();
                    let world = &mut *world;
                    // As the real one: a hand-over that has ended is told so for a while.
                    let mut due: Vec<_> = world.rows.keys().copied().collect();
                    due.retain(|id| {
                        let told = world.farewells.entry(*id).or_default();
                        *told += u32::from(world.rows[id].is_final());
                        *told < 20
                    });
                    due
                };
                due.into_iter().for_each(|id| again.send_orders(id));
            }
        });
        manager
    }

    pub fn token(&self, host: &str) -> String {
        let token = JoinToken::generate(
            &self.address.to_string(),
            self.ca.certificate().fingerprint(),
            host.parse().unwrap(),
        );
        token.unwrap().to_text().unwrap().to_string()
    }

    /// Waits until `holds`; says what is there when it does not come.
    pub async fn until<T>(&self, what: &str, mut holds: impl FnMut(&mut World) -> Option<T>) -> T {
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            let changed = self.changed.notified();
            if let Some(found) = holds(&mut self.world.lock().unwrap()) {
                return found;
            }
            if tokio::time::timeout_at(deadline, changed).await.is_err() {
                let world = self.world.lock().unwrap();
                let states: Vec<_> = world.rows.values().map(|r| format!("{:?}", r.state)).collect();
                panic!("never: {what}\nrows {states:#?}\nevents {:#?}", world.events);
            }
        }
    }

    pub async fn attached(&self, host: &str) {
        self.until("attached", |w| w.sessions.get(host).filter(|s| !s.is_closed()).map(|_| ())).await;
    }

    pub async fn order(&self, host: &str, body: to_host::Body) -> Result<fleet::reply::Result, fleet::Error> {
        self.attached(host).await;
        let (sender, answer) = oneshot::channel();
        let (session, id) = {
            let mut world = self.world.lock().unwrap();
            world.next_id += 1;
            let id = world.next_id;
            world.replies.insert(id, sender);
            (world.sessions[host].clone(), id)
        };
        session.send(Ok(ToHost { id, body: Some(body) })).await.unwrap();
        match tokio::time::timeout(PATIENCE, answer).await.expect("an answer in time").unwrap() {
            fleet::reply::Result::Error(error) => Err(error),
            other => Ok(other),
        }
    }

    pub async fn start_vm(&self, host: &str, spec: &VmSpec, epoch: u64) -> Inventory {
        let spec_json = serde_json::to_string(spec).unwrap();
        let started = self.order(host, to_host::Body::StartVm(fleet::StartVm { spec_json, epoch })).await;
        match started.unwrap() {
            fleet::reply::Result::Started(started) => serde_json::from_str(&started.inventory_json).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    pub async fn agent(
        &self,
        host: &str,
        migration: MigrationId,
        vm: VmId,
        side: Side,
    ) -> Result<Vec<u8>, fleet::Error> {
        let (migration, side, vm) = (migration.to_string(), side.to_string(), vm.to_string());
        match self.order(host, to_host::Body::SpawnAgent(fleet::SpawnAgent { migration, side, vm })).await? {
            fleet::reply::Result::Agent(agent) => Ok(agent.spki_der),
            other => panic!("{other:?}"),
        }
    }

    /// What a permit says whose agents have these keys.
    pub fn claims(
        &self,
        migration: MigrationId,
        spec: &VmSpec,
        epoch: u64,
        [from, to]: [&str; 2],
        agents: &[Vec<u8>; 2],
    ) -> PermitClaims {
        let (part, journal, features, profile) = {
            let world = self.world.lock().unwrap();
            let part = |host: &str, agent: &Vec<u8>| HostPart {
                host: host.parse().unwrap(),
                agent_spki: agent.clone(),
                daemon_key: world.keys[host].0.clone(),
                quote: None,
            };
            let journal = world.keys[to].1.parse().unwrap();
            let profile = world.profile.unwrap_or("strict").to_owned();
            ([part(from, &agents[0]), part(to, &agents[1])], journal, world.features.clone(), profile)
        };
        let [source, target] = part;
        PermitClaims {
            version: 1,
            key: HandoverKey {
                migration,
                vm: spec.uuid,
                source_epoch: Epoch(epoch + 1),
                target_epoch: Epoch(epoch + 2),
            },
            spec_digest: spec.digest(),
            source,
            target,
            target_journal: journal,
            nonce: Nonce::from_bytes(random()),
            issued_at_unix_s: now_s(),
            not_after_unix_s: now_s() + 60,
            run_deadline_unix_s: now_s() + 600,
            byte_budget: 1 << 32,
            duration_budget_ms: 600_000,
            downtime_budget_ms: 5_000,
            features,
            inspection_profile: profile,
            compatibility: "qemu".to_owned(),
        }
    }

    /// Issues a permit for a fresh migration; both agents are spawned.
    pub async fn permit(&self, spec: &VmSpec, epoch: u64, from: &str, to: &str) -> (Vec<u8>, PermitClaims) {
        let migration = MigrationId::from_bytes(random());
        let agents = [
            self.agent(from, migration, spec.uuid, Side::Source).await.unwrap(),
            self.agent(to, migration, spec.uuid, Side::Target).await.unwrap(),
        ];
        let claims = self.claims(migration, spec, epoch, [from, to], &agents);
        let token = permit::issue(&self.permit_key, "k1", &claims).unwrap();
        let attempt = Attempt {
            key: claims.key,
            permit: token.digest(),
            nonce: claims.nonce,
            source: claims.source.host.clone(),
            target: claims.target.host.clone(),
            target_journal: claims.target_journal,
            run_budget_ms: claims.duration_budget_ms,
        };
        self.world.lock().unwrap().rows.insert(migration, HandoverRow::new(&attempt));
        (token.as_bytes().to_vec(), claims)
    }

    /// Signs other claims.
    pub fn reissue(&self, claims: &PermitClaims) -> Vec<u8> {
        permit::issue(&self.permit_key, "k1", claims).unwrap().as_bytes().to_vec()
    }

    /// Digest of the key with which a host holds its connection.
    pub fn key_of(&self, host: &str) -> Digest {
        self.world.lock().unwrap().tls_keys[host]
    }

    /// Joining hosts are not asked for a TPM, as if their records named none.
    fn challenge(&self, _: fleet::ChallengeRequest) -> Result<fleet::ChallengeReply, Status> {
        Ok(fleet::ChallengeReply::default())
    }

    pub async fn prepare(
        &self,
        token: &[u8],
        claims: &PermitClaims,
        spec: &VmSpec,
        inventory: &Inventory,
    ) -> Result<fleet::Prepared, fleet::Error> {
        let order = fleet::PrepareTarget {
            migration: claims.key.migration.to_string(),
            permit: token.to_vec(),
            spec_json: serde_json::to_string(spec).unwrap(),
            inventory_json: serde_json::to_string(inventory).unwrap(),
            source_migration_address: self.migration_address(&claims.source.host),
            source_daemon_key: claims.source.daemon_key.clone(),
        };
        match self.order(claims.target.host.as_str(), to_host::Body::Prepare(order)).await? {
            fleet::reply::Result::Prepared(prepared) => Ok(prepared),
            other => panic!("{other:?}"),
        }
    }

    fn migration_address(&self, host: &HostName) -> String {
        if host.as_str() == "host-a" { "127.0.0.1".to_owned() } else { "127.0.0.2".to_owned() }
    }

    /// Permit, prepare, start.
    pub async fn migrate(
        &self,
        spec: &VmSpec,
        inventory: &Inventory,
        epoch: u64,
        from: &str,
        to: &str,
    ) -> PermitClaims {
        let (token, claims) = self.permit(spec, epoch, from, to).await;
        let prepared = self.prepare(&token, &claims, spec, inventory).await.unwrap();
        self.start_source(token, &claims, prepared, inventory).await;
        claims
    }

    /// The same with the target's agent suspended from the start: the transfer does not end by itself.
    pub async fn migrate_held(
        &self,
        spec: &VmSpec,
        inventory: &Inventory,
        epoch: u64,
        from: &str,
        to: &str,
    ) -> PermitClaims {
        let (token, claims) = self.permit(spec, epoch, from, to).await;
        let prepared = self.prepare(&token, &claims, spec, inventory).await.unwrap();
        self.control(to, claims.key.migration, "suspend", 0).await;
        self.start_source(token, &claims, prepared, inventory).await;
        claims
    }

    async fn start_source(
        &self,
        token: Vec<u8>,
        claims: &PermitClaims,
        prepared: fleet::Prepared,
        inventory: &Inventory,
    ) {
        let order = fleet::StartSource {
            migration: claims.key.migration.to_string(),
            permit: token,
            inventory_json: serde_json::to_string(inventory).unwrap(),
            data_address: prepared.data_address,
            peer_address: prepared.peer_address,
        };
        let from = claims.source.host.as_str();
        self.order(from, to_host::Body::Start(order)).await.unwrap();
    }

    pub async fn control(&self, host: &str, migration: MigrationId, order: &str, rate: u64) {
        let control = fleet::Control {
            migration: migration.to_string(),
            order: order.to_owned(),
            bytes_per_second: rate,
        };
        self.order(host, to_host::Body::Control(control)).await.unwrap();
    }

    pub async fn row(&self, what: &str, id: MigrationId, mut holds: impl FnMut(&HandoverRow) -> bool) {
        self.until(what, |w| holds(&w.rows[&id]).then_some(())).await;
    }

    pub async fn event(&self, id: MigrationId, kind: &str) -> serde_json::Value {
        let id = id.to_string();
        self.until(kind, |w| {
            w.events.iter().find(|(_, m, k, _)| *m == id && k == kind).map(|(_, _, _, json)| json.clone())
        })
        .await
    }

    pub fn hold(&self, kinds: &[&'static str], deaf: bool) {
        let mut world = self.world.lock().unwrap();
        world.hold = kinds.to_vec();
        world.deaf = deaf;
    }

    fn apply(&self, id: MigrationId, event: Event) {
        let mut world = self.world.lock().unwrap();
        if let Some(row) = world.rows.get(&id)
            && let Ok(outcome) = decider::decide(row, event)
        {
            world.rows.insert(id, outcome.row);
        }
        drop(world);
        self.send_orders(id);
        self.changed.notify_waiters();
    }

    pub fn abort(&self, id: MigrationId, code: ErrorCode) {
        self.apply(id, Event::AbortRequested(AbortReason { code, detail: "by the test".to_owned() }));
    }

    fn send_orders(&self, id: MigrationId) {
        let world = self.world.lock().unwrap();
        let Some(row) = world.rows.get(&id) else { return };
        let key_json = serde_json::to_string(&row.key).unwrap();
        for order in decider::outstanding(row) {
            let (host, kind, body) = self.addressed(&world, row, order, key_json.clone());
            if let Some(session) = world.sessions.get(host.as_str())
                && !world.hold.contains(&kind)
            {
                session.try_send(Ok(ToHost { id: 0, body: Some(body) })).ok();
            }
        }
    }

    fn addressed(
        &self,
        world: &World,
        row: &HandoverRow,
        order: Order,
        key_json: String,
    ) -> (HostName, &'static str, to_host::Body) {
        use to_host::Body as B;
        let forget = || B::Forget(fleet::Forget { migration: row.key.migration.to_string() });
        let abort = |key_json, reason: AbortReason| {
            B::Abort(fleet::Abort { key_json, code: reason.code.to_string(), detail: reason.detail })
        };
        match order {
            Order::Source(order) => {
                let (kind, body) = match order {
                    source::Order::Abort { reason } => ("abort", abort(key_json, reason)),
                    source::Order::Release => ("release", B::Release(fleet::Release { key_json })),
                    source::Order::Close => ("close", forget()),
                    source::Order::Fenced { resolution } => {
                        let resolution = if resolution == Resolution::Thaw { "thaw" } else { "discard" };
                        ("fenced", B::Fenced(fleet::Fenced { key_json, resolution: resolution.to_owned() }))
                    }
                    _ => ("present", B::Present(fleet::Present { key_json })),
                };
                (row.source.clone(), kind, body)
            }
            Order::ShowRenunciation(proof) => {
                let target_daemon_key = world.keys[row.target.as_str()].0.clone();
                let body = B::Renounced(fleet::Renounced { token: proof.token, target_daemon_key });
                (row.source.clone(), "renounced", body)
            }
            Order::Target(order) => {
                let (kind, body) = match order {
                    target::Order::Commit { evidence, prior } => {
                        let prior = if prior == PriorRunState::Running { "running" } else { "paused" };
                        let evidence_json = serde_json::to_string(&evidence).unwrap();
                        (
                            "commit",
                            B::Commit(fleet::Commit { key_json, prior: prior.to_owned(), evidence_json }),
                        )
                    }
                    target::Order::Abort { reason } => ("abort", abort(key_json, reason)),
                    target::Order::Void { reason } => (
                        "void",
                        B::Void(fleet::Void {
                            key_json,
                            code: reason.code.to_string(),
                            detail: reason.detail,
                        }),
                    ),
                    target::Order::Present => ("present", B::Present(fleet::Present { key_json })),
                    target::Order::Close => ("close", forget()),
                };
                (row.target.clone(), kind, body)
            }
        }
    }

    fn stated(&self, host: &str, token: Vec<u8>) {
        let signed = SignedStatement::from_bytes(token.clone()).unwrap();
        let keys = self.world.lock().unwrap().keys.clone();
        let all = std::iter::once(host.to_owned()).chain(keys.keys().cloned());
        let Some((signer, statement)) = all
            .filter_map(|name| {
                let key = VerifyingKey::from_bytes(&keys.get(&name)?.0).ok()?;
                Some((name, permit::statement::verify(&signed, &key).ok()?))
            })
            .next()
        else {
            panic!("a statement of nobody known")
        };
        let key = match &statement {
            Statement::Request(_) => {
                self.world.lock().unwrap().requests.push(statement);
                self.changed.notify_waiters();
                return;
            }
            Statement::Frozen(s) => s.key,
            Statement::NoVote(s) => s.key,
            Statement::Prepared(s) => s.key,
            Statement::Running(s) => s.key,
            Statement::Renounced(s) => s.key,
            Statement::AskRenounce(s) => s.key,
            Statement::Released(s) => s.key,
            Statement::Thawed(s) => s.key,
        };
        let source = {
            let world = self.world.lock().unwrap();
            world.rows.get(&key.migration).map(|r| r.source.to_string())
        };
        let from = if source.as_deref() == Some(signer.as_str()) { Side::Source } else { Side::Target };
        let event = match statement {
            Statement::Renounced(renunciation) => Event::Renounced(RenunciationProof { renunciation, token }),
            statement => Event::Statement { from, statement },
        };
        self.apply(key.migration, event);
    }

    fn message(&self, host: &str, body: to_manager::Body) {
        let mut world = self.world.lock().unwrap();
        match body {
            to_manager::Body::Reply(reply) => {
                if let (Some(waiting), Some(result)) = (world.replies.remove(&reply.id), reply.result) {
                    waiting.send(result).ok();
                }
            }
            to_manager::Body::Event(event) => {
                let json = serde_json::from_str(&event.json).unwrap();
                if event.kind != "progress" {
                    world.events.push((host.to_owned(), event.migration, event.kind, json));
                }
            }
            to_manager::Body::VmEvent(event) => world.vm_events.push((event.vm, event.state)),
            to_manager::Body::Statement(signed) if !world.deaf => {
                drop(world);
                self.stated(host, signed.token);
            }
            _ => {}
        }
        self.changed.notify_waiters();
    }
}

struct Service(Manager);

#[tonic::async_trait]
impl Fleet for Service {
    type AttachStream = Pin<Box<dyn Stream<Item = Result<ToHost, Status>> + Send>>;

    async fn join(&self, request: Request<fleet::JoinRequest>) -> Result<Response<fleet::JoinReply>, Status> {
        let peer = request.extensions().get::<Option<String>>().cloned().flatten();
        let request = request.into_inner();
        let name: HostName = request.host.parse().unwrap();
        let stalls = request.token_secret.is_empty() && {
            let mut world = self.0.world.lock().unwrap();
            world.renewals += u32::from(world.renewals_stall);
            world.renewals_stall
        };
        if stalls {
            self.0.changed.notify_waiters();
            std::future::pending::<()>().await;
        }
        let life = {
            let mut world = self.0.world.lock().unwrap();
            if request.token_secret.is_empty() {
                if peer.as_deref() != Some(name.as_str()) {
                    return Err(Status::unauthenticated("unauthenticated: no token"));
                }
                world.renewals += 1;
            }
            world.certificate_life.unwrap_or(Duration::from_secs(3600))
        };
        self.0.changed.notify_waiters();
        let subject = Subject::host(&name);
        let issued = self.0.ca.issue_for(&subject, &request.csr_der, SystemTime::now(), life).unwrap();
        let mut chain = ders(&issued.chain_pem);
        let key = link::identity::key_digest_of(&chain[0]).unwrap();
        self.0.world.lock().unwrap().tls_keys.insert(name.to_string(), key);
        let key = &self.0.permit_key;
        Ok(Response::new(fleet::JoinReply {
            certificate_der: chain.remove(0),
            ca_der: chain,
            permit_keys: vec![fleet::PermitKey {
                key_id: "k1".to_owned(),
                public_key: key.verifying_key().as_bytes().to_vec(),
            }],
            certificate_not_after_unix_s: now_s() + 3600,
            trust_domain: "test.example".to_owned(),
        }))
    }

    async fn challenge(
        &self,
        request: Request<fleet::ChallengeRequest>,
    ) -> Result<Response<fleet::ChallengeReply>, Status> {
        self.0.challenge(request.into_inner()).map(Response::new)
    }

    async fn attach(
        &self,
        request: Request<Streaming<ToManager>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let host = request.extensions().get::<Option<String>>().cloned().flatten().unwrap();
        let mut incoming = request.into_inner();
        let (sender, orders) = mpsc::channel(256);
        let Some(Ok(ToManager { body: Some(to_manager::Body::Hello(hello)) })) = incoming.next().await else {
            return Err(Status::invalid_argument("bad-request: no hello"));
        };
        let welcome = fleet::Welcome {
            manager: "manager-1".to_owned(),
            permit_keys: vec![],
            heartbeat_idle_s: 1,
            heartbeat_migrating_s: 1,
        };
        sender.send(Ok(ToHost { id: 0, body: Some(to_host::Body::Welcome(welcome)) })).await.unwrap();
        {
            let mut world = self.0.world.lock().unwrap();
            world.keys.insert(host.clone(), (hello.signing_key.clone(), hello.journal.clone()));
            world.sessions.insert(host.clone(), sender);
            world.hellos.push((host.clone(), hello));
        }
        self.0.changed.notify_waiters();
        let manager = self.0.clone();
        tokio::spawn(async move {
            while let Some(Ok(message)) = incoming.next().await {
                if let Some(body) = message.body {
                    manager.message(&host, body);
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(orders))))
    }
}
