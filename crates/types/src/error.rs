//! Public error codes: what scripts may rely on. A code never changes its meaning.

use serde::{Deserialize, Serialize};

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $text:literal, $http:literal, $exit:literal;)*) => {
        /// A stable, public error code. Written in kebab case everywhere.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum ErrorCode { $($(#[$doc])* #[serde(rename = $text)] $variant,)* }

        impl ErrorCode {
            /// Every code, for documentation and tests.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];
            /// The text of the code.
            #[must_use]
            pub const fn as_str(self) -> &'static str { match self { $(Self::$variant => $text),* } }
            /// The HTTP status that carries it.
            #[must_use]
            pub const fn http_status(self) -> u16 { match self { $(Self::$variant => $http),* } }
            /// The exit code of the command line (2 usage, 3 refused, 4 failed, 5 terminated by a monitor,
            /// 6 manager unreachable).
            #[must_use]
            pub const fn exit_code(self) -> u8 { match self { $(Self::$variant => $exit),* } }
        }
    };
}

codes! {
    /// The request is malformed.
    BadRequest = "bad-request", 400, 2;
    /// A configuration file has an unknown key or a bad value.
    BadConfiguration = "bad-configuration", 400, 2;
    /// The caller did not prove who it is.
    Unauthenticated = "unauthenticated", 401, 3;
    /// The caller is known and not allowed.
    Forbidden = "forbidden", 403, 3;
    /// No host has that name.
    UnknownHost = "unknown-host", 404, 2;
    /// No VM has that name.
    UnknownVm = "unknown-vm", 404, 2;
    /// No migration has that id.
    UnknownMigration = "unknown-migration", 404, 2;
    /// A record of that name exists already.
    AlreadyExists = "already-exists", 409, 2;
    /// Source and target are the same host.
    TargetIsSource = "target-is-source", 409, 3;
    /// The VM does not run on the host that was named as its source.
    VmNotOnSource = "vm-not-on-source", 409, 3;
    /// The VM is not running, so it cannot be moved live.
    VmNotRunning = "vm-not-running", 409, 3;
    /// The VM is running already.
    VmAlreadyRunning = "vm-already-running", 409, 3;
    /// A running VM has other devices than its spec says.
    DevicesDiffer = "devices-differ", 409, 3;
    /// The VM has an open migration.
    MigrationInFlight = "migration-in-flight", 409, 3;
    /// A nonce was seen before.
    ReplayedRequest = "replayed-request", 409, 3;
    /// A time stamp is too old or in the future.
    StaleRequest = "stale-request", 409, 3;
    /// A host is not connected to the manager.
    HostUnreachable = "host-unreachable", 409, 3;
    /// A host's claim of address or MAC differs from its record.
    HostMismatch = "host-mismatch", 403, 3;
    /// A host's TPM did not prove its platform.
    AttestationFailed = "attestation-failed", 403, 3;
    /// The policy denies it.
    PolicyDenied = "policy-denied", 403, 3;
    /// The target lacks room.
    InsufficientCapacity = "insufficient-capacity", 409, 3;
    /// The target's hypervisor cannot run the VM as it is.
    IncompatibleTarget = "incompatible-target", 409, 3;
    /// A limit on migrations at once or in a time is reached.
    LimitReached = "limit-reached", 429, 3;
    /// The permit was refused by a daemon or an agent.
    PermitRefused = "permit-refused", 403, 3;
    /// It can't be done in the state that the thing is in.
    WrongState = "wrong-state", 409, 4;
    /// The commit point is past: it can't be stopped any more.
    TooLate = "too-late", 409, 4;
    /// The target could not be prepared.
    TargetFailed = "target-failed", 502, 4;
    /// The source could not start or finish the transfer.
    SourceFailed = "source-failed", 502, 4;
    /// The channel between the VM agents broke or was refused.
    ChannelFailed = "channel-failed", 502, 4;
    /// QEMU reported an error, or died.
    HypervisorFailed = "hypervisor-failed", 502, 4;
    /// A program that is needed is not installed.
    MissingProgram = "missing-program", 500, 4;
    /// A listening address is taken.
    AddressInUse = "address-in-use", 500, 4;
    /// The registry can't write (disk full, read-only, broken).
    RegistryUnavailable = "registry-unavailable", 503, 4;
    /// The audit log is broken.
    AuditBroken = "audit-broken", 500, 1;
    /// A budget of time or bytes ran out.
    BudgetExceeded = "budget-exceeded", 409, 4;
    /// The stream broke a rule of the inspector.
    StreamRejected = "stream-rejected", 409, 5;
    /// An operator or a monitor terminated it.
    Terminated = "terminated", 409, 5;
    /// The manager can't be reached.
    ManagerUnreachable = "manager-unreachable", 503, 6;
    /// A defect of Outrider.
    Internal = "internal", 500, 4;
}

impl std::fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

impl std::str::FromStr for ErrorCode {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .iter()
            .copied()
            .find(|c| c.as_str() == text)
            .ok_or_else(|| format!("unknown error code {text:?}"))
    }
}

/// A problem as people and scripts see it (RFC 9457 over HTTP): what, why, what to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{code}: {detail}")]
pub struct Problem {
    /// The stable code.
    pub code: ErrorCode,
    /// What happened and why, for a person.
    pub detail: String,
    /// What to do about it, where there is something to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl Problem {
    /// A problem without a hint.
    #[must_use]
    pub fn new(code: ErrorCode, detail: impl Into<String>) -> Self {
        Self { code, detail: detail.into(), hint: None }
    }
    /// The same with a hint.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}
