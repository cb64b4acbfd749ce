//! Enrols a platform: proves that an attestation key lives in the very TPM that the host's record names.
//!
//! ```text
//! Application ──Candidate::check──▶ Candidate ──challenge──▶ Pending ──confirm──▶ Enrolled
//!  (EK, AK)     the EK is the one    fit keys    a secret for   the host     what quotes are
//!               of the record                    that EK *and*  opened it    appraised against
//!                                                that AK's name
//! ```
//! Only a TPM that holds the endorsement key's private half **and** an object with the attestation key's name
//! opens the secret (Part 1, "Credential Protection"); the name covers the key's attributes, so a key that
//! could leave the TPM has another name.

mod certificate;
mod credential;

use aws_lc_rs::rand;
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

pub use certificate::{CERTIFICATE_LIMIT_BYTES, CertificateFault, VendorRoots};
pub use credential::{Challenge, CredentialFault, SECRET_BYTES, make_credential};

use crate::codec::Bounded;
use crate::structure::{KeyFault, Public, TpmName};

/// `TPM_RH_ENDORSEMENT` (Part 2, 7.4): the hierarchy of endorsement keys, and the qualified name of its root.
pub(crate) const ENDORSEMENT_HIERARCHY: u32 = 0x4000_000B;
/// Certificates between the vendor's root and that of an EK; vendors use one or two.
const INTERMEDIATES_LIMIT: usize = 4;

/// Which endorsement key a host's record accepts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "snake_case")]
pub enum EkRule {
    /// The one of this name, as `tpm2_readpublic` prints it; the name is the hash of its public area.
    Name(TpmName),
    /// Any that a TPM vendor certified. Weaker: it says "a genuine TPM", not "the TPM of this host".
    VendorRoots(VendorRoots),
}

/// What a host that wants to join says about its TPM. Nothing of it is believed yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Application {
    /// The public area of its endorsement key.
    pub ek: Public,
    /// The vendor's certificate of it, in DER, if the TPM holds one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ek_certificate: Option<Bounded<CERTIFICATE_LIMIT_BYTES>>,
    /// Certificates between that and the vendor's root, in DER.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub intermediates: Vec<Bounded<CERTIFICATE_LIMIT_BYTES>>,
    /// The public area of its attestation key.
    pub ak: Public,
}

/// Why a platform is not enrolled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnrolRefusal {
    /// Another TPM than the record's.
    #[error(
        "the endorsement key is not the one of the host's record: expected {expected}, found {found}; is \
         this the right machine?"
    )]
    OtherEk {
        /// The record's.
        expected: TpmName,
        /// The host's.
        found: TpmName,
    },
    /// A certificate is asked for and the TPM has none.
    #[error("the record asks for a TPM vendor's certificate of the endorsement key, and the host sent none")]
    NoCertificate,
    /// The certificate does not prove the key.
    #[error("the endorsement key's certificate: {0}")]
    Certificate(#[source] CertificateFault),
    /// More intermediate certificates than are read.
    #[error("{0} intermediate certificates, more than {INTERMEDIATES_LIMIT}")]
    TooManyIntermediates(usize),
    /// The endorsement key can't be one.
    #[error("the endorsement key is unfit: {0}")]
    EkUnfit(#[source] KeyFault),
    /// The attestation key must not be one.
    #[error("the attestation key is unfit: {0}")]
    AkUnfit(#[source] KeyFault),
    /// No credential could be made.
    #[error("no credential could be made for the endorsement key")]
    Credential(#[source] CredentialFault),
    /// The host did not open the credential.
    #[error(
        "the host did not open the credential: its attestation key is not in the TPM of that endorsement key"
    )]
    WrongAnswer,
}

/// A platform whose keys are as they must be, which has proved nothing yet.
#[derive(Debug, Clone)]
pub struct Candidate {
    ek: Public,
    ak: Public,
}

impl Candidate {
    /// Holds an application against the host's record.
    ///
    /// # Errors
    /// [`EnrolRefusal`].
    pub fn check(application: Application, rule: &EkRule, now_unix_s: u64) -> Result<Self, EnrolRefusal> {
        let Application { ek, ek_certificate, intermediates, ak } = application;
        if intermediates.len() > INTERMEDIATES_LIMIT {
            return Err(EnrolRefusal::TooManyIntermediates(intermediates.len()));
        }
        match rule {
            EkRule::Name(expected) if *expected == ek.name() => {}
            EkRule::Name(expected) => {
                return Err(EnrolRefusal::OtherEk { expected: *expected, found: ek.name() });
            }
            EkRule::VendorRoots(roots) => {
                let certificate = ek_certificate.ok_or(EnrolRefusal::NoCertificate)?;
                let proved = roots.prove(&certificate, &intermediates, &ek, now_unix_s);
                proved.map_err(EnrolRefusal::Certificate)?;
            }
        }
        ek.may_endorse().map_err(EnrolRefusal::EkUnfit)?;
        ak.may_attest().map_err(EnrolRefusal::AkUnfit)?;
        Ok(Self { ek, ak })
    }

    /// Makes a secret that only the TPM of both keys can open. The answer is to be taken once.
    ///
    /// # Errors
    /// [`EnrolRefusal::Credential`].
    pub fn challenge(self) -> Result<(Challenge, Pending), EnrolRefusal> {
        let mut secret = Zeroizing::new([0; SECRET_BYTES]);
        let drawn = rand::fill(secret.as_mut_slice()).map_err(|_| CredentialFault::NoRandomNumbers);
        drawn.map_err(EnrolRefusal::Credential)?;
        let challenge =
            make_credential(&self.ek, &self.ak.name(), &secret).map_err(EnrolRefusal::Credential)?;
        Ok((challenge, Pending { candidate: self, secret }))
    }
}

/// An enrolment that waits for the host's answer. It takes one.
pub struct Pending {
    candidate: Candidate,
    secret: Zeroizing<[u8; SECRET_BYTES]>,
}

impl Pending {
    /// Takes the answer: the secret, as the TPM gave it.
    ///
    /// # Errors
    /// [`EnrolRefusal::WrongAnswer`].
    pub fn confirm(self, answer: &[u8]) -> Result<Enrolled, EnrolRefusal> {
        if !bool::from(self.secret.as_slice().ct_eq(answer)) {
            return Err(EnrolRefusal::WrongAnswer);
        }
        Ok(Enrolled { ek_name: self.candidate.ek.name(), ak: self.candidate.ak })
    }
}

impl std::fmt::Debug for Pending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pending").field("candidate", &self.candidate).finish_non_exhaustive()
    }
}

/// An enrolled platform: what is kept in its host's record. [`Pending::confirm`] makes one; where it is read
/// back, the registry is trusted for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Enrolled {
    ek_name: TpmName,
    ak: Public,
}

impl Enrolled {
    /// The name of the endorsement key: the TPM's identity.
    #[must_use]
    pub fn ek_name(&self) -> TpmName {
        self.ek_name
    }

    /// The attestation key.
    #[must_use]
    pub fn ak(&self) -> &Public {
        &self.ak
    }

    /// The attestation key's name below the endorsement key and its hierarchy (Part 1, "Qualified Name"),
    /// which every quote carries as its signer.
    #[must_use]
    pub fn qualified_ak_name(&self) -> TpmName {
        let ek = self.ek_name.qualified(&ENDORSEMENT_HIERARCHY.to_be_bytes());
        self.ak.name().qualified(ek.as_bytes())
    }
}
