//! Which CPU features a guest really gets: asked of a QEMU that is started with the machine type, CPU model and
//! accelerator in question, and kept like a catalogue, by the program's digest.

use super::dry_run::{DryRun, DryRunError};
use super::key::{self, Key};
use super::{CatalogueError, Catalogues};
use crate::daemon::lock;
use crate::qemu::binary::Binary;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::sync::Arc;
use types::VmId;
use types::vm::{Accel, VmSpec};
use types::{ErrorCode, Problem};

/// A fleet has a handful of machine types and CPU models.
const CPUS_MAX: usize = 64;
/// The smallest VM that starts.
const MEMORY_BYTES: u64 = 16 << 20;

/// CPUID flags, by QEMU's names.
pub(super) type Features = Arc<BTreeSet<String>>;

impl Catalogues {
    /// The CPU features of a VM with this machine type, CPU model and accelerator.
    ///
    /// # Errors
    /// Its names are no names, or this QEMU does not start with them; nothing is left behind.
    pub async fn cpu_features(
        self: &Arc<Self>,
        binary: &Binary,
        machine: &str,
        cpu_model: &str,
        accel: Accel,
    ) -> Result<Arc<BTreeSet<String>>, Problem> {
        let spec = bare(machine, cpu_model, accel)?;
        let key = self.key(binary, machine, &spec).await.map_err(|e| e.problem())?;
        // One at a time: whoever comes second finds what the first one learned.
        let _turn = self.cpu_turn.lock().await;
        if let Some(features) = lock(&self.cpus).get(&key).cloned() {
            return Ok(features);
        }
        let (own, binary, machine) = (self.clone(), binary.clone(), machine.to_owned());
        // In its own task: a caller that is cancelled must not leave a process that nobody holds.
        let work = tokio::spawn(async move { own.learn_cpu(key, &binary, &machine, &spec).await });
        work.await.map_err(|e| Problem::new(ErrorCode::Internal, e.to_string()))?.map_err(|e| {
            let text = format!("the features of the CPU cannot be found out: {}", crate::error::chain(&e));
            Problem::new(ErrorCode::HypervisorFailed, text)
        })
    }

    async fn learn_cpu(
        self: &Arc<Self>,
        key: Key,
        binary: &Binary,
        machine: &str,
        spec: &VmSpec,
    ) -> Result<Features, CatalogueError> {
        let model = &spec.cpu_model;
        let commands = [
            ("query-cpu-model-expansion", json!({ "type": "full", "model": { "name": model } })),
            ("query-cpu-definitions", json!({})),
        ];
        let dry_run = DryRun {
            binary,
            machine,
            spec,
            run_folder: &self.run_folder,
            group: &self.group,
            user: self.user.as_deref(),
        };
        let answers = dry_run.ask(&commands).await.map_err(CatalogueError::DryRun)?;
        let unreadable = || {
            CatalogueError::DryRun(DryRunError::Migrate(format!(
                "its answers about CPU {model} make no sense"
            )))
        };
        let features = features(model, &answers, binary.cpu_flags()).ok_or_else(unreadable)?;
        // An upgrade in between would be kept under the older program's key.
        if self.key(binary, machine, spec).await? != key {
            return Err(CatalogueError::Exchanged);
        }
        let features = Arc::new(features);
        let mut cpus = lock(&self.cpus);
        if cpus.len() >= CPUS_MAX {
            cpus.pop_first();
        }
        cpus.insert(key, features.clone());
        Ok(features)
    }
}

/// What the model asks for, less what this QEMU and accelerator cannot give.
fn features(model: &str, answers: &[Value], flags: &BTreeSet<String>) -> Option<BTreeSet<String>> {
    let [expansion, definitions] = answers else { return None };
    let properties = expansion.get("model")?.get("props")?.as_object()?;
    let definition = definitions.as_array()?.iter().find(|d| d["name"].as_str() == Some(model))?;
    let withheld: BTreeSet<&str> =
        definition.get("unavailable-features")?.as_array()?.iter().filter_map(Value::as_str).collect();
    let given = |(name, value): (&String, &Value)| {
        let seen = value == &Value::Bool(true) && flags.contains(name) && !withheld.contains(name.as_str());
        seen.then(|| name.clone())
    };
    Some(properties.iter().filter_map(given).collect())
}

/// The least VM that has the machine and the CPU.
fn bare(machine: &str, cpu_model: &str, accel: Accel) -> Result<VmSpec, Problem> {
    let spec = serde_json::from_value(json!({
        "uuid": VmId::from_bytes([0; 16]), "name": "dry-run", "accel": accel, "machine": machine,
        "cpu_model": cpu_model, "vcpus": 1, "memory_bytes": MEMORY_BYTES,
    }));
    let bad = |text: String| Problem::new(ErrorCode::BadRequest, text);
    let spec: VmSpec = spec.map_err(|e| bad(e.to_string()))?;
    spec.validate().map_err(bad)?;
    Ok(key::reduced(&spec))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_flags_that_are_given_count() {
        let flags = ["fpu", "aes", "sha-ni", "svm"].map(str::to_owned).into_iter().collect();
        let props = json!({ "fpu": true, "aes": false, "sha-ni": true, "kvm": true, "level": 13 });
        let expansion = json!({ "model": { "name": "m", "props": props } });
        let definitions = json!([{ "name": "other" }, { "name": "m", "unavailable-features": ["sha-ni"] }]);
        let found = features("m", &[expansion.clone(), definitions.clone()], &flags).unwrap();
        assert_eq!(found.into_iter().collect::<Vec<_>>(), ["fpu"]);
        assert!(features("x", &[expansion.clone(), definitions], &flags).is_none(), "no such definition");
        let unsaid = json!([{ "name": "m" }]);
        assert!(features("m", &[expansion, unsaid], &flags).is_none(), "unsaid is not given");
        assert!(features("m", &[json!({}), json!([])], &flags).is_none());
    }

    #[test]
    fn names_that_would_be_more_than_a_name_are_refused() {
        for (machine, cpu) in
            [("pc,accel=kvm", "qemu64"), ("pc", "qemu64,+x"), ("pc", "host"), ("", "qemu64")]
        {
            assert_eq!(bare(machine, cpu, Accel::Tcg).unwrap_err().code, ErrorCode::BadRequest);
        }
        assert!(bare("pc-q35-10.0", "qemu64", Accel::Kvm).is_ok());
    }
}
