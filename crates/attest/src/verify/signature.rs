//! Verifies the signature of an attestation key.

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, RSA_PKCS1_2048_8192_SHA256, RSA_PSS_2048_8192_SHA256, RsaParameters,
    RsaPublicKeyComponents, UnparsedPublicKey,
};

use crate::structure::{Key, Public, Scheme, Signature};

/// Whether `signature` is by `key` over `message`, in the scheme to which the key itself is bound.
pub(super) fn verifies(key: &Public, message: &[u8], signature: &Signature) -> bool {
    match (key.scheme(), key.key(), signature) {
        (Scheme::Ecdsa, Key::P256 { x, y }, Signature::Ecdsa(signature)) => {
            let point = [&[4], &x[..], &y[..]].concat();
            UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, point).verify(message, signature).is_ok()
        }
        (Scheme::RsaSsa, Key::Rsa { modulus, exponent }, Signature::RsaSsa(signature)) => {
            rsa_verifies(&RSA_PKCS1_2048_8192_SHA256, modulus, *exponent, message, signature)
        }
        (Scheme::RsaPss, Key::Rsa { modulus, exponent }, Signature::RsaPss(signature)) => {
            rsa_verifies(&RSA_PSS_2048_8192_SHA256, modulus, *exponent, message, signature)
        }
        _ => false,
    }
}

fn rsa_verifies(
    scheme: &RsaParameters,
    modulus: &[u8],
    exponent: u32,
    message: &[u8],
    signature: &[u8],
) -> bool {
    let exponent = exponent.to_be_bytes();
    let first = exponent.iter().position(|byte| *byte != 0).unwrap_or_default();
    let key = RsaPublicKeyComponents { n: modulus, e: exponent.get(first..).unwrap_or_default() };
    key.verify(scheme, message, signature).is_ok()
}
