//! The embedded CA: one self-signed P-256 key in the manager's state folder, which signs short-lived
//! certificates for managers, hosts and operators, and nothing else.
//!
//! Names in a certificate come from the caller, who has authenticated the requester; a signing request only
//! proves possession of its key, whatever names it asks for.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use aws_lc_rs::digest::{SHA256, digest};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PKCS_ED25519,
    PublicKeyData as _, SanType, SerialNumber,
};
use rustls::pki_types::CertificateDer;
use types::Name;

use crate::identity::{
    IdentityError, IdentityKey, PeerIdentity, Role, TrustDomain, chain_from_pem, parse_certificate, uris_of,
};

/// How long hosts' and managers' certificates live: a stolen one is worth a day at most.
pub const CERTIFICATE_LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// The CA outlives the fleet's hardware; it is replaced by enrolling anew.
const CA_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// Clocks of hosts that are a little behind must not refuse a fresh certificate.
const BACKDATE: Duration = Duration::from_secs(300);
/// A P-256 request without names takes about 200 bytes.
const SIGNING_REQUEST_LIMIT_BYTES: usize = 4096;

const CERTIFICATE_FILE: &str = "ca.pem";
const KEY_FILE: &str = "ca-key.pem";

/// Why the CA can't be used, or a certificate can't be issued.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CaError {
    /// A file can't be read or written.
    #[error("cannot {operation} {}", path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// On which file.
        path: PathBuf,
        /// The system's error.
        #[source]
        source: io::Error,
    },
    /// The key is readable for others.
    #[error("{} has mode {mode:o}; the CA's key must not be open to group or others (chmod 600)", path.display())]
    KeyExposed {
        /// The key's file.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// Certificate and key don't belong together, or one is missing.
    #[error("the CA in {} is damaged: {why}; restore it from a backup", folder.display())]
    Damaged {
        /// The folder.
        folder: PathBuf,
        /// What is wrong.
        why: &'static str,
    },
    /// The CA is of another trust domain than the configuration says.
    #[error("the CA is of the trust domain {found}, the configuration says {expected}")]
    OtherTrustDomain {
        /// The CA's.
        found: TrustDomain,
        /// The configuration's.
        expected: TrustDomain,
    },
    /// The signing request is not acceptable.
    #[error("the certificate signing request is refused: {why}")]
    BadRequest {
        /// Why.
        why: &'static str,
    },
    /// The CA's certificate can't be read.
    #[error("the CA's certificate cannot be read")]
    Certificate(#[from] IdentityError),
    /// Signing failed.
    #[error("the CA could not sign")]
    NotSigned,
}

/// A CA's certificate: what hosts and operators pin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaCertificate {
    der: CertificateDer<'static>,
    pem: String,
    trust_domain: TrustDomain,
    fingerprint: [u8; 32],
}

impl CaCertificate {
    /// Reads a CA's certificate from PEM (exactly one).
    ///
    /// # Errors
    /// Why it can't serve.
    pub fn from_pem(pem: &str) -> Result<Self, IdentityError> {
        match &chain_from_pem(pem)?[..] {
            [der] => Self::from_der(der.clone()),
            _ => Err(IdentityError::NotACertificate { why: "not exactly one certificate" }),
        }
    }

    pub(crate) fn from_der(der: CertificateDer<'static>) -> Result<Self, IdentityError> {
        let certificate = parse_certificate(&der)?;
        if !certificate.is_ca() {
            return Err(IdentityError::NotACertificate { why: "not of a CA" });
        }
        let fingerprint = fingerprint_of(certificate.public_key().raw);
        let uris = uris_of(&der)?;
        let domain = match &uris[..] {
            [uri] => uri.strip_prefix("spiffe://"),
            _ => None,
        };
        let domain = domain.ok_or(IdentityError::NotACertificate { why: "it names no trust domain" })?;
        let pem = to_pem(&der);
        Ok(Self { trust_domain: domain.parse()?, pem, fingerprint, der })
    }

    /// As PEM.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// The trust domain that it vouches for.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// SHA-256 of its key (SubjectPublicKeyInfo): the same after the certificate is renewed. Join tokens carry it.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }

    pub(crate) fn der(&self) -> &CertificateDer<'static> {
        &self.der
    }
}

pub(crate) fn fingerprint_of(spki: &[u8]) -> [u8; 32] {
    digest(&SHA256, spki).as_ref().try_into().expect("SHA-256 has 32 bytes")
}

fn to_pem(der: &CertificateDer<'_>) -> String {
    let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
    for line in STANDARD.encode(der).as_bytes().chunks(64) {
        pem.push_str(str::from_utf8(line).expect("base64 is ASCII"));
        pem.push('\n');
    }
    pem.push_str("-----END CERTIFICATE-----\n");
    pem
}

/// A certificate that the CA issued.
#[derive(Debug, Clone)]
pub struct Issued {
    /// Leaf and CA in PEM: what the owner presents. The CA is in it so that a joining host, which knows only its
    /// fingerprint, can find it.
    pub chain_pem: String,
    /// The end of its validity.
    pub not_after: SystemTime,
}

/// What goes into a certificate besides the key.
#[derive(Debug, Clone)]
pub struct Subject<'a> {
    /// In which role.
    pub role: Role,
    /// By which name.
    pub name: &'a Name,
    /// Addresses by which browsers reach a manager; empty for others.
    pub addresses: &'a [IpAddr],
    /// DNS names by which browsers reach a manager; empty for others.
    pub dns_names: &'a [String],
}

impl<'a> Subject<'a> {
    /// A host.
    pub fn host(name: &'a Name) -> Self {
        Self { role: Role::Host, name, addresses: &[], dns_names: &[] }
    }

    /// A manager, reachable for operators under these addresses and names.
    pub fn manager(name: &'a Name, addresses: &'a [IpAddr], dns_names: &'a [String]) -> Self {
        Self { role: Role::Manager, name, addresses, dns_names }
    }

    /// An operator.
    pub fn operator(name: &'a Name) -> Self {
        Self { role: Role::Operator, name, addresses: &[], dns_names: &[] }
    }
}

/// The embedded CA.
pub struct Ca {
    certificate: CaCertificate,
    issuer: Issuer<'static, KeyPair>,
}

impl Ca {
    /// Loads the CA from the state folder, or makes one there when there is none.
    ///
    /// # Errors
    /// Why it can't be used. A CA that is there but damaged is never replaced.
    pub fn load_or_create(folder: &Path, domain: &TrustDomain, now: SystemTime) -> Result<Self, CaError> {
        let (certificate, key) = (folder.join(CERTIFICATE_FILE), folder.join(KEY_FILE));
        if exists(&certificate)? {
            return Self::load(folder, &certificate, &key, domain);
        }
        // A key without a certificate is what a crash in `create` leaves; nothing was ever issued under it.
        Self::create(&certificate, &key, domain, now)
    }

    fn load(folder: &Path, certificate: &Path, key: &Path, domain: &TrustDomain) -> Result<Self, CaError> {
        let damaged = |why| CaError::Damaged { folder: folder.to_owned(), why };
        if !exists(key)? {
            return Err(damaged("its key is missing"));
        }
        let mode = fs::metadata(key).map_err(file_error("look at", key))?.permissions().mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(CaError::KeyExposed { path: key.to_owned(), mode });
        }
        let read = |path: &Path| fs::read_to_string(path).map_err(file_error("read", path));
        let certificate = CaCertificate::from_pem(&read(certificate)?)?;
        let key_pem = zeroize::Zeroizing::new(read(key)?);
        let pair = IdentityKey::from_pem(&key_pem).map_err(|_| damaged("its key cannot be read"))?.pair();
        if fingerprint_of(&pair.subject_public_key_info()) != certificate.fingerprint() {
            return Err(damaged("key and certificate do not belong together"));
        }
        if certificate.trust_domain() != domain {
            let found = certificate.trust_domain().clone();
            return Err(CaError::OtherTrustDomain { found, expected: domain.clone() });
        }
        let issuer = Issuer::from_ca_cert_der(certificate.der(), pair)
            .map_err(|_| damaged("its certificate cannot issue"))?;
        Ok(Self { certificate, issuer })
    }

    fn create(
        certificate: &Path,
        key: &Path,
        domain: &TrustDomain,
        now: SystemTime,
    ) -> Result<Self, CaError> {
        let identity_key = IdentityKey::generate()?;
        let key_pem = identity_key.to_pem();
        let pair = identity_key.pair();
        let params = ca_params(domain, now)?;
        let der = params.self_signed(&pair).map_err(|_| CaError::NotSigned)?.der().clone();
        let ca = Self { certificate: CaCertificate::from_der(der)?, issuer: Issuer::new(params, pair) };
        // The certificate last: once it is there, the CA is.
        write_private(key, key_pem.as_bytes())?;
        write_private(certificate, ca.certificate.pem().as_bytes())?;
        Ok(ca)
    }

    /// Its certificate.
    pub fn certificate(&self) -> &CaCertificate {
        &self.certificate
    }

    /// Issues a certificate for [`CERTIFICATE_LIFETIME`] to the key that signed `signing_request` (DER). Renewal
    /// is the same with a new request.
    ///
    /// # Errors
    /// The request is not acceptable.
    pub fn issue(
        &self,
        subject: &Subject<'_>,
        signing_request: &[u8],
        now: SystemTime,
    ) -> Result<Issued, CaError> {
        self.issue_for(subject, signing_request, now, CERTIFICATE_LIFETIME)
    }

    /// As [`Self::issue`], for another lifetime.
    ///
    /// # Errors
    /// The request is not acceptable.
    pub fn issue_for(
        &self,
        subject: &Subject<'_>,
        signing_request: &[u8],
        now: SystemTime,
        lifetime: Duration,
    ) -> Result<Issued, CaError> {
        if signing_request.len() > SIGNING_REQUEST_LIMIT_BYTES {
            return Err(CaError::BadRequest { why: "more than 4 KiB" });
        }
        let request = CertificateSigningRequestParams::from_der(&signing_request.into())
            .map_err(|_| CaError::BadRequest { why: "not a request signed with its own key" })?;
        let algorithm = request.public_key.algorithm();
        if ![&PKCS_ECDSA_P256_SHA256, &PKCS_ED25519].contains(&algorithm) {
            return Err(CaError::BadRequest { why: "the key is neither P-256 nor Ed25519" });
        }
        let params = self.leaf_params(subject, now, lifetime)?;
        let leaf = params.signed_by(&request.public_key, &self.issuer).map_err(|_| CaError::NotSigned)?;
        let chain_pem = to_pem(leaf.der()) + self.certificate.pem();
        Ok(Issued { chain_pem, not_after: now + lifetime })
    }

    fn leaf_params(
        &self,
        subject: &Subject<'_>,
        now: SystemTime,
        lifetime: Duration,
    ) -> Result<CertificateParams, CaError> {
        let trust_domain = self.certificate.trust_domain().clone();
        let identity = PeerIdentity { trust_domain, role: subject.role, name: subject.name.clone() };
        let mut params = base_params(subject.name.as_str(), &identity.uri(), now, lifetime)?;
        params.subject_alt_names.extend(subject.addresses.iter().map(|address| SanType::IpAddress(*address)));
        for name in subject.dns_names {
            let name = name
                .as_str()
                .try_into()
                .map_err(|_| CaError::BadRequest { why: "a DNS name is not ASCII" })?;
            params.subject_alt_names.push(SanType::DnsName(name));
        }
        params.is_ca = IsCa::ExplicitNoCa;
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        // Managers never dial; operators never listen; hosts do both, towards each other.
        params.extended_key_usages = match subject.role {
            Role::Manager => vec![ExtendedKeyUsagePurpose::ServerAuth],
            Role::Host => vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth],
            Role::Operator => vec![ExtendedKeyUsagePurpose::ClientAuth],
        };
        Ok(params)
    }
}

fn ca_params(domain: &TrustDomain, now: SystemTime) -> Result<CertificateParams, CaError> {
    let mut params = base_params(&format!("Outrider CA of {domain}"), &domain.uri(), now, CA_LIFETIME)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

fn base_params(
    common_name: &str,
    uri: &str,
    now: SystemTime,
    lifetime: Duration,
) -> Result<CertificateParams, CaError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, "Outrider");
    params.distinguished_name.push(DnType::CommonName, common_name.chars().take(64).collect::<String>());
    let uri = uri.try_into().map_err(|_| CaError::BadRequest { why: "an id is not ASCII" })?;
    params.subject_alt_names = vec![SanType::URI(uri)];
    params.not_before = (now - BACKDATE).into();
    params.not_after = (now + lifetime).into();
    params.serial_number = Some(random_serial()?);
    Ok(params)
}

/// 127 random bits: by default a serial is made of the key, and a renewal would repeat it.
fn random_serial() -> Result<SerialNumber, CaError> {
    let mut serial = [0; 16];
    aws_lc_rs::rand::fill(&mut serial).map_err(|_| CaError::NotSigned)?;
    serial[0] = serial[0] & 0x7f | 0x40;
    Ok(SerialNumber::from_slice(&serial))
}

fn exists(path: &Path) -> Result<bool, CaError> {
    path.try_exists().map_err(file_error("look at", path))
}

fn file_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CaError {
    let path = path.to_owned();
    move |source| CaError::File { operation, path, source }
}

/// Writes a file of mode 0600 that is there whole or not at all, also after a power cut.
///
/// # Errors
/// [`CaError::File`].
pub fn write_private(path: &Path, content: &[u8]) -> Result<(), CaError> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    // What a crash may have left; a fresh file is sure to be ours and of the right mode.
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(file_error("remove", &temporary)(error));
        }
        _ => {}
    }
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)
        .map_err(file_error("create", &temporary))?;
    file.write_all(content).and_then(|()| file.sync_all()).map_err(file_error("write", &temporary))?;
    fs::rename(&temporary, path).map_err(file_error("put in place", path))?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(file_error("flush the folder of", path))
}

#[cfg(test)]
mod tests;
