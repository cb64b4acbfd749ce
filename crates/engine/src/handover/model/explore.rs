//! Breadth first over every reachable state.

use super::state::{Action, State};
use super::{Model, Trace};
use crate::handover::sim::Invariant;
use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hash, Hasher};

/// What an exploration found.
#[derive(Debug)]
pub struct Exploration {
    /// States, told apart by 64 bits of a hash.
    pub states: u64,
    /// Steps taken, those to known states included.
    pub steps: u64,
    /// Steps of the longest shortest way to a state.
    pub depth: u32,
    /// Fair runs for liveness.
    pub fair_runs: u64,
    /// Whether everything within the bound was seen.
    pub complete: bool,
    /// What was left out of the states and should not have been, if that is so.
    pub unsound: Option<String>,
    /// The shortest way to a broken invariant.
    pub broken: Option<(Invariant, Trace)>,
}

/// A fingerprint is a hash already.
#[derive(Default)]
struct Given(u64);

impl Hasher for Given {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, _: &[u8]) {}
    fn write_u64(&mut self, n: u64) {
        self.0 = n;
    }
}

/// Folds what is written into 64 bits: words are filled up, then each is mixed in by a multiplication.
#[derive(Default)]
struct Fold {
    folded: u64,
    word: u64,
    bits: u32,
}

impl Fold {
    const SALT: u64 = 0x9E37_79B9_7F4A_7C15;
    const FACTOR: u128 = 0xA076_1D64_78BD_642F;

    fn put(&mut self, n: u64, bits: u32) {
        if self.bits + bits > u64::BITS {
            self.mix();
        }
        self.word |= n << self.bits;
        self.bits += bits;
    }

    /// Both halves of the product are kept.
    #[allow(clippy::cast_possible_truncation)]
    fn mix(&mut self) {
        let product = u128::from(self.folded ^ self.word ^ Self::SALT) * Self::FACTOR;
        self.folded = ((product as u64) ^ (product >> 64) as u64).wrapping_add(Self::SALT);
        (self.word, self.bits) = (0, 0);
    }
}

impl Hasher for Fold {
    fn finish(&self) -> u64 {
        let mut last = Self { ..*self };
        last.mix();
        last.word = Self::SALT.rotate_left(31);
        last.mix();
        last.folded.max(1)
    }
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.put(u64::from(*byte), u8::BITS);
        }
    }
    fn write_u8(&mut self, n: u8) {
        self.put(u64::from(n), u8::BITS);
    }
    fn write_u16(&mut self, n: u16) {
        self.put(u64::from(n), u16::BITS);
    }
    fn write_u32(&mut self, n: u32) {
        self.put(u64::from(n), u32::BITS);
    }
    /// Lengths and the numbers of variants, all small.
    fn write_usize(&mut self, n: usize) {
        self.put(n as u64 & 0xff, u8::BITS);
    }
    fn write_isize(&mut self, n: isize) {
        self.write_usize(n.unsigned_abs());
    }
}

pub(super) fn fingerprint(state: &State) -> u64 {
    let mut hasher = Fold::default();
    state.hash(&mut hasher);
    hasher.finish()
}

/// Explores until an invariant of `wanted` is broken (any, if empty), everything was seen, or `limit` states were.
#[must_use]
pub fn explore(model: &Model, wanted: &[Invariant], limit: u64) -> Exploration {
    let first = model.first();
    let mut parents: HashMap<u64, u64, BuildHasherDefault<Given>> = HashMap::default();
    parents.insert(fingerprint(&first), 0);
    let mut queue: VecDeque<(State, u32)> = VecDeque::from([(first, 0)]);
    let mut found = Exploration {
        states: 1,
        steps: 0,
        depth: 0,
        fair_runs: 0,
        complete: false,
        unsound: None,
        broken: None,
    };
    let mut actions = Vec::new();
    let looks = wanted.is_empty() || wanted.iter().any(|i| i.is_liveness());
    while let Some((state, depth)) = queue.pop_front() {
        found.depth = depth;
        let hash = fingerprint(&state);
        let unsafe_now = state.violation();
        if let Some(invariant) = unsafe_now.or_else(|| if looks { model.broken(&state) } else { None })
            && (wanted.is_empty() || wanted.contains(&invariant))
        {
            let way = way_to(model, &parents, hash);
            found.broken = Some((invariant, model.explain(&way)));
            break;
        }
        if unsafe_now.is_some() {
            continue;
        }
        if found.states > limit {
            break;
        }
        model.actions(&state, &mut actions);
        for action in actions.drain(..) {
            let next = model.next(&state, action);
            found.steps += 1;
            if next == state {
                continue;
            }
            if let std::collections::hash_map::Entry::Vacant(entry) = parents.entry(fingerprint(&next)) {
                entry.insert(hash);
                found.states += 1;
                queue.push_back((next, depth + 1));
            }
        }
    }
    found.unsound = model.tables().check_dead().err();
    found.complete = found.broken.is_none() && queue.is_empty();
    found.fair_runs = model.tables().fair_runs;
    found
}

/// The actions on the way to a state: forwards again, along the fingerprints.
fn way_to(model: &Model, parents: &HashMap<u64, u64, BuildHasherDefault<Given>>, to: u64) -> Vec<Action> {
    let mut hashes = vec![to];
    while let Some(parent) = hashes.last().and_then(|h| parents.get(h)).filter(|p| **p != 0) {
        hashes.push(*parent);
    }
    hashes.pop();
    let mut state = model.first();
    let mut way = Vec::new();
    let mut actions = Vec::new();
    for hash in hashes.into_iter().rev() {
        model.actions(&state, &mut actions);
        let step =
            actions.drain(..).map(|a| (a, model.next(&state, a))).find(|(_, s)| fingerprint(s) == hash);
        let Some((action, next)) = step else { break };
        way.push(action);
        state = next;
    }
    way
}
