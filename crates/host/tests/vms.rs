//! Real QEMUs under the VM table: start, inventory, stop, adoption after a restart, and nothing left behind.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../../engine/tests/support/skip.rs"]
mod skip;

use outrider_host::cgroup::Hierarchies;
use outrider_host::folders::Folders;
use outrider_host::vms::record::Phase;
use outrider_host::vms::{Settings, Vms};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use types::inventory::Inventory;
use types::vm::VmSpec;
use types::{Epoch, ErrorCode, HandoverKey, MigrationId};

struct Bench {
    folder: tempfile::TempDir,
    cgroup: String,
}

impl Bench {
    fn new(name: &str) -> Option<Self> {
        if !Path::new("/usr/bin/qemu-system-x86_64").exists() {
            skip::skip("QEMU is not installed");
            return None;
        }
        let cgroup = format!("outrider-test-{name}-{}", std::process::id());
        Some(Self { folder: tempfile::Builder::new().prefix("ovt").tempdir().unwrap(), cgroup })
    }

    fn vms(&self) -> Arc<Vms> {
        self.vms_of(None)
    }

    /// With a QEMU of its own.
    fn vms_of(&self, qemu: Option<PathBuf>) -> Arc<Vms> {
        let folders = Folders::create(&self.folder.path().join("s"), &self.folder.path().join("r")).unwrap();
        let settings = Settings { qemu, user: None, serial_log: false, folders, cgroup: self.cgroup.clone() };
        let (vms, mut ended) = Vms::new(settings);
        tokio::spawn(async move { while ended.recv().await.is_some() {} });
        vms
    }

    /// A QEMU that does something else when it is to be run dry; `log` gets a line for each dry run.
    fn wrapped(&self, then: &str) -> PathBuf {
        let (path, log) = (self.folder.path().join("qemu"), self.dry_runs_log());
        let script = format!(
            "#!/bin/sh\ncase \"$*\" in *guest=dry-run*) echo x >>{}; {then} ;; esac\n\
             exec /usr/bin/qemu-system-x86_64 \"$@\"\n",
            log.display()
        );
        std::fs::write(&path, script).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    fn dry_runs_log(&self) -> PathBuf {
        self.folder.path().join("dry-runs")
    }

    /// How often it was run dry.
    fn dry_runs(&self) -> usize {
        std::fs::read_to_string(self.dry_runs_log()).unwrap_or_default().lines().count()
    }

    /// Processes of dry runs.
    fn dry_run_pids(&self) -> Vec<u32> {
        let all = Hierarchies::detect().group(&self.cgroup).children();
        all.iter().filter(|g| g.path().contains("/dry-run-")).flat_map(|g| g.processes()).collect()
    }

    fn qemus(&self) -> Vec<u32> {
        let all = Hierarchies::detect().group(&self.cgroup).children();
        all.iter().flat_map(outrider_host::cgroup::Group::processes).collect()
    }

    fn nothing_is_left(&self) {
        let count = |sub: &str| std::fs::read_dir(self.folder.path().join(sub)).unwrap().count();
        assert_eq!((count("s/vms"), count("r")), (0, 0), "records and sockets are removed");
        let group = Hierarchies::detect().group(&self.cgroup);
        assert!(group.processes().is_empty());
        group.remove().unwrap();
    }
}

fn spec() -> VmSpec {
    serde_json::from_value(serde_json::json!({
        "uuid": "11111111-2222-3333-4444-555555555555", "name": "tiny", "accel": "tcg", "vcpus": 1,
        "memory_bytes": 64 << 20,
    }))
    .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_starts_is_enrolled_and_stops() {
    let Some(bench) = Bench::new("start") else { return };
    let vms = bench.vms();
    let started = vms.start(&spec(), Epoch(3)).await.unwrap();
    assert!(started.inventory.machine.starts_with("pc-q35-"), "{:?}", started.inventory);
    assert!(started.inventory.hypervisor.starts_with("qemu/"));
    let ram = started.inventory.ram_blocks.iter().find(|b| b.name == "pc.ram").unwrap();
    assert_eq!(ram.length_bytes, 64 << 20);
    let instance = vms.running(spec().uuid).unwrap();
    assert_eq!(instance.status().await.unwrap(), "running");
    // Its own session and cgroup.
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", started.pid)).unwrap();
    let session: u32 = stat.rsplit_once(") ").unwrap().1.split(' ').nth(3).unwrap().parse().unwrap();
    assert_eq!(session, started.pid);
    assert!(
        Hierarchies::detect().group(&bench.cgroup).child(&instance.record().slot).processes()
            == [started.pid]
    );
    // Repeating the order is harmless, another epoch is refused.
    assert_eq!(vms.start(&spec(), Epoch(3)).await.unwrap().pid, started.pid);
    assert_eq!(vms.start(&spec(), Epoch(4)).await.unwrap_err().code, ErrorCode::VmAlreadyRunning);
    assert_eq!(vms.stop(spec().uuid, Epoch(2)).await.unwrap_err().code, ErrorCode::WrongState);
    vms.stop(spec().uuid, Epoch(3)).await.unwrap();
    vms.stop(spec().uuid, Epoch(3)).await.unwrap();
    assert!(!instance.process().is_alive());
    bench.nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_daemon_adopts_its_vms_and_sweeps_the_half_started() {
    let Some(bench) = Bench::new("adopt") else { return };
    let first = bench.vms();
    let pid = first.start(&spec(), Epoch(1)).await.unwrap().pid;
    let other = VmSpec { uuid: "21111111-2222-3333-4444-555555555555".parse().unwrap(), ..spec() };
    first.start(&other, Epoch(1)).await.unwrap();
    let half = first.running(other.uuid).unwrap();
    half.change(Phase::Starting, Epoch(1)).unwrap();

    let second = bench.vms();
    second.adopt().await.unwrap();
    assert_eq!(second.all().len(), 1);
    assert!(!half.process().is_alive(), "a half-started QEMU is ended");
    let adopted = second.running(spec().uuid).unwrap();
    assert_eq!(adopted.process().id().pid, pid);
    assert!(second.start(&spec(), Epoch(1)).await.is_ok(), "the inventory is remembered");
    drop(first);
    second.stop(spec().uuid, Epoch(1)).await.unwrap();
    bench.nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn orders_that_cross_start_one_qemu() {
    let Some(bench) = Bench::new("cross") else { return };
    let vms = bench.vms();
    let key = HandoverKey {
        migration: MigrationId::from_bytes([1; 16]),
        vm: spec().uuid,
        source_epoch: Epoch(2),
        target_epoch: Epoch(3),
    };
    let inventory = vms.start(&spec(), Epoch(1)).await.unwrap().inventory;
    vms.stop(spec().uuid, Epoch(1)).await.unwrap();

    let spec = spec();
    let (first, again, later, target, stop) = tokio::join!(
        vms.start(&spec, Epoch(1)),
        vms.start(&spec, Epoch(1)),
        vms.start(&spec, Epoch(2)),
        vms.prepare(&spec, &key, &inventory),
        vms.stop(spec.uuid, Epoch(1)),
    );
    assert_eq!(bench.qemus(), [first.unwrap().pid]);
    assert_eq!(bench.qemus(), [again.unwrap().pid], "the same answer");
    assert_eq!(later.unwrap_err().code, ErrorCode::VmAlreadyRunning);
    assert_eq!(target.unwrap_err().code, ErrorCode::VmAlreadyRunning);
    assert_eq!(stop.unwrap_err().code, ErrorCode::WrongState, "nothing is gone while it is being started");
    vms.stop(spec.uuid, Epoch(1)).await.unwrap();

    // Whoever ordered it goes away: it is carried out all the same, and once.
    tokio::time::timeout(Duration::ZERO, vms.start(&spec, Epoch(4))).await.unwrap_err();
    let started = vms.start(&spec, Epoch(4)).await.unwrap();
    assert_eq!(bench.qemus(), [started.pid]);
    vms.stop(spec.uuid, Epoch(4)).await.unwrap();
    bench.nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn vms_whose_ids_begin_alike_share_nothing() {
    let Some(bench) = Bench::new("alike") else { return };
    let vms = bench.vms();
    let alike = VmSpec { uuid: "11111111-2222-3333-4444-666666666666".parse().unwrap(), ..spec() };
    let first = vms.start(&spec(), Epoch(1)).await.unwrap();
    let second = vms.start(&alike, Epoch(1)).await.unwrap();
    assert_ne!(first.pid, second.pid);
    vms.stop(alike.uuid, Epoch(1)).await.unwrap();
    assert_eq!(bench.qemus(), [first.pid]);
    assert_eq!(vms.running(spec().uuid).unwrap().status().await.unwrap(), "running");
    vms.stop(spec().uuid, Epoch(1)).await.unwrap();
    bench.nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_place_that_is_taken_is_left_alone() {
    let Some(bench) = Bench::new("taken") else { return };
    let vms = bench.vms();
    let pid = vms.start(&spec(), Epoch(1)).await.unwrap().pid;
    // A daemon that does not know of it.
    let forgetful = bench.vms();
    let refused = forgetful.stop(spec().uuid, Epoch(1)).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::VmAlreadyRunning, "{refused}");
    let refused = forgetful.start(&spec(), Epoch(2)).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::VmAlreadyRunning, "{refused}");
    let refused = forgetful.start(&spec(), Epoch(1)).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::VmAlreadyRunning, "{refused}");
    assert_eq!(bench.qemus(), [pid]);
    assert_eq!(vms.running(spec().uuid).unwrap().status().await.unwrap(), "running");

    // Another VM whose record names the tap that this one would get.
    let mut json = serde_json::to_value(spec()).unwrap();
    json["uuid"] = "31111111-2222-3333-4444-555555555555".into();
    json["nics"] = serde_json::json!([{"mac": "52:54:00:00:00:01", "bridge": "nobridge"}]);
    let networked: VmSpec = serde_json::from_value(json).unwrap();
    let tap = outrider_host::qemu::tap::name(networked.uuid, Epoch(1), 0);
    let mut owner = vms.running(spec().uuid).unwrap().record();
    owner.taps = vec![tap];
    owner.save(&bench.folder.path().join("s/vms")).unwrap();
    let refused = vms.start(&networked, Epoch(1)).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::WrongState, "{refused}");
    assert!(refused.detail.contains("a tap of"), "{refused}");
    vms.stop(spec().uuid, Epoch(1)).await.unwrap();
    bench.nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_cannot_be_read_is_no_dead_vm() {
    let Some(bench) = Bench::new("unreadable") else { return };
    let first = bench.vms();
    let pid = first.start(&spec(), Epoch(1)).await.unwrap().pid;
    let record = first.running(spec().uuid).unwrap().record().path(&bench.folder.path().join("s/vms"));
    let whole = std::fs::read(&record).unwrap();

    let second = bench.vms();
    std::fs::write(&record, &whole[..whole.len() / 2]).unwrap();
    let refused = second.adopt().await.unwrap_err().problem();
    assert_eq!(refused.code, ErrorCode::WrongState);
    assert!(refused.detail.contains(record.to_str().unwrap()), "{refused}");
    assert!(second.stop(spec().uuid, Epoch(1)).await.is_err());
    // Not even without any record.
    std::fs::remove_file(&record).unwrap();
    let refused = second.stop(spec().uuid, Epoch(1)).await.unwrap_err();
    assert!(refused.detail.contains(&pid.to_string()), "{refused}");
    assert_eq!(second.start(&spec(), Epoch(2)).await.unwrap_err().code, ErrorCode::VmAlreadyRunning);

    std::fs::write(&record, &whole).unwrap();
    second.adopt().await.unwrap();
    second.stop(spec().uuid, Epoch(1)).await.unwrap();
    assert!(bench.qemus().is_empty());
    bench.nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_waits_paused_and_is_killed_frozen() {
    let Some(bench) = Bench::new("target") else { return };
    let vms = bench.vms();
    let inventory = vms.start(&spec(), Epoch(1)).await.unwrap().inventory;
    vms.stop(spec().uuid, Epoch(1)).await.unwrap();
    let key = HandoverKey {
        migration: MigrationId::from_bytes([1; 16]),
        vm: spec().uuid,
        source_epoch: Epoch(2),
        target_epoch: Epoch(3),
    };
    let target = vms.prepare(&spec(), &key, &inventory).await.unwrap();
    assert_eq!(target.status().await.unwrap(), "inmigrate");
    target.freezer().freeze().await.unwrap();
    target.kill().await.unwrap();
    while !vms.all().is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    bench.nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_missing_is_said_and_nothing_is_left() {
    let Some(bench) = Bench::new("missing") else { return };
    let vms = bench.vms();
    let wrong_kernel = serde_json::json!({"path": "/etc/hostname", "blake3": "00".repeat(32)});
    for (key, value, says) in [
        ("kernel", wrong_kernel, "has BLAKE3"),
        ("machine", "pc-q35-1.0".into(), "no machine type"),
        ("cpu_model", "nonsense".into(), "QEMU ended at its start"),
        ("nics", serde_json::json!([{"mac": "52:54:00:00:00:01", "bridge": "nobridge"}]), "nobridge"),
        ("disks", serde_json::json!([{"path": "/no/disk", "format": "raw", "volume": "v"}]), "/no/disk"),
    ] {
        let mut json = serde_json::to_value(spec()).unwrap();
        json[key] = value;
        let spec: VmSpec = serde_json::from_value(json).unwrap();
        let problem = vms.start(&spec, Epoch(1)).await.unwrap_err();
        assert!(problem.to_string().contains(says), "{problem}");
    }
    bench.nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_enrols_devices_and_firmware_and_the_next_of_its_shape_makes_nothing() {
    let Some(bench) = Bench::new("enrol") else { return };
    let qemu = bench.wrapped("");
    let vms = bench.vms_of(Some(qemu.clone()));
    let alike = VmSpec {
        uuid: "21111111-2222-3333-4444-555555555555".parse().unwrap(),
        name: "alike".parse().unwrap(),
        memory_bytes: 96 << 20,
        ..spec()
    };
    let (one, two) = (spec(), alike.clone());
    vms.binary().await.unwrap();
    let before = std::time::Instant::now();
    let (first, second) = tokio::join!(vms.start(&one, Epoch(1)), vms.start(&two, Epoch(1)));
    let (first, second) = (first.unwrap().inventory, second.unwrap().inventory);
    let fresh = before.elapsed();
    assert_eq!(bench.dry_runs(), 1, "two at once are made once");
    assert_eq!(first.devices, second.devices);
    let names: Vec<_> = first.devices.iter().map(|d| d.name.as_str()).collect();
    for name in ["timer", "cpu", "fw_cfg", "0000:00:00.0/mch", "globalstate"] {
        assert!(names.contains(&name), "{name} in {names:?}");
    }
    let pinned: Vec<_> = first.ram_blocks.iter().filter(|b| b.content.is_some()).map(|b| &*b.name).collect();
    assert_eq!(pinned, ["pc.bios", "pc.rom"], "of {:?}", first.ram_blocks);
    let length = |inventory: &Inventory| {
        inventory.ram_blocks.iter().find(|b| b.name == "pc.ram").unwrap().length_bytes
    };
    assert_eq!((length(&first), length(&second)), (64 << 20, 96 << 20), "lengths are the VM's own");
    vms.stop(one.uuid, Epoch(1)).await.unwrap();

    let before = std::time::Instant::now();
    vms.start(&one, Epoch(2)).await.unwrap();
    eprintln!("two fresh starts {fresh:?}, one of a known shape {:?}", before.elapsed());
    // Another daemon finds it in the state folder.
    vms.stop(one.uuid, Epoch(2)).await.unwrap();
    let later = bench.vms_of(Some(qemu));
    later.binary().await.unwrap();
    let before = std::time::Instant::now();
    later.start(&one, Epoch(3)).await.unwrap();
    eprintln!("of a shape that is in the state folder {:?}", before.elapsed());
    assert_eq!(bench.dry_runs(), 1);
    // What shapes devices makes another.
    later.stop(one.uuid, Epoch(3)).await.unwrap();
    let wider = VmSpec { vcpus: 2, ..one.clone() };
    let cpus = |i: &Inventory| i.devices.iter().filter(|d| d.name == "cpu").count();
    let started = later.start(&wider, Epoch(4)).await.unwrap();
    assert_eq!((cpus(&first), cpus(&started.inventory), bench.dry_runs()), (1, 2, 2));
    later.stop(wider.uuid, Epoch(4)).await.unwrap();
    vms.stop(alike.uuid, Epoch(1)).await.unwrap();
    bench.nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_that_dies_is_an_error_and_leaves_nothing() {
    let Some(bench) = Bench::new("dies") else { return };
    let vms = bench.vms_of(Some(bench.wrapped("exec sleep 60")));
    let spec = spec();
    let kill = async {
        loop {
            if let [pid, ..] = bench.dry_run_pids()[..] {
                let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
                if comm.trim() == "sleep" {
                    std::process::Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap();
                    return;
                }
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let (refused, ()) = tokio::join!(vms.start(&spec, Epoch(1)), kill);
    let refused = refused.unwrap_err();
    assert_eq!(refused.code, ErrorCode::HypervisorFailed);
    assert!(
        refused.detail.contains("the dry run failed: QEMU ended: it was killed by signal 9"),
        "{refused}"
    );
    bench.nothing_is_left();
    // One that says why.
    let vms = bench.vms_of(Some(bench.wrapped("echo no such thing >&2; exit 1")));
    let refused = vms.start(&spec, Epoch(1)).await.unwrap_err();
    assert!(refused.detail.contains("exit code 1; no such thing"), "{refused}");
    bench.nothing_is_left();
    // What was refused once is tried again.
    let vms = bench.vms_of(Some(bench.wrapped("")));
    vms.start(&spec, Epoch(1)).await.unwrap();
    vms.stop(spec.uuid, Epoch(1)).await.unwrap();
    bench.nothing_is_left();
}

/// Where a catalogue can't be kept (a full disk, here a file in the folder's place), it is made once for each daemon.
#[tokio::test(flavor = "multi_thread")]
async fn a_catalogue_that_cannot_be_kept_costs_a_dry_run_and_no_vm() {
    let Some(bench) = Bench::new("unkept") else { return };
    let vms = bench.vms_of(Some(bench.wrapped("")));
    std::fs::write(bench.folder.path().join("s/catalogue"), b"in the way").unwrap();
    let spec = spec();
    for epoch in [1, 2] {
        vms.start(&spec, Epoch(epoch)).await.unwrap();
        vms.stop(spec.uuid, Epoch(epoch)).await.unwrap();
    }
    assert_eq!(bench.dry_runs(), 1, "this daemon remembers it");
    let next = bench.vms_of(Some(bench.wrapped("")));
    next.start(&spec, Epoch(3)).await.unwrap();
    next.stop(spec.uuid, Epoch(3)).await.unwrap();
    assert_eq!(bench.dry_runs(), 2, "the next one makes it again");
    bench.nothing_is_left();
}

/// An upgrade between the key and the dry run must not be kept under the older program's key.
#[tokio::test(flavor = "multi_thread")]
async fn a_qemu_that_is_exchanged_meanwhile_is_not_kept_as_the_former() {
    let Some(bench) = Bench::new("exchanged") else { return };
    let once = bench.folder.path().join("exchanged");
    let then = format!("[ -e {0} ] || {{ touch {0}; echo '# another' >>\"$0\"; }}", once.display());
    let vms = bench.vms_of(Some(bench.wrapped(&then)));
    let spec = spec();
    let refused = vms.start(&spec, Epoch(1)).await.unwrap_err();
    assert_eq!(refused.code, ErrorCode::HypervisorFailed);
    assert!(refused.detail.contains("was exchanged while it was looked at"), "{refused}");
    let kept = std::fs::read_dir(bench.folder.path().join("s/catalogue")).map_or(0, Iterator::count);
    assert_eq!(kept, 0, "something was kept");
    bench.nothing_is_left();
    vms.start(&spec, Epoch(2)).await.unwrap();
    vms.stop(spec.uuid, Epoch(2)).await.unwrap();
    assert_eq!(bench.dry_runs(), 2);
    bench.nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dry_run_of_a_daemon_that_died_is_swept_up() {
    let Some(bench) = Bench::new("swept") else { return };
    let vms = bench.vms_of(Some(bench.wrapped("exec sleep 60")));
    let (first, spec) = (vms.clone(), spec());
    // Its caller goes away, and with this test's runtime nobody would end it: as after kill -9.
    let waiting = tokio::spawn(async move { first.shape(&spec, "q35").await });
    while bench.dry_run_pids().is_empty() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let second = bench.vms();
    second.adopt().await.unwrap();
    assert!(bench.dry_run_pids().is_empty());
    bench.nothing_is_left();
    assert!(waiting.await.unwrap().is_err());
    drop(vms);
    bench_is_gone(&bench).await;
}

/// The first daemon's own clearing may come after the second's.
async fn bench_is_gone(bench: &Bench) {
    let left = || Hierarchies::detect().group(&bench.cgroup).children().len();
    while left() > 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Hierarchies::detect().group(&bench.cgroup).remove().unwrap();
}

const NIC_CHILD: &str = "OUTRIDER_TEST_NIC";

/// Runs below, in a network namespace of its own with a bridge in it.
#[tokio::test(flavor = "multi_thread")]
async fn nic_child() {
    if std::env::var(NIC_CHILD).is_err() {
        return;
    }
    let Some(bench) = Bench::new("nic") else { return };
    let vms = bench.vms();
    let mut json = serde_json::to_value(spec()).unwrap();
    json["nics"] = serde_json::json!([{"mac": "52:54:00:00:00:01", "bridge": "obr0"}]);
    let spec: VmSpec = serde_json::from_value(json).unwrap();
    vms.start(&spec, Epoch(1)).await.unwrap();
    let tap = vms.running(spec.uuid).unwrap().record().taps[0].clone();
    let master = || {
        let output = std::process::Command::new("ip").args(["-j", "link", "show", &tap]).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    assert!(master().contains("\"master\":\"obr0\""), "{}", master());
    // The other side of a migration on the same machine has a tap of its own.
    assert_ne!(tap, outrider_host::qemu::tap::name(spec.uuid, Epoch(2), 0));
    vms.stop(spec.uuid, Epoch(1)).await.unwrap();
    assert!(!outrider_host::qemu::tap::exists(&tap));
    bench.nothing_is_left();
}

#[test]
fn a_nic_gets_a_tap_on_its_bridge() {
    let script = "ip link add obr0 type bridge && ip link set obr0 up && exec \"$0\" \"$@\"";
    let status = std::process::Command::new("unshare")
        .args(["--net", "sh", "-c", script])
        .arg(std::env::current_exe().unwrap())
        .args(["nic_child", "--exact", "--nocapture"])
        .env(NIC_CHILD, "1")
        .status();
    match status {
        Ok(status) => assert!(status.success()),
        Err(error) => skip::skip(&format!("unshare: {error}")),
    }
}

/// The QEMU of Debian 12, which `cargo xtask setup` unpacks, started so that it finds its firmware.
fn older_qemu(bench: &Bench) -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/lab/qemu72");
    if !root.join(".complete").exists() {
        skip::skip("QEMU 7.2 is not unpacked (run `cargo xtask setup`)");
        return None;
    }
    let usr = root.canonicalize().unwrap().join("usr");
    let script = format!(
        "#!/bin/sh\nexec {0}/bin/qemu-system-x86_64 -L {0}/share/qemu -L {0}/share/seabios -L {0}/lib/ipxe/qemu \"$@\"\n",
        usr.display()
    );
    let path = bench.folder.path().join("qemu-older");
    std::fs::write(&path, script).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    Some(path)
}

#[tokio::test(flavor = "multi_thread")]
async fn two_real_qemus_say_what_they_can_run_and_are_judged_by_it() {
    use engine::compatibility::{Need, judge};
    use types::vm::Accel;
    let Some(bench) = Bench::new("abilities") else { return };
    let Some(older) = older_qemu(&bench) else { return };
    let (newer, older) = (bench.vms(), bench.vms_of(Some(older)));
    let both = async |machine: &str, cpu_model: &str| {
        let newer = newer.abilities(machine, cpu_model, Accel::Tcg).await.unwrap();
        (newer, older.abilities(machine, cpu_model, Accel::Tcg).await.unwrap())
    };
    let verdict = |from: &_, to: &_, machine: &str, cpu_model: &str| {
        judge(Need { machine, cpu_model }, from, to).map_or_else(|e| e.to_string(), |()| "fits".to_owned())
    };
    let (new, old) = both("pc-q35-10.0", "qemu64").await;
    assert!(
        new.hypervisor.starts_with("qemu/10.") && old.hypervisor.starts_with("qemu/7.2."),
        "{}",
        old.hypervisor
    );
    assert!(new.cpu_features.as_ref().unwrap().contains("sse2"));
    assert_eq!(old.cpu_missing, "its QEMU has no machine pc-q35-10.0");
    let said = verdict(&new, &old, "pc-q35-10.0", "qemu64");
    assert!(said.starts_with("machine pc-q35-10.0 is not known to its qemu/7.2."), "{said}");
    assert!(said.ends_with("newest it knows: pc-q35-7.2"), "{said}");
    // A machine and a CPU that both have: it fits both ways.
    let (new, old) = both("pc-q35-7.2", "qemu64").await;
    assert_eq!(verdict(&new, &old, "pc-q35-7.2", "qemu64"), "fits");
    assert_eq!(verdict(&old, &new, "pc-q35-7.2", "qemu64"), "fits");
    // Emulation learned features since.
    let (new, old) = both("pc-q35-7.2", "EPYC").await;
    let said = verdict(&new, &old, "pc-q35-7.2", "EPYC");
    assert!(
        said.contains("lacks features there that the guest has now") && said.contains("sha-ni"),
        "{said}"
    );
    assert_eq!(verdict(&old, &new, "pc-q35-7.2", "EPYC"), "fits");
    let (new, old) = both("pc-q35-7.2", "GraniteRapids").await;
    assert!(new.cpu_features.is_some());
    let said = verdict(&new, &old, "pc-q35-7.2", "GraniteRapids");
    assert!(said.starts_with("CPU model GraniteRapids is not known"), "{said}");
    bench.nothing_is_left();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_qemu_can_run_is_asked_once_and_a_qemu_that_cannot_say_says_so() {
    use types::vm::Accel;
    let Some(bench) = Bench::new("ability-cache") else { return };
    let vms = bench.vms_of(Some(bench.wrapped("")));
    let ask = async || vms.abilities("pc-q35-10.0", "qemu64", Accel::Tcg).await.unwrap();
    let (one, two, three) = tokio::join!(ask(), ask(), ask());
    assert!(one.cpu_features.is_some() && one == two && two == three);
    assert_eq!(bench.dry_runs(), 1);
    let broken = bench.vms_of(Some(bench.wrapped("echo no such thing >&2; exit 1")));
    let said = broken.abilities("pc-q35-10.0", "qemu64", Accel::Tcg).await.unwrap();
    assert!(
        said.cpu_features.is_none() && said.cpu_missing.contains("no such thing"),
        "{}",
        said.cpu_missing
    );
    if !Path::new("/dev/kvm").exists() {
        let said = vms.abilities("pc-q35-10.0", "qemu64", Accel::Kvm).await.unwrap();
        assert_eq!(said.cpu_missing, "it has no /dev/kvm");
    }
    assert!(bench.dry_run_pids().is_empty());
    bench.nothing_is_left();
}
