//! From samples to a judgement: how many copies executed at once, for how long none did, did time go back.
//!
//! **When does a copy execute?** Its counter moves *and* its vCPU threads use CPU time. Both are needed: while
//! the source still runs, each pass of the migration writes the counter page into the target's memory, so the
//! target's counter moves although the target does not execute; and vCPU threads wake for other reasons than to run the guest.
//! Movements closer than `JOIN_US` form one *interval*, and an interval counts once `CONFIRM_MOVES`
//! movements were seen in it, so that a single odd reading proves nothing.
//!
//! **When do two copies execute at once?** A movement seen in a sample happened some time since the sample
//! before. So of an interval only the part from the sample that saw its first movement to the sample *before*
//! its last movement is certain. When the certain parts of two copies overlap by more than `OVERLAP_US`, two
//! copies ran at once. A hand-over never looks like that, however late the samples are: lateness shrinks the
//! certain parts. The price is that a double run of less than about 5 ms can be missed.

use std::collections::VecDeque;

use serde::Serialize;

/// Movements closer than this belong to one interval: a loaded machine may not run a vCPU for some milliseconds.
const JOIN_US: u64 = 25_000;
/// Movements that make an interval count.
const CONFIRM_MOVES: u64 = 4;
/// Overlap of the certain parts above which two copies ran at once: two samples.
const OVERLAP_US: u64 = 2_000;
/// Window in which the vCPUs' CPU time must have grown. The kernel brings the figure of a running thread up to date at its tick, every 4 ms or faster.
const RUN_WINDOW_US: u64 = 12_000;
/// CPU time within the window that shows guest execution; QEMU's own wake-ups of a waiting vCPU are shorter.
const LEAST_RUN_NS: u64 = 150_000;
/// CPU time readings kept per copy.
const MAX_READINGS: usize = 64;
/// Intervals reported per copy; further ones are only counted.
const MAX_INTERVALS: usize = 64;

/// One reading of one copy.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    /// Which copy, as numbered by [`Judge::add_copy`].
    pub copy: usize,
    /// When, in microseconds on any steady clock.
    pub at_us: u64,
    /// The guest's counter.
    pub counter: u64,
    /// CPU time of the copy's vCPU threads; `None` where it can't be read.
    pub vcpu_run_ns: Option<u64>,
}

/// The judgement.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Verdict {
    /// Most copies that executed at once.
    pub copies: usize,
    /// Longest certain overlap of two copies, in milliseconds.
    pub longest_overlap_ms: f64,
    /// Longest time in which no copy moved, between two movements, in milliseconds.
    pub longest_gap_ms: f64,
    /// Time since the last movement of any copy, in milliseconds; `None` before the first.
    pub open_gap_ms: Option<f64>,
    /// Whether no copy ever executed from a state older than one that had executed anywhere.
    pub counter_monotonic: bool,
    /// Each copy's movements.
    pub runs: Vec<CopyRuns>,
}

/// When one copy executed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CopyRuns {
    /// Intervals of execution, in milliseconds since the observer started; the last ones where there were many.
    pub intervals_ms: Vec<(f64, f64)>,
    /// Number of intervals.
    pub interval_count: u64,
    /// Movements seen.
    pub moves: u64,
    /// Counter at the first and last movement.
    pub counters: Option<(u64, u64)>,
}

/// Takes samples one by one; memory stays bounded however long it watches.
#[derive(Debug, Default)]
pub struct Judge {
    copies: Vec<Watched>,
    most_at_once: usize,
    longest_overlap_us: u64,
    longest_gap_us: u64,
    last_move_us: Option<u64>,
    highest: u64,
    went_back: bool,
}

#[derive(Debug, Default)]
struct Watched {
    last: Option<(u64, u64)>,
    readings: VecDeque<(u64, u64)>,
    interval: Option<Interval>,
    past: VecDeque<(u64, u64)>,
    interval_count: u64,
    moves: u64,
    counters: Option<(u64, u64)>,
}

#[derive(Debug, Clone, Copy)]
struct Interval {
    /// The sample that saw the first movement.
    begin_us: u64,
    /// The sample before the one that saw the last movement.
    certain_end_us: u64,
    /// The sample that saw the last movement.
    end_us: u64,
    moves: u64,
    first_counter: u64,
}

impl Interval {
    fn counts(&self) -> bool {
        self.moves >= CONFIRM_MOVES
    }

    fn overlap_us(&self, other: &Self) -> u64 {
        let end = self.certain_end_us.min(other.certain_end_us);
        end.saturating_sub(self.begin_us.max(other.begin_us))
    }
}

impl Judge {
    /// A new copy; copies are numbered from zero in this order.
    pub fn add_copy(&mut self) {
        self.copies.push(Watched::default());
    }

    /// Takes one reading. Readings of one copy come in the order of time.
    pub fn sample(&mut self, sample: Sample) {
        let copy = &mut self.copies[sample.copy];
        let executed = copy.executed(&sample);
        let before = copy.last.replace((sample.at_us, sample.counter));
        let Some((before_us, counter)) = before else {
            return;
        };
        if counter == sample.counter || !executed {
            return;
        }
        let (interval, confirmed) = copy.moved(before_us, &sample);
        if !interval.counts() {
            return;
        }
        let from = if confirmed { interval.first_counter } else { sample.counter };
        self.judge_time(from, sample.counter);
        self.judge_gap(if confirmed { interval.begin_us } else { sample.at_us }, sample.at_us);
        self.judge_overlap(sample.copy, interval);
    }

    /// Copies that moved within the last `within_us`.
    #[must_use]
    pub fn moving(&self, now_us: u64, within_us: u64) -> Vec<usize> {
        let is_moving = |copy: &Watched| {
            copy.interval.is_some_and(|interval| interval.counts() && interval.end_us + within_us >= now_us)
        };
        let copies = self.copies.iter().enumerate();
        copies.filter(|(_, copy)| is_moving(copy)).map(|(index, _)| index).collect()
    }

    /// The judgement at this time.
    #[must_use]
    pub fn verdict(&self, now_us: u64) -> Verdict {
        Verdict {
            copies: self.most_at_once,
            longest_overlap_ms: millis(self.longest_overlap_us),
            longest_gap_ms: millis(self.longest_gap_us),
            open_gap_ms: self.last_move_us.map(|last| millis(now_us.saturating_sub(last))),
            counter_monotonic: !self.went_back,
            runs: self.copies.iter().map(Watched::runs).collect(),
        }
    }

    /// I2: guest state never goes back in time.
    fn judge_time(&mut self, from: u64, to: u64) {
        self.went_back |= from < self.highest;
        self.highest = self.highest.max(to);
    }

    fn judge_gap(&mut self, first_move_us: u64, last_move_us: u64) {
        if let Some(last) = self.last_move_us {
            self.longest_gap_us = self.longest_gap_us.max(first_move_us.saturating_sub(last));
        }
        self.last_move_us = self.last_move_us.max(Some(last_move_us));
    }

    /// I1: at most one.
    fn judge_overlap(&mut self, index: usize, interval: Interval) {
        let mut at_once = 1;
        for (other, copy) in self.copies.iter().enumerate() {
            let Some(theirs) = copy.interval.filter(|theirs| other != index && theirs.counts()) else {
                continue;
            };
            let overlap_us = interval.overlap_us(&theirs);
            self.longest_overlap_us = self.longest_overlap_us.max(overlap_us);
            at_once += usize::from(overlap_us > OVERLAP_US);
        }
        self.most_at_once = self.most_at_once.max(at_once);
    }
}

impl Watched {
    /// Whether the vCPUs used CPU time lately; where that can't be read, the counter alone must do.
    fn executed(&mut self, sample: &Sample) -> bool {
        let Some(run_ns) = sample.vcpu_run_ns else {
            return true;
        };
        self.readings.push_back((sample.at_us, run_ns));
        let oldest_us = sample.at_us.saturating_sub(RUN_WINDOW_US);
        // One reading older than the window stays, as its beginning.
        while self.readings.len() > MAX_READINGS
            || self.readings.get(1).is_some_and(|(at_us, _)| *at_us <= oldest_us)
        {
            self.readings.pop_front();
        }
        let begin_ns = self.readings.front().map_or(run_ns, |(_, ns)| *ns);
        run_ns.saturating_sub(begin_ns) >= LEAST_RUN_NS
    }

    /// Notes a movement; says also whether this one made the interval count.
    fn moved(&mut self, before_us: u64, sample: &Sample) -> (Interval, bool) {
        let joined = self.interval.filter(|old| sample.at_us - old.end_us <= JOIN_US);
        let interval = match joined {
            Some(old) => Interval {
                certain_end_us: before_us.max(old.begin_us),
                end_us: sample.at_us,
                moves: old.moves + 1,
                ..old
            },
            None => {
                self.close_interval();
                Interval {
                    begin_us: sample.at_us,
                    certain_end_us: sample.at_us,
                    end_us: sample.at_us,
                    moves: 1,
                    first_counter: sample.counter,
                }
            }
        };
        self.interval = Some(interval);
        let confirmed = interval.moves == CONFIRM_MOVES;
        if interval.counts() {
            self.moves += if confirmed { CONFIRM_MOVES } else { 1 };
            self.interval_count += u64::from(confirmed);
            let first = self.counters.map_or(interval.first_counter, |(first, _)| first);
            self.counters = Some((first, sample.counter));
        }
        (interval, confirmed)
    }

    fn close_interval(&mut self) {
        if let Some(old) = self.interval.take().filter(Interval::counts) {
            if self.past.len() == MAX_INTERVALS {
                self.past.pop_front();
            }
            self.past.push_back((old.begin_us, old.end_us));
        }
    }

    fn runs(&self) -> CopyRuns {
        let open = self.interval.filter(Interval::counts);
        let open = open.map(|interval| (interval.begin_us, interval.end_us));
        let all = self.past.iter().copied().chain(open);
        CopyRuns {
            intervals_ms: all.map(|(begin, end)| (millis(begin), millis(end))).collect(),
            interval_count: self.interval_count,
            moves: self.moves,
            counters: self.counters,
        }
    }
}

/// Microseconds as milliseconds. Exact: a run of the lab is far shorter than 2^52 microseconds.
#[expect(clippy::cast_precision_loss)]
fn millis(micros: u64) -> f64 {
    micros as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A copy that executes (or is only written into) over some milliseconds, starting from a counter.
    struct Span {
        copy: usize,
        from_ms: u64,
        to_ms: u64,
        counter: u64,
        step: u64,
        executes: bool,
    }

    fn runs(copy: usize, from_ms: u64, to_ms: u64, counter: u64) -> Span {
        Span { copy, from_ms, to_ms, counter, step: 1, executes: true }
    }

    /// Plays the spans sample by sample: every copy is read each `distance_ms`.
    fn play(spans: &[Span], end_ms: u64, distance_ms: u64) -> Verdict {
        let mut judge = Judge::default();
        judge.add_copy();
        judge.add_copy();
        let mut counters = [0; 2];
        let mut run_ns = [0_u64; 2];
        for ms in 0..end_ms {
            for span in spans.iter().filter(|span| (span.from_ms..span.to_ms).contains(&ms)) {
                if (ms - span.from_ms) % span.step == 0 {
                    counters[span.copy] = span.counter + (ms - span.from_ms) * 3;
                }
                run_ns[span.copy] += u64::from(span.executes) * 400_000;
            }
            if ms % distance_ms != 0 {
                continue;
            }
            for copy in 0..2 {
                judge.sample(Sample {
                    copy,
                    at_us: ms * 1000,
                    counter: counters[copy],
                    vcpu_run_ns: Some(run_ns[copy]),
                });
            }
        }
        judge.verdict(end_ms * 1000)
    }

    #[test]
    fn a_hand_over_is_one_copy_with_a_gap() {
        let verdict = play(&[runs(0, 0, 100, 1), runs(1, 140, 300, 298)], 300, 1);
        assert_eq!(verdict.copies, 1);
        assert!(verdict.counter_monotonic);
        assert!((38.0..46.0).contains(&verdict.longest_gap_ms), "{verdict:?}");
        assert_eq!(verdict.open_gap_ms, Some(1.0));
    }

    #[test]
    fn a_hand_over_without_any_pause_is_still_one_copy_even_with_late_samples() {
        for distance_ms in [1, 2, 5, 10] {
            let verdict = play(&[runs(0, 0, 200, 1), runs(1, 200, 400, 600)], 400, distance_ms);
            assert_eq!(verdict.copies, 1, "{distance_ms} ms: {verdict:?}");
            assert!(verdict.counter_monotonic, "{distance_ms} ms: {verdict:?}");
        }
    }

    #[test]
    fn two_copies_that_run_at_once_are_two() {
        for overlap_ms in [15, 40, 500] {
            let verdict = play(&[runs(0, 0, 200 + overlap_ms, 1), runs(1, 200, 900, 598)], 900, 1);
            assert_eq!(verdict.copies, 2, "{overlap_ms} ms: {verdict:?}");
        }
    }

    #[test]
    fn a_page_that_is_only_written_into_does_not_execute() {
        let loads = Span { executes: false, step: 5, ..runs(1, 20, 180, 10) };
        let verdict = play(&[runs(0, 0, 200, 1), loads, runs(1, 240, 400, 598)], 400, 1);
        assert_eq!(verdict.copies, 1, "{verdict:?}");
        assert!(verdict.counter_monotonic);
    }

    #[test]
    fn a_target_that_starts_from_an_older_state_is_a_rollback() {
        let verdict = play(&[runs(0, 0, 100, 1), runs(1, 140, 300, 250)], 300, 1);
        assert_eq!(verdict.copies, 1);
        assert!(!verdict.counter_monotonic);
    }

    #[test]
    fn a_source_that_runs_on_after_an_abort_is_one_copy_and_no_rollback() {
        let verdict = play(&[runs(0, 0, 100, 1), runs(0, 160, 300, 298)], 300, 1);
        assert_eq!((verdict.copies, verdict.counter_monotonic), (1, true));
        assert_eq!(verdict.runs[0].interval_count, 2);
        assert!(verdict.runs[1].intervals_ms.is_empty());
    }

    #[test]
    fn nothing_running_leaves_an_open_gap() {
        let verdict = play(&[runs(0, 0, 100, 1)], 400, 1);
        assert!(verdict.open_gap_ms.is_some_and(|gap| gap > 295.0), "{verdict:?}");
        assert_eq!(play(&[], 10, 1).open_gap_ms, None);
    }
}
