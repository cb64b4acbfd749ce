//! The sandboxed VM agent: relay and inspector.
fn main() {}
