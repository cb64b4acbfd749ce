//! A host's TPM: a real one (swtpm), asked as a daemon asks it, or as a liar does.

use attest::enrol::Application;
use attest::testkit::{Forge, Swtpm};
use attest::tpm::{AkBlobs, LoadedAk, Tpm};
use attest::{Binding, Evidence, PcrDigest, PcrIndex, PcrSelection};
use std::sync::Mutex;
use tempfile::TempDir;

/// How a host answers a question about its platform.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Candour {
    /// Truly.
    #[default]
    Honest,
    /// With a quote over another nonce.
    OldNonce,
    /// With a quote over another key of the connection, as one relayed from another machine carries.
    OtherConnection,
    /// With a quote over another VM agent's key.
    OtherAgent,
    /// With bytes that are no evidence.
    Garbage,
    /// With a quote of fewer registers than asked.
    FewerRegisters,
    /// With its TPM's refusal.
    Busy,
}

pub(crate) struct FakeTpm {
    swtpm: Mutex<Swtpm>,
    blobs: AkBlobs,
    open: Mutex<Option<(Tpm, LoadedAk)>>,
}

impl FakeTpm {
    pub(crate) fn start() -> Self {
        let swtpm = Swtpm::start().unwrap();
        let mut tpm = swtpm.tpm().unwrap();
        let blobs = tpm.create_ak().unwrap();
        let ak = tpm.load_ak(&blobs).unwrap();
        Self { swtpm: Mutex::new(swtpm), blobs, open: Mutex::new(Some((tpm, ak))) }
    }

    /// What its state is now.
    pub(crate) fn copy_state(&self) -> TempDir {
        let copy = tempfile::tempdir().unwrap();
        self.swtpm.lock().unwrap().copy_state(copy.path()).unwrap();
        copy
    }

    /// Its machine is switched off and on; with another state, where one is given.
    pub(crate) fn power_cycle(&self, state: Option<&TempDir>) {
        let mut open = self.open.lock().unwrap();
        drop(open.take());
        let mut swtpm = self.swtpm.lock().unwrap();
        swtpm.power_off();
        if let Some(state) = state {
            swtpm.put_state_back(state.path()).unwrap();
        }
        swtpm.power_on().unwrap();
        let mut tpm = swtpm.tpm().unwrap();
        let ak = tpm.load_ak(&self.blobs).unwrap();
        *open = Some((tpm, ak));
    }

    fn with<T>(&self, act: impl FnOnce(&mut Tpm, &LoadedAk) -> T) -> T {
        let mut open = self.open.lock().unwrap();
        let (tpm, ak) = open.as_mut().unwrap();
        act(tpm, ak)
    }

    pub(crate) fn ek_name(&self) -> String {
        self.with(|tpm, _| tpm.ek().unwrap().name().to_string())
    }

    pub(crate) fn application(&self) -> Application {
        self.with(|tpm, ak| Application {
            ek: tpm.ek().unwrap(),
            ek_certificate: None,
            intermediates: Vec::new(),
            ak: ak.public().clone(),
        })
    }

    pub(crate) fn activate(&self, challenge_json: &str) -> Option<Vec<u8>> {
        let challenge = serde_json::from_str(challenge_json).unwrap();
        self.with(|tpm, ak| tpm.activate_credential(ak, &challenge).ok().map(|secret| secret.to_vec()))
    }

    pub(crate) fn evidence(&self, selection: &PcrSelection, binding: &Binding) -> Evidence {
        self.with(|tpm, ak| tpm.evidence(ak, selection, &binding.qualifying_data(), None).unwrap())
    }

    /// What a program that was not there before leaves behind.
    pub(crate) fn extend(&self, pcr: u8) {
        self.with(|tpm, _| {
            tpm.extend(PcrIndex::try_from(pcr).unwrap(), &PcrDigest::new(&[7; 32]).unwrap()).unwrap()
        });
    }
}
