//! Who may be at the other end of a TLS connection: our CA, our trust domain, the right role and name.
//!
//! The check is part of the handshake, so that a peer with a good certificate of the wrong kind is refused before
//! it can send anything. Threats: CP-01 no identity, CP-23 role confusion with a valid certificate, DP-11 bad
//! certificates.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error as TlsError, OtherError,
    PeerIncompatible, RootCertStore, SignatureScheme,
};
use types::HostName;

use crate::ca::CaCertificate;
use crate::identity::{IdentityError, PeerIdentity, Role, TrustDomain};

/// Whom we expect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Expect {
    AnyManager,
    AnyHost,
    Host(HostName),
}

impl Expect {
    pub(crate) fn check(&self, found: &PeerIdentity, domain: &TrustDomain) -> Result<(), IdentityError> {
        if found.trust_domain != *domain {
            return Err(IdentityError::WrongTrustDomain { found: found.clone(), expected: domain.clone() });
        }
        let (fits, expected) = match self {
            Self::AnyManager => (found.role == Role::Manager, "a manager".to_owned()),
            Self::AnyHost => (found.role == Role::Host, "a host".to_owned()),
            Self::Host(name) => (found.role == Role::Host && found.name == *name, format!("the host {name}")),
        };
        if fits { Ok(()) } else { Err(IdentityError::WrongPeer { found: found.clone(), expected }) }
    }
}

/// What a certificate chain must end in.
#[derive(Debug)]
pub(crate) enum Anchor {
    /// A CA that we hold.
    Ca(CaCertificate),
    /// A CA of which we know only the key's fingerprint, and which the server sends.
    Fingerprint([u8; 32]),
}

impl Anchor {
    /// The CA's certificate, ours or the one among what the server sent that has the fingerprint.
    pub(crate) fn find(&self, sent: &[CertificateDer<'_>]) -> Option<CaCertificate> {
        match self {
            Self::Ca(ca) => Some(ca.clone()),
            Self::Fingerprint(fingerprint) => sent
                .iter()
                .filter_map(|der| CaCertificate::from_der(der.clone().into_owned()).ok())
                .find(|ca| ca.fingerprint() == *fingerprint),
        }
    }
}

/// Verifies a server by chain, role and name; names of the network play no part.
#[derive(Debug)]
pub(crate) struct ServerVerifier {
    anchor: Anchor,
    expect: Expect,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerVerifier {
    pub(crate) fn new(anchor: Anchor, expect: Expect, provider: &CryptoProvider) -> Arc<Self> {
        Arc::new(Self { anchor, expect, algorithms: provider.signature_verification_algorithms })
    }
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        let unknown = TlsError::InvalidCertificate(CertificateError::UnknownIssuer);
        let ca = self.anchor.find(intermediates).ok_or(unknown)?;
        let certificate = ParsedCertificate::try_from(end_entity)?;
        let roots = roots(&ca)?;
        verify_server_cert_signed_by_trust_anchor(
            &certificate,
            &roots,
            intermediates,
            now,
            self.algorithms.all,
        )?;
        check_identity(end_entity, &self.expect, ca.trust_domain())?;
        Ok(ServerCertVerified::assertion())
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
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Verifies a client by chain, role and name.
#[derive(Debug)]
pub(crate) struct ClientVerifier {
    chain: Arc<dyn ClientCertVerifier>,
    expect: Expect,
    domain: TrustDomain,
    mandatory: bool,
}

impl ClientVerifier {
    /// With `mandatory` off, a client may present no certificate at all (a host that joins); one that it does
    /// present must be good.
    pub(crate) fn new(
        ca: &CaCertificate,
        expect: Expect,
        mandatory: bool,
        provider: Arc<CryptoProvider>,
    ) -> Result<Arc<Self>, TlsError> {
        let chain = WebPkiClientVerifier::builder_with_provider(Arc::new(roots(ca)?), provider)
            .build()
            .map_err(|error| TlsError::General(error.to_string()))?;
        Ok(Arc::new(Self { chain, expect, domain: ca.trust_domain().clone(), mandatory }))
    }
}

impl ClientCertVerifier for ClientVerifier {
    fn client_auth_mandatory(&self) -> bool {
        self.mandatory
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, TlsError> {
        let verified = self.chain.verify_client_cert(end_entity, intermediates, now)?;
        check_identity(end_entity, &self.expect, &self.domain)?;
        Ok(verified)
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
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

fn roots(ca: &CaCertificate) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    roots.add(ca.der().clone())?;
    Ok(roots)
}

fn check_identity(leaf: &CertificateDer<'_>, expect: &Expect, domain: &TrustDomain) -> Result<(), TlsError> {
    PeerIdentity::from_certificate(leaf)
        .and_then(|found| expect.check(&found, domain))
        .map_err(|error| TlsError::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(error)))))
}

fn no_tls12() -> TlsError {
    TlsError::PeerIncompatible(PeerIncompatible::Tls12NotOfferedOrEnabled)
}
