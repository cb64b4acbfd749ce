//! What a quote is bound to: whose it is, what for, and that it is fresh.

use std::fmt;

use serde::{Deserialize, Serialize};
use types::{Digest, HostName, MigrationId, Nonce, Side};

use crate::codec::Writer;

/// Separates these bytes from everything else that is hashed anywhere.
const DOMAIN: &[u8] = b"outrider-attest-binding-v1";
/// Longest SPIFFE id that is accepted: `spiffe://`, a trust domain of 255, `/host/` and a name of 63.
const HOST_ID_LIMIT_BYTES: usize = 333;

/// A host's SPIFFE id, `spiffe://<trust-domain>/host/<name>`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HostId(String);

impl HostId {
    /// The text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for HostId {
    type Error = &'static str;
    fn try_from(text: String) -> Result<Self, Self::Error> {
        const RULE: &str = "a host's id is spiffe://<trust-domain>/host/<name>";
        let rest =
            text.strip_prefix("spiffe://").filter(|_| text.len() <= HOST_ID_LIMIT_BYTES).ok_or(RULE)?;
        let (domain, name) = rest.split_once("/host/").ok_or(RULE)?;
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b".-_".contains(&byte);
        if domain.is_empty() || !domain.bytes().all(plain) || name.parse::<HostName>().is_err() {
            return Err(RULE);
        }
        Ok(Self(text))
    }
}

impl From<HostId> for String {
    fn from(id: HostId) -> Self {
        id.0
    }
}

impl fmt::Display for HostId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// What a quote is asked for. One for one purpose never serves another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub enum Purpose {
    /// The host joins.
    Join,
    /// A look at the host outside any migration.
    HostCheck,
    /// A migration: before its permit, or again before it converges.
    #[serde(rename_all = "snake_case")]
    Migration {
        /// Which one.
        migration: MigrationId,
        /// Which side of it the host is.
        side: Side,
        /// Digest of the SubjectPublicKeyInfo of the host's VM agent: its key for this migration alone.
        agent_spki: Digest,
    },
}

/// Everything that a quote must be about. The manager makes it; the host makes the same from what it was
/// asked and what it is, and has the TPM sign its hash. A quote relayed from another host carries that host's
/// id and keys, and differs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Binding {
    /// Drawn by the manager for this one quote.
    pub nonce: Nonce,
    /// What for.
    pub purpose: Purpose,
    /// The host.
    pub host: HostId,
    /// Digest of the SubjectPublicKeyInfo of the key with which the host holds its TLS connection to the
    /// manager.
    pub host_spki: Digest,
}

impl Binding {
    /// What the TPM is to sign along with the registers: BLAKE3 over all of the binding, each field of a
    /// fixed or a written length.
    #[must_use]
    pub fn qualifying_data(&self) -> Digest {
        let to = Writer::new().sized(DOMAIN).raw(self.nonce.as_bytes());
        let to = match &self.purpose {
            Purpose::Join => to.u8(1),
            Purpose::HostCheck => to.u8(2),
            Purpose::Migration { migration, side, agent_spki } => {
                let side = match side {
                    Side::Source => 1,
                    Side::Target => 2,
                };
                to.u8(3).raw(migration.as_bytes()).u8(side).raw(&agent_spki.0)
            }
        };
        Digest::of(&to.sized(self.host.as_str().as_bytes()).raw(&self.host_spki.0).done())
    }

    /// The migration, if it is for one.
    #[must_use]
    pub fn migration(&self) -> Option<MigrationId> {
        match self.purpose {
            Purpose::Migration { migration, .. } => Some(migration),
            Purpose::Join | Purpose::HostCheck => None,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_change_of_any_field_changes_what_is_signed() {
        let migration = |id, side, agent| Purpose::Migration {
            migration: MigrationId::from_bytes([id; 16]),
            side,
            agent_spki: Digest([agent; 32]),
        };
        let purposes = [
            Purpose::Join,
            Purpose::HostCheck,
            migration(1, Side::Source, 1),
            migration(2, Side::Source, 1),
            migration(1, Side::Target, 1),
            migration(1, Side::Source, 2),
        ];
        let mut seen = BTreeSet::new();
        let mut count = 0;
        for purpose in purposes {
            for nonce in [1, 2] {
                for host in ["spiffe://lab/host/a", "spiffe://lab/host/b", "spiffe://la/host/a"] {
                    for key in [1, 2] {
                        let binding = Binding {
                            nonce: Nonce::from_bytes([nonce; 16]),
                            purpose,
                            host: host.to_owned().try_into().unwrap(),
                            host_spki: Digest([key; 32]),
                        };
                        let json = serde_json::to_string(&binding).unwrap();
                        assert_eq!(serde_json::from_str::<Binding>(&json).unwrap(), binding);
                        seen.insert(binding.qualifying_data());
                        count += 1;
                    }
                }
            }
        }
        assert_eq!(seen.len(), count);
    }

    #[test]
    fn only_hosts_of_a_trust_domain_have_an_id() {
        let long = format!("spiffe://{}/host/a", "d".repeat(400));
        for bad in [
            "",
            "host-a",
            "spiffe:///host/a",
            "spiffe://lab/manager/a",
            "spiffe://lab/host/",
            "spiffe://Lab/host/a",
        ]
        .into_iter()
        .chain(["spiffe://lab/host/a/host/b", "spiffe://l b/host/a", &long])
        {
            assert!(HostId::try_from(bad.to_owned()).is_err(), "{bad}");
        }
    }
}
