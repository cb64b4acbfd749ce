//! What an operator does and gets wrong: suspend, resume, terminate in mid-flight, and bad input of every kind.
//! Each mistake gets a stable code and the documented exit code, and loses nothing.
#![allow(clippy::unwrap_used)]

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use outrider_lab::fault::{LogWatch, Trial};
use outrider_lab::fleet::{Fleet, Guest, Programs};
use outrider_lab::guest::GuestImage;
use outrider_lab::net::Machine::{HostA, HostB, Manager};
use outrider_lab::{process, require};
use rustix::process::Signal;

/// Enough to be in transfer for seconds at [`SLOW_MBIT`].
const FILL_MIB: u32 = 96;
const SLOW_MBIT: u32 = 200;
/// The agents go on to ask each other whether they are there, a few bytes a second.
const PINGS_BYTES: u64 = 4096;
/// Every order has effect within this (I8).
const EFFECT_LIMIT: Duration = Duration::from_secs(1);

fn run(test: impl FnOnce() -> Result<()>) {
    if require::skip(require::missing()) {
        return;
    }
    test().unwrap_or_else(|error| panic!("{error:?}"));
}

/// `outrider …` must fail with this code and exit code.
fn refused(fleet: &Fleet, arguments: &[&str], code: &str, exit: i32) -> Result<()> {
    let mut all = arguments.to_vec();
    all.extend(["--output", "json"]);
    let answer = fleet.outrider(&all)?;
    let seen = answer.json().with_context(|| format!("outrider {arguments:?}"))?;
    let error = seen.get("error").unwrap_or(&seen["problem"]);
    ensure!(error["code"] == code, "outrider {arguments:?}: expected {code}, got {seen}");
    ensure!(
        answer.code() == Some(exit),
        "outrider {arguments:?}: expected exit {exit}, got {:?}",
        answer.code()
    );
    let detail = error["detail"].as_str().unwrap_or_default();
    ensure!(detail.len() > 10, "outrider {arguments:?}: the error says nothing: {seen}");
    Ok(())
}

/// Bytes of the stream that the target has so far, by its own last event.
fn transferred(trial: &Trial, id: &str) -> Result<u64> {
    Ok(trial.fleet.migration(id)?["transferred_bytes"].as_u64().unwrap_or(0))
}

fn in_transfer(trial: &Trial) -> Result<String> {
    trial.fleet.net.limit_migration_mbit(SLOW_MBIT)?;
    let id = trial.migrate()?;
    LogWatch::from_start(&trial.fleet, HostA)?.event("connected")?;
    Ok(id)
}

#[test]
fn suspend_holds_the_stream_and_resume_lets_it_go_on() {
    run(|| {
        let trial = Trial::start("suspended", FILL_MIB)?;
        let id = in_transfer(&trial)?;
        let started = Instant::now();
        trial.fleet.json(&["migration", "suspend", &id])?;
        ensure!(started.elapsed() < EFFECT_LIMIT * 2, "suspend took {:?}", started.elapsed());
        process::wait_for("the migration to be suspended", EFFECT_LIMIT, || {
            Ok((trial.fleet.migration(&id)?["suspended"] == true).then_some(()))
        })?;
        // What was on its way when the order came has arrived by now; from here on nothing may move.
        std::thread::sleep(EFFECT_LIMIT);
        let before = transferred(&trial, &id)?;
        std::thread::sleep(EFFECT_LIMIT * 2);
        let moved = transferred(&trial, &id)? - before;
        ensure!(moved < PINGS_BYTES, "{moved} bytes moved while suspended");
        trial.observer.wait_running_on(&[HostA], EFFECT_LIMIT)?;
        trial.fleet.json(&["migration", "resume", &id])?;
        let shown = trial.wait_tidy(&id)?;
        ensure!(shown["state"] == "completed", "after resume: {shown}");
        trial.judge().map(|_| ())
    });
}

#[test]
fn terminate_leaves_the_guest_on_the_source_and_nothing_else() {
    run(|| {
        let trial = Trial::start("terminated", FILL_MIB)?;
        let id = in_transfer(&trial)?;
        let started = Instant::now();
        trial.fleet.json(&["migration", "terminate", &id])?;
        let shown = trial.wait_tidy(&id)?;
        eprintln!("terminated and tidy after {:?}", started.elapsed());
        ensure!(shown["state"] == "terminated", "after terminate: {shown}");
        trial.observer.wait_running_on(&[HostA], EFFECT_LIMIT)?;
        ensure!(trial.qemus(HostB).is_empty(), "a QEMU is left on the target");
        // The reservation and the one-open-migration rule are free again.
        trial.migrate_again(HostA)?;
        trial.judge().map(|_| ())
    });
}

#[test]
fn terminate_works_while_suspended() {
    run(|| {
        let trial = Trial::start("suspended-terminated", FILL_MIB)?;
        let id = in_transfer(&trial)?;
        trial.fleet.json(&["migration", "suspend", &id])?;
        trial.fleet.json(&["migration", "terminate", &id])?;
        let shown = trial.wait_tidy(&id)?;
        ensure!(shown["state"] == "terminated", "after terminate: {shown}");
        trial.observer.wait_running_on(&[HostA], EFFECT_LIMIT)?;
        trial.judge().map(|_| ())
    });
}

#[test]
fn mistakes_are_named_and_lose_nothing() {
    run(|| {
        let trial = Trial::start("mistaken", FILL_MIB)?;
        let fleet = &trial.fleet;
        let vm = "mistaken";
        refused(fleet, &["migrate", "nobody", "--to", "host-b"], "unknown-vm", 2)?;
        refused(fleet, &["migrate", vm, "--to", "host-z"], "unknown-host", 2)?;
        refused(fleet, &["migrate", vm, "--to", "host-a"], "target-is-source", 3)?;
        refused(fleet, &["migrate", vm, "--to", "host-b", "--from", "host-b"], "vm-not-on-source", 3)?;
        refused(fleet, &["vm", "start", vm, "--on", "host-b"], "vm-already-running", 3)?;
        refused(fleet, &["vm", "show", "nobody"], "unknown-vm", 2)?;
        refused(fleet, &["host", "show", "nobody"], "unknown-host", 2)?;
        refused(fleet, &["migration", "show", "m-00000000000000000000000000000000"], "unknown-migration", 2)?;
        let usage = fleet.outrider(&["migrate", vm])?;
        ensure!(usage.code() == Some(2), "a missing argument must be a usage error: {usage:?}");
        let id = in_transfer(&trial)?;
        refused(fleet, &["migrate", vm, "--to", "host-b"], "migration-in-flight", 3)?;
        refused(fleet, &["vm", "stop", vm], "migration-in-flight", 3)?;
        let shown = trial.wait_tidy(&id)?;
        ensure!(shown["state"] == "completed", "the first migration: {shown}");
        refused(fleet, &["migration", "terminate", &id], "too-late", 4)?;
        trial.judge().map(|_| ())
    });
}

#[test]
fn a_manager_that_is_not_there_is_unreachable_and_costs_no_vm() {
    run(|| {
        let mut trial = Trial::start("orphaned", 0)?;
        trial.fleet.kill(Manager)?;
        refused(&trial.fleet, &["vm", "list"], "manager-unreachable", 6)?;
        refused(&trial.fleet, &["migrate", "orphaned", "--to", "host-b"], "manager-unreachable", 6)?;
        trial.observer.wait_running_on(&[HostA], EFFECT_LIMIT)?;
        trial.fleet.start(Manager)?;
        process::wait_for("the hosts to be back", Duration::from_secs(10), || {
            let host = trial.fleet.json(&["host", "show", "host-b"])?;
            Ok((host["state"] == "connected" || host["host"]["state"] == "connected").then_some(()))
        })?;
        process::wait_for("host-a to be back", Duration::from_secs(10), || {
            let host = trial.fleet.json(&["host", "show", "host-a"])?;
            Ok((host["state"] == "connected" || host["host"]["state"] == "connected").then_some(()))
        })?;
        trial.migrate_again(HostA)?;
        trial.judge().map(|_| ())
    });
}

#[test]
fn daemons_say_what_keeps_them_from_starting() {
    run(|| {
        let fleet = Fleet::up(&Programs::locate()?)?;
        let folder = fleet.net.node(Manager).folder()?;
        let programs = Programs::locate()?;
        let says = |arguments: &[&str], exit: i32, words: &[&str]| -> Result<()> {
            let mut command: Command = fleet.net.node(Manager).command(&programs.outrider);
            let output = command.args(arguments).output().context("running a daemon")?;
            let said = format!(
                "{}{}",
                String::from_utf8_lossy(&output.stderr),
                String::from_utf8_lossy(&output.stdout)
            );
            ensure!(output.status.code() == Some(exit), "{arguments:?}: {:?}: {said}", output.status);
            for word in words {
                ensure!(said.contains(word), "{arguments:?} does not say {word:?}: {said}");
            }
            Ok(())
        };
        let bad = folder.join("bad.toml");
        std::fs::write(&bad, "operator_listn = \"127.0.0.1:1\"\n")?;
        let bad = bad.display().to_string();
        says(&["manager", "run", "--config", &bad], 2, &["operator_listn", "bad.toml", "bad-configuration"])?;
        says(&["host", "run", "--config", &bad], 2, &["operator_listn", "bad.toml", "bad-configuration"])?;
        // The running manager has the ports already.
        let second = folder.join("second").display().to_string();
        let taken = ["manager", "run", "--state", &second, "--operator-listen", "10.81.0.1:7443"];
        says(&taken, 4, &["10.81.0.1:7443", "address-in-use"])?;
        Ok(())
    });
}

#[test]
fn a_host_without_qemu_or_with_another_kernel_refuses_to_start_the_vm() {
    run(|| {
        let mut fleet = Fleet::up(&Programs::locate()?)?;
        fleet.enrol(HostA)?;
        let config = fleet.net.node(HostA).folder()?.join("config.toml");
        let text = std::fs::read_to_string(&config)?;
        std::fs::write(&config, format!("qemu_binary = \"/nonexistent/qemu\"\n{text}"))?;
        let image = GuestImage::locate()?;
        let kernel = fleet.net.run_folder().join("vmlinuz");
        std::fs::copy(&image.kernel, &kernel)?;
        let guest = Guest::new("unstartable");
        fleet.define(&guest, &GuestImage { kernel: kernel.clone(), ..image })?;
        if fleet.start(HostA).is_ok() {
            refused(&fleet, &["vm", "start", "unstartable", "--on", "host-a"], "missing-program", 4)?;
            fleet.signal(HostA, Signal::TERM)?;
            fleet.wait_end(HostA, Duration::from_secs(10))?;
        } else {
            ensure!(fleet.log(HostA).contains("missing-program"), "the daemon says: {}", fleet.log(HostA));
            fleet.kill(HostA)?;
        }
        std::fs::write(&config, text)?;
        fleet.start(HostA)?;
        let mut bytes = std::fs::read(&kernel)?;
        bytes.push(0);
        std::fs::write(&kernel, bytes)?;
        let answer = fleet.outrider(&["vm", "start", "unstartable", "--on", "host-a", "--output", "json"])?;
        ensure!(!answer.status.success(), "a VM was started with another kernel");
        let said = answer.json()?;
        ensure!(said["error"]["detail"].as_str().unwrap_or_default().contains("vmlinuz"), "{said}");
        let vm = fleet.json(&["vm", "show", "unstartable"])?;
        ensure!(vm.to_string().contains("\"defined\""), "the VM is {vm}");
        Ok(())
    });
}

#[test]
fn a_full_disk_under_the_registry_refuses_and_recovers() {
    run(|| {
        let net = outrider_lab::net::Net::up()?;
        let state = net.run_folder().join("manager").join("state");
        std::fs::create_dir_all(&state)?;
        let folder = state.display().to_string();
        process::run(Command::new("mount").args([
            "-t",
            "tmpfs",
            "-o",
            "size=2m,mode=0700",
            "tmpfs",
            &folder,
        ]))?;
        let outcome = full_disk(net, &state);
        // The teardown removes the folder; the mount must be gone before.
        outcome
    });
}

fn full_disk(net: outrider_lab::net::Net, state: &std::path::Path) -> Result<()> {
    let mut fleet = Fleet::on(net, &Programs::locate()?)?;
    let check = |fleet: &Fleet| -> Result<()> {
        let filler = state.join("filler");
        // Fills to the last byte; that it can't write it all is the point.
        let _full = std::fs::write(&filler, vec![1_u8; 4 << 20]);
        let image = GuestImage::locate()?;
        let mut last = String::new();
        for number in 0..200 {
            let answer = fleet.define(&Guest::new(&format!("full-{number}")), &image);
            if let Err(error) = answer {
                last = format!("{error:#}");
                break;
            }
        }
        ensure!(last.contains("registry-unavailable"), "with a full disk: {last:?}");
        fleet.json(&["vm", "list"]).context("reading must go on")?;
        std::fs::remove_file(&filler)?;
        fleet.define(&Guest::new("room-again"), &image).context("after room is back")?;
        let audit = fleet.json(&["audit", "verify"])?;
        ensure!(audit["verified"] == true, "the audit log after a full disk: {audit}");
        Ok(())
    };
    let outcome = check(&fleet);
    fleet.kill(Manager)?;
    process::run(Command::new("umount").arg(state))?;
    outcome
}
