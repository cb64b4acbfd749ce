//! What the registry is to say after it was set back, decided from what it remembers and what every host holds. Pure.
//!
//! A VM is where a copy of it is. Two copies without an open hand-over between them are nobody's to choose from: then
//! nothing is adopted, and a person has to end one. A VM with an open hand-over belongs to that one: its rules decide.

use registry::Location;
use std::collections::{BTreeMap, BTreeSet};
use types::permit::PermitClaims;
use types::vm::{VmSpec, VmState};
use types::{Digest, Epoch, HostName, MigrationId, Name, VmId};

/// Above the highest epoch that anybody saw, so many are skipped: permits that reached nobody named some of them.
pub(crate) const EPOCH_GAP: u64 = 1_000;
/// No VM is started or moved so often; what is beyond is a lie, and would leave no room above it.
const EPOCH_MAX: u64 = 1 << 48;

/// A copy that a host says it holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Held {
    pub(crate) vm: VmId,
    pub(crate) epoch: Epoch,
    pub(crate) state: Copy,
    pub(crate) spec: Option<VmSpec>,
}

/// How a copy stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Copy {
    /// It runs, is paused, or is frozen: the guest's state is in it.
    Whole,
    /// It waits for a stream, or is being started.
    Empty,
}

/// An attempt that a host is not done with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Shown {
    pub(crate) migration: MigrationId,
    /// What the manager itself permitted; `None` when the host can't show that.
    pub(crate) permit: Option<(PermitClaims, Digest, Vec<u8>)>,
}

/// What one host said.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Report {
    pub(crate) held: Vec<Held>,
    pub(crate) epochs: BTreeMap<VmId, Epoch>,
    pub(crate) attempts: Vec<Shown>,
}

/// A VM as the registry remembers it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) name: Name,
    pub(crate) at: Option<Location>,
    pub(crate) state: VmState,
    /// Whether it was ever enrolled: one that was not stays `starting`, and the same start order enrols it.
    pub(crate) enrolled: bool,
    pub(crate) migration: Option<MigrationId>,
}

/// What is to be written about one VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Step {
    /// It is where the registry has it.
    Keep,
    /// It is elsewhere, or under another epoch.
    Adopt { at: Location, state: VmState },
    /// Nobody knew of it any more.
    Add { spec: Box<VmSpec>, at: Location },
    /// Its host does not hold it: that host confirms so when it is stopped.
    Gone { at: Location },
    /// Its host is lost, by the operator's word, and nobody else holds it.
    Unplace,
    /// A hand-over that the registry forgot is taken up again.
    TakeUp { claims: Box<PermitClaims>, permit: Digest, token: Vec<u8>, spec: Option<Box<VmSpec>> },
    /// Its open hand-over decides.
    Leave,
}

/// The whole.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) steps: BTreeMap<VmId, Step>,
    /// The first epoch that may be given out.
    pub(crate) next_epochs: BTreeMap<VmId, u64>,
    /// What a person must settle first.
    pub(crate) blocking: Vec<String>,
}

/// Makes the plan. `migrations`: those that the registry has a row of, open or closed. `hosts`: those that it knows.
pub(crate) fn plan(
    known: &BTreeMap<VmId, Known>,
    migrations: &BTreeSet<MigrationId>,
    hosts: &BTreeSet<HostName>,
    reports: &BTreeMap<HostName, Report>,
    lost: &BTreeSet<HostName>,
) -> Plan {
    let mut plan = Plan::default();
    let forgotten = forgotten_attempts(migrations, reports, &mut plan.blocking);
    let mut all: BTreeSet<VmId> = known.keys().copied().collect();
    all.extend(reports.values().flat_map(|r| r.held.iter().map(|h| h.vm)));
    all.extend(forgotten.keys().copied());
    for vm in all {
        let view = View { vm, known: known.get(&vm), reports, lost, hosts };
        raise(&view, &mut plan);
        let step = match forgotten.get(&vm) {
            Some(attempts) => view.take_up(attempts),
            None => view.settle(),
        };
        match step {
            Ok(step) => drop(plan.steps.insert(vm, step)),
            Err(why) => plan.blocking.push(why),
        }
    }
    plan
}

type Forgotten<'a> = BTreeMap<VmId, BTreeMap<MigrationId, &'a (PermitClaims, Digest, Vec<u8>)>>;

/// Open attempts of which the registry has no row, by VM.
fn forgotten_attempts<'a>(
    migrations: &BTreeSet<MigrationId>,
    reports: &'a BTreeMap<HostName, Report>,
    blocking: &mut Vec<String>,
) -> Forgotten<'a> {
    let mut forgotten = Forgotten::new();
    for (host, report) in reports {
        for shown in report.attempts.iter().filter(|shown| !migrations.contains(&shown.migration)) {
            match &shown.permit {
                Some(permit) => {
                    forgotten.entry(permit.0.key.vm).or_default().insert(shown.migration, permit);
                }
                None if shown_elsewhere(shown.migration, reports) => {}
                None => blocking.push(format!(
                    "host {host} is in the hand-over {} that the registry forgot, and can't show its permit",
                    shown.migration
                )),
            }
        }
    }
    forgotten
}

fn shown_elsewhere(migration: MigrationId, reports: &BTreeMap<HostName, Report>) -> bool {
    let shows = |r: &Report| r.attempts.iter().any(|a| a.migration == migration && a.permit.is_some());
    reports.values().any(shows)
}

fn raise(view: &View<'_>, plan: &mut Plan) {
    let mut highest = view.known.and_then(|k| k.at.as_ref()).map_or(0, |at| at.epoch.0);
    for (host, report) in view.reports {
        let held = report.held.iter().filter(|h| h.vm == view.vm).map(|h| h.epoch.0);
        let seen = report.epochs.get(&view.vm).map(|e| e.0);
        let permits = report.attempts.iter().filter_map(|a| a.permit.as_ref()).map(|p| p.0.key);
        let permitted = permits.filter(|k| k.vm == view.vm).map(|k| k.target_epoch.0.max(k.source_epoch.0));
        for epoch in held.chain(seen).chain(permitted) {
            if epoch > EPOCH_MAX {
                plan.blocking
                    .push(format!("host {host} names the epoch {epoch} of {}, which can't be", view.name()));
            } else {
                highest = highest.max(epoch);
            }
        }
    }
    plan.next_epochs.insert(view.vm, highest + EPOCH_GAP);
}

/// One VM, with all that is known of it.
struct View<'a> {
    vm: VmId,
    known: Option<&'a Known>,
    reports: &'a BTreeMap<HostName, Report>,
    lost: &'a BTreeSet<HostName>,
    hosts: &'a BTreeSet<HostName>,
}

impl View<'_> {
    fn name(&self) -> String {
        self.known.map_or_else(|| format!("VM {}", self.vm), |k| format!("VM {}", k.name))
    }

    fn whole(&self) -> Vec<(&HostName, &Held)> {
        let mut found = Vec::new();
        for (host, report) in self.reports {
            let here = report.held.iter().filter(|h| h.vm == self.vm && h.state == Copy::Whole);
            found.extend(here.map(|held| (host, held)));
        }
        found
    }

    fn spec(&self) -> Option<Box<VmSpec>> {
        let mut specs = self.reports.values().flat_map(|r| &r.held).filter(|h| h.vm == self.vm);
        specs.find_map(|h| h.spec.clone()).map(Box::new)
    }

    /// A VM of which no hand-over was forgotten.
    fn settle(&self) -> Result<Step, String> {
        if self.known.is_some_and(|k| k.migration.is_some()) {
            return Ok(Step::Leave);
        }
        let whole = self.whole();
        if let [_, _, ..] = whole[..] {
            let hosts: Vec<&str> = whole.iter().map(|(host, _)| host.as_str()).collect();
            return Err(format!(
                "{} is held by {} without a hand-over between them: end all copies but the right one on their hosts",
                self.name(),
                hosts.join(" and ")
            ));
        }
        match (whole.first(), self.known) {
            (Some((host, held)), Some(known)) => {
                let at = Location { host: (*host).clone(), epoch: held.epoch };
                if known.at.as_ref() == Some(&at) && known.state == VmState::Running {
                    return Ok(Step::Keep);
                }
                let state = if known.enrolled { VmState::Running } else { VmState::Starting };
                Ok(Step::Adopt { at, state })
            }
            (Some((host, held)), None) => {
                let at = Location { host: (*host).clone(), epoch: held.epoch };
                let spec = held.spec.clone().map(Box::new);
                let spec =
                    spec.ok_or_else(|| format!("host {host} holds {} without its spec", self.name()))?;
                Ok(Step::Add { spec, at })
            }
            (None, Some(Known { at: Some(at), .. })) if self.lost.contains(&at.host) => Ok(Step::Unplace),
            (None, Some(Known { at: Some(at), .. })) => Ok(Step::Gone { at: at.clone() }),
            (None, _) => Ok(Step::Keep),
        }
    }

    /// A VM with a hand-over that only its hosts remember.
    fn take_up(
        &self,
        attempts: &BTreeMap<MigrationId, &(PermitClaims, Digest, Vec<u8>)>,
    ) -> Result<Step, String> {
        if let Some(open) = self.known.and_then(|k| k.migration) {
            return Err(format!(
                "{} has the open migration {open}: let it end first, or resolve it",
                self.name()
            ));
        }
        let (Some((id, (claims, permit, token))), 1) = (attempts.first_key_value(), attempts.len()) else {
            let ids: Vec<String> = attempts.keys().map(ToString::to_string).collect();
            return Err(format!("{} is in several hand-overs at once: {}", self.name(), ids.join(", ")));
        };
        for host in [&claims.source.host, &claims.target.host] {
            if !self.hosts.contains(host) {
                return Err(format!(
                    "the forgotten hand-over {id} names host {host}, which is to be enrolled again"
                ));
            }
        }
        let spec = if self.known.is_none() { self.spec() } else { None };
        if self.known.is_none() && spec.is_none() {
            return Err(format!(
                "the forgotten hand-over {id} is about {}, whose spec nobody shows",
                self.name()
            ));
        }
        // A third copy is not that hand-over's.
        let stranger =
            self.whole().into_iter().find(|(h, _)| **h != claims.source.host && **h != claims.target.host);
        if let Some((host, _)) = stranger {
            return Err(format!(
                "{} is in the hand-over {id}, and host {host} holds a copy as well",
                self.name()
            ));
        }
        Ok(Step::TakeUp { claims: Box::new(claims.clone()), permit: *permit, token: token.clone(), spec })
    }
}

#[cfg(test)]
mod tests;
