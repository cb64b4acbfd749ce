//! This host's platform: its TPM, the attestation key that lives in it, and the quotes that it gave.
//!
//! The TPM is opened when it is first asked and kept open with the attestation key loaded, because loading that key costs
//! a real TPM most of a second. After a fault it is opened anew. One question at a time; a few may wait.

use crate::error::chain;
use crate::folders::write_durably;
use attest::enrol::{Application, Challenge};
use attest::tpm::{AkBlobs, LoadedAk, Options, PLATFORM_EVENT_LOG, Tpm, TpmFault, event_log};
use attest::{Bounded, Evidence, PcrSelection, TpmName};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use tokio::sync::Semaphore;
use types::handover::Side;
use types::{Digest, ErrorCode, MigrationId, Problem};

pub use attest::tpm::Address;

/// The key's blobs, below the state folder.
const AK_FILE: &str = "attestation-key";
/// Questions that wait for the TPM, which answers a few in a second; the manager gives up after that anyway.
const WAITING_MAX: usize = 32;
/// Quotes that are remembered until their permit comes. Permits come within seconds.
const GIVEN_MAX: usize = 256;

/// What this host may show, and has shown, of its platform.
#[derive(Debug, Clone)]
pub struct Platform(Arc<Inner>);

struct Inner {
    address: Address,
    event_log: Option<PathBuf>,
    key_file: PathBuf,
    waiting: Semaphore,
    open: Arc<Mutex<Option<Open>>>,
    given: Mutex<BTreeMap<(MigrationId, Side), Digest>>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Platform").field("address", &self.address).finish_non_exhaustive()
    }
}

struct Open {
    tpm: Tpm,
    ak: LoadedAk,
}

fn failed(what: &str, error: &(dyn std::error::Error + 'static)) -> Problem {
    Problem::new(ErrorCode::AttestationFailed, format!("this host's TPM: {what}: {}", chain(error)))
}

fn fault(what: &'static str) -> impl Fn(TpmFault) -> Problem {
    move |error| failed(what, &error)
}

impl Platform {
    /// With the TPM at `address`; its key is kept in the state folder.
    #[must_use]
    pub fn new(address: Address, event_log: Option<PathBuf>, state_folder: &Path) -> Self {
        let kernels = || PathBuf::from(PLATFORM_EVENT_LOG);
        let event_log = event_log.or_else(|| matches!(address, Address::Device(_)).then(kernels));
        Self(Arc::new(Inner {
            address,
            event_log,
            key_file: state_folder.join(AK_FILE),
            waiting: Semaphore::new(WAITING_MAX),
            open: Arc::default(),
            given: Mutex::default(),
        }))
    }

    /// What the host shows of its TPM when it joins. Makes the attestation key where there is none of this TPM.
    ///
    /// # Errors
    /// `attestation-failed`.
    pub async fn application(&self) -> Result<Application, Problem> {
        self.with_tpm(true, |open, _| {
            let ek = open.tpm.ek().map_err(fault("its endorsement key"))?;
            let certificate =
                open.tpm.ek_certificate().map_err(fault("its endorsement key's certificate"))?;
            let certificate = certificate.map(Bounded::new).transpose();
            let ek_certificate = certificate.map_err(|e| failed("its certificate", &e))?;
            let ak = open.ak.public().clone();
            Ok(Application { ek, ek_certificate, intermediates: Vec::new(), ak })
        })
        .await
    }

    /// Opens the manager's challenge.
    ///
    /// # Errors
    /// `attestation-failed`: above all, that the challenge is for another TPM.
    pub async fn open_challenge(&self, challenge: Challenge) -> Result<Vec<u8>, Problem> {
        self.with_tpm(false, move |open, _| {
            let secret = open.tpm.activate_credential(&open.ak, &challenge);
            secret.map(|secret| secret.to_vec()).map_err(fault("the manager's challenge"))
        })
        .await
    }

    /// Quotes registers over `qualifying_data`.
    ///
    /// # Errors
    /// `attestation-failed`.
    pub async fn evidence(
        &self,
        selection: PcrSelection,
        qualifying_data: Digest,
        with_event_log: bool,
    ) -> Result<Evidence, Problem> {
        self.with_tpm(false, move |open, inner| {
            let log = if with_event_log { inner.read_event_log() } else { None };
            let evidence = open.tpm.evidence(&open.ak, &selection, &qualifying_data, log);
            evidence.map_err(fault("no quote"))
        })
        .await
    }

    /// Remembers what was given for a side of a migration: the permit must name it.
    pub fn gave(&self, migration: MigrationId, side: Side, evidence: Digest) {
        let mut given = self.given();
        if given.len() >= GIVEN_MAX {
            // The permit of whatever goes now is refused, which is safe.
            given.pop_first();
        }
        given.insert((migration, side), evidence);
    }

    /// What was given for a side of a migration; forgotten from then on.
    #[must_use]
    pub fn given_for(&self, migration: MigrationId, side: Side) -> Option<Digest> {
        self.given().remove(&(migration, side))
    }

    fn given(&self) -> std::sync::MutexGuard<'_, BTreeMap<(MigrationId, Side), Digest>> {
        self.0.given.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Opens the TPM ahead, so that the first migration does not wait for it.
    pub async fn warm_up(&self) {
        match self.with_tpm(false, |_, _| Ok(())).await {
            Ok(()) => tracing::info!(tpm = %self.0.address, "the TPM is ready"),
            Err(problem) => tracing::warn!(tpm = %self.0.address, "the TPM is not ready: {}", problem.detail),
        }
    }

    async fn with_tpm<T: Send + 'static>(
        &self,
        may_make_key: bool,
        act: impl FnOnce(&mut Open, &Inner) -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, Problem> {
        let busy = |_| Problem::new(ErrorCode::AttestationFailed, "this host's TPM is busy");
        let _place = self.0.waiting.try_acquire().map_err(busy)?;
        let inner = Arc::clone(&self.0);
        let work = tokio::task::spawn_blocking(move || {
            let mut held = inner.open.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let mut open = match held.take() {
                Some(open) => open,
                None => inner.open(may_make_key)?,
            };
            let done = act(&mut open, &inner);
            if done.is_ok() {
                *held = Some(open);
            }
            done
        });
        let gone = |e| Problem::new(ErrorCode::Internal, format!("the question to the TPM was lost: {e}"));
        work.await.map_err(gone)?
    }
}

impl Inner {
    fn open(&self, may_make_key: bool) -> Result<Open, Problem> {
        let mut tpm = Tpm::open(&self.address, Options::default()).map_err(fault("it can't be opened"))?;
        // Behind the kernel's resource manager there is nothing of others to be seen, and swtpms have one user.
        if !matches!(self.address, Address::Device(_)) {
            tpm.flush_stale().map_err(fault("it can't be cleaned up"))?;
        }
        if let Some(blobs) = self.kept_key()? {
            match tpm.load_ak(&blobs) {
                Ok(ak) => return Ok(Open { tpm, ak }),
                // The TPM was cleared or exchanged: only a join may go on from here.
                Err(error) if error.code().is_none() || !may_make_key => {
                    return Err(fault("its attestation key can't be loaded")(error)
                        .hint("was the TPM cleared or exchanged? Then enrol the host again"));
                }
                Err(error) => {
                    tracing::warn!("the kept attestation key is not of this TPM: {}", chain(&error))
                }
            }
        } else if !may_make_key {
            let detail = format!("there is no attestation key in {}", self.key_file.display());
            return Err(Problem::new(ErrorCode::AttestationFailed, detail)
                .hint("the host joined without its TPM: enrol it again, with the TPM in its record"));
        }
        let blobs = tpm.create_ak().map_err(fault("no attestation key can be made"))?;
        write_durably(&self.key_file, &blobs.to_bytes()).map_err(|e| e.problem())?;
        let ak = tpm.load_ak(&blobs).map_err(fault("its attestation key can't be loaded"))?;
        Ok(Open { tpm, ak })
    }

    fn kept_key(&self) -> Result<Option<AkBlobs>, Problem> {
        match std::fs::read(&self.key_file) {
            Ok(bytes) => {
                let blobs = AkBlobs::from_bytes(&bytes);
                blobs.map(Some).map_err(|e| failed(&self.key_file.display().to_string(), &e))
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(failed(&self.key_file.display().to_string(), &e)),
        }
    }

    /// It only explains: one that can't be read must not keep a good platform from proving itself.
    fn read_event_log(&self) -> Option<Bounded<{ attest::event_log::EVENT_LOG_LIMIT_BYTES }>> {
        match event_log(self.event_log.as_ref()?) {
            Ok(log) => log.and_then(|log| Bounded::new(log).ok()),
            Err(error) => {
                tracing::warn!("{}", chain(&error));
                None
            }
        }
    }
}

/// The name of a TPM's endorsement key, which a host's record names.
///
/// # Errors
/// `attestation-failed`.
pub async fn endorsement_key(address: Address) -> Result<TpmName, Problem> {
    let work = tokio::task::spawn_blocking(move || {
        let mut tpm = Tpm::open(&address, Options::default()).map_err(fault("it can't be opened"))?;
        Ok(tpm.ek().map_err(fault("its endorsement key"))?.name())
    });
    let gone = |e| Problem::new(ErrorCode::Internal, format!("the question to the TPM was lost: {e}"));
    work.await.map_err(gone)?
}
