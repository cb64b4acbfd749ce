//! The journey of the demo, step by step, as an admin and an operator would take it.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::evidence::Evidence;
use super::sabotage::{self, Sabotage};
use super::{Narrator, Options, Output};
use crate::capture::{self, Capture, Captured, Needle};
use crate::client::{self, Client};
use crate::fleet::{Fleet, Guest, Programs};
use crate::guest::GuestImage;
use crate::net::{self, Machine, Net};
use crate::observer::Observer;
use crate::process;

/// The guest of the demo.
const VM: &str = "demo-guest";
/// Boot to serving, on a loaded machine.
const BOOT_LIMIT: Duration = Duration::from_secs(90);
/// A file of this size holds the transfer of the largest guest that the demo makes sense for.
const CAPTURE_MAX_BYTES: u64 = 8 << 30;
/// How many requests the client makes before and after the migration.
const WARM_UP_REQUESTS: u64 = 30;
/// A copy that executes is seen within this.
const SEEN_WITHIN: Duration = Duration::from_millis(100);
/// A client that gets no answer for so long is not going to get one.
const CLIENT_LIMIT: Duration = Duration::from_secs(30);
/// From the request to the end; the migration itself takes a few seconds.
const MIGRATION_LIMIT: Duration = Duration::from_secs(120);

/// Lays the lab, takes the journey, tears everything down.
pub(super) fn travel(options: &Options, say: &Narrator) -> Result<Evidence> {
    let image = GuestImage::locate()?;
    let programs = Programs::locate()?;
    say.say("laying namespaces: manager, host-a, host-b, client; control, migration and guest networks");
    let net = Net::up()?;
    let prefix = net.prefix().to_owned();
    let outcome = enrolled(options, net, &programs, say).and_then(|mut fleet| {
        let outcome = cross(options, say, &image, &mut fleet).inspect_err(|_| complain(&fleet));
        Ok((fleet, outcome?))
    });
    let (fleet, mut evidence) = outcome?;
    say.say("tearing down");
    if options.sabotage.contains(&Sabotage::Leftovers) {
        evidence.leftovers = net::leftovers(&prefix);
        drop(fleet);
    } else {
        drop(fleet);
        evidence.leftovers = net::leftovers(&prefix);
    }
    Ok(evidence)
}

/// Manager up, both hosts enrolled, joined and connected.
fn enrolled(options: &Options, net: Net, programs: &Programs, say: &Narrator) -> Result<Fleet> {
    say.say("starting the control manager (SQLite)");
    let mut fleet = Fleet::on(net, programs)?;
    for host in Machine::HOSTS {
        say.say(&format!(
            "enrolling {} as an admin, by its TPM: host ek, host add, host join, host run",
            host.name()
        ));
        let bare = host == Machine::HostB && options.sabotage.contains(&Sabotage::NoTpm);
        let tpm = if bare { Ok(()) } else { fleet.give_tpm(host) };
        let enrolled = tpm.and_then(|()| fleet.enrol(host)).and_then(|()| fleet.start(host));
        enrolled.inspect_err(|_| complain(&fleet))?;
    }
    Ok(fleet)
}

/// The daemons' last words: what a person needs when the demo fails.
fn complain(fleet: &Fleet) {
    net::yield_to_signal();
    for machine in [Machine::Manager, Machine::HostA, Machine::HostB] {
        eprintln!("--- last lines of {}'s log\n{}", machine.name(), fleet.log(machine));
    }
}

fn cross(options: &Options, say: &Narrator, image: &GuestImage, fleet: &mut Fleet) -> Result<Evidence> {
    let broken = |sabotage| options.sabotage.contains(&sabotage);
    let guest = Guest { memory_mib: options.memory_mib, ..Guest::new(VM) };
    say.say("starting the guest on host-a: vm define, vm start");
    fleet.define(&guest, image)?;
    fleet.start_vm(&guest, Machine::HostA)?;
    let observer = Observer::start(&fleet.net, guest.uuid)?;
    let secret = wait_secret(fleet)?;
    say.say(
        "the guest serves TCP and holds a secret; a client talks to it, an observer watches its counter page",
    );
    let client = Client::start(fleet.net.node(Machine::Client), client::guest_address())?;
    wait_requests(&client, WARM_UP_REQUESTS)?;
    observer.wait_running_on(&[Machine::HostA], CLIENT_LIMIT)?;
    let file = fleet.net.run_folder().join("migration.pcap");
    let capture = if broken(Sabotage::NoCapture) {
        None
    } else {
        Some(Capture::start(&fleet.net, &file, CAPTURE_MAX_BYTES)?)
    };

    say.say("migrating: outrider migrate demo-guest --to host-b");
    let migration = migrate(options, fleet)?;

    let _second_copy = sabotage::after_migration(options, fleet, &guest, image, &secret, &observer)?;
    let before = client.summary().requests;
    let disturbed = [Sabotage::Client, Sabotage::StoppedTarget, Sabotage::SecondCopy, Sabotage::KilledTarget];
    if !disturbed.into_iter().any(broken) {
        wait_requests(&client, before + WARM_UP_REQUESTS)?;
    }
    // Long enough for a copy that still executes to be seen: the observer looks every millisecond.
    std::thread::sleep(SEEN_WITHIN);
    let running_on = observer.running_on(SEEN_WITHIN);
    let again = client::secret(fleet.net.node(Machine::Client), client::guest_address());
    let client = client.finish();
    let observed = observer.stop();
    say.say("searching the capture of the migration network");
    let captured = capture.map(Capture::finish).transpose()?;
    let (searched, captured) = search(captured, &guest, &secret)?;
    say.say("verifying the audit log");
    let audit = fleet.outrider(&["audit", "verify", "--output", "json"])?;
    let audit =
        audit.json().unwrap_or_else(|e| json!({"verified": false, "entries": 0, "detail": format!("{e:#}")}));
    Ok(Evidence {
        migration,
        client,
        observed,
        running_on,
        secret_intact: again.is_ok_and(|answer| answer == secret),
        captured_bytes: captured.as_ref().map_or(0, |c| c.bytes),
        uncaptured_frames: captured.as_ref().map_or(0, |c| c.unwritten_frames),
        searched,
        audit,
        leftovers: Vec::new(),
    })
}

fn search(
    captured: Option<Captured>,
    guest: &Guest,
    secret: &str,
) -> Result<(capture::SearchReport, Option<Captured>)> {
    let Some(captured) = captured else { return Ok((capture::SearchReport::default(), None)) };
    let mut needles = vec![Needle::new("secret", secret), Needle::qemu_magic()];
    needles.extend(Needle::vm_identity(&guest.name, guest.uuid));
    let searched = capture::search(&captured.path, &needles)?;
    Ok((searched, Some(captured)))
}

/// The guest's secret, once it serves.
fn wait_secret(fleet: &Fleet) -> Result<String> {
    process::wait_for("the guest to serve", BOOT_LIMIT, || {
        Ok(client::secret(fleet.net.node(Machine::Client), client::guest_address()).ok())
    })
}

fn wait_requests(client: &Client, at_least: u64) -> Result<()> {
    process::wait_for("the client's requests to be answered", CLIENT_LIMIT, || {
        let summary = client.summary();
        ensure!(summary.connection_survived, "the client: {}", summary.error.unwrap_or_default());
        Ok((summary.requests >= at_least).then_some(()))
    })
}

/// Runs the operator's command (on a terminal with its live progress) and returns the migration in the end.
fn migrate(options: &Options, fleet: &mut Fleet) -> Result<Value> {
    if options.sabotage.contains(&Sabotage::LostTarget) {
        fleet.kill(Machine::HostB)?;
    }
    if options.sabotage.contains(&Sabotage::KilledTarget) {
        let id = fleet.migrate(VM, Machine::HostB)?;
        sabotage::kill_target(fleet)?;
        let ends = ["completed", "failed", "terminated", "refused"];
        return fleet.wait_migration(&id, &ends, MIGRATION_LIMIT);
    }
    let mut command = fleet.command(&["migrate", VM, "--to", Machine::HostB.name()]);
    if options.output == Output::Json {
        command.stdout(std::io::stderr());
    }
    let status = command.stdin(std::process::Stdio::null()).status().context("running outrider migrate")?;
    let list = fleet.json(&["migration", "list"])?;
    let rows = list["migrations"].as_array().or_else(|| list.as_array()).cloned().unwrap_or_default();
    let id = rows.first().and_then(|row| row["id"].as_str()).context("no migration is listed")?.to_owned();
    let shown = fleet.migration(&id)?;
    ensure!(
        status.success() == (shown["state"] == "completed"),
        "outrider migrate ended with {status}, and the migration is {}",
        shown["state"]
    );
    Ok(shown)
}
