//! What a fleet costs its manager. A manager in a process of its own serves hosts that speak the protocol from this one:
//! real mutual TLS, real sessions, quotes of a software key, no hypervisors.
//!
//! ```text
//! fleet_load idle   [HOSTS] [SECONDS]                     memory and CPU of a manager with idle hosts
//! fleet_load decide [HOSTS] [VMS] [RATE] [SECONDS] [URL]  how long decisions take at a rate; URL: PostgreSQL
//! ```
//! `decide` prints, from the manager's own report of each migration, the time from the source's signed request to the
//! signed permit: all gates, both hosts' quotes and their appraisal included. Every target then fails to prepare, so that
//! each migration also ends.
#![allow(clippy::unwrap_used)]

#[path = "fleet_load/host.rs"]
mod host;
#[path = "fleet_load/operator.rs"]
mod operator;
#[path = "fleet_load/platform.rs"]
mod platform;

use api::fleet::RunningVm;
use host::{Identity, LoadHost};
use link::ca::{Ca, Subject};
use link::identity::IdentityKey;
use operator::Operator;
use outrider_manager::{Config, run_with};
use platform::Platform;
use registry::{Database, Location, PlatformVerdict, Registry};
use serde_json::json;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};
use tokio::sync::Semaphore;
use types::host::{Capacity, HostSpec, TpmSpec};
use types::vm::{VmSpec, VmState};
use types::{HostName, VmId};

/// The manager bounds handshakes of one address at once.
const CONNECTING: usize = 12;
/// Set for the process that is the manager.
const CHILD: &str = "OUTRIDER_FLEET_LOAD_CONFIG";

fn main() {
    if let Ok(text) = std::env::var(CHILD) {
        return manager(&text);
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, default: u64| arguments.get(at).map_or(default, |text| text.parse().unwrap());
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    match arguments.first().map(String::as_str) {
        Some("idle") => runtime.block_on(idle(number(1, 10_000), number(2, 60))),
        Some("decide") => {
            let load = Load {
                hosts: number(1, 1_000),
                vms: number(2, 20_000),
                rate: number(3, 200),
                seconds: number(4, 20),
            };
            runtime.block_on(decide(load, arguments.get(5).map(String::as_str)));
        }
        _ => eprintln!("fleet_load idle [HOSTS] [SECONDS] | decide [HOSTS] [VMS] [RATE] [SECONDS] [URL]"),
    }
}

/// The manager's process. Says where it listens, in one line.
fn manager(text: &str) {
    let config = Config::from_toml(text).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let ended = runtime.block_on(run_with(config, std::future::pending(), |running| {
        println!("{} {}", running.operators, running.hosts);
    }));
    panic!("the manager ended: {ended:?}");
}

struct Load {
    hosts: u64,
    vms: u64,
    rate: u64,
    seconds: u64,
}

/// A fleet that is enrolled, with a manager that runs.
struct Fleet {
    folder: tempfile::TempDir,
    manager: Child,
    operators: SocketAddr,
    hosts: Vec<Arc<LoadHost>>,
}

impl Drop for Fleet {
    fn drop(&mut self) {
        // It ends with what it was started for.
        self.manager.kill().unwrap();
        self.manager.wait().unwrap();
    }
}

fn host_name(n: u64) -> HostName {
    format!("host-{n}").parse().unwrap()
}

fn vm_name(n: u64) -> String {
    format!("vm-{n}")
}

fn host_spec(n: u64) -> HostSpec {
    HostSpec {
        name: host_name(n),
        control_address: "127.0.0.1".parse().unwrap(),
        migration_address: "10.7.0.1".parse().unwrap(),
        macs: vec![host::mac(n)],
        capacity: Capacity { memory_bytes: 1 << 40, vcpus: 4_000, vms: 4_000 },
        zone: "z".to_owned(),
        tpm: Some(TpmSpec {
            ek_name: Some(platform::EK_NAME.to_owned()),
            class: Some("rack".parse().unwrap()),
            ..TpmSpec::default()
        }),
    }
}

fn vm_spec(n: u64) -> VmSpec {
    let mut uuid = [7; 16];
    uuid[..8].copy_from_slice(&n.to_le_bytes());
    let spec = json!({
        "uuid": VmId::from_bytes(uuid), "name": vm_name(n), "accel": "tcg", "vcpus": 1, "memory_bytes": 256 << 20,
    });
    serde_json::from_value(spec).unwrap()
}

/// Hosts and VMs straight into the registry: what is measured is not how they got there.
async fn enrol(database: &Database, identities: &[Identity], platform: &Platform, vms: u64) {
    let registry = Registry::open(database).await.unwrap();
    let mut tx = registry.begin("hosts", host::now_us()).await.unwrap();
    tx.set_reference("class/rack", &platform.reference_json(), "bench").await.unwrap();
    for (n, identity) in (0..).zip(identities) {
        let spec = host_spec(n);
        tx.add_host(&spec).await.unwrap();
        let key = identity.signing.verifying_key();
        tx.host_joined(&spec.name, key.as_bytes(), identity.journal, "-", &[]).await.unwrap();
        tx.enrol_platform(&spec.name, &platform.enrolled_json()).await.unwrap();
        let verdict = PlatformVerdict { trusted: true, at_us: host::now_us(), reason: None, appraisal: None };
        tx.platform_appraised(&spec.name, &verdict, None).await.unwrap();
    }
    tx.commit().await.unwrap();
    let hosts = u64::try_from(identities.len()).unwrap();
    let mut tx = registry.begin("VMs", host::now_us()).await.unwrap();
    for n in 0..vms {
        let (spec, on) = (vm_spec(n), host_name(n % hosts));
        tx.add_vm(&spec).await.unwrap();
        let epoch = tx.place_vm(spec.uuid, &on).await.unwrap().unwrap();
        let at = Location { host: on, epoch };
        let inventory = serde_json::from_value(json!({
            "machine": "pc-q35-10.0", "page_size_bytes": 4096, "hypervisor": "qemu/10.0.2",
            "ram_blocks": [{ "name": "pc.ram", "length_bytes": spec.memory_bytes }],
        }));
        tx.enrol_inventory(spec.uuid, &inventory.unwrap(), "pc-q35-10.0").await.unwrap();
        assert!(tx.set_vm_state(spec.uuid, &at, VmState::Running).await.unwrap());
    }
    tx.commit().await.unwrap();
    registry.close().await;
}

async fn fleet(hosts: u64, vms: u64, url: Option<&str>) -> Fleet {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("m");
    std::fs::create_dir(&state).unwrap();
    std::fs::set_permissions(&state, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    let began = Instant::now();
    let identities = identities(&state, hosts);
    let platform = Arc::new(Platform::new());
    let database = match url {
        Some(url) => url.parse().unwrap(),
        None => Database::Sqlite(state.join("registry.db")),
    };
    enrol(&database, &identities, &platform, vms).await;
    let registry = url.map(|url| format!("registry = \"{url}\"\nname = \"bench\"\n")).unwrap_or_default();
    let config = format!(
        "state_folder = \"{}\"\noperator_listen = \"127.0.0.1:0\"\nhosts_listen = \"127.0.0.1:0\"\n\
         concurrent_migrations = 100000\n{registry}",
        state.display()
    );
    let (manager, operators, port) = launch(&config);
    eprintln!(
        "{hosts} hosts and {vms} VMs enrolled, the manager runs, after {:.1} s",
        began.elapsed().as_secs_f64()
    );
    let ca =
        link::ca::CaCertificate::from_pem(&std::fs::read_to_string(state.join("ca.pem")).unwrap()).unwrap();
    let connecting = Arc::new(Semaphore::new(CONNECTING));
    let mut all = Vec::new();
    for (n, identity) in (0..).zip(identities) {
        let held = (n..vms).step_by(usize::try_from(hosts).unwrap()).map(running).collect();
        let to = (ca.clone(), port);
        all.push(LoadHost::attach(n, identity, held, to, Arc::clone(&platform), Arc::clone(&connecting)));
    }
    for host in &all {
        host.attached().await;
    }
    eprintln!("all hosts are attached after {:.1} s", began.elapsed().as_secs_f64());
    Fleet { folder, manager, operators, hosts: all }
}

/// A VM as a host says that it holds it; it was placed once.
fn running(n: u64) -> RunningVm {
    let (vm, machine) = (vm_spec(n).uuid.to_string(), "pc-q35-10.0".to_owned());
    RunningVm { vm, epoch: 1, state: "running".to_owned(), machine }
}

/// Certificates of the manager's own CA; one TLS key for all hosts, whose making is not what is measured.
fn identities(state: &Path, hosts: u64) -> Vec<Identity> {
    let domain = "outrider".parse().unwrap();
    let ca = Ca::load_or_create(state, &domain, SystemTime::now()).unwrap();
    let key = IdentityKey::generate().unwrap();
    let request = key.signing_request().unwrap();
    let issue = |n| {
        let issued = ca.issue(&Subject::host(&host_name(n)), &request, SystemTime::now()).unwrap();
        Identity::new(n, &issued.chain_pem, &key.to_pem())
    };
    (0..hosts).map(issue).collect()
}

fn launch(config: &str) -> (Child, SocketAddr, SocketAddr) {
    use std::io::BufRead;
    let mut child = Command::new(std::env::current_exe().unwrap())
        .env(CHILD, config)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    std::io::BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let (operators, hosts) = line.trim().split_once(' ').unwrap();
    (child, operators.parse().unwrap(), hosts.parse().unwrap())
}

/// Resident memory in MiB and CPU seconds of a process, from /proc.
fn cost(pid: u32) -> (f64, f64) {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let rss = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap();
    let rss_kib: f64 = rss.trim().trim_end_matches(" kB").parse().unwrap();
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks = fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap();
    (rss_kib / 1024.0, ticks / 100.0)
}

async fn idle(hosts: u64, seconds: u64) {
    let fleet = fleet(hosts, 0, None).await;
    // What the arrival of all at once cost is over after a heartbeat or two.
    tokio::time::sleep(Duration::from_secs(15)).await;
    let (_, before_s) = cost(fleet.manager.id());
    let began = Instant::now();
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    let (rss_mib, after_s) = cost(fleet.manager.id());
    let cores = (after_s - before_s) / began.elapsed().as_secs_f64();
    let connected = fleet.hosts.iter().filter(|host| host.is_attached()).count();
    println!(
        "{connected} of {hosts} hosts idle for {seconds} s: {rss_mib:.0} MiB resident, {cores:.2} cores"
    );
}

async fn decide(load: Load, url: Option<&str>) {
    let Load { hosts, vms, rate, seconds } = load;
    let fleet = fleet(hosts, vms, url).await;
    let total = rate * seconds;
    assert!(total <= vms, "each VM is asked for once: {total} requests need as many VMs");
    let state = fleet.folder.path().join("m");
    let operator = Operator::new(fleet.operators, &state, 16).await;
    let (_, before_s) = cost(fleet.manager.id());
    let began = Instant::now();
    let asked = (0..total).map(|n| {
        let operator = operator.clone();
        tokio::spawn(async move {
            let due = began + Duration::from_micros(n * 1_000_000 / rate);
            tokio::time::sleep_until(due.into()).await;
            let to = host_name((n + 1 + n % 7) % hosts);
            let id = operator.migrate(&vm_name(n), &to).await;
            (id, due.elapsed())
        })
    });
    let (mut ids, mut accepted_ms) = (Vec::new(), Vec::new());
    for asked in futures::future::join_all(asked).await {
        let (id, took) = asked.unwrap();
        ids.push(id);
        accepted_ms.push(took.as_secs_f64() * 1_000.0);
    }
    let took_s = began.elapsed().as_secs_f64();
    let (rss_mib, after_s) = cost(fleet.manager.id());
    let (mut decided_ms, mut refused) = (Vec::new(), 0);
    for id in &ids {
        match operator.decided_ms(id).await {
            Some(ms) => decided_ms.push(ms),
            None => refused += 1,
        }
    }
    let registry = if url.is_some() { "PostgreSQL" } else { "SQLite" };
    println!(
        "{total} requests at {rate}/s in {took_s:.1} s, {hosts} hosts, {vms} VMs, {registry}; {refused} without a permit"
    );
    println!("request accepted, ms: {}", percentiles(&mut accepted_ms));
    println!("permit decided, ms:   {}", percentiles(&mut decided_ms));
    println!("manager: {rss_mib:.0} MiB resident, {:.2} cores", (after_s - before_s) / took_s);
}

fn percentiles(values: &mut [f64]) -> String {
    values.sort_by(f64::total_cmp);
    let at = |permille: usize| {
        values.get((values.len().max(1) - 1) * permille / 1_000).copied().unwrap_or(f64::NAN)
    };
    format!("p50 {:.1}, p95 {:.1}, p99 {:.1}, most {:.1}", at(500), at(950), at(990), at(1_000))
}
