//! Who is at the other end: SPIFFE ids in certificates, and our own identity that can be renewed in place.
//!
//! `spiffe://<trust-domain>/{manager,host,operator}/<name>`, exactly one URI in the certificate, nothing else
//! counts: no common name, no DNS name. A role check yields a value ([`HostPeer`], [`ManagerPeer`]) that the next
//! function demands.

use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::SignatureScheme;
use rustls::client::ResolvesClientCert;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use types::{Digest, HostName, Name};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::Zeroizing;

use crate::provider::control_provider;

/// Leaf, one intermediate and the CA; a peer's chain has no more.
const CHAIN_LIMIT: usize = 4;
/// A chain of [`CHAIN_LIMIT`] certificates in PEM, with room.
const PEM_LIMIT_BYTES: usize = 64 * 1024;

/// Why an identity can't be read or is not the one that is needed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// Not a certificate, or not a whole one.
    #[error("not a certificate that can be read: {why}")]
    NotACertificate {
        /// What is wrong.
        why: &'static str,
    },
    /// No URI, several, or one that is none of ours.
    #[error("the certificate has no single id of the form spiffe://<trust-domain>/<role>/<name>: {found}")]
    NoSingleId {
        /// What it has, cut to 200 characters.
        found: String,
    },
    /// A certificate of another trust domain.
    #[error("{found} is not of the trust domain {expected}")]
    WrongTrustDomain {
        /// Whose certificate it is.
        found: PeerIdentity,
        /// Ours.
        expected: TrustDomain,
    },
    /// Another role or name than the one that is expected.
    #[error("{found} is not {expected}")]
    WrongPeer {
        /// Whose certificate it is.
        found: PeerIdentity,
        /// Who was expected.
        expected: String,
    },
    /// The private key can't be read or is not the certificate's.
    #[error("the private key cannot be used: {why}")]
    BadKey {
        /// What is wrong; never the key.
        why: &'static str,
    },
    /// Not a trust domain.
    #[error("a trust domain has 1 to 255 of a-z, 0-9, '.', '-' and '_'")]
    BadTrustDomain,
}

/// The authority part of all ids that one CA vouches for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrustDomain(String);

impl TrustDomain {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// `spiffe://<trust-domain>`: the id of the domain itself, which its CA carries.
    pub fn uri(&self) -> String {
        format!("spiffe://{}", self.0)
    }
}

impl FromStr for TrustDomain {
    type Err = IdentityError;
    fn from_str(text: &str) -> Result<Self, IdentityError> {
        let allowed = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b".-_".contains(&byte);
        if text.is_empty() || text.len() > 255 || !text.bytes().all(allowed) {
            return Err(IdentityError::BadTrustDomain);
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// What an identity may act as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// A control manager.
    Manager,
    /// A host daemon.
    Host,
    /// A person or an orchestrator.
    Operator,
}

impl Role {
    /// As it stands in an id.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Manager => "manager",
            Self::Host => "host",
            Self::Operator => "operator",
        }
    }
}

/// Who a verified certificate says its owner is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerIdentity {
    /// Of which trust domain.
    pub trust_domain: TrustDomain,
    /// In which role.
    pub role: Role,
    /// By which name.
    pub name: Name,
}

/// A peer that is a host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPeer {
    /// Its name.
    pub host: HostName,
}

/// A peer that is a control manager.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManagerPeer {
    /// Its name.
    pub manager: Name,
}

impl PeerIdentity {
    /// Its SPIFFE id.
    pub fn uri(&self) -> String {
        format!("spiffe://{}/{}/{}", self.trust_domain, self.role.as_str(), self.name)
    }

    /// Reads a SPIFFE id, strictly.
    ///
    /// # Errors
    /// [`IdentityError::NoSingleId`].
    pub fn from_uri(uri: &str) -> Result<Self, IdentityError> {
        Self::parse(uri).ok_or_else(|| IdentityError::NoSingleId { found: cut(uri) })
    }

    fn parse(uri: &str) -> Option<Self> {
        let mut parts = uri.strip_prefix("spiffe://")?.split('/');
        let (domain, role, name) = (parts.next()?, parts.next()?, parts.next()?);
        let role =
            [Role::Manager, Role::Host, Role::Operator].into_iter().find(|known| known.as_str() == role)?;
        let identity = Self { trust_domain: domain.parse().ok()?, role, name: name.parse().ok()? };
        parts.next().is_none().then_some(identity)
    }

    /// The identity that a certificate carries. Says nothing about who signed it.
    ///
    /// # Errors
    /// [`IdentityError::NotACertificate`] or [`IdentityError::NoSingleId`].
    pub fn from_certificate(der: &[u8]) -> Result<Self, IdentityError> {
        let uris = uris_of(der)?;
        match &uris[..] {
            [uri] => Self::from_uri(uri),
            _ => Err(IdentityError::NoSingleId { found: cut(&uris.join(", ")) }),
        }
    }

    /// A host.
    ///
    /// # Errors
    /// [`IdentityError::WrongPeer`].
    pub fn expect_host(&self) -> Result<HostPeer, IdentityError> {
        self.expect_role(Role::Host)?;
        Ok(HostPeer { host: self.name.clone() })
    }

    /// A control manager.
    ///
    /// # Errors
    /// [`IdentityError::WrongPeer`].
    pub fn expect_manager(&self) -> Result<ManagerPeer, IdentityError> {
        self.expect_role(Role::Manager)?;
        Ok(ManagerPeer { manager: self.name.clone() })
    }

    fn expect_role(&self, role: Role) -> Result<(), IdentityError> {
        if self.role == role {
            return Ok(());
        }
        Err(IdentityError::WrongPeer { found: self.clone(), expected: format!("a {}", role.as_str()) })
    }
}

impl fmt::Display for PeerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.uri())
    }
}

/// The URIs among a certificate's alternative names.
pub(crate) fn uris_of(der: &[u8]) -> Result<Vec<String>, IdentityError> {
    let certificate = parse_certificate(der)?;
    let names = certificate
        .subject_alternative_name()
        .map_err(|_| IdentityError::NotACertificate { why: "its alternative names are malformed" })?;
    let names = names.iter().flat_map(|extension| &extension.value.general_names);
    Ok(names
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some((*uri).to_owned()),
            _ => None,
        })
        .collect())
}

pub(crate) fn parse_certificate(der: &[u8]) -> Result<X509Certificate<'_>, IdentityError> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        Ok(_) => Err(IdentityError::NotACertificate { why: "bytes follow it" }),
        Err(_) => Err(IdentityError::NotACertificate { why: "not X.509 in DER" }),
    }
}

/// BLAKE3 of the SubjectPublicKeyInfo of a certificate: the same for another certificate of the same key. What a
/// platform's quote is bound to.
///
/// # Errors
/// [`IdentityError::NotACertificate`].
pub fn key_digest_of(der: &[u8]) -> Result<Digest, IdentityError> {
    Ok(Digest::of(parse_certificate(der)?.public_key().raw))
}

/// The same of a signing request.
///
/// # Errors
/// [`IdentityError::NotACertificate`].
pub fn csr_key_digest(der: &[u8]) -> Result<Digest, IdentityError> {
    match X509CertificationRequest::from_der(der) {
        Ok(([], request)) => Ok(Digest::of(request.certification_request_info.subject_pki.raw)),
        _ => Err(IdentityError::NotACertificate { why: "not a signing request" }),
    }
}

pub(crate) fn cut(text: &str) -> String {
    text.chars().take(200).collect()
}

/// A private key for an identity (ECDSA P-256, which every TLS client knows), before it has a certificate.
pub struct IdentityKey(KeyPair);

impl IdentityKey {
    /// Makes a key.
    ///
    /// # Errors
    /// [`IdentityError::BadKey`] without random numbers.
    pub fn generate() -> Result<Self, IdentityError> {
        let failed = |_| IdentityError::BadKey { why: "none could be generated" };
        KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map(Self).map_err(failed)
    }

    /// From PKCS#8 in PEM.
    ///
    /// # Errors
    /// [`IdentityError::BadKey`].
    pub fn from_pem(pem: &str) -> Result<Self, IdentityError> {
        KeyPair::from_pem(pem).map(Self).map_err(|_| IdentityError::BadKey { why: "not PKCS#8 in PEM" })
    }

    /// PKCS#8 in PEM, for a file of mode 0600.
    pub fn to_pem(&self) -> Zeroizing<String> {
        Zeroizing::new(self.0.serialize_pem())
    }

    /// A certificate signing request (DER) that proves possession of this key and asks for no name: names are
    /// what the CA's owner decides.
    ///
    /// # Errors
    /// [`IdentityError::BadKey`] when signing fails.
    pub fn signing_request(&self) -> Result<Vec<u8>, IdentityError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let request = params.serialize_request(&self.0);
        request
            .map(|request| request.der().to_vec())
            .map_err(|_| IdentityError::BadKey { why: "it cannot sign a request" })
    }

    pub(crate) fn pair(self) -> KeyPair {
        self.0
    }
}

impl fmt::Debug for IdentityKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("IdentityKey(..)")
    }
}

/// A certificate chain with its private key.
pub struct TlsIdentity {
    certified: Arc<CertifiedKey>,
    identity: PeerIdentity,
    not_before: SystemTime,
    not_after: SystemTime,
    key_digest: Digest,
}

impl TlsIdentity {
    /// From a chain (leaf first) and a PKCS#8 key in PEM: of our CA, of SPIRE or of files.
    ///
    /// # Errors
    /// Why they can't be used together.
    pub fn from_pem(chain_pem: &str, key_pem: &str) -> Result<Self, IdentityError> {
        let chain = chain_from_pem(chain_pem)?;
        let bad_key = |why| IdentityError::BadKey { why };
        let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes())
            .map_err(|_| bad_key("no private key in PEM"))?;
        let leaf = chain.first().ok_or(IdentityError::NotACertificate { why: "the chain is empty" })?;
        let identity = PeerIdentity::from_certificate(leaf)?;
        let (not_before, not_after) = validity(leaf)?;
        let key_digest = key_digest_of(leaf)?;
        let certified = CertifiedKey::from_der(chain, key, &control_provider())
            .map_err(|_| bad_key("it is not the key of the certificate"))?;
        Ok(Self { certified: Arc::new(certified), identity, not_before, not_after, key_digest })
    }

    /// Who we are with it.
    pub fn identity(&self) -> &PeerIdentity {
        &self.identity
    }

    /// BLAKE3 of the SubjectPublicKeyInfo of its key.
    pub fn key_digest(&self) -> Digest {
        self.key_digest
    }

    /// The end of its validity.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// Whether half of its life is over: early enough that a day without the manager does no harm.
    pub fn needs_renewal(&self, now: SystemTime) -> bool {
        let life = self.not_after.duration_since(self.not_before).unwrap_or_default();
        now >= self.not_before + life / 2
    }
}

impl fmt::Debug for TlsIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsIdentity").field("identity", &self.identity).finish_non_exhaustive()
    }
}

pub(crate) fn chain_from_pem(pem: &str) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let refuse = |why| IdentityError::NotACertificate { why };
    if pem.len() > PEM_LIMIT_BYTES {
        return Err(refuse("more than 64 KiB"));
    }
    let chain: Result<Vec<_>, _> =
        CertificateDer::pem_slice_iter(pem.as_bytes()).take(CHAIN_LIMIT + 1).collect();
    match chain {
        Ok(chain) if chain.len() <= CHAIN_LIMIT => Ok(chain),
        Ok(_) => Err(refuse("more than four certificates")),
        Err(_) => Err(refuse("malformed PEM")),
    }
}

fn validity(leaf: &CertificateDer<'_>) -> Result<(SystemTime, SystemTime), IdentityError> {
    let certificate = parse_certificate(leaf)?;
    let at = |seconds: i64| UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
    let validity = certificate.validity();
    Ok((at(validity.not_before.timestamp()), at(validity.not_after.timestamp())))
}

/// An identity that can be replaced while listeners and connectors use it: new handshakes take the new one,
/// open connections go on.
#[derive(Clone, Debug)]
pub struct LiveIdentity(Arc<RwLock<Arc<TlsIdentity>>>);

impl LiveIdentity {
    /// Starts with this identity.
    pub fn new(identity: TlsIdentity) -> Self {
        Self(Arc::new(RwLock::new(Arc::new(identity))))
    }

    /// The identity at this moment.
    pub fn current(&self) -> Arc<TlsIdentity> {
        // The lock guards a single assignment: a panic elsewhere can't leave it half done.
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes the renewed identity. It must be the same peer.
    ///
    /// # Errors
    /// [`IdentityError::WrongPeer`].
    pub fn replace(&self, renewed: TlsIdentity) -> Result<(), IdentityError> {
        let current = self.current();
        if renewed.identity != current.identity {
            let expected = current.identity.uri();
            return Err(IdentityError::WrongPeer { found: renewed.identity, expected });
        }
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(renewed);
        Ok(())
    }
}

impl ResolvesServerCert for LiveIdentity {
    fn resolve(&self, _client_hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current().certified.clone())
    }
}

impl ResolvesClientCert for LiveIdentity {
    fn resolve(
        &self,
        _root_hint_subjects: &[&[u8]],
        _schemes: &[SignatureScheme],
    ) -> Option<Arc<CertifiedKey>> {
        Some(self.current().certified.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn ids_are_read_strictly() {
        let good = PeerIdentity::from_uri("spiffe://lab.example/host/host-a").unwrap();
        assert_eq!(
            (good.role, good.name.as_str(), good.trust_domain.as_str()),
            (Role::Host, "host-a", "lab.example")
        );
        assert_eq!(good.uri(), "spiffe://lab.example/host/host-a");
        assert_eq!(good.expect_host().unwrap().host.as_str(), "host-a");
        assert!(matches!(good.expect_manager(), Err(IdentityError::WrongPeer { .. })));
        for bad in [
            "",
            "spiffe://lab/host",
            "spiffe://lab/host/",
            "spiffe://lab/host/a/b",
            "spiffe://lab/host/a/",
            "spiffe://lab//host/a",
            "spiffe:///host/a",
            "SPIFFE://lab/host/a",
            "spiffe://LAB/host/a",
            "spiffe://lab/Host/a",
            "spiffe://lab/guest/a",
            "spiffe://lab/host/A",
            "spiffe://lab/host/a?x=1",
            "spiffe://lab/host/a#x",
            "spiffe://user@lab/host/a",
            "spiffe://lab:8080/host/a",
            "https://lab/host/a",
            " spiffe://lab/host/a",
        ] {
            assert!(PeerIdentity::from_uri(bad).is_err(), "{bad}");
        }
    }
}
