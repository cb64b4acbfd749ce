//! Names and ids, validated where they enter: a value of these types is always well formed.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Why a text is not the id it was taken for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{kind} {text:?} is malformed: {rule}")]
pub struct MalformedId {
    /// What the text was read as.
    pub kind: &'static str,
    /// The text, cut to 80 characters.
    pub text: String,
    /// The rule that it breaks.
    pub rule: &'static str,
}

fn malformed(kind: &'static str, text: &str, rule: &'static str) -> MalformedId {
    MalformedId { kind, text: text.chars().take(80).collect(), rule }
}

/// A DNS-label-like name of a host or VM: 1 to 63 of `a-z 0-9 -`, starting and ending with a letter or digit.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

impl Name {
    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = MalformedId;
    fn from_str(text: &str) -> Result<Self, MalformedId> {
        let rule = "1 to 63 of a-z, 0-9 and '-', starting and ending with a letter or digit";
        let inner = text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        let edges = !text.starts_with('-') && !text.ends_with('-');
        if text.is_empty() || text.len() > 63 || !inner || !edges {
            return Err(malformed("name", text, rule));
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for Name {
    type Error = MalformedId;
    fn try_from(text: String) -> Result<Self, MalformedId> {
        text.parse()
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// The name of a hypervisor platform; its identity is `spiffe://<trust-domain>/host/<name>`.
pub type HostName = Name;

macro_rules! id128 {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name([u8; 16]);

        impl $name {
            /// From 16 bytes, which the caller drew at random.
            #[must_use]
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(bytes)
            }
            /// The 16 bytes.
            #[must_use]
            pub const fn as_bytes(&self) -> &[u8; 16] {
                &self.0
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{self}")
            }
        }
        impl TryFrom<String> for $name {
            type Error = MalformedId;
            fn try_from(text: String) -> Result<Self, MalformedId> {
                text.parse()
            }
        }
        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.to_string()
            }
        }
    };
}

fn bytes16(
    kind: &'static str,
    text: &str,
    hex_digits: &str,
    rule: &'static str,
) -> Result<[u8; 16], MalformedId> {
    let mut bytes = [0; 16];
    if hex_digits.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err(malformed(kind, text, rule));
    }
    hex::decode_to_slice(hex_digits, &mut bytes).map_err(|_| malformed(kind, text, rule))?;
    Ok(bytes)
}

id128!(
    /// A VM's UUID, written in the usual 8-4-4-4-12 form.
    VmId,
    "VM id"
);
id128!(
    /// One attempt to move one VM, written `m-` and 32 hexadecimal digits.
    MigrationId,
    "migration id"
);
id128!(
    /// 128 random bits that make a request or a permit unique, written as 32 hexadecimal digits.
    Nonce,
    "nonce"
);

impl FromStr for VmId {
    type Err = MalformedId;
    fn from_str(text: &str) -> Result<Self, MalformedId> {
        let rule = "a lower-case UUID, 8-4-4-4-12";
        let dashes = text.len() == 36 && [8, 13, 18, 23].iter().all(|&i| text.as_bytes()[i] == b'-');
        let digits: String = text.chars().filter(|c| *c != '-').collect();
        if !dashes || digits.len() != 32 {
            return Err(malformed("VM id", text, rule));
        }
        bytes16("VM id", text, &digits, rule).map(Self)
    }
}

impl fmt::Display for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let h = hex::encode(self.0);
        let text = format!("{}-{}-{}-{}-{}", &h[..8], &h[8..12], &h[12..16], &h[16..20], &h[20..]);
        f.pad(&text)
    }
}

impl FromStr for MigrationId {
    type Err = MalformedId;
    fn from_str(text: &str) -> Result<Self, MalformedId> {
        let rule = "'m-' and 32 lower-case hexadecimal digits";
        let digits = text.strip_prefix("m-").ok_or_else(|| malformed("migration id", text, rule))?;
        bytes16("migration id", text, digits, rule).map(Self)
    }
}

impl fmt::Display for MigrationId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("m-{}", hex::encode(self.0)))
    }
}

impl FromStr for Nonce {
    type Err = MalformedId;
    fn from_str(text: &str) -> Result<Self, MalformedId> {
        bytes16("nonce", text, text, "32 lower-case hexadecimal digits").map(Self)
    }
}

impl fmt::Display for Nonce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&hex::encode(self.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_dns_labels() {
        for good in ["a", "host-a", "0", &"x".repeat(63)] {
            assert!(good.parse::<Name>().is_ok(), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a.b", "a/b", "é", &"x".repeat(64)] {
            assert!(bad.parse::<Name>().is_err(), "{bad}");
        }
    }

    #[test]
    fn ids_round_trip_and_refuse_anything_else() {
        let vm = VmId::from_bytes(*b"0123456789abcdef");
        assert_eq!(vm.to_string().parse(), Ok(vm));
        let migration = MigrationId::from_bytes([7; 16]);
        assert_eq!(migration.to_string().parse(), Ok(migration));
        let nonce = Nonce::from_bytes([0xab; 16]);
        assert_eq!(nonce.to_string().parse(), Ok(nonce));
        for bad in ["", "m-", "m-zz", "30313233-3435-3637-3839-61626364656G", "ééééééééééééééééé"]
        {
            assert!(bad.parse::<VmId>().is_err() && bad.parse::<MigrationId>().is_err(), "{bad}");
        }
    }
}
