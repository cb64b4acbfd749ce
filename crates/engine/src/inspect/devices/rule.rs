//! What a value rule is: one field of one VMState description, and what the field may hold (INV-D5 to D8).
//!
//! Rules are code, not catalogue data: a catalogue says where fields are, never what is allowed in them. The exception is
//! [`Expect::Pinned`], whose value the catalogue brings: what the target's own QEMU wrote in its dry run.

/// A rule on one field.
#[derive(Debug, Clone, Copy)]
pub struct ValueRule {
    /// Name of the VMState description (its `vmsd_name`) that directly holds the field.
    pub vmsd: &'static str,
    /// The field's name in that description.
    pub field: &'static str,
    /// The invariant, e.g. `INV-D5`.
    pub rule: &'static str,
    /// What it may hold. Each element of an array is looked at on its own.
    pub expect: Expect,
}

impl ValueRule {
    /// A count or a size that shapes the load: INV-D5.
    #[must_use]
    pub const fn shape(vmsd: &'static str, field: &'static str, expect: Expect) -> Self {
        Self { vmsd, field, rule: "INV-D5", expect }
    }

    /// An index, a length or another number that leads into an array: INV-D6.
    #[must_use]
    pub const fn index(vmsd: &'static str, field: &'static str, expect: Expect) -> Self {
        Self { vmsd, field, rule: "INV-D6", expect }
    }

    /// What the device is, which no guest can change: INV-D7.
    #[must_use]
    pub const fn identity(vmsd: &'static str, field: &'static str, expect: Expect) -> Self {
        Self { vmsd, field, rule: "INV-D7", expect }
    }

    /// A state that the VM may arrive in: INV-D8.
    #[must_use]
    pub const fn state(vmsd: &'static str, field: &'static str, expect: Expect) -> Self {
        Self { vmsd, field, rule: "INV-D8", expect }
    }
}

/// What a field may hold. Numbers are read unsigned and big-endian, as wide as the field is.
///
/// A field that is wider than eight bytes, or that a rule compares with a field that is not there, breaks the rule:
/// what cannot be judged is not let through.
#[derive(Debug, Clone, Copy)]
pub enum Expect {
    /// The bytes of the dry run. Without them (the dry run had no such field) the rule is broken.
    Pinned,
    /// At most this.
    AtMost(u64),
    /// From the first to the second, both included.
    Within(u64, u64),
    /// One of these.
    OneOf(&'static [u64]),
    /// A power of two up to this, or zero.
    PowerOfTwoOrZero(u64),
    /// Signed, from the first to the second, both included.
    SignedWithin(i64, i64),
    /// At most what another field of the same description holds, this time.
    AtMostField(&'static str),
    /// Anything that this function accepts; the error says what was expected, and never quotes guest memory.
    Check(fn(&Fields<'_, '_>) -> Result<(), Breach>),
}

/// The fields of one struct of the device state, as the layout cut them.
#[derive(Debug, Clone, Copy)]
pub struct Fields<'l, 'b> {
    /// Name and bytes, in wire order; arrays of scalars as one piece, structs left out.
    pub fields: &'l [(&'l str, &'b [u8])],
}

impl<'b> Fields<'_, 'b> {
    /// The bytes of a field.
    #[must_use]
    pub fn bytes(&self, name: &str) -> Option<&'b [u8]> {
        self.fields.iter().find(|(n, _)| *n == name).map(|(_, bytes)| *bytes)
    }

    /// A field of up to eight bytes as a number.
    #[must_use]
    pub fn number(&self, name: &str) -> Option<u64> {
        self.bytes(name).and_then(number)
    }
}

/// Up to eight big-endian bytes as a number.
#[must_use]
pub fn number(bytes: &[u8]) -> Option<u64> {
    (!bytes.is_empty() && bytes.len() <= 8)
        .then(|| bytes.iter().fold(0, |value, byte| (value << 8) | u64::from(*byte)))
}

/// Up to eight big-endian bytes as a two's complement number of their width.
#[must_use]
pub fn signed(bytes: &[u8]) -> Option<i64> {
    let value = number(bytes)?;
    let unused = 64 - 8 * u32::try_from(bytes.len()).ok()?;
    Some((value << unused).cast_signed() >> unused)
}

/// How a value broke a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Breach {
    /// What the rule asks for.
    pub expected: String,
    /// What came: a number or a name, never guest memory.
    pub found: String,
}

impl Breach {
    /// A breach by a number.
    #[must_use]
    pub fn by_number(expected: impl Into<String>, found: impl ToString) -> Self {
        Self { expected: expected.into(), found: found.to_string() }
    }
}

/// Judges one element of `field`; `fields` is the struct that holds it, `pinned` the same element in the dry run.
///
/// # Errors
/// [`Breach`] when the element is not what the rule asks for, or cannot be judged.
pub fn holds(
    expect: &Expect,
    fields: &Fields<'_, '_>,
    field: &str,
    element: &[u8],
    pinned: Option<&[u8]>,
) -> Result<(), Breach> {
    match *expect {
        Expect::Pinned => same_as_dry_run(element, pinned),
        Expect::SignedWithin(low, high) => signed_within(field, element, low, high),
        Expect::Check(check) => check(fields),
        Expect::AtMost(most) => unsigned(field, element, |n| n <= most, || format!("at most {most}")),
        Expect::Within(low, high) => {
            unsigned(field, element, |n| (low..=high).contains(&n), || format!("{low} to {high}"))
        }
        Expect::OneOf(list) => unsigned(field, element, |n| list.contains(&n), || format!("one of {list:?}")),
        Expect::PowerOfTwoOrZero(most) => {
            let fits = |n: u64| n <= most && (n == 0 || n.is_power_of_two());
            unsigned(field, element, fits, || format!("0 or a power of two up to {most}"))
        }
        Expect::AtMostField(other) => {
            let most = required(fields, other)?;
            unsigned(field, element, |n| n <= most, || format!("at most {other}, which is {most}"))
        }
    }
}

/// The number in another field of the same struct, which a rule cannot do without.
///
/// # Errors
/// [`Breach`] when there is no such field, or it is no number.
pub fn required(fields: &Fields<'_, '_>, name: &str) -> Result<u64, Breach> {
    fields.number(name).ok_or_else(|| Breach::by_number(format!("a number in {name}"), "none"))
}

fn unsigned(
    field: &str,
    element: &[u8],
    fits: impl FnOnce(u64) -> bool,
    expected: impl FnOnce() -> String,
) -> Result<(), Breach> {
    match number(element) {
        Some(n) if fits(n) => Ok(()),
        Some(n) => Err(Breach::by_number(expected(), n)),
        None => Err(too_wide(field, element)),
    }
}

fn signed_within(field: &str, element: &[u8], low: i64, high: i64) -> Result<(), Breach> {
    match signed(element) {
        Some(n) if (low..=high).contains(&n) => Ok(()),
        Some(n) => Err(Breach::by_number(format!("{low} to {high}"), n)),
        None => Err(too_wide(field, element)),
    }
}

fn same_as_dry_run(element: &[u8], pinned: Option<&[u8]>) -> Result<(), Breach> {
    let describe =
        |bytes: &[u8]| number(bytes).map_or_else(|| format!("{} bytes", bytes.len()), |n| n.to_string());
    match pinned {
        Some(pinned) if pinned == element => Ok(()),
        Some(pinned) if pinned.len() == element.len() && number(pinned).is_none() => {
            Err(Breach::by_number("the bytes of the dry run", "others"))
        }
        Some(pinned) => Err(Breach { expected: describe(pinned), found: describe(element) }),
        None => Err(Breach::by_number("a field that the dry run has", describe(element))),
    }
}

fn too_wide(field: &str, element: &[u8]) -> Breach {
    Breach::by_number(format!("a number of 1 to 8 bytes in {field}"), format!("{} bytes", element.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: Fields<'_, '_> = Fields { fields: &[] };

    #[track_caller]
    fn check(expect: Expect, element: &[u8], holds_now: bool) {
        let outcome = holds(&expect, &NONE, "f", element, None);
        assert_eq!(outcome.is_ok(), holds_now, "{expect:?} on {element:?}: {outcome:?}");
    }

    #[test]
    fn numbers_are_big_endian_and_as_wide_as_the_field() {
        check(Expect::AtMost(255), &[0, 0xff], true);
        check(Expect::AtMost(255), &[1, 0], false);
        check(Expect::AtMost(u64::MAX), &[0xff; 8], true);
        check(Expect::Within(1, 3), &[0], false);
        check(Expect::Within(1, 3), &[1], true);
        check(Expect::Within(1, 3), &[0, 0, 0, 3], true);
        check(Expect::Within(1, 3), &[4], false);
        check(Expect::OneOf(&[0, 0xffff]), &[0xff, 0xff], true);
        check(Expect::OneOf(&[0, 0xffff]), &[0, 1], false);
    }

    #[test]
    fn powers_of_two_stop_at_the_limit() {
        for (n, fits) in [(0u16, true), (1, true), (3, false), (1024, true), (2048, false)] {
            check(Expect::PowerOfTwoOrZero(1024), &n.to_be_bytes(), fits);
        }
    }

    #[test]
    fn signed_numbers_have_the_sign_of_their_width() {
        check(Expect::SignedWithin(-1, 31), &[0xff; 4], true);
        check(Expect::SignedWithin(-1, 31), &[0xff; 1], true);
        check(Expect::SignedWithin(-1, 31), &[0, 0, 0, 0xff], false);
        check(Expect::SignedWithin(-1, 31), &(-2i32).to_be_bytes(), false);
        check(Expect::SignedWithin(i64::MIN, 0), &i64::MIN.to_be_bytes(), true);
        check(Expect::SignedWithin(0, i64::MAX), &i64::MIN.to_be_bytes(), false);
    }

    #[test]
    fn what_cannot_be_judged_is_refused() {
        for expect in
            [Expect::AtMost(u64::MAX), Expect::SignedWithin(i64::MIN, i64::MAX), Expect::Within(0, 9)]
        {
            check(expect, &[], false);
            check(expect, &[0; 9], false);
        }
        check(Expect::Pinned, &[0], false);
        check(Expect::AtMostField("other"), &[0], false);
    }

    #[test]
    fn a_field_is_compared_with_its_neighbour_of_this_time() {
        let fields = Fields { fields: &[("num", &[0, 7]), ("max", &[8])] };
        let judge = |element: &[u8]| holds(&Expect::AtMostField("max"), &fields, "num", element, None);
        assert_eq!(judge(&[0, 8]), Ok(()));
        assert_eq!(judge(&[0, 9]), Err(Breach::by_number("at most max, which is 8", 9)));
    }

    #[test]
    fn pinned_is_byte_for_byte_and_quotes_only_numbers() {
        let judge = |element: &[u8], pinned: &[u8]| holds(&Expect::Pinned, &NONE, "f", element, Some(pinned));
        assert_eq!(judge(&[0, 3], &[0, 3]), Ok(()));
        assert_eq!(judge(&[0, 4], &[0, 3]), Err(Breach::by_number("3", 4)));
        assert_eq!(judge(&[3], &[0, 3]), Err(Breach::by_number("3", 3)));
        assert_eq!(judge(&[1; 16], &[0; 16]), Err(Breach::by_number("the bytes of the dry run", "others")));
    }
}
