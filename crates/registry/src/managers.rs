//! Managers that share the registry, and who of them works on which migration.
//!
//! Every process that serves the registry starts with a fresh *term*; a manager's row holds the term of the
//! process that runs under its name now, so that an earlier one (stopped, cut off, forgotten) is told that it
//! is superseded. A *lease* says who works on an open migration. It is taken by compare-and-swap: when nobody
//! has it, when its time is over, or when it is held by an earlier process of the same name. Each tenure has
//! a term of its own, which only grows; whoever acts under a lease shows it in the same transaction
//! ([`Tx::lease_holds`]).
//!
//! Leases spread work. That no decision is made twice rests on the transactions, whoever makes them.

use crate::error::RegistryError;
use crate::tx::{Tx, column, parsed, plain, signed, unsigned};
use sqlx::any::AnyRow;
use types::{MigrationId, Name};

/// No lease lasts longer: one that claims to (a clock that jumped back meanwhile) counts as over.
pub const MAX_LEASE_US: i64 = 60 * 1_000_000;

/// One process of a manager.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// The manager.
    pub manager: Name,
    /// The process: no other ever had this number.
    pub term: u64,
}

/// A manager as the registry holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManagerRow {
    /// Its name, and its process.
    pub holder: Holder,
    /// Where hosts reach it.
    pub address: String,
    /// Its version.
    pub version: String,
    /// Microseconds since the Unix epoch, by the database's clock.
    pub started_at_us: i64,
    /// When it last said that it is there; microseconds since the Unix epoch, by the database's clock.
    pub seen_at_us: i64,
    /// How long ago that was, microseconds.
    pub silent_us: i64,
}

/// The right to work on a migration, for a time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lease {
    /// On what.
    pub migration: MigrationId,
    /// Whose it is.
    pub holder: Holder,
    /// Which tenure it is; a later one has a higher number, over all migrations and managers.
    pub term: u64,
    /// Microseconds since the Unix epoch, by the database's clock.
    pub expires_at_us: i64,
}

/// What came of asking for a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Acquired {
    /// It is the caller's, until then.
    Held(Lease),
    /// Another manager works on it.
    Elsewhere(Lease),
    /// There is no open migration of that id.
    NotOpen,
    /// A later process runs under the caller's name.
    Superseded,
}

impl ManagerRow {
    fn read(row: &AnyRow, now_us: i64) -> Result<Self, RegistryError> {
        let seen_at_us = column(row, "seen_at_us")?;
        Ok(Self {
            holder: Holder { manager: parsed(row, "name")?, term: unsigned(row, "term")? },
            address: column(row, "address")?,
            version: column(row, "version")?,
            started_at_us: column(row, "started_at_us")?,
            seen_at_us,
            silent_us: now_us.saturating_sub(seen_at_us).max(0),
        })
    }
}

impl Lease {
    fn read(row: &AnyRow) -> Result<Self, RegistryError> {
        Ok(Self {
            migration: parsed(row, "migration")?,
            holder: Holder { manager: parsed(row, "manager")?, term: unsigned(row, "manager_term")? },
            term: unsigned(row, "term")?,
            expires_at_us: column(row, "expires_at_us")?,
        })
    }

    /// Whether a process must respect it now: it is another manager's, and its time is not over.
    fn keeps_off(&self, holder: &Holder, now_us: i64) -> bool {
        let left_us = self.expires_at_us.saturating_sub(now_us);
        self.holder.manager != holder.manager && (1..=MAX_LEASE_US).contains(&left_us)
    }
}

impl Tx {
    /// Records that a process of a manager starts: from now on every earlier one of that name is superseded.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn manager_started(
        &mut self,
        manager: &Name,
        address: &str,
        version: &str,
    ) -> Result<Holder, RegistryError> {
        let (term, now_us) = (self.next_term().await?, self.shared_now_us().await?);
        let sql = "INSERT INTO managers (name, term, address, version, started_at_us, seen_at_us) \
                   VALUES ($1, $2, $3, $4, $5, $5) ON CONFLICT (name) DO UPDATE SET term = excluded.term, \
                   address = excluded.address, version = excluded.version, \
                   started_at_us = excluded.started_at_us, seen_at_us = excluded.seen_at_us";
        let query = sqlx::query(sql)
            .bind(manager.to_string())
            .bind(signed("term", term)?)
            .bind(plain(address))
            .bind(plain(version))
            .bind(now_us);
        self.execute(query).await?;
        Ok(Holder { manager: manager.clone(), term })
    }

    /// Records that a process is there; `false` when it is superseded.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn manager_seen(&mut self, holder: &Holder) -> Result<bool, RegistryError> {
        let now_us = self.shared_now_us().await?;
        let query = sqlx::query("UPDATE managers SET seen_at_us = $3 WHERE name = $1 AND term = $2")
            .bind(holder.manager.to_string())
            .bind(signed("term", holder.term)?)
            .bind(now_us);
        Ok(self.execute(query).await? == 1)
    }

    /// Every manager that ever served this registry, by name.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn managers(&mut self) -> Result<Vec<ManagerRow>, RegistryError> {
        let now_us = self.shared_now_us().await?;
        let rows = self.all(sqlx::query("SELECT * FROM managers ORDER BY name")).await?;
        rows.iter().map(|row| ManagerRow::read(row, now_us)).collect()
    }

    /// Takes, or prolongs, the lease of an open migration for `duration_us` (at most [`MAX_LEASE_US`]).
    ///
    /// # Errors
    /// Those of the database.
    pub async fn lease_acquire(
        &mut self,
        migration: MigrationId,
        holder: &Holder,
        duration_us: i64,
    ) -> Result<Acquired, RegistryError> {
        if !self.is_current(holder).await? {
            return Ok(Acquired::Superseded);
        }
        if !self.migration(migration).await?.is_some_and(|row| row.open) {
            return Ok(Acquired::NotOpen);
        }
        let now_us = self.shared_now_us().await?;
        let expires_at_us = now_us.saturating_add(duration_us.clamp(0, MAX_LEASE_US));
        let old = self.lease(migration).await?;
        let term = match &old {
            Some(lease) if lease.holder == *holder => lease.term,
            Some(lease) if lease.keeps_off(holder, now_us) => {
                return Ok(Acquired::Elsewhere(lease.clone()));
            }
            _ => self.next_term().await?,
        };
        let lease = Lease { migration, holder: holder.clone(), term, expires_at_us };
        self.put_lease(&lease, old.map(|l| l.term)).await?;
        Ok(Acquired::Held(lease))
    }

    /// Writes a lease over exactly the tenure that was seen.
    async fn put_lease(&mut self, lease: &Lease, over: Option<u64>) -> Result<(), RegistryError> {
        let sql = "INSERT INTO leases (migration, manager, manager_term, term, expires_at_us) \
                   VALUES ($1, $2, $3, $4, $5) ON CONFLICT (migration) DO UPDATE SET manager = excluded.manager, \
                   manager_term = excluded.manager_term, term = excluded.term, \
                   expires_at_us = excluded.expires_at_us WHERE leases.term = $6";
        let query = sqlx::query(sql)
            .bind(lease.migration.to_string())
            .bind(lease.holder.manager.to_string())
            .bind(signed("manager_term", lease.holder.term)?)
            .bind(signed("term", lease.term)?)
            .bind(lease.expires_at_us)
            .bind(signed("term", over.unwrap_or(0))?);
        match self.execute(query).await? {
            1 => Ok(()),
            _ => Err(RegistryError::malformed("lease", "it changed although nobody else can write")),
        }
    }

    /// Prolongs every lease of a process; how many there are. None when it is superseded.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn leases_renew(&mut self, holder: &Holder, duration_us: i64) -> Result<u64, RegistryError> {
        if !self.is_current(holder).await? {
            return Ok(0);
        }
        let expires_at_us = self.shared_now_us().await?.saturating_add(duration_us.clamp(0, MAX_LEASE_US));
        let query =
            sqlx::query("UPDATE leases SET expires_at_us = $3 WHERE manager = $1 AND manager_term = $2")
                .bind(holder.manager.to_string())
                .bind(signed("manager_term", holder.term)?)
                .bind(expires_at_us);
        self.execute(query).await
    }

    /// Whether a tenure is still the caller's: nobody took it over, and no later process runs under its name.
    /// One whose time is over, but which nobody took, still is.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn lease_holds(&mut self, lease: &Lease) -> Result<bool, RegistryError> {
        let held = self.lease(lease.migration).await?;
        let same = held.is_some_and(|h| h.term == lease.term && h.holder == lease.holder);
        Ok(same && self.is_current(&lease.holder).await?)
    }

    /// Gives a lease back; `false` when it was not the caller's any more.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn lease_release(&mut self, lease: &Lease) -> Result<bool, RegistryError> {
        let query = sqlx::query("DELETE FROM leases WHERE migration = $1 AND term = $2")
            .bind(lease.migration.to_string())
            .bind(signed("term", lease.term)?);
        Ok(self.execute(query).await? == 1)
    }

    /// The lease that keeps a process off a migration now, if there is one. Changes nothing: for a look
    /// before asking.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn lease_elsewhere(
        &mut self,
        migration: MigrationId,
        holder: &Holder,
    ) -> Result<Option<Lease>, RegistryError> {
        let now_us = self.shared_now_us().await?;
        let held = self.lease(migration).await?;
        Ok(held.filter(|lease| lease.keeps_off(holder, now_us)))
    }

    /// The clock that leases go by: the server's, or on SQLite this transaction's time. Microseconds since
    /// the Unix epoch.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn shared_clock_us(&mut self) -> Result<i64, RegistryError> {
        self.shared_now_us().await
    }

    /// The lease of a migration, whether or not its time is over.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn lease(&mut self, migration: MigrationId) -> Result<Option<Lease>, RegistryError> {
        let query = sqlx::query("SELECT * FROM leases WHERE migration = $1").bind(migration.to_string());
        self.optional(query).await?.as_ref().map(Lease::read).transpose()
    }

    /// Every lease, by migration.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn leases(&mut self) -> Result<Vec<Lease>, RegistryError> {
        let rows = self.all(sqlx::query("SELECT * FROM leases ORDER BY migration")).await?;
        rows.iter().map(Lease::read).collect()
    }

    /// Forgets the leases of migrations that are closed; returns how many there were.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn sweep_leases(&mut self) -> Result<u64, RegistryError> {
        let sql = "DELETE FROM leases WHERE migration IN (SELECT id FROM migrations WHERE is_open = 0)";
        self.execute(sqlx::query(sql)).await
    }

    async fn is_current(&mut self, holder: &Holder) -> Result<bool, RegistryError> {
        let query = sqlx::query("SELECT term FROM managers WHERE name = $1 AND term = $2")
            .bind(holder.manager.to_string())
            .bind(signed("term", holder.term)?);
        Ok(self.optional(query).await?.is_some())
    }

    async fn next_term(&mut self) -> Result<u64, RegistryError> {
        let sql = "INSERT INTO terms (id, last) VALUES (1, 1) \
                   ON CONFLICT (id) DO UPDATE SET last = terms.last + 1";
        self.execute(sqlx::query(sql)).await?;
        let row = self.optional(sqlx::query("SELECT last FROM terms WHERE id = 1")).await?;
        row.as_ref().map_or(Ok(0), |r| unsigned(r, "last"))
    }
}
