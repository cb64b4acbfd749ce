//! Which value rules stand on which field of a catalogue, and whether a field keeps them.

use super::codecs;
use super::rule::{Breach, Expect, Fields, ValueRule, number};
use super::rules;
use std::collections::BTreeMap;
use types::layout::{Catalogue, Field, Kind, Layout};

/// Every rule: those of the device families, and those of the hand-written codecs.
pub(super) fn all_rules() -> impl Iterator<Item = &'static ValueRule> {
    rules::all().chain(codecs::RULES)
}

/// A catalogue with its rules attached.
#[derive(Debug)]
pub(super) struct Tables<'c> {
    layouts: &'c [Layout],
    /// For each layout its rules, by the field's place; nothing for layouts without rules and pins.
    attached: Vec<Option<Vec<(usize, &'static ValueRule)>>>,
}

impl<'c> Tables<'c> {
    /// Attaches the rules to the fields.
    pub(super) fn new(layouts: &'c [Layout]) -> Self {
        let mut by_vmsd: BTreeMap<&str, Vec<&'static ValueRule>> = BTreeMap::new();
        for rule in all_rules() {
            by_vmsd.entry(rule.vmsd).or_default().push(rule);
        }
        let attach = |layout: &Layout| {
            let rules = by_vmsd.get(layout.vmsd.as_str()).map(Vec::as_slice).unwrap_or_default();
            let on_field = |(place, field): (usize, &Field)| {
                let name = field.name.clone();
                rules.iter().filter(move |rule| rule.field == name).map(move |rule| (place, *rule))
            };
            let attached: Vec<_> = layout.fields.iter().enumerate().flat_map(on_field).collect();
            let watched = !attached.is_empty() || layout.fields.iter().any(|f| f.pinned.is_some());
            watched.then_some(attached)
        };
        Self { layouts, attached: layouts.iter().map(attach).collect() }
    }

    /// The tables of a catalogue.
    pub(super) fn of(catalogue: &'c Catalogue) -> Self {
        Self::new(&catalogue.layouts)
    }

    pub(super) fn layout(&self, index: u32) -> Option<&'c Layout> {
        self.layouts.get(index as usize)
    }

    /// Whether anything in the layout has to be looked at.
    pub(super) fn watches(&self, index: u32) -> bool {
        self.attached.get(index as usize).is_some_and(Option::is_some)
    }

    /// The rules on one field.
    pub(super) fn rules(&self, index: u32, place: usize) -> impl Iterator<Item = &'static ValueRule> {
        let attached = self.attached.get(index as usize).and_then(Option::as_deref).unwrap_or_default();
        attached.iter().filter(move |(p, _)| *p == place).map(|(_, rule)| *rule)
    }
}

/// Whether a field keeps a rule. Each element of an array is looked at on its own.
pub(super) fn check(
    rule: &ValueRule,
    field: &Field,
    bytes: &[u8],
    fields: &Fields<'_, '_>,
) -> Result<(), Breach> {
    if let Expect::Check(check) = rule.expect {
        return check(fields);
    }
    let size = match field.kind {
        Kind::Array(size, _) => size as usize,
        Kind::Counted(ref counted) => counted.element as usize,
        _ => bytes.len(),
    };
    bytes.chunks(size.max(1)).try_for_each(|element| check_element(rule.expect, element, fields))
}

fn check_element(expect: Expect, element: &[u8], fields: &Fields<'_, '_>) -> Result<(), Breach> {
    let Some(held) = number(element) else { return Ok(()) };
    let breach = |holds: bool, expected: String| {
        if holds { Ok(()) } else { Err(Breach { expected, found: held.to_string() }) }
    };
    match expect {
        // The pin is the field's own, and Check was called before.
        Expect::Pinned | Expect::Check(_) => Ok(()),
        Expect::AtMost(most) => breach(held <= most, format!("at most {most}")),
        Expect::Within(least, most) => {
            breach((least..=most).contains(&held), format!("from {least} to {most}"))
        }
        Expect::OneOf(these) => breach(these.contains(&held), format!("one of {these:?}")),
        Expect::PowerOfTwoOrZero(most) => {
            let good = held == 0 || (held.is_power_of_two() && held <= most);
            breach(good, format!("a power of two up to {most}, or zero"))
        }
        Expect::SignedWithin(least, most) => {
            let held = signed(held, element.len());
            if (least..=most).contains(&held) {
                return Ok(());
            }
            Err(Breach { expected: format!("from {least} to {most}"), found: held.to_string() })
        }
        Expect::AtMostField(other) => {
            let most = fields.number(other).unwrap_or(0);
            breach(held <= most, format!("at most {other}, {most}"))
        }
    }
}

/// A number of that many bytes, with its sign.
fn signed(value: u64, bytes: usize) -> i64 {
    let spare = 64u32.saturating_sub(u32::try_from(bytes).unwrap_or(8).saturating_mul(8));
    value.checked_shl(spare).unwrap_or(0).cast_signed() >> spare.min(63)
}

/// How bytes differ from their pin; numbers are told, longer values not.
pub(super) fn unpinned(pinned: &[u8], bytes: &[u8]) -> Breach {
    match (number(pinned), number(bytes)) {
        (Some(expected), Some(found)) => {
            Breach { expected: format!("{expected}, as on the target"), found: found.to_string() }
        }
        _ => Breach { expected: "the same bytes as on the target".to_owned(), found: "others".to_owned() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signs_follow_the_width() {
        for (value, bytes, expect) in
            [(0xff, 1, -1), (0x7f, 1, 127), (0xffff_ffff, 4, -1), (5, 8, 5), (1, 0, 0)]
        {
            assert_eq!(signed(value, bytes), expect, "{value:#x} in {bytes} bytes");
        }
    }

    #[test]
    fn each_expectation_tells_good_from_bad() {
        let fields = Fields { fields: &[("max", &[7])] };
        let cases = [
            (Expect::AtMost(3), 3u8, 4u8),
            (Expect::Within(2, 3), 2, 1),
            (Expect::OneOf(&[1, 9]), 9, 2),
            (Expect::PowerOfTwoOrZero(16), 16, 32),
            (Expect::PowerOfTwoOrZero(16), 0, 3),
            (Expect::SignedWithin(-1, 4), 0xff, 0xfe),
            (Expect::AtMostField("max"), 7, 8),
        ];
        for (expect, good, bad) in cases {
            assert!(check_element(expect, &[good], &fields).is_ok(), "{expect:?} {good}");
            assert!(check_element(expect, &[bad], &fields).is_err(), "{expect:?} {bad}");
        }
    }
}
