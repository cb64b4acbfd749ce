//! What a stock QEMU does with a stream, with nothing in between.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use super::shape::Shape;
use crate::process;
use crate::qemu::{Program, Qemu};

/// A stream of one small VM is read in tens of milliseconds; the rest is for a busy machine.
const LIMIT: Duration = Duration::from_secs(20);

/// How a QEMU took a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fate {
    /// It has the VM, paused as it was told to.
    Completed,
    /// It has the VM and runs it, though it was started with `-S`.
    Runs,
    /// It gave up, in order.
    Refused {
        /// What it said.
        said: String,
    },
    /// A signal ended it.
    Died {
        /// Which, and what it said.
        said: String,
    },
    /// It did neither in time.
    Hung {
        /// What it was at.
        status: String,
    },
}

/// Starts a QEMU that waits, gives it the whole stream, and closes.
pub fn feed(program: &Program, shape: &Shape, stream: &[u8], errors: &Path) -> Result<Fate> {
    let mut arguments = shape.arguments(None, None);
    arguments.extend(["-S", "-incoming", "fd:0"].map(str::to_owned));
    let mut qemu = Qemu::start(program, &arguments, errors)?;
    let mut way = qemu.stream();
    way.set_write_timeout(Some(LIMIT)).context("limiting the writing")?;
    // Fails where QEMU has ended or stopped reading, which shows below.
    let _stopped = way.write_all(stream).and_then(|()| way.shutdown(Shutdown::Write));
    let asked = ask(&mut qemu);
    if let Ok(Some(fate)) = asked {
        return Ok(fate);
    }
    match qemu.wait_end(LIMIT) {
        Ok(end) if end.signal().is_some() => Ok(Fate::Died { said: format!("{end}: {}", qemu.said()) }),
        Ok(_) => Ok(Fate::Refused { said: qemu.said() }),
        Err(_) => Ok(Fate::Hung { status: format!("{asked:?}: {}", qemu.said()) }),
    }
}

/// Asks until QEMU has an answer; an error when it ends meanwhile.
fn ask(qemu: &mut Qemu) -> Result<Option<Fate>> {
    let mut qmp = qemu.monitor()?;
    let status = process::wait_for("the end of the incoming migration", LIMIT, || {
        let status = qmp.migration_status()?;
        // A failed one is about to end the process.
        Ok(["completed", "colo"].contains(&status.as_str()).then_some(status))
    })?;
    let state = process::wait_for("the VM's state", LIMIT, || {
        let state = qmp.status()?;
        Ok((state != "inmigrate").then_some(state))
    })?;
    Ok(match (status.as_str(), state.as_str()) {
        ("completed", "running") | ("colo", _) => Some(Fate::Runs),
        ("completed", _) => Some(Fate::Completed),
        _ => None,
    })
}
