//! What one end of a channel brings: its single-use key, the peer's key and the permit's digest.

use std::fmt;
use std::sync::Arc;

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{AlwaysResolvesClientRawPublicKeys, Resumption};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature_with_raw_key};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{AlwaysResolvesServerRawPublicKeys, NoServerSessionStorage};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error as TlsError,
    PeerIncompatible, ServerConfig, SignatureScheme,
};
use types::Digest;

use super::error::{ChannelError, TlsFault};
use crate::provider::channel_provider;
use crate::spki;

/// A VM agent's key for one migration: made in the agent, never written anywhere, gone with the process.
#[derive(Clone)]
pub struct EphemeralKey {
    certified: Arc<CertifiedKey>,
    spki: [u8; spki::ED25519_SPKI_BYTES],
}

impl EphemeralKey {
    /// Makes a key; the permit is to name its SubjectPublicKeyInfo (DER).
    ///
    /// # Errors
    /// The system gave no random numbers.
    pub fn generate() -> Result<Self, ChannelError> {
        let failed = |_| ChannelError::Library(TlsFault(TlsError::FailedToGetRandomBytes));
        let pair = Ed25519KeyPair::generate().map_err(failed)?;
        let public: [u8; 32] =
            pair.public_key().as_ref().try_into().expect("an Ed25519 public key has 32 bytes");
        let document = pair.to_pkcs8v1().map_err(failed)?;
        let private = PrivatePkcs8KeyDer::from(document.as_ref());
        let signing = rustls::crypto::aws_lc_rs::sign::any_eddsa_type(&private)
            .map_err(|error| ChannelError::Library(TlsFault(error)))?;
        let spki = spki::from_ed25519(&public);
        // RFC 7250: the SubjectPublicKeyInfo travels where a certificate would.
        let certified = CertifiedKey::new(vec![CertificateDer::from(spki.to_vec())], signing);
        Ok(Self { certified: Arc::new(certified), spki })
    }

    /// SubjectPublicKeyInfo in DER: what the permit names.
    pub fn spki(&self) -> &[u8] {
        &self.spki
    }
}

impl fmt::Debug for EphemeralKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EphemeralKey").field("spki", &self.spki).finish_non_exhaustive()
    }
}

/// One end of one channel.
#[derive(Debug, Clone)]
pub struct ChannelConfig {
    key: EphemeralKey,
    peer_spki: Vec<u8>,
    alpn: Vec<u8>,
}

impl ChannelConfig {
    /// For channel number `channel` (0 is the main one) of the migration whose permit token has this digest
    /// and names `peer_spki` for the other agent.
    ///
    /// # Errors
    /// [`ChannelError::PeerKeyUnusable`] when the peer's key is no Ed25519 key or is our own, which would let
    /// our own messages be reflected to us.
    pub fn new(
        key: &EphemeralKey,
        peer_spki: &[u8],
        permit: &Digest,
        channel: u16,
    ) -> Result<Self, ChannelError> {
        if spki::to_ed25519(peer_spki).is_none() {
            return Err(ChannelError::PeerKeyUnusable { why: "not an Ed25519 SubjectPublicKeyInfo" });
        }
        if peer_spki == key.spki() {
            return Err(ChannelError::PeerKeyUnusable { why: "the same as our own" });
        }
        Ok(Self { key: key.clone(), peer_spki: peer_spki.to_vec(), alpn: alpn(permit, channel) })
    }

    /// A peer that offers no ALPN value at all.
    #[cfg(test)]
    pub(super) fn forget_binding(&mut self) {
        self.alpn.clear();
    }

    /// The ALPN value that both ends insist on.
    pub(super) fn alpn(&self) -> &[u8] {
        &self.alpn
    }

    fn offer(&self) -> Vec<Vec<u8>> {
        Some(self.alpn.clone()).filter(|alpn| !alpn.is_empty()).into_iter().collect()
    }

    pub(super) fn client(&self) -> Result<Arc<ClientConfig>, TlsError> {
        let provider = channel_provider();
        let verifier = Arc::new(PinnedKey::new(&self.peer_spki, &provider));
        let resolver = AlwaysResolvesClientRawPublicKeys::new(self.key.certified.clone());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_client_cert_resolver(Arc::new(resolver));
        config.alpn_protocols = self.offer();
        config.resumption = Resumption::disabled();
        config.enable_early_data = false;
        config.enable_sni = false;
        Ok(Arc::new(config))
    }

    pub(super) fn server(&self) -> Result<Arc<ServerConfig>, TlsError> {
        let provider = channel_provider();
        let verifier = Arc::new(PinnedKey::new(&self.peer_spki, &provider));
        let resolver = AlwaysResolvesServerRawPublicKeys::new(self.key.certified.clone());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::new(resolver));
        config.alpn_protocols = self.offer();
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        config.max_early_data_size = 0;
        Ok(Arc::new(config))
    }
}

/// `outrider/1/<permit digest>/<channel>`: covered by both handshake signatures, so that a captured
/// permit or handshake opens no other channel.
fn alpn(permit: &Digest, channel: u16) -> Vec<u8> {
    format!("outrider/1/{permit}/{channel}").into_bytes()
}

/// A name that TLS wants and nobody looks at: keys, not names, are verified here.
pub(super) fn unused_server_name() -> ServerName<'static> {
    ServerName::try_from("agent.outrider.invalid").expect("a constant, valid DNS name")
}

/// Accepts exactly one raw public key, the one that the permit names, on either side.
#[derive(Debug)]
struct PinnedKey {
    expected: Vec<u8>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl PinnedKey {
    fn new(expected: &[u8], provider: &CryptoProvider) -> Self {
        Self { expected: expected.to_vec(), algorithms: provider.signature_verification_algorithms }
    }

    fn check(&self, presented: &CertificateDer<'_>, rest: &[CertificateDer<'_>]) -> Result<(), TlsError> {
        if presented.as_ref() == self.expected && rest.is_empty() {
            return Ok(());
        }
        Err(TlsError::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
    }

    fn check_signature(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        let key = SubjectPublicKeyInfoDer::from(key.as_ref());
        verify_tls13_signature_with_raw_key(message, &key, signed, &self.algorithms)
    }
}

fn no_tls12() -> TlsError {
    TlsError::PeerIncompatible(PeerIncompatible::Tls12NotOfferedOrEnabled)
}

impl ServerCertVerifier for PinnedKey {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        self.check(end_entity, intermediates).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.check_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

impl ClientCertVerifier for PinnedKey {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, TlsError> {
        self.check(end_entity, intermediates).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.check_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}
