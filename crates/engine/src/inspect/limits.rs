//! What a permit allows of a stream, and what a VM's record must be to be inspectable.

use super::devices::Unvouched;
use types::VmId;
use types::inventory::Inventory;
use types::layout::Catalogue;
use types::permit::PermitClaims;
use types::profile::InspectionProfile;
use wire::qemu::MAX_RAM_BLOCKS;

/// Device state of an ordinary machine is under 1 MiB; more has to be enrolled.
pub const DEFAULT_DEVICE_STATE_BYTES: usize = 8 << 20;
/// Guest memory above this needs more than 256 MiB of maps and is refused.
pub const MAX_GUEST_BYTES: u64 = 4 << 40;
/// How often one page may come. Pages that change all the time come once a round, and a migration that needs
/// thousands of rounds is none.
const PAGE_RECORDS_EACH: u32 = 10_000;
/// Page records in all, as a multiple of the guest's pages: a migration that converges needs a handful of rounds.
const PAGE_RECORDS_MULTIPLE: u64 = 30;
/// On top of the multiple: small guests resend their few pages more often.
const PAGE_RECORDS_FLOOR: u64 = 1 << 20;
/// Most multifd channels; QEMU takes 255, and nobody gains from more than a few.
const MAX_MULTIFD_CHANNELS: u16 = 64;
/// Upper bound of the resend counters' memory.
const COUNTER_BYTES: u64 = 8 << 20;

/// What the permit allows of the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Most bytes, all channels together (INV-T5).
    pub stream_bytes: u64,
    /// Most bytes of device state and description, held in memory (INV-D9).
    pub device_state_bytes: usize,
    /// The VM's UUID, in case the stream names one (INV-H4).
    pub vm: Option<VmId>,
    /// Whether OPEN_RETURN_PATH must come first (INV-T3). Off only for enrolment.
    pub return_path_required: bool,
    /// Multifd channels, where the permit allows them.
    pub multifd: Option<Multifd>,
    /// Most page records, all channels together; nothing is a default by the guest's size (INV-R15).
    pub page_records: Option<u64>,
    /// How often each page may come (INV-R15).
    pub page_records_each: u32,
    /// What happens to devices whose layout nothing vouches for.
    pub unvouched: Unvouched,
}

/// The multifd channels of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Multifd {
    /// Exactly so many, beside the main channel.
    pub channels: u16,
    /// How pages are packed on them.
    pub method: wire::qemu::multifd::Method,
}

/// Why there can be no inspector for a record and permit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unsupported {
    /// The permit allows what this inspector can't judge.
    #[error("the permit allows {feature}, which this inspector can't judge")]
    Feature {
        /// The feature.
        feature: &'static str,
    },
    /// The inventory makes no sense.
    #[error("the VM's inventory is unusable: {why}")]
    Inventory {
        /// What is wrong with it.
        why: &'static str,
    },
    /// The catalogue makes no sense, or is for another machine.
    #[error("the catalogue of the VM's devices is unusable: {why}")]
    Catalogue {
        /// What is wrong with it.
        why: String,
    },
}

impl Default for Limits {
    /// No budget, plain pre-copy with its return path, nothing unvouched.
    fn default() -> Self {
        Self {
            stream_bytes: u64::MAX,
            device_state_bytes: DEFAULT_DEVICE_STATE_BYTES,
            vm: None,
            return_path_required: true,
            multifd: None,
            page_records: None,
            page_records_each: PAGE_RECORDS_EACH,
            unvouched: Unvouched::Refuse,
        }
    }
}

impl Limits {
    /// The limits that a permit sets.
    ///
    /// # Errors
    /// A permit for features that can't be judged.
    pub fn of_permit(claims: &PermitClaims) -> Result<Self, Unsupported> {
        let features = &claims.features;
        let wanted =
            [(features.postcopy, "post-copy"), (!features.storage_exports.is_empty(), "storage exports")];
        if let Some((_, feature)) = wanted.into_iter().find(|(on, _)| *on) {
            return Err(Unsupported::Feature { feature });
        }
        let profile: InspectionProfile = claims
            .inspection_profile
            .parse()
            .map_err(|_| Unsupported::Feature { feature: "an unknown inspection profile" })?;
        let unvouched = if profile.report_unvouched { Unvouched::Report } else { Unvouched::Refuse };
        Ok(Self {
            unvouched,
            stream_bytes: claims.byte_budget,
            vm: Some(claims.key.vm),
            multifd: Multifd::of(features.multifd_channels, &features.compression)?,
            ..Self::default()
        })
    }

    /// Most page records for a guest of so many pages.
    pub(super) fn page_records_of(&self, pages: u64) -> u64 {
        let by_size = pages.saturating_mul(PAGE_RECORDS_MULTIPLE).saturating_add(PAGE_RECORDS_FLOOR);
        self.page_records.unwrap_or(by_size)
    }
}

impl Multifd {
    fn of(channels: u16, compression: &str) -> Result<Option<Self>, Unsupported> {
        use wire::qemu::multifd::Method;
        let method = match compression {
            "" => Method::Plain,
            "zlib" => Method::Zlib,
            "zstd" => Method::Zstd,
            _ => return Err(Unsupported::Feature { feature: "a compression other than zlib and zstd" }),
        };
        if channels > MAX_MULTIFD_CHANNELS {
            return Err(Unsupported::Feature { feature: "more than 64 multifd channels" });
        }
        if channels == 0 && method != Method::Plain {
            return Err(Unsupported::Feature { feature: "compression without multifd" });
        }
        Ok((channels > 0).then_some(Self { channels, method }))
    }
}

/// Bytes of memory that the page maps of a VM take.
#[must_use]
pub fn map_bytes(inventory: &Inventory, limits: &Limits) -> u64 {
    let bits = pages(inventory) / 8;
    let maps = if limits.multifd.is_some() { bits.saturating_mul(2) } else { bits };
    maps.saturating_add(COUNTER_BYTES)
}

/// Pages of all blocks.
pub(super) fn pages(inventory: &Inventory) -> u64 {
    let total = inventory.ram_blocks.iter().fold(0u64, |sum, block| sum.saturating_add(block.length_bytes));
    total / u64::from(inventory.page_size_bytes.max(1))
}

pub(super) fn check_inventory(inventory: &Inventory) -> Result<(), Unsupported> {
    let unusable = |why| Err(Unsupported::Inventory { why });
    let page = u64::from(inventory.page_size_bytes);
    if !page.is_power_of_two() || !(4096..=65536).contains(&page) {
        return unusable("the page size is no power of two from 4096 to 65536");
    }
    if inventory.ram_blocks.is_empty() || inventory.ram_blocks.len() > MAX_RAM_BLOCKS {
        return unusable("it has no RAM blocks, or too many");
    }
    let total = inventory.ram_blocks.iter().try_fold(0u64, |sum, block| sum.checked_add(block.length_bytes));
    if total.is_none_or(|total| total > MAX_GUEST_BYTES) {
        return unusable("its RAM is larger than can be tracked");
    }
    let whole = |length: u64| length != 0 && length.is_multiple_of(page);
    if !inventory.ram_blocks.iter().all(|block| whole(block.length_bytes)) {
        return unusable("a RAM block is not a whole number of pages");
    }
    let pinned = inventory.ram_blocks.iter().filter(|block| block.content.is_some());
    if pinned.map(|block| block.length_bytes).sum::<u64>() > super::MAX_FIRMWARE_BYTES {
        return unusable("its firmware is larger than can be checked");
    }
    Ok(())
}

pub(super) fn check_catalogue(inventory: &Inventory, catalogue: &Catalogue) -> Result<(), Unsupported> {
    let unusable = |why: String| Err(Unsupported::Catalogue { why });
    if catalogue.machine != inventory.machine {
        return unusable(format!("it is for {:?}, the VM is {:?}", catalogue.machine, inventory.machine));
    }
    catalogue.validate().or_else(|error| unusable(error.to_string()))
}
