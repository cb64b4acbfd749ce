//! Join tokens: what an admin carries from the manager to a new host, once.
//!
//! `ojt1.` and base64url of: version, CA fingerprint, secret, lengths and texts of host name and manager
//! address, and four bytes of checksum, which catch a slip of the clipboard before anything is dialled. The
//! manager stores only the secret's hash.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use subtle::ConstantTimeEq as _;
use types::{Digest, HostName};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

const PREFIX: &str = "ojt1.";
/// 1 + 32 + 32 + 1 + 63 + 1 + 255 + 4 bytes, in base64.
const TEXT_LIMIT_BYTES: usize = 530;
const ADDRESS_LIMIT_BYTES: usize = 255;

/// Why a text is no join token, or can't become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum JoinTokenError {
    /// Not of the form `ojt1.…`, cut short, or with a character lost or changed.
    #[error("not a whole join token: copy it again, from `ojt1.` to its end")]
    Malformed,
    /// The manager's address is not `host:port` of at most 255 characters.
    #[error("the manager's address must be host:port, at most 255 characters")]
    Address,
    /// No random numbers.
    #[error("no secret could be generated")]
    NotGenerated,
}

/// The 256 secret bits of a token. Wiped from memory, never printed, compared in constant time.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct JoinSecret([u8; 32]);

impl JoinSecret {
    /// From the bytes that a joining host sends.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// The bytes, for the one message that presents them.
    pub fn expose(&self) -> &[u8; 32] {
        &self.0
    }

    /// What the manager stores.
    pub fn hash(&self) -> Digest {
        Digest(blake3::derive_key("outrider 2026 join token v1: stored hash", &self.0))
    }

    /// Whether this secret is the one of the stored hash; takes the same time whatever the answer.
    pub fn matches(&self, stored: &Digest) -> bool {
        self.hash().0.ct_eq(&stored.0).into()
    }
}

impl fmt::Debug for JoinSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JoinSecret(..)")
    }
}

/// A single-use permission for one named host to join, and what it needs to recognise the manager.
#[derive(Debug, Clone)]
pub struct JoinToken {
    /// Where the manager listens for hosts, `host:port`.
    pub manager_address: String,
    /// SHA-256 of the manager's CA key (SubjectPublicKeyInfo).
    pub ca_fingerprint: [u8; 32],
    /// The host that may join.
    pub host: HostName,
    /// The secret.
    pub secret: JoinSecret,
}

impl JoinToken {
    /// Makes a token with a fresh secret.
    ///
    /// # Errors
    /// The address is none, or there are no random numbers.
    pub fn generate(
        manager_address: &str,
        ca_fingerprint: [u8; 32],
        host: HostName,
    ) -> Result<Self, JoinTokenError> {
        check_address(manager_address)?;
        let mut secret = JoinSecret([0; 32]);
        aws_lc_rs::rand::fill(&mut secret.0).map_err(|_| JoinTokenError::NotGenerated)?;
        Ok(Self { manager_address: manager_address.to_owned(), ca_fingerprint, host, secret })
    }

    /// The text that the admin carries.
    ///
    /// # Errors
    /// The address is none.
    pub fn to_text(&self) -> Result<Zeroizing<String>, JoinTokenError> {
        check_address(&self.manager_address)?;
        let mut bytes = Zeroizing::new(Vec::with_capacity(512));
        bytes.push(1);
        bytes.extend_from_slice(&self.ca_fingerprint);
        bytes.extend_from_slice(&self.secret.0);
        for text in [self.host.as_str(), &self.manager_address] {
            bytes.push(u8::try_from(text.len()).map_err(|_| JoinTokenError::Address)?);
            bytes.extend_from_slice(text.as_bytes());
        }
        let sum = checksum(&bytes);
        bytes.extend_from_slice(&sum);
        let body = Zeroizing::new(URL_SAFE_NO_PAD.encode(&*bytes));
        Ok(Zeroizing::new(format!("{PREFIX}{}", *body)))
    }

    /// Reads a token.
    ///
    /// # Errors
    /// [`JoinTokenError::Malformed`] or [`JoinTokenError::Address`].
    pub fn from_text(text: &str) -> Result<Self, JoinTokenError> {
        let token = parse(text.trim()).ok_or(JoinTokenError::Malformed)?;
        check_address(&token.manager_address)?;
        Ok(token)
    }
}

fn parse(text: &str) -> Option<JoinToken> {
    let body = text.strip_prefix(PREFIX).filter(|_| text.len() <= TEXT_LIMIT_BYTES)?;
    let bytes = Zeroizing::new(URL_SAFE_NO_PAD.decode(body).ok()?);
    let (content, sum) = bytes.split_last_chunk::<4>()?;
    if checksum(content) != *sum {
        return None;
    }
    let (version, rest) = content.split_first()?;
    let (ca_fingerprint, rest) = rest.split_first_chunk::<32>()?;
    let (secret, rest) = rest.split_first_chunk::<32>()?;
    let (host, rest) = text_field(rest)?;
    let (manager_address, rest) = text_field(rest)?;
    (*version == 1 && rest.is_empty()).then_some(())?;
    Some(JoinToken {
        manager_address: manager_address.to_owned(),
        ca_fingerprint: *ca_fingerprint,
        host: host.parse().ok()?,
        secret: JoinSecret(*secret),
    })
}

fn text_field(bytes: &[u8]) -> Option<(&str, &[u8])> {
    let (length, rest) = bytes.split_first()?;
    let (text, rest) = rest.split_at_checked(usize::from(*length))?;
    Some((std::str::from_utf8(text).ok()?, rest))
}

fn check_address(address: &str) -> Result<(), JoinTokenError> {
    let port = address.rsplit_once(':').filter(|(host, _)| !host.is_empty()).map(|(_, port)| port);
    let good = address.len() <= ADDRESS_LIMIT_BYTES
        && address.bytes().all(|byte| byte.is_ascii_graphic())
        && port.is_some_and(|port| port.parse::<u16>().is_ok_and(|port| port > 0));
    good.then_some(()).ok_or(JoinTokenError::Address)
}

fn checksum(bytes: &[u8]) -> [u8; 4] {
    let digest = blake3::derive_key("outrider 2026 join token v1: checksum", bytes);
    [digest[0], digest[1], digest[2], digest[3]]
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn token() -> JoinToken {
        JoinToken::generate("[2001:db8::1]:7444", [9; 32], "host-a".parse().unwrap()).unwrap()
    }

    #[test]
    fn a_token_survives_its_text() {
        let token = token();
        let read = JoinToken::from_text(&format!(" {}\n", *token.to_text().unwrap())).unwrap();
        assert_eq!(read.manager_address, token.manager_address);
        assert_eq!((read.ca_fingerprint, &read.host), (token.ca_fingerprint, &token.host));
        assert!(read.secret.matches(&token.secret.hash()));
    }

    #[test]
    fn the_longest_token_fits_and_names_nothing_in_debug_output() {
        let address = format!("{}:7444", "m".repeat(250));
        let token = JoinToken::generate(&address, [1; 32], "x".repeat(63).parse().unwrap()).unwrap();
        let text = token.to_text().unwrap();
        assert!(text.len() <= TEXT_LIMIT_BYTES && text.starts_with("ojt1."), "{}", text.len());
        assert!(JoinToken::from_text(&text).is_ok());
        assert!(format!("{token:?}").contains("JoinSecret(..)"));
    }

    #[test]
    fn only_its_own_secret_matches_and_the_hash_is_not_the_secret() {
        let (one, two) = (token(), token());
        assert!(one.secret.matches(&one.secret.hash()));
        assert!(!one.secret.matches(&two.secret.hash()));
        assert_ne!(&one.secret.hash().0, one.secret.expose());
        assert!(JoinSecret::from_bytes(&[0; 31]).is_none());
    }

    #[test]
    fn a_slip_of_the_clipboard_is_caught() {
        let text = token().to_text().unwrap();
        for at in 0..text.len() {
            let mut cut = text.to_string();
            cut.truncate(at);
            assert_eq!(JoinToken::from_text(&cut).unwrap_err(), JoinTokenError::Malformed, "cut at {at}");
            let mut changed = text.to_string().into_bytes();
            changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(changed).unwrap();
            assert_eq!(JoinToken::from_text(&changed).unwrap_err(), JoinTokenError::Malformed, "{at}");
        }
        for bad in ["", "ojt1.", "ojt2.AAAA", "é", &"A".repeat(10_000)] {
            assert!(JoinToken::from_text(bad).is_err());
        }
    }

    #[test]
    fn addresses_are_checked_when_made() {
        for bad in [
            "",
            "manager",
            ":7444",
            "manager:",
            "manager:0",
            "manager:70000",
            "a b:1",
            &format!("{}:1", "m".repeat(260)),
        ] {
            let refused = JoinToken::generate(bad, [0; 32], "host-a".parse().unwrap()).unwrap_err();
            assert_eq!(refused, JoinTokenError::Address, "{bad}");
        }
    }
}
