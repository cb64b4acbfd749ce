//! The sandboxed VM agent: relay and inspector. Started by the host daemon with one end of a `SOCK_SEQPACKET` pair as
//! standard input, or as the descriptor whose number is in `OUTRIDER_AGENT_FD`.

use link::channel::EphemeralKey;
use outrider_agent::control::Control;
use outrider_agent::session::Session;
use outrider_agent::{log, sandbox::PROFILE};
use serde_json::json;
use std::process::ExitCode;

const DESCRIPTOR: &str = "OUTRIDER_AGENT_FD";

fn main() -> ExitCode {
    log::log_panics();
    match std::env::args().nth(1).as_deref() {
        None => serve(),
        Some("--version") => {
            println!("outrider-agent {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        Some("--probe") => match outrider_agent::probe::serve() {
            Ok(()) => ExitCode::SUCCESS,
            // The daemon has ended, or wants no answer any more.
            Err(_) => ExitCode::from(4),
        },
        Some("--self-test-sandbox") => {
            sandbox::self_test::run(&PROFILE, std::env::args().nth(2).as_deref().unwrap_or_default())
        }
        Some(_) => {
            eprintln!(
                "outrider-agent is started by the Outrider host daemon; see `outrider host run --help`"
            );
            ExitCode::from(2)
        }
    }
}

fn serve() -> ExitCode {
    let failed = |what: &str, detail: String| {
        log::line("error", what, &[("detail", json!(detail))]);
        ExitCode::from(4)
    };
    let number = match std::env::var(DESCRIPTOR).ok().map(|text| text.parse()) {
        None => 0,
        Some(Ok(number)) => number,
        Some(Err(_)) => return failed("bad-descriptor", format!("{DESCRIPTOR} is no number")),
    };
    let control = match Control::inherited(number) {
        Ok(control) => control,
        Err(error) => return failed("no-control-socket", error.to_string()),
    };
    // The cryptographic library looks for devices when it first draws random numbers, which no sandboxed process
    // may; no byte of a peer has been seen yet.
    let key = match EphemeralKey::generate() {
        Ok(key) => key,
        Err(error) => return failed("no-key", error.to_string()),
    };
    match sandbox::enter(&PROFILE) {
        Ok(in_force) => {
            let told = Session::new(control, in_force, key).run();
            if told { ExitCode::SUCCESS } else { ExitCode::from(4) }
        }
        Err(error) => failed("no-sandbox", error.to_string()),
    }
}
