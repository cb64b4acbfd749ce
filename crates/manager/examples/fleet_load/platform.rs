//! Platforms of a software key: what a TPM would say, signed by a key that the registry takes for one of a TPM.

use attest::verify::{AllowedDigest, ReferencePcr};
use attest::{
    Bank, Binding, Bounded, Enrolled, Evidence, PcrDigest, PcrIndex, PcrSelection, PcrValues, Public,
    ReferenceValues,
};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};
use serde_json::json;
use std::collections::BTreeMap;

/// Nobody holds this endorsement key; nobody is asked for it after a join.
pub(crate) const EK_NAME: &str = "000b0101010101010101010101010101010101010101010101010101010101010101";

pub(crate) struct Platform {
    key: EcdsaKeyPair,
    ak: Public,
    enrolled: Enrolled,
    values: PcrValues,
}

fn pcr(index: u8) -> PcrIndex {
    PcrIndex::try_from(index).unwrap()
}

fn sized(bytes: &[u8]) -> Vec<u8> {
    [&u16::try_from(bytes.len()).unwrap().to_be_bytes()[..], bytes].concat()
}

/// `TPMT_PUBLIC` of a restricted signing key on P-256 (Part 2, 12.2.4).
fn public(point: &[u8]) -> Public {
    let head = [
        0x00, 0x23, 0x00, 0x0b, 0x00, 0x05, 0x00, 0x72, 0, 0, 0x00, 0x10, 0x00, 0x18, 0x00, 0x0b, 0, 3, 0x00,
        0x10,
    ];
    Public::parse(&[&head[..], &sized(&point[1..33]), &sized(&point[33..65])].concat()).unwrap()
}

impl Platform {
    pub(crate) fn new() -> Self {
        let document =
            EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &SystemRandom::new()).unwrap();
        let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, document.as_ref()).unwrap();
        let ak = public(key.public_key().as_ref());
        let enrolled = serde_json::from_value(json!({ "ek_name": EK_NAME, "ak": ak })).unwrap();
        let zero = PcrDigest::new(&[0; 32]).unwrap();
        let values = [0, 2, 4, 7].map(|n| (pcr(n), zero.clone()));
        let values = PcrValues::new(Bank::Sha256, values.into_iter().collect()).unwrap();
        Self { key, ak, enrolled, values }
    }

    pub(crate) fn enrolled_json(&self) -> String {
        serde_json::to_string(&self.enrolled).unwrap()
    }

    pub(crate) fn reference_json(&self) -> String {
        let allowed = |value: &PcrDigest| ReferencePcr {
            allowed: vec![AllowedDigest::always(value.clone())],
            events: Vec::new(),
        };
        let pcrs: BTreeMap<_, _> =
            self.values.values().iter().map(|(index, value)| (*index, allowed(value))).collect();
        serde_json::to_string(&ReferenceValues::new(Bank::Sha256, pcrs).unwrap()).unwrap()
    }

    /// A quote, as a TPM makes it (`TPMS_ATTEST`, Part 2, 10.12; `TPMT_SIGNATURE`, 11.3.4).
    pub(crate) fn evidence(&self, selection: &PcrSelection, binding: &Binding) -> Vec<u8> {
        let mask = selection.iter().fold(0_u32, |mask, index| mask | 1 << u8::from(index));
        let mut attest = vec![0xff, b'T', b'C', b'G', 0x80, 0x18];
        attest.extend(sized(self.enrolled.qualified_ak_name().as_bytes()));
        attest.extend(sized(&binding.qualifying_data().0));
        attest.extend(u64::try_from(crate::host::now_us() / 1_000).unwrap().to_be_bytes());
        // One reset, no restart, a safe clock; no firmware version to speak of; one bank with three bytes of registers.
        attest.extend([0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0x00, 0x0b, 3]);
        attest.extend(&mask.to_le_bytes()[..3]);
        attest.extend(sized(&self.values.quote_digest()));
        let signature = self.key.sign(&SystemRandom::new(), &attest).unwrap();
        let (r, s) = signature.as_ref().split_at(32);
        let signature = [&[0x00, 0x18, 0x00, 0x0b][..], &sized(r), &sized(s)].concat();
        let evidence = Evidence {
            attest: Bounded::new(attest).unwrap(),
            signature: Bounded::new(signature).unwrap(),
            pcrs: self.values.clone(),
            ak_public: Bounded::new(self.ak.as_bytes().to_vec()).unwrap(),
            event_log: None,
        };
        evidence.to_bytes()
    }
}
