//! What a test says when the machine lacks something that it needs: it is counted by `cargo xtask test`, and never reads
//! as a pass there. Extra material that a clone need not have (the corpus) is not counted.

#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::io::Write;

/// Says why the test does nothing, and has it counted.
pub fn skip(reason: &str) {
    println!("SKIPPED: {reason}");
    if let Some(list) = std::env::var_os("OUTRIDER_SKIPS") {
        let mut file = std::fs::OpenOptions::new().append(true).create(true).open(list).unwrap();
        let test = std::thread::current().name().unwrap_or("a test").to_owned();
        writeln!(file, "{} {test}: {reason}", env!("CARGO_PKG_NAME")).unwrap();
    }
}
