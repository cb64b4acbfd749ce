//! The requests of `/v1`, typed. Names and ids in paths are validated types: they need no escaping.

use super::{Client, ClientError, EventStream, INSPECT_LIMIT, REQUEST_LIMIT, VM_LIMIT};
use api::http::{
    AddPlan, AddToken, AllowValue, AttestationView, AuditEntry, AuditVerified, Bundle, Explanation,
    HostAdded, HostView, Migrate, MigrateAccepted, PlanView, PolicyContent, PolicyRollback, PolicySetView,
    Reconcile, Reconciliation, RecordReference, ReferenceView, StartVm, TokenAdded, TokenView, VmInspection,
    VmView,
};
use std::collections::VecDeque;
use types::host::HostSpec;
use types::migration::MigrationView;
use types::vm::VmSpec;
use types::{HostName, MigrationId, Name, Nonce, Side};

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

    /// Asks a host's TPM. It may be slow, and others may stand before.
    pub(crate) async fn attest_host(&self, name: &HostName) -> Result<AttestationView, ClientError> {
        self.post_empty(&format!("/v1/hosts/{name}/attest"), INSPECT_LIMIT).await
    }

    /// Takes a host's present state as reference.
    pub(crate) async fn record_reference(
        &self,
        name: &HostName,
        order: &RecordReference,
    ) -> Result<ReferenceView, ClientError> {
        self.post(&format!("/v1/hosts/{name}/reference"), order, INSPECT_LIMIT).await
    }

    /// Every scope's reference values.
    pub(crate) async fn references(&self) -> Result<Vec<ReferenceView>, ClientError> {
        self.get("/v1/references").await
    }

    /// One scope's reference values, in full.
    pub(crate) async fn reference(&self, scope: &str) -> Result<ReferenceView, ClientError> {
        self.get(&format!("/v1/references/{scope}")).await
    }

    /// Sets reference values.
    pub(crate) async fn set_reference(
        &self,
        scope: &str,
        values: &serde_json::Value,
    ) -> Result<ReferenceView, ClientError> {
        self.post(&format!("/v1/references/{scope}"), values, REQUEST_LIMIT).await
    }

    /// Forgets reference values; those that are left.
    pub(crate) async fn remove_reference(&self, scope: &str) -> Result<Vec<ReferenceView>, ClientError> {
        self.post_empty(&format!("/v1/references/{scope}/remove"), REQUEST_LIMIT).await
    }

    /// Allows one more value.
    pub(crate) async fn allow_value(
        &self,
        scope: &str,
        order: &AllowValue,
    ) -> Result<ReferenceView, ClientError> {
        self.post(&format!("/v1/references/{scope}/allow"), order, REQUEST_LIMIT).await
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

    /// Puts a policy set into force.
    pub(crate) async fn apply_policy(&self, content: &PolicyContent) -> Result<PolicySetView, ClientError> {
        self.post("/v1/policy", content, REQUEST_LIMIT).await
    }

    /// Puts a set into force that was before.
    pub(crate) async fn roll_back_policy(&self, digest: String) -> Result<PolicySetView, ClientError> {
        self.post("/v1/policy/rollback", &PolicyRollback { digest }, REQUEST_LIMIT).await
    }

    /// The policy set in force.
    pub(crate) async fn policy(&self) -> Result<PolicySetView, ClientError> {
        self.get("/v1/policy").await
    }

    /// Every set that was applied, newest first.
    pub(crate) async fn policy_history(&self) -> Result<Vec<PolicySetView>, ClientError> {
        self.get("/v1/policy/history").await
    }

    /// Makes a plan of maintenance.
    pub(crate) async fn add_plan(&self, order: &AddPlan) -> Result<PlanView, ClientError> {
        self.post("/v1/plans", order, REQUEST_LIMIT).await
    }

    /// The latest plans, newest first.
    pub(crate) async fn plans(&self) -> Result<Vec<PlanView>, ClientError> {
        self.get("/v1/plans").await
    }

    /// Takes a plan back.
    pub(crate) async fn revoke_plan(&self, id: Nonce) -> Result<PlanView, ClientError> {
        self.post_empty(&format!("/v1/plans/{id}/revoke"), REQUEST_LIMIT).await
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
