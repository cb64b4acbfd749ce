//! The rules of the hand-over by name, so that each can be cited at its defence and removed in a mutation test.
//!
//! Production code can't turn one off: outside the simulation [`Rules`] holds nothing and every rule is in force.

/// One rule. `H1` to `H10` are the numbered counter-examples of the specification; each comment says what
/// happens without the rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Rule {
    /// H1. The source votes only after a proof that nothing moved since the end of the stream. Without it: link
    /// cut, source resumed, ran to 7, was then frozen; the target continued from 4.
    Proof,
    /// H2. Commit changes nothing at the source; only RELEASE after the RUNNING receipt kills. Without it: the
    /// target renounces, the manager commits on the old votes, the source kills: no copy is left.
    ReleaseAfterRunning,
    /// H3. Only RENOUNCED is proof. Without it: the target says "not run" while COMMIT is in flight.
    OnlyRenouncedIsProof,
    /// H4. Journal RENOUNCED, kill, wait, then sign. Without it: a restart forgets the signed word and runs.
    JournalBeforeSigning,
    /// H5. A renunciation covers exactly one attempt. Without it: one from an earlier attempt frees the source.
    RenunciationCoversAttempt,
    /// H6. Orders match (migration, epochs) exactly. Without it: an old RELEASE or COMMIT acts in a later A→B→A.
    ExactOrders,
    /// H7. A target that voted never renounces on its own timer. Without it: the source's host dies after both
    /// votes, the timer renounces, no copy is left.
    NoTimerRenounce,
    /// H8. A copy that looks stale is adopted on its proof, never killed on suspicion. Without it: a reconciler
    /// kills the rightful copy as a "breach".
    AdoptBeforeStopping,
    /// H9. A refused `cont` with the VM still paused turns RUN into RENOUNCED. Without it: the source stays
    /// frozen for ever.
    RefusedContRenounces,
    /// H10. The registry frees a source that voted only with a renunciation or a fenced target. Without it: a
    /// registry restored from a backup aborts what it had committed.
    VoidNeedsProof,
    /// The target's QEMU starts with `-S`. Without it: it runs as soon as the stream is loaded.
    TargetStartsPaused,
    /// The source's QEMU is frozen before the vote. Without it: it resumes by itself when its link closes.
    Freeze,
    /// The proof is made after the freeze, not before. Without it: the source resumes between the two.
    ProofAfterFreeze,
    /// The manager matches votes and receipts exactly. Without it: a receipt of an earlier attempt releases.
    ExactReceipts,
    /// The commit is durable before anybody hears of it. Without it: the target runs on a decision that no
    /// registry holds.
    DurableCommit,
    /// The nonce is consumed in the journal before the target acts. Without it: a restart consumes it again.
    DurableNonce,
    /// FROZEN is journalled before it is sent. Without it: the restarted source forgets its vote and thaws.
    DurableVote,
    /// The target's QEMU is proven dead before its renunciation is signed. Without it: both run for a moment.
    DeadBeforeSigning,
    /// `cont` only after `query-migrate` completed and `query-status` paused. Without it: `cont` while the target
    /// is still `inmigrate` silently cancels its `-S`.
    CheckBeforeCont,
    /// A STOP that slips in while suspended ends the migration. Without it: a held relay freezes the guest.
    StopWhileSuspendedAborts,
    /// A watchdog bounds the frozen time. Without it: a lost target vote freezes the guest for ever.
    Watchdog,
}

impl Rule {
    /// Every rule.
    pub const ALL: [Self; 21] = [
        Self::Proof,
        Self::ReleaseAfterRunning,
        Self::OnlyRenouncedIsProof,
        Self::JournalBeforeSigning,
        Self::RenunciationCoversAttempt,
        Self::ExactOrders,
        Self::NoTimerRenounce,
        Self::AdoptBeforeStopping,
        Self::RefusedContRenounces,
        Self::VoidNeedsProof,
        Self::TargetStartsPaused,
        Self::Freeze,
        Self::ProofAfterFreeze,
        Self::ExactReceipts,
        Self::DurableCommit,
        Self::DurableNonce,
        Self::DurableVote,
        Self::DeadBeforeSigning,
        Self::CheckBeforeCont,
        Self::StopWhileSuspendedAborts,
        Self::Watchdog,
    ];
}

/// The rules in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    #[cfg(any(test, feature = "sim"))]
    removed: u32,
}

impl Rules {
    /// Every rule is in force: the only value that exists outside the simulation.
    pub const ALL: Self = Self {
        #[cfg(any(test, feature = "sim"))]
        removed: 0,
    };

    /// Every rule but one, for mutation tests.
    #[cfg(any(test, feature = "sim"))]
    #[must_use]
    pub const fn without(rule: Rule) -> Self {
        Self { removed: 1 << rule as u8 }
    }

    /// Whether the rule is in force.
    #[cfg(any(test, feature = "sim"))]
    #[must_use]
    pub const fn has(self, rule: Rule) -> bool {
        self.removed & (1 << rule as u8) == 0
    }

    /// Whether the rule is in force: always.
    #[cfg(not(any(test, feature = "sim")))]
    #[must_use]
    pub const fn has(self, _rule: Rule) -> bool {
        true
    }
}
