//! Real damage, one kind for each claim of the demo: a claim that can't fail proves nothing.

use std::fs;
use std::net::UdpSocket;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use rustix::process::{Pid, Signal, kill_process};

use super::Options;
use crate::fleet::{Fleet, Guest};
use crate::guest::GuestImage;
use crate::net::{self, Machine};
use crate::observer::Observer;
use crate::process;
use crate::vm::{Vm, VmOptions};

/// What is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Sabotage {
    /// The target's QEMU is killed in memory transfer: the migration fails.
    KilledTarget,
    /// The target's daemon is gone before the request: the migration is refused.
    LostTarget,
    /// The target has no TPM.
    NoTpm,
    /// The client's connection is reset.
    Client,
    /// The guest's QEMU is stopped after the migration: it runs nowhere.
    StoppedTarget,
    /// A second copy of the VM is started on host-a: two run, and the second starts from an older state.
    SecondCopy,
    /// The secret crosses the migration network in clear.
    SecretInClear,
    /// The beginning of QEMU's stream crosses it.
    StreamInClear,
    /// The VM's name crosses it.
    NameInClear,
    /// Nothing is captured.
    NoCapture,
    /// A byte of the audit log is changed on disk.
    Audit,
    /// The lab is not torn down before the look at what is left.
    Leftovers,
}

/// How long a killed or stopped process may take to show.
const LIMIT: Duration = Duration::from_secs(10);
/// A copy that runs moves within this, as the observer sees it.
const LIMIT_OF_STILL: Duration = Duration::from_millis(100);
/// The observer scans a new process's memory for the counter page, slowly in an unoptimised build.
const FOUND_LIMIT: Duration = Duration::from_secs(30);

/// Breaks what is broken once the migration is over. A second copy lives until it is dropped.
pub(super) fn after_migration(
    options: &Options,
    fleet: &mut Fleet,
    guest: &Guest,
    image: &GuestImage,
    secret: &str,
    observer: &Observer,
) -> Result<Option<Vm>> {
    let mut second = None;
    for sabotage in &options.sabotage {
        match sabotage {
            Sabotage::Client => reset_client(fleet)?,
            Sabotage::StoppedTarget => {
                let pid = Pid::from_raw(qemu_on(fleet, Machine::HostB)?).context("a QEMU has a pid")?;
                kill_process(pid, Signal::STOP).context("stopping the target's QEMU")?;
                wait_still(observer)?;
            }
            Sabotage::SecondCopy => second = Some(second_copy(fleet, guest, image, observer)?),
            Sabotage::SecretInClear => in_clear(fleet, secret.as_bytes())?,
            Sabotage::StreamInClear => in_clear(fleet, b"QEVM\0\0\0\x03")?,
            Sabotage::NameInClear => in_clear(fleet, guest.name.as_bytes())?,
            Sabotage::Audit => change_audit(fleet)?,
            Sabotage::KilledTarget
            | Sabotage::LostTarget
            | Sabotage::NoTpm
            | Sabotage::NoCapture
            | Sabotage::Leftovers => {}
        }
    }
    Ok(second)
}

/// Waits until the observer has looked since now and sees nothing move. On a busy machine its last look may be older than
/// the time in which a movement counts, and the next one then shows what moved before the stop.
fn wait_still(observer: &Observer) -> Result<()> {
    let looked = observer.report().samples;
    process::wait_for("the stopped copy to stand still", LIMIT, || {
        let still = observer.report().samples > looked + 1 && observer.running_on(LIMIT_OF_STILL).is_empty();
        Ok(still.then_some(()))
    })
}

/// Kills the target's QEMU as soon as it is there.
pub(super) fn kill_target(fleet: &Fleet) -> Result<()> {
    let pid = process::wait_for("the target's QEMU", LIMIT, || Ok(qemu_on(fleet, Machine::HostB).ok()))?;
    process::kill(pid);
    Ok(())
}

/// The QEMU that lives in a host's cgroup.
fn qemu_on(fleet: &Fleet, host: Machine) -> Result<i32> {
    let is_qemu = |pid: &i32| {
        let line = process::command_line(*pid).unwrap_or_default();
        line.split(|b| *b == 0).next().is_some_and(|program| program.ends_with(b"qemu-system-x86_64"))
    };
    let mut pids = fleet.net.node(host).cgroup().pids().into_iter().filter(is_qemu);
    pids.next().with_context(|| format!("no QEMU runs on {}", host.name()))
}

fn reset_client(fleet: &Fleet) -> Result<()> {
    let rules = "table ip sabotage { chain out { type filter hook output priority 0; \
                 ip daddr 10.83.0.50 tcp dport 7 reject with tcp reset; }; }\n";
    let mut command = fleet.net.node(Machine::Client).command("nft");
    process::run(command.arg(rules)).map(|_| ())
}

/// A plain QEMU with the same UUID, until it is dropped.
fn second_copy(fleet: &Fleet, guest: &Guest, image: &GuestImage, observer: &Observer) -> Result<Vm> {
    let options = VmOptions { uuid: guest.uuid, ..VmOptions::new("second-copy") };
    let mut vm = Vm::start(fleet.net.node(Machine::HostA), image, &options)?;
    vm.wait_ready()?;
    observer.wait_running_on(&Machine::HOSTS, FOUND_LIMIT)?;
    Ok(vm)
}

fn in_clear(fleet: &Fleet, bytes: &[u8]) -> Result<()> {
    let bytes = bytes.to_vec();
    let (from, to) = (Machine::HostA.migration_address(), Machine::HostB.migration_address());
    net::inside(fleet.net.node(Machine::HostA).namespace(), move || {
        let socket = UdpSocket::bind((from.as_str(), 0)).context("opening a socket")?;
        socket.send_to(&bytes, (to.as_str(), 9)).context("sending in clear")?;
        Ok(())
    })
}

/// Changes one word of one entry while the manager is down, as somebody with the disk could.
fn change_audit(fleet: &mut Fleet) -> Result<()> {
    fleet.signal(Machine::Manager, Signal::TERM)?;
    fleet.wait_end(Machine::Manager, LIMIT)?;
    let database = fleet.state_folder(Machine::Manager).join("registry.db");
    let mut bytes = fs::read(&database).with_context(|| format!("reading {}", database.display()))?;
    let (word, forged) = (b"permit.issue", b"permit.forge");
    let places: Vec<usize> =
        bytes.windows(word.len()).enumerate().filter(|(_, w)| w == word).map(|(at, _)| at).collect();
    ensure!(!places.is_empty(), "the audit log holds no permit.issue");
    // Every place: the table and its indexes, so that only the chain can tell.
    for at in places {
        bytes[at..at + word.len()].copy_from_slice(forged);
    }
    fs::write(&database, bytes).with_context(|| format!("writing {}", database.display()))?;
    fleet.start(Machine::Manager)
}
