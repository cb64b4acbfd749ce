//! `outrider-agent --self-test-sandbox ACT`: enters the real sandbox, then tries the act. What the sandbox forbids ends
//! in the kernel; `ESCAPED` on standard output means that it did not. For tests and for `outrider doctor`.

use outrider_agent::sandbox;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::{Command, ExitCode};

pub(crate) fn run(act: &str) -> ExitCode {
    let landlock_only = act.starts_with("landlock-");
    let entered = if landlock_only {
        let no_new_privs = rustix::thread::set_no_new_privs(true).is_ok();
        sandbox::landlock_part().filter(|_| no_new_privs)
    } else {
        sandbox::enter().ok()
    };
    let Some(in_force) = entered else {
        println!("not in force");
        return ExitCode::from(3);
    };
    println!("in force: {in_force}");
    let refused = match act {
        "nothing" => true,
        "open" | "landlock-open" => std::fs::File::open("/etc/passwd").is_err(),
        "create" | "landlock-create" => std::fs::File::create("/tmp/outrider-agent-self-test").is_err(),
        "connect" | "landlock-connect" => denied(TcpStream::connect((Ipv4Addr::LOCALHOST, 1)).err()),
        "bind" | "landlock-bind" => TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).is_err(),
        "exec" | "landlock-exec" => Command::new("/bin/true").status().is_err(),
        "thread" => std::thread::Builder::new().spawn(|| ()).is_err(),
        _ => return ExitCode::from(2),
    };
    if refused {
        println!("refused");
        return ExitCode::SUCCESS;
    }
    println!("ESCAPED");
    ExitCode::FAILURE
}

/// A refused connection is no sandbox; a missing permission is.
fn denied(error: Option<std::io::Error>) -> bool {
    error.is_some_and(|e| e.kind() == std::io::ErrorKind::PermissionDenied)
}
