//! What the demo saw, judged claim by claim. Pure: the same evidence gives the same verdict.

use std::fmt::Write;

use serde_json::{Value, json};

use crate::capture::SearchReport;
use crate::client::Summary;
use crate::observer;

/// Everything that was seen.
#[derive(Debug, Clone)]
pub struct Evidence {
    /// The migration as `outrider migration show --output json` gives it.
    pub migration: Value,
    /// What the guest's user felt.
    pub client: Summary,
    /// What the outside observer saw.
    pub observed: observer::Report,
    /// Machines whose copy executed after the migration, by the observer.
    pub running_on: Vec<String>,
    /// Whether the guest still gave its secret after the migration.
    pub secret_intact: bool,
    /// Bytes captured on the migration network; 0 without a capture.
    pub captured_bytes: u64,
    /// Frames that the capture could not keep.
    pub uncaptured_frames: u64,
    /// The search of the capture.
    pub searched: SearchReport,
    /// `outrider audit verify --output json`, or why it failed.
    pub audit: Value,
    /// What was still there after the teardown.
    pub leftovers: Vec<String>,
}

/// One claim, and whether it held.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// Where it stands in the JSON document.
    pub key: &'static str,
    /// In words.
    pub says: &'static str,
    /// Whether it held.
    pub holds: bool,
    /// What was seen.
    pub seen: String,
}

impl Evidence {
    /// Where the VM ran in the end, by the observer alone.
    fn running_on(&self) -> String {
        if self.running_on.is_empty() { "nowhere".to_owned() } else { self.running_on.join("+") }
    }

    fn number(&self, key: &str) -> Option<f64> {
        self.migration[key].as_f64()
    }

    /// The claims, in the order of the report.
    #[must_use]
    pub fn claims(&self) -> Vec<Claim> {
        let mut claims = self.migration_claims();
        claims.extend(self.guest_claims());
        claims.extend(self.network_claims());
        claims.extend(self.aftermath_claims());
        claims
    }

    fn migration_claims(&self) -> Vec<Claim> {
        let m = &self.migration;
        let metrics = ["downtime_ms", "total_ms", "time_to_responsiveness_ms", "transferred_bytes"];
        let missing: Vec<_> = metrics.iter().filter(|k| !self.number(k).is_some_and(|n| n > 0.0)).collect();
        let stages: Vec<&str> =
            m["stages"].as_array().into_iter().flatten().filter_map(|s| s["name"].as_str()).collect();
        let wanted = ["setup", "memory-transfer", "switchover", "network-cleanup"];
        let digests = &m["digests"];
        let equal = digests["source"].is_string() && digests["source"] == digests["target"];
        vec![
            claim("migration.state", "the migration completed", m["state"] == "completed", &m["state"]),
            claim(
                "migration.downtime_ms",
                "the four metrics were measured",
                missing.is_empty(),
                &json!({"missing": missing}),
            ),
            claim(
                "migration.stages",
                "each stage was timed",
                wanted.iter().all(|w| stages.contains(w)),
                &json!(stages),
            ),
            claim(
                "migration.channel.protocol",
                "the stream went through TLS 1.3",
                m["channel"]["protocol"] == "TLSv1.3",
                &m["channel"],
            ),
            claim("migration.permit.id", "a permit allowed it", m["permit"]["id"].is_string(), &m["permit"]),
            claim(
                "migration.attestation",
                "both hosts proved their state with their TPMs",
                m["attestation"] == "attested",
                &m["attestation"],
            ),
            claim(
                "migration.digests.match",
                "what left the source is what reached the target",
                equal && digests["match"] == true,
                digests,
            ),
        ]
    }

    fn guest_claims(&self) -> Vec<Claim> {
        let verdict = &self.observed.verdict;
        let survived = self.client.connection_survived && self.client.requests > 0;
        vec![
            claim(
                "client.connection_survived",
                "the client's connection survived",
                survived,
                &json!(self.client),
            ),
            claim(
                "guest.running_on",
                "the guest runs on host-b and nowhere else",
                self.running_on == ["host-b"],
                &json!(self.running_on()),
            ),
            claim("guest.copies", "never did two copies run", verdict.copies == 1, &json!(verdict.copies)),
            claim(
                "guest.counter_monotonic",
                "guest state never went back in time",
                verdict.counter_monotonic,
                &json!(verdict.counter_monotonic),
            ),
            claim(
                "guest.secret_intact",
                "the guest still holds its secret",
                self.secret_intact,
                &json!(self.secret_intact),
            ),
        ]
    }

    fn network_claims(&self) -> Vec<Claim> {
        let transferred = self.number("transferred_bytes").unwrap_or(f64::INFINITY);
        #[allow(clippy::cast_precision_loss)]
        let captured = self.captured_bytes as f64;
        let whole =
            captured >= transferred && self.uncaptured_frames == 0 && self.searched.tcp_missing_bytes == 0;
        let sizes = json!({"captured": self.captured_bytes, "missed_frames": self.uncaptured_frames,
            "missed_tcp_bytes": self.searched.tcp_missing_bytes});
        let found = json!(self.searched.found);
        vec![
            claim("capture.bytes", "the capture holds the whole transfer", whole, &sizes),
            claim(
                "capture.secret_found",
                "the guest's secret never crossed the network in clear",
                !self.searched.has("secret"),
                &found,
            ),
            claim(
                "capture.qemu_magic_found",
                "nor did QEMU's stream",
                !self.searched.has("qemu_magic"),
                &found,
            ),
            claim(
                "capture.vm_identity_found",
                "nor the VM's name or UUID",
                !self.searched.has_vm_identity(),
                &found,
            ),
        ]
    }

    fn aftermath_claims(&self) -> Vec<Claim> {
        let entries = self.audit["entries"].as_u64().unwrap_or(0);
        let verified = self.audit["verified"] == true && entries > 0;
        vec![
            claim("audit.verified", "the audit log is whole", verified, &self.audit),
            claim("leftovers", "nothing is left behind", self.leftovers.is_empty(), &json!(self.leftovers)),
        ]
    }

    /// The demo's JSON document.
    #[must_use]
    pub fn document(&self, claims: &[Claim]) -> Value {
        let verdict = &self.observed.verdict;
        let failed: Vec<&str> = claims.iter().filter(|c| !c.holds).map(|c| c.key).collect();
        json!({
            "migration": self.migration,
            "client": self.client,
            "guest": {
                "running_on": self.running_on(),
                "copies": verdict.copies,
                "counter_monotonic": verdict.counter_monotonic,
                "secret_intact": self.secret_intact,
                "longest_gap_ms": verdict.longest_gap_ms,
            },
            "capture": {
                "bytes": self.captured_bytes,
                "complete": claims.iter().any(|c| c.key == "capture.bytes" && c.holds),
                "secret_found": self.searched.has("secret"),
                "qemu_magic_found": self.searched.has("qemu_magic"),
                "vm_identity_found": self.searched.has_vm_identity(),
            },
            "audit": self.audit,
            "leftovers": self.leftovers,
            "claims": {"checked": claims.len(), "failed": failed},
        })
    }

    /// The report for people.
    #[must_use]
    pub fn report(&self, claims: &[Claim]) -> String {
        let mut text = String::from("\nChecked from outside:\n");
        for claim in claims {
            let mark = if claim.holds { "yes" } else { "NO " };
            // Writing to a String can't fail.
            let _infallible = writeln!(text, "  {mark}  {}", claim.says);
        }
        let _infallible = write!(
            text,
            "\nThe client made {} requests; the longest took {:.0} ms. The observer took {} samples; the longest time\n\
             without a running copy was {:.0} ms. {} bytes were captured and searched. {} audit entries. {}.",
            self.client.requests,
            self.client.max_gap_ms,
            self.observed.samples,
            self.observed.verdict.longest_gap_ms,
            self.captured_bytes,
            self.audit["entries"],
            if self.leftovers.is_empty() { "Nothing is left behind" } else { "Something is left behind" },
        );
        text
    }
}

fn claim(key: &'static str, says: &'static str, holds: bool, seen: &Value) -> Claim {
    Claim { key, says, holds, seen: seen.to_string() }
}
