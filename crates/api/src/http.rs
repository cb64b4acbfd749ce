//! HTTP documents (`/v1/…`). Keys carry their units and never change their meaning.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use types::host::{Capacity, HostSpec, HostState, Interface, Load};
use types::inventory::{Enrolment, Inventory};
use types::vm::{VmSpec, VmState};
use types::{ErrorCode, HostName, MigrationId, Name, Nonce};

/// `POST /v1/hosts` answers so: the only time that the token is shown.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HostAdded {
    /// The record.
    pub host: HostView,
    /// Single-use join token; it carries the manager's address and the CA's fingerprint.
    pub join_token: String,
}

/// `POST /v1/hosts` takes a [`HostSpec`].
pub type AddHost = HostSpec;

/// A host as `GET /v1/hosts` shows it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HostView {
    /// Its name.
    pub name: HostName,
    /// Its identity.
    pub spiffe_id: String,
    /// How it stands.
    pub state: HostState,
    /// `unattested` (its record names no TPM), `unproved` (it has not joined with it yet), `trusted` or `refused`, by the
    /// last question; each migration asks anew.
    pub attestation: String,
    /// Of its TPM, where its record names one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<AttestationView>,
    /// From the record.
    pub control_address: String,
    /// From the record.
    pub migration_address: String,
    /// From the record.
    pub macs: Vec<String>,
    /// From the record.
    pub capacity: Capacity,
    /// From the record.
    pub zone: String,
    /// VMs that the registry places there.
    pub vms: Vec<Name>,
    /// Last measured load.
    pub load: Option<Load>,
    /// As last reported.
    pub interfaces: Vec<Interface>,
    /// Version of its daemon.
    pub version: Option<String>,
    /// RFC 3339.
    pub last_seen: Option<String>,
}

/// `POST /v1/hosts/{name}/attest`: what a host's TPM says now, or said last.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttestationView {
    /// The host.
    pub host: HostName,
    /// `unproved`, `trusted` or `refused`.
    pub verdict: String,
    /// RFC 3339; when that was found.
    pub at: Option<String>,
    /// Why it is refused.
    pub reason: Option<String>,
    /// Codes of the reasons.
    pub reasons: Vec<String>,
    /// Name of its endorsement key: the TPM's identity.
    pub ek_name: Option<String>,
    /// Name of its attestation key.
    pub ak_name: Option<String>,
    /// Whose reference values count: `host/NAME` or `class/NAME`.
    pub reference: Option<String>,
    /// Of the TPM, 16 hexadecimal digits in its vendor's numbering.
    pub firmware_version: Option<String>,
    /// Worth knowing, deciding nothing.
    pub notes: Vec<String>,
    /// Expected against found. Empty when the quote itself was not good.
    pub pcrs: Vec<PcrView>,
}

/// One register: expected against found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PcrView {
    /// Its number.
    pub pcr: u8,
    /// Its bank.
    pub bank: String,
    /// Whether its value is allowed now.
    pub matches: bool,
    /// The values that are allowed now, in hexadecimal.
    pub expected: Vec<String>,
    /// What they stand for, in the same order.
    pub notes: Vec<String>,
    /// The value that was quoted.
    pub found: String,
    /// Why it differs, as far as the event log tells.
    pub explanation: Option<String>,
}

/// Reference values, as `GET /v1/references` shows them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReferenceView {
    /// `host/NAME` or `class/NAME`.
    pub scope: String,
    /// BLAKE3 over the values, as appraisals name it.
    pub digest: String,
    /// RFC 3339.
    pub set_at: String,
    /// Who set them.
    pub set_by: String,
    /// The registers, e.g. `sha256:0,2,4,7`.
    pub pcrs: String,
    /// The values; `POST /v1/references/{scope}` takes the same document. Not in a list: with recorded events they are long.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub values: Option<serde_json::Value>,
}

/// `POST /v1/references/{scope}/allow`: one more value of one register.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AllowValue {
    /// The register, 0 to 23.
    pub pcr: u8,
    /// The value, in hexadecimal.
    pub digest: String,
    /// What it stands for, for people.
    #[serde(default)]
    pub note: String,
    /// Seconds since 1970: not accepted earlier.
    #[serde(default)]
    pub not_before_unix_s: Option<u64>,
    /// Seconds since 1970: not accepted later.
    #[serde(default)]
    pub not_after_unix_s: Option<u64>,
}

/// `POST /v1/hosts/{name}/reference`: takes the host's present state as reference.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecordReference {
    /// The registers, bank sha256.
    pub pcrs: Vec<u8>,
    /// For this class of hosts; left out: for this host.
    #[serde(default)]
    pub class: Option<Name>,
}

/// `POST /v1/vms` takes a [`VmSpec`]; this is a VM as `GET /v1/vms` shows it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VmView {
    /// The spec.
    pub spec: VmSpec,
    /// Digest of the spec.
    pub spec_digest: String,
    /// How it stands.
    pub state: VmState,
    /// Host that holds it.
    pub host: Option<HostName>,
    /// Epoch of its location.
    pub epoch: u64,
    /// Open migration, if any.
    pub migration: Option<MigrationId>,
    /// As enrolled when it started.
    pub inventory: Option<Inventory>,
}

/// `GET /v1/vms/{name}/inspection`: what the stream of a VM is compared with.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VmInspection {
    /// The VM.
    pub vm: Name,
    /// Host that holds it; the catalogue is of its QEMU.
    pub host: Option<HostName>,
    /// As enrolled when it started, with that host's catalogue.
    pub enrolment: Enrolment,
    /// Why there is no catalogue.
    pub catalogue_missing: Option<String>,
    /// What was plugged into the running VM, or unplugged from it, behind the manager's back; it does not move so.
    #[serde(default)]
    pub differences: Vec<String>,
    /// Why that is not known, where it is not.
    #[serde(default)]
    pub differences_missing: Option<String>,
}

/// `POST /v1/tokens`: a token for an operator or a program.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddToken {
    /// Whose; every act is attributed to it.
    pub name: Name,
    /// Role, for policy: `admin`, `operator`, `auditor`, `viewer`, or one of the manager's own policies.
    pub role: Name,
    /// Days after which it opens nothing, 1 to 3650.
    pub expires_in_days: u32,
    /// Tenants whose VMs it may see and move, `all` for all of them; what it may do without any is policy's to say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tenants: Option<Vec<Name>>,
}

/// A token, without what opens anything.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TokenView {
    /// Whose.
    pub name: String,
    /// Role.
    pub role: String,
    /// RFC 3339; none for a manager's own.
    pub expires_at: Option<String>,
    /// Whether that is past.
    pub expired: bool,
    /// Tenants that it is for.
    #[serde(default)]
    pub tenants: Option<Vec<String>>,
}

/// The answer to `POST /v1/tokens`.
#[derive(Clone, Serialize, Deserialize)]
pub struct TokenAdded {
    /// What was made.
    #[serde(flatten)]
    pub token_view: TokenView,
    /// What its role may do on the fleet. Migrations are judged one by one.
    pub may: Vec<String>,
    /// The token. Shown this once.
    pub token: String,
}

/// `POST /v1/vms/{name}/start`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartVm {
    /// Where.
    pub host: HostName,
}

/// `POST /v1/migrations`: an operator's intent. The nonce and time stamp make a captured request useless.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Migrate {
    /// The VM.
    pub vm: Name,
    /// Where to.
    pub target: HostName,
    /// Where the caller believes it is; refused when wrong. Optional.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<HostName>,
    /// Multifd channels beside the main one; the manager's default when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub channels: Option<u16>,
    /// `zlib` or `zstd` on those channels; none when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub compression: Option<String>,
    /// A plan of maintenance that covers the move.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<Nonce>,
    /// Never used before.
    pub nonce: Nonce,
    /// Milliseconds since the Unix epoch.
    pub timestamp_unix_ms: u64,
}

/// `POST /v1/migrations` answers 202 with this.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MigrateAccepted {
    /// Follow it at `/v1/migrations/{id}`.
    pub id: MigrationId,
}

/// `POST /v1/migrations/explain` takes what `POST /v1/migrations` takes, writes nothing (the nonce is not used up), and
/// answers with this.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Explanation {
    /// Whether every gate would let it pass now.
    pub allowed: bool,
    /// The VM.
    pub vm: Name,
    /// Host that holds it, when that is known.
    pub source: Option<HostName>,
    /// Where to.
    pub target: HostName,
    /// In the order in which they are asked.
    pub gates: Vec<Gate>,
}

/// One gate of a decision.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Gate {
    /// Its name.
    pub name: String,
    /// What it said.
    pub outcome: GateOutcome,
    /// Why it refused.
    pub code: Option<ErrorCode>,
    /// In words.
    pub detail: String,
}

/// What a gate said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GateOutcome {
    /// It lets the migration pass.
    Passed,
    /// It does not.
    Refused,
    /// It could not be asked, since an earlier one refused.
    NotAsked,
}

/// `GET /v1/audit/verify`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AuditVerified {
    /// Whether the chain is whole.
    pub verified: bool,
    /// How many entries.
    pub entries: u64,
    /// Hash of the last.
    pub head: String,
    /// Sequence number of the first bad entry.
    pub first_bad: Option<u64>,
    /// What is wrong with it.
    pub detail: Option<String>,
}

/// `GET /v1/migrations/{id}/bundle`: everything about one migration that can be verified without the manager. Written in
/// canonical JSON (RFC 8785); signed things and hashes in hexadecimal.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bundle {
    /// Version of the format.
    pub outrider_bundle: u32,
    /// The migration.
    pub migration: MigrationId,
    /// Raw Ed25519 keys of the managers that signed checkpoint and permit.
    pub keys: Vec<String>,
    /// Certificate of the first key by the CA, PEM; none in this version.
    pub certificate: Option<String>,
    /// Signed checkpoint of the audit log.
    pub checkpoint: String,
    /// The permit's token, where one was signed.
    pub permit: Option<String>,
    /// Signed statements of both daemons: request, votes, receipts, renunciation.
    pub statements: Vec<String>,
    /// What both hosts proved of themselves.
    pub attestation: BundleAttestation,
    /// The log's entries about the migration, oldest first.
    pub entries: Vec<BundleEntry>,
}

/// The quotes that the permit names. None: that host was unattested.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BundleAttestation {
    /// Of the source.
    pub source: Option<BundleQuote>,
    /// Of the target.
    pub target: Option<BundleQuote>,
}

/// A quote with what it is about.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BundleQuote {
    /// Nonce, purpose, host and keys, whose hash the TPM signed.
    pub binding: serde_json::Value,
    /// The evidence as the host sent it; the permit names its digest.
    pub evidence: String,
}

/// An entry of the audit log with its place in it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BundleEntry {
    /// Number, from 1.
    pub sequence: u64,
    /// Microseconds since the Unix epoch.
    pub at_us: i64,
    /// Who.
    pub actor: String,
    /// What.
    pub action: String,
    /// On what.
    pub subject: String,
    /// Details.
    pub detail: serde_json::Value,
    /// RFC 9162 inclusion proof.
    pub proof: Vec<String>,
}

/// What verifying a bundle found.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct BundleVerified {
    /// Whether everything in it holds.
    pub verified: bool,
    /// The first thing that does not.
    pub first_wrong: Option<String>,
    /// Its migration.
    pub migration: Option<MigrationId>,
    /// The managers' keys that it rests on.
    pub keys: Vec<String>,
    /// Whether the reader named the keys that count. If not, compare them with those that the hosts have.
    pub trusted: bool,
    /// Entries of the log that it shows.
    pub entries: u64,
    /// Statements that it shows.
    pub statements: u64,
    /// The log of its checkpoint.
    pub log: Option<Nonce>,
    /// How many entries that log had.
    pub log_entries: u64,
}

/// `POST /v1/audit/reconcile`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reconcile {
    /// Hosts that are dead and stay so, by the operator's word.
    #[serde(default)]
    pub lost: Vec<HostName>,
    /// Whether it is to be done; without, it is only said what would be.
    #[serde(default)]
    pub accept: bool,
}

/// The answer: how a registry that was set back stands, and what follows from what the hosts hold.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Reconciliation {
    /// `restored` or `distrusted`.
    pub standing: String,
    /// Why.
    pub why: String,
    /// RFC 3339.
    pub since: String,
    /// Whether it was done: the registry decides again.
    pub accepted: bool,
    /// How often a loss was accepted.
    pub generation: u64,
    /// Every host that ever joined.
    pub hosts: Vec<ReconciledHost>,
    /// What becomes of each VM.
    pub vms: Vec<ReconciledVm>,
    /// What a person must settle first.
    pub blocking: Vec<String>,
}

/// One host of a reconciliation.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ReconciledHost {
    /// Its name.
    pub name: HostName,
    /// `told`, `missing` or `lost`.
    pub state: String,
}

/// One VM of a reconciliation.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ReconciledVm {
    /// Its name, or its UUID where nobody knows that.
    pub name: String,
    /// In words.
    pub outcome: String,
}

/// One audit entry as `GET /v1/audit` shows it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct AuditEntry {
    /// Counts up by one.
    pub sequence: u64,
    /// RFC 3339.
    pub at: String,
    /// Who.
    pub actor: String,
    /// What, e.g. `permit.issue`.
    pub action: String,
    /// On what.
    pub subject: String,
    /// Details.
    pub detail: serde_json::Value,
    /// Chain hash, hexadecimal.
    pub hash: String,
}

/// A server-sent event on `/v1/events` (`event: migration`, data: this).
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MigrationEvent {
    /// The migration.
    pub migration: MigrationId,
    /// RFC 3339.
    pub at: String,
    /// Kind, as in the host protocol.
    pub kind: String,
    /// Details.
    pub detail: serde_json::Value,
}

/// `POST /v1/policy`: a policy set, as a folder holds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyContent {
    /// File names (`*.cedar`, `zones.toml`) and what is in them.
    pub files: BTreeMap<String, String>,
    /// A table of expectations, all of which must hold (TOML).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expectations: Option<String>,
}

/// `POST /v1/policy/rollback`: a set that was in force before is put into force again.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyRollback {
    /// Its digest, or enough of its beginning.
    pub digest: String,
}

/// A policy set that is or was in force.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicySetView {
    /// Counts up; 0 is what the manager was configured with.
    pub sequence: u64,
    /// Of its content.
    pub digest: String,
    /// Who applied it.
    pub applied_by: String,
    /// RFC 3339; none for what the manager was configured with.
    pub applied_at: Option<String>,
    /// Its policies, by id; in histories left out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub policies: Vec<PolicyItem>,
    /// Its files, so that it can be compared and kept; in histories left out.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub files: BTreeMap<String, String>,
}

/// One policy of a set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyItem {
    /// Its id.
    pub id: String,
    /// `permit` or `forbid`.
    pub effect: String,
    /// What a denial says.
    pub reason: Option<String>,
}

/// `POST /v1/plans`: a plan of maintenance.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddPlan {
    /// The host that VMs are moved from.
    pub host: HostName,
    /// Where to; any host when empty.
    #[serde(default)]
    pub targets: Vec<HostName>,
    /// Zones of the targets; any when empty.
    #[serde(default)]
    pub zones: Vec<String>,
    /// When it begins, seconds since the Unix epoch; now when left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_before_unix_s: Option<u64>,
    /// When it is over, 30 days later at most.
    pub not_after_unix_s: u64,
}

/// A plan of maintenance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanView {
    /// Its id, which requests name.
    pub id: String,
    /// The host that VMs are moved from.
    pub host: HostName,
    /// `waiting`, `in-force`, `over`, `revoked`, or `not-signed-here`.
    pub state: String,
    /// Where to; any host when empty.
    pub targets: Vec<HostName>,
    /// Zones of the targets; any when empty.
    pub zones: Vec<String>,
    /// RFC 3339; none when it was not signed here.
    pub not_before: Option<String>,
    /// RFC 3339; none when it was not signed here.
    pub not_after: Option<String>,
    /// Who made it.
    pub created_by: String,
    /// RFC 3339.
    pub created_at: String,
}
