//! Processes and waiting: run a command and name it in the error; wait for a condition, not for a time.

use std::fs;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal};

/// Pause between two looks at a condition.
const POLL: Duration = Duration::from_millis(5);

/// Runs a command to its end and returns what it printed; its error output appears only in the error.
pub fn run(command: &mut Command) -> Result<String> {
    let line = shown(command);
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("starting `{line}`"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("`{line}` failed ({}): {}", output.status, said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn shown(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy().into_owned())
        .collect::<Vec<_>>()
        .join(" ")
}

/// Waits until `look` gives a value; the error says what was awaited.
pub fn wait_for<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = look().with_context(|| format!("waiting for {what}"))? {
            return Ok(value);
        }
        if start.elapsed() > limit {
            bail!("{what}: not within {} ms", limit.as_millis());
        }
        thread::sleep(POLL);
    }
}

/// Every process of the machine, by number.
pub fn all_pids() -> Vec<i32> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// The process's command line, its words separated by NUL.
pub fn command_line(pid: i32) -> Option<Vec<u8>> {
    fs::read(format!("/proc/{pid}/cmdline")).ok()
}

/// State letter and start time (clock ticks since boot) of a process; `None` once it is gone.
pub fn state_and_start(pid: i32) -> Option<(char, u64)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields = after_name(&stat)?;
    Some((fields.first()?.chars().next()?, fields.get(19)?.parse().ok()?))
}

/// Whether the process exists and is not merely waiting to be reaped.
pub fn is_alive(pid: i32) -> bool {
    state_and_start(pid).is_some_and(|(state, _)| state != 'Z' && state != 'X')
}

/// CPU time used so far by a process, in milliseconds.
pub fn cpu_ms(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields = after_name(&stat)?;
    let user: u64 = fields.get(11)?.parse().ok()?;
    let system: u64 = fields.get(12)?.parse().ok()?;
    Some((user + system) * 1000 / rustix::param::clock_ticks_per_second())
}

/// The fields of a `stat` file after the name, which may itself hold spaces and brackets.
fn after_name(stat: &str) -> Option<Vec<&str>> {
    Some(stat.rsplit_once(')')?.1.split_ascii_whitespace().collect())
}

/// Sends SIGKILL; a process that is already gone is fine.
pub fn kill(pid: i32) {
    if let Some(pid) = Pid::from_raw(pid) {
        // ESRCH: it ended by itself.
        let _gone = rustix::process::kill_process(pid, Signal::KILL);
    }
}

/// Sends SIGTERM to a child of ours.
pub fn terminate(pid: u32) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _gone = rustix::process::kill_process(pid, Signal::TERM);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn our_own_process_is_seen_alive() {
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(all_pids().contains(&own));
        assert!(is_alive(own));
        assert!(state_and_start(own).unwrap().1 > 0);
    }

    #[test]
    fn waiting_ends_with_the_value_or_names_what_was_awaited() {
        let mut looks = 0;
        let third = || {
            looks += 1;
            Ok((looks == 3).then_some(looks))
        };
        assert_eq!(wait_for("three", Duration::from_secs(5), third).unwrap(), 3);
        let never = wait_for("rain", Duration::from_millis(1), || Ok(None::<()>));
        assert!(never.unwrap_err().to_string().contains("rain"));
    }
}
