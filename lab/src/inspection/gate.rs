//! The inspector's interface as the lab uses it: the one place to touch when it changes.

use anyhow::{Context, Result};
use engine::inspect::devices::compile;
use engine::inspect::{EndDetector, Inspector, Limits, Multifd};
pub use engine::inspect::{Refused, Violation};
use types::inventory::Enrolment;
use wire::qemu::multifd::Method;

/// The main channel.
pub const MAIN: u16 = 0;
/// The most additional channels that the lab asks for.
pub const MAX_MULTIFD_CHANNELS: u16 = 8;

/// A lab guest has 96 MiB and is sent a few times over at most.
const MAX_STREAM_BYTES: u64 = 4 << 30;

/// What the enrolled VM's stream looks like on the QEMU that made the recording and the dump.
pub fn learn(recording: &[u8], dump: Option<&[u8]>, hypervisor: &str) -> Result<Enrolment> {
    let inventory = engine::inspect::learn(recording, hypervisor).context("learning from the dry run")?;
    let catalogue = compile(recording, dump, hypervisor).context("compiling the catalogue")?;
    Ok(Enrolment { inventory, catalogue: Some(catalogue) })
}

/// An inspector and what it released.
#[derive(Debug)]
pub struct Gate {
    inspector: Inspector,
    detector: EndDetector,
}

impl Gate {
    /// An inspector for this VM, with this many channels besides the main one.
    pub fn new(enrolled: &Enrolment, multifd_channels: u16) -> Result<Self> {
        let multifd =
            (multifd_channels > 0).then_some(Multifd { channels: multifd_channels, method: Method::Plain });
        let limits = Limits { stream_bytes: MAX_STREAM_BYTES, multifd, ..Limits::default() };
        let inspector = Inspector::new(&enrolled.inventory, enrolled.catalogue.as_ref(), &limits)
            .context("making the inspector")?;
        let detector =
            EndDetector::new(&enrolled.inventory, limits.device_state_bytes, limits.multifd.is_some());
        Ok(Self { inspector, detector })
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
        mut release: &mut dyn FnMut(u16, &[u8]),
    ) -> Result<(), Violation> {
        self.inspector.feed(channel, input, &mut release).map_err(|refused| refused.violation)
    }

    /// The sender's side: takes bytes of the main channel and says whether the stream is complete with them.
    pub fn at_end(&mut self, input: &[u8]) -> bool {
        self.detector.feed(input)
    }

    /// Whether every other channel has come to its end as well.
    #[must_use]
    pub fn channels_complete(&self) -> bool {
        self.inspector.channels_complete()
    }

    /// Whether device state is being held back.
    #[must_use]
    pub fn is_holding(&self) -> bool {
        self.inspector.held_bytes().is_some()
    }

    /// Judges the whole; gives what was held of the main channel.
    pub fn finish(&mut self) -> Result<Vec<u8>, Violation> {
        self.inspector.finish().map(|held| held.bytes).map_err(|refused| refused.violation)
    }
}

/// The verdict on a whole main channel: what would have reached the target.
pub fn judge(enrolled: &Enrolment, stream: &[u8]) -> Result<Result<Vec<u8>, Violation>> {
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
