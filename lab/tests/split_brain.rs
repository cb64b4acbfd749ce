//! Plain QEMU's split brain, seen from outside; and an undisturbed migration, seen the same way.
//!
//! Without these, "never two copies" elsewhere would prove nothing: an observer must be able to see two.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use outrider_lab::client::{self, Client};
use outrider_lab::guest::{GuestImage, GuestLoad};
use outrider_lab::net::{self, Machine, Net};
use outrider_lab::observer::{Observer, Report};
use outrider_lab::plain::Pair;
use outrider_lab::process;
use outrider_lab::require;
use outrider_lab::vm::VmOptions;
use rustix::process::{Pid, Signal};
use serde_json::json;

const RUN_LIMIT: Duration = Duration::from_secs(60);

struct Scene {
    observer: Observer,
    pair: Pair,
    net: Net,
}

fn scene() -> Scene {
    scene_with(VmOptions::new("plain-guest"))
}

fn scene_with(options: VmOptions) -> Scene {
    let net = Net::up().unwrap();
    let image = GuestImage::locate().unwrap();
    let observer = Observer::start(&net, options.uuid).unwrap();
    let pair = Pair::start(&net, &image, &options).unwrap();
    observer.wait_running_on(&[Machine::HostA], RUN_LIMIT).unwrap();
    Scene { observer, pair, net }
}

impl Scene {
    /// Both copies run, and go on running: this is no matter of milliseconds.
    fn end_when_two_have_run(self) -> Report {
        self.observer.wait_running_on(&[Machine::HostA, Machine::HostB], RUN_LIMIT).unwrap();
        process::wait_for("a long overlap", RUN_LIMIT, || {
            Ok((self.observer.report().verdict.longest_overlap_ms > 300.0).then_some(()))
        })
        .unwrap();
        self.end()
    }

    /// Ends everything and returns what was seen; nothing may be left behind.
    fn end(self) -> Report {
        let prefix = self.net.prefix().to_owned();
        let report = self.observer.stop();
        drop(self.pair);
        drop(self.net);
        assert_eq!(net::leftovers(&prefix), Vec::<String>::new());
        println!("{}", serde_json::to_string_pretty(&report).unwrap());
        report
    }
}

#[test]
fn an_undisturbed_plain_migration_is_one_copy() {
    if require::skip(require::missing()) {
        return;
    }
    let mut scene = scene();
    let client = Client::start(scene.net.node(Machine::Client), client::guest_address()).unwrap();
    let outcome = scene.pair.migrate().unwrap();
    scene.observer.wait_running_on(&[Machine::HostB], RUN_LIMIT).unwrap();
    let answered = client.summary().requests;
    process::wait_for("an answer from host-b", RUN_LIMIT, || {
        Ok((client.summary().requests > answered).then_some(()))
    })
    .unwrap();
    let felt = client.finish();
    let report = scene.end();
    println!("{outcome:?} {felt:?}");
    assert_eq!(report.verdict.copies, 1);
    assert!(report.verdict.counter_monotonic);
    assert!(felt.connection_survived);
    assert_eq!(report.processes.len(), 2);
    // The gap seen from outside holds the downtime.
    assert!(report.verdict.longest_gap_ms + 5.0 > outcome.stop_to_resume_ms);
    // Watching must not disturb what is watched: under 15 % of a core.
    assert!(report.sampler_cpu_ms * 100 < report.watched_ms * 15);
}

#[test]
fn an_honest_relay_changes_nothing() {
    if require::skip(require::missing()) {
        return;
    }
    let mut scene = scene();
    scene.pair.migrate_through_relay().unwrap();
    scene.observer.wait_running_on(&[Machine::HostB], RUN_LIMIT).unwrap();
    let report = scene.end();
    assert_eq!((report.verdict.copies, report.verdict.counter_monotonic), (1, true));
}

#[test]
fn a_busy_guest_whose_pages_are_sent_many_times_is_one_copy() {
    if require::skip(require::missing()) {
        return;
    }
    let load = GuestLoad { fill_mib: 32, working_set_mib: 32, rate_mib_per_s: 100, writes_disk: false };
    let mut scene = scene_with(VmOptions { load, ..VmOptions::new("busy-guest") });
    // Slow enough that the counter page reaches the target in pass after pass before the guest does.
    let slowly = json!({"max-bandwidth": 150 << 20, "downtime-limit": 100});
    scene.pair.source.qmp.execute("migrate-set-parameters", slowly).unwrap();
    scene.pair.migrate().unwrap();
    let passes = scene.pair.source.qmp.execute("query-migrate", json!({})).unwrap();
    assert!(passes["ram"]["dirty-sync-count"].as_u64().unwrap() >= 3, "{passes}");
    scene.observer.wait_running_on(&[Machine::HostB], RUN_LIMIT).unwrap();
    let report = scene.end();
    assert_eq!((report.verdict.copies, report.verdict.counter_monotonic), (1, true));
}

#[test]
fn a_frozen_qemu_does_not_run_and_a_thawed_one_does() {
    if require::skip(require::missing()) {
        return;
    }
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(16 << 20).unwrap();
    let load = GuestLoad { writes_disk: true, ..GuestLoad::default() };
    let options = VmOptions { load, disk: Some(disk.path().to_owned()), ..VmOptions::new("frozen-guest") };
    let scene = scene_with(options);
    let node = scene.net.node(Machine::Client);
    process::wait_for("durable writes to the disk", RUN_LIMIT, || {
        let stat = client::ask(node, client::guest_address(), "stat")?;
        Ok((!stat.contains("disk_sequence=0 ") && stat.ends_with("disk_errors=0")).then_some(()))
    })
    .unwrap();

    let qemu = Pid::from_raw(scene.pair.source.pid()).unwrap();
    rustix::process::kill_process(qemu, Signal::STOP).unwrap();
    process::wait_for("an open gap", RUN_LIMIT, || {
        let gap = scene.observer.report().verdict.open_gap_ms;
        Ok(gap.is_some_and(|gap| gap > 500.0).then_some(()))
    })
    .unwrap();
    assert!(scene.observer.running_on(Duration::from_millis(300)).is_empty());
    assert_eq!(scene.observer.report().processes[0].vcpu_state, Some('T'));
    rustix::process::kill_process(qemu, Signal::CONT).unwrap();
    scene.observer.wait_running_on(&[Machine::HostA], RUN_LIMIT).unwrap();
    let report = scene.end();
    assert_eq!((report.verdict.copies, report.verdict.counter_monotonic), (1, true));
    assert!(report.verdict.longest_gap_ms > 500.0);
}

#[test]
fn a_lost_reverse_direction_makes_two_copies() {
    if require::skip(require::missing()) {
        return;
    }
    let mut scene = scene();
    scene.pair.lose_reverse_direction().unwrap();
    let report = scene.end_when_two_have_run();
    assert_eq!(report.verdict.copies, 2);
}

#[test]
fn a_withheld_tail_and_a_cancel_make_two_copies() {
    if require::skip(require::missing()) {
        return;
    }
    let mut scene = scene();
    scene.pair.withhold_tail_then_cancel().unwrap();
    let report = scene.end_when_two_have_run();
    assert_eq!(report.verdict.copies, 2);
}
