//! A manager for tests: real TLS, scripted answers, and a memory of what it was asked.

#![allow(missing_docs, unreachable_pub, dead_code, clippy::unwrap_used)]

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use link::ca::{Ca, Subject};
use link::control::{OperatorListener, TlsConn};
use link::identity::{IdentityKey, LiveIdentity, TlsIdentity};
use std::convert::Infallible;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;
use tempfile::TempDir;

/// The token that the manager takes.
pub const TOKEN: &str = "ot1.test-token";

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Asked {
    pub line: String,
    pub authorization: String,
    pub body: String,
}

/// An answer.
#[derive(Debug, Clone)]
pub enum Reply {
    /// Status and JSON document.
    Json(u16, String),
    /// Status, content type and text.
    Text(u16, String),
    /// Events, then the end of the stream.
    Events(Vec<String>),
    /// Nothing, ever.
    Never,
}

impl Reply {
    pub fn ok(document: impl ToString) -> Self {
        Self::Json(200, document.to_string())
    }
    pub fn problem(status: u16, code: &str, detail: &str, hint: &str) -> Self {
        let document = serde_json::json!({"type": "about:blank", "title": code, "status": status, "code": code,
            "detail": detail, "hint": hint});
        Self::Json(status, document.to_string())
    }
}

type Script = dyn Fn(&Asked, usize) -> Reply + Send + Sync;

/// A manager that answers from a script: given the request, and how many came before it.
pub struct FakeManager {
    pub url: String,
    folder: TempDir,
    asked: Arc<Mutex<Vec<Asked>>>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl FakeManager {
    pub fn start(script: impl Fn(&Asked, usize) -> Reply + Send + Sync + 'static) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("admin.token"), format!("{TOKEN}\n")).unwrap();
        let identity = identity(folder.path());
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let address = "127.0.0.1:0".parse().unwrap();
        let mut listener = runtime.block_on(OperatorListener::bind(address, identity)).unwrap();
        let url = format!("https://{}", listener.local_address());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (memory, script): (_, Arc<Script>) = (asked.clone(), Arc::new(script));
        runtime.spawn(async move {
            loop {
                let connection = listener.accept().await;
                tokio::spawn(serve(connection, memory.clone(), script.clone()));
            }
        });
        Self { url, folder, asked, runtime: Some(runtime) }
    }

    /// The command, told where this manager is.
    pub fn outrider(&self) -> assert_cmd::Command {
        let mut command = outrider();
        command
            .env("OUTRIDER_MANAGER", &self.url)
            .env("OUTRIDER_TOKEN_FILE", self.folder.path().join("admin.token"))
            .env("OUTRIDER_CA", self.folder.path().join("ca.pem"));
        command
    }

    /// A file in the folder that goes with the manager.
    pub fn file(&self, name: &str, content: &str) -> std::path::PathBuf {
        let path = self.folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    /// What was asked so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }
}

impl Drop for FakeManager {
    fn drop(&mut self) {
        self.runtime.take().unwrap().shutdown_background();
    }
}

/// The command, without anything of the machine's own environment.
pub fn outrider() -> assert_cmd::Command {
    let mut command = assert_cmd::Command::cargo_bin("outrider").unwrap();
    for name in ["OUTRIDER_MANAGER", "OUTRIDER_TOKEN_FILE", "OUTRIDER_CA", "OUTRIDER_LOG"] {
        command.env_remove(name);
    }
    command.timeout(std::time::Duration::from_secs(60));
    command
}

/// A CA in `folder`, and a manager's certificate of it.
fn identity(folder: &Path) -> LiveIdentity {
    let now = SystemTime::now();
    let ca = Ca::load_or_create(folder, &"test".parse().unwrap(), now).unwrap();
    let key = IdentityKey::generate().unwrap();
    let name = "manager".parse().unwrap();
    let subject = Subject::manager(&name, &[], &[]);
    let issued = ca.issue(&subject, &key.signing_request().unwrap(), now).unwrap();
    LiveIdentity::new(TlsIdentity::from_pem(&issued.chain_pem, &key.to_pem()).unwrap())
}

async fn serve(connection: TlsConn, memory: Arc<Mutex<Vec<Asked>>>, script: Arc<Script>) {
    let service = service_fn(|request: Request<Incoming>| {
        let (memory, script) = (memory.clone(), script.clone());
        async move { Ok::<_, Infallible>(answer(request, &memory, &*script).await) }
    });
    let served =
        hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(connection), service);
    // A client that goes away in the middle is what some tests do.
    drop(served.await);
}

async fn answer(
    request: Request<Incoming>,
    memory: &Mutex<Vec<Asked>>,
    script: &Script,
) -> Response<Full<Bytes>> {
    let header =
        |name| request.headers().get(name).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
    let (line, authorization) = (format!("{} {}", request.method(), request.uri()), header("authorization"));
    let body = request.into_body().collect().await.map(|b| b.to_bytes()).unwrap_or_default();
    let asked = Asked { line, authorization, body: String::from_utf8_lossy(&body).into_owned() };
    let reply = {
        let mut memory = memory.lock().unwrap();
        memory.push(asked.clone());
        script(&asked, memory.len() - 1)
    };
    let (status, kind, body) = match reply {
        Reply::Json(status, text) => {
            let kind = if status < 400 { "application/json" } else { "application/problem+json" };
            (status, kind, Full::from(text))
        }
        Reply::Text(status, text) => (status, "text/plain", Full::from(text)),
        Reply::Events(events) => (200, "text/event-stream", Full::from(events.concat())),
        Reply::Never => std::future::pending().await,
    };
    Response::builder().status(status).header("content-type", kind).body(body).unwrap()
}
