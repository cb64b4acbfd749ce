//! One JSON line per event on standard error, which the daemon collects. Never stream bytes, never keys.

use serde_json::{Map, Value, json};
use std::io::Write;

/// Writes a line. A daemon that reads no more is no reason to stop: the control socket tells that.
pub fn line(level: &str, event: &str, fields: &[(&str, Value)]) {
    let mut object = Map::new();
    object.insert("level".to_owned(), json!(level));
    object.insert("target".to_owned(), json!("outrider-agent"));
    object.insert("event".to_owned(), json!(event));
    object.extend(fields.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
    let mut text = Value::Object(object).to_string();
    text.push('\n');
    let _reader_may_be_gone = std::io::stderr().write_all(text.as_bytes());
}

/// Panics become one log line, without a backtrace: that would open files, which the sandbox kills.
pub fn log_panics() {
    std::panic::set_hook(Box::new(|info| {
        let place = info.location().map(|l| format!("{}:{}", l.file(), l.line())).unwrap_or_default();
        line("error", "panic", &[("place", json!(place))]);
    }));
}
