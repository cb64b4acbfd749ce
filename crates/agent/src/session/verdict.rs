//! Guest pages go to the scanner beside the stream; the device state waits for its verdict.

use super::{Half, Session, Stop};
use crate::lane::Lane;
use crate::signatures::Signatures;
use engine::inspect::Output;
use rustix::event::PollFlags;
use std::time::Instant;

/// Where the inspector's output goes: what is released to its lane's QEMU, guest pages to the scanner.
pub(super) struct Released<'s> {
    pub(super) lanes: &'s mut [Lane],
    pub(super) signatures: Option<&'s mut Signatures>,
}

impl Output for Released<'_> {
    /// Records are small: gathered, they cost QEMU and us one system call instead of two dozen.
    fn release(&mut self, channel: u16, bytes: &[u8]) {
        if let Some(lane) = self.lanes.get_mut(usize::from(channel)) {
            lane.to_hypervisor.push(bytes);
        }
    }

    fn page(&mut self, block: usize, offset: u64, piece: &[u8]) {
        if let Some(signatures) = &mut self.signatures {
            signatures.page(block, offset, piece);
        }
    }

    fn has_room(&self) -> bool {
        self.signatures.as_ref().is_none_or(|signatures| signatures.has_room())
    }
}

impl Session {
    /// Whether the stream may go on, as far as the scanner is concerned.
    pub(super) fn scanner_has_room(&self) -> bool {
        self.signatures.as_ref().is_none_or(Signatures::has_room)
    }

    /// What the scanner says, what was held back for it, and what comes of it once the stream is complete.
    pub(super) fn verdict_turn(&mut self, ready: PollFlags) -> Result<(), Stop> {
        let now = Instant::now();
        let Some(signatures) = &mut self.signatures else { return Ok(()) };
        signatures.ready(ready, now);
        let Some(Half::Target(target)) = &mut self.half else { return Ok(()) };
        if target.is_held_back() && signatures.has_room() {
            let mut released = Released { lanes: &mut self.lanes, signatures: Some(signatures) };
            let effects = target.resume(now, &mut released);
            self.apply(effects)?;
        }
        self.judge(now)
    }

    fn judge(&mut self, now: Instant) -> Result<(), Stop> {
        let (Some(signatures), Some(Half::Target(target))) = (&mut self.signatures, &mut self.half) else {
            return Ok(());
        };
        if target.is_judging() {
            signatures.finish(now);
        }
        let judgement = signatures.judgement(|block| target.block_name(usize::from(block)));
        let effects = judgement.map_or_else(Vec::new, |judgement| target.judged(judgement, now));
        self.apply(effects)
    }
}
