//! Finds which entries of a dry run's description belong to which declared field.
//!
//! A declared field has one entry, an entry for each element, or none where it is conditional or empty. Names
//! repeat, so the first assignment that takes every entry counts; there is more than one way only around
//! conditional fields, of which a description has a handful.

use super::build::Why;
use super::describe::{Declared, DeclaredField, NodeField};
use super::known;

/// Most places where both ways are tried: 2 to this power is the work.
const MAX_CHOICES: usize = 12;

/// The declared fields with their entries.
pub(super) fn align<'d, 'n>(
    declared: &'d Declared,
    entries: &'n [NodeField],
) -> Result<Vec<(&'d DeclaredField, &'n [NodeField])>, Why> {
    let conditional = declared.fields.iter().filter(|f| f.conditional).count();
    let mut found = Vec::with_capacity(declared.fields.len());
    let choices = if conditional > MAX_CHOICES { 0 } else { conditional };
    if step(declared, &declared.fields, entries, choices, &mut found) {
        return Ok(found);
    }
    Err(format!("{:?} in the dry run is not what is declared", declared.name))
}

fn step<'d, 'n>(
    of: &Declared,
    declared: &'d [DeclaredField],
    entries: &'n [NodeField],
    choices: usize,
    found: &mut Vec<(&'d DeclaredField, &'n [NodeField])>,
) -> bool {
    let Some((field, rest)) = declared.split_first() else { return entries.is_empty() };
    let length = run(field, entries);
    if length == 0 && !may_be_absent(of, field) {
        return false;
    }
    let (own, others) = entries.split_at(length.min(entries.len()));
    let mark = found.len();
    found.push((field, own));
    if step(of, rest, others, choices, found) {
        return true;
    }
    found.truncate(mark);
    if length == 0 || !field.conditional || choices == 0 {
        return false;
    }
    found.push((field, &[]));
    let done = step(of, rest, entries, choices - 1, found);
    if !done {
        found.truncate(mark);
    }
    done
}

fn may_be_absent(of: &Declared, field: &DeclaredField) -> bool {
    field.conditional
        || field.version_id > of.version_id
        || known::sized_by_properties(&of.name, &field.name)
        || known::counted(&of.name, &field.name).is_some()
}

/// How many entries at the start are of this field.
fn run(field: &DeclaredField, entries: &[NodeField]) -> usize {
    let Some(first) = entries.first().filter(|entry| is_of(field, entry)) else { return 0 };
    if first.index != Some(0) {
        return 1;
    }
    // QEMU leaves the index of the last element out.
    let indexed = entries
        .iter()
        .enumerate()
        .take_while(|(place, entry)| is_of(field, entry) && entry.index.is_some_and(|i| i as usize == *place))
        .count();
    let last = entries.get(indexed).is_some_and(|entry| is_of(field, entry) && entry.index.is_none());
    indexed + usize::from(last)
}

fn is_of(field: &DeclaredField, entry: &NodeField) -> bool {
    // The size tells conditional twins apart, like the two sizes of a PCI configuration space.
    let twin = field.conditional && field.node.is_none() && field.size as usize != entry.bytes();
    entry.is(&field.name) && field.node.is_some() == entry.is_struct() && !twin
}
