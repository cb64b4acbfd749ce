//! What a reconciliation from the hosts writes, which nothing else may: locations as they are, epochs above all that were
//! seen, and everything used up that may have been used since.

use crate::error::RegistryError;
use crate::tx::{Tx, signed, variant_text};
use crate::vms::Location;
use types::VmId;
use types::vm::VmState;

impl Tx {
    /// Puts a VM where its host says that it is, whatever was on record.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn adopt_location(
        &mut self,
        vm: VmId,
        at: Option<&Location>,
        state: VmState,
    ) -> Result<(), RegistryError> {
        let query = match at {
            Some(at) => {
                let sql = "UPDATE vms SET host = $2, epoch = $3, state = $4, \
                           next_epoch = CASE WHEN next_epoch > $3 THEN next_epoch ELSE $3 + 1 END WHERE uuid = $1";
                sqlx::query(sql)
                    .bind(vm.to_string())
                    .bind(at.host.to_string())
                    .bind(signed("epoch", at.epoch.0)?)
                    .bind(variant_text(&state))
            }
            None => sqlx::query("UPDATE vms SET host = NULL, state = $2 WHERE uuid = $1")
                .bind(vm.to_string())
                .bind(variant_text(&state)),
        };
        self.execute(query).await.map(|_| ())
    }

    /// Gives out no epoch of a VM below this one any more.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn raise_next_epoch(&mut self, vm: VmId, to: u64) -> Result<(), RegistryError> {
        let query = sqlx::query("UPDATE vms SET next_epoch = $2 WHERE uuid = $1 AND next_epoch < $2")
            .bind(vm.to_string())
            .bind(signed("next_epoch", to)?);
        self.execute(query).await.map(|_| ())
    }

    /// Counts every permit and every join token as used. Returns how many were not.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn burn_everything(&mut self) -> Result<(u64, u64), RegistryError> {
        let now_us = self.now_us();
        let permits = sqlx::query("UPDATE permits SET consumed_at_us = $1 WHERE consumed_at_us IS NULL");
        let permits = self.execute(permits.bind(now_us)).await?;
        let tokens = sqlx::query("UPDATE join_tokens SET used_at_us = $1 WHERE used_at_us IS NULL");
        let tokens = self.execute(tokens.bind(now_us)).await?;
        Ok((permits, tokens))
    }
}
