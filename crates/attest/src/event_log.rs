//! The firmware's measured-boot log in the crypto-agile format of TCG's "PC Client Platform Firmware Profile"
//! (section 10): what the registers were extended with, event by event.
//!
//! The log is not signed. It is worth what it replays to: when it leads to the value that a quote signs, its
//! digests are what the register saw. The *data* of most events is not covered even then, so it is shown,
//! shortened and cleaned, and never decides.

mod parse;

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::pcr::{Bank, PcrDigest, PcrIndex};
use crate::verify::EVENTS_LIMIT;

/// Longest log that is read, bytes. Logs of servers have 20 to 150 KiB.
pub const EVENT_LOG_LIMIT_BYTES: usize = 512 * 1024;

/// `EV_NO_ACTION`: says something, extends nothing.
const EV_NO_ACTION: u32 = 3;

/// Why bytes are not an event log.
pub use parse::LogFault;

/// One event, in the order in which the firmware logged it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The register that it extends.
    pub pcr: PcrIndex,
    /// Its type.
    pub kind: EventKind,
    /// What each bank that we know was extended with.
    pub digests: BTreeMap<Bank, PcrDigest>,
    /// Its data for people: at most 80 printable characters.
    pub summary: String,
}

/// The type of an event; shown by its name in the profile (section 10.4.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EventKind(pub u32);

/// An event as a reference keeps it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecordedEvent {
    /// Its type.
    pub kind: EventKind,
    /// What the register was extended with.
    pub digest: PcrDigest,
}

/// A log that was read to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventLog {
    /// The locality from which PCR 0 was started, which is its first value.
    startup_locality: u8,
    events: Vec<Event>,
}

impl EventLog {
    /// Reads a log, in time and memory bounded by its length.
    ///
    /// # Errors
    /// [`LogFault`]; longer than [`EVENT_LOG_LIMIT_BYTES`] is refused unread.
    pub fn parse(bytes: &[u8]) -> Result<Self, LogFault> {
        parse::parse(bytes)
    }

    /// The events, in order.
    #[must_use]
    pub fn events(&self) -> &[Event] {
        &self.events
    }

    /// The value to which each register that it extends is led in that bank. A register with an event that
    /// says nothing about the bank is left out.
    #[must_use]
    pub fn replay(&self, bank: Bank) -> BTreeMap<PcrIndex, PcrDigest> {
        let mut values = BTreeMap::new();
        for event in &self.events {
            let value = values.entry(event.pcr).or_insert_with(|| Some(self.first_value(event.pcr, bank)));
            *value = match (value.take(), event.digests.get(&bank)) {
                (Some(before), Some(digest)) => Some(extend(bank, &before, digest)),
                _ => None,
            };
        }
        values.into_iter().filter_map(|(index, value)| Some((index, value?))).collect()
    }

    /// The events of one register, as a reference keeps them, at most as many as it may keep.
    #[must_use]
    pub fn recorded(&self, pcr: PcrIndex, bank: Bank) -> Vec<RecordedEvent> {
        let of_pcr = self.events.iter().filter(|event| event.pcr == pcr);
        let record = |event: &Event| {
            Some(RecordedEvent { kind: event.kind, digest: event.digests.get(&bank)?.clone() })
        };
        of_pcr.filter_map(record).take(EVENTS_LIMIT).collect()
    }

    /// Says what leads one register to another value than the recorded events did: the first event that
    /// differs, by its number (from 1) among those of the register. Nothing when none does.
    #[must_use]
    pub fn first_difference(&self, pcr: PcrIndex, bank: Bank, recorded: &[RecordedEvent]) -> Option<String> {
        let mut expected = recorded.iter();
        let found = self.events.iter().filter(|event| event.pcr == pcr);
        let mut count = 0;
        for (at, event) in found.enumerate() {
            count = at + 1;
            let digest = event.digests.get(&bank);
            match expected.next() {
                Some(known) if known.kind == event.kind && Some(&known.digest) == digest => {}
                Some(known) => return Some(differs(count, event, digest, known)),
                // As many as are kept: what follows is not known.
                None if recorded.len() >= EVENTS_LIMIT => return None,
                None => return Some(format!("event {count} {event} is not among the recorded ones")),
            }
        }
        let missing = expected.next()?;
        Some(format!("event {} {}, which was recorded, is missing", count + 1, missing.kind))
    }

    /// PCR 0 begins with the locality of its start in the last byte, registers of a dynamic launch with all
    /// ones (TCG PC Client Platform TPM Profile), all others with zeros.
    fn first_value(&self, pcr: PcrIndex, bank: Bank) -> PcrDigest {
        let index = u8::from(pcr);
        let fill = if (17..=22).contains(&index) { 0xff } else { 0 };
        let mut value = [fill; 48];
        let value = value.get_mut(..bank.digest_bytes()).unwrap_or_default();
        if let (0, Some(last)) = (index, value.last_mut()) {
            *last = self.startup_locality;
        }
        // Of a bank's length, so always a digest.
        PcrDigest::new(value).unwrap_or_else(|_| bank.hash(&[]))
    }
}

/// `TPM2_PCR_Extend` (Part 3, 22.2).
pub(crate) fn extend(bank: Bank, before: &PcrDigest, digest: &PcrDigest) -> PcrDigest {
    bank.hash(&[before.as_bytes(), digest.as_bytes()].concat())
}

fn differs(at: usize, event: &Event, digest: Option<&PcrDigest>, known: &RecordedEvent) -> String {
    let recorded = if known.kind == event.kind { String::new() } else { format!("{} ", known.kind) };
    let digest = digest.map_or("nothing in this bank".to_owned(), ToString::to_string);
    format!("event {at} {event} differs: {digest}, recorded {recorded}{}", known.digest)
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.kind)?;
        if self.summary.is_empty() { Ok(()) } else { write!(f, " \"{}\"", self.summary) }
    }
}

impl fmt::Display for EventKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match name(self.0) {
            Some(name) => f.pad(name),
            None => write!(f, "event type {:#010x}", self.0),
        }
    }
}

fn name(kind: u32) -> Option<&'static str> {
    Some(match kind {
        0x0000_0000 => "EV_PREBOOT_CERT",
        0x0000_0001 => "EV_POST_CODE",
        EV_NO_ACTION => "EV_NO_ACTION",
        0x0000_0004 => "EV_SEPARATOR",
        0x0000_0005 => "EV_ACTION",
        0x0000_0006 => "EV_EVENT_TAG",
        0x0000_0007 => "EV_S_CRTM_CONTENTS",
        0x0000_0008 => "EV_S_CRTM_VERSION",
        0x0000_0009 => "EV_CPU_MICROCODE",
        0x0000_000A => "EV_PLATFORM_CONFIG_FLAGS",
        0x0000_000B => "EV_TABLE_OF_DEVICES",
        0x0000_000C => "EV_COMPACT_HASH",
        0x0000_000D => "EV_IPL",
        0x0000_000E => "EV_IPL_PARTITION_DATA",
        0x0000_000F => "EV_NONHOST_CODE",
        0x0000_0010 => "EV_NONHOST_CONFIG",
        0x0000_0011 => "EV_NONHOST_INFO",
        0x0000_0012 => "EV_OMIT_BOOT_DEVICE_EVENTS",
        0x8000_0001 => "EV_EFI_VARIABLE_DRIVER_CONFIG",
        0x8000_0002 => "EV_EFI_VARIABLE_BOOT",
        0x8000_0003 => "EV_EFI_BOOT_SERVICES_APPLICATION",
        0x8000_0004 => "EV_EFI_BOOT_SERVICES_DRIVER",
        0x8000_0005 => "EV_EFI_RUNTIME_SERVICES_DRIVER",
        0x8000_0006 => "EV_EFI_GPT_EVENT",
        0x8000_0007 => "EV_EFI_ACTION",
        0x8000_0008 => "EV_EFI_PLATFORM_FIRMWARE_BLOB",
        0x8000_0009 => "EV_EFI_HANDOFF_TABLES",
        0x8000_000A => "EV_EFI_PLATFORM_FIRMWARE_BLOB2",
        0x8000_000B => "EV_EFI_HANDOFF_TABLES2",
        0x8000_000C => "EV_EFI_VARIABLE_BOOT2",
        0x8000_0010 => "EV_EFI_HCRTM_EVENT",
        0x8000_00E0 => "EV_EFI_VARIABLE_AUTHORITY",
        0x8000_00E1 => "EV_EFI_SPDM_FIRMWARE_BLOB",
        0x8000_00E2 => "EV_EFI_SPDM_FIRMWARE_CONFIG",
        _ => return None,
    })
}

#[cfg(all(test, feature = "testkit"))]
mod tests;
