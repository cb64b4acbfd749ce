//! What the agent keeps when it gives up the rest; see [`outrider_sandbox`](sandbox).

use engine::inspect::MAX_GUEST_BYTES;
use sandbox::{ExecutableMemory, Profile, SandboxError};

/// Address space of an agent, beside the coverage map of its VM: buffers, held device state, the binary.
pub const MEMORY_BYTES: u64 = 256 << 20;
/// The coverage map of the largest VM: a bit for each page of 4 KiB.
const MAX_COVERAGE_BYTES: u64 = MAX_GUEST_BYTES / 4096 / 8;

/// Until the VM is known there is room for the largest. Descriptors: control socket, peer, QEMU, scanner, standard
/// streams, and the few that are in flight.
pub const PROFILE: Profile = Profile {
    memory_bytes: MEMORY_BYTES + MAX_COVERAGE_BYTES,
    descriptors: 32,
    executable_memory: ExecutableMemory::Forbidden,
    calls: &[],
};

/// Lowers the memory limit to what this VM needs.
///
/// # Errors
/// The limit could not be set.
pub fn limit_memory(coverage_bytes: u64) -> Result<(), SandboxError> {
    sandbox::limit_memory(MEMORY_BYTES.saturating_add(coverage_bytes))
}
