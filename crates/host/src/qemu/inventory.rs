//! A VM's inventory, learned from its own QEMU before the guest has executed anything: RAM blocks from the QEMU that
//! will run it, devices and firmware from a dry run of the same devices.

use super::catalogue::Shape;
use crate::error::HostError;
use crate::qmp::{Qmp, QmpError};
use serde_json::json;
use std::collections::BTreeSet;
use types::inventory::{Inventory, RamBlock};
use types::{ErrorCode, Problem};

/// x86.
const PAGE_SIZE_BYTES: u32 = 4096;

/// Enrols a VM of this shape.
///
/// # Errors
/// The monitor failed, or the dry run was of other blocks than the VM has.
pub async fn enrol(
    qmp: &Qmp,
    machine: &str,
    hypervisor: &str,
    shape: &Shape,
) -> Result<Inventory, HostError> {
    let ram_blocks = pinned(ram_blocks(qmp).await?, &shape.ram_blocks)?;
    Ok(Inventory {
        machine: machine.to_owned(),
        page_size_bytes: PAGE_SIZE_BYTES,
        ram_blocks,
        devices: shape.devices.clone(),
        hypervisor: hypervisor.to_owned(),
    })
}

/// The VM's blocks with the content of firmware, which is that of the dry run's block of the same name and length.
fn pinned(live: Vec<RamBlock>, dry_run: &[RamBlock]) -> Result<Vec<RamBlock>, Problem> {
    let names = |blocks: &[RamBlock]| blocks.iter().map(|b| b.name.clone()).collect::<BTreeSet<_>>();
    let differing: Vec<_> = names(&live).symmetric_difference(&names(dry_run)).cloned().collect();
    if !differing.is_empty() {
        let text = format!("the VM and its dry run differ in their RAM blocks: {}", differing.join(", "));
        return Err(Problem::new(ErrorCode::HypervisorFailed, text));
    }
    let pin = |block: RamBlock| {
        let same = |b: &&RamBlock| b.name == block.name && b.length_bytes == block.length_bytes;
        let content = dry_run.iter().find(same).and_then(|b| b.content);
        RamBlock { content, ..block }
    };
    Ok(live.into_iter().map(pin).collect())
}

async fn ram_blocks(qmp: &Qmp) -> Result<Vec<RamBlock>, QmpError> {
    let command = "human-monitor-command";
    let table = qmp.execute(command, json!({"command-line": "info ramblock"})).await?;
    let ram_blocks = parse(table.as_str().unwrap_or_default());
    if ram_blocks.is_empty() {
        return Err(QmpError::Refused {
            command: command.to_owned(),
            class: "GenericError".to_owned(),
            description: "the table of RAM blocks could not be read".to_owned(),
        });
    }
    Ok(ram_blocks)
}

/// Columns: name, page size (two words), offset, used, total, …
fn parse(table: &str) -> Vec<RamBlock> {
    let row = |line: &str| {
        let words: Vec<_> = line.split_whitespace().collect();
        let used = words.get(4)?.strip_prefix("0x")?;
        let length_bytes = u64::from_str_radix(used, 16).ok()?;
        Some(RamBlock { name: (*words.first()?).to_owned(), length_bytes, content: None })
    };
    table.lines().filter_map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use types::Digest;

    #[test]
    fn the_used_length_counts() {
        let table = "              Block Name    PSize              Offset               Used              Total                HVA  RO\r\n\
            pc.ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000 0x00007fb297e00000  rw\r\n\
            /rom@etc/acpi/tables    4 KiB  0x0000000004080000 0x0000000000020000 0x0000000000200000 0x00007fb296800000  ro\r\n";
        let blocks = parse(table);
        assert_eq!(blocks.len(), 2);
        assert_eq!((&*blocks[1].name, blocks[1].length_bytes), ("/rom@etc/acpi/tables", 0x20000));
        assert!(parse("nonsense\n\n0x").is_empty());
    }

    #[test]
    fn firmware_is_pinned_where_name_and_length_agree() {
        let block = |name: &str, length_bytes, content: Option<u8>| {
            let content = content.map(|byte| Digest([byte; 32]));
            RamBlock { name: name.to_owned(), length_bytes, content }
        };
        let dry_run = [block("pc.ram", 64, None), block("pc.bios", 8, Some(1)), block("x.rom", 8, Some(2))];
        let live = || vec![block("pc.ram", 128, None), block("pc.bios", 8, None), block("x.rom", 16, None)];
        let enrolled = pinned(live(), &dry_run).expect("the same blocks");
        let expected = [block("pc.ram", 128, None), block("pc.bios", 8, Some(1)), block("x.rom", 16, None)];
        assert_eq!(enrolled, expected);
        let refused = pinned(live()[..2].to_vec(), &dry_run).expect_err("one is missing");
        assert!(refused.detail.ends_with("x.rom"), "{refused}");
        let more = [live(), vec![block("vga.vram", 8, None)]].concat();
        assert!(pinned(more, &dry_run).expect_err("one too many").detail.ends_with("vga.vram"));
    }
}
