//! One migration's scan: batches out, answers in, budgets, and the verdict before the device state is released. No
//! I/O, no clock.
//!
//! | state | legal | goes on |
//! |---|---|---|
//! | Watching | pages, answers | `finish` → Finishing; a certain refusal → Judged; a lost scanner, or one stuck where the stream waits → Judged, Unseen |
//! | Unseen | pages, which are counted | `finish` → Judged |
//! | Finishing | answers, until the deadline | DONE, the deadline, the scanner's end → Judged |
//! | Judged | nothing | |
//!
//! The scanner is not trusted more than it must be: it may name a rule that did not match, or hide one that did (it
//! reads strangers' bytes), but what it says must fit what it was asked, and its silence runs into a deadline.

use crate::collector::{Batch, Collector};
use crate::frame::{Answer, AnswerReader, MAX_BATCH_BYTES, MAX_HITS_PER_BATCH, Request, Response, Run};
use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

/// Bytes of batches that were not answered yet: four full ones. With what the collector holds: under 2 MiB.
pub const MAX_IN_FLIGHT_BYTES: usize = 4 * MAX_BATCH_BYTES;
/// A stream that waits for the scanner goes on below this.
const ROOM_BYTES: usize = MAX_IN_FLIGHT_BYTES / 2;
/// The same bound where the stream waits and nothing may be skipped. What is on its way when the stream is
/// held still fits above [`ROOM_BYTES`]: one read of the network or one packet, twice where tails are looked
/// at again.
const MAX_WAITED_FOR_BYTES: usize = 16 * MAX_BATCH_BYTES;
/// Hits that are named; the others are counted.
pub const MAX_HITS: usize = 64;

/// What happens to pages when the scanner falls behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenBehind {
    /// They pass unseen, and are counted.
    Skip,
    /// The stream waits, if the scanner takes no longer than this for one batch: beyond it is late.
    Wait {
        /// Time for one batch.
        batch_budget: Duration,
    },
}

/// What happens when there is no verdict of the scanner's: it is late, or was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenLate {
    /// The migration goes on, with a finding.
    Accept,
    /// It ends.
    Refuse,
}

/// What the policy says about signatures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Most time during which the scanner is busy, all told; pages beyond pass unseen.
    pub scan_budget: Duration,
    /// From the end of the stream until the verdict: part of the downtime.
    pub verdict_budget: Duration,
    /// When the scanner falls behind.
    pub when_behind: WhenBehind,
    /// When it is late or lost.
    pub on_timeout: WhenLate,
    /// Whether pages that passed unseen refuse the migration.
    pub require_complete: bool,
}

impl Policy {
    /// Every byte is looked at, or the migration refused. The stream waits for a scanner that works, however
    /// long that takes all told (the permit bounds it); `patience` is what one batch and the verdict may
    /// take.
    #[must_use]
    pub fn complete(patience: Duration) -> Self {
        Self {
            scan_budget: Duration::MAX,
            verdict_budget: patience,
            when_behind: WhenBehind::Wait { batch_budget: patience },
            on_timeout: WhenLate::Refuse,
            require_complete: true,
        }
    }

    fn most_in_flight_bytes(&self) -> usize {
        match self.when_behind {
            WhenBehind::Skip => MAX_IN_FLIGHT_BYTES,
            WhenBehind::Wait { .. } => MAX_WAITED_FOR_BYTES,
        }
    }
}

impl Default for Policy {
    /// The stream is never slowed down, and a scanner that fails is no way around the signatures. What was skipped is
    /// reported. A busy minute is some 60 GB; 200 ms are far more than the 2 MiB that can be left need.
    fn default() -> Self {
        Self {
            scan_budget: Duration::from_secs(60),
            verdict_budget: Duration::from_millis(200),
            when_behind: WhenBehind::Skip,
            on_timeout: WhenLate::Refuse,
            require_complete: false,
        }
    }
}

/// Where a rule matched. Never what (I10).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Hit {
    /// The rule's identifier.
    pub rule: String,
    /// Index of the RAM block.
    pub block: u16,
    /// Offset in it.
    pub offset: u64,
    /// What the rule asks for.
    pub response: Response,
}

/// Why the scanner's word is missing or incomplete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trouble {
    /// The verdict did not come in time.
    Late,
    /// It closed its socket, or talked nonsense.
    Lost(String),
}

/// Why the device state is not released.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cause {
    /// A rule that refuses matched.
    Hit,
    /// No verdict in time.
    Late,
    /// No scanner any more.
    Lost,
    /// Pages passed unseen.
    Incomplete,
}

/// What comes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The device state may be released.
    Release,
    /// It may not.
    Refuse(Cause),
}

/// The end of a scan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// What comes of it.
    pub outcome: Outcome,
    /// Hits, at most [`MAX_HITS`], a refusing one first.
    pub hits: Vec<Hit>,
    /// All hits.
    pub hits_total: u64,
    /// Bytes of guest memory that were looked at.
    pub scanned_bytes: u64,
    /// Bytes that passed unseen.
    pub skipped_bytes: u64,
    /// What went wrong.
    pub trouble: Option<Trouble>,
}

impl Verdict {
    /// Bytes of guest memory that passed.
    #[must_use]
    pub fn taken_bytes(&self) -> u64 {
        self.scanned_bytes.saturating_add(self.skipped_bytes)
    }
}

#[derive(Debug)]
enum State {
    Watching,
    /// The scanner is lost, and the policy accepts that.
    Unseen(Trouble),
    Finishing {
        deadline: Instant,
    },
    Judged(Verdict),
}

/// A batch that was not answered yet.
#[derive(Debug)]
struct Flight {
    id: u64,
    runs: Vec<Run>,
    bytes: usize,
    fresh: u64,
    hits: usize,
}

/// See the module.
pub struct Scan {
    policy: Policy,
    state: State,
    collector: Collector,
    flights: VecDeque<Flight>,
    in_flight_bytes: usize,
    output: VecDeque<Vec<u8>>,
    written: usize,
    reader: AnswerReader,
    next_id: u64,
    busy: Duration,
    /// Since when it was busy, as far as it was added to `busy`.
    busy_since: Option<Instant>,
    /// Since when it has been at the batch that it answers next.
    batch_since: Option<Instant>,
    hits: BTreeSet<Hit>,
    first_refusing: Option<Hit>,
    hits_total: u64,
    taken_bytes: u64,
    scanned_bytes: u64,
}

impl Scan {
    /// A scan that begins.
    #[must_use]
    pub fn new(policy: Policy) -> Self {
        Self {
            policy,
            state: State::Watching,
            collector: Collector::default(),
            flights: VecDeque::new(),
            in_flight_bytes: 0,
            output: VecDeque::new(),
            written: 0,
            reader: AnswerReader::default(),
            next_id: 0,
            busy: Duration::ZERO,
            busy_since: None,
            batch_since: None,
            hits: BTreeSet::new(),
            first_refusing: None,
            hits_total: 0,
            taken_bytes: 0,
            scanned_bytes: 0,
        }
    }

    /// Bytes of guest memory that begin at `offset` of `block`.
    pub fn page(&mut self, block: u16, offset: u64, piece: &[u8]) {
        match self.state {
            State::Watching => self.taken_bytes += piece.len() as u64,
            State::Unseen(_) => return self.taken_bytes += piece.len() as u64,
            State::Finishing { .. } | State::Judged(_) => return,
        }
        let mut sealed = Vec::new();
        self.collector.piece(block, offset, piece, &mut |batch| sealed.push(batch));
        let most = self.policy.most_in_flight_bytes();
        sealed.into_iter().for_each(|batch| self.send(batch, most));
    }

    /// Whether the stream may go on; false only when the policy lets it wait.
    #[must_use]
    pub fn has_room(&self) -> bool {
        let waits = matches!(self.policy.when_behind, WhenBehind::Wait { .. });
        !waits || !matches!(self.state, State::Watching) || self.in_flight_bytes < ROOM_BYTES
    }

    /// The stream is complete: the verdict comes by [`Scan::deadline`].
    pub fn finish(&mut self, now: Instant) {
        if let State::Unseen(trouble) = &self.state {
            let trouble = trouble.clone();
            return self.judge(Some(trouble));
        }
        self.tick(now);
        if !matches!(self.state, State::Watching) {
            return;
        }
        let mut sealed = Vec::new();
        self.collector.flush(&mut |batch| sealed.push(batch));
        // What the collector gives now is no more than what it held: the bound on memory stays.
        let most = self.policy.most_in_flight_bytes() + MAX_IN_FLIGHT_BYTES;
        sealed.into_iter().for_each(|batch| self.send(batch, most));
        self.put(&Request::Finish);
        if matches!(self.state, State::Watching) {
            self.state = State::Finishing { deadline: now + self.policy.verdict_budget };
        }
    }

    /// When the verdict is there at the latest.
    #[must_use]
    pub fn deadline(&self) -> Option<Instant> {
        match self.state {
            State::Finishing { deadline } => Some(deadline),
            State::Watching | State::Unseen(_) | State::Judged(_) => None,
        }
    }

    /// The verdict, once there is one: before the end only when it refuses.
    #[must_use]
    pub fn verdict(&self) -> Option<&Verdict> {
        match &self.state {
            State::Judged(verdict) => Some(verdict),
            State::Watching | State::Unseen(_) | State::Finishing { .. } => None,
        }
    }

    /// Bytes that wait for the scanner.
    #[must_use]
    pub fn output(&self) -> &[u8] {
        self.output.front().and_then(|frame| frame.get(self.written..)).unwrap_or_default()
    }

    /// The scanner's socket took so many of them.
    pub fn wrote(&mut self, count: usize) {
        self.written += count;
        if self.output().is_empty() {
            self.output.pop_front();
            self.written = 0;
        }
    }

    /// Bytes from the scanner.
    pub fn input(&mut self, bytes: &[u8], now: Instant) {
        let (mut answers, mut reader) = (Vec::new(), std::mem::take(&mut self.reader));
        let read = reader.feed(bytes, |answer| answers.push(answer));
        self.reader = reader;
        for answer in answers {
            if matches!(self.state, State::Unseen(_) | State::Judged(_)) {
                return;
            }
            if let Err(nonsense) = self.answer(answer) {
                return self.lost(&nonsense);
            }
        }
        if let Err(error) = read {
            self.lost(&format!("it sent {error}"));
        }
        self.tick(now);
    }

    /// The scanner is gone. Without it the stream passes unseen, or ends, as the policy says.
    pub fn lost(&mut self, why: &str) {
        self.give_up(Trouble::Lost(why.to_owned()));
    }

    fn give_up(&mut self, trouble: Trouble) {
        match self.state {
            State::Judged(_) | State::Unseen(_) => {}
            State::Watching if self.policy.on_timeout == WhenLate::Accept => {
                self.state = State::Unseen(trouble);
                self.collector = Collector::default();
                self.forget_output();
            }
            State::Watching | State::Finishing { .. } => self.judge(Some(trouble)),
        }
    }

    /// Time passed.
    pub fn tick(&mut self, now: Instant) {
        if let Some(since) = self.busy_since {
            self.busy += now.saturating_duration_since(since);
        }
        let is_busy = !self.flights.is_empty();
        self.busy_since = is_busy.then_some(now);
        self.batch_since = self.batch_since.or(Some(now)).filter(|_| is_busy);
        if self.deadline().is_some_and(|deadline| now >= deadline) || self.is_stuck(now) {
            self.give_up(Trouble::Late);
        }
    }

    /// Whether the stream has waited too long for one batch.
    fn is_stuck(&self, now: Instant) -> bool {
        let WhenBehind::Wait { batch_budget } = self.policy.when_behind else { return false };
        matches!(self.state, State::Watching)
            && self.batch_since.is_some_and(|since| now.saturating_duration_since(since) >= batch_budget)
    }

    fn send(&mut self, batch: Batch, most: usize) {
        let bytes = batch.bytes.len();
        if self.in_flight_bytes + bytes > most || self.busy >= self.policy.scan_budget {
            return;
        }
        let Batch { runs, bytes: content, fresh_bytes } = batch;
        let request = Request::Batch { id: self.next_id, runs, bytes: &content };
        self.put(&request);
        let Request::Batch { runs, .. } = request else { return };
        self.flights.push_back(Flight { id: self.next_id, runs, bytes, fresh: fresh_bytes as u64, hits: 0 });
        self.in_flight_bytes += bytes;
        self.next_id += 1;
    }

    fn put(&mut self, request: &Request<'_>) {
        match request.encode() {
            Ok(frame) => self.output.push_back(frame),
            Err(error) => self.lost(&format!("a batch could not be written: {error}")),
        }
    }

    /// An answer must fit what was asked.
    fn answer(&mut self, answer: Answer) -> Result<(), String> {
        match answer {
            Answer::Hit { rule, response, block, offset } => {
                self.hit(Hit { rule, block, offset, response })?;
            }
            Answer::Scanned { id, skipped_bytes } => {
                let flight = self.flights.pop_front().filter(|flight| flight.id == id);
                let flight = flight.ok_or("it answered a batch that it was not given")?;
                self.in_flight_bytes -= flight.bytes;
                self.batch_since = None;
                self.scanned_bytes += flight.fresh.saturating_sub(u64::from(skipped_bytes));
            }
            Answer::Done { hits_total, .. } => {
                if self.deadline().is_none() || !self.flights.is_empty() {
                    return Err("it was done before it had looked at every batch".to_owned());
                }
                self.hits_total = self.hits_total.max(hits_total);
                self.judge(None);
            }
            Answer::Ready { .. } | Answer::Refused { .. } => {
                return Err("it spoke of its rules in the middle of a scan".to_owned());
            }
        }
        Ok(())
    }

    fn hit(&mut self, hit: Hit) -> Result<(), String> {
        let flight = self.flights.front_mut().ok_or("it named a hit in no batch")?;
        flight.hits += 1;
        if flight.hits > MAX_HITS_PER_BATCH
            || !flight.runs.iter().any(|run| run.contains(hit.block, hit.offset))
        {
            return Err("it named a hit outside of its batch, or too many".to_owned());
        }
        // The overlap of two runs is looked at twice.
        if self.hits.contains(&hit) {
            return Ok(());
        }
        self.hits_total += 1;
        let refuses = hit.response == Response::Refuse;
        if self.hits.len() < MAX_HITS {
            self.hits.insert(hit.clone());
        }
        if refuses {
            self.first_refusing.get_or_insert(hit);
            self.judge(None);
        }
        Ok(())
    }

    /// The state is judged once.
    fn judge(&mut self, trouble: Option<Trouble>) {
        if matches!(self.state, State::Judged(_)) {
            return;
        }
        let skipped_bytes = self.taken_bytes.saturating_sub(self.scanned_bytes);
        let refuses_trouble = self.policy.on_timeout == WhenLate::Refuse;
        let outcome = match &trouble {
            _ if self.first_refusing.is_some() => Outcome::Refuse(Cause::Hit),
            Some(Trouble::Late) if refuses_trouble => Outcome::Refuse(Cause::Late),
            Some(Trouble::Lost(_)) if refuses_trouble => Outcome::Refuse(Cause::Lost),
            _ if self.policy.require_complete && skipped_bytes > 0 => Outcome::Refuse(Cause::Incomplete),
            _ => Outcome::Release,
        };
        let refusing = self.first_refusing.take();
        let others = std::mem::take(&mut self.hits).into_iter().filter(|hit| Some(hit) != refusing.as_ref());
        let hits = refusing.iter().cloned().chain(others).take(MAX_HITS).collect();
        self.state = State::Judged(Verdict {
            outcome,
            hits,
            hits_total: self.hits_total,
            scanned_bytes: self.scanned_bytes,
            skipped_bytes,
            trouble,
        });
        self.forget_output();
    }

    fn forget_output(&mut self) {
        self.output.clear();
        self.written = 0;
        self.flights.clear();
        self.in_flight_bytes = 0;
        self.busy_since = None;
        self.batch_since = None;
    }
}

#[cfg(test)]
mod tests;
