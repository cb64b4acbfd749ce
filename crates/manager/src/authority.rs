//! The manager's own secrets: state folder and its lock, CA, permit key, admin token. None of them is in the registry.

use crate::clock;
use crate::config::Config;
use crate::policy::plans::Plan;
use base64_pem::blocks;
use link::ca::{Ca, Subject, write_private};
use link::identity::{IdentityKey, LiveIdentity, TlsIdentity, TrustDomain};
use permit::checkpoint::Checkpoint;
use permit::document::{self, DocumentKind};
use permit::{PermitToken, SignatureError, SigningKey};
use registry::Database;
use std::fs::{File, OpenOptions, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use types::permit::PermitClaims;
use types::{Digest, ErrorCode, HostName, Name, Problem};

const PERMIT_KEY_FILE: &str = "permit-key.pem";
const ADMIN_TOKEN_FILE: &str = "admin.token";
const LOCK_FILE: &str = "lock";
/// The longest token file that is read.
const TOKEN_LIMIT_BYTES: usize = 1_024;
/// Its certificate is renewed when it has less than half of its time left; looked at this often.
const RENEWAL_PERIOD: Duration = Duration::from_secs(3_600);

/// A state folder that this process owns. The lock ends with the process.
pub(crate) struct StateFolder {
    path: PathBuf,
    _lock: File,
}

/// A database file that is used by one manager only, wherever it lies: the state folder's lock says nothing about one outside
/// of it. A server's database is shared, by leases. The lock ends with the process.
///
/// # Errors
/// `wrong-state` when another manager has it, `bad-configuration` when it can't be locked.
pub(crate) fn lock_database(database: &Database) -> Result<Option<File>, Problem> {
    let Database::Sqlite(path) = database else { return Ok(None) };
    let mut name = path.clone().into_os_string();
    name.push(".lock");
    let bad = |e: std::io::Error| {
        let detail = format!("cannot lock the registry {}: {e}", path.display());
        Problem::new(ErrorCode::BadConfiguration, detail)
    };
    let options = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(name);
    let lock = options.map_err(bad)?;
    match lock.try_lock() {
        Ok(()) => Ok(Some(lock)),
        Err(std::fs::TryLockError::WouldBlock) => {
            let detail = format!("another manager runs on the registry {}", path.display());
            Err(Problem::new(ErrorCode::WrongState, detail)
                .hint("managers share a registry on PostgreSQL only: see docs/registry.md"))
        }
        Err(std::fs::TryLockError::Error(e)) => Err(bad(e)),
    }
}

impl StateFolder {
    /// Makes the folder where needed (0700), and locks it.
    ///
    /// # Errors
    /// `bad-configuration` when it is open to others or can't be made, `wrong-state` when another manager has it.
    pub(crate) fn open(path: &Path) -> Result<Self, Problem> {
        let bad = |what: &str, e: std::io::Error| {
            let detail = format!("cannot {what} the state folder {}: {e}", path.display());
            Problem::new(ErrorCode::BadConfiguration, detail)
        };
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|e| bad("make", e))?;
        let mode = std::fs::metadata(path).map_err(|e| bad("look at", e))?.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            std::fs::set_permissions(path, Permissions::from_mode(0o700)).map_err(|e| bad("close", e))?;
            tracing::warn!(folder = %path.display(), "the state folder was open to others (mode {mode:o}); closed it");
        }
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(path.join(LOCK_FILE))
            .map_err(|e| bad("lock", e))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { path: path.to_owned(), _lock: lock }),
            Err(std::fs::TryLockError::WouldBlock) => {
                let detail = format!("another manager runs on the state folder {}", path.display());
                Err(Problem::new(ErrorCode::WrongState, detail).hint("one folder belongs to one manager"))
            }
            Err(std::fs::TryLockError::Error(e)) => Err(bad("lock", e)),
        }
    }

    /// The folder.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

/// What the manager signs and certifies with.
pub(crate) struct Authority {
    ca: Ca,
    identity: LiveIdentity,
    permit_key: SigningKey,
    key_id: String,
    ca_der: Vec<u8>,
    _folder: StateFolder,
}

/// A certificate for a host.
pub(crate) struct HostCertificate {
    pub(crate) certificate_der: Vec<u8>,
    pub(crate) ca_der: Vec<u8>,
    pub(crate) not_after_unix_s: u64,
    /// Digest of the certificate, for the record.
    pub(crate) digest: String,
}

fn broken(what: &str, error: &dyn std::error::Error) -> Problem {
    let mut detail = format!("{what}: {error}");
    let mut cause = error.source();
    while let Some(inner) = cause {
        detail.push_str(": ");
        detail.push_str(&inner.to_string());
        cause = inner.source();
    }
    Problem::new(ErrorCode::BadConfiguration, detail)
}

impl Authority {
    /// Loads everything from the state folder; what is not there yet is made.
    ///
    /// # Errors
    /// What is there and can't be used. Nothing that is there is ever replaced.
    pub(crate) fn open(folder: StateFolder, config: &Config) -> Result<Self, Problem> {
        let domain: TrustDomain = config.trust_domain.parse().map_err(|e| broken("trust_domain", &e))?;
        let ca = Ca::load_or_create(folder.path(), &domain, SystemTime::now())
            .map_err(|e| broken("the CA cannot be used", &e))?;
        let permit_key = permit_key(&folder.path().join(PERMIT_KEY_FILE))?;
        let key_id = permit_key.verifying_key().id();
        let identity = LiveIdentity::new(own_identity(&ca, config)?);
        let ca_der = blocks(ca.certificate().pem()).into_iter().next().unwrap_or_default();
        Ok(Self { ca, identity, permit_key, key_id, ca_der, _folder: folder })
    }

    /// Its TLS identity, which is renewed in place.
    pub(crate) fn identity(&self) -> LiveIdentity {
        self.identity.clone()
    }

    /// The CA.
    pub(crate) fn ca(&self) -> &link::ca::CaCertificate {
        self.ca.certificate()
    }

    /// Id and raw public half of the permit key.
    pub(crate) fn permit_key(&self) -> (String, Vec<u8>) {
        (self.key_id.clone(), self.permit_key.verifying_key().as_bytes().to_vec())
    }

    /// Signs a permit: the same claims always give the same bytes.
    ///
    /// # Errors
    /// `internal`: the claims fit no permit.
    pub(crate) fn issue(&self, claims: &PermitClaims) -> Result<PermitToken, Problem> {
        permit::issue(&self.permit_key, &self.key_id, claims)
            .map_err(|e| Problem::new(ErrorCode::Internal, format!("the permit cannot be signed: {e}")))
    }

    /// Signs a plan of maintenance.
    ///
    /// # Errors
    /// `bad-request`: it is too long.
    pub(crate) fn sign_plan(&self, plan: &Plan) -> Result<Vec<u8>, Problem> {
        document::sign(&self.permit_key, DocumentKind::MaintenancePlan, plan)
            .map_err(|e| Problem::new(ErrorCode::BadRequest, format!("the plan cannot be signed: {e}")))
    }

    /// Reads a plan that this manager signed.
    ///
    /// # Errors
    /// It is none, or another key signed it.
    pub(crate) fn read_plan(&self, token: &[u8]) -> Result<Plan, SignatureError> {
        document::verify(token, DocumentKind::MaintenancePlan, self.permit_key.verifying_key())
    }

    /// Signs a checkpoint of the audit log.
    ///
    /// # Errors
    /// `internal`: it is too long to be one.
    pub(crate) fn sign_checkpoint(&self, checkpoint: &Checkpoint) -> Result<Vec<u8>, Problem> {
        permit::checkpoint::sign(&self.permit_key, checkpoint)
            .map_err(|e| Problem::new(ErrorCode::Internal, format!("the checkpoint cannot be signed: {e}")))
    }

    /// Certifies a host whose right to it was checked.
    ///
    /// # Errors
    /// `bad-request`: the signing request is not acceptable.
    pub(crate) fn certify_host(&self, host: &HostName, csr_der: &[u8]) -> Result<HostCertificate, Problem> {
        let issued = self
            .ca
            .issue(&Subject::host(host), csr_der, SystemTime::now())
            .map_err(|e| Problem::new(ErrorCode::BadRequest, e.to_string()))?;
        let certificate_der = blocks(&issued.chain_pem)
            .into_iter()
            .next()
            .ok_or_else(|| Problem::new(ErrorCode::Internal, "the CA issued no certificate"))?;
        let not_after = issued.not_after.duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(HostCertificate {
            digest: Digest::of(&certificate_der).to_string(),
            certificate_der,
            ca_der: self.ca_der.clone(),
            not_after_unix_s: not_after.as_secs(),
        })
    }

    /// Renews the manager's own certificate for as long as it runs.
    pub(crate) async fn keep_fresh(&self, config: &Config) {
        loop {
            tokio::time::sleep(RENEWAL_PERIOD).await;
            if !self.identity.current().needs_renewal(SystemTime::now()) {
                continue;
            }
            let renewed = own_identity(&self.ca, config)
                .and_then(|fresh| self.identity.replace(fresh).map_err(|e| broken("renewal", &e)));
            match renewed {
                Ok(()) => tracing::info!("renewed the manager's certificate"),
                Err(problem) => tracing::error!("cannot renew the manager's certificate: {problem}"),
            }
        }
    }
}

fn own_identity(ca: &Ca, config: &Config) -> Result<TlsIdentity, Problem> {
    let name: &Name = &config.name;
    let addresses = config.certificate_addresses();
    let dns: Vec<String> = config
        .operator_names
        .iter()
        .filter(|n| n.parse::<std::net::IpAddr>().is_err())
        .cloned()
        .chain(["localhost".to_owned()])
        .collect();
    let key = IdentityKey::generate().map_err(|e| broken("the manager's key", &e))?;
    let request = key.signing_request().map_err(|e| broken("the manager's key", &e))?;
    let issued = ca
        .issue(&Subject::manager(name, &addresses, &dns), &request, SystemTime::now())
        .map_err(|e| broken("the manager's certificate", &e))?;
    TlsIdentity::from_pem(&issued.chain_pem, &key.to_pem())
        .map_err(|e| broken("the manager's certificate", &e))
}

fn permit_key(path: &Path) -> Result<SigningKey, Problem> {
    match std::fs::read(path) {
        Ok(pem) => SigningKey::from_pkcs8_pem(&pem).map_err(|e| broken(&path.display().to_string(), &e)),
        Err(e) if e.kind() == ErrorKind::NotFound => {
            let key = SigningKey::generate().map_err(|e| broken("the permit key", &e))?;
            let pem = key.to_pkcs8_pem().map_err(|e| broken("the permit key", &e))?;
            write_private(path, pem.as_bytes()).map_err(|e| broken("the permit key", &e))?;
            Ok(key)
        }
        Err(e) => Err(broken(&path.display().to_string(), &e)),
    }
}

/// The admin's token, made at the first run. Returns its text and its file.
///
/// # Errors
/// It can't be read or written.
pub(crate) fn admin_token(folder: &Path) -> Result<(String, PathBuf), Problem> {
    let path = folder.join(ADMIN_TOKEN_FILE);
    match std::fs::read_to_string(&path) {
        Ok(text) if text.trim().len() >= 32 && text.len() <= TOKEN_LIMIT_BYTES => {
            Ok((text.trim().to_owned(), path))
        }
        Ok(_) => {
            let detail = format!("{} holds no token", path.display());
            Err(Problem::new(ErrorCode::BadConfiguration, detail)
                .hint("remove it, and the next run makes a new one"))
        }
        Err(e) if e.kind() == ErrorKind::NotFound => {
            let token = hex::encode(clock::random::<32>()?);
            write_private(&path, format!("{token}\n").as_bytes())
                .map_err(|e| broken("the admin token", &e))?;
            Ok((token, path))
        }
        Err(e) => Err(broken(&path.display().to_string(), &e)),
    }
}

/// What the registry holds of an API token.
pub(crate) fn token_hash(token: &str) -> [u8; 32] {
    // 256 random bits need no slow hash; the domain keeps it apart from every other digest.
    let mut bytes = b"outrider api token v1: ".to_vec();
    bytes.extend_from_slice(token.as_bytes());
    Digest::of(&bytes).0
}

mod base64_pem {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;

    /// The DER of each block of a PEM text of our own making.
    pub(super) fn blocks(pem: &str) -> Vec<Vec<u8>> {
        pem.split("-----BEGIN CERTIFICATE-----")
            .skip(1)
            .filter_map(|block| {
                let body = block.split("-----END").next()?;
                let digits: String = body.chars().filter(|c| !c.is_ascii_whitespace()).collect();
                STANDARD.decode(digits).ok()
            })
            .collect()
    }
}
