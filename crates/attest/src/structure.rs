//! The few TPM structures that attestation needs, each read totally and written back byte for byte.
//!
//! Source of every wire fact: TCG, "Trusted Platform Module Library, Part 2: Structures", family 2.0; the
//! section is named at each structure.

mod attest;
mod public;
mod signature;

pub use attest::{Attest, AttestFault, ClockInfo};
pub use public::{Key, KeyFault, Public, Scheme, TpmName};
#[cfg(feature = "tpm")]
pub(crate) use public::{NIST_P256, attribute};
pub use signature::Signature;

/// Longest `TPMS_ATTEST` that is read, bytes. That of a quote has at most 270.
pub const ATTEST_LIMIT_BYTES: usize = 512;
/// Longest `TPMT_SIGNATURE` that is read, bytes: RSA 4096 and its header.
pub const SIGNATURE_LIMIT_BYTES: usize = 520;
/// Longest `TPMT_PUBLIC` that is read, bytes: RSA 4096 with a policy of SHA-512.
pub const PUBLIC_LIMIT_BYTES: usize = 640;

/// `TPM_ALG_ID` (Part 2, 6.3), those that occur here.
pub(crate) mod algorithm {
    pub(crate) const RSA: u16 = 0x0001;
    pub(crate) const AES: u16 = 0x0006;
    pub(crate) const SHA256: u16 = 0x000B;
    pub(crate) const SHA384: u16 = 0x000C;
    pub(crate) const NULL: u16 = 0x0010;
    pub(crate) const RSASSA: u16 = 0x0014;
    pub(crate) const RSAPSS: u16 = 0x0016;
    pub(crate) const ECDSA: u16 = 0x0018;
    pub(crate) const ECC: u16 = 0x0023;
    pub(crate) const CFB: u16 = 0x0043;
}
