//! The inspector: decides which bytes of a stream may reach the target's QEMU, and the source's end detector.
//!
//! Zero trust in the source: a compromised source QEMU is the attacker that this defends against. The grammar of
//! the stream is checked by `wire::qemu`; here its content is compared with the VM's record (the [`Inventory`]), the
//! permit (the [`Limits`]) and what the target's own QEMU would read (the [`Catalogue`]):
//!
//! - RAM flows through: a byte is released as soon as the record or packet header that it belongs to is validated.
//! - Multifd channels move in lockstep, as QEMU itself would make them: past its SYNC a channel is not looked at until
//!   the main channel's marker and every other channel's SYNC are there ([`Inspector::wants`]).
//! - From the first byte behind the last END footer everything is held, until the whole device state, the end mark
//!   and the description are there and [`Inspector::finish`] accepts them; then it is released in one piece. QEMU
//!   can't start the guest before it has read the end mark, so a refusal at that point costs nothing.
//! - The first violation, on any channel, ends it: nothing more is released, whatever comes.
//!
//! Memory of one inspector: a bit for each guest page (two with multifd) and at most 8 MiB of resend counters
//! ([`map_bytes`]), firmware blocks ([`MAX_FIRMWARE_BYTES`]), the held device state
//! ([`Limits::device_state_bytes`]), one piece of input for each multifd channel, and a few KiB.
//!
//! Post-copy, COLO, RDMA, cpr, mapped-ram, vfio, block migration and XBZRLE are refused by name.

mod channel;
mod coverage;
pub mod devices;
mod end;
mod finding;
mod firmware;
mod learn;
mod limits;
mod record;

pub use end::EndDetector;
pub use finding::{finding, unvouched};
pub use firmware::{MAX_FIRMWARE_BYTES, is_firmware};
pub use learn::{LearnError, Learned, Learner, MAX_HELD_BYTES, learn};
pub use limits::{DEFAULT_DEVICE_STATE_BYTES, Limits, MAX_GUEST_BYTES, Multifd, Unsupported, map_bytes};
pub use wire::qemu::Violation;

use channel::Channels;
use record::{Cursor, Held, Judge, MainSink, Record};
use types::inventory::Inventory;
use types::layout::Catalogue;
use wire::qemu::multifd::Style;
use wire::qemu::{Parser, ParserOptions, printable};

/// Where accepted bytes go.
pub trait Output {
    /// Bytes that may reach QEMU, on a channel (0 is the main one), in order and without gaps.
    fn release(&mut self, channel: u16, bytes: &[u8]);

    /// A piece of a page's content, at its block (by order of the stream's list) and its offset in the block, in
    /// bytes. What is behind a violation is not given.
    fn page(&mut self, _block: usize, _offset: u64, _piece: &[u8]) {}

    /// Whether more pages may be given. While there is no room, multifd channels are held behind the packet
    /// that they are at, which has 512 KiB of pages at most, until [`Inspector::resume`]. The main channel,
    /// whose pages are no longer than what is fed, is for the caller to hold.
    fn has_room(&self) -> bool {
        true
    }
}

impl<F: FnMut(u16, &[u8])> Output for F {
    fn release(&mut self, channel: u16, bytes: &[u8]) {
        self(channel, bytes);
    }
}

/// A complete, accepted stream's last piece: to be released in one go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldState {
    /// Device state, end mark and description.
    pub bytes: Vec<u8>,
    /// The device sections, in stream order.
    pub sections: Vec<devices::JudgedSection>,
}

/// Pages seen so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pages {
    /// With content.
    pub normal: u64,
    /// Of zeros.
    pub zero: u64,
}

/// A broken rule, and the channel that broke it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("channel {channel}: {violation}")]
pub struct Refused {
    /// 0 is the main channel.
    pub channel: u16,
    /// What was broken.
    pub violation: Violation,
}

/// The inspector of one migration's stream, all channels.
#[derive(Debug)]
pub struct Inspector {
    inventory: Inventory,
    catalogue: Option<Catalogue>,
    unvouched: devices::Unvouched,
    parser: Parser,
    cursor: Cursor,
    held: Held,
    channels: Channels,
    record: Record,
    fed: u64,
    finished: bool,
    failure: Option<Refused>,
}

impl Inspector {
    /// An inspector for a VM and a permit; `catalogue` is of the target's own QEMU.
    ///
    /// # Errors
    /// An inventory or a catalogue that no stream could match.
    pub fn new(
        inventory: &Inventory,
        catalogue: Option<&Catalogue>,
        limits: &Limits,
    ) -> Result<Self, Unsupported> {
        limits::check_inventory(inventory)?;
        if let Some(catalogue) = catalogue {
            limits::check_catalogue(inventory, catalogue)?;
        }
        let options = ParserOptions {
            page_size_bytes: inventory.page_size_bytes,
            return_path_required: limits.return_path_required,
            multifd_markers: limits.multifd.map(|_| Style::of_machine(&inventory.machine).markers()),
        };
        Ok(Self {
            inventory: inventory.clone(),
            catalogue: catalogue.cloned(),
            unvouched: limits.unvouched,
            parser: Parser::new(options),
            cursor: Cursor::default(),
            held: Held { begin: None, bytes: Vec::new(), max_bytes: limits.device_state_bytes },
            channels: Channels::new(inventory, limits),
            record: Record::new(inventory, limits),
            fed: 0,
            finished: false,
            failure: None,
        })
    }

    /// Whether a channel should be read now. A channel that is ahead of the others waits, as QEMU would make it.
    #[must_use]
    pub fn wants(&self, channel: u16) -> bool {
        channel == 0 || self.channels.wants(channel)
    }

    /// Takes the next bytes of a channel (0 is the main one) and gives what may be released to `out`, on this channel
    /// and on those that waited for it. What is not given is held, here.
    ///
    /// # Errors
    /// The first violation. Every later call fails alike.
    pub fn feed(&mut self, channel: u16, input: &[u8], out: &mut dyn Output) -> Result<(), Refused> {
        self.guarded(|inspector| inspector.feed_inner(channel, input, out))
    }

    /// Does what is given, unless something was refused before; keeps the first refusal.
    fn guarded<T>(&mut self, act: impl FnOnce(&mut Self) -> Result<T, Refused>) -> Result<T, Refused> {
        if let Some(failure) = &self.failure {
            return Err(failure.clone());
        }
        if self.finished {
            let violation = Violation::new("INV-E3", self.fed, "stream", "nothing behind the end", "more");
            return Err(Refused { channel: 0, violation });
        }
        act(self).inspect_err(|refused| self.failure = Some(refused.clone()))
    }

    fn feed_inner(&mut self, channel: u16, input: &[u8], out: &mut dyn Output) -> Result<(), Refused> {
        let fed = match channel {
            0 => self.feed_main(input, out),
            _ => self.channels.feed(channel, input, (&mut self.record, self.parser.blocks()), out),
        };
        fed.map_err(|violation| Refused { channel, violation })?;
        self.pump(out)
    }

    fn pump(&mut self, out: &mut dyn Output) -> Result<(), Refused> {
        self.channels
            .pump(&mut self.record, self.parser.blocks(), out)
            .map_err(|(channel, violation)| Refused { channel, violation })
    }

    /// Whether bytes of multifd channels wait only because there was no room for their pages.
    #[must_use]
    pub fn is_held_back(&self) -> bool {
        self.channels.is_held_back()
    }

    /// Goes on with what was held back, as far as there is room now.
    ///
    /// # Errors
    /// As [`Self::feed`].
    pub fn resume(&mut self, out: &mut dyn Output) -> Result<(), Refused> {
        self.guarded(|inspector| inspector.pump(out))
    }

    fn feed_main(&mut self, input: &[u8], out: &mut dyn Output) -> Result<(), Violation> {
        let begin = self.fed;
        self.fed = self.fed.saturating_add(input.len() as u64);
        self.record.spend(input.len(), self.fed)?;
        let carried = self.parser.pending().to_vec();
        let judge = Judge { record: &mut self.record, cursor: &mut self.cursor, out: &mut *out };
        let mut sink = MainSink { judge, held: &mut self.held };
        self.parser.feed(input, &mut sink)?;
        let releasable = self.parser.validated().min(self.held.begin.unwrap_or(u64::MAX));
        release(0, releasable, begin, (&carried, input), out);
        Ok(())
    }

    /// The sender says that the stream is complete on all channels: judges memory and the device state as a whole.
    ///
    /// # Errors
    /// What is missing or wrong; nothing of it may be released then.
    pub fn finish(&mut self) -> Result<HeldState, Refused> {
        self.guarded(Self::finish_inner)
    }

    fn finish_inner(&mut self) -> Result<HeldState, Refused> {
        self.channels
            .check_end(&self.record)
            .map_err(|(channel, violation)| Refused { channel, violation })?;
        let held = self.judge_held().map_err(|violation| Refused { channel: 0, violation })?;
        self.finished = true;
        Ok(held)
    }

    fn judge_held(&mut self) -> Result<HeldState, Violation> {
        let (Some(base), Some(ram_id)) = (self.held.begin, self.parser.ram_id()) else {
            let awaiting = self.parser.awaiting();
            return Err(Violation::new("INV-S10", self.fed, "stream", awaiting, "the end of the stream"));
        };
        self.record.check_memory(base)?;
        let bytes = std::mem::take(&mut self.held.bytes);
        let judged = devices::judge(
            &bytes,
            base,
            ram_id,
            self.inventory.page_size_bytes,
            &self.inventory,
            self.catalogue.as_ref(),
            self.unvouched,
        )?;
        Ok(HeldState { bytes, sections: judged.sections })
    }

    /// Whether every multifd channel stands where the main channel's markers say that it ends. A relay that sees the end of
    /// the main channel knows by this that nothing of the others is still on its way.
    #[must_use]
    pub fn channels_complete(&self) -> bool {
        self.channels.check_end(&self.record).is_ok()
    }

    /// Bytes fed so far, all channels.
    #[must_use]
    pub fn stream_bytes(&self) -> u64 {
        self.record.fed_bytes()
    }

    /// Bytes of device state held; nothing before the RAM section ended.
    #[must_use]
    pub fn held_bytes(&self) -> Option<usize> {
        self.held.begin.map(|_| self.held.bytes.len())
    }

    /// The name of a RAM block by its index in the stream's own list, fit to be shown.
    #[must_use]
    pub fn block_name(&self, index: usize) -> Option<String> {
        self.parser.blocks()?.name(index).map(printable)
    }

    /// Pages so far.
    #[must_use]
    pub fn pages(&self) -> Pages {
        self.record.pages
    }

    /// The highest channel number that this migration has.
    #[must_use]
    pub fn last_channel(&self) -> u16 {
        self.channels.count()
    }
}

/// Gives what became releasable: up to `releasable` on the channel, of bytes carried from before and of the input that
/// begins at `begin`. Carried bytes are an incomplete item: it was completed by this input, or still is none.
fn release(
    channel: u16,
    releasable: u64,
    begin: u64,
    (carried, input): (&[u8], &[u8]),
    out: &mut dyn Output,
) {
    if releasable < begin {
        return;
    }
    if !carried.is_empty() {
        out.release(channel, carried);
    }
    let count = usize::try_from(releasable - begin).unwrap_or(usize::MAX).min(input.len());
    if count > 0 {
        out.release(channel, input.get(..count).unwrap_or(input));
    }
}
