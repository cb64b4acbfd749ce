//! The inspector's interface as the lab uses it: the one place to touch when it changes.

use anyhow::{Context, Result};
pub use engine::inspect::Violation;
pub use engine::inspect::devices::Unvouched;
use engine::inspect::{EndDetector, Inspector, Limits, Multifd, devices};
use types::inventory::Inventory;
use types::layout::Catalogue;
use wire::qemu::multifd::Method;

/// The main channel.
pub const MAIN: u16 = 0;
/// The most additional channels that the lab opens.
pub const MAX_MULTIFD_CHANNELS: u16 = 8;

/// A lab guest has 96 MiB and is sent a few times over at most.
const MAX_STREAM_BYTES: u64 = 4 << 30;
/// Well above the largest machine that the lab makes.
const MAX_DEVICE_STATE_BYTES: usize = 16 << 20;

/// What a VM's stream is compared with.
#[derive(Debug, Clone)]
pub struct Enrolled {
    /// What the VM's own QEMU sends.
    pub inventory: Inventory,
    /// How the target's own QEMU reads device state.
    pub catalogue: Catalogue,
    /// What happens to a device whose layout nothing vouches for.
    pub unvouched: Unvouched,
}

impl Enrolled {
    /// From a dry run of the source's QEMU, one of the target's, and the target's description of its devices.
    pub fn learn(source_dry_run: &[u8], target_dry_run: &[u8], target_dump: Option<&[u8]>) -> Result<Self> {
        let inventory = engine::inspect::learn(source_dry_run, "qemu/source");
        let catalogue = devices::compile(target_dry_run, target_dump, "qemu/target");
        Ok(Self {
            inventory: inventory.context("learning from the source's dry run")?,
            catalogue: catalogue.context("compiling the target's catalogue")?,
            unvouched: Unvouched::Refuse,
        })
    }
}

/// An inspector and what it released.
#[derive(Debug)]
pub struct Gate {
    inspector: Inspector,
    detector: EndDetector,
}

impl Gate {
    /// An inspector for this VM, with this many channels besides the main one.
    pub fn new(enrolled: &Enrolled, multifd_channels: u16) -> Result<Self> {
        let multifd =
            (multifd_channels > 0).then_some(Multifd { channels: multifd_channels, method: Method::Plain });
        let limits = Limits {
            stream_bytes: MAX_STREAM_BYTES,
            device_state_bytes: MAX_DEVICE_STATE_BYTES,
            multifd,
            unvouched: enrolled.unvouched,
            ..Limits::default()
        };
        let Enrolled { inventory, catalogue, .. } = enrolled;
        Ok(Self {
            inspector: Inspector::new(inventory, Some(catalogue), &limits).context("making the inspector")?,
            detector: EndDetector::new(inventory, MAX_DEVICE_STATE_BYTES, multifd.is_some()),
        })
    }

    /// Whether more of this channel may be read now.
    #[must_use]
    pub fn wants(&self, channel: u16) -> bool {
        self.inspector.wants(channel)
    }

    /// Takes bytes of a channel and gives what may go on, with the channel that it belongs to.
    pub fn feed(
        &mut self,
        channel: u16,
        input: &[u8],
        release: &mut dyn FnMut(u16, &[u8]),
    ) -> Result<(), Violation> {
        let mut out = |channel: u16, bytes: &[u8]| release(channel, bytes);
        self.inspector.feed(channel, input, &mut out).map_err(|refused| refused.violation)
    }

    /// The sender's side: takes bytes of the main channel and says whether it is complete with them.
    pub fn at_end(&mut self, input: &[u8]) -> bool {
        self.detector.feed(input)
    }

    /// Whether device state is being held back.
    #[must_use]
    pub fn is_holding(&self) -> bool {
        self.inspector.held_bytes().is_some()
    }

    /// Judges the whole, all channels being complete; gives what was held of the main channel.
    pub fn finish(&mut self) -> Result<Vec<u8>, Violation> {
        self.inspector.finish().map(|held| held.bytes).map_err(|refused| refused.violation)
    }
}

/// The verdict on a whole main channel: what would have reached the target.
pub fn judge(enrolled: &Enrolled, stream: &[u8]) -> Result<Result<Vec<u8>, Violation>> {
    let mut gate = Gate::new(enrolled, 0)?;
    let mut passed = Vec::with_capacity(stream.len());
    if let Err(violation) = gate.feed(MAIN, stream, &mut |_, bytes| passed.extend_from_slice(bytes)) {
        return Ok(Err(violation));
    }
    Ok(gate.finish().map(|held| {
        passed.extend_from_slice(&held);
        passed
    }))
}
