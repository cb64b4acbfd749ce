//! The audit log's anchor: number and hash of an entry, kept outside of the database, so that cutting off the log's
//! tail (or putting back an older database) shows. It may lag behind the log; it never runs ahead of it.

use link::ca::write_private;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard};
use types::{Digest, Problem};

const ANCHOR_FILE: &str = "audit.anchor";

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Held {
    sequence: u64,
    hash: Digest,
}

/// The anchor.
pub(crate) struct Anchor {
    path: PathBuf,
    held: Mutex<Option<Held>>,
}

impl Anchor {
    /// Reads the anchor of a state folder. One that cannot be read is as good as none, and is said.
    pub(crate) fn open(folder: &std::path::Path) -> Self {
        let path = folder.join(ANCHOR_FILE);
        let held = match std::fs::read_to_string(&path) {
            Ok(text) => serde_json::from_str(&text)
                .inspect_err(|e| tracing::error!(file = %path.display(), "the audit anchor is damaged: {e}"))
                .ok(),
            Err(_) => None,
        };
        Self { path, held: Mutex::new(held) }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Held>> {
        self.held.lock().expect("no holder of this lock can panic: it only copies")
    }

    /// The entry that the log must hold.
    pub(crate) fn get(&self) -> Option<(u64, Digest)> {
        self.lock().map(|h| (h.sequence, h.hash))
    }

    /// Moves on to a later entry of a log that was verified, or appended to by this process.
    pub(crate) fn advance(&self, sequence: u64, hash: Digest) {
        let mut held = self.lock();
        if held.is_none_or(|h| h.sequence < sequence) {
            *held = Some(Held { sequence, hash });
        }
    }

    /// Writes it down.
    ///
    /// # Errors
    /// The file cannot be written.
    pub(crate) fn keep(&self) -> Result<(), Problem> {
        let Some(held) = *self.lock() else { return Ok(()) };
        let text = serde_json::to_string(&held).expect("a number and a digest serialise");
        write_private(&self.path, text.as_bytes()).map_err(|e| {
            Problem::new(
                types::ErrorCode::RegistryUnavailable,
                format!("the audit anchor cannot be kept: {e}"),
            )
        })
    }
}
