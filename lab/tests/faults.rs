//! Real faults, real QEMU, a guest that writes a shared disk under default image locking. Whatever happens, the
//! outside observer must never see two copies run, none for more than ten seconds, or a counter that goes back.
#![allow(clippy::unwrap_used)]

use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use outrider_lab::fault::{LogWatch, Trial};
use outrider_lab::net::Machine::{self, HostA, HostB, Manager};
use outrider_lab::{process, require};

/// Enough memory to be in transfer for a while at [`SLOW_MBIT`].
const FILL_MIB: u32 = 96;
const SLOW_MBIT: u32 = 400;
/// A daemon that is restarted by its supervisor comes back after about this.
const RESTART_PAUSE: Duration = Duration::from_secs(1);

/// Runs one trial to its end and judges it; `strike` does the damage and says where the VM may be afterwards.
fn trial(name: &str, strike: impl FnOnce(&mut Trial, &str) -> Result<Vec<Machine>>) {
    if require::skip(require::missing()) {
        return;
    }
    let outcome = (|| -> Result<()> {
        let mut trial = Trial::start(name, FILL_MIB)?;
        trial.fleet.net.limit_migration_mbit(SLOW_MBIT)?;
        let strike = |trial: &mut Trial| -> Result<()> {
            let mut source = LogWatch::new(&trial.fleet, HostA)?;
            let id = trial.migrate()?;
            source.wait(&["migration"])?;
            let hosts = strike(trial, &id)?;
            let host = trial.wait_one_running(&hosts)?;
            let shown = trial.wait_tidy(&id)?;
            eprintln!("{name}: the VM runs on {}; the migration {}", host.name(), shown["state"]);
            let runs_on = trial.wait_one_running(&Machine::HOSTS)?;
            trial.migrate_again(runs_on)
        };
        strike(&mut trial)?;
        let report = trial.judge()?;
        eprintln!("{name}: longest gap {:.0} ms", report.verdict.longest_gap_ms);
        Ok(())
    })();
    outcome.unwrap_or_else(|error| panic!("{name}: {error:?}"));
}

/// Waits for an event in a host's log.
fn at(trial: &Trial, host: Machine, kind: &str) -> Result<()> {
    // The log from its beginning: the moment may have come already.
    let mut watch = LogWatch::from_start(&trial.fleet, host)?;
    watch.event(kind).map(|_| ())
}

fn restart(trial: &mut Trial, machine: Machine) -> Result<()> {
    thread::sleep(RESTART_PAUSE);
    trial.fleet.start(machine)
}

#[test]
fn reverse_direction_is_dropped_during_switchover() {
    trial("reverse-dropped", |trial, id| {
        let scissors = trial.scissors(HostB)?;
        at(trial, HostA, "stopped")?;
        scissors.cut()?;
        // The cut lasts until the daemons have settled it over the control network, as they must.
        let shown = trial.wait_ended(id)?;
        trial.heal(HostB)?;
        ensure!(shown["state"] == "failed", "the cut came too late to matter: {}", shown["state"]);
        Ok(Machine::HOSTS.to_vec())
    });
}

#[test]
fn tail_of_the_stream_is_withheld() {
    trial("tail-withheld", |trial, id| {
        let scissors = trial.scissors(HostA)?;
        at(trial, HostA, "stopped")?;
        scissors.cut()?;
        // The cut lasts until the daemons have settled it over the control network, as they must.
        let shown = trial.wait_ended(id)?;
        trial.heal(HostA)?;
        ensure!(shown["state"] == "failed", "the cut came too late to matter: {}", shown["state"]);
        Ok(Machine::HOSTS.to_vec())
    });
}

#[test]
fn source_daemon_is_killed_when_it_has_frozen() {
    trial("source-killed-frozen", |trial, _| {
        at(trial, HostA, "frozen")?;
        trial.fleet.kill(HostA)?;
        restart(trial, HostA)?;
        Ok(Machine::HOSTS.to_vec())
    });
}

#[test]
fn source_daemon_is_killed_right_after_commit() {
    trial("source-killed-committed", |trial, _| {
        at(trial, HostB, "running")?;
        trial.fleet.kill(HostA)?;
        restart(trial, HostA)?;
        Ok(vec![HostB])
    });
}

#[test]
fn source_daemon_is_killed_in_transfer() {
    trial("source-killed-transfer", |trial, _| {
        at(trial, HostA, "connected")?;
        trial.fleet.kill(HostA)?;
        restart(trial, HostA)?;
        Ok(vec![HostA])
    });
}

#[test]
fn target_daemon_is_killed_before_commit() {
    trial("target-killed-accepted", |trial, _| {
        at(trial, HostB, "accepted")?;
        trial.fleet.kill(HostB)?;
        restart(trial, HostB)?;
        Ok(Machine::HOSTS.to_vec())
    });
}

#[test]
fn target_daemon_is_killed_after_commit() {
    trial("target-killed-committed", |trial, _| {
        at(trial, HostB, "running")?;
        trial.fleet.kill(HostB)?;
        restart(trial, HostB)?;
        Ok(vec![HostB])
    });
}

#[test]
fn target_qemu_is_killed_in_transfer() {
    trial("target-qemu-killed", |trial, _| {
        at(trial, HostA, "connected")?;
        for pid in trial.qemus(HostB) {
            process::kill(pid);
        }
        Ok(vec![HostA])
    });
}

#[test]
fn manager_is_killed_at_the_permit() {
    trial("manager-killed-permit", |trial, _| {
        at(trial, HostB, "prepared")?;
        trial.fleet.kill(Manager)?;
        restart(trial, Manager)?;
        Ok(Machine::HOSTS.to_vec())
    });
}

#[test]
fn manager_is_killed_in_transfer() {
    trial("manager-killed-transfer", |trial, _| {
        at(trial, HostA, "connected")?;
        trial.fleet.kill(Manager)?;
        restart(trial, Manager)?;
        Ok(Machine::HOSTS.to_vec())
    });
}

#[test]
fn manager_is_killed_at_the_commit() {
    trial("manager-killed-commit", |trial, _| {
        at(trial, HostA, "frozen")?;
        trial.fleet.kill(Manager)?;
        restart(trial, Manager)?;
        Ok(Machine::HOSTS.to_vec())
    });
}

/// No rule brings back a VM whose only copy is killed: what must hold is that nothing else is lost with it.
#[test]
fn source_qemu_is_killed_in_transfer() {
    if require::skip(require::missing()) {
        return;
    }
    let outcome = (|| -> Result<()> {
        let trial = Trial::start("source-qemu-killed", FILL_MIB)?;
        trial.fleet.net.limit_migration_mbit(SLOW_MBIT)?;
        let id = trial.migrate()?;
        at(&trial, HostA, "connected")?;
        for pid in trial.qemus(HostA) {
            process::kill(pid);
        }
        let shown = trial.wait_tidy(&id)?;
        ensure!(shown["state"] == "failed", "the migration is {}", shown["state"]);
        ensure!(trial.qemus(HostB).is_empty(), "a QEMU with part of the state is left on the target");
        // The VM crashed; it starts again, where the operator says, and moves again.
        process::wait_for("the VM to be known as not running", RESTART_PAUSE * 10, || {
            let vm = trial.fleet.json(&["vm", "show", "source-qemu-killed"])?;
            Ok((vm["state"] != "running" && vm["state"] != "migrating").then_some(()))
        })?;
        ensure!(trial.fleet.start_vm(&trial.guest, HostB).is_err(), "started without its old host's word");
        trial.fleet.json(&["vm", "stop", "source-qemu-killed"])?;
        trial.fleet.start_vm(&trial.guest, HostB)?;
        trial.wait_one_running(&[HostB]).map(|_| ())
    })();
    outcome.unwrap_or_else(|error| panic!("{error:?}"));
}
