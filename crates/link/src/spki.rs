//! Ed25519 public keys as SubjectPublicKeyInfo (RFC 8410): what a permit names and what a raw-public-key
//! handshake (RFC 7250) carries.

/// DER of an Ed25519 SubjectPublicKeyInfo up to the key itself; RFC 8410 leaves no other valid encoding.
const ED25519_SPKI_PREFIX: [u8; 12] =
    [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// Length of an Ed25519 SubjectPublicKeyInfo.
pub const ED25519_SPKI_BYTES: usize = ED25519_SPKI_PREFIX.len() + 32;

/// The SubjectPublicKeyInfo of a raw Ed25519 key.
pub fn from_ed25519(key: &[u8; 32]) -> [u8; ED25519_SPKI_BYTES] {
    let mut der = [0; ED25519_SPKI_BYTES];
    der[..12].copy_from_slice(&ED25519_SPKI_PREFIX);
    der[12..].copy_from_slice(key);
    der
}

/// The raw key of an Ed25519 SubjectPublicKeyInfo; nothing else is accepted.
pub fn to_ed25519(der: &[u8]) -> Option<[u8; 32]> {
    der.strip_prefix(&ED25519_SPKI_PREFIX)?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_exact_ed25519_spki_is_read() {
        let der = from_ed25519(&[7; 32]);
        assert_eq!(to_ed25519(&der), Some([7; 32]));
        assert_eq!(to_ed25519(&der[..43]), None);
        assert_eq!(to_ed25519(&[&der[..], &[0]].concat()), None);
        for at in 0..12 {
            let mut other = der;
            other[at] ^= 1;
            assert_eq!(to_ed25519(&other), None, "byte {at}");
        }
    }
}
