//! Streams with something wrong with them: a seeded, field-aware mutator.
//!
//! A mutation is a few edits of a good stream, made where its [`Marks`] say that something is: lengths, ids, names,
//! order, repetition, omission, nesting, bytes behind the end, device state; some with the description changed so
//! that the lie is consistent. Some leave the stream legal, on purpose.

mod acts;

use std::ops::Range;

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::Value;

use super::gate::Enrolled;
use super::marks::{Area, Marks};
use super::rng::Rng;
use super::shape::Shape;

/// What a source with its return path on sends behind its configuration: OPEN_RETURN_PATH, PING 1.
const RETURN_PATH: [u8; 14] = [8, 0, 1, 0, 0, 8, 0, 2, 0, 4, 0, 0, 0, 1];
/// Attempts at an act that finds something to act on.
const MAX_ATTEMPTS: usize = 50;

/// A good stream that mutations begin from.
#[derive(Debug, Clone)]
pub struct Base {
    /// Its name, for reports.
    pub name: String,
    /// The VM that it is of.
    pub shape: Shape,
    /// The stream.
    pub stream: Vec<u8>,
    /// Its marks.
    pub marks: Marks,
    /// The description at its end.
    pub description: Value,
    /// What it is compared with.
    pub enrolled: Enrolled,
}

/// A change at one place of the base.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Edit {
    range: Range<usize>,
    bytes: Vec<u8>,
    change: Change,
}

/// What a change was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    /// Where in the base.
    pub offset: usize,
    /// The field or unit.
    pub field: String,
    /// What happened to it.
    pub what: String,
    /// Whether it is inside the state of a device, where the outer grammar sees nothing.
    pub inside_device: bool,
}

/// A mutated stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mutant {
    /// The stream.
    pub stream: Vec<u8>,
    /// What was changed, in stream order.
    pub changes: Vec<Change>,
}

impl Base {
    /// A base from a recording without a return path.
    pub fn new(name: &str, shape: &Shape, recording: &[u8], enrolled: &Enrolled) -> Result<Self> {
        let configuration_end = Marks::of(recording)?.configuration_end;
        let mut stream = recording.to_vec();
        stream.splice(configuration_end..configuration_end, RETURN_PATH);
        let marks = Marks::of(&stream)?;
        let description = serde_json::from_slice(stream.get(marks.description.clone()).unwrap_or_default())
            .context("reading the description")?;
        Ok(Self {
            name: name.to_owned(),
            shape: shape.clone(),
            stream,
            marks,
            description,
            enrolled: enrolled.clone(),
        })
    }

    /// One mutation: usually one act, sometimes two or three.
    #[must_use]
    pub fn mutate(&self, rng: &mut Rng) -> Mutant {
        let wanted = *rng.weighted(&[(7, 1), (2, 2), (1, 3)]).unwrap_or(&1);
        let mut edits: Vec<Edit> = Vec::new();
        let mut acted = 0;
        for _ in 0..MAX_ATTEMPTS {
            let act = acts::act(self, rng);
            if !act.is_empty() && !act.iter().any(|new| edits.iter().any(|old| old.meets(new))) {
                edits.extend(act);
                acted += 1;
            }
            if acted == wanted {
                break;
            }
        }
        edits.sort_by_key(|edit| edit.range.start);
        let mut stream = Vec::with_capacity(self.stream.len() + 64);
        let mut at = 0;
        for edit in &edits {
            stream.extend_from_slice(self.stream.get(at..edit.range.start).unwrap_or_default());
            stream.extend_from_slice(&edit.bytes);
            at = edit.range.end;
        }
        stream.extend_from_slice(self.stream.get(at..).unwrap_or_default());
        let state = self.marks.fields(Area::Payload);
        let changes = edits.into_iter().map(|edit| {
            let inside_device = state.iter().any(|field| field.range.contains(&edit.range.start));
            Change { inside_device, ..edit.change }
        });
        Mutant { stream, changes: changes.collect() }
    }

    fn bytes(&self, range: &Range<usize>) -> &[u8] {
        self.stream.get(range.clone()).unwrap_or_default()
    }
}

impl Mutant {
    /// The change that QEMU's complaint is about: the first in the device that it names, else the first inside any
    /// device (what the inspector can see there is least), else the first of all.
    #[must_use]
    pub fn blamed(&self, complaint: &str) -> Option<&Change> {
        let device = complaint.split("of device '").nth(1).and_then(|rest| rest.split('\'').next());
        let named = |change: &&Change| device.is_some_and(|device| change.field.starts_with(device));
        let inside = || self.changes.iter().find(|change| change.inside_device);
        self.changes.iter().find(named).or_else(inside).or(self.changes.first())
    }
}

impl Edit {
    fn new(range: Range<usize>, bytes: Vec<u8>, field: &str, what: impl Into<String>) -> Self {
        let change =
            Change { offset: range.start, field: field.to_owned(), what: what.into(), inside_device: false };
        Self { range, bytes, change }
    }

    /// Whether the two are about the same bytes.
    fn meets(&self, other: &Self) -> bool {
        let (a, b) = (&self.range, &other.range);
        a == b || (a.start < b.end && b.start < a.end)
    }
}

#[cfg(test)]
mod tests;
