//! Which value rules stand on which field of a catalogue, and whether a field keeps them.

use super::codecs;
use super::rule::{Breach, Expect, Fields, ValueRule, number};
use super::rules;
use std::collections::BTreeMap;
use types::layout::{Field, Kind, Layout};

/// Every rule: those of the device families, and those of the hand-written codecs.
pub(super) fn all_rules() -> impl Iterator<Item = &'static ValueRule> {
    rules::all().chain(codecs::RULES)
}

/// A catalogue with its rules attached.
#[derive(Debug)]
pub(super) struct Tables<'c> {
    layouts: &'c [Layout],
    /// For each layout its rules, by the field's place; nothing for layouts without rules.
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
            let mut attached = Vec::new();
            if let Some(rules) = by_vmsd.get(layout.vmsd.as_str()) {
                for (place, field) in layout.fields.iter().enumerate() {
                    attached
                        .extend(rules.iter().filter(|r| r.field == field.name).map(|rule| (place, *rule)));
                }
            }
            (!attached.is_empty()).then_some(attached)
        };
        Self { layouts, attached: layouts.iter().map(attach).collect() }
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

/// Whether a field keeps a rule. Each element of an array is looked at on its own. What can't be judged breaks it: a
/// field wider than a number, a pin without the dry run's bytes, a comparison with a field that is not there.
pub(super) fn check(
    rule: &ValueRule,
    field: &Field,
    bytes: &[u8],
    fields: &Fields<'_, '_>,
) -> Result<(), Breach> {
    match rule.expect {
        Expect::Check(check) => return check(fields),
        Expect::Pinned => return pin(field, bytes),
        _ => {}
    }
    let size = match field.kind {
        Kind::Array(size, _) => size as usize,
        Kind::Counted(ref counted) => counted.element as usize,
        _ => bytes.len(),
    };
    bytes.chunks(size.max(1)).try_for_each(|element| check_element(rule.expect, element, fields))
}

fn check_element(expect: Expect, element: &[u8], fields: &Fields<'_, '_>) -> Result<(), Breach> {
    let Some(held) = number(element) else {
        let found = format!("{} bytes", element.len());
        return Err(Breach { expected: "a number of up to 8 bytes".to_owned(), found });
    };
    let breach = |holds: bool, expected: String| {
        if holds { Ok(()) } else { Err(Breach { expected, found: held.to_string() }) }
    };
    match expect {
        // Judged as a whole, before.
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
            let most = fields.number(other);
            let shown = most.map_or_else(|| "absent".to_owned(), |most| most.to_string());
            breach(most.is_some_and(|most| held <= most), format!("at most {other}, which is {shown}"))
        }
    }
}

/// A number of that many bytes, with its sign.
fn signed(value: u64, bytes: usize) -> i64 {
    let spare = 64u32.saturating_sub(u32::try_from(bytes).unwrap_or(8).saturating_mul(8));
    value.checked_shl(spare).unwrap_or(0).cast_signed() >> spare.min(63)
}

/// Whether a field holds its pin, the dry run's bytes; numbers are told, longer values not.
fn pin(field: &Field, bytes: &[u8]) -> Result<(), Breach> {
    let breach =
        |expected: &str, found: &str| Err(Breach { expected: expected.to_owned(), found: found.to_owned() });
    let Some(pinned) = &field.pinned else { return breach("a field that the dry run has", "one more") };
    if pinned.0 == bytes {
        return Ok(());
    }
    match (number(&pinned.0), number(bytes)) {
        (Some(expected), Some(found)) => breach(&format!("{expected}, as on the target"), &found.to_string()),
        _ => breach("the same bytes as on the target", "others"),
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
