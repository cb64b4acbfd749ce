#![allow(clippy::unwrap_used)]
use rcgen::PKCS_ECDSA_P384_SHA384;
use tempfile::TempDir;

use super::*;
use crate::identity::TlsIdentity;

fn domain() -> TrustDomain {
    "lab".parse().unwrap()
}

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn load(folder: &TempDir) -> Result<Ca, CaError> {
    Ca::load_or_create(folder.path(), &domain(), SystemTime::now())
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn a_ca_is_made_once_and_loaded_ever_after() {
    let folder = folder();
    let made = load(&folder).unwrap();
    let loaded = load(&folder).unwrap();
    assert_eq!(made.certificate(), loaded.certificate());
    assert_eq!(made.certificate().trust_domain(), &domain());
    assert_eq!(CaCertificate::from_pem(made.certificate().pem()).as_ref(), Ok(loaded.certificate()));
    for file in [CERTIFICATE_FILE, KEY_FILE] {
        assert_eq!(mode(&folder.path().join(file)), 0o600, "{file}");
    }
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "nothing temporary is left");
}

#[test]
fn a_crash_while_it_is_made_leaves_nothing_that_matters() {
    let folder = folder();
    let first = load(&folder).unwrap().certificate().fingerprint();
    fs::remove_file(folder.path().join(CERTIFICATE_FILE)).unwrap();
    fs::write(folder.path().join("ca.pem.new"), "half a certificate").unwrap();
    assert_ne!(load(&folder).unwrap().certificate().fingerprint(), first);
    assert!(load(&folder).is_ok());
}

#[test]
fn a_damaged_or_exposed_ca_is_refused_and_never_replaced() {
    let check = |damage: fn(&Path), expect: fn(&CaError) -> bool| {
        let folder = folder();
        load(&folder).unwrap();
        let before = fs::read(folder.path().join(CERTIFICATE_FILE)).unwrap();
        damage(folder.path());
        let error = load(&folder).err().expect("must be refused");
        assert!(expect(&error), "{error:?}");
        let after = fs::read(folder.path().join(CERTIFICATE_FILE)).unwrap();
        assert!(after == before || after == b"garbage");
    };
    let damaged = |error: &CaError| matches!(error, CaError::Damaged { .. });
    check(|at| fs::remove_file(at.join(KEY_FILE)).unwrap(), damaged);
    check(|at| fs::write(at.join(KEY_FILE), "garbage").unwrap(), damaged);
    check(
        |at| fs::write(at.join(KEY_FILE), IdentityKey::generate().unwrap().to_pem().as_bytes()).unwrap(),
        damaged,
    );
    check(
        |at| fs::write(at.join(CERTIFICATE_FILE), "garbage").unwrap(),
        |error| matches!(error, CaError::Certificate(_)),
    );
    check(
        |at| fs::set_permissions(at.join(KEY_FILE), fs::Permissions::from_mode(0o640)).unwrap(),
        |error| matches!(error, CaError::KeyExposed { mode: 0o640, .. }),
    );
}

#[test]
fn another_trust_domain_in_the_configuration_is_refused() {
    let folder = folder();
    load(&folder).unwrap();
    let other = Ca::load_or_create(folder.path(), &"other".parse().unwrap(), SystemTime::now());
    assert!(matches!(other, Err(CaError::OtherTrustDomain { .. })));
}

#[test]
fn a_certificate_carries_the_name_that_the_ca_s_owner_decided() {
    let folder = folder();
    let ca = load(&folder).unwrap();
    let key = IdentityKey::generate().unwrap();
    let key_pem = key.to_pem();
    // The request asks to be the manager, and a CA.
    let mut asked = CertificateParams::default();
    asked.subject_alt_names = vec![SanType::URI("spiffe://lab/manager/m1".try_into().unwrap())];
    asked.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let request = asked.serialize_request(&key.pair()).unwrap();
    let now = SystemTime::now();
    let name = "host-a".parse().unwrap();
    let issued = ca.issue(&Subject::host(&name), request.der(), now).unwrap();
    let identity = TlsIdentity::from_pem(&issued.chain_pem, &key_pem).unwrap();
    assert_eq!(identity.identity().uri(), "spiffe://lab/host/host-a");
    let chain = chain_from_pem(&issued.chain_pem).unwrap();
    assert_eq!(chain.len(), 2);
    assert!(!parse_certificate(&chain[0]).unwrap().is_ca());
    assert!(!identity.needs_renewal(now));
    assert!(identity.needs_renewal(now + CERTIFICATE_LIFETIME / 2));
    // Another key than the certificate's is noticed before it is ever used.
    let other = IdentityKey::generate().unwrap().to_pem();
    assert!(matches!(TlsIdentity::from_pem(&issued.chain_pem, &other), Err(IdentityError::BadKey { .. })));
}

#[test]
fn two_certificates_for_one_key_have_two_serial_numbers() {
    let folder = folder();
    let ca = load(&folder).unwrap();
    let request = IdentityKey::generate().unwrap().signing_request().unwrap();
    let name = "host-a".parse().unwrap();
    let serial = || {
        let issued = ca.issue(&Subject::host(&name), &request, SystemTime::now()).unwrap();
        let chain = chain_from_pem(&issued.chain_pem).unwrap();
        parse_certificate(&chain[0]).unwrap().raw_serial().to_vec()
    };
    assert_ne!(serial(), serial());
}

#[test]
fn unacceptable_signing_requests_are_refused() {
    let folder = folder();
    let ca = load(&folder).unwrap();
    let name = "host-a".parse().unwrap();
    let check = |request: &[u8]| {
        let refused = ca.issue(&Subject::host(&name), request, SystemTime::now());
        assert!(matches!(refused, Err(CaError::BadRequest { .. })));
    };
    let good = IdentityKey::generate().unwrap().signing_request().unwrap();
    assert!(ca.issue(&Subject::host(&name), &good, SystemTime::now()).is_ok());
    check(&[]);
    check(&good[..good.len() - 1]);
    check(&vec![0x30; SIGNING_REQUEST_LIMIT_BYTES + 1]);
    // Another's key under one's own signature: the last byte of the signature is enough to break the proof.
    let mut forged = good.clone();
    *forged.last_mut().unwrap() ^= 1;
    check(&forged);
    let p384 = KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).unwrap();
    check(CertificateParams::default().serialize_request(&p384).unwrap().der());
}

#[test]
fn only_a_ca_s_certificate_can_be_pinned() {
    let folder = folder();
    let ca = load(&folder).unwrap();
    let key = IdentityKey::generate().unwrap();
    let name = "host-a".parse().unwrap();
    let issued = ca.issue(&Subject::host(&name), &key.signing_request().unwrap(), SystemTime::now()).unwrap();
    let leaf = issued.chain_pem.strip_suffix(ca.certificate().pem()).unwrap();
    assert!(CaCertificate::from_pem(leaf).is_err());
    assert!(CaCertificate::from_pem(&issued.chain_pem).is_err(), "two certificates");
    assert!(CaCertificate::from_pem("").is_err());
}
