//! Stub.
/// Stub.
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct Catalogue {
    /// m
    pub machine: String,
}
impl Catalogue {
    /// v
    pub fn validate(&self) -> Result<(), String> {
        Ok(())
    }
}
/// Stub
pub const MAX_CATALOGUE_BYTES: usize = 4 << 20;
