//! QMP: one JSON object per line. Open where QEMU's versions differ: unknown commands, events and keys are data.

use serde_json::{Map, Value, json};

/// The longest line; `query-qmp-schema` of QEMU 10 answers with about 250 KiB.
pub const MAX_LINE_BYTES: usize = 1 << 20;

/// What QEMU said.
#[derive(Debug, Clone, PartialEq)]
pub enum Message {
    /// First line of a connection.
    Greeting {
        /// Version (major, minor, micro).
        version: (u32, u32, u32),
        /// Package text, e.g. `Debian 1:10.0.2+ds-2`.
        package: String,
        /// Capabilities on offer, e.g. `oob`.
        capabilities: Vec<String>,
    },
    /// A command succeeded.
    Return {
        /// The id that the command had.
        id: Option<u64>,
        /// Its value.
        value: Value,
    },
    /// A command failed.
    Error {
        /// The id that the command had.
        id: Option<u64>,
        /// Class, e.g. `GenericError`.
        class: String,
        /// For people.
        description: String,
    },
    /// Something happened.
    Event {
        /// Its name, e.g. `STOP`.
        name: String,
        /// Its data; null when it has none.
        data: Value,
        /// QEMU's wall clock, microseconds since the Unix epoch.
        timestamp_us: u64,
    },
}

/// Why a line was refused. The connection is then of no further use.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// A line above [`MAX_LINE_BYTES`].
    #[error("QMP line of more than {MAX_LINE_BYTES} bytes")]
    TooLong,
    /// Not JSON.
    #[error("QMP line is not JSON")]
    NotJson(#[source] serde_json::Error),
    /// JSON, but no message of the protocol.
    #[error("QMP line is no greeting, return, error or event")]
    NotQmp,
}

/// Splits what comes into lines. Memory: one line.
#[derive(Debug, Clone, Default)]
pub struct LineReader {
    held: Vec<u8>,
}

impl LineReader {
    /// Takes the next bytes and gives their messages.
    ///
    /// # Errors
    /// The first line that is refused; earlier messages of the same call are lost with the connection.
    pub fn feed(&mut self, input: &[u8]) -> Result<Vec<Message>, QmpError> {
        let mut messages = Vec::new();
        for piece in input.split_inclusive(|byte| *byte == b'\n') {
            if self.held.len() + piece.len() > MAX_LINE_BYTES {
                return Err(QmpError::TooLong);
            }
            self.held.extend_from_slice(piece);
            if piece.ends_with(b"\n") {
                let line = std::mem::take(&mut self.held);
                if !line.trim_ascii().is_empty() {
                    messages.push(Message::parse(&line)?);
                }
            }
        }
        Ok(messages)
    }
}

fn number(value: Option<&Value>) -> u32 {
    value.and_then(Value::as_u64).and_then(|n| n.try_into().ok()).unwrap_or(0)
}

fn text(value: Option<&Value>) -> String {
    value.and_then(Value::as_str).unwrap_or_default().to_owned()
}

impl Message {
    /// The message of one line.
    ///
    /// # Errors
    /// A line that is no message.
    pub fn parse(line: &[u8]) -> Result<Self, QmpError> {
        let Value::Object(mut object) = serde_json::from_slice(line).map_err(QmpError::NotJson)? else {
            return Err(QmpError::NotQmp);
        };
        let id = object.get("id").and_then(Value::as_u64);
        if let Some(value) = object.swap_remove("return") {
            return Ok(Self::Return { id, value });
        }
        if let Some(error) = object.get("error") {
            let (class, description) = (text(error.get("class")), text(error.get("desc")));
            return Ok(Self::Error { id, class, description });
        }
        if object.contains_key("event") {
            return Ok(Self::event(object));
        }
        object.get("QMP").map(Self::greeting).ok_or(QmpError::NotQmp)
    }

    fn event(mut object: Map<String, Value>) -> Self {
        let part =
            |key| object.get("timestamp").and_then(|t| t.get(key)).and_then(Value::as_u64).unwrap_or(0);
        let timestamp_us = part("seconds").saturating_mul(1_000_000).saturating_add(part("microseconds"));
        let name = text(object.get("event"));
        Self::Event { name, data: object.swap_remove("data").unwrap_or_default(), timestamp_us }
    }

    fn greeting(greeting: &Value) -> Self {
        let version = greeting.get("version");
        let qemu = version.and_then(|v| v.get("qemu"));
        let part = |key| number(qemu.and_then(|q| q.get(key)));
        let offered = greeting.get("capabilities").and_then(Value::as_array);
        Self::Greeting {
            version: (part("major"), part("minor"), part("micro")),
            package: text(version.and_then(|v| v.get("package"))),
            capabilities: offered.into_iter().flatten().map(|c| text(Some(c))).collect(),
        }
    }
}

/// The line of a command, newline included.
#[must_use]
pub fn command(name: &str, arguments: &Value, id: u64) -> Vec<u8> {
    line("execute", name, arguments, id)
}

/// The line of an out-of-band command, which QEMU serves even while its main loop is stuck.
#[must_use]
pub fn out_of_band(name: &str, arguments: &Value, id: u64) -> Vec<u8> {
    line("exec-oob", name, arguments, id)
}

fn line(verb: &str, name: &str, arguments: &Value, id: u64) -> Vec<u8> {
    let mut command = json!({ verb: name, "id": id });
    if !arguments.is_null() {
        command["arguments"] = arguments.clone();
    }
    let mut bytes = command.to_string().into_bytes();
    bytes.push(b'\n');
    bytes
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn check(line: &str, expect: &Message) {
        let mut reader = LineReader::default();
        let bytes = format!("{line}\r\n");
        let (head, tail) = bytes.as_bytes().split_at(bytes.len() / 2);
        assert!(reader.feed(head).unwrap().is_empty());
        assert_eq!(reader.feed(tail).unwrap(), std::slice::from_ref(expect));
    }

    #[test]
    fn each_kind_of_message_is_read() {
        check(
            r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "Debian"}, "capabilities": ["oob"]}}"#,
            &Message::Greeting {
                version: (10, 0, 2),
                package: "Debian".into(),
                capabilities: vec!["oob".into()],
            },
        );
        check(r#"{"return": {"a": 1}, "id": 7}"#, &Message::Return { id: Some(7), value: json!({"a": 1}) });
        check(
            r#"{"id": 7, "error": {"class": "GenericError", "desc": "no"}}"#,
            &Message::Error { id: Some(7), class: "GenericError".into(), description: "no".into() },
        );
        check(
            r#"{"timestamp": {"seconds": 2, "microseconds": 5}, "event": "STOP"}"#,
            &Message::Event { name: "STOP".into(), data: Value::Null, timestamp_us: 2_000_005 },
        );
    }

    #[test]
    fn strangers_and_endless_lines_are_refused() {
        assert!(matches!(Message::parse(b"{}"), Err(QmpError::NotQmp)));
        assert!(matches!(Message::parse(b"[1]"), Err(QmpError::NotQmp)));
        assert!(matches!(Message::parse(b"{"), Err(QmpError::NotJson(_))));
        let mut reader = LineReader::default();
        let chunk = vec![b' '; MAX_LINE_BYTES / 2 + 1];
        assert!(reader.feed(&chunk).unwrap().is_empty());
        assert!(matches!(reader.feed(&chunk), Err(QmpError::TooLong)));
    }

    #[test]
    fn commands_are_one_line() {
        assert_eq!(command("cont", &Value::Null, 1), b"{\"execute\":\"cont\",\"id\":1}\n");
        let yank = out_of_band("yank", &json!({"instances": [{"type": "migration"}]}), 2);
        let text = String::from_utf8(yank).unwrap();
        assert_eq!(
            text,
            "{\"exec-oob\":\"yank\",\"id\":2,\"arguments\":{\"instances\":[{\"type\":\"migration\"}]}}\n"
        );
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let whole = LineReader::default().feed(&bytes).map_err(|e| e.to_string());
            let mut reader = LineReader::default();
            let mut parts = Ok(Vec::new());
            for byte in bytes.chunks(1) {
                if let Ok(all) = &mut parts {
                    match reader.feed(byte) {
                        Ok(more) => all.extend(more),
                        Err(e) => parts = Err(e.to_string()),
                    }
                }
            }
            prop_assert_eq!(whole, parts);
        }
    }
}
