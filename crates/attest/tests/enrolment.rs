//! Enrolment with a real software TPM: which keys are let in, who can open a credential, and that others
//! agree.
#![allow(clippy::unwrap_used)]

mod support;

use std::fs;
use std::path::Path;
use std::process::Command;

use attest::enrol::{Application, Candidate, EkRule, EnrolRefusal, VendorRoots, make_credential};
use attest::testkit::{Forge, KeyShape, Swtpm};
use attest::tpm::{EkKind, Options, Tpm};
use attest::verify::appraise;
use attest::{Bounded, Evidence, Public};
use base64::Engine as _;
use support::{NOW, Platform, binding, codes, enrol, ready};

fn application(tpm: &mut Tpm, ak: &Public) -> Application {
    Application { ek: tpm.ek().unwrap(), ek_certificate: None, intermediates: Vec::new(), ak: ak.clone() }
}

#[test]
fn only_the_endorsement_key_of_the_record_is_let_in() {
    if !ready(&[]) {
        return;
    }
    let (swtpm, other) = (Swtpm::start().unwrap(), Swtpm::start().unwrap());
    let (mut tpm, mut stranger) = (swtpm.tpm().unwrap(), other.tpm().unwrap());
    let ak = tpm.load_key(KeyShape::Usual).unwrap();
    let rule = EkRule::Name(tpm.ek().unwrap().name());
    let mine = application(&mut tpm, ak.public());
    assert!(Candidate::check(mine.clone(), &rule, NOW).is_ok());
    let theirs = Application { ek: stranger.ek().unwrap(), ..mine };
    let refusal = Candidate::check(theirs.clone(), &rule, NOW).unwrap_err();
    assert!(matches!(refusal, EnrolRefusal::OtherEk { found, .. } if found == theirs.ek.name()), "{refusal}");
    // A key that is no endorsement key, though the record names it.
    let no_ek = Application { ek: ak.public().clone(), ..theirs };
    let rule = EkRule::Name(no_ek.ek.name());
    assert!(matches!(Candidate::check(no_ek, &rule, NOW), Err(EnrolRefusal::EkUnfit(_))));
}

#[test]
fn keys_that_could_lie_or_leave_are_not_let_in() {
    if !ready(&[]) {
        return;
    }
    let swtpm = Swtpm::start().unwrap();
    let mut tpm = swtpm.tpm().unwrap();
    let rule = EkRule::Name(tpm.ek().unwrap().name());
    for (shape, fit) in [
        (KeyShape::Usual, true),
        (KeyShape::RsaSsa, true),
        (KeyShape::RsaPss, true),
        (KeyShape::Unrestricted, false),
        (KeyShape::NotFixed, false),
    ] {
        let ak = tpm.load_key(shape).unwrap();
        let outcome = Candidate::check(application(&mut tpm, ak.public()), &rule, NOW);
        assert_eq!(outcome.is_ok(), fit, "{shape:?}");
        assert!(fit || matches!(outcome, Err(EnrolRefusal::AkUnfit(_))));
        tpm.unload_ak(ak).unwrap();
    }
}

#[test]
fn a_credential_opens_in_its_tpm_for_its_key_and_nowhere_else() {
    if !ready(&[]) {
        return;
    }
    for kind in [EkKind::Rsa2048, EkKind::P256] {
        let (swtpm, other) = (Swtpm::start().unwrap(), Swtpm::start().unwrap());
        let open =
            |swtpm: &Swtpm| Tpm::open(swtpm.address(), Options { ek: kind, ..Options::default() }).unwrap();
        let (mut tpm, mut stranger) = (open(&swtpm), open(&other));
        let ak = tpm.load_key(KeyShape::Usual).unwrap();
        let enrolled = enrol(&mut tpm, &ak);
        assert_eq!((enrolled.ek_name(), enrolled.ak()), (tpm.ek().unwrap().name(), ak.public()));
        let rule = EkRule::Name(enrolled.ek_name());
        let begin = |tpm: &mut Tpm| {
            Candidate::check(application(tpm, ak.public()), &rule, NOW).unwrap().challenge().unwrap()
        };
        let (challenge, pending) = begin(&mut tpm);
        // Another TPM; another key of the same TPM.
        let theirs = stranger.load_key(KeyShape::Usual).unwrap();
        let elsewhere = stranger.activate_credential(&theirs, &challenge);
        assert!(elsewhere.unwrap_err().code().is_some(), "{kind:?}");
        let another = tpm.load_key(KeyShape::Usual).unwrap();
        let by_another = tpm.activate_credential(&another, &challenge);
        assert!(by_another.unwrap_err().code().is_some(), "{kind:?}");
        tpm.unload_ak(another).unwrap();
        // The answer to another challenge; a guess; nothing.
        let (second, _) = begin(&mut tpm);
        let stale = tpm.activate_credential(&ak, &second).unwrap();
        assert!(matches!(pending.confirm(&stale), Err(EnrolRefusal::WrongAnswer)));
        for guess in [&[][..], &[0; 31], &[0; 32], &[0; 33]] {
            let (_, pending) = begin(&mut tpm);
            assert!(matches!(pending.confirm(guess), Err(EnrolRefusal::WrongAnswer)));
        }
    }
}

#[test]
fn a_persistent_endorsement_key_and_its_certificate_are_used() {
    if !ready(&["swtpm_setup", "certtool"]) {
        return;
    }
    let vendor = Vendor::new();
    let swtpm = vendor.manufacture();
    let mut tpm = swtpm.tpm().unwrap();
    let ak = tpm.load_key(KeyShape::Usual).unwrap();
    let enrolled = enrol(&mut tpm, &ak);
    let certificate = Bounded::new(tpm.ek_certificate().unwrap().unwrap()).unwrap();
    let mut asked = application(&mut tpm, ak.public());
    (asked.ek_certificate, asked.intermediates) = (Some(certificate), vec![vendor.issuer()]);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let rule = EkRule::VendorRoots(VendorRoots::try_from(vec![vendor.root()]).unwrap());
    let (challenge, pending) = Candidate::check(asked.clone(), &rule, now).unwrap().challenge().unwrap();
    let answer = tpm.activate_credential(&ak, &challenge).unwrap();
    assert_eq!(pending.confirm(&answer).unwrap(), enrolled);
    // Below the persistent key the signer has the same qualified name.
    let question = binding("host-a", 1);
    let asked_for = support::selection(&support::PCRS);
    let evidence = tpm.evidence(&ak, &asked_for, &question.qualifying_data(), None).unwrap();
    let expected = attest::verify::Expectation {
        enrolled: &enrolled,
        reference: &attest::ReferenceValues::recorded(&evidence.pcrs, None).unwrap(),
        binding: &question,
        last_seen: attest::verify::LastSeen::Never,
        now_unix_s: now,
    };
    assert_eq!(codes(&appraise(&expected, &evidence)), Vec::<&str>::new());

    let refused = |application: Application, rule: &EkRule, now| {
        Candidate::check(application, rule, now).unwrap_err().to_string()
    };
    let other = Vendor::new();
    let their_rule = EkRule::VendorRoots(VendorRoots::try_from(vec![other.root()]).unwrap());
    let text = refused(asked.clone(), &their_rule, now);
    assert!(text.contains("no valid chain"), "another vendor's root: {text}");
    let text = refused(Application { intermediates: Vec::new(), ..asked.clone() }, &rule, now);
    assert!(text.contains("no valid chain"), "{text}");
    let text = refused(Application { ek_certificate: None, ..asked.clone() }, &rule, now);
    assert!(text.contains("sent none"), "{text}");
    let text = refused(asked.clone(), &rule, 1_000_000_000);
    assert!(text.contains("NotValidYet"), "{text}");
    let plain = Swtpm::start().unwrap();
    let another_ek = plain.tpm().unwrap().ek().unwrap();
    let text = refused(Application { ek: another_ek, ..asked.clone() }, &rule, now);
    assert!(text.contains("another key"), "{text}");
    let junk = Some(Bounded::new(vec![0x30; 64]).unwrap());
    let text = refused(Application { ek_certificate: junk, ..asked.clone() }, &rule, now);
    assert!(text.contains("can't be read"), "{text}");
    let text = refused(Application { intermediates: vec![vendor.issuer(); 5], ..asked }, &rule, now);
    assert!(text.contains("5 intermediate"), "{text}");
    // A TPM without certificate says so.
    drop(tpm);
    assert_eq!(plain.tpm().unwrap().ek_certificate().unwrap(), None);
}

/// A TPM vendor with a CA of its own, as `swtpm_localca` plays it.
struct Vendor(tempfile::TempDir);

impl Vendor {
    fn new() -> Self {
        let vendor = Self(tempfile::tempdir().unwrap());
        let at = vendor.0.path().display();
        let ca = format!(
            "statedir = {at}\nsigningkey = {at}/signkey.pem\nissuercert = {at}/issuercert.pem\n\
             certserial = {at}/certserial\n"
        );
        let options = "--platform-manufacturer Lab\n--platform-version 1\n--platform-model Test\n";
        let setup = format!(
            "create_certs_tool = /usr/bin/swtpm_localca\ncreate_certs_tool_config = {at}/ca.conf\n\
             create_certs_tool_options = {at}/ca.options\nactive_pcr_banks = sha256\n"
        );
        for (name, text) in [("ca.conf", ca.as_str()), ("ca.options", options), ("setup.conf", &setup)] {
            fs::write(vendor.0.path().join(name), text).unwrap();
        }
        // The first TPM makes the CA.
        vendor.manufacture();
        vendor
    }

    fn manufacture(&self) -> Swtpm {
        let config = self.0.path().join("setup.conf");
        Swtpm::with_state(|state| {
            let mut setup = Command::new("swtpm_setup");
            setup.args(["--tpm2", "--create-ek-cert", "--tpmstate"]).arg(state).arg("--config").arg(&config);
            let output = setup.output()?;
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
            Ok(())
        })
        .unwrap()
    }

    fn issuer(&self) -> Bounded<4096> {
        self.certificate("issuercert.pem")
    }

    fn root(&self) -> Bounded<4096> {
        self.certificate("swtpm-localca-rootca-cert.pem")
    }

    fn certificate(&self, name: &str) -> Bounded<4096> {
        let pem = fs::read_to_string(self.0.path().join(name)).unwrap();
        let begin = pem.find("-----BEGIN CERTIFICATE-----").unwrap();
        let body = pem[begin..].lines().skip(1).take_while(|line| !line.starts_with("-----"));
        let der = base64::engine::general_purpose::STANDARD.decode(body.collect::<String>()).unwrap();
        Bounded::new(der).unwrap()
    }
}

/// `tpm2-tools` on a swtpm.
struct Tools<'a>(&'a Swtpm);

impl Tools<'_> {
    fn run(&self, tool: &str, arguments: &str) {
        let words = arguments.split_whitespace();
        let mut command = Command::new(tool);
        command.args(words).current_dir(self.0.folder()).env("TPM2TOOLS_TCTI", self.0.tcti().unwrap());
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{tool} {arguments}: {text}");
    }

    /// Between two tools: what one leaves loaded fills the TPM for the next.
    fn flush(&self) {
        self.run("tpm2_flushcontext", "--transient-object");
        self.run("tpm2_flushcontext", "--loaded-session");
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.0.folder().join(name)
    }

    /// A public area that a tool wrote as `TPM2B_PUBLIC`.
    fn public(&self, name: &str) -> Public {
        Public::parse(&fs::read(self.path(name)).unwrap()[2..]).unwrap()
    }
}

const TOOLS: [&str; 3] = ["tpm2_createek", "tpm2_activatecredential", "tpm2_checkquote"];

#[test]
fn the_tools_of_others_open_our_credential_and_we_open_theirs() {
    if !ready(&TOOLS) {
        return;
    }
    let swtpm = Swtpm::start_tcp().unwrap();
    let tools = Tools(&swtpm);
    tools.run("tpm2_createek", "-c ek.ctx -G rsa -u ek.pub");
    tools.run("tpm2_createak", "-C ek.ctx -c ak.ctx -G ecc -g sha256 -s ecdsa -u ak.pub -n ak.name");
    tools.flush();
    let (ek, ak) = (tools.public("ek.pub"), tools.public("ak.pub"));
    assert_eq!(ek, swtpm.tpm().unwrap().ek().unwrap(), "the same template gives the same key");
    assert_eq!(fs::read(tools.path("ak.name")).unwrap(), ak.name().as_bytes());

    let secret = *b"thirty-two bytes of our own make";
    let challenge = make_credential(&ek, &ak.name(), &secret).unwrap();
    fs::write(tools.path("ours"), credential_file(&challenge)).unwrap();
    tools.run("tpm2_startauthsession", "--policy-session -S session.ctx");
    tools.run("tpm2_policysecret", "-S session.ctx -c e");
    tools.run("tpm2_activatecredential", "-c ak.ctx -C ek.ctx -i ours -o opened -P session:session.ctx");
    assert_eq!(fs::read(tools.path("opened")).unwrap(), secret);
    tools.flush();

    let mut tpm = swtpm.tpm().unwrap();
    let own = tpm.load_key(KeyShape::Usual).unwrap();
    fs::write(tools.path("secret"), secret).unwrap();
    let name = own.public().name();
    Tools(&swtpm).run("tpm2_makecredential", &format!("-T none -u ek.pub -s secret -n {name} -o theirs"));
    let theirs = fs::read(tools.path("theirs")).unwrap();
    let challenge = challenge_of_file(&theirs);
    assert_eq!(*tpm.activate_credential(&own, &challenge).unwrap(), secret);
}

/// The file of `tpm2_makecredential`: a magic number, a version, then both structures with their lengths.
fn credential_file(challenge: &attest::enrol::Challenge) -> Vec<u8> {
    let mut file = vec![0xba, 0xdc, 0xc0, 0xde, 0, 0, 0, 1];
    for part in [challenge.id_object.as_slice(), challenge.encrypted_secret.as_slice()] {
        file.extend(u16::try_from(part.len()).unwrap().to_be_bytes());
        file.extend(part);
    }
    file
}

fn challenge_of_file(file: &[u8]) -> attest::enrol::Challenge {
    let length = |at: usize| usize::from(u16::from_be_bytes([file[at], file[at + 1]]));
    let id_object = &file[10..10 + length(8)];
    let secret = 10 + id_object.len();
    let encrypted_secret = &file[secret + 2..secret + 2 + length(secret)];
    attest::enrol::Challenge {
        id_object: Bounded::new(id_object.to_vec()).unwrap(),
        encrypted_secret: Bounded::new(encrypted_secret.to_vec()).unwrap(),
    }
}

#[test]
fn we_trust_a_quote_of_others_and_they_check_ours() {
    if !ready(&TOOLS) {
        return;
    }
    let swtpm = Swtpm::start_tcp().unwrap();
    let tools = Tools(&swtpm);
    let question = binding("host-a", 7);
    let nonce = question.qualifying_data().to_string();
    tools.run("tpm2_createek", "-c ek.ctx -G rsa -u ek.pub");
    tools.run("tpm2_createak", "-C ek.ctx -c ak.ctx -G ecc -g sha256 -s ecdsa -u ak.pub -n ak.name");
    tools.flush();
    tools.run("tpm2_pcrextend", &format!("4:sha256={}", "ab".repeat(32)));
    tools.run(
        "tpm2_quote",
        &format!("-c ak.ctx -l sha256:0,4,7,14 -q {nonce} -m theirs.msg -s theirs.sig -g sha256"),
    );
    tools.flush();

    // Theirs, appraised by us.
    let mut tpm = swtpm.tpm().unwrap();
    let ak = tools.public("ak.pub");
    let record = serde_json::json!({"ek_name": tools.public("ek.pub").name(), "ak": ak});
    let pcrs = tpm.pcr_read(&support::selection(&support::PCRS)).unwrap();
    let read = |name: &str| fs::read(tools.path(name)).unwrap();
    let evidence = Evidence {
        attest: Bounded::new(read("theirs.msg")).unwrap(),
        signature: Bounded::new(read("theirs.sig")).unwrap(),
        ak_public: Bounded::new(ak.as_bytes().to_vec()).unwrap(),
        pcrs: pcrs.clone(),
        event_log: None,
    };
    let expected = attest::verify::Expectation {
        enrolled: &serde_json::from_value(record).unwrap(),
        reference: &attest::ReferenceValues::recorded(&pcrs, None).unwrap(),
        binding: &question,
        last_seen: attest::verify::LastSeen::Never,
        now_unix_s: NOW,
    };
    assert_eq!(codes(&appraise(&expected, &evidence)), Vec::<&str>::new());
    drop(tpm);

    // A register that others extend between record and quote.
    tools.run("tpm2_pcrextend", &format!("7:sha256={}", "cd".repeat(32)));
    tools.run(
        "tpm2_quote",
        &format!("-c ak.ctx -l sha256:0,4,7,14 -q {nonce} -m theirs.msg -s theirs.sig -g sha256"),
    );
    tools.flush();
    let pcrs = swtpm.tpm().unwrap().pcr_read(&support::selection(&support::PCRS)).unwrap();
    let attest = Bounded::new(read("theirs.msg")).unwrap();
    let signature = Bounded::new(read("theirs.sig")).unwrap();
    let outcome = appraise(&expected, &Evidence { attest, signature, pcrs, ..evidence });
    assert_eq!(codes(&outcome), ["attest-pcr-mismatch"]);
    assert!(outcome.unwrap_err().to_string().contains("PCR 7: expected 0000"));
}

#[test]
fn a_password_of_the_endorsement_hierarchy_is_used_and_never_shown() {
    if !ready(&TOOLS) {
        return;
    }
    let swtpm = Swtpm::start_tcp().unwrap();
    Tools(&swtpm).run("tpm2_changeauth", "-c endorsement s3cret");
    let open = |password: &[u8]| {
        let endorsement_password = password.to_vec().into();
        Tpm::open(swtpm.address(), Options { endorsement_password, ..Options::default() }).unwrap()
    };
    for wrong in [&b""[..], b"secret"] {
        let fault = open(wrong).create_ak().unwrap_err();
        assert!(fault.to_string().contains("wrong password"), "{fault}");
    }
    let mut tpm = open(b"s3cret");
    let ak = tpm.load_key(KeyShape::Usual).unwrap();
    enrol(&mut tpm, &ak);
    assert!(!format!("{tpm:?}").contains("s3cret"));
}

#[test]
fn ours_is_checked_by_others() {
    if !ready(&TOOLS) {
        return;
    }
    let mut platform = Platform::new();
    let question = binding("host-a", 7);
    let evidence = platform.evidence(&question);
    let folder = platform.swtpm.folder();
    // The key as SubjectPublicKeyInfo in PEM, from its point.
    let attest::structure::Key::P256 { x, y } = platform.ak.public().key() else { panic!("an ECC key") };
    let prefix = hex::decode("3059301306072a8648ce3d020106082a8648ce3d03010703420004").unwrap();
    let spki = base64::engine::general_purpose::STANDARD.encode([&prefix[..], x, y].concat());
    let pem =
        format!("-----BEGIN PUBLIC KEY-----\n{}\n{}\n-----END PUBLIC KEY-----\n", &spki[..64], &spki[64..]);
    fs::write(folder.join("ak.pem"), pem).unwrap();
    fs::write(folder.join("msg"), evidence.attest.as_slice()).unwrap();
    fs::write(folder.join("sig"), evidence.signature.as_slice()).unwrap();
    let check = |nonce: &str| check_quote(folder, nonce);
    assert!(check(&question.qualifying_data().to_string()));
    assert!(!check(&binding("host-a", 8).qualifying_data().to_string()));
}

fn check_quote(folder: &Path, nonce: &str) -> bool {
    let mut check = Command::new("tpm2_checkquote");
    check.args(["-u", "ak.pem", "-m", "msg", "-s", "sig", "-g", "sha256", "-q", nonce]).current_dir(folder);
    check.output().unwrap().status.success()
}
