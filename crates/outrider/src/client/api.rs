//! The requests of `/v1`, typed. Names and ids in paths are validated types: they need no escaping.

use super::{Client, ClientError, EventStream, INSPECT_LIMIT, REQUEST_LIMIT, VM_LIMIT};
use api::http::{
    AddToken, AuditEntry, AuditVerified, Bundle, Explanation, HostAdded, HostView, Migrate, MigrateAccepted,
    Reconcile, Reconciliation, StartVm, TokenAdded, TokenView, VmInspection, VmView,
};
use std::collections::VecDeque;
use types::host::HostSpec;
use types::migration::MigrationView;
use types::vm::VmSpec;
use types::{HostName, MigrationId, Name, Side};

/// Audit entries asked for at a time.
const AUDIT_PAGE: usize = 5_000;

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
        self.post("/v1/hosts", spec, REQUEST_LIMIT).await
    }

    /// Every VM.
    pub(crate) async fn vms(&self) -> Result<Vec<VmView>, ClientError> {
        self.get("/v1/vms").await
    }

    /// One VM.
    pub(crate) async fn vm(&self, name: &Name) -> Result<VmView, ClientError> {
        self.get(&format!("/v1/vms/{name}")).await
    }

    /// What a VM's stream is compared with. The host may have to make its catalogue first.
    pub(crate) async fn inspect_vm(&self, name: &Name) -> Result<VmInspection, ClientError> {
        self.get_within(&format!("/v1/vms/{name}/inspection"), INSPECT_LIMIT).await
    }

    /// Records a VM.
    pub(crate) async fn define_vm(&self, spec: &VmSpec) -> Result<VmView, ClientError> {
        self.post("/v1/vms", spec, REQUEST_LIMIT).await
    }

    /// Starts a VM.
    pub(crate) async fn start_vm(&self, name: &Name, host: &HostName) -> Result<VmView, ClientError> {
        self.post(&format!("/v1/vms/{name}/start"), &StartVm { host: host.clone() }, VM_LIMIT).await
    }

    /// Stops a VM.
    pub(crate) async fn stop_vm(&self, name: &Name) -> Result<VmView, ClientError> {
        self.post_empty(&format!("/v1/vms/{name}/stop"), VM_LIMIT).await
    }

    /// Asks for a migration.
    pub(crate) async fn migrate(&self, intent: &Migrate) -> Result<MigrateAccepted, ClientError> {
        self.post("/v1/migrations", intent, REQUEST_LIMIT).await
    }

    /// Has every gate asked, without moving anything.
    pub(crate) async fn explain(&self, intent: &Migrate) -> Result<Explanation, ClientError> {
        self.post("/v1/migrations/explain", intent, INSPECT_LIMIT).await
    }

    /// Makes a token.
    pub(crate) async fn add_token(&self, order: &AddToken) -> Result<TokenAdded, ClientError> {
        self.post("/v1/tokens", order, REQUEST_LIMIT).await
    }

    /// Every token.
    pub(crate) async fn tokens(&self) -> Result<Vec<TokenView>, ClientError> {
        self.get("/v1/tokens").await
    }

    /// Revokes a token; those that are left.
    pub(crate) async fn revoke_token(&self, name: &Name) -> Result<Vec<TokenView>, ClientError> {
        self.post_empty(&format!("/v1/tokens/{name}/revoke"), REQUEST_LIMIT).await
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
    pub(crate) async fn order(&self, id: MigrationId, order: Order) -> Result<MigrationView, ClientError> {
        self.post_empty(&format!("/v1/migrations/{id}/{}", order.as_str()), REQUEST_LIMIT).await
    }

    /// An operator's word that the host on this side is dead and fenced.
    pub(crate) async fn resolve(&self, id: MigrationId, fenced: Side) -> Result<MigrationView, ClientError> {
        let word = serde_json::json!({ "fenced": fenced });
        self.post(&format!("/v1/migrations/{id}/resolve"), &word, REQUEST_LIMIT).await
    }

    /// Verifies the audit log.
    pub(crate) async fn verify_audit(&self) -> Result<AuditVerified, ClientError> {
        self.get("/v1/audit/verify").await
    }

    /// Everything about one migration that can be verified offline.
    pub(crate) async fn bundle(&self, id: MigrationId) -> Result<Bundle, ClientError> {
        self.get(&format!("/v1/migrations/{id}/bundle")).await
    }

    /// Says what a reconciliation would do, or does it. Every host is asked.
    pub(crate) async fn reconcile(&self, order: &Reconcile) -> Result<Reconciliation, ClientError> {
        self.post("/v1/audit/reconcile", order, INSPECT_LIMIT).await
    }

    /// The last `limit` entries of the audit log, oldest first. The log is read page by page, and only as much is
    /// kept as is wanted.
    pub(crate) async fn audit(&self, limit: usize) -> Result<Vec<AuditEntry>, ClientError> {
        let (mut last, mut after) = (VecDeque::new(), Some(0));
        while let Some(from) = after {
            let page = self.audit_page(from).await?;
            after = next_page(&page, from);
            last.extend(page);
            last.drain(..last.len().saturating_sub(limit));
        }
        Ok(last.into())
    }

    /// A page of the audit log: the entries behind that number, oldest first.
    pub(crate) async fn audit_page(&self, after: u64) -> Result<Vec<AuditEntry>, ClientError> {
        self.get(&format!("/v1/audit?after={after}&limit={AUDIT_PAGE}")).await
    }
}

/// Where the page behind this one begins, if there is one.
pub(crate) fn next_page(page: &[AuditEntry], after: u64) -> Option<u64> {
    let end = page.last().map(|entry| entry.sequence).filter(|end| *end > after)?;
    (page.len() >= AUDIT_PAGE).then_some(end)
}
