//! A host daemon with a real TPM: it says what it is and nothing else, and takes no permit that leaves it out.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../../engine/tests/support/skip.rs"]
mod skip;
mod support;

use api::fleet::{self, to_host};
use attest::testkit::Swtpm;
use attest::verify::{Expectation, LastSeen, appraise};
use attest::{Bank, Binding, Enrolled, Evidence, PcrIndex, PcrSelection, Purpose, ReferenceValues};
use std::path::Path;
use support::Manager;
use support::host::Host;
use types::vm::VmSpec;
use types::{Digest, MigrationId, Nonce, Side, VmId};

fn ready() -> bool {
    match attest::testkit::missing().or_else(support::host::missing) {
        None => true,
        Some(reason) => {
            skip::skip(&reason);
            false
        }
    }
}

/// Not a test of its own: the daemons of the other tests run here, in processes of their own.
#[tokio::test(flavor = "multi_thread")]
async fn host_process() {
    support::host::run_child().await;
}

fn selection() -> PcrSelection {
    PcrSelection::of(Bank::Sha256, [0, 7].map(|pcr| PcrIndex::try_from(pcr).unwrap()))
}

async fn quote(
    manager: &Manager,
    host: &str,
    about: Option<(MigrationId, Side)>,
    nonce: u8,
) -> fleet::Quoted {
    let (migration, side) = about.map(|(id, side)| (id.to_string(), side.to_string())).unwrap_or_default();
    let order = fleet::Quote {
        nonce: Nonce::from_bytes([nonce; 16]).to_string(),
        migration,
        side,
        selection_json: serde_json::to_string(&selection()).unwrap(),
        event_log: false,
    };
    match manager.order(host, to_host::Body::Quote(order)).await.unwrap() {
        fleet::reply::Result::Quoted(quoted) => quoted,
        other => panic!("{other:?}"),
    }
}

/// What the manager would have in its record after the join.
async fn enrolled(swtpm: &str, evidence: &Evidence) -> Enrolled {
    let ek = outrider_host::platform::endorsement_key(swtpm.parse().unwrap()).await.unwrap();
    let ak = attest::Public::parse(evidence.ak_public.as_slice()).unwrap();
    serde_json::from_value(serde_json::json!({ "ek_name": ek, "ak": ak })).unwrap()
}

fn holds(enrolled: &Enrolled, binding: &Binding, evidence: &Evidence) -> bool {
    let reference = ReferenceValues::recorded(&evidence.pcrs, None).unwrap();
    let now_unix_s = 1_800_000_000;
    let expectation =
        Expectation { enrolled, reference: &reference, binding, last_seen: LastSeen::Never, now_unix_s };
    appraise(&expectation, evidence).is_ok()
}

async fn start(manager: &Manager, base: &Path, name: &'static str, swtpm: &Swtpm, more: &str) -> Host {
    let address = if name == "host-a" { "127.0.0.1" } else { "127.0.0.2" };
    let lines = format!("tpm = '{}'\n{more}\n", swtpm.address());
    Host::start_with(manager, base, name, address, &lines).await
}

fn spec() -> VmSpec {
    let uuid = VmId::from_bytes([5; 16]);
    let spec = serde_json::json!({ "uuid": uuid, "name": "vm", "vcpus": 1, "memory_bytes": 1 << 26, "accel": "tcg" });
    serde_json::from_value(spec).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quote_is_about_this_host_its_connection_and_its_agent() {
    if !ready() {
        return;
    }
    let base = tempfile::tempdir().unwrap();
    let manager = Manager::start(base.path()).await;
    let swtpm = Swtpm::start().unwrap();
    let mut host = start(&manager, base.path(), "host-b", &swtpm, "").await;
    let evidence = Evidence::from_bytes(&quote(&manager, "host-b", None, 1).await.evidence).unwrap();
    let again = Evidence::from_bytes(&quote(&manager, "host-b", None, 2).await.evidence).unwrap();
    assert_eq!(evidence.ak_public.as_slice(), again.ak_public.as_slice());

    let migration = MigrationId::from_bytes([3; 16]);
    let spki = manager.agent("host-b", migration, spec().uuid, Side::Target).await.unwrap();
    let about = Some((migration, Side::Target));
    let moving = Evidence::from_bytes(&quote(&manager, "host-b", about, 3).await.evidence).unwrap();
    // A side and a migration for which it has no agent.
    for (migration, side) in [(migration, Side::Source), (MigrationId::from_bytes([4; 16]), Side::Target)] {
        let order = fleet::Quote {
            nonce: Nonce::from_bytes([9; 16]).to_string(),
            migration: migration.to_string(),
            side: side.to_string(),
            selection_json: serde_json::to_string(&selection()).unwrap(),
            event_log: false,
        };
        let error = manager.order("host-b", to_host::Body::Quote(order)).await.unwrap_err();
        assert_eq!(error.code, "wrong-state", "{error:?}");
    }
    for selection_json in ["", "{}", "\"sha256:99\"", &"9".repeat(2 << 20)] {
        let nonce = Nonce::from_bytes([9; 16]).to_string();
        let selection_json = selection_json.to_owned();
        let order = fleet::Quote { nonce, selection_json, ..fleet::Quote::default() };
        let error = manager.order("host-b", to_host::Body::Quote(order)).await.unwrap_err();
        assert_eq!(error.code, "bad-request", "{error:?}");
    }
    // The same key after a restart: it is kept.
    host.kill();
    host.launch();
    manager.until("another hello", |w| (w.hellos.len() > 1).then_some(())).await;
    let later = Evidence::from_bytes(&quote(&manager, "host-b", None, 4).await.evidence).unwrap();
    assert_eq!(evidence.ak_public.as_slice(), later.ak_public.as_slice());
    let connection = manager.key_of("host-b");
    host.kill();

    let enrolled = enrolled(&swtpm.address().to_string(), &evidence).await;
    let binding = |nonce, purpose| Binding {
        nonce: Nonce::from_bytes([nonce; 16]),
        purpose,
        host: "spiffe://test.example/host/host-b".to_owned().try_into().unwrap(),
        host_spki: connection,
    };
    assert!(holds(&enrolled, &binding(1, Purpose::HostCheck), &evidence));
    assert!(holds(&enrolled, &binding(4, Purpose::HostCheck), &later));
    assert!(!holds(&enrolled, &binding(2, Purpose::HostCheck), &evidence), "another nonce");
    let mut relayed = binding(1, Purpose::HostCheck);
    relayed.host_spki = Digest::of(b"another connection");
    assert!(!holds(&enrolled, &relayed, &evidence));
    let purpose =
        |agent: &[u8]| Purpose::Migration { migration, side: Side::Target, agent_spki: Digest::of(agent) };
    assert!(holds(&enrolled, &binding(3, purpose(&spki)), &moving));
    assert!(!holds(&enrolled, &binding(3, purpose(b"another agent")), &moving));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_permit_names_the_quote_that_was_given_or_is_refused() {
    if !ready() {
        return;
    }
    let base = tempfile::tempdir().unwrap();
    let manager = Manager::start(base.path()).await;
    let (first, second) = (Swtpm::start().unwrap(), Swtpm::start().unwrap());
    let _a = start(&manager, base.path(), "host-a", &first, "").await;
    let _b = start(&manager, base.path(), "host-b", &second, "require_attested_peer = true").await;
    let spec = spec();
    let inventory = serde_json::json!({
        "machine": "pc-q35-10.0", "page_size_bytes": 4096, "hypervisor": "qemu/10.0.2",
        "ram_blocks": [{ "name": "pc.ram", "length_bytes": spec.memory_bytes }],
    });
    let inventory = serde_json::from_value(inventory).unwrap();
    let vm_agent = async |claims: &types::permit::PermitClaims| {
        let about = Some((claims.key.migration, Side::Target));
        Evidence::from_bytes(&quote(&manager, "host-b", about, 7).await.evidence).unwrap().digest()
    };
    let other = Some(Digest::of(b"the source's quote"));
    // (what the permit says of the target, given the quote; of the source; what the host says of that)
    type Says = fn(Digest) -> Option<Digest>;
    let cases: [(Says, Option<Digest>, &str); 3] = [
        (|_| None, other, "does not name the quote that this host gave"),
        (|_| Some(Digest::of(b"a made-up quote")), other, "does not name the quote that this host gave"),
        (Some, None, "the other host did not prove its platform"),
    ];
    for (n, (says, of_source, part)) in (10..).zip(cases) {
        let migration = MigrationId::from_bytes([n; 16]);
        // A key of any agent will do for the source, which is not asked.
        let agents = [
            manager.agent("host-a", migration, spec.uuid, Side::Target).await.unwrap(),
            manager.agent("host-b", migration, spec.uuid, Side::Target).await.unwrap(),
        ];
        let mut claims = manager.claims(migration, &spec, 1, ["host-a", "host-b"], &agents);
        let given = vm_agent(&claims).await;
        (claims.target.quote, claims.source.quote) = (says(given), of_source);
        let token = manager.reissue(&claims);
        let error = manager.prepare(&token, &claims, &spec, &inventory).await.unwrap_err();
        assert_eq!(error.code, "permit-refused", "{error:?}");
        assert!(error.detail.contains("wrong-quote") && error.detail.contains(part), "{error:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tpm_that_went_away_is_said_to_be_and_is_used_again_when_it_is_back() {
    if !ready() {
        return;
    }
    let base = tempfile::tempdir().unwrap();
    let manager = Manager::start(base.path()).await;
    let mut swtpm = Swtpm::start().unwrap();
    let _host = start(&manager, base.path(), "host-b", &swtpm, "").await;
    let before = Evidence::from_bytes(&quote(&manager, "host-b", None, 1).await.evidence).unwrap();
    swtpm.power_off();
    for _ in 0..2 {
        let order = fleet::Quote {
            nonce: Nonce::from_bytes([2; 16]).to_string(),
            selection_json: serde_json::to_string(&selection()).unwrap(),
            ..fleet::Quote::default()
        };
        let error = manager.order("host-b", to_host::Body::Quote(order)).await.unwrap_err();
        assert_eq!(error.code, "attestation-failed", "{error:?}");
        assert!(error.detail.contains("this host's TPM"), "{error:?}");
    }
    swtpm.power_on().unwrap();
    let after = Evidence::from_bytes(&quote(&manager, "host-b", None, 3).await.evidence).unwrap();
    assert_eq!(before.ak_public.as_slice(), after.ak_public.as_slice(), "the same key, loaded anew");
}

/// Joining makes a key; one that can't be kept is no key, and a kept one that is damaged is not replaced in silence.
#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_cannot_be_kept_or_read_stops_the_join() {
    if !ready() {
        return;
    }
    let base = tempfile::tempdir().unwrap();
    let manager = Manager::start(base.path()).await;
    let swtpm = Swtpm::start().unwrap();
    let state = base.path().join("s");
    let join = || outrider_host::JoinConfig {
        token: manager.token("host-b"),
        state_folder: state.clone(),
        manager: None,
        tpm: Some(swtpm.address().clone()),
        tpm_event_log: None,
    };
    // A folder stands where the key is to be: as little can be written there as on a full disk.
    std::fs::create_dir_all(state.join("attestation-key")).unwrap();
    let problem = outrider_host::join(&join()).await.unwrap_err();
    assert!(problem.detail.contains("attestation-key"), "{problem:?}");
    std::fs::remove_dir(state.join("attestation-key")).unwrap();
    std::fs::write(state.join("attestation-key"), b"garbage").unwrap();
    let problem = outrider_host::join(&join()).await.unwrap_err();
    assert_eq!(problem.code, types::ErrorCode::AttestationFailed);
    assert!(problem.detail.contains("damaged"), "{problem:?}");
    std::fs::remove_file(state.join("attestation-key")).unwrap();
    outrider_host::join(&join()).await.unwrap();
    let mode = std::os::unix::fs::PermissionsExt::mode(
        &std::fs::metadata(state.join("attestation-key")).unwrap().permissions(),
    );
    assert_eq!(mode & 0o777, 0o600);
}
