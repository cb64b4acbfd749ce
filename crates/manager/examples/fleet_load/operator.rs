//! An operator with a few connections that stay open.

use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper::body::Bytes;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use link::ca::CaCertificate;
use link::control::connect_operator;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::Mutex;
use types::HostName;

#[derive(Clone)]
pub(crate) struct Operator {
    connections: Arc<Vec<Mutex<SendRequest<Full<Bytes>>>>>,
    next: Arc<AtomicUsize>,
    token: String,
}

impl Operator {
    pub(crate) async fn new(address: SocketAddr, state: &Path, connections: usize) -> Self {
        let token = std::fs::read_to_string(state.join("admin.token")).unwrap().trim().to_owned();
        let ca = CaCertificate::from_pem(&std::fs::read_to_string(state.join("ca.pem")).unwrap()).unwrap();
        let mut open = Vec::new();
        for _ in 0..connections {
            let stream = connect_operator(&address.to_string(), &ca).await.unwrap();
            let (sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
            tokio::spawn(connection);
            open.push(Mutex::new(sender));
        }
        Self { connections: Arc::new(open), next: Arc::default(), token }
    }

    async fn ask(&self, method: &str, path: &str, body: String) -> (u16, Value) {
        let at = self.next.fetch_add(1, Ordering::Relaxed) % self.connections.len();
        let mut sender = self.connections[at].lock().await;
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "manager")
            .header("authorization", format!("Bearer {}", self.token))
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body)))
            .unwrap();
        let response = sender.send_request(request).await.unwrap();
        let status = response.status().as_u16();
        let bytes = response.into_body().collect().await.unwrap().to_bytes();
        (status, serde_json::from_slice(&bytes).unwrap())
    }

    /// Asks for a migration; its id.
    pub(crate) async fn migrate(&self, vm: &str, to: &HostName) -> String {
        let mut nonce = [0; 16];
        aws_lc_rs::rand::fill(&mut nonce).unwrap();
        let at_ms = crate::host::now_us() / 1_000;
        let intent =
            json!({ "vm": vm, "target": to, "nonce": hex::encode(nonce), "timestamp_unix_ms": at_ms });
        let (status, answer) = self.ask("POST", "/v1/migrations", intent.to_string()).await;
        assert_eq!(status, 202, "{answer}");
        answer["id"].as_str().unwrap().to_owned()
    }

    /// How long its permit took; nothing if it got none.
    pub(crate) async fn decided_ms(&self, id: &str) -> Option<f64> {
        let (status, view) = self.ask("GET", &format!("/v1/migrations/{id}"), String::new()).await;
        assert_eq!(status, 200, "{view}");
        if view["permit_decision_ms"].is_null() {
            eprintln!("{id}: {} {}", view["state"], view["problem"]);
        }
        view["permit_decision_ms"].as_f64()
    }
}
