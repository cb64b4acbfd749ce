//! VM records and their location: (host, epoch), moved by compare-and-swap only.

use crate::error::RegistryError;
use crate::tx::{
    Tx, column, document, document_text, parsed, parsed_or_null, plain, signed, unsigned, variant,
    variant_text,
};
use sqlx::any::AnyRow;
use types::inventory::Inventory;
use types::vm::{VmSpec, VmState};
use types::{Digest, Epoch, HostName, Name, VmId};

/// Where a VM is, and under which fencing number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// The host.
    pub host: HostName,
    /// The epoch.
    pub epoch: Epoch,
}

/// A VM as the registry holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmRow {
    /// What it is.
    pub spec: VmSpec,
    /// Digest of the spec.
    pub spec_digest: Digest,
    /// How it stands.
    pub state: VmState,
    /// The host that holds it.
    pub host: Option<HostName>,
    /// Epoch of its location.
    pub epoch: Epoch,
    /// The first epoch that was never given out.
    pub next_epoch: Epoch,
    /// As enrolled when it started.
    pub inventory: Option<Inventory>,
    /// Exact machine type that it was started with.
    pub machine: Option<String>,
}

impl VmRow {
    /// Its location, when a host holds it.
    #[must_use]
    pub fn location(&self) -> Option<Location> {
        self.host.clone().map(|host| Location { host, epoch: self.epoch })
    }

    fn read(row: &AnyRow) -> Result<Self, RegistryError> {
        let digest: String = column(row, "spec_digest")?;
        let inventory: Option<String> = column(row, "inventory")?;
        Ok(Self {
            spec: document(row, "spec")?,
            spec_digest: Digest::try_from(digest).map_err(|e| RegistryError::malformed("spec_digest", e))?,
            state: variant(row, "state")?,
            host: parsed_or_null(row, "host")?,
            epoch: Epoch(unsigned(row, "epoch")?),
            next_epoch: Epoch(unsigned(row, "next_epoch")?),
            inventory: inventory
                .map(|text| serde_json::from_str(&text).map_err(|e| RegistryError::malformed("inventory", e)))
                .transpose()?,
            machine: column(row, "machine")?,
        })
    }
}

impl Tx {
    /// Adds a VM.
    ///
    /// # Errors
    /// [`RegistryError::Exists`] when its name or UUID is taken.
    pub async fn add_vm(&mut self, spec: &VmSpec) -> Result<(), RegistryError> {
        let sql = "INSERT INTO vms (uuid, name, spec, spec_digest, state, epoch, next_epoch, memory_bytes, vcpus, \
                   created_at_us) VALUES ($1, $2, $3, $4, $5, 0, 1, $6, $7, $8)";
        let query = sqlx::query(sql)
            .bind(spec.uuid.to_string())
            .bind(spec.name.to_string())
            .bind(document_text("spec", spec)?)
            .bind(spec.digest().to_string())
            .bind(variant_text(&VmState::Defined))
            .bind(signed("memory_bytes", spec.memory_bytes)?)
            .bind(i64::from(spec.vcpus))
            .bind(self.now_us());
        self.insert(|| format!("VM {} or its UUID {}", spec.name, spec.uuid), query).await
    }

    /// A VM by name.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn vm_named(&mut self, name: &Name) -> Result<Option<VmRow>, RegistryError> {
        let query = sqlx::query("SELECT * FROM vms WHERE name = $1").bind(name.to_string());
        self.optional(query).await?.as_ref().map(VmRow::read).transpose()
    }

    /// A VM by UUID.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn vm(&mut self, uuid: VmId) -> Result<Option<VmRow>, RegistryError> {
        let query = sqlx::query("SELECT * FROM vms WHERE uuid = $1").bind(uuid.to_string());
        self.optional(query).await?.as_ref().map(VmRow::read).transpose()
    }

    /// Every VM, by name.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn vms(&mut self) -> Result<Vec<VmRow>, RegistryError> {
        let rows = self.all(sqlx::query("SELECT * FROM vms ORDER BY name")).await?;
        rows.iter().map(VmRow::read).collect()
    }

    /// VMs that the registry places on a host.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn vms_on(&mut self, host: &HostName) -> Result<Vec<VmRow>, RegistryError> {
        let query = sqlx::query("SELECT * FROM vms WHERE host = $1 ORDER BY name").bind(host.to_string());
        self.all(query).await?.iter().map(VmRow::read).collect()
    }

    /// Places a VM that no host holds: it is `starting` there under a fresh epoch, which this returns. `None`
    /// when a host holds it already.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn place_vm(&mut self, vm: VmId, host: &HostName) -> Result<Option<Epoch>, RegistryError> {
        let sql = "UPDATE vms SET state = $3, host = $2, epoch = next_epoch, next_epoch = next_epoch + 1 \
                   WHERE uuid = $1 AND host IS NULL";
        let query = sqlx::query(sql)
            .bind(vm.to_string())
            .bind(host.to_string())
            .bind(variant_text(&VmState::Starting));
        if self.execute(query).await? == 0 {
            return Ok(None);
        }
        let row =
            self.optional(sqlx::query("SELECT epoch FROM vms WHERE uuid = $1").bind(vm.to_string())).await?;
        row.as_ref().map(|r| unsigned(r, "epoch").map(Epoch)).transpose()
    }

    /// Takes a VM off its host: exactly that location, or nothing happens.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn unplace_vm(
        &mut self,
        vm: VmId,
        from: &Location,
        state: VmState,
    ) -> Result<bool, RegistryError> {
        let sql = "UPDATE vms SET host = NULL, state = $4 WHERE uuid = $1 AND host = $2 AND epoch = $3";
        let query = sqlx::query(sql)
            .bind(vm.to_string())
            .bind(from.host.to_string())
            .bind(signed("epoch", from.epoch.0)?)
            .bind(variant_text(&state));
        Ok(self.execute(query).await? == 1)
    }

    /// Sets the state of a VM that is exactly where it is thought to be.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn set_vm_state(
        &mut self,
        vm: VmId,
        at: &Location,
        state: VmState,
    ) -> Result<bool, RegistryError> {
        let sql = "UPDATE vms SET state = $4 WHERE uuid = $1 AND host = $2 AND epoch = $3";
        let query = sqlx::query(sql)
            .bind(vm.to_string())
            .bind(at.host.to_string())
            .bind(signed("epoch", at.epoch.0)?)
            .bind(variant_text(&state));
        Ok(self.execute(query).await? == 1)
    }

    /// Enrols what a VM's stream must look like.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn enrol_inventory(
        &mut self,
        vm: VmId,
        inventory: &Inventory,
        machine: &str,
    ) -> Result<(), RegistryError> {
        let query = sqlx::query("UPDATE vms SET inventory = $2, machine = $3 WHERE uuid = $1")
            .bind(vm.to_string())
            .bind(document_text("inventory", inventory)?)
            .bind(plain(machine));
        self.execute(query).await.map(|_| ())
    }

    /// Burns a fresh pair of epochs for a permit: the source holds the VM under the first from now on, the target
    /// would run it under the second. `None` when the VM is not running exactly there.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn burn_epochs(
        &mut self,
        vm: VmId,
        at: &Location,
    ) -> Result<Option<(Epoch, Epoch)>, RegistryError> {
        let sql = "UPDATE vms SET epoch = next_epoch, next_epoch = next_epoch + 2, state = $4 \
                   WHERE uuid = $1 AND host = $2 AND epoch = $3 AND state = $5";
        let query = sqlx::query(sql)
            .bind(vm.to_string())
            .bind(at.host.to_string())
            .bind(signed("epoch", at.epoch.0)?)
            .bind(variant_text(&VmState::Migrating))
            .bind(variant_text(&VmState::Running));
        if self.execute(query).await? == 0 {
            return Ok(None);
        }
        let row =
            self.optional(sqlx::query("SELECT epoch FROM vms WHERE uuid = $1").bind(vm.to_string())).await?;
        let epoch = row.as_ref().map(|r| unsigned(r, "epoch")).transpose()?;
        Ok(epoch.map(|e| (Epoch(e), Epoch(e + 1))))
    }

    /// Moves a VM's location by compare-and-swap; `false` when it was not at `from`.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn relocate_vm(
        &mut self,
        vm: VmId,
        from: &Location,
        to: &Location,
        state: VmState,
    ) -> Result<bool, RegistryError> {
        let sql = "UPDATE vms SET host = $4, epoch = $5, state = $6, \
                   next_epoch = CASE WHEN next_epoch > $5 THEN next_epoch ELSE $5 + 1 END \
                   WHERE uuid = $1 AND host = $2 AND epoch = $3";
        let query = sqlx::query(sql)
            .bind(vm.to_string())
            .bind(from.host.to_string())
            .bind(signed("epoch", from.epoch.0)?)
            .bind(to.host.to_string())
            .bind(signed("epoch", to.epoch.0)?)
            .bind(variant_text(&state));
        Ok(self.execute(query).await? == 1)
    }

    /// The name of a VM, for messages.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn vm_name(&mut self, vm: VmId) -> Result<Option<Name>, RegistryError> {
        let query = sqlx::query("SELECT name FROM vms WHERE uuid = $1").bind(vm.to_string());
        self.optional(query).await?.as_ref().map(|row| parsed(row, "name")).transpose()
    }
}
