//! What a permit's inspection profile asks for.

use crate::permit::PermitClaims;
use std::fmt;

/// What happens to device state that the agent parsed but that no rule vouches for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unvouched {
    /// It refuses the migration.
    Refuse,
    /// It is reported.
    Report,
}

/// How strictly a stream is looked at: `strict`, then suffixes in any order, each at most once.
///
/// | suffix | asks for |
/// |---|---|
/// | `+signatures` | signatures in guest pages, and a verdict before the device state is released |
/// | `+report-unvouched` | device state that no rule vouches for is reported instead of refused |
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InspectionProfile {
    /// Whether guest pages are looked at for signatures.
    pub signatures: bool,
    /// What happens to device state that no rule vouches for.
    pub unvouched: Unvouched,
}

/// A profile that this version does not know: it would ask for what is not done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the inspection profile {name:?} is unknown; there are strict, +signatures and +report-unvouched")]
pub struct UnknownProfile {
    /// Its name.
    pub name: String,
}

impl InspectionProfile {
    /// What holds where nothing else is asked for.
    pub const STRICT: Self = Self { signatures: false, unvouched: Unvouched::Refuse };

    /// The profile of a permit.
    ///
    /// # Errors
    /// Its name is unknown.
    pub fn of_permit(claims: &PermitClaims) -> Result<Self, UnknownProfile> {
        Self::parse(&claims.inspection_profile)
    }

    /// The profile of a name.
    ///
    /// # Errors
    /// The name is unknown.
    pub fn parse(name: &str) -> Result<Self, UnknownProfile> {
        let unknown = || UnknownProfile { name: name.chars().take(128).collect() };
        let mut words = name.split('+');
        if words.next() != Some("strict") {
            return Err(unknown());
        }
        let mut profile = Self::STRICT;
        for word in words {
            match word {
                "signatures" if !profile.signatures => profile.signatures = true,
                "report-unvouched" if profile.unvouched == Unvouched::Refuse => {
                    profile.unvouched = Unvouched::Report;
                }
                _ => return Err(unknown()),
            }
        }
        Ok(profile)
    }
}

/// The one name under which a permit carries it.
impl fmt::Display for InspectionProfile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("strict")?;
        if self.signatures {
            f.write_str("+signatures")?;
        }
        match self.unvouched {
            Unvouched::Refuse => Ok(()),
            Unvouched::Report => f.write_str("+report-unvouched"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_names_are_read_and_written() {
        let check = |name: &str, signatures, unvouched| {
            let profile = InspectionProfile { signatures, unvouched };
            assert_eq!(InspectionProfile::parse(name), Ok(profile), "{name}");
            assert_eq!(InspectionProfile::parse(&profile.to_string()), Ok(profile));
        };
        check("strict", false, Unvouched::Refuse);
        check("strict+signatures", true, Unvouched::Refuse);
        check("strict+report-unvouched", false, Unvouched::Report);
        check("strict+signatures+report-unvouched", true, Unvouched::Report);
        check("strict+report-unvouched+signatures", true, Unvouched::Report);
    }

    #[test]
    fn any_other_name_is_refused() {
        for name in [
            "",
            "default",
            "Strict",
            "strict+",
            "+signatures",
            "strict+signature",
            "strict +signatures",
            "strict+signatures+signatures",
            "strict+report-unvouched+report-unvouched",
            "lax+signatures",
        ] {
            assert_eq!(InspectionProfile::parse(name), Err(UnknownProfile { name: name.to_owned() }));
        }
    }
}
