//! What is asked of the TPM: templates of keys (Part 2, 12.2.4, and TCG EK Credential Profile, annex B).

use serde::{Deserialize, Serialize};

use crate::codec::Writer;
use crate::structure::{NIST_P256, Scheme, algorithm, attribute};

/// Bits of `TPMA_OBJECT` that only templates name.
const USER_WITH_AUTH: u32 = 1 << 6;
const ADMIN_WITH_POLICY: u32 = 1 << 7;
const NO_DA: u32 = 1 << 10;
const BOUND_TO_TPM: u32 = attribute::FIXED_TPM | attribute::FIXED_PARENT | attribute::SENSITIVE_DATA_ORIGIN;

/// The digest of a policy session after `TPM2_PolicySecret` of the endorsement hierarchy (EK Credential
/// Profile, annex B).
pub(super) const EK_POLICY: [u8; 32] = [
    0x83, 0x71, 0x97, 0x67, 0x44, 0x84, 0xb3, 0xf8, 0x1a, 0x90, 0xcc, 0x8d, 0x46, 0xa5, 0xd7, 0x24, 0xfd,
    0x52, 0xd7, 0x6e, 0x06, 0x52, 0x0b, 0x64, 0xf2, 0xa1, 0xda, 0x1b, 0x33, 0x14, 0x69, 0xaa,
];

/// The endorsement key that every vendor certifies: template L-1 (RSA 2048) or L-2 (P-256). From the same
/// seed the same template gives the same key.
pub(super) const fn ek(kind: Kind) -> Template<'static> {
    Template {
        attributes: BOUND_TO_TPM | ADMIN_WITH_POLICY | attribute::RESTRICTED | attribute::DECRYPT,
        policy: &EK_POLICY,
        aes_128_cfb: true,
        scheme: Scheme::Null,
        kind,
        zeros: true,
    }
}

/// The attestation key: restricted, so that it signs only what the TPM itself made. A wrong password does not
/// lock the TPM (`noDA`), since it has none.
pub(crate) const AK: Template<'static> = Template {
    attributes: BOUND_TO_TPM | USER_WITH_AUTH | NO_DA | attribute::RESTRICTED | attribute::SIGN,
    policy: &[],
    aes_128_cfb: false,
    scheme: Scheme::Ecdsa,
    kind: Kind::P256,
    zeros: false,
};

/// What a public area is made of, to ask a TPM for a key.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Template<'a> {
    pub(crate) attributes: u32,
    pub(crate) policy: &'a [u8],
    pub(crate) aes_128_cfb: bool,
    pub(crate) scheme: Scheme,
    pub(crate) kind: Kind,
    /// Fill the unique field with zeros, as the EK templates L-1 and L-2 say, instead of leaving it empty.
    pub(crate) zeros: bool,
}

/// Which key is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// RSA of 2048 bits: every TPM has it.
    #[serde(rename = "rsa-2048")]
    Rsa2048,
    /// The NIST curve P-256: faster to make.
    #[serde(rename = "p256")]
    P256,
}

impl Template<'_> {
    /// The `TPMT_PUBLIC` to create from.
    pub(crate) fn to_bytes(self) -> Vec<u8> {
        let kind = if self.kind == Kind::Rsa2048 { algorithm::RSA } else { algorithm::ECC };
        let to = Writer::new().u16(kind).u16(algorithm::SHA256).u32(self.attributes).sized(self.policy);
        let to = match self.aes_128_cfb {
            true => to.u16(algorithm::AES).u16(128).u16(algorithm::CFB),
            false => to.u16(algorithm::NULL),
        };
        let to = match self.scheme {
            Scheme::Null => to.u16(algorithm::NULL),
            Scheme::RsaSsa => to.u16(algorithm::RSASSA).u16(algorithm::SHA256),
            Scheme::RsaPss => to.u16(algorithm::RSAPSS).u16(algorithm::SHA256),
            Scheme::Ecdsa => to.u16(algorithm::ECDSA).u16(algorithm::SHA256),
        };
        let unique: &[u8] = if self.zeros { &[0; 256] } else { &[] };
        let coordinate = unique.get(..unique.len().min(32)).unwrap_or_default();
        match self.kind {
            Kind::Rsa2048 => to.u16(2048).u32(0).sized(unique),
            Kind::P256 => to.u16(NIST_P256).u16(algorithm::NULL).sized(coordinate).sized(coordinate),
        }
        .done()
    }
}
