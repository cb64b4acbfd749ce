//! Requests in flight on a SCSI device.
//!
//! QEMU drains them before it writes the state; only one that waits for a retry after an I/O error is left. What it
//! writes then depends on the request, so only the empty list is vouched for.

use crate::inspect::devices::parse::{Reader, Stop};

impl Reader<'_, '_> {
    /// The list, which has to be empty.
    pub(in crate::inspect::devices) fn scsi_requests(&mut self) -> Result<(), Stop> {
        match self.take_number(1, "requests")? {
            0 => Ok(()),
            _ => Err(Stop::Unknown("a SCSI request waits for a retry".to_owned())),
        }
    }
}
