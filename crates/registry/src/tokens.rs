//! Tokens: only their hashes are here.

use crate::error::RegistryError;
use crate::tx::{Tx, column, parsed, plain};
use sqlx::any::AnyRow;
use types::HostName;

/// A join token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinTokenRow {
    /// The host that it is for.
    pub host: HostName,
    /// Microseconds since the Unix epoch.
    pub expires_at_us: i64,
    /// When it was used.
    pub used_at_us: Option<i64>,
}

/// What came of using a join token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenUse {
    /// It is used now.
    Used,
    /// No such token for that host.
    Unknown,
    /// It was used before.
    UsedBefore,
    /// Its time is over.
    Expired,
}

/// An operator's token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiToken {
    /// Whose.
    pub name: String,
    /// Role, for policy.
    pub role: String,
    /// Microseconds since the Unix epoch.
    pub expires_at_us: Option<i64>,
    /// Tenants that it is for; it may name none.
    pub tenants: Option<Vec<String>>,
}

impl ApiToken {
    fn read(row: &AnyRow) -> Result<Self, RegistryError> {
        Ok(Self {
            name: column(row, "name")?,
            role: column(row, "role")?,
            expires_at_us: column(row, "expires_at_us")?,
            tenants: column::<Option<String>>(row, "tenants")?
                .map(|text| serde_json::from_str(&text).map_err(|e| RegistryError::malformed("tenants", e)))
                .transpose()?,
        })
    }
}

impl Tx {
    /// Adds a join token for a host.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn add_join_token(
        &mut self,
        hash: &[u8; 32],
        host: &HostName,
        expires_at_us: i64,
    ) -> Result<(), RegistryError> {
        let query = sqlx::query("INSERT INTO join_tokens (hash, host, expires_at_us) VALUES ($1, $2, $3)")
            .bind(hash.to_vec())
            .bind(host.to_string())
            .bind(expires_at_us);
        self.insert(|| "the join token".to_owned(), query).await
    }

    /// What using a join token at this time would come to. Writes nothing.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn check_join_token(
        &mut self,
        hash: &[u8; 32],
        host: &HostName,
        now_us: i64,
    ) -> Result<TokenUse, RegistryError> {
        let query = sqlx::query("SELECT * FROM join_tokens WHERE hash = $1 AND host = $2")
            .bind(hash.to_vec())
            .bind(host.to_string());
        let Some(row) = self.optional(query).await? else { return Ok(TokenUse::Unknown) };
        let token = JoinTokenRow {
            host: parsed(&row, "host")?,
            expires_at_us: column(&row, "expires_at_us")?,
            used_at_us: column(&row, "used_at_us")?,
        };
        Ok(match token.used_at_us {
            Some(_) => TokenUse::UsedBefore,
            None if token.expires_at_us <= now_us => TokenUse::Expired,
            None => TokenUse::Used,
        })
    }

    /// Uses up a join token: once, in time, for its host.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn use_join_token(
        &mut self,
        hash: &[u8; 32],
        host: &HostName,
    ) -> Result<TokenUse, RegistryError> {
        let now_us = self.now_us();
        let found = self.check_join_token(hash, host, now_us).await?;
        if found != TokenUse::Used {
            return Ok(found);
        }
        let query =
            sqlx::query("UPDATE join_tokens SET used_at_us = $2 WHERE hash = $1 AND used_at_us IS NULL")
                .bind(hash.to_vec())
                .bind(now_us);
        Ok(if self.execute(query).await? == 1 { TokenUse::Used } else { TokenUse::UsedBefore })
    }

    /// Adds (or replaces) an operator's token.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn put_api_token(&mut self, hash: &[u8; 32], token: &ApiToken) -> Result<(), RegistryError> {
        let forget = sqlx::query("DELETE FROM api_tokens WHERE name = $1").bind(plain(&token.name));
        self.execute(forget).await?;
        let sql =
            "INSERT INTO api_tokens (hash, name, role, expires_at_us, tenants) VALUES ($1, $2, $3, $4, $5)";
        let tenants = token.tenants.as_ref().map(|t| crate::tx::document_text("tenants", t)).transpose()?;
        let query = sqlx::query(sql)
            .bind(hash.to_vec())
            .bind(plain(&token.name))
            .bind(plain(&token.role))
            .bind(token.expires_at_us)
            .bind(tenants);
        self.insert(|| format!("API token {}", token.name), query).await
    }

    /// Every operator's token, by name.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn api_tokens(&mut self) -> Result<Vec<ApiToken>, RegistryError> {
        let rows = self.all(sqlx::query("SELECT * FROM api_tokens ORDER BY name")).await?;
        rows.iter().map(ApiToken::read).collect()
    }

    /// Forgets an operator's token; whether there was one.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn remove_api_token(&mut self, name: &str) -> Result<bool, RegistryError> {
        let query = sqlx::query("DELETE FROM api_tokens WHERE name = $1").bind(plain(name));
        Ok(self.execute(query).await? == 1)
    }

    /// Whose token this is.
    ///
    /// # Errors
    /// Those of the database.
    pub async fn api_token(&mut self, hash: &[u8; 32]) -> Result<Option<ApiToken>, RegistryError> {
        let query = sqlx::query("SELECT * FROM api_tokens WHERE hash = $1").bind(hash.to_vec());
        self.optional(query).await?.as_ref().map(ApiToken::read).transpose()
    }
}
