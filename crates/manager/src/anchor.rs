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
    /// How often a loss was accepted, when the entry was seen.
    #[serde(default)]
    generation: u64,
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
            let generation = held.map_or(0, |h| h.generation);
            *held = Some(Held { sequence, hash, generation });
        }
    }

    /// The entry that the log of this generation must hold: none when a loss was accepted since it was seen.
    pub(crate) fn of_generation(&self, generation: u64) -> Option<(u64, Digest)> {
        self.lock().filter(|h| h.generation >= generation).map(|h| (h.sequence, h.hash))
    }

    /// Why the registry's generation can't be. Only this manager accepts losses of a registry of its own.
    pub(crate) fn contradicts(&self, generation: u64, shared: bool) -> Option<String> {
        let held = (*self.lock())?.generation;
        let impossible = generation < held || (generation > held && !shared);
        impossible.then(|| {
            format!("the audit log's generation is {generation}, this manager has seen it at {held}")
        })
    }

    /// The log was verified and is trusted, in this generation.
    pub(crate) fn follow(&self, generation: u64, sequence: u64, hash: Digest) {
        if self.lock().is_some_and(|h| h.generation == generation) {
            return self.advance(sequence, hash);
        }
        self.begin_anew(generation, sequence, hash);
    }

    /// What was held does not count any more: a loss was accepted.
    pub(crate) fn begin_anew(&self, generation: u64, sequence: u64, hash: Digest) {
        *self.lock() = Some(Held { sequence, hash, generation });
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
