//! The sandbox's own proof: a program enters it and tries what it forbids. What the filter forbids ends in the kernel;
//! `ESCAPED` on standard output means that it did not. For tests and for `outrider doctor`.

use crate::{Profile, enter, landlock_part};
use rustix::io::Errno;
use rustix::process::{PidfdFlags, PidfdGetfdFlags, getppid, pidfd_getfd, pidfd_open};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::{Command, ExitCode};

/// Enters the sandbox of `profile`, then tries `act`. With `landlock-` before it, behind Landlock alone, which would
/// else never be seen: the filter stands in front of it.
pub fn run(profile: &Profile, act: &str) -> ExitCode {
    let entered = if act.starts_with("landlock-") {
        let no_new_privs = rustix::thread::set_no_new_privs(true).is_ok();
        landlock_part().filter(|_| no_new_privs)
    } else {
        enter(profile).ok()
    };
    let Some(in_force) = entered else {
        println!("not in force");
        return ExitCode::from(3);
    };
    println!("in force: {in_force}");
    let Some(refused) = attempt(act.trim_start_matches("landlock-")) else { return ExitCode::from(2) };
    if refused {
        println!("refused");
        return ExitCode::SUCCESS;
    }
    println!("ESCAPED");
    ExitCode::FAILURE
}

/// Whether the act was refused; nothing when there is no such act.
fn attempt(act: &str) -> Option<bool> {
    Some(match act {
        "nothing" => true,
        "open" => std::fs::File::open("/etc/passwd").is_err(),
        "create" => std::fs::File::create("/tmp/outrider-self-test").is_err(),
        "connect" => denied(TcpStream::connect((Ipv4Addr::LOCALHOST, 1)).err()),
        "bind" => TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).is_err(),
        "exec" => Command::new("/bin/true").status().is_err(),
        "thread" => std::thread::Builder::new().spawn(|| ()).is_err(),
        "ptrace" => touch_parent().is_err(),
        _ => return None,
    })
}

/// A refused connection is no sandbox; a missing permission is.
fn denied(error: Option<std::io::Error>) -> bool {
    error.is_some_and(|e| e.kind() == std::io::ErrorKind::PermissionDenied)
}

/// Takes a descriptor out of the process that started this one: the kernel asks for the same right as for tracing it.
fn touch_parent() -> Result<(), Errno> {
    let parent = getppid().ok_or(Errno::SRCH)?;
    let held = pidfd_open(parent, PidfdFlags::empty())?;
    pidfd_getfd(held, 0, PidfdGetfdFlags::empty()).map(drop)
}
