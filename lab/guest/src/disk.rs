//! Writes to a block device with sequence numbers, each made durable before the next.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use crate::settings::DiskSettings;

/// Size of one record, in bytes: a sector on every disk we make.
const RECORD_BYTES: usize = 4096;
/// The records go round in this many slots.
const SLOTS: u64 = 1024;

/// Figures of the disk writer, shared with the TCP service.
#[derive(Debug, Default)]
pub struct Disk {
    /// Last sequence number that the device has confirmed.
    pub durable_sequence: AtomicU64,
    /// Writes that the device refused.
    pub errors: AtomicU64,
}

/// Starts the writer where the settings ask for one.
pub fn start(settings: Option<DiskSettings>) -> std::io::Result<Arc<Disk>> {
    let disk = Arc::new(Disk::default());
    if let Some(settings) = settings {
        let shared = Arc::clone(&disk);
        let file = OpenOptions::new().write(true).open(&settings.path)?;
        thread::Builder::new().name("disk".to_owned()).spawn(move || {
            for sequence in 1.. {
                write(&shared, &file, sequence);
                thread::sleep(Duration::from_millis(settings.interval_ms));
            }
        })?;
    }
    Ok(disk)
}

/// One record: the sequence number repeated, so that a torn record shows.
fn write(disk: &Disk, file: &std::fs::File, sequence: u64) {
    let record = sequence.to_le_bytes().repeat(RECORD_BYTES / 8);
    let offset = sequence % SLOTS * RECORD_BYTES as u64;
    match file.write_all_at(&record, offset).and_then(|()| file.sync_data()) {
        Ok(()) => disk.durable_sequence.store(sequence, Ordering::Release),
        Err(_) => {
            disk.errors.fetch_add(1, Ordering::Relaxed);
        }
    }
}
