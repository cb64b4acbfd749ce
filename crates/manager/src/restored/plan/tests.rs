#![allow(clippy::unwrap_used)]
use super::*;
use types::Nonce;
use types::handover::HandoverKey;
use types::permit::{HostPart, StreamFeatures};

const VM: VmId = VmId::from_bytes([1; 16]);

fn host(name: &str) -> HostName {
    name.parse().unwrap()
}

fn at(name: &str, epoch: u64) -> Location {
    Location { host: host(name), epoch: Epoch(epoch) }
}

fn known(place: Option<Location>, state: VmState) -> Known {
    Known { name: "vm".parse().unwrap(), at: place, state, enrolled: true, migration: None }
}

fn holds(name: &str, epoch: u64, state: Copy) -> (HostName, Report) {
    let held = vec![Held { vm: VM, epoch: Epoch(epoch), state, spec: None }];
    (host(name), Report { held, ..Report::default() })
}

fn claims(migration: u8) -> PermitClaims {
    let part = |name: &str| HostPart {
        host: host(name),
        agent_spki: vec![1; 44],
        daemon_key: vec![2; 32],
        quote: None,
    };
    PermitClaims {
        version: 1,
        key: HandoverKey {
            migration: MigrationId::from_bytes([migration; 16]),
            vm: VM,
            source_epoch: Epoch(6),
            target_epoch: Epoch(7),
        },
        spec_digest: Digest([0; 32]),
        source: part("a"),
        target: part("b"),
        target_journal: Nonce::from_bytes([4; 16]),
        nonce: Nonce::from_bytes([migration; 16]),
        issued_at_unix_s: 1,
        not_after_unix_s: 2,
        run_deadline_unix_s: 3,
        byte_budget: 1,
        duration_budget_ms: 1,
        downtime_budget_ms: 1,
        features: StreamFeatures::default(),
        inspection_profile: "strict".to_owned(),
        compatibility: String::new(),
    }
}

fn shows(name: &str, migration: u8, permit: bool) -> (HostName, Report) {
    let claims = claims(migration);
    let shown =
        Shown { migration: claims.key.migration, permit: permit.then(|| (claims, Digest([3; 32]), vec![5])) };
    (host(name), Report { attempts: vec![shown], ..Report::default() })
}

fn planned(known: Option<Known>, reports: &[(HostName, Report)], lost: &[&str]) -> Plan {
    let known = known.map(|k| (VM, k)).into_iter().collect();
    let hosts = ["a", "b", "c"].map(host).into();
    let lost = lost.iter().map(|l| host(l)).collect();
    plan(&known, &BTreeSet::new(), &hosts, &reports.iter().cloned().collect(), &lost)
}

/// The step, or what blocks.
fn check(known: Option<Known>, reports: &[(HostName, Report)], lost: &[&str], expect: Result<Step, &str>) {
    let plan = planned(known, reports, lost);
    match expect {
        Ok(step) => {
            assert_eq!(plan.blocking, Vec::<String>::new());
            assert_eq!(plan.steps.get(&VM), Some(&step));
        }
        Err(part) => {
            assert_eq!(plan.steps.get(&VM), None);
            assert!(
                plan.blocking.iter().any(|b| b.contains(part)),
                "{:?} says nothing of {part}",
                plan.blocking
            );
        }
    }
}

#[test]
fn a_vm_is_where_its_one_copy_is() {
    let running = || Some(known(Some(at("a", 3)), VmState::Running));
    check(running(), &[holds("a", 3, Copy::Whole)], &[], Ok(Step::Keep));
    check(
        running(),
        &[holds("b", 5, Copy::Whole)],
        &[],
        Ok(Step::Adopt { at: at("b", 5), state: VmState::Running }),
    );
    check(
        running(),
        &[holds("a", 4, Copy::Whole)],
        &[],
        Ok(Step::Adopt { at: at("a", 4), state: VmState::Running }),
    );
    check(
        Some(known(None, VmState::Defined)),
        &[holds("a", 4, Copy::Whole)],
        &[],
        Ok(Step::Adopt { at: at("a", 4), state: VmState::Running }),
    );
    let never = Known { enrolled: false, ..known(None, VmState::Defined) };
    check(
        Some(never),
        &[holds("a", 4, Copy::Whole)],
        &[],
        Ok(Step::Adopt { at: at("a", 4), state: VmState::Starting }),
    );
    check(running(), &[(host("a"), Report::default())], &[], Ok(Step::Gone { at: at("a", 3) }));
    check(running(), &[holds("b", 9, Copy::Empty)], &[], Ok(Step::Gone { at: at("a", 3) }));
    check(running(), &[(host("b"), Report::default())], &["a"], Ok(Step::Unplace));
    check(
        running(),
        &[holds("b", 5, Copy::Whole)],
        &["a"],
        Ok(Step::Adopt { at: at("b", 5), state: VmState::Running }),
    );
    check(Some(known(None, VmState::Defined)), &[], &[], Ok(Step::Keep));
    check(None, &[holds("a", 4, Copy::Whole)], &[], Err("without its spec"));
}

#[test]
fn of_two_copies_none_is_chosen() {
    let known = Some(known(Some(at("a", 3)), VmState::Running));
    let both = [holds("a", 3, Copy::Whole), holds("b", 5, Copy::Whole)];
    check(known.clone(), &both, &[], Err("held by a and b"));
    let migrating = known.map(|k| Known { migration: Some(MigrationId::from_bytes([9; 16])), ..k });
    check(migrating, &both, &[], Ok(Step::Leave));
}

#[test]
fn a_forgotten_hand_over_is_taken_up_only_where_it_is_whole_and_alone() {
    let running = || Some(known(Some(at("a", 3)), VmState::Running));
    let taken = |spec| {
        let (claims, permit, token) = (Box::new(claims(8)), Digest([3; 32]), vec![5]);
        Ok(Step::TakeUp { claims, permit, token, spec })
    };
    check(running(), &[shows("a", 8, true), shows("b", 8, true)], &[], taken(None));
    check(running(), &[shows("a", 8, false), shows("b", 8, true)], &[], taken(None));
    let plan = planned(running(), &[shows("a", 8, false)], &[]);
    assert!(plan.blocking.iter().any(|b| b.contains("can't show its permit")), "{plan:?}");
    check(running(), &[shows("a", 8, true), shows("b", 9, true)], &[], Err("several hand-overs"));
    check(None, &[shows("a", 8, true)], &[], Err("whose spec nobody shows"));
    check(running(), &[shows("a", 8, true), holds("c", 9, Copy::Whole)], &[], Err("c holds a copy as well"));
    let migrating = running().map(|k| Known { migration: Some(MigrationId::from_bytes([9; 16])), ..k });
    check(migrating, &[shows("a", 8, true)], &[], Err("open migration"));
    let hosts = [host("a")].into();
    let reports = [shows("a", 8, true)].into();
    let known = [(VM, running().unwrap())].into();
    let plan = super::plan(&known, &BTreeSet::new(), &hosts, &reports, &BTreeSet::new());
    assert!(plan.blocking.iter().any(|b| b.contains("enrolled again")), "{plan:?}");
}

#[test]
fn epochs_are_above_every_one_that_was_seen() {
    let (name, mut report) = holds("a", 3, Copy::Whole);
    report.epochs.insert(VM, Epoch(40));
    let running = Some(known(Some(at("a", 3)), VmState::Running));
    let plan = planned(running.clone(), &[(name.clone(), report.clone()), shows("b", 8, true)], &[]);
    assert_eq!(plan.next_epochs.get(&VM), Some(&(40 + EPOCH_GAP)));
    report.epochs.insert(VM, Epoch(u64::MAX));
    let plan = planned(running, &[(name, report)], &[]);
    assert!(plan.blocking.iter().any(|b| b.contains("can't be")), "{plan:?}");
    assert!(plan.next_epochs.values().all(|next| *next < 1 << 60));
}
