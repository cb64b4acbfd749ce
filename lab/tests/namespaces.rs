//! The lab's own ground: who reaches whom, that everything goes away, and that the capture sees what is there.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use outrider_lab::capture::{Capture, Captured, Needle, SearchReport, search};
use outrider_lab::client;
use outrider_lab::guest::GuestImage;
use outrider_lab::net::{self, Machine, Net};
use outrider_lab::plain::{Pair, Transport};
use outrider_lab::vm::VmOptions;
use outrider_lab::{process, require};

const LIMIT: Duration = Duration::from_secs(30);
const MAX_CAPTURE_BYTES: u64 = 1 << 30;

/// Whether a listener at `address` on one machine is reached from another.
fn reaches(net: &Net, from: Machine, to: Machine, address: &str) -> bool {
    let address: SocketAddr = format!("{address}:7000").parse().unwrap();
    let listener = net::inside(net.node(to).namespace(), move || Ok(TcpListener::bind(address)?));
    let _listener = listener.unwrap();
    let connect = move || Ok(TcpStream::connect_timeout(&address, Duration::from_secs(1))?);
    net::inside(net.node(from).namespace(), connect).is_ok()
}

#[test]
fn machines_meet_on_their_networks_only_and_commands_live_in_their_cgroups() {
    if require::skip(require::missing()) {
        return;
    }
    let net = Net::up().unwrap();
    let [a, b] = Machine::HOSTS;
    assert!(reaches(&net, a, Machine::Manager, &Machine::Manager.control_address()));
    assert!(reaches(&net, a, b, &b.control_address()));
    assert!(reaches(&net, b, a, &a.migration_address()));
    assert!(!reaches(&net, Machine::Manager, b, &b.migration_address()));
    assert!(!reaches(&net, Machine::Client, a, &a.control_address()));

    // A second net of the same name must not take the first one down.
    assert!(Net::up().is_err());
    assert!(reaches(&net, b, a, &a.migration_address()));

    let mut child = net.node(a).spawn("sleeper", "sleep", &["600"]).unwrap();
    let pid = i32::try_from(child.id()).unwrap();
    let own = |pid: &i32| process::command_line(*pid).is_some_and(|line| line.starts_with(b"sleep"));
    process::wait_for("the command", LIMIT, || Ok(own(&pid).then_some(()))).unwrap();
    assert!(net.node(a).cgroup().pids().contains(&pid));
    assert!(!net.node(b).cgroup().pids().contains(&pid));

    let prefix = net.prefix().to_owned();
    assert!(!net::leftovers(&prefix).is_empty());
    drop(net);
    assert_eq!(net::leftovers(&prefix), Vec::<String>::new());
    assert!(!child.wait().unwrap().success(), "the command was killed with its machine");
}

/// Time that this many bytes need from host-a to host-b in the migration network.
fn transfer(net: &Net, bytes: usize) -> Duration {
    let [a, b] = Machine::HOSTS;
    let address: SocketAddr = format!("{}:7001", b.migration_address()).parse().unwrap();
    let listener = net::inside(net.node(b).namespace(), move || Ok(TcpListener::bind(address)?)).unwrap();
    let mut sender = net::inside(net.node(a).namespace(), move || Ok(TcpStream::connect(address)?)).unwrap();
    let (mut receiver, _) = listener.accept().unwrap();
    let start = Instant::now();
    let reading = std::thread::spawn(move || std::io::copy(&mut receiver, &mut std::io::sink()).unwrap());
    sender.write_all(&vec![0; bytes]).unwrap();
    drop(sender);
    assert_eq!(reading.join().unwrap(), bytes as u64);
    start.elapsed()
}

#[test]
fn the_migration_network_can_be_made_slow() {
    if require::skip(require::missing()) {
        return;
    }
    let net = Net::up().unwrap();
    net.limit_migration_mbit(100).unwrap();
    // 8 MB at 100 Mbit/s take 640 ms, less the bucket.
    let slow = transfer(&net, 8_000_000);
    assert!(slow > Duration::from_millis(500), "{slow:?}");
}

/// Starts `outrider-lab up` and waits until it is up; its prefix is `or<pid>`.
fn lab_up() -> (Child, String) {
    let mut lab =
        Command::new(env!("CARGO_BIN_EXE_outrider-lab")).arg("up").stdout(Stdio::piped()).spawn().unwrap();
    let lines = BufReader::new(lab.stdout.take().unwrap()).lines();
    let up = lines.map_while(Result::ok).any(|line| line.contains("Ctrl-C"));
    assert!(up, "outrider-lab up ended early");
    let prefix = format!("or{}", lab.id());
    assert!(!net::leftovers(&prefix).is_empty());
    (lab, prefix)
}

#[test]
fn a_signal_removes_everything_and_a_later_run_removes_what_a_killed_one_left() {
    if require::skip(require::missing()) {
        return;
    }
    let (mut ended, prefix) = lab_up();
    process::terminate(ended.id());
    assert_eq!(ended.wait().unwrap().code(), Some(128 + 15));
    assert_eq!(net::leftovers(&prefix), Vec::<String>::new());

    let (mut killed, prefix) = lab_up();
    killed.kill().unwrap();
    killed.wait().unwrap();
    assert!(!net::leftovers(&prefix).is_empty());
    let _next = Net::up().unwrap();
    assert_eq!(net::leftovers(&prefix), Vec::<String>::new());
}

/// Migrates a guest over this transport and searches the capture of it.
fn migrate_and_search(transport: Transport) -> (Captured, SearchReport) {
    let net = Net::up().unwrap();
    let image = GuestImage::locate().unwrap();
    let options = VmOptions::new("captured-guest");
    let capture = Capture::start(&net, &net.run_folder().join("migration.pcap"), MAX_CAPTURE_BYTES).unwrap();
    let mut pair = Pair::start_for(&net, &image, &options, transport).unwrap();
    let secret = client::secret(net.node(Machine::Client), client::guest_address()).unwrap();
    let outcome = pair.migrate().unwrap();
    let after = client::secret(net.node(Machine::Client), client::guest_address()).unwrap();
    assert_eq!(after, secret, "the guest took its secret along");
    let captured = capture.finish().unwrap();
    assert!(captured.bytes > outcome.transferred_bytes, "{captured:?} {outcome:?}");
    assert_eq!(captured.unwritten_frames, 0);
    let mut needles = vec![Needle::new("secret", secret), Needle::qemu_magic()];
    needles.extend(Needle::vm_identity(&options.name, options.uuid));
    let start = Instant::now();
    let report = search(&captured.path, &needles).unwrap();
    println!("{transport:?}: {outcome:?}\n{captured:?}\n{report:?} in {:?}", start.elapsed());
    assert!(report.tcp_payload_bytes > outcome.transferred_bytes);
    assert_eq!(report.tcp_missing_bytes, 0);
    (captured, report)
}

#[test]
fn a_capture_of_plain_tcp_shows_secret_magic_and_identity() {
    if require::skip(require::missing()) {
        return;
    }
    let (captured, report) = migrate_and_search(Transport::Tcp);
    assert!(captured.frames > 0);
    assert!(report.has("secret") && report.has("qemu_magic") && report.has_vm_identity(), "{report:?}");
}

#[test]
fn a_capture_of_qemu_tls_shows_none_of_them() {
    if require::skip(require::missing()) {
        return;
    }
    let (_, report) = migrate_and_search(Transport::Tls);
    assert!(report.found.is_empty(), "{report:?}");
}
