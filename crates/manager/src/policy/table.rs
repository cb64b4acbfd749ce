//! A table of expectations about policies: who may do what, decided without a manager. It asks the same code as the
//! manager does, with hosts and VMs that the table describes.

use super::zones::{Zone, Zones};
use super::{Action, HostFacts, PlanFacts, Policy, Principal, Verdict, VmAction};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;
use types::vm::VmSpec;
use types::{ErrorCode, HostName, Name, Problem};

/// Cases of one table; more is a program, not a table.
const CASES_MAX: usize = 10_000;
const MOVE: &str = "migrate";

/// A policy of a loaded set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PolicyView {
    /// Its id: the annotation `@id`, or file and number.
    pub id: String,
    /// `permit` or `forbid`.
    pub effect: &'static str,
    /// The annotation `@reason`, which a denial quotes.
    pub reason: Option<String>,
}

/// What a table came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TableReport {
    /// Policies that were asked.
    pub policies: usize,
    /// Every case, in the table's order.
    pub cases: Vec<CaseReport>,
    /// Cases that came out otherwise than expected.
    pub failed: usize,
}

/// What one case came to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CaseReport {
    /// Its name, or its number.
    pub name: String,
    /// Who asked for what, in words.
    pub question: String,
    /// What the table expects.
    pub expected: Expect,
    /// The policy that the table expects to decide.
    pub expected_by: Option<String>,
    /// What was decided.
    pub found: Expect,
    /// Ids of the deciding policies; none when the default denied.
    pub by: Vec<String>,
    /// Why it was denied.
    pub reason: Option<String>,
    /// Whether it is as expected.
    pub passed: bool,
}

/// A decision.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Expect {
    /// Permitted.
    Allow,
    /// Denied.
    Deny,
}

impl std::fmt::Display for Expect {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
        })
    }
}

/// A table as it is written (TOML).
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Table {
    /// Hosts by name.
    #[serde(default)]
    hosts: BTreeMap<HostName, TableHost>,
    /// VMs by name.
    #[serde(default)]
    vms: BTreeMap<Name, TableVm>,
    /// Zones by name, instead of those of the set.
    #[serde(default)]
    zones: BTreeMap<String, Zone>,
    #[serde(default, rename = "case")]
    cases: Vec<Case>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct TableHost {
    #[serde(default)]
    zone: String,
    #[serde(default = "yes")]
    connected: bool,
    #[serde(default)]
    quarantined: bool,
    #[serde(default)]
    attested: bool,
}

const fn yes() -> bool {
    true
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct TableVm {
    tenant: Option<Name>,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default = "small")]
    memory_bytes: u64,
}

const fn small() -> u64 {
    1 << 30
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Case {
    name: Option<String>,
    /// Who asks; `somebody` when absent.
    principal: Option<String>,
    role: String,
    /// Tenants of the token.
    tenants: Option<Vec<String>>,
    /// Id of a plan of maintenance that covers the move.
    plan: Option<String>,
    action: String,
    vm: Option<Name>,
    source: Option<HostName>,
    target: Option<HostName>,
    expect: Expect,
    /// The policy that has to be among those that decide.
    by: Option<String>,
}

/// The policies of a folder (the built-in ones without), in the order of their ids.
///
/// # Errors
/// `bad-configuration`, naming the file and what is wrong with it.
pub fn check(folder: Option<&Path>) -> Result<Vec<PolicyView>, Problem> {
    Ok(load(folder)?.list())
}

/// Asks every case of a table.
///
/// # Errors
/// `bad-configuration` for policies that can't be used, `bad-request` for a case that asks nothing.
pub fn test(folder: Option<&Path>, table: &Table) -> Result<TableReport, Problem> {
    run(&load(folder)?, table)
}

/// The same of a loaded set.
pub(crate) fn run(policy: &Policy, table: &Table) -> Result<TableReport, Problem> {
    if table.cases.is_empty() || table.cases.len() > CASES_MAX {
        let text = format!("a table has 1 to {CASES_MAX} [[case]]s, this one has {}", table.cases.len());
        return Err(Problem::new(ErrorCode::BadRequest, text));
    }
    let instead = match Zones::new(table.zones.clone()) {
        zones if zones.is_empty() => None,
        zones => Some(policy.with_zones(zones)?),
    };
    let policy = instead.as_ref().unwrap_or(policy);
    let cases = table.cases.iter().enumerate().map(|(n, case)| asked(policy, table, n, case));
    let cases = cases.collect::<Result<Vec<_>, _>>()?;
    let failed = cases.iter().filter(|case| !case.passed).count();
    Ok(TableReport { policies: policy.list().len(), cases, failed })
}

fn load(folder: Option<&Path>) -> Result<Policy, Problem> {
    folder.map_or_else(Policy::built_in, Policy::from_folder)
}

fn asked(policy: &Policy, table: &Table, n: usize, case: &Case) -> Result<CaseReport, Problem> {
    let name = case.name.clone().unwrap_or_else(|| format!("case {}", n + 1));
    let bad = |text: String| Problem::new(ErrorCode::BadRequest, format!("{name}: {text}"));
    let who = Principal {
        name: case.principal.clone().unwrap_or_else(|| "somebody".to_owned()),
        role: case.role.clone(),
        tenants: case.tenants.clone(),
    };
    if case.plan.is_some() && case.action != MOVE {
        return Err(bad(format!("a plan covers moves, not {}", case.action)));
    }
    let mut question = format!("{} ({}): {}", who.name, who.role, case.action);
    let verdict = if case.action == MOVE {
        let (Some(vm), Some(source), Some(target)) = (&case.vm, &case.source, &case.target) else {
            return Err(bad("a case of \"migrate\" needs vm, source and target".to_owned()));
        };
        question.push_str(&format!(" {vm} from {source} to {target}"));
        let facts = |host: &HostName| table.facts(host).map_err(&bad);
        let plan = case.plan.clone().map(|id| PlanFacts { id, created_by: "somebody".to_owned() });
        let hosts = (&facts(source)?, &facts(target)?);
        policy.verdict_of_move(&who, &table.vm(vm).map_err(&bad)?, hosts, plan.as_ref())?
    } else if let Some(action) = VmAction::named(&case.action) {
        let (Some(vm), None, None) = (&case.vm, &case.source, &case.target) else {
            return Err(bad(format!("a case of {:?} needs a vm, and no hosts", case.action)));
        };
        question.push_str(&format!(" {vm}"));
        policy.verdict_of_vm(&who, action, &table.vm(vm).map_err(&bad)?)?
    } else {
        let action = Action::named(&case.action).ok_or_else(|| {
            bad(format!(
                "no action is named {:?}; there are {MOVE}, view-vm, use-vm, {}",
                case.action,
                Action::names()
            ))
        })?;
        if case.vm.is_some() || case.source.is_some() || case.target.is_some() {
            return Err(bad(format!("{} is asked of the fleet: without vm, source and target", case.action)));
        }
        policy.verdict_of_fleet(&who, action)?
    };
    Ok(reported(name, question, case, verdict))
}

fn reported(name: String, question: String, case: &Case, verdict: Verdict) -> CaseReport {
    let found = if verdict.allow { Expect::Allow } else { Expect::Deny };
    let as_named = case.by.as_ref().is_none_or(|id| verdict.by.contains(id));
    CaseReport {
        name,
        question,
        expected: case.expect,
        expected_by: case.by.clone(),
        found,
        passed: found == case.expect && as_named,
        by: verdict.by,
        reason: verdict.reason,
    }
}

impl Table {
    fn facts(&self, name: &HostName) -> Result<HostFacts, String> {
        let host = self.hosts.get(name).ok_or_else(|| format!("the table has no [hosts.{name}]"))?;
        Ok(HostFacts {
            name: name.clone(),
            zone: host.zone.clone(),
            connected: host.connected,
            quarantined: host.quarantined,
            attested: host.attested,
        })
    }

    fn vm(&self, name: &Name) -> Result<VmSpec, String> {
        let vm = self.vms.get(name).ok_or_else(|| format!("the table has no [vms.{name}]"))?;
        let mut spec = serde_json::json!({
            "uuid": types::VmId::from_bytes([0; 16]), "name": name, "vcpus": 1, "labels": vm.labels,
            "memory_bytes": vm.memory_bytes,
        });
        if let (Some(tenant), Some(spec)) = (&vm.tenant, spec.as_object_mut()) {
            spec.insert("tenant".to_owned(), serde_json::json!(tenant));
        }
        serde_json::from_value(spec).map_err(|e| format!("[vms.{name}]: {e}"))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const WORLD: &str = "[hosts.a]\nzone = 'x'\n[hosts.b]\nzone = 'x'\n[hosts.c]\nzone = 'y'\n\
        [hosts.q]\nzone = 'x'\nquarantined = true\n[vms.web]\n";

    fn run(cases: &str) -> Result<TableReport, Problem> {
        test(None, &toml::from_str(&format!("{WORLD}{cases}")).unwrap())
    }

    fn one(lines: &str) -> CaseReport {
        run(&format!("[[case]]\n{lines}\n")).unwrap().cases.remove(0)
    }

    fn of_move(role: &str, target: &str, rest: &str) -> CaseReport {
        let asked = "action = 'migrate'\nvm = 'web'\nsource = 'a'";
        one(&format!("role = '{role}'\ntenants = ['all']\n{asked}\ntarget = '{target}'\n{rest}"))
    }

    #[test]
    fn a_case_says_what_was_decided_by_what_and_whether_that_was_expected() {
        let allowed = of_move("operator", "b", "expect = 'allow'\nby = 'migrate-for-operators'");
        assert!(allowed.passed && allowed.by == ["migrate-for-operators"], "{allowed:?}");
        assert_eq!(allowed.question, "somebody (operator): migrate web from a to b");
        let other = of_move("operator", "b", "expect = 'allow'\nby = 'enrol-for-admins'");
        assert!(!other.passed && other.found == Expect::Allow, "{other:?}");
        let zones = of_move("operator", "c", "expect = 'deny'\nby = 'zones-are-left-by-admins-only'");
        assert!(zones.passed && zones.reason.unwrap().contains("only an admin"));
        let default = of_move("viewer", "b", "expect = 'allow'");
        assert!(!default.passed && default.by.is_empty(), "{default:?}");
        assert!(default.reason.unwrap().contains("denial is the default"));
        assert!(of_move("admin", "q", "expect = 'deny'\nby = 'no-migration-to-quarantine'").passed);
        assert!(one("role = 'auditor'\naction = 'audit'\nexpect = 'allow'").passed);
        assert!(one("role = 'operator'\naction = 'add-host'\nexpect = 'deny'").passed);
        let report = run("[[case]]\nrole = 'viewer'\naction = 'view'\nexpect = 'allow'\n\
            [[case]]\nname = 'n'\nrole = 'viewer'\naction = 'audit'\nexpect = 'allow'\n");
        let report = report.unwrap();
        let names: Vec<_> = report.cases.iter().map(|case| case.name.as_str()).collect();
        assert_eq!((names, report.failed), (vec!["case 1", "n"], 1));
    }

    #[test]
    fn what_asks_nothing_is_an_error_and_never_a_pass() {
        for (case, part) in [
            ("role = 'admin'\naction = 'fly'\nexpect = 'deny'", "case 1: no action is named \"fly\""),
            (
                "role = 'admin'\naction = 'migrate'\nvm = 'web'\nexpect = 'deny'",
                "needs vm, source and target",
            ),
            ("role = 'admin'\naction = 'view'\nvm = 'web'\nexpect = 'deny'", "asked of the fleet"),
            (
                "name = 'x'\nrole = 'admin'\naction = 'migrate'\nvm = 'web'\nsource = 'a'\ntarget = 'z'\nexpect = 'deny'",
                "x: the table has no [hosts.z]",
            ),
            (
                "role = 'admin'\naction = 'migrate'\nvm = 'v'\nsource = 'a'\ntarget = 'b'\nexpect = 'deny'",
                "no [vms.v]",
            ),
        ] {
            let problem = run(&format!("[[case]]\n{case}\n")).unwrap_err();
            assert_eq!(problem.code, ErrorCode::BadRequest);
            assert!(problem.detail.contains(part), "{}", problem.detail);
        }
        assert!(run("").unwrap_err().detail.contains("this one has 0"));
        for text in
            ["[[case]]\nrole='admin'\naction='view'", "[[case]]\nrole='a'\naction='b'\nexpect='perhaps'"]
        {
            assert!(toml::from_str::<Table>(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_table_that_is_shipped_agrees_with_the_built_in_policies() {
        let table = include_str!("../../../../packaging/policy-expectations.toml");
        let report = test(None, &toml::from_str(table).unwrap()).unwrap();
        let failed: Vec<_> = report.cases.iter().filter(|case| !case.passed).collect();
        assert!(failed.is_empty() && report.cases.len() >= 9, "{failed:?}");
    }

    #[test]
    fn tenants_sensitivity_and_plans_decide_by_name() {
        let world = "[hosts.a]\nzone = 'x'\n[hosts.b]\nzone = 'x'\n[hosts.c]\nzone = 'y'\n[hosts.d]\nzone = 'z'\n\
            [zones.x]\nallowed_sensitivity = ['public']\n[zones.z]\ntenants = ['bank']\nallowed_sensitivity = ['public']\n\
            [vms.web]\ntenant = 'shop'\n[vms.ledger]\ntenant = 'shop'\nlabels = { sensitivity = 'secret' }\n\
            [vms.site]\ntenant = 'shop'\nlabels = { sensitivity = 'public' }\n";
        let check = |case: &str, expect: Expect, by: &str| {
            let text = format!("{world}[[case]]\n{case}\nexpect = 'allow'\n");
            let report = test(None, &toml::from_str(&text).unwrap()).unwrap().cases.remove(0);
            assert_eq!(
                (report.found, report.by.join(" ")),
                (expect, by.to_owned()),
                "{case}: {:?}",
                report.reason
            );
        };
        let of = |who: &str, vm: &str, target: &str| {
            format!("{who}\naction = 'migrate'\nvm = '{vm}'\nsource = 'a'\ntarget = '{target}'")
        };
        let shop = "role = 'operator'\ntenants = ['shop']";
        let (allowed, tenants) = ("migrate-for-operators", "tokens-are-for-their-tenants");
        check(&of(shop, "web", "b"), Expect::Allow, allowed);
        check(&of("role = 'operator'\ntenants = ['bank']", "web", "b"), Expect::Deny, tenants);
        check(&of("role = 'admin'\ntenants = ['bank']", "web", "b"), Expect::Deny, tenants);
        check(&of("role = 'operator'\ntenants = []", "web", "b"), Expect::Deny, tenants);
        check(&of("role = 'operator'", "web", "b"), Expect::Deny, "tokens-name-their-tenants");
        check(&of("role = 'admin'", "web", "b"), Expect::Allow, allowed);
        check(&of(shop, "site", "b"), Expect::Allow, allowed);
        check(&of(shop, "ledger", "b"), Expect::Deny, "sensitive-vms-go-where-they-are-allowed");
        let unsaid = "sensitive-vms-need-a-zone-that-says-what-it-allows";
        check(&of("role = 'admin'", "site", "c"), Expect::Deny, unsaid);
        check(&of("role = 'admin'", "web", "d"), Expect::Deny, "zones-are-for-their-tenants");
        check(&of(shop, "web", "c"), Expect::Deny, "zones-are-left-by-admins-only");
        check(&format!("plan = 'p1'\n{}", of(shop, "web", "c")), Expect::Allow, allowed);
        check(&format!("{shop}\naction = 'view-vm'\nvm = 'web'"), Expect::Allow, "view-for-everyone");
        check("role = 'viewer'\ntenants = ['bank']\naction = 'view-vm'\nvm = 'web'", Expect::Deny, tenants);
        check(&format!("{shop}\naction = 'use-vm'\nvm = 'web'"), Expect::Allow, "operate-for-operators");
        let audit = "role = 'auditor'\ntenants = ['shop']\naction = 'audit'";
        check(audit, Expect::Deny, "the-audit-log-is-of-all-tenants");
    }

    #[test]
    fn the_built_in_policies_are_listed() {
        let list = check(None).unwrap();
        let zones = list.iter().find(|p| p.id == "zones-are-left-by-admins-only").unwrap();
        assert_eq!(zones.effect, "forbid");
        assert!(zones.reason.as_ref().unwrap().contains("different zones"));
        assert!(list.iter().any(|p| p.effect == "permit" && p.reason.is_none()));
    }
}
