//! What an attacker or a careless host would do with a TPM, and [`Tpm`] never does: keys of the wrong shape,
//! attestations that are no quote, registers extended.

use crate::codec::{Bounded, Malformed, Reader};
use crate::pcr::{PcrDigest, PcrIndex};
use crate::structure::{Public, Scheme, algorithm, attribute};
use crate::tpm::command::{Command, code};
use crate::tpm::quote::Quote;
use crate::tpm::template::{AK, Kind};
use crate::tpm::{AkBlobs, LoadedAk, Tpm, TpmFault};

const CERTIFY: u32 = 0x0148;
const SIGN: u32 = 0x015D;
const HASH: u32 = 0x017D;
const PCR_EXTEND: u32 = 0x0182;
const RH_OWNER: u32 = 0x4000_0001;

/// How a key differs from the attestation key that a host makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyShape {
    /// Not at all.
    Usual,
    /// RSA 2048 with RSASSA.
    RsaSsa,
    /// RSA 2048 with RSASSA-PSS.
    RsaPss,
    /// It signs what it is given.
    Unrestricted,
    /// It may be moved to another TPM.
    NotFixed,
    /// It lies below the owner's hierarchy instead of the endorsement key.
    OwnerPrimary,
}

/// Acts that are for tests alone.
pub trait Forge {
    /// Extends a register.
    ///
    /// # Errors
    /// [`TpmFault`].
    fn extend(&mut self, index: PcrIndex, digest: &PcrDigest) -> Result<(), TpmFault>;

    /// Makes a key of some shape, and loads it.
    ///
    /// # Errors
    /// [`TpmFault`].
    fn load_key(&mut self, shape: KeyShape) -> Result<LoadedAk, TpmFault>;

    /// Has a key certify itself: an attestation by the TPM that is not a quote.
    ///
    /// # Errors
    /// [`TpmFault`].
    fn certify(&mut self, key: &LoadedAk, extra_data: &[u8]) -> Result<Quote, TpmFault>;

    /// Has a key sign any bytes. A restricted key refuses what begins as the TPM's own statements do.
    ///
    /// # Errors
    /// [`TpmFault`].
    fn sign(&mut self, key: &LoadedAk, bytes: &[u8]) -> Result<Vec<u8>, TpmFault>;
}

impl Forge for Tpm {
    fn extend(&mut self, index: PcrIndex, digest: &PcrDigest) -> Result<(), TpmFault> {
        let command = Command::new("TPM2_PCR_Extend", PCR_EXTEND).with_password(u8::from(index).into(), &[]);
        let bank = digest.bank().algorithm();
        let command = command.parameters(|to| to.u32(1).u16(bank).raw(digest.as_bytes()));
        self.run(&command)?.read(|_| Ok(()))
    }

    fn load_key(&mut self, shape: KeyShape) -> Result<LoadedAk, TpmFault> {
        let template = match shape {
            KeyShape::Usual | KeyShape::OwnerPrimary => AK,
            KeyShape::RsaSsa => {
                crate::tpm::template::Template { kind: Kind::Rsa2048, scheme: Scheme::RsaSsa, ..AK }
            }
            KeyShape::RsaPss => {
                crate::tpm::template::Template { kind: Kind::Rsa2048, scheme: Scheme::RsaPss, ..AK }
            }
            KeyShape::Unrestricted => without(attribute::RESTRICTED),
            KeyShape::NotFixed => without(attribute::FIXED_TPM | attribute::FIXED_PARENT),
        };
        if shape != KeyShape::OwnerPrimary {
            let blobs: AkBlobs = self.create_under_ek(template)?;
            return self.load_ak(&blobs);
        }
        let public = template.to_bytes();
        let command = Command::new("TPM2_CreatePrimary", code::CREATE_PRIMARY).with_password(RH_OWNER, &[]);
        let command = command.parameters(|to| to.sized(&[0; 4]).sized(&public).sized(&[]).u32(0));
        let (handle, public) = self.run_long(&command)?.read_handle(|from| {
            let public = Public::parse(from.sized(1024, "outPublic")?)?;
            from.rest();
            Ok(public)
        })?;
        Ok(LoadedAk::new(self.opened(handle), public))
    }

    fn certify(&mut self, key: &LoadedAk, extra_data: &[u8]) -> Result<Quote, TpmFault> {
        let command = Command::new("TPM2_Certify", CERTIFY)
            .with_password(key.handle, &[])
            .with_password(key.handle, &[])
            .parameters(|to| to.sized(extra_data).u16(algorithm::NULL));
        self.run(&command)?.read(|from| {
            let attest = Bounded::new(from.sized(512, "certifyInfo")?.to_vec())?;
            Ok(Quote { attest, signature: Bounded::new(from.rest().to_vec())? })
        })
    }

    fn sign(&mut self, key: &LoadedAk, bytes: &[u8]) -> Result<Vec<u8>, TpmFault> {
        let hash = Command::new("TPM2_Hash", HASH)
            .parameters(|to| to.sized(bytes).u16(algorithm::SHA256).u32(code::RH_NULL));
        let read = |from: &mut Reader<'_>| -> Result<_, Malformed> {
            Ok((from.sized(64, "outHash")?.to_vec(), from.rest().to_vec()))
        };
        let (digest, ticket) = self.run(&hash)?.read(read)?;
        let command = Command::new("TPM2_Sign", SIGN)
            .with_password(key.handle, &[])
            .parameters(|to| to.sized(&digest).u16(algorithm::NULL).raw(&ticket));
        self.run(&command)?.read(|from| Ok(from.rest().to_vec()))
    }
}

const fn without(attributes: u32) -> crate::tpm::template::Template<'static> {
    crate::tpm::template::Template { attributes: AK.attributes & !attributes, ..AK }
}
