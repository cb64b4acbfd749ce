//! What the lab needs of a machine, and the one way in which a test says that it was skipped.

use std::path::Path;

use crate::guest::GuestImage;
use crate::process;
use std::process::Command;

/// Programs without which nothing here works.
const PROGRAMS: [&str; 5] = ["ip", "nsenter", "setsid", "qemu-system-x86_64", "swtpm"];

/// What is missing for namespaces and QEMU, in words; `None` when nothing is.
#[must_use]
pub fn missing() -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("root is needed for network namespaces (run as root)".to_owned());
    }
    for program in PROGRAMS {
        if !is_in_path(program) {
            return Some(format!("the program {program} is missing (run `cargo xtask setup`)"));
        }
    }
    if let Err(error) = process::run(Command::new("unshare").args(["--net", "true"])) {
        return Some(format!("network namespaces can't be made here: {error:#}"));
    }
    GuestImage::locate().err().map(|error| format!("{error:#} (run `cargo xtask setup`)"))
}

/// Prints the line that `cargo xtask test` counts and returns true when the test can't run here.
///
/// A test begins with `if require::skip(require::missing()) { return; }`.
#[must_use]
pub fn skip(missing: Option<String>) -> bool {
    if let Some(reason) = &missing {
        println!("SKIPPED: {reason}");
        // nextest hides the output of tests that pass, so the count goes through a file as well.
        if let Some(list) = std::env::var_os("OUTRIDER_SKIPS") {
            note(Path::new(&list), reason);
        }
    }
    missing.is_some()
}

fn note(list: &Path, reason: &str) {
    use std::io::Write;
    let name = std::thread::current().name().unwrap_or("a test").to_owned();
    let written = std::fs::OpenOptions::new()
        .append(true)
        .create(true)
        .open(list)
        .and_then(|mut file| writeln!(file, "{name}: {reason}"));
    if let Err(error) = written {
        println!("the skip could not be counted in {}: {error}", list.display());
    }
}

fn is_in_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let usual = ["/usr/sbin", "/usr/bin", "/sbin", "/bin"].map(Into::into);
    std::env::split_paths(&path).chain(usual).any(|folder| folder.join(program).is_file())
}
