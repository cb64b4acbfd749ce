//! The real scanner, in its sandbox, over its socket. Built without the engine, there is nothing to test.
#![allow(clippy::unwrap_used)]

#[cfg(not(feature = "yara"))]
#[test]
fn the_scanner_is_tested_when_it_is_built() {
    use std::io::Write;
    let reason = "outrider-signature was built without its feature `yara` (`cargo xtask test` builds it)";
    println!("SKIPPED: {reason}");
    if let Some(list) = std::env::var_os("OUTRIDER_SKIPS") {
        let mut file = std::fs::OpenOptions::new().append(true).create(true).open(list).unwrap();
        writeln!(file, "outrider-signature::scanner: {reason}").unwrap();
    }
}

#[cfg(feature = "yara")]
mod with_engine;
