//! The cryptography this project accepts, in one place.

use std::sync::Arc;

use rustls::crypto::aws_lc_rs::{self, cipher_suite, kx_group};
use rustls::crypto::{CryptoProvider, SupportedKxGroup};

/// Between our own two VM agents there is no old peer to please: hybrid post-quantum key exchange or
/// nothing, so that a stripped offer fails instead of weakening the channel.
pub(crate) fn channel_provider() -> Arc<CryptoProvider> {
    provider(vec![kx_group::X25519MLKEM768])
}

/// The control plane prefers the hybrid exchange; operators' browsers and curl may lack it.
#[cfg(feature = "control")]
pub(crate) fn control_provider() -> Arc<CryptoProvider> {
    provider(vec![kx_group::X25519MLKEM768, kx_group::X25519, kx_group::SECP256R1])
}

fn provider(kx_groups: Vec<&'static dyn SupportedKxGroup>) -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        cipher_suites: vec![
            cipher_suite::TLS13_AES_256_GCM_SHA384,
            cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
            cipher_suite::TLS13_AES_128_GCM_SHA256,
        ],
        kx_groups,
        ..aws_lc_rs::default_provider()
    })
}
