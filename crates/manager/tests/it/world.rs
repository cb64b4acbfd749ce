//! A manager in a runtime of its own, so that it can be killed like a process, and an operator's client.

use crate::fake_host::FakeHost;
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use link::ca::CaCertificate;
use link::control::connect_operator;
use outrider_manager::{Config, Running, run_with};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use types::{ErrorCode, Problem, VmId};

/// Long enough for a loaded machine; conditions are polled, so that a fast one does not wait.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Where guests execute, as an outside observer sees it.
#[derive(Default)]
pub(crate) struct Physical {
    running: BTreeMap<VmId, BTreeSet<String>>,
    /// Migrations whose stream is out.
    pub(crate) streamed: BTreeSet<types::MigrationId>,
    pub(crate) most: usize,
    /// Specs of the VMs that were started, as hosts remember them.
    pub(crate) specs: BTreeMap<VmId, String>,
}

impl Physical {
    pub(crate) fn run(&mut self, vm: VmId, host: &str) {
        let hosts = self.running.entry(vm).or_default();
        hosts.insert(host.to_owned());
        self.most = self.most.max(hosts.len());
    }
    pub(crate) fn stop(&mut self, vm: VmId, host: &str) {
        self.running.entry(vm).or_default().remove(host);
    }
    pub(crate) fn on(&self, vm: VmId) -> Vec<String> {
        self.running.get(&vm).map(|h| h.iter().cloned().collect()).unwrap_or_default()
    }
}

/// What is shared by everything in one test.
pub(crate) struct World {
    _folder: TempDir,
    pub(crate) physical: Arc<Mutex<Physical>>,
    /// Where hosts find the manager now; `None` while there is none.
    pub(crate) hosts_port: Arc<Mutex<Option<SocketAddr>>>,
    manager: Mutex<Option<Process>>,
    state: std::path::PathBuf,
    /// The manager's name, and the URL of the registry that it shares.
    shared: Mutex<Option<(&'static str, String)>>,
}

struct Process {
    operators: SocketAddr,
    kill: Option<oneshot::Sender<()>>,
    end: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<Result<(), Problem>>>,
}

pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) kind: String,
    pub(crate) body: Value,
}

impl Answer {
    pub(crate) fn code(&self) -> &str {
        self.body["code"].as_str().unwrap_or("")
    }
}

pub(crate) fn config(state: &Path) -> Config {
    Config {
        state_folder: state.to_owned(),
        operator_listen: "127.0.0.1:0".parse().unwrap(),
        hosts_listen: "127.0.0.1:0".parse().unwrap(),
        ..Config::default()
    }
}

/// Starts a manager on its own runtime. Retries while the one that was killed still lets go of the folder.
fn launch(config: &Config) -> Result<(Process, Running), Problem> {
    let since = Instant::now();
    loop {
        match try_launch(config.clone()) {
            Err(problem) if problem.code == ErrorCode::WrongState && since.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(20));
            }
            other => return other,
        }
    }
}

pub(crate) fn try_run(config: Config) -> Result<(), Problem> {
    try_launch(config).map(|_| ())
}

fn try_launch(config: Config) -> Result<(Process, Running), Problem> {
    let (kill, killed) = oneshot::channel();
    let (end, ended) = oneshot::channel();
    let (up, listening) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let result = runtime.block_on(async {
            let shutdown = async {
                if ended.await.is_err() {
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                result = run_with(config, shutdown, move |running| up.send(running.clone()).unwrap()) => result,
                _ = killed => Ok(()),
            }
        });
        // Everything that it had under way is dropped where it stands.
        runtime.shutdown_timeout(Duration::from_secs(5));
        result
    });
    match listening.recv() {
        Ok(running) => {
            let process = Process {
                operators: running.operators,
                kill: Some(kill),
                end: Some(end),
                thread: Some(thread),
            };
            Ok((process, running))
        }
        Err(_) => Err(thread.join().unwrap().expect_err("it ended without listening")),
    }
}

impl World {
    pub(crate) fn new() -> Arc<Self> {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("m");
        Self::at(folder, state)
    }

    /// A world of the manager of this name, whose registry is at a URL.
    pub(crate) fn sharing(name: &'static str, url: &str) -> Arc<Self> {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("m");
        Self::made(folder, state, Some((name, url.to_owned())))
    }

    /// A world whose manager keeps its state in this folder.
    pub(crate) fn at(folder: TempDir, state: std::path::PathBuf) -> Arc<Self> {
        Self::made(folder, state, None)
    }

    fn made(folder: TempDir, state: std::path::PathBuf, shared: Option<(&'static str, String)>) -> Arc<Self> {
        if std::env::var_os("OUTRIDER_TEST_LOG").is_some() {
            drop(
                tracing_subscriber::fmt().with_max_level(tracing::Level::DEBUG).with_test_writer().try_init(),
            );
        }
        let world = Arc::new(Self {
            _folder: folder,
            state,
            shared: Mutex::new(shared),
            physical: Arc::default(),
            hosts_port: Arc::default(),
            manager: Mutex::new(None),
        });
        world.start();
        world
    }

    /// From its next start on the registry is at this URL.
    pub(crate) fn share(&self, url: &str) {
        *self.shared.lock().unwrap() = Some(("manager", url.to_owned()));
    }

    pub(crate) fn state(&self) -> std::path::PathBuf {
        self.state.clone()
    }

    pub(crate) fn config(&self) -> Config {
        let mut config = config(&self.state());
        if let Some((name, url)) = &*self.shared.lock().unwrap() {
            (config.name, config.registry) = (name.parse().unwrap(), Some(url.parse().unwrap()));
        }
        config
    }

    pub(crate) fn start(&self) {
        let (process, running) = launch(&self.config()).unwrap();
        *self.hosts_port.lock().unwrap() = Some(running.hosts);
        *self.manager.lock().unwrap() = Some(process);
    }

    /// Kills the manager where it stands.
    pub(crate) fn kill(&self) {
        *self.hosts_port.lock().unwrap() = None;
        let process = self.manager.lock().unwrap().take();
        if let Some(mut process) = process {
            process.kill.take().unwrap().send(()).unwrap_or_default();
            process.thread.take().unwrap().join().unwrap().unwrap();
        }
    }

    /// Ends the manager as a signal would.
    pub(crate) fn end(&self) -> Result<(), Problem> {
        *self.hosts_port.lock().unwrap() = None;
        let mut process = self.manager.lock().unwrap().take().unwrap();
        process.end.take().unwrap().send(()).unwrap();
        process.thread.take().unwrap().join().unwrap()
    }

    /// Waits until the manager ends by itself.
    pub(crate) fn wait(&self) -> Result<(), Problem> {
        let process = self.manager.lock().unwrap().take().unwrap();
        let (_kill, _end) = (process.kill, process.end);
        process.thread.unwrap().join().unwrap()
    }

    pub(crate) fn token(&self) -> String {
        std::fs::read_to_string(self.state().join("admin.token")).unwrap().trim().to_owned()
    }

    pub(crate) fn ca(&self) -> CaCertificate {
        CaCertificate::from_pem(&std::fs::read_to_string(self.state().join("ca.pem")).unwrap()).unwrap()
    }

    fn operators(&self) -> SocketAddr {
        self.manager.lock().unwrap().as_ref().unwrap().operators
    }

    pub(crate) async fn request(&self, method: &str, path: &str, token: &str, body: &str) -> Answer {
        let (address, ca) = (self.operators().to_string(), self.ca());
        let since = Instant::now();
        // The port bounds half-open handshakes per address: many at once are turned away, and come again.
        let stream = loop {
            match connect_operator(&address, &ca).await {
                Ok(stream) => break stream,
                Err(_) if since.elapsed() < PATIENCE => tokio::time::sleep(Duration::from_millis(10)).await,
                Err(error) => panic!("{error:?}"),
            }
        };
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        let connection = tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "manager")
            .header("authorization", format!("Bearer {token}"))
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body.to_owned())))
            .unwrap();
        let response = sender.send_request(request).await.unwrap();
        let status = response.status();
        let kind =
            response.headers().get("content-type").and_then(|h| h.to_str().ok()).unwrap_or("").to_owned();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        connection.abort();
        let text = String::from_utf8_lossy(&bytes).into_owned();
        Answer { status, kind, body: serde_json::from_slice(&bytes).unwrap_or(Value::String(text)) }
    }

    /// Opens an event stream and collects what it says until `enough`.
    pub(crate) async fn events(&self, path: &str, enough: impl FnMut(&str) -> bool) -> String {
        let (body, connection) = self.open_events(path, &self.token()).await;
        let text = Self::told(body, enough).await;
        connection.abort();
        text
    }

    /// Opens an event stream with a token: it is open when this returns.
    pub(crate) async fn open_events(&self, path: &str, token: &str) -> (Incoming, JoinHandle<()>) {
        let stream = connect_operator(&self.operators().to_string(), &self.ca()).await.unwrap();
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        let connection = tokio::spawn(async move { drop(connection.await) });
        let request = Request::builder()
            .uri(path)
            .header("host", "manager")
            .header("authorization", format!("Bearer {token}"))
            .body(Full::new(Bytes::new()))
            .unwrap();
        let response = sender.send_request(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        (response.into_body(), connection)
    }

    /// What a stream says until `enough`, or to its end.
    pub(crate) async fn told(mut body: Incoming, mut enough: impl FnMut(&str) -> bool) -> String {
        let mut text = String::new();
        while !enough(&text) {
            let frame = tokio::time::timeout(PATIENCE, body.frame()).await.expect("an event in time");
            let Some(Ok(frame)) = frame else { break };
            text.push_str(&String::from_utf8_lossy(frame.data_ref().unwrap()));
        }
        text
    }

    pub(crate) async fn get(&self, path: &str) -> Value {
        let answer = self.request("GET", path, &self.token(), "").await;
        assert_eq!(answer.status, StatusCode::OK, "{path}: {}", answer.body);
        answer.body
    }

    pub(crate) async fn post(&self, path: &str, body: &Value) -> Answer {
        self.request("POST", path, &self.token(), &body.to_string()).await
    }

    pub(crate) async fn post_owned(&self, path: &'static str, body: Value) -> Answer {
        self.post(path, &body).await
    }

    pub(crate) async fn ok(&self, path: &str, body: &Value) -> Value {
        let answer = self.post(path, body).await;
        assert!(answer.status.is_success(), "{path}: {}", answer.body);
        answer.body
    }

    /// A host that is enrolled, joined, and attached.
    pub(crate) async fn host(self: &Arc<Self>, name: &str) -> Arc<FakeHost> {
        self.host_of(name, host_spec(name)).await
    }

    /// The same with a record of its own.
    pub(crate) async fn host_of(self: &Arc<Self>, name: &str, spec: Value) -> Arc<FakeHost> {
        let token = self.ok("/v1/hosts", &spec).await["join_token"].as_str().unwrap().to_owned();
        let host = FakeHost::join(self, name, &token).await.unwrap();
        host.attach();
        self.until(format!("{name} is connected"), async || {
            self.get(&format!("/v1/hosts/{name}")).await["state"] == "connected"
        })
        .await;
        host
    }

    /// A VM that runs on a host.
    pub(crate) async fn vm(&self, name: &str, number: u8, host: &str) -> VmId {
        let spec = vm_spec(name, number);
        self.ok("/v1/vms", &spec).await;
        let view = self.ok(&format!("/v1/vms/{name}/start"), &json!({ "host": host })).await;
        assert_eq!(view["state"], "running");
        VmId::from_bytes([number; 16])
    }

    /// Waits for a condition.
    pub(crate) async fn until(&self, what: impl std::fmt::Display, mut condition: impl AsyncFnMut() -> bool) {
        let since = Instant::now();
        while !condition().await {
            assert!(since.elapsed() < PATIENCE, "not within {} s: {what}", PATIENCE.as_secs());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub(crate) async fn migrate(&self, vm: &str, target: &str) -> String {
        let answer = self.post("/v1/migrations", &intent(vm, target)).await;
        assert_eq!(answer.status, StatusCode::ACCEPTED, "{}", answer.body);
        answer.body["id"].as_str().unwrap().to_owned()
    }

    /// Waits until a migration has ended.
    pub(crate) async fn ended(&self, id: &str) -> Value {
        let path = format!("/v1/migrations/{id}");
        self.until(format!("{id} ends"), async || !self.get(&path).await["ended_at"].is_null()).await;
        self.get(&path).await
    }

    /// What must hold after every migration, however it ended.
    pub(crate) async fn check_settled(&self, vm: VmId, expect_on: &str) {
        {
            let physical = self.physical.lock().unwrap();
            assert_eq!(physical.on(vm), [expect_on], "exactly one copy");
            assert_eq!(physical.most, 1, "never two");
        }
        let verified = self.get("/v1/audit/verify").await;
        assert_eq!(verified["verified"], true, "{verified}");
        let metrics = self.get("/metrics").await;
        assert!(metrics.as_str().unwrap().contains("outrider_reservations 0"), "{metrics}");
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.kill();
    }
}

pub(crate) fn now_ms() -> u64 {
    u64::try_from(std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_millis())
        .unwrap()
}

pub(crate) fn nonce() -> String {
    let mut bytes = [0; 16];
    aws_lc_rs::rand::fill(&mut bytes).unwrap();
    hex::encode(bytes)
}

pub(crate) fn intent(vm: &str, target: &str) -> Value {
    json!({ "vm": vm, "target": target, "nonce": nonce(), "timestamp_unix_ms": now_ms() })
}

pub(crate) fn mac(name: &str) -> String {
    format!("02:00:00:00:00:{:02x}", name.as_bytes().last().unwrap())
}

pub(crate) fn host_spec(name: &str) -> Value {
    json!({
        "name": name, "control_address": "127.0.0.1", "migration_address": "10.7.0.1",
        "macs": [mac(name)], "capacity": { "memory_bytes": 4_u64 << 30, "vcpus": 8, "vms": 4 }, "zone": "z",
    })
}

pub(crate) fn vm_spec(name: &str, number: u8) -> Value {
    json!({
        "uuid": VmId::from_bytes([number; 16]), "name": name, "accel": "tcg", "vcpus": 1,
        "memory_bytes": VM_BYTES,
    })
}

/// Memory of every VM.
pub(crate) const VM_BYTES: u64 = 256 << 20;
