//! The inspector between real QEMUs.
//!
//! ```text
//! shape ───── a seeded VM: versions, machine, devices, hops
//! enrol ───── its stream from a dry run, and the inventory that it shows
//! passage ─── source → inspector → target, channel by channel
//! migrations ─ many of them: none may be refused
//! marks ───── where the fields of a stream are
//! mutate ──── streams with something wrong with them
//! feed ────── what a stock QEMU does with a stream
//! differential ─ what the inspector accepts, stock QEMU completes
//! gate ────── all that this knows of the inspector's interface
//! ```

pub mod differential;
pub mod enrol;
pub mod feed;
pub mod gate;
pub mod marks;
pub mod migrations;
pub mod mutate;
mod passage;
pub mod rng;
pub mod shape;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

/// Set by Ctrl-C and its like: the runs end after what they are at, and remove what they made.
#[derive(Debug, Clone, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// One that signals set; the second one ends the process at once.
    pub fn on_signal() -> Result<Self> {
        let stop = Self::default();
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(&stop.0))
                .context("catching signals")?;
            signal_hook::flag::register(signal, Arc::clone(&stop.0)).context("catching signals")?;
        }
        Ok(stop)
    }

    /// Whether to end.
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// A folder for sockets and logs, named after this process, removed when dropped.
fn run_folder() -> Result<tempfile::TempDir> {
    let prefix = format!("outrider-lab-{}-", std::process::id());
    tempfile::Builder::new().prefix(&prefix).tempdir().context("making a folder")
}

/// Where streams that need a look are kept.
fn kept_folder() -> Result<PathBuf> {
    Ok(crate::guest::target_folder()?.join("lab/inspection"))
}

/// Writes the files of something that needs a look, in a folder of its own.
fn keep(name: &str, files: &[(&str, &[u8])]) -> Result<PathBuf> {
    let folder = kept_folder()?.join(name);
    std::fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    for (name, bytes) in files {
        write(&folder.join(name), bytes)?;
    }
    Ok(folder)
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    std::fs::write(path, bytes).with_context(|| format!("writing {}", path.display()))
}
