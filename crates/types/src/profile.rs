//! The inspection profile that a permit names: what is looked at beyond the rules that always hold.

use std::fmt;
use std::str::FromStr;

/// `strict`, followed by what is added to it (`+signatures`) or let through (`+report-unvouched`), in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct InspectionProfile {
    /// Guest pages are searched for signatures.
    pub signatures: bool,
    /// Devices whose layout no catalogue vouches for are let through, and named in the report, instead of refused.
    pub report_unvouched: bool,
}

/// A text that is no profile.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is no inspection profile: \"strict\", with \"+signatures\" or \"+report-unvouched\" behind it"
)]
pub struct UnknownProfile {
    /// The text.
    pub text: String,
}

impl FromStr for InspectionProfile {
    type Err = UnknownProfile;

    fn from_str(text: &str) -> Result<Self, UnknownProfile> {
        let all = [(false, false), (true, false), (false, true), (true, true)];
        all.into_iter()
            .map(|(signatures, report_unvouched)| Self { signatures, report_unvouched })
            .find(|profile| profile.to_string() == text)
            .ok_or_else(|| UnknownProfile { text: text.chars().take(80).collect() })
    }
}

impl fmt::Display for InspectionProfile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("strict")?;
        if self.signatures {
            f.write_str("+signatures")?;
        }
        if self.report_unvouched {
            f.write_str("+report-unvouched")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_profile_reads_back_and_nothing_else_does() {
        for text in
            ["strict", "strict+signatures", "strict+report-unvouched", "strict+signatures+report-unvouched"]
        {
            assert_eq!(text.parse::<InspectionProfile>().expect("a profile").to_string(), text);
        }
        for text in
            ["", "lax", "strict+", "strict+signatures+signatures", "strict+report-unvouched+signatures"]
        {
            assert!(text.parse::<InspectionProfile>().is_err(), "{text}");
        }
    }
}
