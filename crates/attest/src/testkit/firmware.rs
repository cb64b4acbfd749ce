//! Writes event logs as a PC's firmware does, for tests.

use crate::pcr::{Bank, PcrDigest, PcrIndex};

/// A log that is being written: the header of a crypto-agile log with SHA-1, SHA-256 and SHA-384, then
/// events.
#[derive(Debug, Clone)]
pub struct FirmwareLog(Vec<u8>);

impl Default for FirmwareLog {
    fn default() -> Self {
        let mut log = Self(Vec::new());
        let mut data = b"Spec ID Event03\0".to_vec();
        // A client platform, version 2.0 errata 0, 64-bit, three algorithms.
        data.extend([0, 0, 0, 0, 0, 2, 0, 2, 3, 0, 0, 0]);
        data.extend([4, 0, 20, 0, 0x0b, 0, 32, 0, 0x0c, 0, 48, 0]);
        data.push(0);
        log.u32(0).u32(3).0.extend([0; 20]);
        log.long(&data);
        log
    }
}

impl FirmwareLog {
    /// Logs that PCR 0 was started from a locality.
    #[must_use]
    pub fn started_from(mut self, locality: u8) -> Self {
        self.event(0, 3, [&[0; 20][..], &[0; 32], &[0; 48]]);
        self.long(&[b"StartupLocality\0", &[locality][..]].concat());
        self
    }

    /// Logs an event whose digests are those of its data.
    #[must_use]
    pub fn measure(mut self, pcr: PcrIndex, kind: u32, data: &[u8]) -> Self {
        let (sha256, sha384) = (digest(Bank::Sha256, data), digest(Bank::Sha384, data));
        // SHA-1 is carried and never looked at.
        self.event(u8::from(pcr).into(), kind, [&[0x51; 20], sha256.as_bytes(), sha384.as_bytes()]);
        self.long(data);
        self
    }

    /// The bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        self.0.clone()
    }

    fn event(&mut self, pcr: u32, kind: u32, digests: [&[u8]; 3]) {
        self.u32(pcr).u32(kind).u32(3);
        for (algorithm, digest) in [4_u16, 0x0b, 0x0c].into_iter().zip(digests) {
            self.0.extend(algorithm.to_le_bytes());
            self.0.extend(digest);
        }
    }

    fn u32(&mut self, value: u32) -> &mut Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    fn long(&mut self, data: &[u8]) {
        let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
        self.u32(length).0.extend(data);
    }
}

/// What an event with these data extends a register with.
#[must_use]
pub fn digest(bank: Bank, data: &[u8]) -> PcrDigest {
    bank.hash(data)
}
