//! The inspector's interface as the lab uses it: the one place to touch when it changes.

use anyhow::{Context, Result};
pub use engine::inspect::Violation;
use engine::inspect::{EndDetector, Inspector, Limits};
use types::inventory::Inventory;

/// The main channel.
pub const MAIN: u16 = 0;
/// The most additional channels that the inspector judges.
pub const MAX_MULTIFD_CHANNELS: u16 = 0;

const PAGE_SIZE_BYTES: u32 = 4096;
/// A lab guest has 96 MiB and is sent a few times over at most.
const MAX_STREAM_BYTES: u64 = 4 << 30;
/// Well above the largest machine that the lab makes.
const MAX_DEVICE_STATE_BYTES: usize = 16 << 20;

/// What the enrolled VM's stream looks like.
pub fn learn(recording: &[u8], hypervisor: &str) -> Result<Inventory> {
    engine::inspect::learn(recording, hypervisor).context("learning from the dry run")
}

/// An inspector and what it released.
#[derive(Debug)]
pub struct Gate {
    inspector: Inspector,
    detector: EndDetector,
}

impl Gate {
    /// An inspector for this VM, with this many channels besides the main one.
    pub fn new(inventory: &Inventory, multifd_channels: u16) -> Result<Self> {
        anyhow::ensure!(multifd_channels == MAX_MULTIFD_CHANNELS, "the inspector judges no multifd channels");
        let limits = Limits {
            stream_bytes: MAX_STREAM_BYTES,
            device_state_bytes: MAX_DEVICE_STATE_BYTES,
            vm: None,
            return_path_required: true,
        };
        Ok(Self {
            inspector: Inspector::new(inventory, &limits).context("making the inspector")?,
            detector: EndDetector::new(PAGE_SIZE_BYTES, MAX_DEVICE_STATE_BYTES),
        })
    }

    /// Whether more of this channel may be read now.
    #[must_use]
    pub fn wants(&self, _channel: u16) -> bool {
        true
    }

    /// Takes bytes of a channel and gives what may go on, with the channel that it belongs to.
    pub fn feed(
        &mut self,
        channel: u16,
        input: &[u8],
        release: &mut dyn FnMut(u16, &[u8]),
    ) -> Result<(), Violation> {
        self.inspector.feed(input, &mut |bytes| release(channel, bytes))
    }

    /// The sender's side: takes bytes of the main channel and says whether the stream is complete with them.
    pub fn at_end(&mut self, input: &[u8]) -> bool {
        self.detector.feed(input)
    }

    /// Whether device state is being held back.
    #[must_use]
    pub fn is_holding(&self) -> bool {
        self.inspector.held_bytes().is_some()
    }

    /// Judges the whole; gives what was held of the main channel.
    pub fn finish(&mut self) -> Result<Vec<u8>, Violation> {
        self.inspector.finish().map(|held| held.bytes)
    }
}

/// The verdict on a whole main channel: what would have reached the target.
pub fn judge(inventory: &Inventory, stream: &[u8]) -> Result<Result<Vec<u8>, Violation>> {
    let mut gate = Gate::new(inventory, 0)?;
    let mut passed = Vec::with_capacity(stream.len());
    if let Err(violation) = gate.feed(MAIN, stream, &mut |_, bytes| passed.extend_from_slice(bytes)) {
        return Ok(Err(violation));
    }
    Ok(gate.finish().map(|held| {
        passed.extend_from_slice(&held);
        passed
    }))
}
