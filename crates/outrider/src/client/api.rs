//! The requests of `/v1`, typed. Names and ids in paths are validated types: they need no escaping.

use super::{Client, ClientError, EventStream};
use api::http::{AuditEntry, AuditVerified, HostAdded, HostView, Migrate, MigrateAccepted, StartVm, VmView};
use serde_json::Value;
use types::host::HostSpec;
use types::migration::MigrationView;
use types::vm::VmSpec;
use types::{HostName, MigrationId, Name};

/// What an operator may tell a running migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// Hold.
    Suspend,
    /// Go on.
    Resume,
    /// End.
    Terminate,
}

impl Order {
    /// The verb.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Suspend => "suspend",
            Self::Resume => "resume",
            Self::Terminate => "terminate",
        }
    }
}

impl Client {
    /// Every host.
    pub(crate) async fn hosts(&self) -> Result<Vec<HostView>, ClientError> {
        self.get("/v1/hosts").await
    }

    /// One host.
    pub(crate) async fn host(&self, name: &HostName) -> Result<HostView, ClientError> {
        self.get(&format!("/v1/hosts/{name}")).await
    }

    /// Enrols a host.
    pub(crate) async fn add_host(&self, spec: &HostSpec) -> Result<HostAdded, ClientError> {
        self.post("/v1/hosts", spec).await
    }

    /// Every VM.
    pub(crate) async fn vms(&self) -> Result<Vec<VmView>, ClientError> {
        self.get("/v1/vms").await
    }

    /// One VM.
    pub(crate) async fn vm(&self, name: &Name) -> Result<VmView, ClientError> {
        self.get(&format!("/v1/vms/{name}")).await
    }

    /// Records a VM.
    pub(crate) async fn define_vm(&self, spec: &VmSpec) -> Result<VmView, ClientError> {
        self.post("/v1/vms", spec).await
    }

    /// Starts a VM.
    pub(crate) async fn start_vm(&self, name: &Name, host: &HostName) -> Result<VmView, ClientError> {
        self.post(&format!("/v1/vms/{name}/start"), &StartVm { host: host.clone() }).await
    }

    /// Stops a VM.
    pub(crate) async fn stop_vm(&self, name: &Name) -> Result<VmView, ClientError> {
        self.post_empty(&format!("/v1/vms/{name}/stop")).await
    }

    /// Asks for a migration.
    pub(crate) async fn migrate(&self, intent: &Migrate) -> Result<MigrateAccepted, ClientError> {
        self.post("/v1/migrations", intent).await
    }

    /// Every migration that the manager remembers.
    pub(crate) async fn migrations(&self) -> Result<Vec<MigrationView>, ClientError> {
        self.get("/v1/migrations").await
    }

    /// One migration.
    pub(crate) async fn migration(&self, id: MigrationId) -> Result<MigrationView, ClientError> {
        self.get(&format!("/v1/migrations/{id}")).await
    }

    /// What happens in one migration, as it happens.
    pub(crate) async fn migration_events(&self, id: MigrationId) -> Result<EventStream, ClientError> {
        self.events(&format!("/v1/migrations/{id}/events")).await
    }

    /// Suspends, resumes or terminates.
    pub(crate) async fn order(&self, id: MigrationId, order: Order) -> Result<Value, ClientError> {
        self.post_empty(&format!("/v1/migrations/{id}/{}", order.as_str())).await
    }

    /// Verifies the audit log.
    pub(crate) async fn verify_audit(&self) -> Result<AuditVerified, ClientError> {
        self.get("/v1/audit/verify").await
    }

    /// The audit log.
    pub(crate) async fn audit(&self) -> Result<Vec<AuditEntry>, ClientError> {
        self.get("/v1/audit").await
    }
}
