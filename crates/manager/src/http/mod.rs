//! The operators' side: HTTPS, JSON, server-sent events.

mod auth;
mod events;
mod handlers;
mod platforms;
mod policies;
mod problem;

pub(crate) use auth::{Caller, Doorkeeper};

use crate::core::Manager;
use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::extract::connect_info::Connected;
use axum::routing::{get, post};
use axum::serve::IncomingStream;
use link::control::{OperatorListener, TlsConn};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::Mutex;
use types::Problem;

/// The longest document is a VM's spec: far below a quarter of a MiB.
const BODY_LIMIT_BYTES: usize = 256 * 1024;

/// Reference values with the events that were recorded for 24 registers.
const REFERENCE_LIMIT_BYTES: usize = 4 * 1024 * 1024;

/// Whether the registry took writes, and when it was asked.
pub(crate) type Readiness = (Instant, Result<(), Problem>);

/// What handlers share.
#[derive(Clone)]
pub(crate) struct App {
    pub(crate) manager: Arc<Manager>,
    pub(crate) door: Arc<Doorkeeper>,
    pub(crate) ready: Arc<Mutex<Option<Readiness>>>,
}

/// The routes.
pub(crate) fn router(manager: Arc<Manager>) -> Router {
    let app = App { manager, door: Arc::new(Doorkeeper::default()), ready: Arc::default() };
    Router::new()
        .route("/healthz", get(handlers::healthz))
        .route("/readyz", get(handlers::readyz))
        .route("/metrics", get(handlers::metrics))
        .route("/v1/hosts", get(handlers::hosts).post(handlers::add_host))
        .route("/v1/hosts/{name}", get(handlers::host))
        .route("/v1/hosts/{name}/attest", post(platforms::attest))
        .route("/v1/hosts/{name}/reference", post(platforms::record))
        .route("/v1/references", get(platforms::references))
        .route(
            "/v1/references/{kind}/{name}",
            get(platforms::reference)
                .post(platforms::set)
                .layer(DefaultBodyLimit::max(REFERENCE_LIMIT_BYTES)),
        )
        .route("/v1/references/{kind}/{name}/allow", post(platforms::allow))
        .route("/v1/references/{kind}/{name}/remove", post(platforms::remove))
        .route("/v1/tokens", get(handlers::tokens).post(handlers::add_token))
        .route("/v1/tokens/{name}/revoke", post(handlers::revoke_token))
        .route("/v1/policy", get(policies::show).post(policies::apply))
        .route("/v1/policy/rollback", post(policies::roll_back))
        .route("/v1/policy/history", get(policies::history))
        .route("/v1/plans", get(policies::plans).post(policies::add_plan))
        .route("/v1/plans/{id}/revoke", post(policies::revoke_plan))
        .route("/v1/vms", get(handlers::vms).post(handlers::define_vm))
        .route("/v1/vms/{name}", get(handlers::vm))
        .route("/v1/vms/{name}/inspection", get(handlers::inspect_vm))
        .route("/v1/vms/{name}/start", post(handlers::start_vm))
        .route("/v1/vms/{name}/stop", post(handlers::stop_vm))
        .route("/v1/migrations", get(handlers::migrations).post(handlers::migrate))
        .route("/v1/migrations/explain", post(handlers::explain))
        .route("/v1/migrations/{id}", get(handlers::migration))
        .route("/v1/migrations/{id}/suspend", post(handlers::suspend))
        .route("/v1/migrations/{id}/resume", post(handlers::resume))
        .route("/v1/migrations/{id}/terminate", post(handlers::terminate))
        .route("/v1/migrations/{id}/resolve", post(handlers::resolve))
        .route("/v1/migrations/{id}/bundle", get(handlers::bundle))
        .route("/v1/migrations/{id}/events", get(events::of_migration))
        .route("/v1/events", get(events::all))
        .route("/v1/audit", get(handlers::audit))
        .route("/v1/audit/verify", get(handlers::verify_audit))
        .route("/v1/audit/reconcile", post(handlers::reconcile))
        .fallback(handlers::not_found)
        .method_not_allowed_fallback(handlers::method_not_allowed)
        .layer(DefaultBodyLimit::max(BODY_LIMIT_BYTES))
        .with_state(app)
}

/// From where a caller connects.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CallerAddress(pub(crate) SocketAddr);

impl Connected<IncomingStream<'_, Door>> for CallerAddress {
    fn connect_info(stream: IncomingStream<'_, Door>) -> Self {
        Self(*stream.remote_addr())
    }
}

/// The operators' port as axum takes it.
pub(crate) struct Door(pub(crate) OperatorListener);

impl axum::serve::Listener for Door {
    type Io = TlsConn;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (TlsConn, SocketAddr) {
        let connection = self.0.accept().await;
        let address = connection.peer_address();
        (connection, address)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.0.local_address())
    }
}
