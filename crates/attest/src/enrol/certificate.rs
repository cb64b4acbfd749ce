//! The certificate that a TPM's vendor gave its endorsement key (TCG EK Credential Profile 2.x), and the
//! roots that an admin accepts.

use std::time::Duration;

use aws_lc_rs::encoding::AsDer;
use aws_lc_rs::signature::RsaPublicKeyComponents;
use rustls_pki_types::{CertificateDer, TrustAnchor, UnixTime};
use serde::{Deserialize, Serialize};
use webpki::{ALL_VERIFICATION_ALGS, EndEntityCert, KeyUsage, anchor_from_trusted_cert};

use crate::codec::Bounded;
use crate::structure::{Key, Public};

/// Longest certificate that is read, bytes.
pub const CERTIFICATE_LIMIT_BYTES: usize = 4096;
/// Roots that one record may name.
const ROOTS_LIMIT: usize = 16;
/// `tcg-kp-EKCertificate`, 2.23.133.8.1 (EK Credential Profile, "Extended Key Usage"): the use that a
/// certificate that names uses must name.
const EK_CERTIFICATE_USE: &[u8] = &[0x67, 0x81, 0x05, 0x08, 0x01];
/// DER of a P-256 SubjectPublicKeyInfo up to the point (RFC 5480).
const P256_SPKI_PREFIX: [u8; 27] = [
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86,
    0x48, 0xce, 0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00, 0x04,
];

/// Why a certificate does not prove an endorsement key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CertificateFault {
    /// Not a certificate.
    #[error("it can't be read ({0})")]
    Unreadable(String),
    /// A root can't be read.
    #[error("root {0} of the record can't be read")]
    Root(usize),
    /// No chain to an accepted root, or not at this time, or not for this use.
    #[error("no valid chain leads from it to a root that the record accepts ({0})")]
    NoChain(String),
    /// It certifies another key.
    #[error("it certifies another key than the TPM's")]
    OtherKey,
    /// The key of the TPM is not a valid one.
    #[error("the TPM's key is not a valid RSA or P-256 key")]
    InvalidKey,
}

/// Root certificates of TPM vendors, in DER: 1 to 16.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<Bounded<CERTIFICATE_LIMIT_BYTES>>", into = "Vec<Bounded<CERTIFICATE_LIMIT_BYTES>>")]
pub struct VendorRoots(Vec<Bounded<CERTIFICATE_LIMIT_BYTES>>);

impl VendorRoots {
    /// Proves that one of these roots stands for `ek`.
    ///
    /// # Errors
    /// [`CertificateFault`].
    pub fn prove(
        &self,
        certificate: &Bounded<CERTIFICATE_LIMIT_BYTES>,
        intermediates: &[Bounded<CERTIFICATE_LIMIT_BYTES>],
        ek: &Public,
        now_unix_s: u64,
    ) -> Result<(), CertificateFault> {
        let roots: Vec<_> = self.0.iter().map(|root| CertificateDer::from(root.as_slice())).collect();
        let anchors = anchors(&roots)?;
        let intermediates: Vec<_> =
            intermediates.iter().map(|der| CertificateDer::from(der.as_slice())).collect();
        let der = CertificateDer::from(certificate.as_slice());
        let certificate =
            EndEntityCert::try_from(&der).map_err(|fault| CertificateFault::Unreadable(fault.to_string()))?;
        let proved = certificate.verify_for_usage(
            ALL_VERIFICATION_ALGS,
            &anchors,
            &intermediates,
            UnixTime::since_unix_epoch(Duration::from_secs(now_unix_s)),
            KeyUsage::required_if_present(EK_CERTIFICATE_USE),
            None,
            None,
        );
        proved.map_err(|fault| CertificateFault::NoChain(fault.to_string()))?;
        let expected = spki(ek).ok_or(CertificateFault::InvalidKey)?;
        if certificate.subject_public_key_info().as_ref() == expected {
            Ok(())
        } else {
            Err(CertificateFault::OtherKey)
        }
    }
}

fn anchors<'a>(roots: &'a [CertificateDer<'a>]) -> Result<Vec<TrustAnchor<'a>>, CertificateFault> {
    let anchor = |(at, root)| anchor_from_trusted_cert(root).map_err(|_| CertificateFault::Root(at + 1));
    roots.iter().enumerate().map(anchor).collect()
}

/// The SubjectPublicKeyInfo of a TPM's key, in DER.
fn spki(key: &Public) -> Option<Vec<u8>> {
    match key.key() {
        Key::P256 { x, y } => Some([&P256_SPKI_PREFIX[..], x, y].concat()),
        Key::Rsa { modulus, exponent } => {
            let exponent = exponent.to_be_bytes();
            let exponent = exponent.get(exponent.iter().position(|byte| *byte != 0)?..)?;
            let der = RsaPublicKeyComponents { n: modulus.as_slice(), e: exponent }.as_der().ok()?;
            Some(der.as_ref().to_vec())
        }
    }
}

impl TryFrom<Vec<Bounded<CERTIFICATE_LIMIT_BYTES>>> for VendorRoots {
    type Error = &'static str;
    fn try_from(roots: Vec<Bounded<CERTIFICATE_LIMIT_BYTES>>) -> Result<Self, Self::Error> {
        match roots.len() {
            1..=ROOTS_LIMIT => Ok(Self(roots)),
            _ => Err("a record names 1 to 16 roots of TPM vendors"),
        }
    }
}

impl From<VendorRoots> for Vec<Bounded<CERTIFICATE_LIMIT_BYTES>> {
    fn from(roots: VendorRoots) -> Self {
        roots.0
    }
}
