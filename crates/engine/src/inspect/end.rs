//! The source's view of the end of the stream: the same parser without a record to compare with.

use types::inventory::Inventory;
use wire::qemu::device::DescriptionScanner;
use wire::qemu::multifd::Style;
use wire::qemu::{Event, Parser, ParserOptions, Violation};

/// Finds the last byte of a stream: with QEMU's final acknowledgement held back, the source never half-closes, so
/// the end is the end mark and a description whose declared length ends exactly at the last byte.
///
/// Only the end is looked for here. Whether the device state before it is sound is for the target to say, which
/// therefore gets to see it. A stream whose RAM part can't be read has no end: the target has refused it by then.
#[derive(Debug)]
pub struct EndDetector {
    parser: Parser,
    held: Vec<u8>,
    begin: Option<u64>,
    scanner: DescriptionScanner,
    max_held_bytes: usize,
    ended: bool,
    lost: Option<Violation>,
}

impl EndDetector {
    /// A detector that keeps at most `max_held_bytes` of device state; `multifd` says whether pages go elsewhere.
    #[must_use]
    pub fn new(inventory: &Inventory, max_held_bytes: usize, multifd: bool) -> Self {
        let options = ParserOptions {
            page_size_bytes: inventory.page_size_bytes,
            multifd_markers: multifd.then(|| Style::of_machine(&inventory.machine).markers()),
            ..ParserOptions::default()
        };
        Self {
            parser: Parser::new(options),
            held: Vec::new(),
            begin: None,
            scanner: DescriptionScanner::default(),
            max_held_bytes,
            ended: false,
            lost: None,
        }
    }

    /// Takes the next bytes; true when the stream is complete with the last of them.
    pub fn feed(&mut self, input: &[u8]) -> bool {
        if self.lost.is_some() || input.is_empty() {
            return self.ended;
        }
        self.ended = false;
        let (held, begin, max) = (&mut self.held, &mut self.begin, self.max_held_bytes);
        let result = self.parser.feed(input, &mut |at: u64, event: Event<'_>| {
            match event {
                Event::DevicesBegin => *begin = Some(at),
                Event::DeviceBytes(bytes) if held.len() + bytes.len() > max => {
                    return Err(Violation::new(
                        "INV-D9",
                        at,
                        "devices",
                        format!("at most {max} bytes"),
                        "more",
                    ));
                }
                Event::DeviceBytes(bytes) => held.extend_from_slice(bytes),
                _ => {}
            }
            Ok(())
        });
        if let Err(violation) = result {
            self.lost = Some(violation);
            self.held = Vec::new();
            return false;
        }
        self.ended = self.scanner.at_end(&self.held);
        self.ended
    }

    /// Whether the stream is complete.
    #[must_use]
    pub fn ended(&self) -> bool {
        self.ended
    }

    /// Whether the RAM section is behind: the guest is stopped.
    #[must_use]
    pub fn in_devices(&self) -> bool {
        self.begin.is_some()
    }

    /// Why no end can be found any more.
    #[must_use]
    pub fn lost(&self) -> Option<&Violation> {
        self.lost.as_ref()
    }
}
