//! Why a platform is not trusted: codes for programs, text for people.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $text:literal;)*) => {
        /// A stable code. It never changes its meaning.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum ReasonCode { $($(#[$doc])* #[serde(rename = $text)] $variant,)* }

        impl ReasonCode {
            /// Every code, for documentation and tests.
            pub const ALL: &'static [Self] = &[$(Self::$variant),*];
            /// The text of the code.
            #[must_use]
            pub const fn as_str(self) -> &'static str { match self { $(Self::$variant => $text),* } }
        }
    };
}

codes! {
    /// A part of the evidence is not well formed.
    MalformedEvidence = "attest-malformed-evidence";
    /// The attestation was not made by a TPM.
    NotTpmGenerated = "attest-not-tpm-generated";
    /// The attestation is not that of a quote.
    NotAQuote = "attest-not-a-quote";
    /// The attestation key is not the enrolled one.
    AkNotEnrolled = "attest-ak-not-enrolled";
    /// The attestation key could sign what its TPM did not make, or could leave its TPM.
    AkUnfit = "attest-ak-unfit";
    /// The signature is not by the attestation key over these bytes.
    BadSignature = "attest-bad-signature";
    /// The signer is not the enrolled key below the enrolled endorsement key.
    WrongSigner = "attest-wrong-signer";
    /// The quote is about something else: another nonce, purpose, migration, host or key.
    WrongBinding = "attest-wrong-binding";
    /// The quote is not of exactly the bank and the registers that were asked for.
    WrongSelection = "attest-wrong-selection";
    /// The values sent are not of exactly the registers that are quoted.
    WrongValues = "attest-wrong-values";
    /// The values sent are not those that were signed.
    PcrDigestDiffers = "attest-pcr-digest-differs";
    /// A register holds a value that is not allowed now.
    PcrMismatch = "attest-pcr-mismatch";
    /// The event log is not one.
    MalformedEventLog = "attest-malformed-event-log";
    /// The TPM's counter of resets or restarts went back.
    CounterBackwards = "attest-counter-backwards";
    /// The TPM's clock went back.
    ClockBackwards = "attest-clock-backwards";
    /// The platform was started anew since it was last appraised, where that was not allowed.
    Restarted = "attest-restarted";
}

impl fmt::Display for ReasonCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// One reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reason {
    /// For programs.
    pub code: ReasonCode,
    /// For people: what was found, and where that helps, what to do.
    pub detail: String,
}

impl Reason {
    pub(crate) fn new(code: ReasonCode, detail: impl fmt::Display) -> Self {
        Self { code, detail: detail.to_string() }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.detail, self.code)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_code_is_documented_and_read_back() {
        let page = include_str!("../../../../docs/attestation.md");
        for code in ReasonCode::ALL {
            assert!(page.contains(&format!("| `{code}` |")), "{code} is missing in docs/attestation.md");
            let json = serde_json::to_string(code).unwrap();
            assert_eq!(json, format!("\"{code}\""));
            assert_eq!(serde_json::from_str::<ReasonCode>(&json).unwrap(), *code);
        }
    }
}
