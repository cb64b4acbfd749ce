//! Who this host is: what `join` stored in the state folder and `run` loads.

use crate::error::{HostError, chain};
use crate::folders::{private_folder, write_durably};
use base64::Engine;
use link::ca::CaCertificate;
use link::identity::{IdentityKey, LiveIdentity, TlsIdentity};
use permit::{KeyRing, SigningKey, VerifyingKey};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use types::{ErrorCode, HostName, Problem};

/// The facts of a joined host that are no secrets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Joined {
    /// Its name.
    pub name: HostName,
    /// `address:port` of its manager.
    pub manager: String,
    /// The trust domain.
    pub trust_domain: String,
    /// Permit keys: (key id, raw Ed25519 key in hexadecimal).
    pub permit_keys: Vec<(String, String)>,
}

/// A joined host.
#[derive(Debug)]
pub struct HostIdentity {
    /// Its facts.
    pub joined: Joined,
    /// For mutual TLS.
    pub tls: LiveIdentity,
    /// Vouches for the manager and other hosts.
    pub ca: CaCertificate,
    /// Signs statements and the journal.
    pub signing: Arc<SigningKey>,
}

/// Its files.
#[derive(Debug, Clone)]
pub struct IdentityFolder(PathBuf);

impl IdentityFolder {
    /// Below the state folder.
    #[must_use]
    pub fn new(state: &Path) -> Self {
        Self(state.join("identity"))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn read(&self, name: &str) -> Result<String, HostError> {
        let path = self.file(name);
        std::fs::read_to_string(&path).map_err(|e| HostError::file("cannot read", &path, e))
    }

    /// The signing key, made when there is none. One that is there is never replaced: the journal is signed with it.
    ///
    /// # Errors
    /// It can't be read or stored.
    pub fn signing_key(&self) -> Result<Arc<SigningKey>, Problem> {
        private_folder(&self.0).map_err(|e| e.problem())?;
        let path = self.file("signing-key.pem");
        let bad = |e: permit::KeyError| {
            Problem::new(ErrorCode::BadConfiguration, format!("{}: {}", path.display(), chain(&e)))
        };
        if path.exists() {
            let pem = self.read("signing-key.pem").map_err(|e| e.problem())?;
            return SigningKey::from_pkcs8_pem(pem.as_bytes()).map(Arc::new).map_err(bad);
        }
        let key = SigningKey::generate().map_err(bad)?;
        let pem = key.to_pkcs8_pem().map_err(bad)?;
        write_durably(&path, pem.as_bytes()).map_err(|e| e.problem())?;
        Ok(Arc::new(key))
    }

    /// Stores what a join gave. The facts come last: a half-stored identity is none.
    ///
    /// # Errors
    /// The state folder can't be written.
    pub fn store(
        &self,
        joined: &Joined,
        key: &IdentityKey,
        chain_pem: &str,
        ca_pem: &str,
    ) -> Result<(), Problem> {
        let facts = serde_json::to_vec_pretty(joined)
            .map_err(|e| Problem::new(ErrorCode::Internal, e.to_string()))?;
        let write = || -> Result<(), HostError> {
            private_folder(&self.0)?;
            write_durably(&self.file("key.pem"), key.to_pem().as_bytes())?;
            write_durably(&self.file("chain.pem"), chain_pem.as_bytes())?;
            write_durably(&self.file("ca.pem"), ca_pem.as_bytes())?;
            write_durably(&self.file("host.json"), &facts)
        };
        write().map_err(|e| e.problem())
    }

    /// Whether this host has joined.
    #[must_use]
    pub fn is_joined(&self) -> bool {
        self.file("host.json").exists()
    }

    /// Loads it.
    ///
    /// # Errors
    /// The host has not joined, or its files are damaged.
    pub fn load(&self) -> Result<HostIdentity, Problem> {
        if !self.is_joined() {
            let text = format!("this host has not joined: {} holds no identity", self.0.display());
            return Err(Problem::new(ErrorCode::Unauthenticated, text)
                .hint("run `outrider host join` with the token that `outrider host add` printed"));
        }
        let damaged = |what: &str, why: String| {
            Problem::new(ErrorCode::BadConfiguration, format!("{}: {what}: {why}", self.0.display()))
        };
        let read = |name: &str| self.read(name).map_err(|e| e.problem());
        let joined: Joined =
            serde_json::from_str(&read("host.json")?).map_err(|e| damaged("host.json", e.to_string()))?;
        let tls = TlsIdentity::from_pem(&read("chain.pem")?, &read("key.pem")?)
            .map_err(|e| damaged("certificate or key", chain(&e)))?;
        let ca = CaCertificate::from_pem(&read("ca.pem")?).map_err(|e| damaged("ca.pem", chain(&e)))?;
        Ok(HostIdentity { joined, tls: LiveIdentity::new(tls), ca, signing: self.signing_key()? })
    }
}

impl Joined {
    /// The permit keys as a ring.
    #[must_use]
    pub fn key_ring(&self) -> KeyRing {
        let mut ring = KeyRing::new();
        for (id, key) in &self.permit_keys {
            let taken = VerifyingKey::from_hex(key).is_ok_and(|key| ring.insert(id, key));
            if !taken {
                tracing::warn!(key_id = id, "a stored permit key is not usable");
            }
        }
        ring
    }
}

/// DER as PEM.
#[must_use]
pub fn certificate_pem(der: &[u8]) -> String {
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    let lines: Vec<_> =
        text.as_bytes().chunks(64).map(|line| String::from_utf8_lossy(line).into_owned()).collect();
    format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", lines.join("\n"))
}
