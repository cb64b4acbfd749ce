//! Signatures in guest pages, as the target's agent sees them: pages go to a scanner that the daemon started, beside the
//! stream; the device state waits for its verdict. Without a scanner process there is no scan: its engine needs
//! executable memory, which this process must not have.
//!
//! The session polls [`Signatures::interest`], hands what poll said to [`Signatures::ready`], and looks at the time of
//! [`Signatures::deadline`]. Nothing here blocks, and a scanner that is gone, late or mad is a finding.

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};
use signature::address::{Board, gpa};
use signature::{Cause, Hit, Outcome, Policy, Response, Scan, Trouble, Verdict};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;
use types::inventory::Inventory;
use types::migration::{Finding, Severity};

/// Findings of one migration; hits beyond are in the count.
pub const MAX_FINDINGS: usize = 16;
/// Answers are short.
const READ_BYTES: usize = 16 * 1024;
/// Reads in one turn: the stream goes first.
const MAX_READS_PER_TURN: usize = 4;

/// A scan over its socket.
pub struct Signatures {
    socket: Option<OwnedFd>,
    scan: Scan,
    places: Places,
}

/// What is needed to name a guest-physical address.
struct Places {
    below_4g_bytes: Option<u64>,
}

/// What a verdict means for the migration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judgement {
    /// Why the device state may not be released.
    pub refusal: Option<Finding>,
    /// What else is worth telling.
    pub findings: Vec<Finding>,
}

impl Signatures {
    /// Over the socket of a scanner that has its rules.
    #[must_use]
    pub fn new(socket: OwnedFd, policy: Policy, inventory: &Inventory) -> Self {
        Self { socket: Some(socket), scan: Scan::new(policy), places: Places::of(inventory) }
    }

    /// Bytes of the RAM block with that index in the stream's own list, as the inspector accepted them; `offset` is where
    /// the first of them lies. Pieces of several channels may take turns.
    pub fn page(&mut self, block: usize, offset: u64, piece: &[u8]) {
        // The stream's list is far shorter; a block that had no number would still be looked at.
        self.scan.page(u16::try_from(block).unwrap_or(u16::MAX), offset, piece);
    }

    /// What to poll for; nothing once the scanner is gone.
    #[must_use]
    pub fn interest(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        let socket = self.socket.as_ref()?;
        let mut interest = PollFlags::IN;
        interest.set(PollFlags::OUT, !self.scan.output().is_empty());
        Some((socket.as_fd(), interest))
    }

    /// Whether the stream may go on; false only where the policy lets it wait for the scanner.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.scan.has_room()
    }

    /// Once a turn, with what poll said.
    ///
    /// What the scanner has said is heard first: it is not late because this process was.
    pub fn ready(&mut self, ready: PollFlags, now: Instant) {
        if ready.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
            self.read(now);
        }
        self.scan.tick(now);
        self.write();
        if self.scan.verdict().is_some() {
            self.socket = None;
        }
    }

    /// The stream is complete and accepted by everyone else.
    pub fn finish(&mut self, now: Instant) {
        self.scan.finish(now);
        self.write();
    }

    /// When [`Signatures::verdict`] says something at the latest, once the stream is complete.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        self.scan.deadline()
    }

    /// The verdict, once there is one: before the end of the stream only when it refuses.
    #[must_use]
    pub fn verdict(&self) -> Option<&Verdict> {
        self.scan.verdict()
    }

    /// The verdict in findings; `name_of` knows the stream's RAM blocks by index.
    #[must_use]
    pub fn judgement(&self, name_of: impl Fn(u16) -> Option<String>) -> Option<Judgement> {
        let verdict = self.scan.verdict()?;
        let mut findings: Vec<Finding> = Vec::new();
        if let Some(trouble) = &verdict.trouble {
            findings.push(trouble_finding(trouble, verdict));
        }
        // What a hit cut short let nothing pass.
        if verdict.skipped_bytes > 0 && verdict.outcome != Outcome::Refuse(Cause::Hit) {
            findings.push(skipped_finding(verdict));
        }
        let room = MAX_FINDINGS - findings.len();
        let hits = verdict.hits.iter().take(room).map(|hit| self.places.hit_finding(hit, &name_of));
        findings.splice(0..0, hits);
        let refusal = match verdict.outcome {
            Outcome::Release => None,
            Outcome::Refuse(cause) => take_cause(&mut findings, cause),
        };
        Some(Judgement { refusal, findings })
    }

    fn read(&mut self, now: Instant) {
        let mut buffer = [0; READ_BYTES];
        for _ in 0..MAX_READS_PER_TURN {
            let Some(socket) = &self.socket else { return };
            match recv(socket, &mut buffer[..], RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return self.gone("it closed its socket"),
                Ok((_, count)) => self.scan.input(buffer.get(..count).unwrap_or_default(), now),
                Err(Errno::AGAIN | Errno::INTR) => return,
                Err(errno) => return self.gone(&format!("its socket failed: {errno}")),
            }
        }
    }

    fn write(&mut self) {
        while let Some(socket) = self.socket.as_ref().filter(|_| !self.scan.output().is_empty()) {
            match send(socket, self.scan.output(), SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(count) => self.scan.wrote(count),
                Err(Errno::AGAIN | Errno::INTR | Errno::NOBUFS) => return,
                Err(errno) => return self.gone(&format!("its socket failed: {errno}")),
            }
        }
    }

    fn gone(&mut self, why: &str) {
        self.socket = None;
        self.scan.lost(why);
    }
}

impl Places {
    fn of(inventory: &Inventory) -> Self {
        let ram = inventory.ram_blocks.iter().find(|block| block.name == "pc.ram");
        let below = |board: Board| ram.map(|block| board.below_4g_bytes(block.length_bytes));
        Self { below_4g_bytes: Board::of_machine(&inventory.machine).and_then(below) }
    }

    fn hit_finding(&self, hit: &Hit, name_of: impl Fn(u16) -> Option<String>) -> Finding {
        let block = name_of(hit.block).unwrap_or_else(|| format!("block {}", hit.block));
        let address = self.below_4g_bytes.and_then(|below| gpa(&block, hit.offset, below));
        let address = address.map(|address| format!(", guest-physical {address:#x}")).unwrap_or_default();
        let refuses = hit.response == Response::Refuse;
        Finding {
            section: format!("{block} at {:#x}{address}", hit.offset),
            expected: "no signature".to_owned(),
            found: format!("rule {}", hit.rule),
            ..finding("SIG-1", if refuses { Severity::Critical } else { Severity::Warning })
        }
    }
}

fn trouble_finding(trouble: &Trouble, verdict: &Verdict) -> Finding {
    let (rule, found) = match trouble {
        Trouble::Late => ("SIG-3", format!("none after {} bytes", verdict.scanned_bytes)),
        Trouble::Lost(why) => ("SIG-4", format!("the scanner is lost: {why}")),
    };
    Finding { expected: "a verdict in time".to_owned(), found, ..finding(rule, Severity::Warning) }
}

fn skipped_finding(verdict: &Verdict) -> Finding {
    Finding {
        expected: "every page looked at".to_owned(),
        found: format!("{} of {} bytes passed unseen", verdict.skipped_bytes, verdict.taken_bytes()),
        ..finding("SIG-2", Severity::Warning)
    }
}

/// Memory that a rule matched is well-formed and malicious (MM-10); a scan that was evaded or broken let it pass unseen
/// (MM-12).
fn finding(rule: &str, severity: Severity) -> Finding {
    Finding {
        rule: rule.to_owned(),
        threat: if rule == "SIG-1" { "MM-10" } else { "MM-12" }.to_owned(),
        severity,
        channel: 0,
        offset: 0,
        section: "guest memory".to_owned(),
        expected: String::new(),
        found: String::new(),
        response: "reported".to_owned(),
    }
}

/// The finding that refuses, out of the others.
fn take_cause(findings: &mut Vec<Finding>, cause: Cause) -> Option<Finding> {
    let rule = match cause {
        Cause::Hit => "SIG-1",
        Cause::Incomplete => "SIG-2",
        Cause::Late => "SIG-3",
        Cause::Lost => "SIG-4",
    };
    let at = findings.iter().position(|finding| finding.rule == rule);
    let refusal = at.map_or_else(|| finding(rule, Severity::Critical), |at| findings.remove(at));
    Some(Finding { severity: Severity::Critical, response: "terminated".to_owned(), ..refusal })
}

#[cfg(test)]
mod tests;
