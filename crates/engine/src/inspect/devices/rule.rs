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

/// What a field may hold. Numbers are read unsigned and big-endian, as wide as the field is.
#[derive(Debug, Clone, Copy)]
pub enum Expect {
    /// The bytes of the dry run.
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

/// How a value broke a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Breach {
    /// What the rule asks for.
    pub expected: String,
    /// What came: a number or a name, never guest memory.
    pub found: String,
}
