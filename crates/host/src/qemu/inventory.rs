//! A VM's inventory, learned from its own QEMU before the guest has executed anything.

use crate::qmp::{Qmp, QmpError};
use serde_json::json;
use types::inventory::{Inventory, RamBlock};

/// x86.
const PAGE_SIZE_BYTES: u32 = 4096;

/// Asks QEMU for its RAM blocks.
///
/// # Errors
/// The monitor failed, or its table could not be read.
pub async fn learn(qmp: &Qmp, machine: &str, hypervisor: &str) -> Result<Inventory, QmpError> {
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
    Ok(Inventory {
        machine: machine.to_owned(),
        page_size_bytes: PAGE_SIZE_BYTES,
        ram_blocks,
        devices: Vec::new(),
        hypervisor: hypervisor.to_owned(),
    })
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

    #[test]
    fn the_used_length_counts() {
        let table = "              Block Name    PSize              Offset               Used              Total                HVA  RO\r\n\
            pc.ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000 0x00007fb297e00000  rw\r\n\
            /rom@etc/acpi/tables    4 KiB  0x0000000004080000 0x0000000000020000 0x0000000000200000 0x00007fb296800000  ro\r\n";
        let blocks = parse(table);
        assert_eq!(blocks.len(), 2);
        assert_eq!(
            blocks[1],
            RamBlock { name: "/rom@etc/acpi/tables".to_owned(), length_bytes: 0x20000, content: None }
        );
        assert!(parse("nonsense\n\n0x").is_empty());
    }
}
