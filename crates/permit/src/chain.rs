//! The hash chain under the audit log and the daemons' journals: any edit, removal, insertion or reordering
//! changes every later hash.
//!
//! What a chain alone can't show is a cut at its end; for that its head is signed (audit checkpoints, signed
//! journal entries).

use types::Digest;

/// Where a chain stands: the number of its last entry and its hash. A new chain stands at 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// Number of the last entry; entries count from 1.
    pub seq: u64,
    /// Hash of the last entry, or of the chain's name.
    pub hash: Digest,
}

impl Head {
    /// The start of the chain of this name (`audit`, or a journal's id). Chains of different names share no hash.
    pub fn genesis(name: &[u8]) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("outrider 2026 hash chain v1: genesis");
        hasher.update(name);
        Self { seq: 0, hash: Digest(*hasher.finalize().as_bytes()) }
    }

    /// The head after one more entry.
    pub fn append(&self, payload: &[u8]) -> Self {
        let seq = self.seq + 1;
        Self { seq, hash: append(&self.hash, seq, payload) }
    }
}

/// One entry as it is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry<P> {
    /// Its number.
    pub seq: u64,
    /// What it says.
    pub payload: P,
    /// Its hash.
    pub hash: Digest,
}

/// The first entry that does not fit the chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("entry {seq} of the chain was changed, removed, inserted or moved")]
pub struct FirstBad {
    /// The number that it should have.
    pub seq: u64,
}

/// The hash of entry `seq` after the one whose hash is `previous`.
pub fn append(previous: &Digest, seq: u64, payload: &[u8]) -> Digest {
    let mut hasher = blake3::Hasher::new_derive_key("outrider 2026 hash chain v1: entry");
    hasher.update(&previous.0);
    hasher.update(&seq.to_le_bytes());
    hasher.update(payload);
    Digest(*hasher.finalize().as_bytes())
}

/// Walks a chain from `start` (a genesis, or a head that is trusted).
///
/// # Errors
/// The first entry that does not fit.
pub fn verify<P: AsRef<[u8]>>(
    start: Head,
    entries: impl IntoIterator<Item = Entry<P>>,
) -> Result<Head, FirstBad> {
    entries.into_iter().try_fold(start, |head, entry| {
        let next = head.append(entry.payload.as_ref());
        let fits = entry.seq == next.seq && entry.hash == next.hash;
        fits.then_some(next).ok_or(FirstBad { seq: next.seq })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain() -> Vec<Entry<Vec<u8>>> {
        let mut head = Head::genesis(b"audit");
        (0..6u8)
            .map(|n| {
                let payload = vec![n; usize::from(n)];
                head = head.append(&payload);
                Entry { seq: head.seq, payload, hash: head.hash }
            })
            .collect()
    }

    fn check(change: impl FnOnce(&mut Vec<Entry<Vec<u8>>>), expect: Result<u64, u64>) {
        let mut entries = chain();
        change(&mut entries);
        let got = verify(Head::genesis(b"audit"), entries);
        assert_eq!(got.map(|head| head.seq).map_err(|bad| bad.seq), expect);
    }

    #[test]
    fn an_untouched_chain_verifies_to_its_head_also_from_the_middle() {
        let entries = chain();
        check(|_| {}, Ok(6));
        let middle = Head { seq: 3, hash: entries[2].hash };
        assert_eq!(verify(middle, entries[3..].to_vec()), verify(Head::genesis(b"audit"), entries));
    }

    #[test]
    fn every_kind_of_tampering_is_found_at_its_place() {
        check(|entries| entries[3].payload[0] ^= 1, Err(4));
        check(|entries| entries[3].hash.0[31] ^= 1, Err(4));
        check(|entries| entries[3].seq += 1, Err(4));
        check(|entries| drop(entries.remove(2)), Err(3));
        check(|entries| entries.swap(1, 2), Err(2));
        check(|entries| entries.insert(1, entries[0].clone()), Err(2));
        check(|entries| drop(entries.remove(0)), Err(1));
    }

    #[test]
    fn an_edit_with_its_hash_made_anew_is_found_at_the_next_entry() {
        check(
            |entries| {
                entries[2].payload = b"edited".to_vec();
                entries[2].hash = append(&entries[1].hash, 3, b"edited");
            },
            Err(4),
        );
    }

    #[test]
    fn a_chain_of_another_name_does_not_verify() {
        assert_eq!(verify(Head::genesis(b"journal"), chain()), Err(FirstBad { seq: 1 }));
    }
}
