//! What a policy set says about zones: `zones.toml` beside its policies.
//!
//! ```toml
//! [zones.berlin]
//! allowed_sensitivity = ["public", "internal"]
//! tenants = ["shop"]
//! ```

use super::{entity, text, uid};
use cedar_policy::{Entity, RestrictedExpression};
use serde::Deserialize;
use std::collections::{BTreeMap, HashSet};
use types::Problem;

/// The zones that are described.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Zones {
    #[serde(default)]
    zones: BTreeMap<String, Zone>,
}

/// What is said of one. What is not said is missing to policies, which then deny.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Zone {
    /// Sensitivities of the VMs that may be moved there.
    allowed_sensitivity: Option<Vec<String>>,
    /// Tenants that it is for.
    tenants: Option<Vec<String>>,
}

impl Zones {
    /// Of a file.
    ///
    /// # Errors
    /// What is wrong, with the line.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        toml::from_str(text).map_err(|e| e.to_string().trim_end().to_owned())
    }

    /// Of a table of expectations.
    pub(super) const fn new(zones: BTreeMap<String, Zone>) -> Self {
        Self { zones }
    }

    /// Whether none is described.
    pub(super) fn is_empty(&self) -> bool {
        self.zones.is_empty()
    }

    /// A zone as policies see it.
    pub(super) fn entity(&self, name: &str) -> Result<Entity, Problem> {
        let zone = self.zones.get(name).cloned().unwrap_or_default();
        let set = |values: Vec<String>| RestrictedExpression::new_set(values.iter().map(|v| text(v)));
        let said = [("allowed_sensitivity", zone.allowed_sensitivity), ("tenants", zone.tenants)];
        let attributes = said.into_iter().filter_map(|(key, values)| Some((key, set(values?)))).collect();
        entity(uid("Zone", name)?, attributes, HashSet::new())
    }
}
