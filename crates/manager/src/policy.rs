//! Authorisation: Cedar policies, default deny. A decision is a value: [`Allowed`] or a [`Problem`] that says why.

pub(crate) mod plans;
pub(crate) mod shelf;
pub mod table;
mod zones;

use api::http::PolicyContent;
use cedar_policy::{
    Authorizer, Context, Decision, Effect, Entities, Entity, EntityUid, PolicyId, PolicySet, Request,
    RestrictedExpression, Schema, ValidationMode, Validator,
};
use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use table::PolicyView;
use types::{Digest, ErrorCode, HostName, Problem, vm::VmSpec};
use zones::Zones;

const SCHEMA: &str = include_str!("../policy/schema.cedarschema");
const DEFAULT: &str = include_str!("../policy/default.cedar");
/// Policy files are written by people: one larger than this is a mistake.
const POLICY_FILE_LIMIT_BYTES: u64 = 1 << 20;

/// Who asks, as far as policy cares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Principal {
    /// Name of the operator or token.
    pub(crate) name: String,
    /// Its role.
    pub(crate) role: String,
    /// Tenants that its token is for; it may name none.
    pub(crate) tenants: Option<Vec<String>>,
}

/// A plan of maintenance that is signed, in its window and about the source; whether it covers the move.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PlanFacts {
    /// Its id.
    pub(crate) id: String,
    /// Who made it.
    pub(crate) created_by: String,
}

/// What is asked for on one VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum VmAction {
    /// See it, and its migrations.
    View,
    /// Define, start and stop it, and control its migrations.
    Use,
}

impl VmAction {
    const ALL: [Self; 2] = [Self::View, Self::Use];

    const fn as_str(self) -> &'static str {
        match self {
            Self::View => "view-vm",
            Self::Use => "use-vm",
        }
    }

    fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|action| action.as_str() == name)
    }
}

/// What is asked for on the fleet as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// Define a VM.
    DefineVm,
    /// Start a VM.
    StartVm,
    /// Stop a VM.
    StopVm,
    /// Enrol a host.
    AddHost,
    /// Make, list and revoke operators' tokens.
    ManageTokens,
    /// Suspend, resume or terminate a migration.
    ControlMigration,
    /// Set the values that hosts are measured against.
    SetReference,
    /// Look at hosts, VMs and migrations.
    View,
    /// Read the audit log.
    Audit,
    /// Put a policy set into force.
    ApplyPolicy,
    /// Make plans of maintenance, and take them back.
    Plan,
}

impl Action {
    const ALL: [Self; 11] = [
        Self::DefineVm,
        Self::StartVm,
        Self::StopVm,
        Self::AddHost,
        Self::ManageTokens,
        Self::ControlMigration,
        Self::SetReference,
        Self::View,
        Self::Audit,
        Self::ApplyPolicy,
        Self::Plan,
    ];

    fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|action| action.as_str() == name)
    }

    /// All names, for people.
    fn names() -> String {
        Self::ALL.map(Self::as_str).join(", ")
    }

    const fn as_str(self) -> &'static str {
        match self {
            Self::DefineVm => "define-vm",
            Self::StartVm => "start-vm",
            Self::StopVm => "stop-vm",
            Self::AddHost => "add-host",
            Self::ManageTokens => "manage-tokens",
            Self::ControlMigration => "control-migration",
            Self::SetReference => "set-reference",
            Self::View => "view",
            Self::Audit => "audit",
            Self::ApplyPolicy => "apply-policy",
            Self::Plan => "plan",
        }
    }
}

/// A host, as far as policy cares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct HostFacts {
    /// Its name.
    pub(crate) name: HostName,
    /// Its zone.
    pub(crate) zone: String,
    /// Whether it has a live, authenticated session.
    pub(crate) connected: bool,
    /// Whether it is set aside.
    pub(crate) quarantined: bool,
    /// Whether its record names a TPM, with which it must prove its platform before any permit.
    pub(crate) attested: bool,
}

/// The proof that policy permits; names the policies that did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Allowed {
    /// Ids of the deciding policies.
    pub(crate) by: Vec<String>,
}

/// What the policies decided, and which of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Verdict {
    /// Whether it is permitted.
    pub(crate) allow: bool,
    /// Ids of the deciding policies; none when the default denied.
    pub(crate) by: Vec<String>,
    /// Why it was denied.
    pub(crate) reason: Option<String>,
}

impl Verdict {
    fn into_result(self) -> Result<Allowed, Problem> {
        match self.reason {
            None if self.allow => Ok(Allowed { by: self.by }),
            reason => Err(Problem::new(ErrorCode::PolicyDenied, reason.unwrap_or_default())),
        }
    }
}

/// A loaded, strictly validated policy set.
pub(crate) struct Policy {
    policies: PolicySet,
    schema: Schema,
    zones: Zones,
    files: BTreeMap<String, String>,
}

/// The file of a set that says what zones are.
const ZONES_FILE: &str = "zones.toml";

fn bad(detail: impl Into<String>) -> Problem {
    Problem::new(ErrorCode::BadConfiguration, detail)
}

fn defect(what: &str, error: impl std::fmt::Display) -> Problem {
    // Denial is the default: what can't be evaluated is not permitted (I7).
    Problem::new(ErrorCode::PolicyDenied, format!("the policy cannot be evaluated: {what}: {error}"))
}

impl Policy {
    /// The built-in policy.
    ///
    /// # Errors
    /// `bad-configuration` (never, as a test shows).
    pub(crate) fn built_in() -> Result<Self, Problem> {
        Self::parse(&[("built-in".to_owned(), DEFAULT.to_owned())])
    }

    /// A set that was sent or kept.
    ///
    /// # Errors
    /// `bad-configuration`, naming the file and what is wrong with it.
    pub(crate) fn of_content(content: &PolicyContent) -> Result<Self, Problem> {
        let known = |name: &str| name.ends_with(".cedar") || name == ZONES_FILE;
        if let Some(other) = content.files.keys().find(|name| !known(name) || name.contains('/')) {
            return Err(bad(format!("{other:?} is neither a *.cedar file nor {ZONES_FILE}")));
        }
        if !content.files.keys().any(|name| name.ends_with(".cedar")) {
            return Err(bad("the policy set holds no *.cedar file: everything would be denied"));
        }
        let files: Vec<_> = content.files.iter().map(|(name, text)| (name.clone(), text.clone())).collect();
        Self::parse(&files)
    }

    /// The same policies with other zones, as a table of expectations describes them.
    fn with_zones(&self, zones: Zones) -> Result<Self, Problem> {
        let files: Vec<_> = self.files.clone().into_iter().collect();
        Ok(Self { zones, ..Self::parse(&files)? })
    }

    /// Names the set: the same files always come to the same.
    pub(crate) fn digest(&self) -> Digest {
        let json = serde_json_canonicalizer::to_vec(&self.files).expect("a map of texts serialises");
        Digest::of(&json)
    }

    /// Its files.
    pub(crate) const fn files(&self) -> &BTreeMap<String, String> {
        &self.files
    }

    /// Every `*.cedar` file of a folder, in the order of their names.
    ///
    /// # Errors
    /// `bad-configuration`, naming the file and what is wrong with it.
    pub(crate) fn from_folder(folder: &Path) -> Result<Self, Problem> {
        let list =
            |e: std::io::Error| bad(format!("cannot read the policy folder {}: {e}", folder.display()));
        let mut paths = Vec::new();
        for entry in std::fs::read_dir(folder).map_err(list)? {
            let path = entry.map_err(list)?.path();
            if path.extension().is_some_and(|e| e == "cedar") || path.ends_with(ZONES_FILE) {
                paths.push(path);
            }
        }
        paths.sort();
        let mut files = Vec::new();
        for path in paths {
            let read = |e: std::io::Error| bad(format!("cannot read {}: {e}", path.display()));
            if std::fs::metadata(&path).map_err(read)?.len() > POLICY_FILE_LIMIT_BYTES {
                return Err(bad(format!(
                    "{} is larger than {POLICY_FILE_LIMIT_BYTES} bytes",
                    path.display()
                )));
            }
            files.push((path.display().to_string(), std::fs::read_to_string(&path).map_err(read)?));
        }
        if !files.iter().any(|(name, _)| name.ends_with(".cedar")) {
            return Err(bad(format!("the policy folder {} holds no *.cedar file", folder.display())).hint(
                "without any policy everything would be denied; leave `policy` out for the built-in one",
            ));
        }
        Self::parse(&files)
    }

    fn parse(files: &[(String, String)]) -> Result<Self, Problem> {
        let (schema, _) =
            Schema::from_cedarschema_str(SCHEMA).map_err(|e| bad(format!("policy schema: {e}")))?;
        let mut policies = PolicySet::new();
        let mut zones = Zones::default();
        for (file, text) in files {
            if Path::new(file).ends_with(ZONES_FILE) {
                zones = Zones::parse(text).map_err(|e| bad(format!("{file}: {e}")))?;
                continue;
            }
            let parsed: PolicySet = text.parse().map_err(|e| bad(format!("{file}: {e}")))?;
            for (n, policy) in parsed.policies().enumerate() {
                // `@id` is only an annotation to Cedar: made the id here, so that a denial can name it.
                let id = policy.annotation("id").map_or_else(|| format!("{file}#{n}"), str::to_owned);
                policies
                    .add(policy.new_id(PolicyId::new(&id)))
                    .map_err(|e| bad(format!("{file}: policy {id:?}: {e}")))?;
            }
        }
        let verdict = Validator::new(schema.clone()).validate(&policies, ValidationMode::Strict);
        if let Some(error) = verdict.validation_errors().next() {
            return Err(bad(format!("policy {error}")));
        }
        let name = |file: &String| {
            Path::new(file).file_name().map_or_else(|| file.clone(), |n| n.to_string_lossy().into_owned())
        };
        let files = files.iter().map(|(file, text)| (name(file), text.clone())).collect();
        Ok(Self { policies, schema, zones, files })
    }

    /// Whether `who` may do `action` on the fleet.
    ///
    /// # Errors
    /// `forbidden`.
    pub(crate) fn fleet(&self, who: &Principal, action: Action) -> Result<Allowed, Problem> {
        self.verdict_of_fleet(who, action).and_then(Verdict::into_result).map_err(|mut problem| {
            problem.code = ErrorCode::Forbidden;
            problem
        })
    }

    /// What a role may do on the fleet, for people.
    pub(crate) fn fleet_actions(&self, who: &Principal) -> Vec<String> {
        let may = |action: &Action| self.fleet(who, *action).is_ok();
        Action::ALL.into_iter().filter(may).map(|action| action.as_str().to_owned()).collect()
    }

    fn verdict_of_fleet(&self, who: &Principal, action: Action) -> Result<Verdict, Problem> {
        let entities = vec![operator(who)?, Entity::new_no_attrs(uid("Fleet", "fleet")?, HashSet::new())];
        self.decide(who, action.as_str(), uid("Fleet", "fleet")?, Context::empty(), entities)
    }

    /// Whether `who` may do `action` on a VM.
    ///
    /// # Errors
    /// `forbidden`, with the reason and the deciding policy.
    pub(crate) fn on_vm(&self, who: &Principal, action: VmAction, vm: &VmSpec) -> Result<Allowed, Problem> {
        self.verdict_of_vm(who, action, vm).and_then(Verdict::into_result).map_err(|mut problem| {
            problem.code = ErrorCode::Forbidden;
            problem
        })
    }

    fn verdict_of_vm(&self, who: &Principal, action: VmAction, vm: &VmSpec) -> Result<Verdict, Problem> {
        let tenant = uid("Tenant", vm.tenant.as_str())?;
        let resource = uid("Vm", &vm.uuid.to_string())?;
        let entities = vec![
            operator(who)?,
            Entity::new_no_attrs(tenant.clone(), HashSet::new()),
            vm_entity(vm, &resource, tenant)?,
        ];
        self.decide(who, action.as_str(), resource, Context::empty(), entities)
    }

    /// Whether `who` may move `vm` from `source` to `target`.
    ///
    /// # Errors
    /// `policy-denied`, with the reason and the deciding policy.
    pub(crate) fn migrate(
        &self,
        who: &Principal,
        vm: &VmSpec,
        (source, target): (&HostFacts, &HostFacts),
        plan: Option<&PlanFacts>,
    ) -> Result<Allowed, Problem> {
        self.verdict_of_move(who, vm, (source, target), plan)?.into_result()
    }

    fn verdict_of_move(
        &self,
        who: &Principal,
        vm: &VmSpec,
        (source, target): (&HostFacts, &HostFacts),
        plan: Option<&PlanFacts>,
    ) -> Result<Verdict, Problem> {
        let tenant = uid("Tenant", vm.tenant.as_str())?;
        let resource = uid("Vm", &vm.uuid.to_string())?;
        let mut entities = vec![
            operator(who)?,
            Entity::new_no_attrs(tenant.clone(), HashSet::new()),
            vm_entity(vm, &resource, tenant)?,
            host(source)?,
            host(target)?,
            self.zones.entity(&source.zone)?,
        ];
        if target.zone != source.zone {
            entities.push(self.zones.entity(&target.zone)?);
        }
        let host_uid = |h: &HostFacts| {
            Ok::<_, Problem>(RestrictedExpression::new_entity_uid(uid("Host", h.name.as_str())?))
        };
        let mut pairs =
            vec![("source".to_owned(), host_uid(source)?), ("target".to_owned(), host_uid(target)?)];
        if let Some(plan) = plan {
            let fields = [("id", &plan.id), ("created_by", &plan.created_by)];
            let fields = fields.map(|(key, value)| (key.to_owned(), text(value)));
            let record = RestrictedExpression::new_record(fields).map_err(|e| defect("plan", e))?;
            pairs.push(("plan".to_owned(), record));
        }
        let context = Context::from_pairs(pairs).map_err(|e| defect("context", e))?;
        self.decide(who, "migrate", resource, context, entities)
    }

    fn decide(
        &self,
        who: &Principal,
        action: &str,
        resource: EntityUid,
        context: Context,
        entities: Vec<Entity>,
    ) -> Result<Verdict, Problem> {
        let principal = uid("Operator", &who.name)?;
        let request = Request::new(principal, uid("Action", action)?, resource, context, Some(&self.schema))
            .map_err(|e| defect("request", e))?;
        let entities =
            Entities::from_entities(entities, Some(&self.schema)).map_err(|e| defect("entities", e))?;
        let response = Authorizer::new().is_authorized(&request, &self.policies, &entities);
        let mut by: Vec<_> = response.diagnostics().reason().map(ToString::to_string).collect();
        by.sort();
        // An error in one policy is no permission by another: a forbid that can't be evaluated must not vanish.
        if let Some(error) = response.diagnostics().errors().next() {
            return Err(defect("a policy failed", error));
        }
        let allow = response.decision() == Decision::Allow;
        let reason = (!allow).then(|| self.denial(who, action, &by));
        Ok(Verdict { allow, by, reason })
    }

    fn denial(&self, who: &Principal, action: &str, by: &[String]) -> String {
        let Some(id) = by.first() else {
            return format!(
                "no policy permits {} (role {}) to {action}, and denial is the default",
                who.name, who.role
            );
        };
        let policy = self.policies.policy(&PolicyId::new(id));
        let reason = policy.and_then(|p| p.annotation("reason")).unwrap_or("it forbids this");
        format!("policy {id:?} denies {action}: {reason}")
    }

    /// Every policy, by id.
    fn list(&self) -> Vec<PolicyView> {
        let view = |policy: &cedar_policy::Policy| PolicyView {
            id: policy.id().to_string(),
            effect: if policy.effect() == Effect::Permit { "permit" } else { "forbid" },
            reason: policy.annotation("reason").map(str::to_owned),
        };
        let mut all: Vec<_> = self.policies.policies().map(view).collect();
        all.sort_by(|a, b| a.id.cmp(&b.id));
        all
    }
}

fn uid(kind: &str, id: &str) -> Result<EntityUid, Problem> {
    let kind = kind.parse().map_err(|e| defect("entity type", e))?;
    Ok(EntityUid::from_type_name_and_id(kind, cedar_policy::EntityId::new(id)))
}

fn text(value: &str) -> RestrictedExpression {
    RestrictedExpression::new_string(value.to_owned())
}

fn entity(
    id: EntityUid,
    attributes: Vec<(&str, RestrictedExpression)>,
    parents: HashSet<EntityUid>,
) -> Result<Entity, Problem> {
    let attributes = attributes.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
    Entity::new(id, attributes, parents).map_err(|e| defect("entity", e))
}

fn operator(who: &Principal) -> Result<Entity, Problem> {
    let mut attributes = vec![("role", text(&who.role))];
    if let Some(tenants) = &who.tenants {
        attributes.push(("tenants", RestrictedExpression::new_set(tenants.iter().map(|t| text(t)))));
    }
    entity(uid("Operator", &who.name)?, attributes, HashSet::new())
}

fn host(facts: &HostFacts) -> Result<Entity, Problem> {
    let attributes = vec![
        ("zone", text(&facts.zone)),
        ("in_zone", RestrictedExpression::new_entity_uid(uid("Zone", &facts.zone)?)),
        ("connected", RestrictedExpression::new_bool(facts.connected)),
        ("quarantined", RestrictedExpression::new_bool(facts.quarantined)),
        ("attested", RestrictedExpression::new_bool(facts.attested)),
    ];
    entity(uid("Host", facts.name.as_str())?, attributes, HashSet::new())
}

/// The label of a VM that says how sensitive it is.
const SENSITIVITY: &str = "sensitivity";

fn vm_entity(vm: &VmSpec, id: &EntityUid, tenant: EntityUid) -> Result<Entity, Problem> {
    let labels = vm.labels.iter().map(|(k, v)| text(&format!("{k}={v}")));
    let memory = i64::try_from(vm.memory_bytes).map_err(|e| defect("memory_bytes", e))?;
    let mut attributes = vec![
        ("tenant", text(vm.tenant.as_str())),
        ("labels", RestrictedExpression::new_set(labels)),
        ("memory_bytes", RestrictedExpression::new_long(memory)),
    ];
    if let Some(sensitivity) = vm.labels.get(SENSITIVITY) {
        attributes.push(("sensitivity", text(sensitivity)));
    }
    entity(id.clone(), attributes, HashSet::from([tenant]))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn who(role: &str) -> Principal {
        Principal { name: "ann".to_owned(), role: role.to_owned(), tenants: Some(vec!["all".to_owned()]) }
    }

    fn facts(name: &str) -> HostFacts {
        HostFacts {
            name: name.parse().unwrap(),
            zone: "z".to_owned(),
            connected: true,
            quarantined: false,
            attested: false,
        }
    }

    fn vm() -> VmSpec {
        let uuid = types::VmId::from_bytes([1; 16]);
        serde_json::from_value(serde_json::json!({
            "uuid": uuid, "name": "vm", "vcpus": 1, "memory_bytes": 1 << 28, "labels": {"a": "b"},
        }))
        .unwrap()
    }

    fn check(role: &str, change: impl FnOnce(&mut HostFacts), expect: Result<&str, &str>) {
        let mut target = facts("host-b");
        change(&mut target);
        let (policy, source) = (Policy::built_in().unwrap(), facts("host-a"));
        let decision = policy.migrate(&who(role), &vm(), (&source, &target), None);
        match (decision, expect) {
            (Ok(allowed), Ok(by)) => assert_eq!(allowed.by, [by]),
            (Err(problem), Err(part)) => {
                assert_eq!(problem.code, ErrorCode::PolicyDenied);
                assert!(problem.detail.contains(part), "{}", problem.detail);
            }
            (got, expect) => panic!("{role}: {got:?}, expected {expect:?}"),
        }
    }

    #[test]
    fn the_built_in_policy_denies_by_default_and_names_who_decided() {
        check("operator", |_| {}, Ok("migrate-for-operators"));
        check("admin", |_| {}, Ok("migrate-for-operators"));
        check("viewer", |_| {}, Err("no policy permits ann (role viewer)"));
        check("", |_| {}, Err("no policy permits"));
        check("admin", |t| t.connected = false, Err("no policy permits"));
        check("admin", |t| t.quarantined = true, Err("\"no-migration-to-quarantine\""));
        check("operator", |t| t.zone = "other".to_owned(), Err("\"zones-are-left-by-admins-only\""));
        check("admin", |t| t.zone = "other".to_owned(), Ok("migrate-for-operators"));
    }

    #[test]
    fn roles_do_what_they_are_for() {
        let policy = Policy::built_in().unwrap();
        for (role, action, expect) in [
            ("admin", Action::AddHost, true),
            ("operator", Action::AddHost, false),
            ("admin", Action::ManageTokens, true),
            ("operator", Action::ManageTokens, false),
            ("auditor", Action::ManageTokens, false),
            ("operator", Action::StartVm, true),
            ("viewer", Action::StartVm, false),
            ("viewer", Action::View, true),
            ("auditor", Action::Audit, true),
            ("operator", Action::Audit, false),
            ("nobody", Action::View, false),
        ] {
            assert_eq!(policy.fleet(&who(role), action).is_ok(), expect, "{role} {action:?}");
        }
    }

    #[test]
    fn a_policy_with_a_slip_is_refused_when_loaded() {
        for (text, part) in [
            ("permit (principal, action, resource", "expected"),
            (
                "permit (principal, action == Action::\"migrate\", resource) when { context.target.quarantend };",
                "quarantend",
            ),
            ("permit (principal, action == Action::\"migrat\", resource);", "migrat"),
            (
                "@id(\"x\") permit (principal, action, resource); @id(\"x\") forbid (principal, action, resource);",
                "\"x\"",
            ),
        ] {
            let problem = Policy::parse(&[("f.cedar".to_owned(), text.to_owned())]).err().unwrap();
            assert_eq!(problem.code, ErrorCode::BadConfiguration);
            assert!(problem.detail.contains(part), "{}", problem.detail);
        }
        let empty = tempfile::tempdir().unwrap();
        assert!(Policy::from_folder(empty.path()).is_err(), "an empty folder is a mistake, not a policy");
    }
}
