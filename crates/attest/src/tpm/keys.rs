//! Endorsement and attestation keys in the TPM (Part 3, sections 12, 13 and 24).

use std::fmt;

use zeroize::Zeroizing;

use super::command::{Command, TpmFault, code};
use super::template::{AK, EK_POLICY, Kind, Template, ek};
use super::{RESPONSE_LIMIT_BYTES, Tpm};
use crate::codec::{Malformed, Reader, Writer, within};
use crate::enrol::{CERTIFICATE_LIMIT_BYTES, Challenge, ENDORSEMENT_HIERARCHY};
use crate::structure::{Key, PUBLIC_LIMIT_BYTES, Public, algorithm};

/// Where a provisioned platform keeps the RSA endorsement key (TCG TPM v2.0 Provisioning Guidance).
const PERSISTENT_RSA_EK: u32 = 0x8101_0001;
/// Where vendors put the certificates of the two keys (EK Credential Profile, "Low Range").
const RSA_CERTIFICATE: u32 = 0x01C0_0002;
const P256_CERTIFICATE: u32 = 0x01C0_000A;
/// `TPM_SE_POLICY` (Part 2, 6.11).
const SE_POLICY: u8 = 1;
/// At least half of the digest (Part 3, 11.1).
const NONCE_BYTES: usize = 16;
const PRIVATE_LIMIT_BYTES: usize = 1024;
const CREDENTIAL_LIMIT_BYTES: usize = 64;

/// An attestation key as it is kept outside the TPM, which alone can open its private half. For a file of
/// mode 0600.
#[derive(Clone, PartialEq, Eq)]
pub struct AkBlobs {
    private: Zeroizing<Vec<u8>>,
    public: Public,
}

/// Why bytes are not a kept attestation key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the kept attestation key is damaged; remove it and have an admin enrol the host again")]
pub struct AkBlobsFault(#[source] Malformed);

impl AkBlobs {
    /// The public area.
    #[must_use]
    pub fn public(&self) -> &Public {
        &self.public
    }

    /// What is to be kept.
    #[must_use]
    pub fn to_bytes(&self) -> Zeroizing<Vec<u8>> {
        Zeroizing::new(Writer::new().sized(&self.private).sized(self.public.as_bytes()).done())
    }

    /// Reads what was kept.
    ///
    /// # Errors
    /// [`AkBlobsFault`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, AkBlobsFault> {
        let mut from = Reader::new(bytes);
        let blobs = read_blobs(&mut from).map_err(AkBlobsFault)?;
        from.finish("the attestation key").map_err(AkBlobsFault)?;
        Ok(blobs)
    }
}

impl fmt::Debug for AkBlobs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AkBlobs").field("public", &self.public).finish_non_exhaustive()
    }
}

fn read_blobs(from: &mut Reader<'_>) -> Result<AkBlobs, Malformed> {
    let private = Zeroizing::new(from.sized(PRIVATE_LIMIT_BYTES, "outPrivate")?.to_vec());
    Ok(AkBlobs { private, public: read_public(from)? })
}

fn read_public(from: &mut Reader<'_>) -> Result<Public, Malformed> {
    Public::parse(from.sized(PUBLIC_LIMIT_BYTES, "outPublic")?)
}

/// An attestation key in the TPM, until it is unloaded or its [`Tpm`] is dropped.
#[derive(Debug)]
pub struct LoadedAk {
    pub(crate) handle: u32,
    public: Public,
}

impl LoadedAk {
    pub(crate) fn new(handle: u32, public: Public) -> Self {
        Self { handle, public }
    }

    /// The public area.
    #[must_use]
    pub fn public(&self) -> &Public {
        &self.public
    }
}

/// The endorsement key while it is used.
struct Ek {
    handle: u32,
    public: Public,
}

impl Tpm {
    /// The public area of the endorsement key.
    ///
    /// # Errors
    /// [`TpmFault`].
    pub fn ek(&mut self) -> Result<Public, TpmFault> {
        self.with_ek(|_, ek| Ok(ek.public.clone()))
    }

    /// The vendor's certificate of the endorsement key, in DER, if the TPM has one.
    ///
    /// # Errors
    /// [`TpmFault`].
    pub fn ek_certificate(&mut self) -> Result<Option<Vec<u8>>, TpmFault> {
        let index = match self.options.ek {
            Kind::Rsa2048 => RSA_CERTIFICATE,
            Kind::P256 => P256_CERTIFICATE,
        };
        let Some(size) = self.nv_size(index)? else { return Ok(None) };
        let malformed = |source| TpmFault::Malformed { command: "TPM2_NV_ReadPublic", source };
        within(size.into(), CERTIFICATE_LIMIT_BYTES, "the EK certificate").map_err(malformed)?;
        let mut certificate = Vec::new();
        while certificate.len() < usize::from(size) {
            let more = self.nv_read(index, certificate.len(), usize::from(size) - certificate.len())?;
            certificate.extend(more);
        }
        certificate.truncate(der_length(&certificate).unwrap_or(certificate.len()));
        Ok(Some(certificate))
    }

    /// Makes an attestation key below the endorsement key: restricted, ECDSA on P-256. It is not loaded
    /// afterwards.
    ///
    /// Below the endorsement key, because only then the quote carries that key in its signer's qualified
    /// name, and the true counters of resets instead of masked ones (Part 1, "Timing Components").
    ///
    /// # Errors
    /// [`TpmFault`].
    pub fn create_ak(&mut self) -> Result<AkBlobs, TpmFault> {
        self.create_under_ek(AK)
    }

    pub(crate) fn create_under_ek(&mut self, template: Template<'_>) -> Result<AkBlobs, TpmFault> {
        let public = template.to_bytes();
        self.with_ek(|tpm, ek| {
            tpm.with_ek_policy(|tpm, session| {
                let command = Command::new("TPM2_Create", code::CREATE).with_policy(ek.handle, session);
                let command = command.parameters(|to| creation(to, &public));
                tpm.run_long(&command)?.read(|from| {
                    let blobs = read_blobs(from)?;
                    read_creation_proof(from)?;
                    Ok(blobs)
                })
            })
        })
    }

    /// Loads an attestation key.
    ///
    /// # Errors
    /// [`TpmFault`]; with code 0x1df or 0x9f the key is not of this TPM, or the TPM was cleared since.
    pub fn load_ak(&mut self, blobs: &AkBlobs) -> Result<LoadedAk, TpmFault> {
        self.with_ek(|tpm, ek| {
            tpm.with_ek_policy(|tpm, session| {
                let command = Command::new("TPM2_Load", code::LOAD).with_policy(ek.handle, session);
                let command =
                    command.parameters(|to| to.sized(&blobs.private).sized(blobs.public.as_bytes()));
                let response = tpm.run(&command)?;
                let (handle, _) = response.read_handle(|from| from.sized(68, "name").map(|_| ()))?;
                Ok(LoadedAk::new(tpm.opened(handle), blobs.public.clone()))
            })
        })
    }

    /// Unloads an attestation key.
    ///
    /// # Errors
    /// [`TpmFault`].
    pub fn unload_ak(&mut self, ak: LoadedAk) -> Result<(), TpmFault> {
        self.flush(ak.handle)
    }

    /// Opens the manager's challenge: proves that this TPM holds both keys.
    ///
    /// # Errors
    /// [`TpmFault`]; the TPM refuses a challenge that was made for another endorsement key or another
    /// attestation key.
    pub fn activate_credential(
        &mut self,
        ak: &LoadedAk,
        challenge: &Challenge,
    ) -> Result<Zeroizing<Vec<u8>>, TpmFault> {
        self.with_ek(|tpm, ek| {
            tpm.with_ek_policy(|tpm, session| {
                let command = Command::new("TPM2_ActivateCredential", code::ACTIVATE_CREDENTIAL)
                    .with_password(ak.handle, &[])
                    .with_policy(ek.handle, session)
                    .parameters(|to| {
                        to.sized(challenge.id_object.as_slice()).sized(challenge.encrypted_secret.as_slice())
                    });
                let read = |from: &mut Reader<'_>| {
                    from.sized(CREDENTIAL_LIMIT_BYTES, "certInfo").map(<[u8]>::to_vec)
                };
                tpm.run(&command)?.read(read).map(Zeroizing::new)
            })
        })
    }

    /// Acts with the endorsement key: the persistent one where the platform keeps it, else one that is made
    /// for the occasion, which is the same.
    fn with_ek<R>(&mut self, act: impl FnOnce(&mut Self, &Ek) -> Result<R, TpmFault>) -> Result<R, TpmFault> {
        if let Some(ek) = self.persistent_ek()? {
            return act(self, &ek);
        }
        let ek = self.create_ek()?;
        self.and_flush(ek.handle, |tpm| act(tpm, &ek))
    }

    fn persistent_ek(&mut self) -> Result<Option<Ek>, TpmFault> {
        if self.options.ek != Kind::Rsa2048 {
            return Ok(None);
        }
        let handle = PERSISTENT_RSA_EK;
        let command = Command::new("TPM2_ReadPublic", code::READ_PUBLIC).handle(handle);
        let response = match self.run(&command) {
            Err(TpmFault::Refused { code: code::RC_HANDLE_1, .. }) => return Ok(None),
            outcome => outcome?,
        };
        let read = |from: &mut Reader<'_>| {
            let public = from.sized(RESPONSE_LIMIT_BYTES, "outPublic")?;
            from.sized(68, "name")?;
            from.sized(68, "qualifiedName")?;
            // Something else than an endorsement key that we know may lie there: then it is passed over.
            Ok(Public::parse(public).ok())
        };
        let usual = |public: &Public| {
            matches!(public.key(), Key::Rsa { .. })
                && public.may_endorse().is_ok()
                && public.policy() == EK_POLICY
        };
        Ok(response.read(read)?.filter(usual).map(|public| Ek { handle, public }))
    }

    fn create_ek(&mut self) -> Result<Ek, TpmFault> {
        let public = ek(self.options.ek).to_bytes();
        let command = Command::new("TPM2_CreatePrimary", code::CREATE_PRIMARY)
            .with_password(ENDORSEMENT_HIERARCHY, &self.options.endorsement_password)
            .parameters(|to| creation(to, &public));
        let (handle, public) = self.run_long(&command)?.read_handle(|from| {
            let public = read_public(from)?;
            read_creation_proof(from)?;
            from.sized(68, "name")?;
            Ok(public)
        })?;
        Ok(Ek { handle: self.opened(handle), public })
    }

    /// Acts in a session that satisfies the endorsement key's policy: the secret of its hierarchy is known.
    fn with_ek_policy<R>(
        &mut self,
        act: impl FnOnce(&mut Self, u32) -> Result<R, TpmFault>,
    ) -> Result<R, TpmFault> {
        let session = self.start_policy_session()?;
        self.and_flush(session, |tpm| {
            let command = Command::new("TPM2_PolicySecret", code::POLICY_SECRET)
                .with_password(ENDORSEMENT_HIERARCHY, &tpm.options.endorsement_password)
                .handle(session)
                .parameters(|to| to.sized(&[]).sized(&[]).sized(&[]).u32(0));
            tpm.run(&command)?.read(|from| {
                from.sized(68, "timeout")?;
                read_ticket(from)
            })?;
            act(tpm, session)
        })
    }

    fn start_policy_session(&mut self) -> Result<u32, TpmFault> {
        // Unbound and unsalted: no HMAC is made with it, so nothing rests on the nonce; it must only be long
        // enough (Part 3, 11.1).
        let nonce = [0; NONCE_BYTES];
        let command = Command::new("TPM2_StartAuthSession", code::START_AUTH_SESSION)
            .handle(code::RH_NULL)
            .handle(code::RH_NULL)
            .parameters(|to| {
                to.sized(&nonce).sized(&[]).u8(SE_POLICY).u16(algorithm::NULL).u16(algorithm::SHA256)
            });
        let (session, _) = self.run(&command)?.read_handle(|from| from.sized(64, "nonceTPM").map(|_| ()))?;
        Ok(self.opened(session))
    }

    /// The size of an index in the TPM's permanent memory; nothing if there is none.
    fn nv_size(&mut self, index: u32) -> Result<Option<u16>, TpmFault> {
        let command = Command::new("TPM2_NV_ReadPublic", code::NV_READ_PUBLIC).handle(index);
        let response = match self.run(&command) {
            Err(TpmFault::Refused { code: code::RC_HANDLE_1, .. }) => return Ok(None),
            outcome => outcome?,
        };
        response.read(|from| {
            let mut public = Reader::new(from.sized(256, "nvPublic")?);
            public.take(10, "nvIndex, nameAlg and attributes")?;
            public.sized(64, "authPolicy")?;
            let size = public.u16("dataSize")?;
            public.finish("nvPublic")?;
            from.sized(68, "nvName")?;
            Ok(Some(size))
        })
    }

    fn nv_read(&mut self, index: u32, offset: usize, left: usize) -> Result<Vec<u8>, TpmFault> {
        /// Every TPM gives as much at once.
        const PIECE_BYTES: usize = 512;
        let field = |value: usize| u16::try_from(value).unwrap_or(u16::MAX);
        let command = Command::new("TPM2_NV_Read", code::NV_READ)
            .with_password(index, &[])
            .handle(index)
            .parameters(|to| to.u16(field(left.min(PIECE_BYTES))).u16(field(offset)));
        self.run(&command)?.read(|from| match from.sized(PIECE_BYTES, "data")? {
            [] => Err(Malformed::Truncated { what: "data" }),
            data => Ok(data.to_vec()),
        })
    }
}

/// `TPM2B_SENSITIVE_CREATE` without password, the public area, no outside information, no creation PCRs.
fn creation(to: Writer, public: &[u8]) -> Writer {
    to.sized(&[0; 4]).sized(public).sized(&[]).u32(0)
}

/// What proves that a key was created: not needed, since activation and the signer's name prove more.
fn read_creation_proof(from: &mut Reader<'_>) -> Result<(), Malformed> {
    from.sized(RESPONSE_LIMIT_BYTES, "creationData")?;
    from.sized(64, "creationHash")?;
    read_ticket(from)
}

/// Any `TPMT_TK` (Part 2, 10.7): a tag, a hierarchy, a digest.
fn read_ticket(from: &mut Reader<'_>) -> Result<(), Malformed> {
    from.take(6, "ticket")?;
    from.sized(64, "ticket").map(|_| ())
}

/// The length of the DER element at the front: vendors leave space behind the certificate.
fn der_length(bytes: &[u8]) -> Option<usize> {
    match bytes {
        [0x30, 0x82, high, low, ..] => Some(4 + usize::from(u16::from_be_bytes([*high, *low]))),
        _ => None,
    }
}
