//! The firmware's log, as the kernel keeps it.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};

use crate::event_log::EVENT_LOG_LIMIT_BYTES;

/// Where Linux shows the log of the first TPM.
pub const PLATFORM_EVENT_LOG: &str = "/sys/kernel/security/tpm0/binary_bios_measurements";

/// Why the log could not be read.
#[derive(Debug, thiserror::Error)]
pub enum EventLogFault {
    /// Reading failed.
    #[error("reading the event log {}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is longer than the manager accepts.
    #[error("the event log {} is longer than {EVENT_LOG_LIMIT_BYTES} bytes", path.display())]
    TooLong {
        /// Which file.
        path: PathBuf,
    },
}

/// Reads the log; nothing if the platform has none.
///
/// # Errors
/// [`EventLogFault`].
pub fn event_log(path: &Path) -> Result<Option<Vec<u8>>, EventLogFault> {
    let fault = |source| EventLogFault::Read { path: path.to_owned(), source };
    let file = match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        opened => opened.map_err(fault)?,
    };
    // The kernel tells no size: one byte more than allowed shows that it is longer.
    let mut log = Vec::new();
    let limit = u64::try_from(EVENT_LOG_LIMIT_BYTES).unwrap_or(u64::MAX);
    file.take(limit.saturating_add(1)).read_to_end(&mut log).map_err(fault)?;
    if log.len() > EVENT_LOG_LIMIT_BYTES {
        return Err(EventLogFault::TooLong { path: path.to_owned() });
    }
    Ok(Some(log).filter(|log| !log.is_empty()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn no_log_is_none_and_one_without_end_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(event_log(&folder.path().join("none")).unwrap(), None);
        let file = folder.path().join("log");
        std::fs::write(&file, b"log").unwrap();
        assert_eq!(event_log(&file).unwrap(), Some(b"log".to_vec()));
        assert!(matches!(event_log(Path::new("/dev/zero")), Err(EventLogFault::TooLong { .. })));
        assert!(matches!(event_log(folder.path()), Err(EventLogFault::Read { .. })));
    }
}
