//! The inspection profile that a permit names: what is looked at beyond the rules that always hold.

use std::fmt;
use std::str::FromStr;

/// `strict`, followed by what is added to it (`+signatures` or `+signatures-complete`) or let through
/// (`+report-unvouched`), in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct InspectionProfile {
    /// How guest pages are searched for signatures.
    pub signatures: SignatureSearch,
    /// Devices whose layout no catalogue vouches for are let through, and named in the report, instead of refused.
    pub report_unvouched: bool,
}

/// How guest pages are searched for signatures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SignatureSearch {
    /// They are not.
    #[default]
    Off,
    /// The stream never waits: pages that come faster than they are searched pass unseen, and are counted.
    BestEffort,
    /// Every page is searched, or the migration is refused: the stream waits for the scanner.
    Complete,
}

impl SignatureSearch {
    /// Whether a scanner is needed.
    #[must_use]
    pub fn is_on(self) -> bool {
        self != Self::Off
    }
}

/// A text that is no profile.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is no inspection profile: \"strict\", with \"+signatures\" or \"+signatures-complete\", and then \
     \"+report-unvouched\" behind it"
)]
pub struct UnknownProfile {
    /// The text.
    pub text: String,
}

impl FromStr for InspectionProfile {
    type Err = UnknownProfile;

    fn from_str(text: &str) -> Result<Self, UnknownProfile> {
        use SignatureSearch::{BestEffort, Complete, Off};
        let all = [Off, BestEffort, Complete].into_iter().flat_map(|signatures| {
            [false, true].map(|report_unvouched| Self { signatures, report_unvouched })
        });
        all.into_iter()
            .find(|profile| profile.to_string() == text)
            .ok_or_else(|| UnknownProfile { text: text.chars().take(80).collect() })
    }
}

impl fmt::Display for InspectionProfile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("strict")?;
        f.write_str(match self.signatures {
            SignatureSearch::Off => "",
            SignatureSearch::BestEffort => "+signatures",
            SignatureSearch::Complete => "+signatures-complete",
        })?;
        f.write_str(if self.report_unvouched { "+report-unvouched" } else { "" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_profile_reads_back_and_nothing_else_does() {
        for text in [
            "strict",
            "strict+signatures",
            "strict+signatures-complete",
            "strict+report-unvouched",
            "strict+signatures+report-unvouched",
            "strict+signatures-complete+report-unvouched",
        ] {
            assert_eq!(text.parse::<InspectionProfile>().expect("a profile").to_string(), text);
        }
        for text in [
            "",
            "lax",
            "strict+",
            "strict+signatures+signatures",
            "strict+signatures+signatures-complete",
            "strict+signatures-complete+signatures",
            "strict+signatures-",
            "strict+report-unvouched+signatures",
        ] {
            assert!(text.parse::<InspectionProfile>().is_err(), "{text}");
        }
    }

    #[test]
    fn only_a_search_needs_a_scanner() {
        let needs = |text: &str| text.parse::<InspectionProfile>().expect("a profile").signatures.is_on();
        assert!(!needs("strict") && needs("strict+signatures") && needs("strict+signatures-complete"));
    }
}
