//! What the agent keeps when it gives up the rest; see [`outrider_sandbox`](sandbox).

use engine::inspect::MAX_GUEST_BYTES;
use sandbox::{ExecutableMemory, Profile, SandboxError};

/// Address space of an agent, beside the page maps of its VM: buffers, held device state, the binary.
pub const MEMORY_BYTES: u64 = 256 << 20;
/// The page maps of the largest VM: two bits for each page of 4 KiB.
const MAX_MAP_BYTES: u64 = MAX_GUEST_BYTES / 4096 / 4;
/// Control socket, 17 lanes with peer and QEMU, scanner, standard streams, and the few that are in flight.
const MAX_DESCRIPTORS: u64 = 64;

/// Until the VM is known there is room for the largest.
pub const PROFILE: Profile = Profile {
    memory_bytes: MEMORY_BYTES + MAX_MAP_BYTES,
    descriptors: MAX_DESCRIPTORS,
    executable_memory: ExecutableMemory::Forbidden,
    calls: &[],
};

/// Lowers the memory limit to what this VM needs.
///
/// # Errors
/// The limit could not be set.
pub fn limit_memory(map_bytes: u64) -> Result<(), SandboxError> {
    sandbox::limit_memory(MEMORY_BYTES.saturating_add(map_bytes))
}
