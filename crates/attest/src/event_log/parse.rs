//! Reads the log: a header in the old format that names the hashes, then events with one digest for each of
//! them. Little endian, unlike everything of the TPM itself.

use std::collections::BTreeMap;

use super::{EV_NO_ACTION, EVENT_LOG_LIMIT_BYTES, Event, EventKind, EventLog};
use crate::codec::{Malformed, Reader, within};
use crate::pcr::{Bank, PcrDigest, PcrIndex};

/// What the header's data begin with (PC Client Platform Firmware Profile, 10.4.5.1).
const SPEC_ID: &[u8; 16] = b"Spec ID Event03\0";
/// What the data of the event begin with that tells the locality of the start (10.4.5.3).
const STARTUP_LOCALITY: &[u8; 16] = b"StartupLocality\0";
const SHA1_BYTES: usize = 20;
/// Hashes that a log may carry; TPMs have at most a handful.
const ALGORITHMS_LIMIT: u32 = 8;
const DIGEST_LIMIT_BYTES: u16 = 64;
/// Events that are kept; a server's log has some hundred.
const EVENTS_LIMIT: usize = 8192;
const SUMMARY_CHARACTERS: usize = 80;

/// Why bytes are not an event log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LogFault {
    /// The header is missing: perhaps a log of a TPM 1.2.
    #[error("it does not begin with the header \"Spec ID Event03\" of a crypto-agile log")]
    NoHeader,
    /// An event is not well formed.
    #[error("event {event}: {source}")]
    Event {
        /// Which one, from 1.
        event: usize,
        /// Why.
        source: Malformed,
    },
    /// The header is not well formed.
    #[error("its header: {0}")]
    Header(Malformed),
    /// Too many events.
    #[error("it has more than {EVENTS_LIMIT} events")]
    TooMany,
}

/// Bytes of a digest of each hash.
type Algorithms = BTreeMap<u16, usize>;

pub(super) fn parse(bytes: &[u8]) -> Result<EventLog, LogFault> {
    within(bytes.len(), EVENT_LOG_LIMIT_BYTES, "the event log").map_err(LogFault::Header)?;
    let mut from = Reader::new(bytes);
    let data = read_header(&mut from).map_err(LogFault::Header)?;
    let data = data.strip_prefix(SPEC_ID).ok_or(LogFault::NoHeader)?;
    let algorithms = read_algorithms(data).map_err(LogFault::Header)?;
    let mut log = EventLog { startup_locality: 0, events: Vec::new() };
    let mut number = 1;
    while !from.is_empty() {
        if number > EVENTS_LIMIT {
            return Err(LogFault::TooMany);
        }
        let fault = |source| LogFault::Event { event: number, source };
        read_event(&mut from, &algorithms, &mut log).map_err(fault)?;
        number += 1;
    }
    Ok(log)
}

/// `TCG_PCClientPCREvent` (10.2.1): gives its data.
fn read_header<'a>(from: &mut Reader<'a>) -> Result<&'a [u8], Malformed> {
    from.take(4, "pcrIndex")?;
    let kind = from.le_u32("eventType")?;
    if kind != EV_NO_ACTION {
        return Err(Malformed::Unaccepted { what: "eventType", found: kind.into() });
    }
    from.take(SHA1_BYTES, "digest")?;
    from.le_long("the header's data")
}

/// `TCG_EfiSpecIDEvent` after its signature (10.4.5.1).
fn read_algorithms(data: &[u8]) -> Result<Algorithms, Malformed> {
    let mut from = Reader::new(data);
    from.take(8, "platformClass and versions")?;
    let count = from.le_u32("numberOfAlgorithms")?;
    if !(1..=ALGORITHMS_LIMIT).contains(&count) {
        return Err(Malformed::Unaccepted { what: "numberOfAlgorithms", found: count.into() });
    }
    let mut algorithms = Algorithms::new();
    for _ in 0..count {
        let id = from.le_u16("algorithmId")?;
        let bytes = from.le_u16("digestSize")?;
        let fits = Bank::of_algorithm(id).is_none_or(|bank| bank.digest_bytes() == usize::from(bytes));
        if !fits || bytes > DIGEST_LIMIT_BYTES {
            return Err(Malformed::Unaccepted { what: "digestSize", found: bytes.into() });
        }
        if algorithms.insert(id, bytes.into()).is_some() {
            return Err(Malformed::Unaccepted {
                what: "algorithmId, for the second time,",
                found: id.into(),
            });
        }
    }
    let vendor = from.u8("vendorInfoSize")?;
    from.take(vendor.into(), "vendorInfo")?;
    from.finish("the header's data")?;
    Ok(algorithms)
}

/// `TCG_PCR_EVENT2` (10.2.2).
fn read_event(from: &mut Reader<'_>, algorithms: &Algorithms, log: &mut EventLog) -> Result<(), Malformed> {
    let index = from.le_u32("pcrIndex")?;
    let kind = from.le_u32("eventType")?;
    let digests = read_digests(from, algorithms)?;
    let data = from.le_long("event data")?;
    if kind == EV_NO_ACTION {
        if let Some([locality]) = data.strip_prefix(STARTUP_LOCALITY) {
            log.startup_locality = *locality;
        }
        return Ok(());
    }
    let pcr = u8::try_from(index).ok().and_then(|index| PcrIndex::try_from(index).ok());
    let pcr = pcr.ok_or(Malformed::Unaccepted { what: "pcrIndex", found: index.into() })?;
    log.events.push(Event { pcr, kind: EventKind(kind), digests, summary: summary(data) });
    Ok(())
}

fn read_digests(
    from: &mut Reader<'_>,
    algorithms: &Algorithms,
) -> Result<BTreeMap<Bank, PcrDigest>, Malformed> {
    let count = from.le_u32("digest count")?;
    if count > ALGORITHMS_LIMIT {
        return Err(Malformed::Unaccepted { what: "digest count", found: count.into() });
    }
    let mut digests = BTreeMap::new();
    for _ in 0..count {
        let id = from.le_u16("algorithmId")?;
        let unaccepted = Malformed::Unaccepted { what: "algorithmId", found: id.into() };
        let bytes = from.take(*algorithms.get(&id).ok_or(unaccepted)?, "digest")?;
        let Some(bank) = Bank::of_algorithm(id) else { continue };
        let digest = PcrDigest::new(bytes).map_err(|_| unaccepted)?;
        if digests.insert(bank, digest).is_some() {
            return Err(unaccepted);
        }
    }
    Ok(digests)
}

/// What is readable of an event's data, in ASCII or UTF-16: words of at least four characters.
fn summary(data: &[u8]) -> String {
    const WORD: usize = 4;
    // Enough to see a path behind a device path's binary head.
    let head = data.get(..1024).unwrap_or(data);
    // UTF-16 of ASCII characters is ASCII with zeros between.
    let characters = head.iter().filter(|byte| **byte != 0).map(|byte| char::from(*byte));
    let plain = |c: char| c == ' ' || (c.is_ascii_graphic() && !matches!(c, '"' | '\\'));
    // A path's separator is shown as '/', so that no reader takes it for an escape.
    let shown: String = characters
        .map(|c| if c == '\\' { '/' } else { c })
        .map(|c| if plain(c) { c } else { '\n' })
        .collect();
    let words = shown.split('\n').filter(|word| word.trim().len() >= WORD);
    words.collect::<Vec<_>>().join(" ").chars().take(SUMMARY_CHARACTERS).collect()
}
