//! `outrider-scanner`: looks for signatures in guest pages that pass. Started by the host daemon with a stream socket
//! as standard input: the daemon sends the rules, then hands its end to the VM agent, which sends the pages.
//!
//! A process of its own, since its engine compiles rules to machine code and so needs executable memory, which the
//! agent must not have. It reads strangers' bytes with a large engine: everything but its socket is given up before
//! the first of them.

mod engine;
mod serve;

use engine::{Engine, compile};
use outrider_signature::Answer;
use sandbox::{ExecutableMemory, Profile};
use serve::Socket;
use std::process::ExitCode;

/// Memory: the engine reserves room for its code and for its thread; with 50 rules 232 MiB, of which 16 are used.
/// Calls: the engine's clock is a thread that sleeps. It is started before the filter, and may still be on its way into
/// its first sleep when the filter is laid over it.
const PROFILE: Profile = Profile {
    memory_bytes: 512 << 20,
    descriptors: 16,
    executable_memory: ExecutableMemory::Allowed,
    calls: &[
        libc::SYS_clock_nanosleep,
        libc::SYS_rseq,
        libc::SYS_set_robust_list,
        libc::SYS_sched_getaffinity,
    ],
};

fn main() -> ExitCode {
    // Where, never what: a message could quote the memory at hand (I10).
    std::panic::set_hook(Box::new(|info| {
        let place = info.location().map(|l| format!("{}:{}", l.file(), l.line())).unwrap_or_default();
        eprintln!("outrider-scanner: a defect at {place}");
    }));
    match std::env::args().nth(1).as_deref() {
        None => run(),
        Some("--version") => {
            println!("outrider-scanner {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        Some("--self-test-sandbox") => {
            let act = std::env::args().nth(2).unwrap_or_default();
            sandbox::self_test::run(&PROFILE, &act)
        }
        Some(_) => {
            eprintln!(
                "outrider-scanner is started by the Outrider host daemon; see signature_rules in host.toml"
            );
            ExitCode::from(2)
        }
    }
}

fn run() -> ExitCode {
    let mut socket = Socket::standard_input();
    match prepare_and_serve(&mut socket) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("outrider-scanner: {why}");
            let _nobody_may_listen = socket.send(&Answer::Refused { why });
            ExitCode::from(4)
        }
    }
}

fn prepare_and_serve(socket: &mut Socket) -> Result<(), String> {
    let sources = socket.rules().map_err(|error| error.to_string())?;
    let rules = compile(&sources)?;
    drop(sources);
    let count = u32::try_from(rules.iter().len()).unwrap_or(u32::MAX);
    let confined = sandbox::confine(&PROFILE).map_err(|error| error.to_string())?;
    // The first scan makes what every scan needs, the thread that keeps time among it: confined, not yet filtered.
    let mut engine = Engine::new(&rules)?;
    let in_force = confined.filter().map_err(|error| error.to_string())?;
    socket.send(&Answer::Ready { rules: count, sandbox: in_force }).map_err(|error| error.to_string())?;
    serve::serve(socket, &mut engine).map_err(|error| error.to_string())
}
