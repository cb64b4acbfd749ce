//! The inspector between real QEMUs, in small: the long counts are `cargo xtask evidence`.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;

use outrider_lab::guest::GuestImage;
use outrider_lab::inspection::Stop;
use outrider_lab::inspection::differential::Bench;
use outrider_lab::inspection::migrations::Lab;
use outrider_lab::inspection::shape::Versions;
use outrider_lab::qemu::Version;
use outrider_lab::require;

const SEED: u64 = 1;

/// Why the versions can't be used here.
fn missing(versions: &[Version]) -> Option<String> {
    versions.iter().find_map(|version| version.missing())
}

/// Files and processes that this test process has left.
fn leftovers() -> BTreeSet<String> {
    let own = std::process::id().to_string();
    let prefix = format!("outrider-lab-{own}-");
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir(std::env::temp_dir()).unwrap().flatten() {
        let name = entry.file_name().into_string().unwrap();
        found.extend(name.starts_with(&prefix).then_some(name));
    }
    for pid in outrider_lab::process::all_pids() {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let parent = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_ascii_whitespace().nth(1));
        if parent == Some(own.as_str()) {
            found.insert(format!("process {pid}"));
        }
    }
    found
}

#[test]
fn real_migrations_are_accepted_and_leave_nothing_behind() {
    let image = GuestImage::locate().err().map(|error| format!("{error:#} (run `cargo xtask setup`)"));
    if require::skip(missing(&Version::ALL).or(image)) {
        return;
    }
    let tally = Lab::new(Stop::default(), Versions::Both).unwrap().many(SEED, 8, 2).unwrap();
    assert_eq!(
        (tally.accepted, tally.false_rejects, tally.other_failures),
        (8, 0, 0),
        "{}",
        tally.document()
    );
    assert_eq!(tally.holds_ms.len(), 8, "the device state of each was held");
    assert_eq!(leftovers(), BTreeSet::new());
}

#[test]
fn what_the_inspector_accepts_of_mutated_streams_no_qemu_runs_or_hangs_on() {
    if require::skip(missing(&Version::ALL)) {
        return;
    }
    let tally = Bench::new(Stop::default(), &Version::ALL).unwrap().many(SEED, 60, 4, 2).unwrap();
    assert_eq!(tally.streams, 60);
    assert!(tally.accepted > 5 && tally.refused > 20, "{}", tally.document());
    assert!(tally.is_sound(false), "{:?}", tally.differences);
    assert!(tally.refused_fates.contains_key("completed"), "stock QEMU checks less: {}", tally.document());
    assert_eq!(leftovers(), BTreeSet::new());
}
