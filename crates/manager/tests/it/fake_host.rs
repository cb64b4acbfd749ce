//! A host without hypervisors: it speaks the protocol, keeps its promises (statements are "journalled" before they
//! are sent, and repeated until they are stored), and marks where guests execute.

use crate::fake_tpm::{Candour, FakeTpm};
use crate::world::{Physical, World, mac};
use api::fleet::fleet_client::FleetClient;
use api::fleet::reply::Result as Outcome;
use api::fleet::{
    AgentReady, ChallengeRequest, Done, EpochSeen, HeldVm, Hello, Holdings, Hypervisor, Inspected, Interface,
    JoinRequest, LoadReply, MigrationEvent, OpenAttempt, Prepared, Probed, Quoted, Reply, RunningVm,
    SignedStatement, Started, ToHost, ToManager, TpmProof, to_host, to_manager,
};
use attest::{Binding, PcrSelection, Purpose};
use hyper_util::rt::TokioIo;
use link::ca::CaCertificate;
use link::control::{connect_manager, connect_pinned};
use link::identity::{IdentityKey, LiveIdentity, TlsIdentity, csr_key_digest};
use permit::checkpoint::{self, Checkpoint, Extension, NotTaken};
use permit::{JoinToken, KeyRing, PermitToken, SigningKey, VerifyingKey};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;
use tokio::sync::{Notify, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use types::handover::{
    MigrationRequest, NoVote, PriorRunState, ReleaseReceipt, RenounceRequest, Renunciation, RunningReceipt,
    Side, SourceVote, Statement, StreamEvidence, TargetVote, ThawReceipt,
};
use types::permit::PermitClaims;
use types::{Digest, HandoverKey, HostName, MigrationId, Nonce, VmId};

/// Called with each step of a host.
pub(crate) type Hook = Box<dyn Fn(&str) + Send>;

/// What a host does on its own, so that tests can make it behave.
#[derive(Debug, Clone)]
pub(crate) struct Manners {
    /// The source votes by itself when the stream is out.
    pub(crate) source_votes: bool,
    /// The target votes by itself when prepared and the stream is in.
    pub(crate) target_votes: bool,
    /// The stream flows to its end by itself.
    pub(crate) flows: bool,
    /// Orders that are refused: (kind, code).
    pub(crate) refuses: Vec<(&'static str, &'static str)>,
    /// Orders that are not answered.
    pub(crate) ignores: Vec<&'static str>,
    /// Orders that are carried out only when they are no longer named here.
    pub(crate) delays: Vec<&'static str>,
    /// It starts VMs and says so in a way that cannot be read.
    pub(crate) mumbles: bool,
    /// Measured memory.
    pub(crate) available_bytes: u64,
    /// What was plugged into its VMs.
    pub(crate) plugged: Vec<String>,
    /// Why it can't say what was.
    pub(crate) blind: String,
    /// How it speaks of its platform.
    pub(crate) candour: Candour,
    /// What its QEMU can run.
    pub(crate) abilities: Value,
    /// What a micro-probe comes to.
    pub(crate) probe: Value,
    /// What it claims of its load instead of the truth.
    pub(crate) claims: Vec<(&'static str, Value)>,
    /// Guests that it does not speak of.
    pub(crate) hides: Vec<VmId>,
    /// Its measured memory shrinks as it is taken.
    pub(crate) takes_memory: bool,
}

impl Default for Manners {
    fn default() -> Self {
        Self {
            source_votes: true,
            target_votes: true,
            flows: true,
            refuses: Vec::new(),
            ignores: Vec::new(),
            delays: Vec::new(),
            mumbles: false,
            available_bytes: 2 << 30,
            plugged: Vec::new(),
            blind: String::new(),
            candour: Candour::Honest,
            probe: json!({
                "touched_bytes": 32 << 20, "touch_us": 20_000, "work_units": 5_000, "work_us": 5_000, "cpu_us": 4_900,
            }),
            claims: Vec::new(),
            hides: Vec::new(),
            takes_memory: false,
            abilities: abilities("10.0.2", &["pc-q35-10.0", "pc-q35-9.2"], &["fpu", "sse2"]),
        }
    }
}

/// One attempt on one side: what survives in the journal.
#[derive(Debug, Clone)]
struct Attempt {
    side: Side,
    claims: PermitClaims,
    permit: Digest,
    voted: bool,
    gave_up: bool,
    ran: bool,
    released: bool,
    /// The manager said that it has ended.
    closed: bool,
    token: Vec<u8>,
}

#[derive(Default)]
struct Inner {
    attempts: BTreeMap<MigrationId, Attempt>,
    vms: BTreeMap<VmId, u64>,
    /// Signed requests that were sent.
    requests: Vec<Vec<u8>>,
    /// Statements that the manager has not confirmed.
    open: Vec<Vec<u8>>,
    permit_keys: KeyRing,
    checkpoint: Option<(Checkpoint, Vec<u8>)>,
    contradiction: String,
}

/// A host.
pub(crate) struct FakeHost {
    pub(crate) name: HostName,
    own: Weak<Self>,
    key: SigningKey,
    pub(crate) journal: Nonce,
    identity: LiveIdentity,
    ca: CaCertificate,
    hosts_port: Arc<Mutex<Option<SocketAddr>>>,
    physical: Arc<Mutex<Physical>>,
    pub(crate) manners: Mutex<Manners>,
    inner: Mutex<Inner>,
    outbox: Mutex<Option<mpsc::Sender<ToManager>>>,
    pub(crate) tpm: Option<Arc<FakeTpm>>,
    /// What it gave for each side of a migration.
    quotes: Mutex<BTreeMap<(MigrationId, Side), Digest>>,
    /// Every order that came, in order.
    pub(crate) seen: Mutex<Vec<&'static str>>,
    /// Called with every order (before it is carried out) and statement (after it is sent).
    pub(crate) on_step: Mutex<Option<Hook>>,
    gone: Notify,
    attached: Mutex<Option<tokio::task::JoinHandle<()>>>,
}

impl Drop for FakeHost {
    fn drop(&mut self) {
        if let Some(task) = self.attached.lock().unwrap().take() {
            task.abort();
        }
    }
}

pub(crate) fn interfaces(mac: &str) -> Vec<Interface> {
    let addresses = vec!["127.0.0.1".to_owned(), "10.7.0.1".to_owned()];
    vec![Interface { name: "eth0".to_owned(), mac: mac.to_owned(), addresses }]
}

async fn channel<F, T>(connect: F) -> Result<Channel, tonic::Status>
where
    F: Fn() -> T + Send + 'static,
    T: Future<Output = Result<link::control::TlsConn, link::control::LinkError>> + Send + 'static,
{
    let connector = tower::service_fn(move |_| {
        let connection = connect();
        async move { connection.await.map(TokioIo::new).map_err(std::io::Error::other) }
    });
    let endpoint = Endpoint::from_static("http://manager");
    endpoint.connect_with_connector(connector).await.map_err(|e| tonic::Status::unavailable(format!("{e:?}")))
}

fn pem(der: &[u8]) -> String {
    use base64::Engine as _;
    let body = base64::engine::general_purpose::STANDARD.encode(der);
    format!("-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n")
}

/// A join as its parts, so that tests can bend each.
pub(crate) struct Join {
    pub(crate) name: String,
    pub(crate) token: JoinToken,
    pub(crate) mac: String,
    pub(crate) key: SigningKey,
    pub(crate) identity_key: IdentityKey,
    pub(crate) journal: Nonce,
    pub(crate) tpm: Option<Arc<FakeTpm>>,
    /// The TPM that answers the challenge, where it is not that which was shown.
    pub(crate) answers: Option<Arc<FakeTpm>>,
    /// The quote of the join is over another key than that of the signing request.
    pub(crate) relayed: bool,
}

impl Join {
    pub(crate) fn with_tpm(name: &str, token: &str, tpm: &Arc<FakeTpm>) -> Self {
        Self { tpm: Some(Arc::clone(tpm)), ..Self::new(name, token) }
    }

    /// Proves the TPM, as far as it is asked to.
    async fn prove(&self, client: &mut FleetClient<Channel>) -> Result<Option<TpmProof>, tonic::Status> {
        let Some(tpm) = &self.tpm else { return Ok(None) };
        let ask = ChallengeRequest {
            host: self.name.clone(),
            token_secret: hex::encode(self.token.secret.expose()),
            application_json: serde_json::to_string(&tpm.application()).unwrap(),
        };
        let reply = client.challenge(ask).await?.into_inner();
        if reply.id.is_empty() {
            return Ok(None);
        }
        let answering = self.answers.as_ref().unwrap_or(tpm);
        let secret = answering.activate(&reply.challenge_json).unwrap_or_default();
        let host_spki = match self.relayed {
            true => Digest::of(b"another"),
            false => csr_key_digest(&self.identity_key.signing_request().unwrap()).unwrap(),
        };
        let binding = Binding {
            nonce: reply.nonce.parse().unwrap(),
            purpose: Purpose::Join,
            host: format!("spiffe://{}/host/{}", reply.trust_domain, self.name).try_into().unwrap(),
            host_spki,
        };
        let evidence = tpm.evidence(&serde_json::from_str(&reply.selection_json).unwrap(), &binding);
        Ok(Some(TpmProof { id: reply.id, secret, evidence: evidence.to_bytes() }))
    }

    pub(crate) fn new(name: &str, token: &str) -> Self {
        let mut journal = [0; 16];
        aws_lc_rs::rand::fill(&mut journal).unwrap();
        Self {
            name: name.to_owned(),
            token: JoinToken::from_text(token).unwrap(),
            mac: mac(name),
            key: SigningKey::generate().unwrap(),
            identity_key: IdentityKey::generate().unwrap(),
            journal: Nonce::from_bytes(journal),
            tpm: None,
            answers: None,
            relayed: false,
        }
    }

    pub(crate) async fn send(
        &self,
        hosts_port: SocketAddr,
    ) -> Result<(api::fleet::JoinReply, CaCertificate), tonic::Status> {
        let fingerprint = self.token.ca_fingerprint;
        let (_, ca) = connect_pinned(&hosts_port.to_string(), &fingerprint).await.unwrap();
        let channel = channel(move || async move {
            connect_pinned(&hosts_port.to_string(), &fingerprint).await.map(|(connection, _)| connection)
        })
        .await?;
        let mut client = FleetClient::new(channel);
        let request = JoinRequest {
            tpm: self.prove(&mut client).await?,
            host: self.name.clone(),
            token_secret: hex::encode(self.token.secret.expose()),
            csr_der: self.identity_key.signing_request().unwrap(),
            signing_key: self.key.verifying_key().as_bytes().to_vec(),
            journal: self.journal.to_string(),
            interfaces: interfaces(&self.mac),
        };
        Ok((client.join(request).await?.into_inner(), ca))
    }
}

impl FakeHost {
    pub(crate) async fn join(
        world: &Arc<World>,
        name: &str,
        token: &str,
    ) -> Result<Arc<Self>, tonic::Status> {
        Self::join_as(world, Join::new(name, token)).await
    }

    pub(crate) async fn join_as(world: &Arc<World>, join: Join) -> Result<Arc<Self>, tonic::Status> {
        let port = world.hosts_port.lock().unwrap().unwrap();
        let (reply, ca) = join.send(port).await?;
        let chain = pem(&reply.certificate_der) + &pem(&reply.ca_der[0]);
        let identity = TlsIdentity::from_pem(&chain, &join.identity_key.to_pem()).unwrap();
        let mut inner = Inner::default();
        for key in reply.permit_keys {
            assert!(
                inner.permit_keys.insert(&key.key_id, VerifyingKey::from_bytes(&key.public_key).unwrap())
            );
        }
        Ok(Arc::new_cyclic(|own| Self {
            name: join.name.parse().unwrap(),
            own: own.clone(),
            key: join.key,
            journal: join.journal,
            identity: LiveIdentity::new(identity),
            ca,
            hosts_port: Arc::clone(&world.hosts_port),
            physical: Arc::clone(&world.physical),
            manners: Mutex::default(),
            inner: Mutex::new(inner),
            outbox: Mutex::default(),
            tpm: join.tpm,
            quotes: Mutex::default(),
            seen: Mutex::default(),
            on_step: Mutex::default(),
            gone: Notify::new(),
            attached: Mutex::default(),
        }))
    }

    pub(crate) fn hello(&self) -> Hello {
        let inner = self.inner.lock().unwrap();
        let vms = inner.vms.iter().map(|(vm, epoch)| RunningVm {
            vm: vm.to_string(),
            epoch: *epoch,
            state: "running".to_owned(),
            machine: "pc-q35-10.0".to_owned(),
        });
        Hello {
            version: "test".to_owned(),
            boot_id: String::new(),
            journal: self.journal.to_string(),
            signing_key: self.key.verifying_key().as_bytes().to_vec(),
            interfaces: interfaces(&mac(self.name.as_str())),
            vms: vms.collect(),
            open_statements: inner.open.clone(),
            checkpoint: inner.checkpoint.as_ref().map(|(_, token)| token.clone()).unwrap_or_default(),
            checkpoint_refused: inner.contradiction.clone(),
        }
    }

    /// One session with this hello, until it ends.
    pub(crate) async fn session(&self, hello: Hello) -> Result<(), tonic::Status> {
        let Some(port) = *self.hosts_port.lock().unwrap() else {
            return Err(tonic::Status::unavailable("no manager"));
        };
        let (identity, ca) = (self.identity.clone(), self.ca.clone());
        let channel = channel(move || {
            let (identity, ca) = (identity.clone(), ca.clone());
            async move { connect_manager(&port.to_string(), &identity, &ca).await }
        })
        .await?;
        let (sender, receiver) = mpsc::channel(64);
        let body = Some(to_manager::Body::Hello(hello));
        sender.send(ToManager { body }).await.unwrap();
        let mut orders = FleetClient::new(channel).attach(ReceiverStream::new(receiver)).await?.into_inner();
        *self.outbox.lock().unwrap() = Some(sender);
        let ended = loop {
            let order = tokio::select! {
                order = orders.message() => order,
                () = self.gone.notified() => break Ok(()),
                // What was not confirmed is said again.
                () = tokio::time::sleep(Duration::from_millis(200)) => {
                    self.repeat().await;
                    continue;
                }
            };
            match order {
                Ok(Some(order)) => self.obey(order).await,
                Ok(None) => break Ok(()),
                Err(status) => break Err(status),
            }
        };
        *self.outbox.lock().unwrap() = None;
        ended
    }

    /// Attaches, and again whenever it is cut off.
    pub(crate) fn attach(self: &Arc<Self>) {
        let weak = Arc::downgrade(self);
        let task = tokio::spawn(async move {
            while let Some(host) = weak.upgrade() {
                drop(host.session(host.hello()).await);
                drop(host);
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        });
        *self.attached.lock().unwrap() = Some(task);
    }

    /// Cuts the connection and stays away.
    pub(crate) fn vanish(&self) {
        if let Some(task) = self.attached.lock().unwrap().take() {
            task.abort();
        }
        *self.outbox.lock().unwrap() = None;
    }

    async fn send(&self, body: to_manager::Body) {
        let sender = self.outbox.lock().unwrap().clone();
        if let Some(sender) = sender {
            // A manager that is gone hears it later, where it matters.
            drop(sender.send(ToManager { body: Some(body) }).await);
        }
    }

    fn step(&self, what: &str) {
        if let Some(hook) = &*self.on_step.lock().unwrap() {
            hook(what);
        }
    }

    async fn repeat(&self) {
        let open = self.inner.lock().unwrap().open.clone();
        for token in open {
            self.send(to_manager::Body::Statement(SignedStatement { token })).await;
        }
    }

    /// Journals and sends.
    async fn state(&self, statement: &Statement) {
        let signed = permit::statement::sign(&self.key, statement).unwrap();
        let token = signed.as_bytes().to_vec();
        {
            let mut inner = self.inner.lock().unwrap();
            inner.open.push(token.clone());
            if matches!(statement, Statement::Request(_)) {
                inner.requests.push(token.clone());
            }
        }
        self.send(to_manager::Body::Statement(SignedStatement { token })).await;
        let kind = serde_json::to_value(statement).unwrap()["kind"].as_str().unwrap().to_owned();
        self.step(&format!("statement {kind}"));
    }

    /// Takes a checkpoint as a daemon does.
    async fn checkpoint(&self, shown: &api::fleet::Checkpoint) {
        let kept = {
            let mut inner = self.inner.lock().unwrap();
            let keys = inner.permit_keys.clone();
            let read = checkpoint::verify(&shown.token, |id| keys.find(id).copied()).unwrap();
            let proof = shown.extension.iter().map(|h| h[..].try_into().unwrap()).collect();
            let extension = Extension { from_size: shown.from_size, proof };
            let held = inner.checkpoint.as_ref().map(|(held, _)| held);
            match checkpoint::judge(held, &read, Some(&extension)) {
                Ok(_) => {
                    inner.checkpoint = Some((read, shown.token.clone()));
                    inner.contradiction.clear();
                    None
                }
                Err(refusal) => {
                    if let NotTaken::Contradicts(why) = refusal {
                        inner.contradiction = why.to_string();
                    }
                    let token = inner.checkpoint.as_ref().map(|(_, token)| token.clone()).unwrap_or_default();
                    Some(api::fleet::CheckpointKept { token, contradicts: inner.contradiction.clone() })
                }
            }
        };
        if let Some(kept) = kept {
            self.send(to_manager::Body::CheckpointKept(kept)).await;
        }
    }

    /// The checkpoint that it holds.
    pub(crate) fn remembers(&self) -> Option<Checkpoint> {
        self.inner.lock().unwrap().checkpoint.as_ref().map(|(held, _)| held.clone())
    }

    /// It remembers this from now on.
    pub(crate) fn remember(&self, checkpoint: Option<(Checkpoint, Vec<u8>)>) {
        self.inner.lock().unwrap().checkpoint = checkpoint;
    }

    /// What it remembers, signed.
    pub(crate) fn memory(&self) -> Option<(Checkpoint, Vec<u8>)> {
        self.inner.lock().unwrap().checkpoint.clone()
    }

    fn holdings(&self, ask: u64) -> Holdings {
        let inner = self.inner.lock().unwrap();
        let specs = self.physical.lock().unwrap().specs.clone();
        let held = inner.vms.iter().map(|(vm, epoch)| HeldVm {
            vm: vm.to_string(),
            epoch: *epoch,
            state: "running".to_owned(),
            spec_json: specs.get(vm).cloned().unwrap_or_default(),
        });
        let epochs = inner
            .attempts
            .values()
            .map(|a| EpochSeen { vm: a.claims.key.vm.to_string(), epoch: a.claims.key.target_epoch.0 });
        let attempts = inner.attempts.values().filter(|a| !a.closed).map(|a| OpenAttempt {
            migration: a.claims.key.migration.to_string(),
            side: a.side.to_string(),
            permit: a.token.clone(),
        });
        Holdings {
            ask,
            vms: held.collect(),
            epochs: epochs.collect(),
            attempts: attempts.collect(),
            checkpoint: inner.checkpoint.as_ref().map(|(_, token)| token.clone()).unwrap_or_default(),
            last: true,
        }
    }

    /// It holds a copy of a VM of which the registry knows nothing.
    pub(crate) fn found(&self, vm: VmId, epoch: u64) {
        self.inner.lock().unwrap().vms.insert(vm, epoch);
    }

    /// One of its QEMUs ends by itself.
    pub(crate) async fn vm_died(&self, vm: VmId) {
        self.inner.lock().unwrap().vms.remove(&vm);
        self.physical.lock().unwrap().stop(vm, self.name.as_str());
        let event =
            api::fleet::VmEvent { vm: vm.to_string(), state: "dead".to_owned(), detail: String::new() };
        self.send(to_manager::Body::VmEvent(event)).await;
    }

    /// Sends its first signed request once more.
    pub(crate) async fn replay_request(&self) {
        let token = self.inner.lock().unwrap().requests[0].clone();
        self.send(to_manager::Body::Statement(SignedStatement { token })).await;
    }

    pub(crate) async fn event(&self, migration: MigrationId, kind: &str, detail: Value) {
        let event = MigrationEvent {
            migration: migration.to_string(),
            at_unix_us: crate::world::now_ms() * 1000,
            kind: kind.to_owned(),
            json: detail.to_string(),
        };
        self.send(to_manager::Body::Event(event)).await;
    }

    async fn obey(&self, order: ToHost) {
        let Some(body) = order.body else { return };
        let kind = kind_of(&body);
        if !["statement-stored", "welcome", "checkpoint"].contains(&kind) {
            self.seen.lock().unwrap().push(kind);
            self.step(kind);
        }
        if let to_host::Body::Checkpoint(shown) = &body {
            // In the order in which they come.
            return self.checkpoint(shown).await;
        }
        let manners = self.manners.lock().unwrap().clone();
        if manners.ignores.contains(&kind) {
            return;
        }
        let refusal =
            manners.refuses.iter().find(|(k, _)| *k == kind).map(|(_, code)| error(code, "as told"));
        let (id, own) = (order.id, self.own.upgrade().unwrap());
        // Orders that take their time must not keep the others waiting.
        tokio::spawn(async move {
            while own.manners.lock().unwrap().delays.contains(&kind) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            let outcome = match refusal {
                Some(refusal) => refusal,
                None => own.carry_out(body).await,
            };
            if id != 0 {
                own.send(to_manager::Body::Reply(Reply { id, result: Some(outcome) })).await;
            }
        });
    }

    async fn carry_out(&self, body: to_host::Body) -> Outcome {
        use to_host::Body as B;
        match body {
            B::QueryLoad(_) => Outcome::Load(LoadReply { load_json: self.load() }),
            B::StartVm(order) => self.start_vm(&order),
            B::InspectVm(_) => {
                let catalogue = json!({ "hypervisor": "qemu/10.0.2", "machine": "pc-q35-10.0", "layouts": [], "sections": [] });
                let catalogue_json = catalogue.to_string();
                let Manners { plugged: differences, blind: differences_missing, .. } =
                    self.manners.lock().unwrap().clone();
                Outcome::Inspected(Inspected {
                    catalogue_json,
                    differences,
                    differences_missing,
                    ..Inspected::default()
                })
            }
            B::MicroProbe(_) => {
                Outcome::Probed(Probed { probe_json: self.manners.lock().unwrap().probe.to_string() })
            }
            B::DescribeHypervisor(_) => {
                let abilities_json = self.manners.lock().unwrap().abilities.to_string();
                Outcome::Hypervisor(Hypervisor { abilities_json })
            }
            B::StopVm(order) => {
                let vm: VmId = order.vm.parse().unwrap();
                self.inner.lock().unwrap().vms.remove(&vm);
                self.physical.lock().unwrap().stop(vm, self.name.as_str());
                done()
            }
            B::Intent(order) => self.sign_request(&order).await,
            B::SpawnAgent(order) => {
                let seed = Digest::of(format!("{} {} {}", self.name, order.migration, order.side).as_bytes());
                Outcome::Agent(AgentReady { spki_der: agent_spki(seed), sandbox: "test".to_owned() })
            }
            B::Quote(order) => self.quote(&order),
            B::Prepare(order) => self.prepare(&order.migration, order.permit).await,
            B::Start(order) => self.start(&order.migration, order.permit).await,
            B::Commit(order) => self.commit(&order.key_json).await,
            B::Abort(order) => self.give_up(&order.key_json, &order.code, &order.detail).await,
            B::Void(order) => self.give_up(&order.key_json, &order.code, &order.detail).await,
            B::Decline(order) => self.decline(&order).await,
            B::Release(order) => self.release(&order.key_json).await,
            B::Renounced(order) => self.renounced(order.token, &order.target_daemon_key).await,
            B::StatementStored(stored) => {
                let stored: [u8; 32] = stored.digest.try_into().unwrap();
                self.inner.lock().unwrap().open.retain(|t| Digest::of(t).0 != stored);
                done()
            }
            B::Forget(order) => {
                let id: MigrationId = order.migration.parse().unwrap();
                let mut inner = self.inner.lock().unwrap();
                // The end answers everything that was still said of it.
                inner.open.retain(|token| !self.is_about(token, id));
                if let Some(attempt) = inner.attempts.get_mut(&id) {
                    attempt.closed = true;
                }
                done()
            }
            B::ReportHoldings(order) => {
                let holdings = self.holdings(order.ask);
                self.send(to_manager::Body::Holdings(holdings)).await;
                done()
            }
            B::Present(order) => self.present(&order.key_json).await,
            B::Checkpoint(_) | B::Control(_) | B::Renounce(_) | B::Fenced(_) | B::Welcome(_) => done(),
        }
    }

    fn quote(&self, order: &api::fleet::Quote) -> Outcome {
        let Some(tpm) = &self.tpm else { return error("attestation-failed", "no TPM") };
        let candour = self.manners.lock().unwrap().candour;
        let mut selection: PcrSelection = serde_json::from_str(&order.selection_json).unwrap();
        let purpose = match order.migration.as_str() {
            "" => Purpose::HostCheck,
            id => {
                let seed = Digest::of(format!("{} {id} {}", self.name, order.side).as_bytes());
                let spki =
                    agent_spki(if candour == Candour::OtherAgent { Digest::of(b"other") } else { seed });
                let side = if order.side == "source" { Side::Source } else { Side::Target };
                Purpose::Migration { migration: id.parse().unwrap(), side, agent_spki: Digest::of(&spki) }
            }
        };
        let mut binding = Binding {
            nonce: order.nonce.parse().unwrap(),
            purpose,
            host: format!("spiffe://outrider/host/{}", self.name).try_into().unwrap(),
            host_spki: self.identity.current().key_digest(),
        };
        match candour {
            Candour::Honest | Candour::OtherAgent => {}
            Candour::OldNonce => binding.nonce = Nonce::from_bytes([9; 16]),
            Candour::OtherConnection => binding.host_spki = Digest::of(b"another machine's"),
            Candour::Garbage => {
                return Outcome::Quoted(Quoted { evidence: b"outrEV01 and then nothing".to_vec() });
            }
            Candour::FewerRegisters => {
                selection = PcrSelection::of(selection.bank(), selection.iter().skip(1));
            }
            Candour::Busy => return error("attestation-failed", "this host's TPM is busy"),
        }
        let evidence = tpm.evidence(&selection, &binding);
        if let Purpose::Migration { migration, side, .. } = binding.purpose {
            self.quotes.lock().unwrap().entry((migration, side)).or_insert(evidence.digest());
        }
        Outcome::Quoted(Quoted { evidence: evidence.to_bytes() })
    }

    fn is_about(&self, token: &[u8], id: MigrationId) -> bool {
        let signed = permit::SignedStatement::from_bytes(token.to_vec()).unwrap();
        let Ok(statement) = permit::statement::verify(&signed, self.key.verifying_key()) else {
            return false;
        };
        serde_json::to_value(statement).unwrap()["key"]["migration"] == json!(id)
    }

    fn load(&self) -> String {
        let manners = self.manners.lock().unwrap().clone();
        let inner = self.inner.lock().unwrap();
        // A target takes a guest's memory when it is prepared.
        let taken = inner.attempts.values().filter(|a| a.side == Side::Target && !a.gave_up).count() as u64;
        let taken = if manners.takes_memory { taken * crate::world::VM_BYTES } else { 0 };
        let running: Vec<_> = inner.vms.keys().filter(|vm| !manners.hides.contains(vm)).collect();
        let mut load = json!({
            "scope": "test", "memory_used_bytes": 0, "cpu_cores_used": 0.0, "cpu_cores": 4.0, "vms": running.len(),
            "memory_available_bytes": manners.available_bytes.saturating_sub(taken),
            "cpu_pressure_percent": 0.0, "memory_pressure_percent": 0.0, "memory_full_pressure_percent": 0.0,
            "link": {
                "interface": "eth0", "received_bytes_per_s": 0.0, "sent_bytes_per_s": 0.0,
                "capacity_bytes_per_s": null,
            },
            "running": running,
        });
        for (key, value) in &manners.claims {
            load[*key] = value.clone();
        }
        load.to_string()
    }

    fn start_vm(&self, order: &api::fleet::StartVm) -> Outcome {
        let spec: types::vm::VmSpec = serde_json::from_str(&order.spec_json).unwrap();
        if !self.inner.lock().unwrap().contradiction.is_empty() {
            return error("audit-broken", "it remembers another log");
        }
        self.physical.lock().unwrap().specs.insert(spec.uuid, order.spec_json.clone());
        self.inner.lock().unwrap().vms.insert(spec.uuid, order.epoch);
        self.physical.lock().unwrap().run(spec.uuid, self.name.as_str());
        let inventory = json!({
            "machine": "pc-q35-10.0", "page_size_bytes": 4096, "hypervisor": "qemu/10.0.2",
            "ram_blocks": [{ "name": "pc.ram", "length_bytes": spec.memory_bytes }],
        });
        let inventory_json =
            if self.manners.lock().unwrap().mumbles { "{".to_owned() } else { inventory.to_string() };
        Outcome::Started(Started { inventory_json, machine: "pc-q35-10.0".to_owned(), pid: 1 })
    }

    async fn sign_request(&self, order: &api::fleet::Intent) -> Outcome {
        let mut nonce = [0; 16];
        aws_lc_rs::rand::fill(&mut nonce).unwrap();
        self.state(&Statement::Request(MigrationRequest {
            vm: order.vm.parse().unwrap(),
            source: self.name.clone(),
            target: order.target.parse().unwrap(),
            nonce: Nonce::from_bytes(nonce),
            timestamp_unix_ms: crate::world::now_ms(),
            intent: order.intent.clone(),
        }))
        .await;
        done()
    }

    /// Verifies a permit as a daemon does.
    fn consume(&self, side: Side, migration: &str, token: Vec<u8>) -> Result<Attempt, Outcome> {
        let id: MigrationId = migration.parse().unwrap();
        let mut inner = self.inner.lock().unwrap();
        if let Some(held) = inner.attempts.get(&id) {
            return Ok(held.clone());
        }
        if !inner.contradiction.is_empty() {
            return Err(error("audit-broken", "it remembers another log"));
        }
        let token = PermitToken::from_bytes(token).unwrap();
        let verified = permit::verify(&token, &inner.permit_keys, crate::world::now_ms() / 1000, 5)
            .map_err(|e| error("permit-refused", &e.to_string()))?;
        let claims = verified.claims().clone();
        assert_eq!(claims.part(side).host, self.name);
        assert_eq!(claims.part(side).daemon_key, self.key.verifying_key().as_bytes());
        assert_eq!(claims.key.migration, id);
        let seed = Digest::of(format!("{} {} {side}", self.name, id).as_bytes());
        assert_eq!(claims.part(side).agent_spki, agent_spki(seed), "the permit names our agent's key");
        let given = self.quotes.lock().unwrap().get(&(id, side)).copied();
        assert_eq!(claims.part(side).quote, given, "the permit names the quote that we gave");
        if side == Side::Target {
            assert_eq!(claims.target_journal, self.journal);
        }
        let attempt = Attempt {
            side,
            claims,
            permit: verified.digest(),
            voted: false,
            gave_up: false,
            ran: false,
            released: false,
            closed: false,
            token: verified.token().as_bytes().to_vec(),
        };
        inner.attempts.insert(id, attempt.clone());
        Ok(attempt)
    }

    async fn prepare(&self, migration: &str, permit: Vec<u8>) -> Outcome {
        match self.consume(Side::Target, migration, permit) {
            Ok(attempt) => {
                if self.manners.lock().unwrap().target_votes {
                    tokio::spawn(Self::vote_when_streamed(self.own.clone(), attempt.claims.key.migration));
                }
                Outcome::Prepared(Prepared {
                    data_address: "127.0.0.1:7450".to_owned(),
                    peer_address: "127.0.0.1:7451".to_owned(),
                })
            }
            Err(refusal) => refusal,
        }
    }

    async fn vote_when_streamed(own: Weak<Self>, id: MigrationId) {
        while let Some(host) = own.upgrade() {
            if host.physical.lock().unwrap().streamed.contains(&id) {
                return host.vote(id).await;
            }
            drop(host);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn start(&self, migration: &str, permit: Vec<u8>) -> Outcome {
        let attempt = match self.consume(Side::Source, migration, permit) {
            Ok(attempt) => attempt,
            Err(refusal) => return refusal,
        };
        let id = attempt.claims.key.migration;
        let channel = json!({
            "protocol": "TLSv1.3", "cipher_suite": "TLS_AES_256_GCM_SHA384", "key_exchange": "X25519MLKEM768",
            "channels": 1,
        });
        self.event(id, "connected", channel).await;
        if self.manners.lock().unwrap().flows {
            self.flow(id).await;
        }
        done()
    }

    /// The stream flows to its end; the guest stops; the source votes.
    pub(crate) async fn flow(&self, id: MigrationId) {
        self.event(id, "progress", json!({ "stream_bytes": 1000, "wire_bytes": 1100 })).await;
        let vm = self.attempt(id).claims.key.vm;
        self.physical.lock().unwrap().stop(vm, self.name.as_str());
        self.event(id, "stopped", json!({})).await;
        self.physical.lock().unwrap().streamed.insert(id);
        if self.manners.lock().unwrap().source_votes {
            self.vote(id).await;
        }
    }

    fn attempt(&self, id: MigrationId) -> Attempt {
        self.inner.lock().unwrap().attempts[&id].clone()
    }

    fn change(&self, id: MigrationId, change: impl FnOnce(&mut Attempt) -> bool) -> bool {
        change(self.inner.lock().unwrap().attempts.get_mut(&id).unwrap())
    }

    /// Votes, once, unless it gave up.
    pub(crate) async fn vote(&self, id: MigrationId) {
        if !self.change(id, |a| !a.gave_up && !std::mem::replace(&mut a.voted, true)) {
            return;
        }
        let Attempt { side, claims, permit, .. } = self.attempt(id);
        let evidence = evidence();
        if side == Side::Source {
            let vote = SourceVote { key: claims.key, permit, evidence, prior: PriorRunState::Running };
            self.state(&Statement::Frozen(vote)).await;
        } else {
            self.event(id, "accepted", json!({ "stream_bytes": 1000, "held_us": 5, "wire_bytes": 1100 }))
                .await;
            self.state(&Statement::Prepared(TargetVote { key: claims.key, permit, evidence })).await;
        }
    }

    /// Says again where the attempt stands here.
    async fn present(&self, key_json: &str) -> Outcome {
        let Some(attempt) = self.known(key_json) else { return error("unknown-migration", "no record") };
        let Attempt { side, claims, permit, voted, gave_up, ran, released, .. } = attempt;
        let (key, evidence, prior) = (claims.key, evidence(), PriorRunState::Running);
        let statement = match side {
            Side::Target if gave_up => Statement::Renounced(self.renunciation(&claims, permit)),
            Side::Target if ran => Statement::Running(RunningReceipt { key, permit, evidence, state: prior }),
            Side::Target if voted => Statement::Prepared(TargetVote { key, permit, evidence }),
            Side::Source if released => Statement::Released(ReleaseReceipt { key, evidence }),
            Side::Source if gave_up => Statement::Thawed(ThawReceipt { key, had_voted: voted }),
            Side::Source if voted => Statement::Frozen(SourceVote { key, permit, evidence, prior }),
            Side::Target | Side::Source => return done(),
        };
        self.state(&statement).await;
        done()
    }

    fn known(&self, key_json: &str) -> Option<Attempt> {
        let key: HandoverKey = serde_json::from_str(key_json).unwrap();
        let held = self.inner.lock().unwrap().attempts.get(&key.migration).cloned();
        held.inspect(|a| assert_eq!(a.claims.key, key, "every message matches exactly"))
    }

    async fn commit(&self, key_json: &str) -> Outcome {
        let Some(attempt) = self.known(key_json) else { return error("unknown-migration", "no record") };
        let (id, vm) = (attempt.claims.key.migration, attempt.claims.key.vm);
        assert!(attempt.voted && attempt.side == Side::Target, "only a target that voted is told to run");
        if self.change(id, |a| !a.gave_up && !std::mem::replace(&mut a.ran, true)) {
            self.physical.lock().unwrap().run(vm, self.name.as_str());
            self.inner.lock().unwrap().vms.insert(vm, attempt.claims.key.target_epoch.0);
            self.event(id, "running", json!({})).await;
            self.event(id, "responsive", json!({ "ms": 1.5, "basis": "test" })).await;
            let receipt = RunningReceipt {
                key: attempt.claims.key,
                permit: attempt.permit,
                evidence: evidence(),
                state: PriorRunState::Running,
            };
            self.state(&Statement::Running(receipt)).await;
        }
        done()
    }

    async fn release(&self, key_json: &str) -> Outcome {
        let Some(attempt) = self.known(key_json) else { return error("unknown-migration", "no record") };
        let id = attempt.claims.key.migration;
        assert!(attempt.voted && attempt.side == Side::Source, "only a frozen source is released");
        if self.change(id, |a| !std::mem::replace(&mut a.released, true)) {
            self.inner.lock().unwrap().vms.remove(&attempt.claims.key.vm);
            let parts = json!([{ "name": "freeze", "duration_ms": 3.0 }]);
            let detail = json!({ "downtime_ms": 12.5, "round_trip_us": 100, "parts": parts });
            self.event(id, "peer-running", detail).await;
            let receipt = ReleaseReceipt { key: attempt.claims.key, evidence: evidence() };
            self.state(&Statement::Released(receipt)).await;
        }
        done()
    }

    async fn give_up(&self, key_json: &str, code: &str, detail: &str) -> Outcome {
        let Some(attempt) = self.known(key_json) else { return error("unknown-migration", "no record") };
        let reason = types::handover::AbortReason { code: code.parse().unwrap(), detail: detail.to_owned() };
        self.end_attempt(&attempt, reason).await;
        done()
    }

    async fn end_attempt(&self, attempt: &Attempt, reason: types::handover::AbortReason) {
        let (id, key) = (attempt.claims.key.migration, attempt.claims.key);
        match attempt.side {
            // Bound by its vote: only the target can free it now.
            Side::Source if attempt.voted => {
                self.state(&Statement::AskRenounce(RenounceRequest { key, permit: attempt.permit })).await;
            }
            Side::Source => {
                if self.change(id, |a| !std::mem::replace(&mut a.gave_up, true)) {
                    self.physical.lock().unwrap().run(key.vm, self.name.as_str());
                    self.state(&Statement::NoVote(NoVote { key, reason })).await;
                }
            }
            Side::Target => {
                if self.change(id, |a| !a.ran && !std::mem::replace(&mut a.gave_up, true)) {
                    self.state(&Statement::Renounced(self.renunciation(&attempt.claims, attempt.permit)))
                        .await;
                }
            }
        }
    }

    fn renunciation(&self, claims: &PermitClaims, permit: Digest) -> Renunciation {
        Renunciation {
            key: claims.key,
            permit,
            source: claims.source.host.clone(),
            target: claims.target.host.clone(),
            journal: self.journal,
        }
    }

    /// The target's own wish to end, e.g. because its copy died.
    pub(crate) async fn renounce(&self, id: MigrationId) {
        let attempt = self.attempt(id);
        let detail = "its copy died".to_owned();
        let reason = types::handover::AbortReason { code: types::ErrorCode::TargetFailed, detail };
        self.end_attempt(&attempt, reason).await;
    }

    async fn decline(&self, order: &api::fleet::Decline) -> Outcome {
        let attempt: engine::handover::Attempt = serde_json::from_str(&order.attempt_json).unwrap();
        let code = order.code.parse().unwrap();
        let reason = types::handover::AbortReason { code, detail: order.detail.clone() };
        let statement = if order.side == "source" {
            Statement::NoVote(NoVote { key: attempt.key, reason })
        } else {
            Statement::Renounced(Renunciation {
                key: attempt.key,
                permit: attempt.permit,
                source: attempt.source,
                target: attempt.target,
                journal: self.journal,
            })
        };
        self.state(&statement).await;
        done()
    }

    async fn renounced(&self, token: Vec<u8>, target_key: &[u8]) -> Outcome {
        let signed = permit::SignedStatement::from_bytes(token).unwrap();
        let key = VerifyingKey::from_bytes(target_key).unwrap();
        let Ok(Statement::Renounced(proof)) = permit::statement::verify(&signed, &key) else {
            return error("permit-refused", "no renunciation");
        };
        let held = self.inner.lock().unwrap().attempts.get(&proof.key.migration).cloned();
        let Some(attempt) = held else { return error("unknown-migration", "no record") };
        assert_eq!(proof.permit, attempt.permit);
        if self.change(proof.key.migration, |a| !std::mem::replace(&mut a.gave_up, true)) {
            self.physical.lock().unwrap().run(proof.key.vm, self.name.as_str());
            let receipt = ThawReceipt { key: proof.key, had_voted: attempt.voted };
            self.state(&Statement::Thawed(receipt)).await;
        }
        done()
    }
}

/// What a QEMU says that it can run.
pub(crate) fn abilities(version: &str, machines: &[&str], cpu_features: &[&str]) -> Value {
    json!({
        "hypervisor": format!("qemu/{version}"), "machines": machines, "cpu_models": ["qemu64", "EPYC"],
        "cpu_features": cpu_features,
    })
}

fn evidence() -> StreamEvidence {
    StreamEvidence { stream_bytes: 1000, digest: Digest::of(b"the stream") }
}

fn agent_spki(seed: Digest) -> Vec<u8> {
    let mut der = vec![0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
    der.extend_from_slice(&seed.0);
    der
}

fn done() -> Outcome {
    Outcome::Done(Done {})
}

fn error(code: &str, detail: &str) -> Outcome {
    let (code, detail) = (code.to_owned(), detail.to_owned());
    Outcome::Error(api::fleet::Error { code, detail, hint: String::new() })
}

fn kind_of(body: &to_host::Body) -> &'static str {
    use to_host::Body as B;
    match body {
        B::Welcome(_) => "welcome",
        B::StartVm(_) => "start-vm",
        B::StopVm(_) => "stop-vm",
        B::Intent(_) => "intent",
        B::QueryLoad(_) => "query-load",
        B::SpawnAgent(_) => "spawn-agent",
        B::Prepare(_) => "prepare",
        B::Start(_) => "start",
        B::Commit(_) => "commit",
        B::Abort(_) => "abort",
        B::Release(_) => "release",
        B::Renounced(_) => "renounced",
        B::Renounce(_) => "renounce",
        B::Control(_) => "control",
        B::Forget(_) => "forget",
        B::StatementStored(_) => "statement-stored",
        B::Fenced(_) => "fenced",
        B::Void(_) => "void",
        B::Present(_) => "present",
        B::Decline(_) => "decline",
        B::InspectVm(_) => "inspect-vm",
        B::Quote(_) => "quote",
        B::DescribeHypervisor(_) => "describe-hypervisor",
        B::MicroProbe(_) => "micro-probe",
        B::Checkpoint(_) => "checkpoint",
        B::ReportHoldings(_) => "report-holdings",
    }
}
