//! The planted secret: what a capture of the migration network must never show.

use std::fs::File;
use std::io::Read;

/// Text in front of a generated secret, so that a person recognises it in a dump.
const PREFIX: &str = "OUTRIDER-SECRET-";

/// Makes a secret nobody outside this VM knows; it exists in this process's memory alone.
pub fn generate() -> std::io::Result<String> {
    let mut random = [0_u8; 16];
    File::open("/dev/urandom")?.read_exact(&mut random)?;
    let digits: String = random.iter().map(|b| format!("{b:02x}")).collect();
    Ok(format!("{PREFIX}{digits}"))
}
