//! Server-sent events: bytes in, events out, bounded.

/// Most bytes of one event; the manager's are a few hundred.
const MAX_EVENT_BYTES: usize = 256 * 1024;

/// One event.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct SseEvent {
    /// Its name; `message` when the sender gave none.
    pub(crate) name: String,
    /// Its data.
    pub(crate) data: String,
}

/// An event was longer than any honest one.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("an event is longer than {MAX_EVENT_BYTES} bytes")]
pub(crate) struct TooLong;

/// Cuts a stream of bytes into events, wherever the chunks end.
#[derive(Debug, Default)]
pub(crate) struct Parser {
    line: Vec<u8>,
    name: String,
    data: Option<String>,
}

impl Parser {
    /// Takes the next bytes; gives the events that they complete.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Result<Vec<SseEvent>, TooLong> {
        let mut events = Vec::new();
        for byte in bytes {
            if *byte == b'\n' {
                let line = std::mem::take(&mut self.line);
                let text = String::from_utf8_lossy(&line);
                events.extend(self.take_line(text.trim_end_matches('\r')));
            } else {
                self.line.push(*byte);
            }
            let held = self.line.len() + self.name.len() + self.data.as_ref().map_or(0, String::len);
            if held > MAX_EVENT_BYTES {
                return Err(TooLong);
            }
        }
        Ok(events)
    }

    fn take_line(&mut self, line: &str) -> Option<SseEvent> {
        if line.is_empty() {
            let name = std::mem::take(&mut self.name);
            let data = self.data.take()?;
            return Some(SseEvent { name: if name.is_empty() { "message".to_owned() } else { name }, data });
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match (field, &mut self.data) {
            ("event", _) => value.clone_into(&mut self.name),
            ("data", Some(data)) => {
                data.push('\n');
                data.push_str(value);
            }
            ("data", none) => *none = Some(value.to_owned()),
            // Comments (keep-alive), ids and retry times carry nothing for us.
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn event(name: &str, data: &str) -> SseEvent {
        SseEvent { name: name.to_owned(), data: data.to_owned() }
    }

    #[test]
    fn events_survive_any_split() {
        let text = b": keep-alive\n\nevent: migration\ndata: {\"a\":1}\n\ndata: one\r\ndata:two\r\nid: 7\r\n\r\nevent: x\n\n";
        let expected = vec![event("migration", "{\"a\":1}"), event("message", "one\ntwo")];
        for step in 1..=text.len() {
            let mut parser = Parser::default();
            let events: Vec<_> = text.chunks(step).flat_map(|c| parser.push(c).unwrap()).collect();
            assert_eq!(events, expected, "step {step}");
        }
    }

    #[test]
    fn an_endless_event_is_refused() {
        let mut line = Parser::default();
        assert_eq!(line.push(&vec![b'x'; MAX_EVENT_BYTES + 1]), Err(TooLong));
        let mut many = Parser::default();
        let chunk = b"data: xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx\n";
        assert!((0..MAX_EVENT_BYTES).any(|_| many.push(chunk).is_err()));
    }

    #[test]
    fn bytes_that_are_not_text_do_no_harm() {
        let mut parser = Parser::default();
        assert_eq!(parser.push(b"data: \xff\xfe\n\n").unwrap(), vec![event("message", "\u{fffd}\u{fffd}")]);
    }
}
