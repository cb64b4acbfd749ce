//! Enrolment: the stream of a VM that has never run, recorded from a QEMU that nobody else talks to.

use std::io::Read;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::shape::Shape;
use crate::guest::GuestImage;
use crate::process;
use crate::qemu::{Program, Qemu};
use crate::qmp::Qmp;

/// A small guest's stream, on a machine that is busy with other things.
const RECORDING_LIMIT: Duration = Duration::from_secs(60);

/// A dry run: the stream of the VM's command line, paused, on this QEMU.
pub fn dry_run(
    program: &Program,
    shape: &Shape,
    image: Option<&GuestImage>,
    folder: &Path,
) -> Result<Vec<u8>> {
    let mut arguments = shape.arguments(image, None);
    arguments.push("-S".to_owned());
    let mut qemu = Qemu::start(program, &arguments, &folder.join("enrolment.errors"))?;
    let mut qmp = qemu.monitor()?;
    record(&mut qmp, folder).context("recording the dry run")
}

/// What this QEMU says of the state of all its devices, for the VM's machine type.
pub fn dump(program: &Program, shape: &Shape, folder: &Path) -> Result<Vec<u8>> {
    let file = folder.join("dump");
    let mut command = Command::new(&program.path);
    command.args(&program.arguments).args(["-nodefaults", "-display", "none"]);
    command.args(["-machine", &shape.machine(), "-dump-vmstate"]).arg(&file);
    process::run(&mut command).context("dumping the descriptions of devices")?;
    std::fs::read(&file).with_context(|| format!("reading {}", file.display()))
}

/// Takes the whole stream of a QEMU, without a return path.
pub fn record(qmp: &mut Qmp, folder: &Path) -> Result<Vec<u8>> {
    let path = folder.join("recording");
    let _absent = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).with_context(|| format!("listening at {}", path.display()))?;
    qmp.execute("migrate", json!({"uri": format!("unix:{}", path.display())}))?;
    let mut stream = accept(&listener, RECORDING_LIMIT)?;
    stream.set_read_timeout(Some(RECORDING_LIMIT)).context("setting the recording's limit")?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).context("reading QEMU's stream")?;
    let end = process::wait_for("the recording's end", RECORDING_LIMIT, || {
        let status = qmp.migration_status()?;
        Ok(["completed", "failed"].contains(&status.as_str()).then_some(status))
    })?;
    ensure!(end == "completed", "QEMU could not send its stream");
    Ok(bytes)
}

/// The next connection, in blocking mode.
pub(super) fn accept(listener: &UnixListener, limit: Duration) -> Result<UnixStream> {
    listener.set_nonblocking(true).context("making the listener non-blocking")?;
    let begun = Instant::now();
    let stream = process::wait_for("QEMU to connect", limit, || match listener.accept() {
        Ok((stream, _)) => Ok(Some(stream)),
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error).context("accepting"),
    })
    .with_context(|| format!("after {} ms", begun.elapsed().as_millis()))?;
    stream.set_nonblocking(false).context("making the connection blocking")?;
    Ok(stream)
}
