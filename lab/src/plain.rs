//! Plain QEMU's live migration between the two hosts: the baseline, and its split brain.

mod tls;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::json;

use crate::guest::GuestImage;
use crate::net::{Machine, Net};
use crate::process;
use crate::qmp::event_time_us;
use crate::relay::Relay;
use crate::vm::{Vm, VmOptions};

/// A migration of a lab guest takes seconds; on a machine that is busy with other tests, tens of them.
const MIGRATION_LIMIT: Duration = Duration::from_secs(180);
/// From the order to continue to an event that follows at once.
const SWITCHOVER_LIMIT: Duration = Duration::from_secs(60);
/// QEMU's default limit of 128 MiB/s would be measured instead of QEMU.
const BANDWIDTH_BYTES_PER_S: u64 = 10 << 30;
const PORT: u16 = 4444;

/// What carries the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// TCP in clear.
    Tcp,
    /// QEMU's own TLS with X.509 certificates and an authorisation of the source's name.
    Tls,
}

/// Figures of one migration.
#[derive(Debug, Clone, Serialize)]
pub struct Outcome {
    /// QEMU's own total time, in milliseconds.
    pub total_ms: u64,
    /// QEMU's own downtime, in milliseconds.
    pub downtime_ms: u64,
    /// From the source's STOP to the target's RESUME, in milliseconds.
    pub stop_to_resume_ms: f64,
    /// Bytes of RAM pages and headers that QEMU counts.
    pub transferred_bytes: u64,
    /// CPU time of the source's QEMU during the migration, in milliseconds (the guest's included).
    pub source_cpu_ms: u64,
    /// CPU time of the target's QEMU during the migration, in milliseconds.
    pub target_cpu_ms: u64,
}

/// A booted guest on host-a and a QEMU on host-b that waits for it.
#[derive(Debug)]
pub struct Pair {
    /// Runs the guest.
    pub source: Vm,
    /// Waits.
    pub target: Vm,
}

impl Pair {
    /// Starts both and waits until the guest serves. The target is not started with `-S`: plain QEMU, as people run it.
    pub fn start(net: &Net, image: &GuestImage, options: &VmOptions) -> Result<Self> {
        Self::start_for(net, image, options, Transport::Tcp)
    }

    /// The same, with what the transport needs.
    pub fn start_for(
        net: &Net,
        image: &GuestImage,
        options: &VmOptions,
        transport: Transport,
    ) -> Result<Self> {
        let [host_a, host_b] = Machine::HOSTS;
        let (mut for_source, mut for_target) = (options.clone(), options.target());
        if transport == Transport::Tls {
            let certificates = tls::Certificates::make(&net.run_folder().join("tls"))?;
            for_source.extra.extend(certificates.source_arguments());
            for_target.extra.extend(certificates.target_arguments());
        }
        let mut source =
            Vm::start(net.node(host_a), image, &for_source).context("starting the source's QEMU")?;
        let target = Vm::start(net.node(host_b), image, &for_target).context("starting the target's QEMU")?;
        source.wait_ready()?;
        source.enable(&["events", "return-path"])?;
        let bandwidth = json!({"max-bandwidth": BANDWIDTH_BYTES_PER_S});
        source.qmp.execute("migrate-set-parameters", bandwidth)?;
        let mut pair = Self { source, target };
        pair.target.enable(&["events", "return-path"])?;
        if transport == Transport::Tls {
            pair.source.qmp.execute("migrate-set-parameters", tls::source_parameters())?;
            pair.target.qmp.execute("migrate-set-parameters", tls::target_parameters())?;
        }
        Ok(pair)
    }

    /// Migrates over TCP (or QEMU's TLS, where the pair was started for it) and waits until the target runs.
    pub fn migrate(&mut self) -> Result<Outcome> {
        let address = Machine::HostB.migration_address();
        self.target.listen(&format!("tcp:{address}:{PORT}"))?;
        self.migrate_to(&format!("tcp:{address}:{PORT}"))
    }

    fn migrate_to(&mut self, uri: &str) -> Result<Outcome> {
        let cpu_before = (self.source.cpu_ms(), self.target.cpu_ms());
        self.source.qmp.execute("migrate", json!({"uri": uri}))?;
        let end = self.source.wait_migration(&["completed", "failed", "cancelled"], MIGRATION_LIMIT)?;
        let figures = self.source.qmp.execute("query-migrate", json!({}))?;
        ensure!(end == "completed", "the migration {end}: {}", figures["error-desc"]);
        let resume = self.target.qmp.wait_event("RESUME", SWITCHOVER_LIMIT)?;
        let cpu_after = (self.source.cpu_ms(), self.target.cpu_ms());
        let stop = self.source.qmp.wait_event("STOP", SWITCHOVER_LIMIT)?;
        Ok(Outcome {
            total_ms: figures["total-time"].as_u64().context("QEMU gave no total time")?,
            downtime_ms: figures["downtime"].as_u64().context("QEMU gave no downtime")?,
            stop_to_resume_ms: distance_ms(&stop, &resume).context("QEMU's events have no time")?,
            transferred_bytes: figures["ram"]["transferred"].as_u64().unwrap_or(0),
            source_cpu_ms: cpu_after.0.saturating_sub(cpu_before.0),
            target_cpu_ms: cpu_after.1.saturating_sub(cpu_before.1),
        })
    }

    /// Puts a relay between the two; migrate to the returned URI.
    fn relay(&mut self) -> Result<(Relay, String)> {
        let (from, to) = (self.source.socket("relay"), self.target.socket("incoming"));
        self.target.listen(&unix(&to))?;
        process::wait_for("the target to listen", SWITCHOVER_LIMIT, || Ok(to.exists().then_some(())))?;
        Ok((Relay::start(&from, &to)?, unix(&from)))
    }

    /// Migrates through an honest relay: what the demonstrations are compared with.
    pub fn migrate_through_relay(&mut self) -> Result<Outcome> {
        let (_relay, uri) = self.relay()?;
        self.migrate_to(&uri)
    }

    /// Split brain (a): whatever the target says during the switchover is dropped, then the connection ends.
    ///
    /// The target has the whole state and runs. The source misses the final acknowledgement, takes the
    /// migration for failed and runs on by itself.
    pub fn lose_reverse_direction(&mut self) -> Result<()> {
        let (relay, uri) = self.relay()?;
        self.reach_switchover(&uri)?;
        relay.drop_reverse();
        self.switch_over()?;
        self.target.qmp.wait_event("RESUME", SWITCHOVER_LIMIT)?;
        self.source.qmp.wait_event("RESUME", SWITCHOVER_LIMIT)?;
        Ok(())
    }

    /// Split brain (b): the tail of the stream is held back, the operator cancels what hangs, the tail arrives.
    ///
    /// The source's cancel succeeds and it runs on. The target can't tell a late tail from a slow network.
    pub fn withhold_tail_then_cancel(&mut self) -> Result<()> {
        let (relay, uri) = self.relay()?;
        self.reach_switchover(&uri)?;
        relay.hold_forward();
        self.switch_over()?;
        self.source.wait_migration(&["device"], SWITCHOVER_LIMIT)?;
        wait_all_taken(&relay)?;
        self.source.qmp.execute("migrate_cancel", json!({}))?;
        self.source.qmp.wait_event("RESUME", SWITCHOVER_LIMIT)?;
        relay.release_forward();
        self.target.qmp.wait_event("RESUME", SWITCHOVER_LIMIT)?;
        Ok(())
    }

    /// Migrates up to the moment when the guest has stopped and only the last bytes are missing.
    fn reach_switchover(&mut self, uri: &str) -> Result<()> {
        self.source.enable(&["pause-before-switchover"])?;
        self.source.qmp.execute("migrate", json!({"uri": uri}))?;
        let status =
            self.source.wait_migration(&["pre-switchover", "failed", "completed"], MIGRATION_LIMIT)?;
        ensure!(status == "pre-switchover", "the migration {status} before its switchover");
        Ok(())
    }

    fn switch_over(&mut self) -> Result<()> {
        self.source.qmp.execute("migrate-continue", json!({"state": "pre-switchover"}))?;
        Ok(())
    }
}

/// Waits until the relay has taken something and then nothing more for a while: QEMU has sent all it has.
fn wait_all_taken(relay: &Relay) -> Result<()> {
    /// Looks without a new byte, 5 ms apart. QEMU writes the device state in one go.
    const STILL_LOOKS: u32 = 60;
    let (mut last, mut still) = (0, 0);
    process::wait_for("the whole stream to leave the source", SWITCHOVER_LIMIT, || {
        let now = relay.taken_bytes();
        still = if now == last { still + 1 } else { 0 };
        last = now;
        Ok((still >= STILL_LOOKS && relay.held_bytes() > 0).then_some(()))
    })
}

fn unix(path: &Path) -> String {
    format!("unix:{}", path.display())
}

fn distance_ms(from: &serde_json::Value, to: &serde_json::Value) -> Option<f64> {
    let distance_us = event_time_us(to)? - event_time_us(from)?;
    // Exact: the two events are seconds apart.
    i32::try_from(distance_us).ok().map(|us| f64::from(us) / 1000.0)
}
