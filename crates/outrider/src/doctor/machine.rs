//! What the kernel and the installed programs offer.

use super::Check;
use landlock::{ABI, Access, AccessFs, CompatLevel, Compatible, Ruleset, RulesetAttr};
use std::fs::OpenOptions;
use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::time::Duration;

/// The oldest QEMU on which the hand-over was measured.
const QEMU_VERSION_MIN: (u32, u32) = (7, 2);
/// A program that prints its version takes milliseconds.
const PROGRAM_LIMIT: Duration = Duration::from_secs(5);
/// The ports that VM agents use under a permit.
const DATA_PORTS: std::ops::RangeInclusive<u16> = 7450..=7499;

/// Checks of a machine that is to run guests.
pub(super) async fn checks() -> Vec<Check> {
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
    let mut checks = vec![root(), kvm(), qemu().await];
    checks.extend(programs());
    checks.extend([freezer(&mounts), landlock(), user_namespaces(), tun()]);
    checks
}

fn root() -> Check {
    if rustix::process::geteuid().is_root() {
        Check::ok("root", "running as root")
    } else {
        Check::fail("root", "not running as root", "the host daemon makes taps and cgroups: run it as root")
    }
}

fn kvm() -> Check {
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => Check::ok("kvm", "/dev/kvm can be opened"),
        Err(error) => Check::warn(
            "kvm",
            format!("/dev/kvm: {error}"),
            "guests with accel = \"kvm\" will not start; enable virtualisation, or use accel = \"tcg\" (slow)",
        ),
    }
}

async fn qemu() -> Check {
    const ADVICE: &str = "install qemu-system-x86 (Debian), 7.2 or newer";
    let Some(program) = find_program("qemu-system-x86_64") else {
        return Check::fail("qemu", "qemu-system-x86_64 is not on PATH", ADVICE);
    };
    let run = tokio::process::Command::new(&program).arg("--version").kill_on_drop(true).output();
    let shown = program.display();
    match tokio::time::timeout(PROGRAM_LIMIT, run).await {
        Ok(Ok(output)) => judge_qemu(&shown.to_string(), &String::from_utf8_lossy(&output.stdout)),
        Ok(Err(error)) => Check::fail("qemu", format!("{shown} does not run: {error}"), ADVICE),
        Err(_) => Check::fail("qemu", format!("{shown} --version does not answer"), ADVICE),
    }
}

fn judge_qemu(program: &str, output: &str) -> Check {
    let Some(version) = output.split("version ").nth(1).and_then(|v| v.split_whitespace().next()) else {
        return Check::fail("qemu", format!("{program} does not say its version"), "is it QEMU?");
    };
    let mut parts = version.split('.').map(|p| p.parse::<u32>().ok());
    let (Some(Some(major)), Some(Some(minor))) = (parts.next(), parts.next()) else {
        return Check::fail("qemu", format!("{program} has version {version:?}"), "is it QEMU?");
    };
    if (major, minor) < QEMU_VERSION_MIN {
        let (major, minor) = QEMU_VERSION_MIN;
        return Check::fail(
            "qemu",
            format!("{program} {version} is too old"),
            format!("install QEMU {major}.{minor} or newer"),
        );
    }
    Check::ok("qemu", format!("{program} {version}"))
}

/// Programs that the host daemon runs beside QEMU.
fn programs() -> Vec<Check> {
    let agent = std::env::current_exe()
        .ok()
        .and_then(|own| Some(own.parent()?.join("outrider-agent")))
        .filter(|path| path.is_file())
        .or_else(|| find_program("outrider-agent"));
    let agent = match agent {
        Some(path) => Check::ok("agent", path.display().to_string()),
        None => Check::fail(
            "agent",
            "outrider-agent is neither beside this program nor on PATH",
            "install it beside outrider, or set agent_binary",
        ),
    };
    let ip = match find_program("ip") {
        Some(path) => Check::ok("ip", path.display().to_string()),
        None => Check::fail("ip", "ip is not on PATH", "install iproute2: guests' taps are made with it"),
    };
    vec![agent, ip]
}

fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|candidate| candidate.is_file())
}

/// Which freezer the switchover will use: v2, else v1, else stopping by signal.
fn freezer(mounts: &str) -> Check {
    let mount_of = |wanted: fn(&str, &str) -> bool| {
        mounts.lines().find_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let (point, kind, options) = (fields.next()?, fields.next()?, fields.next()?);
            wanted(kind, options).then(|| point.to_owned())
        })
    };
    let v2 = mount_of(|kind, _| kind == "cgroup2");
    let v1 = mount_of(|kind, options| kind == "cgroup" && options.split(',').any(|o| o == "freezer"));
    match (v2, v1) {
        (Some(point), _) => Check::ok("freezer", format!("cgroup v2 at {point}")),
        (None, Some(point)) => Check::ok("freezer", format!("cgroup v1 at {point}")),
        (None, None) => Check::warn(
            "freezer",
            "no cgroup freezer is mounted",
            "QEMU will be stopped by signal at the switchover; mount cgroup2 at /sys/fs/cgroup",
        ),
    }
}

fn landlock() -> Check {
    let supported = [ABI::V5, ABI::V3, ABI::V2, ABI::V1].into_iter().find(|abi| ruleset_can_be_made(*abi));
    match supported {
        Some(abi) => Check::ok("landlock", format!("file-system rules of ABI {abi:?} or newer")),
        None => Check::warn(
            "landlock",
            "the kernel has no landlock, or it is not enabled",
            "VM agents then rely on seccomp and dropped privileges alone; add landlock to the kernel's lsm= list",
        ),
    }
}

/// Making a ruleset restricts nobody: only enforcing one would.
fn ruleset_can_be_made(abi: ABI) -> bool {
    Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(abi))
        .and_then(Ruleset::create)
        .is_ok()
}

fn user_namespaces() -> Check {
    let limit = std::fs::read_to_string("/proc/sys/user/max_user_namespaces");
    match limit.as_deref().map(|text| text.trim().parse::<u64>()) {
        Ok(Ok(limit)) if limit > 0 => Check::ok("namespaces", format!("up to {limit} user namespaces")),
        _ => Check::warn(
            "namespaces",
            "user namespaces are not available",
            "VM agents then run without one; set user.max_user_namespaces above 0",
        ),
    }
}

fn tun() -> Check {
    match OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        Ok(_) => Check::ok("tun", "/dev/net/tun can be opened"),
        Err(error) => Check::fail(
            "tun",
            format!("/dev/net/tun: {error}"),
            "guests with network interfaces will not start: modprobe tun, as root",
        ),
    }
}

/// Whether VM agents will find ports.
pub(super) fn data_ports() -> Check {
    let taken: Vec<String> = DATA_PORTS
        .filter(|port| TcpListener::bind((Ipv4Addr::UNSPECIFIED, *port)).is_err())
        .map(|port| port.to_string())
        .collect();
    let range = format!("{}-{}", DATA_PORTS.start(), DATA_PORTS.end());
    if taken.is_empty() {
        Check::ok("data ports", format!("{range} are free"))
    } else if taken.len() == DATA_PORTS.count() {
        Check::fail("data ports", format!("all of {range} are taken"), "free some, or set data_ports")
    } else {
        Check::warn(
            "data ports",
            format!("taken in {range}: {}", taken.join(", ")),
            "fine while migrations run; otherwise see who listens with: ss -ltnp",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    #[test]
    fn the_version_of_qemu_is_judged() {
        for (output, status) in [
            ("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2~bpo12+1)\nCopyright", Status::Ok),
            ("QEMU emulator version 7.2.22 (Debian)", Status::Ok),
            ("QEMU emulator version 7.1.0", Status::Fail),
            ("QEMU emulator version x", Status::Fail),
            ("something else", Status::Fail),
            ("", Status::Fail),
        ] {
            assert_eq!(judge_qemu("q", output).status, status, "{output}");
        }
    }

    #[test]
    fn the_best_freezer_is_named() {
        let v1 = "cgroup /sys/fs/cgroup/freezer cgroup rw,relatime,freezer 0 0\n";
        let v2 = "cgroup2 /sys/fs/cgroup/unified cgroup2 rw,nosuid 0 0\n";
        assert_eq!(freezer(&format!("{v1}{v2}")).found, "cgroup v2 at /sys/fs/cgroup/unified");
        assert_eq!(freezer(v1).found, "cgroup v1 at /sys/fs/cgroup/freezer");
        assert_eq!(freezer("tmpfs / tmpfs rw 0 0\n").status, Status::Warn);
        assert_eq!(freezer("broken").status, Status::Warn);
    }
}
