//! Two agents between real QEMU processes.

#![allow(clippy::unwrap_used)]

#[path = "../../engine/tests/support/skip.rs"]
mod skip;
#[path = "../../engine/tests/support/mod.rs"]
mod streams;
mod support;

use engine::inspect::learn;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;
use support::{Agent, PATIENCE, Pair};
use tempfile::TempDir;
use types::Nonce;
use types::agent::{Descriptor, EndedBy, FromAgent, ToAgent};

const MACHINE: &str = "pc";
const MEMORY_MIB: u32 = 64;

/// A real QEMU, spoken to over its standard streams.
struct Qemu {
    process: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
    folder: TempDir,
}

impl Qemu {
    /// Nothing when this machine has no QEMU.
    fn start(incoming: bool) -> Option<Self> {
        Self::start_of(Command::new(streams::QEMU), MACHINE, incoming)
    }

    /// The same of another version and machine type.
    fn start_of(mut command: Command, machine: &str, incoming: bool) -> Option<Self> {
        command.args(streams::qemu_args(machine, MEMORY_MIB)).args(["-qmp", "stdio"]);
        if incoming {
            command.args(["-incoming", "defer"]);
        }
        let mut process =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().ok()?;
        let (to, from) = (process.stdin.take().unwrap(), BufReader::new(process.stdout.take().unwrap()));
        let mut qemu = Self { process, to, from, folder: tempfile::tempdir().unwrap() };
        qemu.command("qmp_capabilities", &Value::Null).unwrap();
        let capabilities = json!({"capabilities": [{"capability": "return-path", "state": true}]});
        qemu.command("migrate-set-capabilities", &capabilities).unwrap();
        Some(qemu)
    }

    /// The command's value, or the description of its error; an error too when QEMU is gone.
    fn command(&mut self, name: &str, arguments: &Value) -> Result<Value, String> {
        self.to.write_all(&wire::qmp::command(name, arguments, 1)).map_err(|e| e.to_string())?;
        let mut line = Vec::new();
        loop {
            line.clear();
            if self.from.read_until(b'\n', &mut line).map_err(|e| e.to_string())? == 0 {
                return Err("QEMU is gone".to_owned());
            }
            match wire::qmp::Message::parse(&line).unwrap() {
                wire::qmp::Message::Return { value, .. } => return Ok(value),
                wire::qmp::Message::Error { description, .. } => return Err(description),
                _ => {}
            }
        }
    }

    fn migration_status(&mut self) -> String {
        match self.command("query-migrate", &Value::Null) {
            Ok(value) => value["status"].as_str().unwrap_or("none").to_owned(),
            Err(gone) => gone,
        }
    }

    fn wait_for_status(&mut self, wanted: &[&str]) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.migration_status();
            if wanted.contains(&status.as_str()) {
                return status;
            }
            assert!(Instant::now() < deadline, "QEMU's migration stayed {status:?}, wanted {wanted:?}");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }

    fn run_state(&mut self) -> String {
        self.command("query-status", &Value::Null).unwrap()["status"].as_str().unwrap().to_owned()
    }

    fn socket_path(&self) -> PathBuf {
        self.folder.path().join("migration")
    }

    /// The socket on which this QEMU takes a stream.
    fn receive(&mut self) -> UnixStream {
        let uri = format!("unix:{}", self.socket_path().display());
        self.command("migrate-incoming", &json!({"uri": uri, "exit-on-error": false})).unwrap();
        UnixStream::connect(self.socket_path()).unwrap()
    }

    /// The socket on which this QEMU sends its stream.
    fn send(&mut self) -> UnixStream {
        self.send_all(0).remove(0)
    }

    /// The sockets on which this QEMU sends its stream, the main one first.
    fn send_all(&mut self, channels: u16) -> Vec<UnixStream> {
        let listener = UnixListener::bind(self.socket_path()).unwrap();
        let uri = format!("unix:{}", self.socket_path().display());
        self.command("migrate", &json!({"uri": uri})).unwrap();
        (0..=channels).map(|_| listener.accept().unwrap().0).collect()
    }

    fn use_multifd(&mut self, channels: u16, compression: &str) {
        let capability = json!({"capabilities": [{"capability": "multifd", "state": true}]});
        self.command("migrate-set-capabilities", &capability).unwrap();
        let method = if compression.is_empty() { "none" } else { compression };
        let parameters = json!({"multifd-channels": channels, "multifd-compression": method});
        self.command("migrate-set-parameters", &parameters).unwrap();
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _may_have_ended = self.process.kill();
        let _status = self.process.wait();
    }
}

/// The recorded stream and a QEMU that could take it; nothing, said aloud, without QEMU.
fn prepared() -> Option<(Vec<u8>, Qemu)> {
    let pair =
        streams::record(MACHINE, MEMORY_MIB).map(|s| streams::with_return_path(&s)).zip(Qemu::start(true));
    if pair.is_none() {
        skip::skip(&format!("no {} on this machine", streams::QEMU));
    }
    pair
}

#[test]
fn a_real_qemu_loads_what_was_recorded_and_its_acknowledgement_is_held() {
    let Some((stream, mut qemu)) = prepared() else { return };
    let inventory = learn(&stream, "qemu/test").unwrap();
    let mut pair = Pair::connect(&inventory, |_| {});
    pair.target.attach(Descriptor::Hypervisor, qemu.receive());
    pair.attach_fake_source();
    pair.write(&stream).join().unwrap();
    pair.target.wait(|m| matches!(m, FromAgent::Accepted { .. }));
    acknowledged(&mut pair.target);
    assert_eq!(qemu.wait_for_status(&["completed", "failed"]), "completed");
    // The recorded VM had never run; one that had would be paused.
    assert_eq!(qemu.run_state(), "prelaunch");
}

/// QEMU may acknowledge before its agent has told that it was given everything.
fn acknowledged(target: &mut Agent) {
    let held = |m: &FromAgent| matches!(m, FromAgent::AcknowledgementHeld { status: 0 });
    if !target.said.iter().any(held) {
        target.wait(held);
    }
}

/// From the end of the stream to the guest that runs on the target: what the daemons would order.
fn hand_over(pair: &mut Pair, to: &mut Qemu) {
    let left = match pair.source.wait(|m| matches!(m, FromAgent::EndOfStream { .. })) {
        FromAgent::EndOfStream { evidence, .. } => evidence,
        _ => unreachable!("waited for it"),
    };
    let nonce = Nonce::from_bytes([3; 16]);
    pair.source.send(&ToAgent::Prove { nonce });
    let proof = pair.source.wait(|m| matches!(m, FromAgent::Proven { .. } | FromAgent::NotProven { .. }));
    assert_eq!(proof, FromAgent::Proven { nonce });
    pair.source.send(&ToAgent::Frozen);
    let accepted = pair.target.wait(|m| matches!(m, FromAgent::Accepted { .. }));
    assert!(matches!(accepted, FromAgent::Accepted { evidence, .. } if evidence == left), "{accepted:?}");
    acknowledged(&mut pair.target);
    assert_eq!(to.wait_for_status(&["completed", "failed"]), "completed");
    assert_eq!(to.run_state(), "paused");
    to.command("cont", &Value::Null).unwrap();
    assert_eq!(to.run_state(), "running");
}

/// The whole way between two real QEMUs, up to the point where the source would be destroyed.
#[test]
fn a_vm_moves_between_two_real_qemus() {
    let Some((recorded, mut to)) = prepared() else { return };
    let inventory = learn(&recorded, "qemu/test").unwrap();
    let mut from = Qemu::start(false).unwrap();
    from.command("cont", &Value::Null).unwrap();
    let mut pair = Pair::connect(&inventory, |_| {});
    pair.target.attach(Descriptor::Hypervisor, to.receive());
    pair.source.attach(Descriptor::Hypervisor, from.send());
    hand_over(&mut pair, &mut to);
    pair.target.send(&ToAgent::AnnounceRunning);
    pair.source.wait(|m| matches!(m, FromAgent::PeerRunning { .. }));
    // Without its acknowledgement the source's QEMU has not completed: it still waits.
    assert_eq!(from.migration_status(), "device");
}

/// Names the folder in whose `bin` and `share` an older QEMU is, 7.2.
const OLD_QEMU: &str = "OUTRIDER_OLD_QEMU";

fn old_qemu() -> Option<Command> {
    let folder = PathBuf::from(std::env::var_os(OLD_QEMU)?);
    let mut command = Command::new(folder.join("bin/qemu-system-x86_64"));
    for firmware in ["share/qemu", "share/seabios", "lib/ipxe/qemu"] {
        command.arg("-L").arg(folder.join(firmware));
    }
    Some(command)
}

/// The whole way over 1+N connections: QEMU's monitor answers between its connections, and both sides agree
/// on every lane.
fn move_over_lanes(start: impl Fn(bool) -> Qemu, recorded: &[u8], channels: u16, compression: &str) {
    let inventory = learn(recorded, "qemu/test").unwrap();
    let (mut from, mut to) = (start(false), start(true));
    for qemu in [&mut from, &mut to] {
        qemu.use_multifd(channels, compression);
    }
    from.command("cont", &Value::Null).unwrap();
    let mut pair = Pair::armed(&inventory, |claims| {
        claims.features.multifd_channels = channels;
        claims.features.compression = compression.to_owned();
    });
    for lane in 0..=channels {
        let (dialled, accepted) = support::tcp();
        pair.target.attach_lane(lane, Descriptor::Peer, &accepted);
        pair.source.attach_lane(lane, Descriptor::Peer, &dialled);
    }
    pair.source.wait(|m| matches!(m, FromAgent::Connected { .. }));
    pair.target.wait(|m| matches!(m, FromAgent::Connected { .. }));
    let uri = format!("unix:{}", to.socket_path().display());
    to.command("migrate-incoming", &json!({"uri": uri})).unwrap();
    for (lane, socket) in (0u16..).zip(from.send_all(channels)) {
        pair.source.attach_lane(lane, Descriptor::Hypervisor, socket);
    }
    for _ in 0..=channels {
        let wanted = pair.target.wait(|m| matches!(m, FromAgent::HypervisorWanted { .. }));
        let FromAgent::HypervisorWanted { channel } = wanted else { unreachable!("waited for it") };
        let socket = UnixStream::connect(to.socket_path()).unwrap();
        pair.target.attach_lane(channel, Descriptor::Hypervisor, socket);
        // It answers before it has its next connection; that its first bytes are there by then is shown in
        // `lanes`.
        to.command("query-status", &Value::Null).unwrap();
    }
    hand_over(&mut pair, &mut to);
    // QEMU closes its multifd connections by now; nothing ends because of that.
    pair.target.progress();
    pair.target.progress();
    pair.target.send(&ToAgent::AnnounceRunning);
    pair.source.wait(|m| matches!(m, FromAgent::PeerRunning { .. }));
    // The source still waits for its acknowledgement (7.2 calls that active).
    assert!(["device", "active"].contains(&from.migration_status().as_str()));
}

#[test]
fn a_vm_moves_between_two_real_qemus_over_several_lanes() {
    let Some((recorded, _)) = prepared() else { return };
    for (channels, compression) in [(1, ""), (2, ""), (4, "zlib"), (2, "zstd"), (16, "")] {
        move_over_lanes(|incoming| Qemu::start(incoming).unwrap(), &recorded, channels, compression);
    }
}

/// Here only the order of its connections tells QEMU which is the main one.
#[test]
fn a_vm_moves_between_two_older_qemus_over_several_lanes() {
    if old_qemu().is_none() {
        skip::skip(&format!("{OLD_QEMU} names no folder with an older QEMU"));
        return;
    }
    let machine = "pc-i440fx-7.2";
    let start = |incoming| Qemu::start_of(old_qemu().unwrap(), machine, incoming).unwrap();
    let recorded = streams::with_return_path(&record_old(start(false)));
    for (channels, compression) in [(2, ""), (4, "zlib"), (2, "zstd")] {
        move_over_lanes(start, &recorded, channels, compression);
    }
}

/// The stream of a paused VM, on one connection.
fn record_old(mut qemu: Qemu) -> Vec<u8> {
    let off = json!({"capabilities": [{"capability": "return-path", "state": false}]});
    qemu.command("migrate-set-capabilities", &off).unwrap();
    let mut stream = Vec::new();
    std::io::Read::read_to_end(&mut qemu.send(), &mut stream).unwrap();
    stream
}

/// What stock QEMU would accept, or crash on, never gets to it: every row of the table, through real agents.
#[test]
fn no_mutation_is_loaded_by_a_real_qemu() {
    let Some((stream, _)) = prepared() else { return };
    let inventory = learn(&stream, "qemu/test").unwrap();
    let mut rows = 0;
    for mutation in streams::mutations(&stream) {
        let row = mutation.row;
        if streams::MORE_BEHIND_THE_END.contains(&row) {
            continue;
        }
        let mut qemu = Qemu::start(true).unwrap();
        let endless = streams::ENDLESS.contains(&row);
        let mut pair = Pair::connect(&inventory, |claims| {
            if endless {
                (claims.duration_budget_ms, claims.downtime_budget_ms) = (1500, 500);
            }
        });
        pair.target.attach(Descriptor::Hypervisor, qemu.receive());
        pair.attach_fake_source();
        let writer = pair.write(&mutation.bytes);
        if endless {
            pair.source.wait(|m| matches!(m, FromAgent::Ended { .. }));
        } else {
            let rejected = pair.target.wait(|m| matches!(m, FromAgent::Rejected { .. }));
            let FromAgent::Rejected { finding } = rejected else { unreachable!("waited for it") };
            assert_eq!(finding.rule, mutation.rule, "row {row}");
            pair.source.wait(|m| matches!(m, FromAgent::Ended { what: EndedBy::Peer, .. }));
        }
        writer.join().unwrap();
        let status =
            qemu.wait_for_status(&["completed", "failed", "QEMU is gone", "Broken pipe (os error 32)"]);
        assert_ne!(status, "completed", "row {row} was loaded");
        rows += 1;
    }
    println!("{rows} violations, none loaded");
    assert!(rows > 60, "only {rows} violations were tried");
}
