//! One multifd channel: its parser, and what waits until the other channels have caught up.

use super::record::{Cursor, Judge, Record};
use super::{Limits, Multifd, Output};
use std::collections::BTreeSet;
use types::inventory::Inventory;
use wire::qemu::multifd::{MultifdEvent, MultifdOptions, MultifdParser, MultifdSink, Style};
use wire::qemu::{Blocks, Violation};

/// What a caller may give to a channel that it was told not to read: one large piece that was on its way.
const MAX_WAITING_BYTES: usize = 1 << 20;

#[derive(Debug)]
struct Channel {
    parser: MultifdParser,
    cursor: Cursor,
    /// The id that its first packet named.
    id: Option<u8>,
    /// Bytes that must wait for other channels.
    waiting: Vec<u8>,
    /// Whether nothing but a SYNC came last: what comes behind the last one QEMU may never read.
    at_sync: bool,
    fed: u64,
}

/// All multifd channels of a migration.
#[derive(Debug)]
pub(super) struct Channels {
    channels: Vec<Channel>,
    ids: BTreeSet<u8>,
    /// Synchronisations that every channel and the main one have reached.
    epoch: u64,
    /// Whether a channel waits only for room in the output.
    held_back: bool,
}

impl Channels {
    pub(super) fn new(inventory: &Inventory, limits: &Limits) -> Self {
        let make = |multifd: Multifd| {
            let options = MultifdOptions {
                page_size_bytes: inventory.page_size_bytes,
                channels: u8::try_from(multifd.channels).unwrap_or(u8::MAX),
                method: multifd.method,
                style: Style::of_machine(&inventory.machine),
            };
            let channel = || Channel {
                parser: MultifdParser::new(options),
                cursor: Cursor::default(),
                id: None,
                waiting: Vec::new(),
                at_sync: false,
                fed: 0,
            };
            (0..multifd.channels).map(|_| channel()).collect()
        };
        let channels = limits.multifd.map(make).unwrap_or_default();
        Self { channels, ids: BTreeSet::new(), epoch: 0, held_back: false }
    }

    fn get(&mut self, number: u16) -> Option<&mut Channel> {
        self.channels.get_mut(usize::from(number).checked_sub(1)?)
    }

    pub(super) fn count(&self) -> u16 {
        u16::try_from(self.channels.len()).unwrap_or(u16::MAX)
    }

    /// Whether the channel may be read.
    pub(super) fn wants(&self, number: u16) -> bool {
        let channel = usize::from(number).checked_sub(1).and_then(|at| self.channels.get(at));
        channel.is_some_and(|channel| channel.waiting.is_empty() && channel.parser.syncs() <= self.epoch)
    }

    pub(super) fn is_held_back(&self) -> bool {
        self.held_back
    }

    /// The next bytes of a channel.
    pub(super) fn feed(
        &mut self,
        number: u16,
        input: &[u8],
        (record, blocks): (&mut Record, Option<&Blocks>),
        out: &mut dyn Output,
    ) -> Result<(), Violation> {
        let Some(channel) = self.get(number) else {
            return Err(Violation::new(
                "INV-T2",
                0,
                "channel",
                "no channel beside the permitted ones",
                "one",
            ));
        };
        channel.fed += input.len() as u64;
        record.spend(input.len(), channel.fed)?;
        if !channel.waiting.is_empty() {
            if channel.waiting.len() + input.len() > MAX_WAITING_BYTES {
                let expected = "no more before the other channels have synchronised";
                return Err(Violation::new("INV-M8", channel.fed, "multifd", expected, "more"));
            }
            channel.waiting.extend_from_slice(input);
            return Ok(());
        }
        let taken = self.run(number, input, (record, blocks), out)?;
        if let Some(channel) = self.get(number) {
            channel.waiting.extend_from_slice(input.get(taken..).unwrap_or_default());
        }
        Ok(())
    }

    /// Parses what the channel may give now; gives how much of `input` was taken.
    fn run(
        &mut self,
        number: u16,
        input: &[u8],
        (record, blocks): (&mut Record, Option<&Blocks>),
        out: &mut dyn Output,
    ) -> Result<usize, Violation> {
        let epoch = self.epoch;
        let ids = &mut self.ids;
        let at = usize::from(number).saturating_sub(1);
        let Some(channel) = self.channels.get_mut(at) else { return Ok(input.len()) };
        let mut taken = 0;
        // A header that is complete goes on without further bytes once the block list is there.
        let mut held = !channel.parser.pending().is_empty();
        while channel.parser.syncs() <= epoch && (taken < input.len() || held) {
            if !out.has_room() {
                self.held_back = true;
                break;
            }
            held = false;
            let rest = input.get(taken..).unwrap_or_default();
            let carried = channel.parser.pending().to_vec();
            let begin = channel.parser.validated() + carried.len() as u64;
            let mut sink = ChannelSink {
                judge: Judge { record, cursor: &mut channel.cursor, out },
                id: &mut channel.id,
                at_sync: &mut channel.at_sync,
                ids,
            };
            let consumed = channel.parser.feed(rest, blocks, &mut sink)?;
            super::release(number, channel.parser.validated(), begin, (&carried, rest), out);
            taken += consumed;
            if consumed == 0 {
                break;
            }
        }
        Ok(taken)
    }

    /// Goes on with channels that waited, after anything moved.
    pub(super) fn pump(
        &mut self,
        record: &mut Record,
        blocks: Option<&Blocks>,
        out: &mut dyn Output,
    ) -> Result<(), (u16, Violation)> {
        loop {
            self.advance(record);
            let mut moved = false;
            self.held_back = false;
            for number in 1..=self.count() {
                let Some(channel) = self.get(number) else { break };
                let held = channel.parser.pending().len();
                if channel.waiting.is_empty() && (held == 0 || blocks.is_none()) {
                    continue;
                }
                let waiting = std::mem::take(&mut channel.waiting);
                let taken = self
                    .run(number, &waiting, (record, blocks), out)
                    .map_err(|violation| (number, violation))?;
                moved |= taken > 0;
                if let Some(channel) = self.get(number) {
                    moved |= channel.parser.pending().len() < held;
                    channel.waiting.extend_from_slice(waiting.get(taken..).unwrap_or_default());
                }
            }
            if !moved {
                return Ok(());
            }
        }
    }

    /// Begins the next epoch once the marker and every SYNC of this one are there.
    fn advance(&mut self, record: &mut Record) {
        let reached = self.channels.iter().map(|c| c.parser.syncs()).min().unwrap_or(0).min(record.markers);
        if reached > self.epoch {
            self.epoch = reached;
            record.next_epoch();
        }
    }

    /// Whether every channel ended as the main one did (INV-M8).
    pub(super) fn check_end(&self, record: &Record) -> Result<(), (u16, Violation)> {
        for (number, channel) in (1u16..).zip(&self.channels) {
            let refuse = |expected: &str, found: String| {
                Err((number, Violation::new("INV-M8", channel.fed, "multifd", expected, found)))
            };
            if channel.id.is_none() {
                return refuse("the channel's first packet", "the end".to_owned());
            }
            let syncs = channel.parser.syncs();
            if syncs != record.markers {
                let expected = format!("{} SYNC packets, as the main channel has markers", record.markers);
                return refuse(&expected, syncs.to_string());
            }
            if !channel.at_sync && syncs > 0 {
                return refuse("its last SYNC at the end", "pages behind it".to_owned());
            }
            if !channel.waiting.is_empty() || !channel.parser.at_packet_boundary() {
                return refuse("the end at the end of a packet", "a piece of one".to_owned());
            }
        }
        Ok(())
    }
}

struct ChannelSink<'r> {
    judge: Judge<'r>,
    id: &'r mut Option<u8>,
    at_sync: &'r mut bool,
    ids: &'r mut BTreeSet<u8>,
}

impl MultifdSink for ChannelSink<'_> {
    fn is_full(&self) -> bool {
        !self.judge.out.has_room()
    }

    fn event(&mut self, at: u64, event: MultifdEvent<'_>) -> Result<(), Violation> {
        *self.at_sync = matches!(event, MultifdEvent::Sync);
        match event {
            MultifdEvent::Page { block, offset } => self.judge.page(at, block, offset, true),
            MultifdEvent::ZeroPage { block, offset } => self.judge.zero_page(at, block, offset, true),
            MultifdEvent::PageBytes(piece) => {
                self.judge.content(piece);
                Ok(())
            }
            MultifdEvent::Init { id, uuid } => {
                self.judge.record.channel_uuid(at, &uuid)?;
                if !self.ids.insert(id) {
                    let found = format!("id {id} again");
                    return Err(Violation::new("INV-M1", at, "multifd", "an id of its own", found));
                }
                *self.id = Some(id);
                Ok(())
            }
            MultifdEvent::Sync => Ok(()),
        }
    }
}
