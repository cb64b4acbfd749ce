//! A measured boot: a log as firmware writes it, the registers of a real TPM extended by it, a mismatch
//! explained by the event that differs; and the same log as others read it.
#![allow(clippy::unwrap_used)]

mod support;

use std::process::Command;

use attest::event_log::EventLog;
use attest::testkit::{FirmwareLog, Forge};
use attest::{Bank, Bounded, Evidence, ReferenceValues};
use support::{Platform, binding, codes, pcr, ready};

const EV_SEPARATOR: u32 = 4;
const EV_S_CRTM_VERSION: u32 = 8;
const VARIABLE: u32 = 0x8000_0001;
const APPLICATION: u32 = 0x8000_0003;
const ACTION: u32 = 0x8000_0007;

/// What the firmware measures when it starts that kernel.
fn boot(kernel: &str) -> FirmwareLog {
    FirmwareLog::default()
        .measure(pcr(0), EV_S_CRTM_VERSION, b"1.16.2")
        .measure(pcr(7), VARIABLE, &variable("SecureBoot", &[1]))
        .measure(pcr(4), ACTION, b"Calling EFI Application from Boot Option")
        .measure(pcr(4), EV_SEPARATOR, &[0; 4])
        .measure(pcr(4), APPLICATION, &image("\\EFI\\shimx64.efi"))
        .measure(pcr(4), APPLICATION, &image(kernel))
}

/// `UEFI_VARIABLE_DATA`: a vendor, the lengths of name and value, both.
fn variable(name: &str, value: &[u8]) -> Vec<u8> {
    let lengths = [name.len(), value.len()].map(|length| u64::try_from(length).unwrap().to_le_bytes());
    [&[0x61; 16][..], &lengths.concat(), &utf16(name), value].concat()
}

/// `UEFI_IMAGE_LOAD_EVENT`: where, how long, linked where, and a device path of one file.
fn image(path: &str) -> Vec<u8> {
    let name = utf16(&format!("{path}\0"));
    let node = u16::try_from(4 + name.len()).unwrap().to_le_bytes();
    let path = [&[4, 4][..], &node, &name, &[0x7f, 0xff, 4, 0]].concat();
    let head = [0x1000, 0x2000, 0, u64::try_from(path.len()).unwrap()].map(u64::to_le_bytes);
    [&head.concat()[..], &path].concat()
}

fn utf16(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_le_bytes).collect()
}

/// Boots: the TPM starts anew and is extended event by event.
fn start(platform: &mut Platform, log: &EventLog) {
    platform.swtpm.power_on().unwrap();
    platform.tpm = platform.swtpm.tpm().unwrap();
    for event in log.events() {
        for digest in event.digests.values() {
            platform.tpm.extend(event.pcr, digest).unwrap();
        }
    }
}

#[test]
fn another_kernel_is_named_as_the_event_that_differs() {
    if !ready(&[]) {
        return;
    }
    let (mut platform, blobs) = Platform::with_kept_key();
    let question = binding("host-a", 1);
    let quote = |platform: &mut Platform, shown: &FirmwareLog| {
        platform.ak = platform.tpm.load_ak(&blobs).unwrap();
        let evidence = platform.evidence(&question);
        Evidence { event_log: Some(Bounded::new(shown.to_bytes()).unwrap()), ..evidence }
    };
    let (known, other) = (boot("vmlinuz-6.1.0-37"), boot("vmlinuz-6.1.0-38"));
    let parsed = |log: &FirmwareLog| EventLog::parse(&log.to_bytes()).unwrap();
    start(&mut platform, &parsed(&known));
    let evidence = quote(&mut platform, &known);
    platform.reference = ReferenceValues::recorded(&evidence.pcrs, Some(&parsed(&known))).unwrap();
    let json = serde_json::to_string(&platform.reference).unwrap();
    platform.reference = serde_json::from_str(&json).unwrap();
    assert_eq!(codes(&platform.appraise(&question, &evidence)), Vec::<&str>::new());

    start(&mut platform, &parsed(&other));
    let refused = |platform: &Platform, evidence: &Evidence| {
        let refusal = platform.appraise(&question, evidence).unwrap_err();
        assert_eq!(codes(&Err(refusal.clone())), ["attest-pcr-mismatch"]);
        refusal.reasons()[0].detail.clone()
    };
    let evidence = quote(&mut platform, &other);
    let text = refused(&platform, &evidence);
    let parts =
        ["PCR 4: expected ", ": event 4 EV_EFI_BOOT_SERVICES_APPLICATION \"", "vmlinuz-6.1.0-38\" differs: "];
    assert!(parts.iter().all(|part| text.contains(part)), "{text}");

    // The host shows the log of the good boot instead: it does not lead to what was quoted.
    let masked = Evidence { event_log: Some(Bounded::new(known.to_bytes()).unwrap()), ..evidence.clone() };
    let text = refused(&platform, &masked);
    assert!(text.contains("the event log does not lead to this value"), "{text}");
    // It shows none.
    let silent = Evidence { event_log: None, ..evidence };
    let text = refused(&platform, &silent);
    assert!(text.ends_with(&silent.pcrs.values()[&pcr(4)].to_string()), "{text}");
}

#[test]
fn others_read_our_logs_and_reach_the_same_values() {
    if !ready(&["tpm2_eventlog"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let log = boot("vmlinuz-6.1.0-37").started_from(3);
    std::fs::write(folder.path().join("log"), log.to_bytes()).unwrap();
    let output = Command::new("tpm2_eventlog").arg(folder.path().join("log")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let values = EventLog::parse(&log.to_bytes()).unwrap();
    for bank in [Bank::Sha256, Bank::Sha384] {
        let replayed = values.replay(bank);
        assert_eq!(replayed.len(), 3);
        // `pcrs:` at the end lists what the log leads to in each bank; of PCR 0 it is known to leave the
        // start out.
        for (_, value) in replayed.iter().filter(|(index, _)| **index != pcr(0)) {
            assert!(text.contains(&format!("0x{value}").to_lowercase()), "{bank} {value}:\n{text}");
        }
    }
    assert!(text.contains("EV_EFI_BOOT_SERVICES_APPLICATION"));
}

/// What SeaBIOS 1.16 logged when QEMU 10.0 started it with `-M q35 -device tpm-crb` and nothing to boot, read
/// from the guest's memory. The values are those that `tpm2_eventlog` gives for it.
#[test]
fn the_log_of_a_real_firmware_is_read() {
    let log = EventLog::parse(include_bytes!("recorded/seabios-q35-tpm-crb.log")).unwrap();
    let shown: Vec<String> = log.events().iter().map(|event| format!("{} {event}", event.pcr)).collect();
    assert_eq!(shown.len(), 12);
    assert!(shown.contains(&"PCR 4 EV_ACTION \"Calling INT 19h\"".to_owned()), "{shown:?}");
    let values = log.replay(Bank::Sha256);
    assert_eq!(values.len(), 8);
    for (index, expect) in [
        (0, "e21b703ee69c77476bccb43ec0336a9a1b2914b378944f7b00a10214ca8fea93"),
        (1, "5f194651a6ceb7e8424e21302d309ee8a0456d80b3a913b8e502794c045c0526"),
        (2, "1af0310df024efe57440f26d56d1c52769dc9366c286924bc373593aac9ebd13"),
        (4, "1eb9aa21337cc1fa31ce5f56900d7bf59b9dda366823095aed06544caa2557ca"),
    ] {
        assert_eq!(values[&pcr(index)].to_string(), expect, "PCR {index}");
    }
}
