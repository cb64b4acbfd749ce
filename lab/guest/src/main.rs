//! The guest daemon of the lab: reads the kernel command line, starts its parts, serves for ever.

use std::fs;

use anyhow::{Context, Result};
use outrider_lab_guest::{counter, disk, load, page, secret, serve, settings::Settings};
use rustix::mm::{MlockAllFlags, mlockall};

fn main() -> Result<()> {
    let command_line = fs::read_to_string("/proc/cmdline").context("reading the kernel command line")?;
    let settings = Settings::parse(&command_line)?;
    let magic = match settings.magic {
        Some(magic) => magic,
        None => page::magic(own_uuid()?),
    };
    // Locked pages keep their place: the observer looks for the counter once.
    mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT)
        .context("locking the daemon's memory")?;
    counter::start(magic).context("starting the counter")?;
    let secret = settings.secret.map_or_else(secret::generate, Ok).context("making the secret")?;
    let load = load::start(settings.fill_mib, settings.working_set_mib, settings.rate_mib_per_s)
        .context("starting the memory load")?;
    let disk = disk::start(settings.disk).context("opening the disk")?;
    serve::run(settings.port, serve::Service { secret, load, disk }).context("serving TCP")
}

/// The UUID that the hypervisor gave this VM.
fn own_uuid() -> Result<[u8; 16]> {
    let text = fs::read_to_string("/sys/class/dmi/id/product_uuid").context("reading the VM's UUID")?;
    page::parse_uuid(&text).with_context(|| format!("the VM's UUID is {text:?}"))
}
