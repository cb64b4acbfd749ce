//! Guest-physical addresses against the memory map of a real QEMU. No guest runs, and no memory is touched.
#![allow(clippy::unwrap_used)]

use outrider_signature::address::{Board, gpa};
use std::io::Write;
use std::process::{Command, Stdio};

const MIB: u64 = 1 << 20;

/// Ranges of `pc.ram`: first address, last address, offset in the block. Nothing when there is no QEMU.
fn map(machine: &str, ram_mib: u64) -> Option<Vec<(u64, u64, u64)>> {
    let mut qemu = Command::new("qemu-system-x86_64")
        .args(["-machine", &format!("{machine},memory-backend=pc.ram"), "-m", &format!("{ram_mib}M")])
        .args(["-object", &format!("memory-backend-ram,id=pc.ram,size={ram_mib}M")])
        .args(["-accel", "tcg", "-S", "-display", "none", "-nodefaults", "-monitor", "stdio"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .ok()?;
    qemu.stdin.take().unwrap().write_all(b"info mtree -f\nquit\n").unwrap();
    let output = qemu.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let ranges: Vec<_> = text.lines().filter_map(range).collect();
    assert!(!ranges.is_empty(), "{machine}: {text}");
    Some(ranges)
}

/// Of a line such as `  0000000100000000-000000012fffffff (prio 0, ram): pc.ram @0000000080000000`.
fn range(line: &str) -> Option<(u64, u64, u64)> {
    let (range, rest) = line.trim().split_once(" (")?;
    let (first, last) = range.split_once('-')?;
    let name = rest.split_once("): ")?.1;
    let offset = match name.strip_prefix("pc.ram")?.trim() {
        "" => "0",
        at => at.strip_prefix('@')?.split(' ').next()?,
    };
    let number = |text: &str| u64::from_str_radix(text, 16).ok();
    Some((number(first)?, number(last)?, number(offset)?))
}

#[test]
fn addresses_are_those_of_qemu() {
    for (machine, sizes) in [("q35", [512, 2815, 2816, 4096]), ("pc", [512, 3583, 3584, 6144])] {
        for ram_mib in sizes {
            let Some(ranges) = map(machine, ram_mib) else {
                println!("SKIPPED: there is no qemu-system-x86_64 here");
                if let Some(list) = std::env::var_os("OUTRIDER_SKIPS") {
                    let mut file = std::fs::OpenOptions::new().append(true).create(true).open(list).unwrap();
                    writeln!(file, "outrider-signature::address: there is no QEMU").unwrap();
                }
                return;
            };
            let board = if machine == "q35" { Board::Q35 } else { Board::I440fx };
            let below = board.below_4g_bytes(ram_mib * MIB);
            for (first, last, offset) in &ranges {
                let ends = [(*offset, *first), (offset + (last - first), *last)];
                for (offset, address) in ends {
                    assert_eq!(
                        gpa("pc.ram", offset, below),
                        Some(address),
                        "{machine} {ram_mib}: {offset:#x}"
                    );
                }
            }
            let most = ranges.iter().map(|(first, last, offset)| offset + (last - first) + 1).max();
            assert_eq!(most, Some(ram_mib * MIB), "the map holds all of it");
        }
    }
}
