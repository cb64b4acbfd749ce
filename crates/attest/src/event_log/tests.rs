#![allow(clippy::unwrap_used)]

use proptest::prelude::*;

use super::*;
use crate::codec::Malformed;
use crate::testkit::FirmwareLog;

const EV_SEPARATOR: u32 = 4;
const APPLICATION: u32 = 0x8000_0003;

fn pcr(index: u8) -> PcrIndex {
    PcrIndex::try_from(index).unwrap()
}

fn boot(kernel: &str) -> FirmwareLog {
    let kernel: Vec<u8> = kernel.encode_utf16().flat_map(u16::to_le_bytes).collect();
    FirmwareLog::default()
        .started_from(3)
        .measure(pcr(0), 8, b"1.2.3")
        .measure(pcr(4), 0x8000_0007, b"Calling EFI Application from Boot Option")
        .measure(pcr(4), EV_SEPARATOR, &[0; 4])
        .measure(pcr(4), APPLICATION, &[&[2, 1, 12, 0][..], &kernel].concat())
}

#[test]
fn a_log_is_replayed_register_by_register_in_each_bank() {
    let log = EventLog::parse(&boot("vmlinuz").to_bytes()).unwrap();
    assert_eq!(log.events().len(), 4);
    for bank in [Bank::Sha256, Bank::Sha384] {
        let values = log.replay(bank);
        assert_eq!(values.keys().copied().collect::<Vec<_>>(), [pcr(0), pcr(4)]);
        let mut start = vec![0; bank.digest_bytes()];
        *start.last_mut().unwrap() = 3;
        let expect = bank.hash(&[&start, bank.hash(b"1.2.3").as_bytes()].concat());
        assert_eq!(values.get(&pcr(0)), Some(&expect));
    }
}

#[test]
fn the_first_event_that_differs_is_named() {
    let parse = |log: FirmwareLog| EventLog::parse(&log.to_bytes()).unwrap();
    let recorded = parse(boot("vmlinuz-1")).recorded(pcr(4), Bank::Sha256);
    let difference =
        |log: FirmwareLog| parse(log).first_difference(pcr(4), Bank::Sha256, &recorded).unwrap_or_default();
    assert_eq!(difference(boot("vmlinuz-1")), "");
    let other = difference(boot("vmlinuz-2"));
    let start = "event 3 EV_EFI_BOOT_SERVICES_APPLICATION \"vmlinuz-2\" differs: ";
    assert!(other.starts_with(start) && other.contains(", recorded "), "{other}");
    let more = difference(boot("vmlinuz-1").measure(pcr(4), APPLICATION, b"implant.efi"));
    assert_eq!(
        more,
        "event 4 EV_EFI_BOOT_SERVICES_APPLICATION \"implant.efi\" is not among the recorded ones"
    );
    let less = difference(FirmwareLog::default().measure(
        pcr(4),
        0x8000_0007,
        b"Calling EFI Application from Boot Option",
    ));
    assert_eq!(less, "event 2 EV_SEPARATOR, which was recorded, is missing");
}

#[test]
fn what_is_shown_of_an_event_is_short_and_plain() {
    let data = [b"\x1b[31m\"quoted\" C:\\path\\file ", &[b'x'; 4000][..]].concat();
    let log = EventLog::parse(&FirmwareLog::default().measure(pcr(9), 0x1234, &data).to_bytes()).unwrap();
    let shown = log.events().first().unwrap().to_string();
    assert!(shown.starts_with("event type 0x00001234 \"[31m quoted  C:/path/file xxx"), "{shown}");
    assert!(shown.len() < 120 && !shown.contains('\u{1b}'), "{shown}");
}

#[test]
fn what_is_not_a_log_is_refused() {
    let good = boot("vmlinuz").to_bytes();
    let edit = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        *bytes.get_mut(at).unwrap() = byte;
        EventLog::parse(&bytes)
    };
    // The header is 32 bytes and its data 41: the signature, 8 bytes of versions, the algorithms.
    assert_eq!(edit(32, b's'), Err(LogFault::NoHeader));
    assert!(matches!(edit(4, 4), Err(LogFault::Header(Malformed::Unaccepted { what: "eventType", .. }))));
    for count in [0, 9, 0xff] {
        let fault = edit(56, count);
        assert!(matches!(fault, Err(LogFault::Header(Malformed::Unaccepted { .. }))), "{fault:?}");
    }
    assert!(matches!(edit(60, 0x0b), Err(LogFault::Header(_))), "SHA-256 with 20 bytes, and twice");
    assert!(edit(73, 24).is_ok(), "of an event that extends nothing the register says nothing");
    let last = boot("vmlinuz").measure(pcr(23), EV_SEPARATOR, &[0; 4]).to_bytes();
    for cut in [good.len() - 1, good.len() + 1, 40, 0] {
        let fault = EventLog::parse(last.get(..cut).unwrap());
        assert!(fault.is_err(), "{cut}");
    }
    let mut pcr_24 = good.clone();
    pcr_24.extend([24, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let fault = EventLog::parse(&pcr_24);
    assert!(matches!(fault, Err(LogFault::Event { event: 6, .. })), "{fault:?}");
    let long = EventLog::parse(&vec![0; EVENT_LOG_LIMIT_BYTES + 1]);
    assert!(matches!(long, Err(LogFault::Header(Malformed::TooLong { .. }))), "{long:?}");
}

#[test]
fn a_log_of_endless_small_events_is_refused() {
    let mut bytes = FirmwareLog::default().to_bytes();
    while bytes.len() + 16 < EVENT_LOG_LIMIT_BYTES {
        bytes.extend([0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    }
    assert_eq!(EventLog::parse(&bytes), Err(LogFault::TooMany));
}

#[test]
fn an_event_that_says_nothing_of_a_bank_leaves_its_register_out() {
    let mut bytes = boot("vmlinuz").to_bytes();
    bytes.extend([4, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let values = EventLog::parse(&bytes).unwrap().replay(Bank::Sha256);
    assert_eq!(values.keys().copied().collect::<Vec<_>>(), [pcr(0)]);
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(
        mut bytes in prop::collection::vec(any::<u8>(), 0..600),
        at in 0_usize..300,
    ) {
        let log = boot("vmlinuz").to_bytes();
        bytes.splice(0..0, log.get(..at.min(log.len())).unwrap().iter().copied());
        if let Ok(log) = EventLog::parse(&bytes) {
            prop_assert!(log.replay(Bank::Sha256).len() <= 24);
            let all = log.events().len();
            prop_assert!(all <= bytes.len() / 16);
        }
    }

    #[test]
    fn a_changed_byte_is_read_or_refused(at in 0_usize..600, byte in any::<u8>()) {
        let mut bytes = boot("vmlinuz").to_bytes();
        let at = at % bytes.len();
        *bytes.get_mut(at).unwrap() = byte;
        if let Ok(log) = EventLog::parse(&bytes) {
            let good = EventLog::parse(&boot("vmlinuz").to_bytes()).unwrap();
            let recorded = good.recorded(pcr(4), Bank::Sha256);
            let difference = log.first_difference(pcr(4), Bank::Sha256, &recorded).unwrap_or_default();
            prop_assert!(difference.len() < 400);
        }
    }
}
