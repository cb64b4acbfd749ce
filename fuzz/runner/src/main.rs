//! One fuzzer for all targets: `OUTRIDER_FUZZ_TARGET` says which.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::sync::LazyLock;

static RUN: LazyLock<fn(&[u8])> = LazyLock::new(|| {
    let name = std::env::var("OUTRIDER_FUZZ_TARGET").unwrap_or_default();
    outrider_fuzz_targets::target(&name).unwrap_or_else(|| panic!("there is no target {name:?}"))
});

fuzz_target!(|data: &[u8]| (RUN)(data));
