//! What this host remembers of the manager's audit log: the last signed checkpoint that it took. A manager whose log was
//! rolled back or forked can't show one that extends it; then this host says so, and takes no permit and starts no VM
//! until the log that it remembers is back, or an operator had the loss reconciled (a higher generation).
//!
//! The first checkpoint is taken on trust: there is nothing to compare it with.

use crate::daemon::lock;
use crate::error::chain;
use crate::folders::write_durably;
use api::fleet;
use permit::checkpoint::{self, CHECKPOINT_LIMIT_BYTES, Checkpoint, Extension, NotTaken, Taken};
use permit::merkle::{LEVELS_MAX, TreeHash};
use permit::{KeyRing, VerifyingKey};
use serde::{Deserialize, Serialize};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use types::{ErrorCode, Problem};

const FILE: &str = "audit.checkpoint";
/// Key and token in hexadecimal, and a sentence.
const FILE_LIMIT_BYTES: u64 = 8 * 1024;

/// What is remembered.
#[derive(Debug)]
pub struct Checkpoints {
    path: PathBuf,
    state: Mutex<State>,
    /// One write at a time, so that an older one can't take the place of a newer; never held while `state` is.
    writing: Mutex<()>,
}

#[derive(Debug, Clone, Default)]
struct State {
    held: Option<Held>,
    contradiction: Option<String>,
}

#[derive(Debug, Clone)]
struct Held {
    token: Vec<u8>,
    key: VerifyingKey,
    checkpoint: Checkpoint,
}

/// The file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    /// The key that signed it, which managers may not use any more.
    key: String,
    /// The signed checkpoint.
    #[serde(with = "types::permit::hex_bytes")]
    token: Vec<u8>,
    /// Why no permit is taken.
    contradiction: Option<String>,
}

impl Checkpoints {
    /// Reads what is remembered.
    ///
    /// # Errors
    /// It is damaged: going on as if there were none would let a rolled-back log pass.
    pub fn open(state_folder: &Path) -> Result<Self, Problem> {
        let path = state_folder.join(FILE);
        let state = match std::fs::metadata(&path) {
            Err(e) if e.kind() == ErrorKind::NotFound => State::default(),
            found => read(&path, found).map_err(|why| {
                let detail = format!("{} is damaged: {why}", path.display());
                Problem::new(ErrorCode::WrongState, detail).hint(
                    "it is this host's memory of the manager's audit log; see that the log is whole \
                     (`outrider audit verify`), then remove the file to begin anew",
                )
            })?,
        };
        if let Some(why) = &state.contradiction {
            tracing::error!("no permit is taken here: {why}");
        }
        Ok(Self { path, state: Mutex::new(state), writing: Mutex::default() })
    }

    /// Forgets all, when an operator lets this host join anew.
    ///
    /// # Errors
    /// The file can't be removed.
    pub fn forget(state_folder: &Path) -> Result<(), Problem> {
        match std::fs::remove_file(state_folder.join(FILE)) {
            Err(e) if e.kind() != ErrorKind::NotFound => {
                let detail = format!("cannot remove {FILE} from {}: {e}", state_folder.display());
                Err(Problem::new(ErrorCode::BadConfiguration, detail))
            }
            _ => Ok(()),
        }
    }

    /// The last checkpoint that was taken, signed; empty when there is none.
    #[must_use]
    pub fn token(&self) -> Vec<u8> {
        lock(&self.state).held.as_ref().map(|held| held.token.clone()).unwrap_or_default()
    }

    /// Why no permit is taken, if so.
    #[must_use]
    pub fn contradiction(&self) -> Option<String> {
        lock(&self.state).contradiction.clone()
    }

    /// Whether a new permit, or an order to start a VM, may be taken.
    ///
    /// # Errors
    /// `audit-broken`.
    pub fn may_accept(&self) -> Result<(), Problem> {
        let Some(why) = self.contradiction() else { return Ok(()) };
        let detail = format!("this host remembers another audit log than the manager shows: {why}");
        Err(Problem::new(ErrorCode::AuditBroken, detail).hint(
            "the registry was rolled back, or somebody else signs with the manager's key: restore the current registry, \
             or have it reconciled (`outrider audit reconcile`)",
        ))
    }

    /// Takes a checkpoint of a manager, durably; or gives what is to be answered where it is not taken.
    pub fn take(&self, shown: &fleet::Checkpoint, keys: &KeyRing) -> Option<fleet::CheckpointKept> {
        let _writing = lock(&self.writing);
        let state = lock(&self.state).clone();
        let mut signer = None;
        let read = checkpoint::verify(&shown.token, |id| {
            signer = keys.find(id).copied();
            signer
        });
        let (checkpoint, key) = match (read, signer) {
            (Ok(checkpoint), Some(key)) => (checkpoint, key),
            (read, _) => {
                let why = read.err().map(|e| e.to_string()).unwrap_or_default();
                tracing::warn!("a checkpoint that no known manager signed was shown: {why}");
                return None;
            }
        };
        let held = state.held.as_ref().map(|held| &held.checkpoint);
        match checkpoint::judge(held, &checkpoint, extension(shown).as_ref()) {
            Ok(taken) => {
                self.keep(state, taken, Held { token: shown.token.clone(), key, checkpoint });
                None
            }
            Err(NotTaken::Unproven { .. }) => Some(self.kept(String::new())),
            Err(NotTaken::Contradicts(contradiction)) => {
                let why = contradiction.to_string();
                tracing::error!("the manager's audit log contradicts what this host remembers: {why}");
                self.refuse(state, &why);
                Some(self.kept(why))
            }
        }
    }

    fn kept(&self, contradicts: String) -> fleet::CheckpointKept {
        fleet::CheckpointKept { token: self.token(), contradicts }
    }

    fn keep(&self, before: State, taken: Taken, new: Held) {
        if taken == Taken::Same && before.contradiction.is_none() {
            return;
        }
        if before.contradiction.is_some() {
            tracing::warn!("the audit log is one that this host can take again; permits are accepted");
        }
        let state = State { held: Some(new), contradiction: None };
        // Written first: what is remembered must not be less after a crash.
        match write(&self.path, &state) {
            Ok(()) => *lock(&self.state) = state,
            Err(why) => tracing::error!("the checkpoint cannot be kept: {why}"),
        }
    }

    fn refuse(&self, before: State, why: &str) {
        let state = State { contradiction: Some(why.to_owned()), ..before };
        // At once, also where it can't be written.
        *lock(&self.state) = state.clone();
        if let Err(why) = write(&self.path, &state) {
            tracing::error!("that no permit is taken cannot be kept: {why}");
        }
    }
}

fn extension(shown: &fleet::Checkpoint) -> Option<Extension> {
    if shown.extension.len() > LEVELS_MAX {
        return None;
    }
    let proof = shown.extension.iter().map(|hash| TreeHash::try_from(&hash[..]).ok());
    Some(Extension { from_size: shown.from_size, proof: proof.collect::<Option<_>>()? })
}

fn read(path: &Path, found: std::io::Result<std::fs::Metadata>) -> Result<State, String> {
    let length = found.map_err(|e| e.to_string())?.len();
    if length > FILE_LIMIT_BYTES {
        return Err(format!("{length} bytes are more than any checkpoint has"));
    }
    let bytes = std::fs::read(path).map_err(|e| e.to_string())?;
    let stored: Stored = serde_json::from_slice(&bytes).map_err(|e| e.to_string())?;
    if stored.token.len() > CHECKPOINT_LIMIT_BYTES {
        return Err("the checkpoint is longer than any".to_owned());
    }
    let key = VerifyingKey::from_hex(&stored.key).map_err(|e| e.to_string())?;
    let checkpoint = checkpoint::verify(&stored.token, |id| (id == key.id()).then_some(key));
    let checkpoint = checkpoint.map_err(|e| e.to_string())?;
    let held = Some(Held { token: stored.token, key, checkpoint });
    Ok(State { held, contradiction: stored.contradiction })
}

fn write(path: &Path, state: &State) -> Result<(), String> {
    let Some(held) = &state.held else { return Ok(()) };
    let stored = Stored {
        key: held.key.to_hex(),
        token: held.token.clone(),
        contradiction: state.contradiction.clone(),
    };
    let bytes = serde_json::to_vec(&stored).map_err(|e| e.to_string())?;
    write_durably(path, &bytes).map_err(|e| chain(&e))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use permit::SigningKey;
    use permit::merkle::{self, Frontier};
    use types::{Digest, Nonce};

    struct Log {
        key: SigningKey,
        fork: u8,
        generation: u64,
    }

    impl Log {
        fn new(fork: u8, generation: u64) -> Self {
            Self { key: SigningKey::generate().unwrap(), fork, generation }
        }

        fn keys(&self) -> KeyRing {
            let mut ring = KeyRing::new();
            assert!(ring.insert(&self.key.verifying_key().id(), *self.key.verifying_key()));
            ring
        }

        fn shown(&self, from: u64, size: u8) -> fleet::Checkpoint {
            let mut frontier = Frontier::default();
            let nodes: Vec<_> = (0..size).map(|n| frontier.push(merkle::leaf(&[n, self.fork]))).collect();
            let find =
                |n: &merkle::Node| nodes[usize::try_from(n.stored_at()).unwrap() - 1][n.level as usize];
            let parts = merkle::consistency_nodes(from, u64::from(size)).unwrap_or_default();
            let proof =
                parts.iter().map(|p| merkle::joined(&p.iter().map(find).collect::<Vec<_>>()).unwrap());
            let checkpoint = Checkpoint {
                log: Nonce::from_bytes([1; 16]),
                generation: self.generation,
                size: u64::from(size),
                head: Digest::of(&[size, self.fork]),
                root: frontier.root(),
                at_us: 0,
            };
            fleet::Checkpoint {
                token: checkpoint::sign(&self.key, &checkpoint).unwrap(),
                from_size: from,
                extension: proof.map(|hash| hash.0.to_vec()).collect(),
            }
        }
    }

    #[test]
    fn a_rolled_back_log_is_refused_over_restarts_until_it_is_back_or_reconciled() {
        let folder = tempfile::tempdir().unwrap();
        let log = Log::new(0, 0);
        let keys = log.keys();
        let host = Checkpoints::open(folder.path()).unwrap();
        assert!(host.token().is_empty());
        assert_eq!(host.take(&log.shown(0, 5), &keys), None);
        assert_eq!(host.take(&log.shown(5, 9), &keys), None);
        let remembered = host.token();
        assert!(host.may_accept().is_ok());
        // Without the proof it is only not taken.
        let kept = host.take(&log.shown(4, 12), &keys).unwrap();
        assert_eq!((kept.token, kept.contradicts), (remembered.clone(), String::new()));
        assert!(host.may_accept().is_ok());

        let kept = host.take(&log.shown(0, 7), &keys).unwrap();
        assert_eq!(kept.token, remembered);
        assert!(kept.contradicts.contains("rolled back"), "{}", kept.contradicts);
        let host = Checkpoints::open(folder.path()).unwrap();
        assert_eq!(host.may_accept().unwrap_err().code, ErrorCode::AuditBroken);
        assert_eq!(host.token(), remembered);
        // The current log is put back.
        assert_eq!(host.take(&log.shown(9, 9), &keys), None);
        assert!(host.may_accept().is_ok());

        let fork = Log { fork: 1, ..log };
        assert!(host.take(&fork.shown(9, 20), &keys).unwrap().contradicts.contains("forked"));
        assert!(host.may_accept().is_err());
        // An operator accepted the loss.
        let reconciled = Log { generation: 1, ..fork };
        assert_eq!(host.take(&reconciled.shown(0, 4), &keys), None);
        let host = Checkpoints::open(folder.path()).unwrap();
        assert!(host.may_accept().is_ok());
        assert_ne!(host.token(), remembered);
    }

    #[test]
    fn a_stranger_s_checkpoint_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let (log, stranger) = (Log::new(0, 0), Log::new(1, 7));
        let host = Checkpoints::open(folder.path()).unwrap();
        assert_eq!(host.take(&log.shown(0, 5), &log.keys()), None);
        let token = host.token();
        assert_eq!(host.take(&stranger.shown(5, 9), &log.keys()), None);
        let garbage =
            fleet::Checkpoint { token: vec![0; 5_000], from_size: 5, extension: vec![vec![1; 3]; 99] };
        assert_eq!(host.take(&garbage, &log.keys()), None);
        assert_eq!(host.token(), token);
        assert!(host.may_accept().is_ok());
    }

    #[test]
    fn a_damaged_memory_is_not_taken_for_none() {
        let folder = tempfile::tempdir().unwrap();
        let log = Log::new(0, 0);
        Checkpoints::open(folder.path()).unwrap().take(&log.shown(0, 5), &log.keys());
        let path = folder.path().join(FILE);
        let good = std::fs::read(&path).unwrap();
        let check = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            assert_eq!(Checkpoints::open(folder.path()).unwrap_err().code, ErrorCode::WrongState);
        };
        check(b"");
        check(&good[..good.len() / 2]);
        check(&vec![b' '; 10_000]);
        let other = SigningKey::generate().unwrap().verifying_key().to_hex();
        let text = String::from_utf8(good.clone()).unwrap();
        check(text.replace(&log.key.verifying_key().to_hex(), &other).as_bytes());
        std::fs::write(&path, &good).unwrap();
        assert!(Checkpoints::open(folder.path()).is_ok());
        Checkpoints::forget(folder.path()).unwrap();
        assert!(Checkpoints::open(folder.path()).unwrap().token().is_empty());
        Checkpoints::forget(folder.path()).unwrap();
    }

    #[test]
    fn the_memory_is_the_owner_s_alone() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().unwrap();
        let log = Log::new(0, 0);
        Checkpoints::open(folder.path()).unwrap().take(&log.shown(0, 5), &log.keys());
        let mode = std::fs::metadata(folder.path().join(FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
