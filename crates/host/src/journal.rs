//! The host's journal: what the daemon is about to do, made durable before it does it (I6).
//!
//! One append-only file of signed, hash-chained records. A record is complete when [`Journal::append`] returns: it
//! was written and synchronised. When the machine dies in between, the file ends in a *torn* record, which nobody
//! has acted on; it is cut. Damage anywhere else means that a promise may be forgotten (a renunciation, a consumed
//! nonce): the journal is refused, and with it every act that needs it.
//!
//! ```text
//! record = "ORJ1" payload length:u32 seal length:u32 check:8 payload seal        (big endian)
//!   check = first bytes of a hash over the previous record's hash and the lengths: a damaged length can't make
//!           what follows look like a torn tail
//!   seal  = document signed by this host's key over (sequence, chain hash of the payload)
//! first record = {journal id, key}
//! ```

use engine::handover::journal::{Entry, SourceFact, TargetFact};
use permit::document::{self, DocumentKind};
use permit::{SigningKey, chain};
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use types::{Digest, Nonce};

const MAGIC: [u8; 4] = *b"ORJ1";
const HEAD_BYTES: usize = 20;
/// A seal takes about 200 bytes.
const SEAL_BYTES_MAX: usize = 1024;
/// Entries are about a KiB; a proof holds a token of at most 4.
const PAYLOAD_BYTES_MAX: usize = 64 * 1024;
/// About a million entries: far beyond what a host writes, and a bound on what a start reads.
const FILE_BYTES_MAX: u64 = 1 << 30;

/// Room that is set aside on the disk: a hand-over that has begun must be able to write its end, or a full disk would
/// hold a frozen guest. A dozen hand-overs' entries.
const RESERVE_BYTES: u64 = 128 * 1024;

/// Why the journal can't be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// It can't be opened, read or created.
    #[error("cannot {operation} the journal {}", path.display())]
    Open {
        /// What was tried.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// It is damaged before its end, or signed by another key. Acting on it could run a VM twice.
    #[error(
        "the journal {} is damaged at byte {offset} (record {sequence}): {detail}; this host refuses to take part \
         in migrations until an operator restores or replaces it", path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// Which record.
        sequence: u64,
        /// How.
        detail: String,
    },
    /// A record could not be made durable; the step that needed it was not taken.
    #[error("the journal {} cannot be written, so the step was refused", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// An earlier write left it in an unknown state, and it could not be read afresh yet; the next append tries again.
    #[error("the journal {} is closed after a failed write, and cannot be reopened: {detail}", path.display())]
    Poisoned {
        /// The file.
        path: PathBuf,
        /// The failure.
        detail: String,
    },
}

/// The open journal.
pub struct Journal {
    file: File,
    path: PathBuf,
    key: Arc<SigningKey>,
    id: Nonce,
    sequence: u64,
    head: Digest,
    end: u64,
    poisoned: Option<String>,
}

impl std::fmt::Debug for Journal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Journal")
            .field("path", &self.path)
            .field("sequence", &self.sequence)
            .finish_non_exhaustive()
    }
}

/// One record, besides its place in the chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Record {
    /// The first.
    Created { journal: Nonce, key: String },
    /// About a hand-over.
    Handover { at_unix_us: u64, entry: Box<Entry> },
}

impl Journal {
    /// Opens the journal, or creates it with the id `fresh`; gives every entry in order.
    ///
    /// # Errors
    /// See [`JournalError`].
    pub fn open(path: &Path, key: Arc<SigningKey>, fresh: Nonce) -> Result<(Self, Vec<Entry>), JournalError> {
        let failed =
            |operation| move |source| JournalError::Open { operation, path: path.to_owned(), source };
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path)
            .map_err(failed("open"))?;
        if file.metadata().map_err(failed("read"))?.len() > FILE_BYTES_MAX {
            return Err(failed("read")(std::io::Error::other(
                "it is larger than any that this daemon writes",
            )));
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(failed("read"))?;
        let scan = Scan::of(&bytes, path, &key)?;
        let mut journal = Self {
            file,
            path: path.to_owned(),
            key,
            id: fresh,
            sequence: scan.sequence,
            head: scan.head,
            end: scan.end,
            poisoned: None,
        };
        if journal.end < bytes.len() as u64 {
            tracing::warn!(path = %path.display(), cut_bytes = bytes.len() as u64 - journal.end, "torn record cut");
            journal.cut().map_err(failed("cut"))?;
        }
        match scan.id {
            Some(id) => journal.id = id,
            None => journal.create().map_err(failed("create"))?,
        }
        Ok((journal, scan.entries))
    }

    /// Its id: drawn when it was created; a replaced or restored journal has another.
    #[must_use]
    pub fn id(&self) -> Nonce {
        self.id
    }

    /// Makes an entry durable.
    ///
    /// # Errors
    /// It is not durable, and the step that it announces must not be taken.
    pub fn append(&mut self, entry: &Entry, at_unix_us: u64) -> Result<(), JournalError> {
        self.heal()?;
        let reserved = self.reserve();
        if opens(entry) {
            reserved.map_err(|e| self.refused(e))?;
        }
        self.append_record(&Record::Handover { at_unix_us, entry: Box::new(entry.clone()) })
    }

    /// Sets room aside beyond the end of the file, whose size stays the same.
    fn reserve(&self) -> std::io::Result<()> {
        let keep = rustix::fs::FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&self.file, keep, self.end, RESERVE_BYTES) {
            // A file system that can't, does not.
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn create(&mut self) -> std::io::Result<()> {
        let record = Record::Created { journal: self.id, key: self.key.verifying_key().to_hex() };
        self.append_record(&record).map_err(std::io::Error::other)?;
        let folder = self.path.parent().unwrap_or(Path::new("/"));
        File::open(folder)?.sync_all()
    }

    fn append_record(&mut self, record: &Record) -> Result<(), JournalError> {
        let payload = serde_json::to_vec(record).map_err(|e| self.refused(e.into()))?;
        let hash = chain::append(&self.head, self.sequence, &payload);
        let seal = document::sign(&self.key, DocumentKind::JournalEntry, &(self.sequence, hash))
            .map_err(|e| self.refused(std::io::Error::other(e.to_string())))?;
        let bytes = frame(&self.head, &payload, &seal)
            .ok_or_else(|| self.refused(std::io::Error::other("the entry is too long")))?;
        if let Err(source) = self.file.write_all(&bytes) {
            // Most likely a full disk: what was written of it is cut again, and a later append may succeed.
            if let Err(error) = self.cut() {
                self.poisoned = Some(format!("a torn record could not be cut: {error}"));
            }
            return Err(self.refused(source));
        }
        if let Err(source) = self.file.sync_data() {
            // After a failed synchronisation nobody knows what the disk holds.
            self.poisoned = Some(source.to_string());
            return Err(self.refused(source));
        }
        self.head = hash;
        self.sequence += 1;
        self.end += bytes.len() as u64;
        Ok(())
    }

    /// After a failed write: opens the file again, cuts what was not acknowledged (no step was taken on it), and reads
    /// the rest from the disk with the checks of [`Self::open`]. It must be what this daemon wrote, to the last record.
    fn heal(&mut self) -> Result<(), JournalError> {
        let Some(detail) = self.poisoned.clone() else { return Ok(()) };
        let bytes = self.reread().map_err(|error| JournalError::Poisoned {
            path: self.path.clone(),
            detail: format!("{detail}; then: {error}"),
        })?;
        let scan = Scan::of(&bytes, &self.path, &self.key)?;
        if (scan.id, scan.sequence, scan.head, scan.end)
            != (Some(self.id), self.sequence, self.head, self.end)
        {
            return Err(JournalError::Damaged {
                path: self.path.clone(),
                offset: scan.end,
                sequence: scan.sequence,
                detail: "records that were made durable are gone".to_owned(),
            });
        }
        tracing::warn!(path = %self.path.display(), detail, "the journal is open again after a failed write");
        self.poisoned = None;
        Ok(())
    }

    fn reread(&mut self) -> std::io::Result<Vec<u8>> {
        let mut file = OpenOptions::new().read(true).append(true).open(&self.path)?;
        if file.metadata()?.len() > self.end {
            file.set_len(self.end)?;
        }
        file.sync_all()?;
        // A page that could not be written stays in memory as if it had been: read what the disk holds.
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        self.file = file;
        Ok(bytes)
    }

    fn cut(&mut self) -> std::io::Result<()> {
        self.file.set_len(self.end)?;
        self.file.seek(SeekFrom::End(0))?;
        self.file.sync_data()
    }

    fn refused(&self, source: std::io::Error) -> JournalError {
        JournalError::Write { path: self.path.clone(), source }
    }
}

/// Whether a hand-over begins with it.
fn opens(entry: &Entry) -> bool {
    match entry {
        Entry::Source(e) => matches!(e.fact, SourceFact::Opened { .. } | SourceFact::Declined { .. }),
        Entry::Target(e) => matches!(e.fact, TargetFact::Consumed { .. }),
    }
}

fn check(previous: &Digest, lengths: &[u8]) -> [u8; 8] {
    let mut hasher = blake3::Hasher::new_derive_key("outrider 2026 host journal lengths");
    hasher.update(&previous.0).update(lengths);
    let mut check = [0; 8];
    check.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    check
}

fn frame(previous: &Digest, payload: &[u8], seal: &[u8]) -> Option<Vec<u8>> {
    if payload.len() > PAYLOAD_BYTES_MAX || seal.len() > SEAL_BYTES_MAX {
        return None;
    }
    let length = |part: &[u8]| u32::try_from(part.len()).ok().map(u32::to_be_bytes);
    let lengths = [length(payload)?, length(seal)?].concat();
    Some([&MAGIC[..], &lengths, &check(previous, &lengths), payload, seal].concat())
}

/// What a whole file holds.
struct Scan {
    id: Option<Nonce>,
    entries: Vec<Entry>,
    sequence: u64,
    head: Digest,
    end: u64,
}

/// How one record reads.
enum Next {
    Record(Record, Digest, usize),
    Torn,
    Damaged(String),
}

impl Scan {
    fn of(bytes: &[u8], path: &Path, key: &SigningKey) -> Result<Self, JournalError> {
        let mut scan = Self { id: None, entries: Vec::new(), sequence: 0, head: Digest([0; 32]), end: 0 };
        let mut at = 0;
        while at < bytes.len() {
            match next(&bytes[at..], &scan.head, scan.sequence, key) {
                Next::Record(record, hash, length) => {
                    scan.take(record);
                    scan.head = hash;
                    scan.sequence += 1;
                    at += length;
                    scan.end = at as u64;
                }
                Next::Torn => break,
                Next::Damaged(detail) => {
                    let (path, offset) = (path.to_owned(), at as u64);
                    return Err(JournalError::Damaged { path, offset, sequence: scan.sequence, detail });
                }
            }
        }
        Ok(scan)
    }

    fn take(&mut self, record: Record) {
        match record {
            Record::Created { journal, .. } => self.id = Some(journal),
            Record::Handover { entry, .. } => self.entries.push(*entry),
        }
    }
}

fn next(bytes: &[u8], previous: &Digest, sequence: u64, key: &SigningKey) -> Next {
    // A crash leaves a short record, or zeros where the file grew before its data came.
    let torn_or = |detail: &str| if zero_tail(bytes) { Next::Torn } else { Next::Damaged(detail.to_owned()) };
    let Some((head, rest)) = bytes.split_first_chunk::<HEAD_BYTES>() else { return Next::Torn };
    let (magic, head) = head.split_at(4);
    let (lengths, found) = head.split_at(8);
    let length =
        |at: usize| u32::from_be_bytes([lengths[at], lengths[at + 1], lengths[at + 2], lengths[at + 3]]);
    let (payload_bytes, seal_bytes) = (length(0) as usize, length(4) as usize);
    let bounded = payload_bytes <= PAYLOAD_BYTES_MAX && seal_bytes <= SEAL_BYTES_MAX;
    if magic != MAGIC || found != check(previous, lengths) || !bounded {
        return torn_or("no record starts here");
    }
    let Some(body) = rest.get(..payload_bytes + seal_bytes) else { return Next::Torn };
    let (payload, seal) = body.split_at(payload_bytes);
    let hash = chain::append(previous, sequence, payload);
    let sealed = document::verify::<(u64, Digest)>(seal, DocumentKind::JournalEntry, key.verifying_key());
    if sealed != Ok((sequence, hash)) {
        // Whole, but not what this host sealed: torn only if it is the last and its end was never written.
        let last = rest.len() == body.len();
        return if last {
            torn_or("its seal is not this host's")
        } else {
            damaged("its seal is not this host's")
        };
    }
    let record: Record = match serde_json::from_slice(payload) {
        Ok(record) => record,
        Err(e) => return Next::Damaged(format!("it cannot be understood by this version: {e}")),
    };
    if matches!(record, Record::Created { .. }) != (sequence == 0) {
        return damaged("its place in the chain is wrong");
    }
    Next::Record(record, hash, HEAD_BYTES + body.len())
}

fn damaged(detail: &str) -> Next {
    Next::Damaged(detail.to_owned())
}

/// Whether the bytes end in zeros as an unwritten page does: eight of them never end a signature by chance.
fn zero_tail(bytes: &[u8]) -> bool {
    bytes.len() >= 8 && bytes[bytes.len() - 8..].iter().all(|b| *b == 0)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use engine::handover::Attempt;
    use engine::handover::journal::SourceEntry;
    use types::ErrorCode;
    use types::handover::AbortReason;
    use types::handover::HandoverKey;
    use types::{Epoch, MigrationId, VmId};

    fn key(seed: usize) -> Arc<SigningKey> {
        static KEYS: std::sync::OnceLock<Vec<Arc<SigningKey>>> = std::sync::OnceLock::new();
        let make = || (0..2).map(|_| Arc::new(SigningKey::generate().unwrap())).collect();
        KEYS.get_or_init(make)[seed].clone()
    }

    fn entry(n: u8) -> Entry {
        let key = HandoverKey {
            migration: MigrationId::from_bytes([n; 16]),
            vm: VmId::from_bytes([1; 16]),
            source_epoch: Epoch(1),
            target_epoch: Epoch(2),
        };
        Entry::Source(SourceEntry { key, fact: SourceFact::Freezing })
    }

    fn open(path: &Path, fresh: u8) -> Result<(Journal, Vec<Entry>), JournalError> {
        Journal::open(path, key(0), Nonce::from_bytes([fresh; 16]))
    }

    fn written(entries: u8) -> (tempfile::TempDir, PathBuf, Vec<u8>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        let (mut journal, _) = open(&path, 1).unwrap();
        for n in 0..entries {
            journal.append(&entry(n), 5).unwrap();
        }
        let bytes = std::fs::read(&path).unwrap();
        (folder, path, bytes)
    }

    #[test]
    fn what_was_appended_is_read_back_with_the_first_id() {
        let (_folder, path, _) = written(3);
        let (mut journal, entries) = open(&path, 2).unwrap();
        assert_eq!(entries, [entry(0), entry(1), entry(2)]);
        assert_eq!(journal.id(), Nonce::from_bytes([1; 16]), "the id is drawn once");
        journal.append(&entry(3), 6).unwrap();
        assert_eq!(open(&path, 2).unwrap().1.len(), 4);
    }

    #[test]
    fn a_torn_last_record_is_cut_at_every_length() {
        let (_folder, path, whole) = written(2);
        let (_f, _p, shorter) = written(1);
        for length in shorter.len()..whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            let (mut journal, entries) = open(&path, 2).unwrap();
            assert_eq!(entries, [entry(0)], "at {length}");
            journal.append(&entry(9), 1).unwrap();
            assert_eq!(open(&path, 2).unwrap().1, [entry(0), entry(9)]);
        }
        // The file grew, its data never came.
        let mut zeros = shorter.clone();
        zeros.resize(whole.len(), 0);
        std::fs::write(&path, &zeros).unwrap();
        assert_eq!(open(&path, 2).unwrap().1, [entry(0)]);
    }

    #[test]
    fn any_flipped_byte_is_damage() {
        let (_folder, path, whole) = written(2);
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x41;
            std::fs::write(&path, &bytes).unwrap();
            let error = open(&path, 2).map(|(_, entries)| entries).expect_err(&format!("byte {at}"));
            assert!(matches!(error, JournalError::Damaged { .. }), "byte {at}: {error}");
        }
    }

    #[test]
    fn removed_and_foreign_records_are_damage() {
        let (_folder, path, three) = written(3);
        let (_f, _p, two) = written(2);
        let (_g, _q, one) = written(1);
        let without_second = [&one[..], &three[two.len()..]].concat();
        std::fs::write(&path, without_second).unwrap();
        assert!(matches!(open(&path, 2), Err(JournalError::Damaged { .. })));
        std::fs::write(&path, &three).unwrap();
        let other = Journal::open(&path, key(1), Nonce::from_bytes([2; 16]));
        assert!(matches!(other, Err(JournalError::Damaged { .. })));
    }

    #[test]
    fn a_failed_write_closes_it_only_until_it_can_be_read_afresh() {
        let (_folder, path, _) = written(0);
        let (mut journal, _) = open(&path, 2).unwrap();
        journal.append(&entry(0), 1).unwrap();
        // Writes fail, and what was written cannot be cut.
        journal.file = OpenOptions::new().read(true).write(true).open("/dev/full").unwrap();
        assert!(matches!(journal.append(&entry(1), 1), Err(JournalError::Write { .. })));
        assert!(journal.poisoned.is_some());
        // A record that was written but never acknowledged: nobody acted on it.
        let (_f, _p, longer) = written(2);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, [&whole[..], &longer[..300]].concat()).unwrap();
        journal.append(&entry(2), 1).unwrap();
        journal.append(&entry(3), 1).unwrap();
        assert_eq!(open(&path, 2).unwrap().1, [entry(0), entry(2), entry(3)]);
    }

    #[test]
    fn a_failed_write_that_lost_a_record_is_damage() {
        let (_folder, path, whole) = written(2);
        let (mut journal, _) = open(&path, 2).unwrap();
        let (_f, _p, shorter) = written(1);
        journal.poisoned = Some("the disk failed".to_owned());
        std::fs::rename(&path, path.with_extension("away")).unwrap();
        assert!(
            matches!(journal.append(&entry(3), 1), Err(JournalError::Poisoned { .. })),
            "tried again later"
        );
        std::fs::write(&path, &whole[..shorter.len()]).unwrap();
        assert!(matches!(journal.append(&entry(3), 1), Err(JournalError::Damaged { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), &whole[..shorter.len()], "nothing is written to it");
        std::fs::write(&path, &whole).unwrap();
        journal.append(&entry(3), 1).unwrap();
    }

    /// A file system of that size; `None` where none can be mounted.
    fn small_disk(size: &str) -> Option<tempfile::TempDir> {
        let folder = tempfile::tempdir().unwrap();
        let options = format!("size={size}");
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "outrider-test"])
            .arg(folder.path())
            .status()
            .is_ok_and(|s| s.success());
        if !mounted {
            eprintln!("SKIPPED: a tmpfs can't be mounted here");
        }
        mounted.then_some(folder)
    }

    fn unmount(folder: &tempfile::TempDir) {
        let unmounted = std::process::Command::new("umount").arg("-l").arg(folder.path()).status();
        assert!(unmounted.is_ok_and(|s| s.success()));
    }

    fn declined() -> Entry {
        let Entry::Source(SourceEntry { key, .. }) = entry(1) else { unreachable!("it is a source's") };
        let attempt = Attempt {
            key,
            permit: Digest([1; 32]),
            nonce: Nonce::from_bytes([3; 16]),
            source: "host-a".parse().unwrap(),
            target: "host-b".parse().unwrap(),
            target_journal: Nonce::from_bytes([4; 16]),
            run_budget_ms: 1,
        };
        let reason = AbortReason { code: ErrorCode::Terminated, detail: String::new() };
        Entry::Source(SourceEntry { key, fact: SourceFact::Declined { attempt: Box::new(attempt), reason } })
    }

    #[test]
    fn a_full_disk_refuses_the_step_and_keeps_what_was_there() {
        let Some(folder) = small_disk("8k") else { return };
        let path = folder.path().join("journal");
        let (mut journal, _) = open(&path, 1).unwrap();
        // There is room for it, but not for what may follow.
        let refused_to_begin = journal.append(&declined(), 1);
        let mut kept = 0;
        let refused = loop {
            match journal.append(&entry(kept), 1) {
                Ok(()) => kept += 1,
                Err(error) => break error,
            }
        };
        let read_back = open(&path, 2).map(|(_, entries)| entries.len());
        unmount(&folder);
        assert!(matches!(refused_to_begin, Err(JournalError::Write { .. })), "{refused_to_begin:?}");
        assert!(kept > 0 && matches!(refused, JournalError::Write { .. }), "{refused}");
        assert_eq!(read_back.unwrap(), usize::from(kept));
    }

    #[test]
    fn what_has_begun_can_be_written_to_its_end_on_a_full_disk() {
        let Some(folder) = small_disk("400k") else { return };
        let path = folder.path().join("journal");
        let (mut journal, _) = open(&path, 1).unwrap();
        let begun = journal.append(&declined(), 1);
        // Somebody else takes the rest.
        std::fs::write(folder.path().join("other"), vec![0; 400 << 10]).unwrap_err();
        let all: Vec<_> = (0..20).map(|n| journal.append(&entry(n), 1)).collect();
        let another = journal.append(&declined(), 1);
        unmount(&folder);
        begun.unwrap();
        assert!(matches!(another, Err(JournalError::Write { .. })), "nothing new is begun");
        assert!(all.iter().all(Result::is_ok), "{all:?}");
    }
}
