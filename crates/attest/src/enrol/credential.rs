//! `TPM2_MakeCredential` without a TPM (Part 1, "Credential Protection", and "Secret Sharing" in annexes B
//! and C): a secret for one endorsement key and one object name.

use aws_lc_rs::agreement::{self, ECDH_P256, EphemeralPrivateKey, UnparsedPublicKey};
use aws_lc_rs::cipher::{AES_128, EncryptingKey, EncryptionContext, UnboundCipherKey};
use aws_lc_rs::digest::{self, SHA256};
use aws_lc_rs::iv::FixedLength;
use aws_lc_rs::rand::{self, SystemRandom};
use aws_lc_rs::rsa::{OAEP_SHA256_MGF1SHA256, OaepPublicEncryptingKey, PublicEncryptingKey};
use aws_lc_rs::signature::RsaPublicKeyComponents;
use aws_lc_rs::{error::Unspecified, hmac};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::codec::{Bounded, Writer};
use crate::structure::{Key, KeyFault, Public, TpmName};

/// Bytes of the secret: what a credential can hold under a key that is named by SHA-256.
pub const SECRET_BYTES: usize = 32;
/// `TPMS_ID_OBJECT`: an HMAC and an encrypted secret, each with its length.
const ID_OBJECT_LIMIT_BYTES: usize = 2 * (2 + 32);
/// An RSA 4096 ciphertext.
const ENCRYPTED_SECRET_LIMIT_BYTES: usize = 512;
const SEED_BYTES: usize = 32;
const AES_KEY_BYTES: usize = 16;
/// The label of both ways to send the seed, with the zero that belongs to it (Part 1, annex B).
const IDENTITY: &[u8] = b"IDENTITY\0";

/// A credential: what the host gives to `TPM2_ActivateCredential`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Challenge {
    /// `TPM2B_ID_OBJECT` without its length.
    pub id_object: Bounded<ID_OBJECT_LIMIT_BYTES>,
    /// `TPM2B_ENCRYPTED_SECRET` without its length.
    pub encrypted_secret: Bounded<ENCRYPTED_SECRET_LIMIT_BYTES>,
}

/// Why no credential could be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CredentialFault {
    /// The key can't protect a credential.
    #[error("the key can't protect a credential")]
    Unfit(#[from] KeyFault),
    /// The key is not a valid one, for instance a point that is not on its curve.
    #[error("the key is not a valid RSA or P-256 key")]
    InvalidKey,
    /// The machine gave no random numbers.
    #[error("the machine gave no random numbers")]
    NoRandomNumbers,
}

/// Makes a credential: `secret`, which only the TPM that holds `ek` opens, and only for an object that is
/// named `name`.
///
/// # Errors
/// [`CredentialFault`].
pub fn make_credential(
    ek: &Public,
    name: &TpmName,
    secret: &[u8; SECRET_BYTES],
) -> Result<Challenge, CredentialFault> {
    ek.may_endorse()?;
    let (seed, encrypted_secret) = match ek.key() {
        Key::Rsa { modulus, exponent } => rsa_seed(modulus, *exponent)?,
        Key::P256 { x, y } => p256_seed(x, y)?,
    };
    let identity = encrypt(&kdf_a(&seed, b"STORAGE\0", name.as_bytes(), AES_KEY_BYTES), secret)?;
    let mac_key = hmac::Key::new(hmac::HMAC_SHA256, &kdf_a(&seed, b"INTEGRITY\0", &[], SEED_BYTES));
    let mac = hmac::sign(&mac_key, &[&identity, name.as_bytes()].concat());
    let id_object = Writer::new().sized(mac.as_ref()).raw(&identity).done();
    let fits = |_| CredentialFault::InvalidKey;
    Ok(Challenge {
        id_object: Bounded::new(id_object).map_err(fits)?,
        encrypted_secret: Bounded::new(encrypted_secret).map_err(fits)?,
    })
}

type Seed = Zeroizing<Vec<u8>>;

/// A random seed, encrypted by OAEP (annex B).
fn rsa_seed(modulus: &[u8], exponent: u32) -> Result<(Seed, Vec<u8>), CredentialFault> {
    let mut seed = Zeroizing::new(vec![0; SEED_BYTES]);
    rand::fill(&mut seed).map_err(|_| CredentialFault::NoRandomNumbers)?;
    let encrypt = || {
        let exponent = exponent.to_be_bytes();
        let exponent = exponent.get(exponent.iter().position(|byte| *byte != 0)?..)?;
        let key: PublicEncryptingKey = RsaPublicKeyComponents { n: modulus, e: exponent }.try_into().ok()?;
        let key = OaepPublicEncryptingKey::new(key).ok()?;
        let mut encrypted = vec![0; key.ciphertext_size()];
        let written = key.encrypt(&OAEP_SHA256_MGF1SHA256, &seed, &mut encrypted, Some(IDENTITY)).ok()?.len();
        encrypted.truncate(written);
        Some(encrypted)
    };
    let encrypted = encrypt().ok_or(CredentialFault::InvalidKey)?;
    Ok((seed, encrypted))
}

/// A seed agreed with a key of one use, whose public point is sent (annex C).
fn p256_seed(x: &[u8; 32], y: &[u8; 32]) -> Result<(Seed, Vec<u8>), CredentialFault> {
    let random = |_: Unspecified| CredentialFault::NoRandomNumbers;
    let ours = EphemeralPrivateKey::generate(&ECDH_P256, &SystemRandom::new()).map_err(random)?;
    let point = ours.compute_public_key().map_err(random)?;
    let halves = point.as_ref().strip_prefix(&[4]).and_then(|point| point.split_at_checked(32));
    let (our_x, our_y) = halves.ok_or(CredentialFault::InvalidKey)?;
    let theirs = UnparsedPublicKey::new(&ECDH_P256, [&[4], &x[..], &y[..]].concat());
    let seed = agreement::agree_ephemeral(ours, theirs, CredentialFault::InvalidKey, |shared| {
        Ok(kdf_e(shared, our_x, x))
    })?;
    Ok((seed, Writer::new().sized(our_x).sized(our_y).done()))
}

/// `KDFe` (Part 1, 11.4.10.3) with SHA-256, for as many bits as it has.
fn kdf_e(shared: &[u8], ours: &[u8], theirs: &[u8]) -> Seed {
    let mut hash = digest::Context::new(&SHA256);
    for part in [&1_u32.to_be_bytes(), shared, IDENTITY, ours, theirs] {
        hash.update(part);
    }
    Zeroizing::new(hash.finish().as_ref().to_vec())
}

/// `KDFa` (Part 1, 11.4.10.2) with SHA-256, for at most as many bytes as it has.
fn kdf_a(key: &[u8], label: &[u8], context: &[u8], bytes: usize) -> Seed {
    let bits = u32::try_from(bytes * 8).unwrap_or(u32::MAX);
    let mut mac = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, key));
    for part in [&1_u32.to_be_bytes(), label, context, &bits.to_be_bytes()] {
        mac.update(part);
    }
    let mut derived = Zeroizing::new(mac.sign().as_ref().to_vec());
    derived.truncate(bytes);
    derived
}

/// The secret as `TPM2B_DIGEST` in AES-128-CFB. The key is used once, so the vector may be zero (Part 1,
/// "Credential Protection").
fn encrypt(key: &[u8], secret: &[u8]) -> Result<Vec<u8>, CredentialFault> {
    let mut text = Writer::new().sized(secret).done();
    let mut encrypt = || {
        let key = EncryptingKey::cfb128(UnboundCipherKey::new(&AES_128, key)?)?;
        key.less_safe_encrypt(&mut text, EncryptionContext::Iv128(FixedLength::from([0; 16])))
    };
    encrypt().map_err(|_| CredentialFault::InvalidKey)?;
    Ok(text)
}
