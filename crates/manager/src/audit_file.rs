//! An audit log that was exported, verified without the manager: one entry a line, as `GET /v1/audit` shows it.

use api::http::{AuditEntry, AuditVerified};
use jiff::Timestamp;
use registry::AuditRecord;
use std::io::{BufRead, Read};
use types::{Digest, ErrorCode, Problem};

/// Entries are a few hundred bytes; the longest hold a VM's spec.
const LINE_BYTES_MAX: u64 = 4 << 20;

/// Walks the chain of an exported log from its first entry. What a cut at the end took away does not show in the file:
/// for that, compare the head with the manager's.
///
/// # Errors
/// `bad-request` when it can't be read. A line that is no entry is a broken log, like a changed one.
pub fn verify(file: impl Read) -> Result<AuditVerified, Problem> {
    let mut lines = std::io::BufReader::new(file);
    let mut head = registry::audit_start();
    loop {
        let mut line = Vec::new();
        let limited = (&mut lines).take(LINE_BYTES_MAX + 1).read_until(b'\n', &mut line);
        limited.map_err(|e| Problem::new(ErrorCode::BadRequest, format!("cannot read the log: {e}")))?;
        if line.is_empty() {
            break;
        }
        let next = record(&line).and_then(|record| record.follows(head).map_err(|e| e.to_string()));
        match next {
            Ok(next) => head = next,
            Err(detail) => return Ok(broken(head.seq, detail)),
        }
    }
    let (entries, head) = (head.seq, head.hash.to_string());
    Ok(AuditVerified { verified: true, entries, head, first_bad: None, detail: None })
}

fn record(line: &[u8]) -> Result<AuditRecord, String> {
    if line.len() as u64 > LINE_BYTES_MAX {
        return Err(format!("the line is longer than {LINE_BYTES_MAX} bytes"));
    }
    let entry: AuditEntry = serde_json::from_slice(line).map_err(|e| format!("the line is no entry: {e}"))?;
    let at: Timestamp = entry.at.parse().map_err(|_| "its time is none".to_owned())?;
    let hash = Digest::try_from(entry.hash).map_err(|_| "its hash is none".to_owned())?;
    Ok(AuditRecord {
        sequence: entry.sequence,
        at_us: at.as_microsecond(),
        actor: entry.actor,
        action: entry.action,
        subject: entry.subject,
        detail: entry.detail,
        hash,
    })
}

fn broken(good: u64, detail: String) -> AuditVerified {
    AuditVerified {
        verified: false,
        entries: good,
        head: String::new(),
        first_bad: Some(good + 1),
        detail: Some(detail),
    }
}
