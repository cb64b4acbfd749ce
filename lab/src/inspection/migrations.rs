//! Real migrations through the inspector: none may be refused.
//!
//! One VM moves several times, each target being the next source, since booting costs more than moving. Its
//! inventory is enrolled once, by a dry run of the QEMU that it starts with, and holds for every hop; how device state
//! is read is learned from a dry run of each target's QEMU.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, ValueEnum};
use serde_json::{Value, json};

use super::gate::{Enrolled, Gate, MAX_MULTIFD_CHANNELS, Unvouched};
use super::passage::{Passage, Report};
use super::shape::{Device, Hop, Shape, Versions};
use super::{Stop, enrol, keep, run_folder};
use crate::guest::GuestImage;
use crate::process;
use crate::qemu::{Program, Qemu, Version};
use crate::qmp::Qmp;

/// Boots take 4 s on a quiet machine.
const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// A small guest, on a machine that is busy with other things.
const MIGRATION_LIMIT: Duration = Duration::from_secs(90);
const ALIVE_LIMIT: Duration = Duration::from_secs(60);
/// QEMU's default of 128 MiB/s would only make the runs longer.
const BANDWIDTH_BYTES_PER_S: u64 = 10 << 30;

/// Migrate real VMs of random shapes through the inspector.
#[derive(Debug, Clone, Parser)]
#[command(name = "inspect-migrations")]
struct Options {
    /// How many migrations.
    #[arg(long, default_value_t = 300)]
    count: u64,
    /// What the shapes are made from.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The QEMUs that take part.
    #[arg(long, value_enum, default_value_t = WhichVersions::Both)]
    version: WhichVersions,
    /// The most channels besides the main one.
    #[arg(long, default_value_t = MAX_MULTIFD_CHANNELS)]
    max_multifd: u16,
    /// Only report devices whose layout nothing vouches for, instead of refusing them.
    #[arg(long)]
    report_unvouched: bool,
    /// Only this case of the seed (what a message about a refusal names).
    #[arg(long)]
    case: Option<u64>,
    /// VMs at a time.
    #[arg(long, default_value_t = 2)]
    jobs: usize,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum WhichVersions {
    #[value(name = "7.2")]
    V72,
    #[value(name = "10.0")]
    V10,
    Both,
}

/// What was counted.
#[derive(Debug, Default)]
pub struct Tally {
    /// Migrations that were accepted and whose guest lives.
    pub accepted: u64,
    /// Migrations that the inspector refused.
    pub false_rejects: u64,
    /// Migrations that went wrong otherwise.
    pub other_failures: u64,
    /// VMs.
    pub vms: u64,
    /// Migrations by where from and where to, by kind of guest, by number of channels.
    pub by: BTreeMap<String, u64>,
    /// How long device state was held, in milliseconds.
    pub holds_ms: Vec<f64>,
    /// Largest held device state.
    pub max_held_bytes: usize,
}

impl Tally {
    fn total(&self) -> u64 {
        self.accepted + self.false_rejects + self.other_failures
    }

    /// The document that ends the output.
    #[must_use]
    pub fn document(&self) -> Value {
        let mut holds = self.holds_ms.clone();
        holds.sort_by(f64::total_cmp);
        json!({
            "migrations": self.total(),
            "accepted": self.accepted,
            "false_rejects": self.false_rejects,
            "other_failures": self.other_failures,
            "vms": self.vms,
            "hold_ms_median": holds.get(holds.len() / 2),
            "hold_ms_max": holds.last(),
            "held_bytes_max": self.max_held_bytes,
            "by": self.by,
        })
    }
}

/// Runs the command.
pub fn run(arguments: &[String]) -> Result<ExitCode> {
    let words = std::iter::once("inspect-migrations".to_owned()).chain(arguments.iter().cloned());
    let options = match Options::try_parse_from(words) {
        Ok(options) => options,
        Err(error) => error.exit(),
    };
    let versions = match options.version {
        WhichVersions::V72 => Versions::Only(Version::V72),
        WhichVersions::V10 => Versions::Only(Version::V10),
        WhichVersions::Both => Versions::Both,
    };
    let mut lab = Lab::new(Stop::on_signal()?, versions)?;
    lab.max_multifd = options.max_multifd;
    lab.report_unvouched = options.report_unvouched;
    let tally = match options.case {
        Some(case) => lab.one(options.seed, case)?,
        None => lab.many(options.seed, options.count, options.jobs)?,
    };
    println!("{}", tally.document());
    ensure!(!lab.stop.is_set(), "interrupted");
    Ok(ExitCode::from(u8::from(tally.accepted != tally.total())))
}

/// What the runs share.
#[derive(Debug)]
pub struct Lab {
    stop: Stop,
    versions: Versions,
    max_multifd: u16,
    report_unvouched: bool,
    programs: BTreeMap<Version, Program>,
    image: GuestImage,
    folder: tempfile::TempDir,
}

impl Lab {
    /// Finds what is needed; the error says what is missing.
    pub fn new(stop: Stop, versions: Versions) -> Result<Self> {
        let wanted = match versions {
            Versions::Only(version) => vec![version],
            Versions::Both => Version::ALL.to_vec(),
        };
        let programs = wanted.into_iter().map(|version| Ok((version, version.program()?)));
        let programs = programs.collect::<Result<_>>()?;
        let folder = run_folder()?;
        let image = GuestImage::locate()?.ticking(folder.path())?;
        let max_multifd = MAX_MULTIFD_CHANNELS;
        Ok(Self { stop, versions, max_multifd, report_unvouched: false, programs, image, folder })
    }

    /// As many VMs as it takes for this many migrations.
    pub fn many(&self, seed: u64, count: u64, jobs: usize) -> Result<Tally> {
        let tally = Mutex::new(Tally::default());
        let (next_case, planned) = (AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            let worker = || -> Result<()> {
                while !self.stop.is_set() {
                    let case = next_case.fetch_add(1, Ordering::AcqRel);
                    let mut shape = Shape::of(seed, case, self.versions, self.max_multifd);
                    let hops = shape.hops.len();
                    let before = planned.fetch_add(hops as u64, Ordering::AcqRel);
                    let left = usize::try_from(count.saturating_sub(before)).unwrap_or(hops);
                    if left == 0 {
                        break;
                    }
                    shape.hops.truncate(left);
                    self.vm(&shape, &tally)
                        .with_context(|| format!("seed {seed}, case {case}: {shape:?}"))?;
                }
                Ok(())
            };
            let workers: Vec<_> = (0..jobs.max(1)).map(|_| scope.spawn(worker)).collect();
            workers.into_iter().try_for_each(|worker| match worker.join() {
                Ok(result) => result,
                Err(_) => bail!("a worker panicked"),
            })
        })?;
        Ok(tally.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    fn one(&self, seed: u64, case: u64) -> Result<Tally> {
        let tally = Mutex::new(Tally::default());
        let shape = Shape::of(seed, case, self.versions, self.max_multifd);
        eprintln!("{}", serde_json::to_string_pretty(&shape)?);
        self.vm(&shape, &tally)?;
        Ok(tally.into_inner().unwrap_or_else(PoisonError::into_inner))
    }

    /// One VM and its hops; a failed one ends its journey.
    fn vm(&self, shape: &Shape, tally: &Mutex<Tally>) -> Result<()> {
        let folder = self.folder.path().join(format!("vm{}", shape.case));
        std::fs::create_dir(&folder).with_context(|| format!("making {}", folder.display()))?;
        let result = self.journey(shape, &folder, tally);
        // What matters was kept elsewhere; the rest would fill the disk.
        std::fs::remove_dir_all(&folder).with_context(|| format!("removing {}", folder.display()))?;
        result
    }

    fn journey(&self, shape: &Shape, folder: &Path, tally: &Mutex<Tally>) -> Result<()> {
        let mut records = Records::new(self, shape, folder)?;
        let mut source = self.start(shape, shape.from, folder, "start", false)?;
        if shape.boots {
            source.wait_tick(BOOT_LIMIT).context("booting the guest")?;
        }
        count(tally, |tally| tally.vms += 1);
        let mut from = shape.from;
        for (number, hop) in shape.hops.iter().enumerate() {
            if self.stop.is_set() {
                return Ok(());
            }
            let place = Place { shape, folder, number };
            let enrolled = records.of_target(hop.to)?;
            let (target, outcome) = self.hop(&mut source, hop, &place, enrolled)?;
            let kind = if shape.boots { "booted" } else { "fresh" };
            count(tally, |tally| {
                let route = format!("{} to {}", from.name(), hop.to.name());
                for key in [route, kind.to_owned(), format!("multifd {}", hop.multifd_channels)] {
                    *tally.by.entry(key).or_default() += 1;
                }
                outcome.count(tally);
            });
            if !outcome.is_good() {
                outcome.explain(&place, hop)?;
                return Ok(());
            }
            (source, from) = (target, hop.to);
        }
        Ok(())
    }

    fn program(&self, version: Version) -> Result<&Program> {
        self.programs.get(&version).with_context(|| format!("QEMU {} takes no part", version.name()))
    }

    /// One migration. The error is for what is the lab's own trouble.
    fn hop(
        &self,
        source: &mut Machine,
        hop: &Hop,
        place: &Place<'_>,
        enrolled: &Enrolled,
    ) -> Result<(Machine, Outcome)> {
        let name = format!("hop{}", place.number);
        let mut target = self.start(place.shape, hop.to, place.folder, &name, true)?;
        let (from, to) = (place.folder.join(format!("{name}.from")), place.folder.join(format!("{name}.to")));
        for machine in [&mut *source, &mut target] {
            machine.prepare(hop.multifd_channels)?;
        }
        target.qmp.execute("migrate-incoming", json!({"uri": format!("unix:{}", to.display())}))?;
        let passage =
            Passage::open(&from, &to, Gate::new(enrolled, hop.multifd_channels)?, hop.multifd_channels)?;
        source.qmp.execute("migrate", json!({"uri": format!("unix:{}", from.display())}))?;
        let ends = ["completed", "failed", "cancelled"];
        let source_end = source.wait_migration(&ends);
        let target_end = if source_end.as_ref().is_ok_and(|end| end == "completed") {
            target.wait_migration(&ends)
        } else {
            Ok("not asked".to_owned())
        };
        let report = passage.close();
        let mut outcome = Outcome { report, problem: None };
        let both = (source_end, target_end);
        if !matches!(&both, (Ok(source), Ok(target)) if source == "completed" && target == "completed") {
            let said = [source.qemu.said(), target.qemu.said()];
            outcome.problem = Some(format!("ends: {both:?}; source and target say {said:?}"));
        } else if let Err(error) = target.wait_alive(place.shape.boots) {
            outcome.problem = Some(format!("{error:#}; the target says {:?}", target.qemu.said()));
        }
        Ok((target, outcome))
    }

    fn start(
        &self,
        shape: &Shape,
        version: Version,
        folder: &Path,
        name: &str,
        incoming: bool,
    ) -> Result<Machine> {
        let console = folder.join(format!("{name}.console"));
        let mut arguments = shape.arguments(Some(&self.image), Some(&console));
        if incoming {
            arguments.extend(["-incoming", "defer"].map(str::to_owned));
        }
        if incoming || !shape.boots {
            arguments.push("-S".to_owned());
        }
        let errors = folder.join(format!("{name}.errors"));
        let mut qemu = Qemu::start(self.program(version)?, &arguments, &errors)?;
        let qmp = qemu.monitor()?;
        Ok(Machine { qemu, qmp, console })
    }
}

fn count(tally: &Mutex<Tally>, change: impl FnOnce(&mut Tally)) {
    change(&mut tally.lock().unwrap_or_else(PoisonError::into_inner));
}

/// What a VM's streams are compared with: one inventory for its life, one catalogue for each target's version.
struct Records<'a> {
    lab: &'a Lab,
    shape: &'a Shape,
    folder: &'a Path,
    source_dry_run: Vec<u8>,
    by_target: BTreeMap<Version, Enrolled>,
}

impl<'a> Records<'a> {
    fn new(lab: &'a Lab, shape: &'a Shape, folder: &'a Path) -> Result<Self> {
        let source_dry_run = enrol::dry_run(lab.program(shape.from)?, shape, Some(&lab.image), folder)?;
        Ok(Self { lab, shape, folder, source_dry_run, by_target: BTreeMap::new() })
    }

    fn of_target(&mut self, version: Version) -> Result<&Enrolled> {
        let Self { lab, shape, folder, source_dry_run, by_target } = self;
        match by_target.entry(version) {
            Entry::Occupied(known) => Ok(known.into_mut()),
            Entry::Vacant(unknown) => {
                let program = lab.program(version)?;
                let dry_run = enrol::dry_run(program, shape, Some(&lab.image), folder)?;
                let dump = enrol::dump(program, shape, folder)?;
                let mut enrolled = Enrolled::learn(source_dry_run, &dry_run, Some(&dump))?;
                // Its state is written by hand; who uses it in earnest has to allow it as well.
                if lab.report_unvouched || shape.devices.contains(&Device::UserNet) {
                    enrolled.unvouched = Unvouched::Report;
                }
                Ok(unknown.insert(enrolled))
            }
        }
    }
}

/// Which migration this is.
struct Place<'a> {
    shape: &'a Shape,
    folder: &'a Path,
    number: usize,
}

struct Outcome {
    report: Report,
    /// What went wrong outside the inspector, if anything.
    problem: Option<String>,
}

impl Outcome {
    fn is_good(&self) -> bool {
        self.problem.is_none() && matches!(self.report.verdict, Some(Ok(())))
    }

    fn count(&self, tally: &mut Tally) {
        match (&self.report.verdict, &self.problem) {
            (Some(Err(_)), _) => tally.false_rejects += 1,
            (Some(Ok(())), None) => tally.accepted += 1,
            _ => tally.other_failures += 1,
        }
        tally.holds_ms.extend(self.report.hold.map(|hold| hold.as_secs_f64() * 1e3));
        tally.max_held_bytes = tally.max_held_bytes.max(self.report.held_bytes);
    }

    /// Says what happened and keeps the streams.
    fn explain(&self, place: &Place<'_>, hop: &Hop) -> Result<()> {
        let note = json!({
            "shape": place.shape,
            "hop": place.number,
            "to": hop,
            "verdict": format!("{:?}", self.report.verdict),
            "trouble": self.report.trouble,
            "problem": self.problem,
        });
        let text = serde_json::to_string_pretty(&note)?;
        let names: Vec<_> =
            (0..self.report.taken.len()).map(|channel| format!("channel-{channel}.bin")).collect();
        let mut files: Vec<(&str, &[u8])> = vec![("note.json", text.as_bytes())];
        files.extend(names.iter().map(String::as_str).zip(self.report.taken.iter().map(Vec::as_slice)));
        let shape = place.shape;
        let name = format!("migration-{}-{}-{}", shape.seed, shape.case, place.number);
        let folder = keep(&name, &files)?;
        let refused = matches!(self.report.verdict, Some(Err(_)));
        let word = if refused { "FALSE REJECT" } else { "FAILED" };
        eprintln!("{word} seed {} case {}: kept in {}\n{text}", shape.seed, shape.case, folder.display());
        Ok(())
    }
}

/// A QEMU with a guest.
struct Machine {
    qemu: Qemu,
    qmp: Qmp,
    console: std::path::PathBuf,
}

impl Machine {
    fn prepare(&mut self, multifd_channels: u16) -> Result<()> {
        let capability = |name: &str, state: bool| json!({"capability": name, "state": state});
        let capabilities = json!({"capabilities": [capability("return-path", true), capability("multifd", multifd_channels > 0)]});
        self.qmp.execute("migrate-set-capabilities", capabilities)?;
        let mut parameters = json!({"max-bandwidth": BANDWIDTH_BYTES_PER_S});
        if multifd_channels > 0 {
            parameters["multifd-channels"] = multifd_channels.into();
        }
        self.qmp.execute("migrate-set-parameters", parameters)?;
        Ok(())
    }

    fn wait_migration(&mut self, words: &[&str]) -> Result<String> {
        let qmp = &mut self.qmp;
        process::wait_for("the migration's end", MIGRATION_LIMIT, || {
            let status = qmp.migration_status()?;
            Ok(words.contains(&status.as_str()).then_some(status))
        })
    }

    /// Continues the guest and waits for a sign of it: a tick of one that was booted, else that QEMU runs it.
    fn wait_alive(&mut self, boots: bool) -> Result<()> {
        self.qmp.execute("cont", json!({})).context("continuing the guest")?;
        if boots {
            self.wait_tick(ALIVE_LIMIT).context("after the migration")?;
        }
        let status = self.qmp.status()?;
        ensure!(status == "running", "the guest is {status}");
        Ok(())
    }

    /// Waits until the guest has said something since this QEMU was started.
    fn wait_tick(&self, limit: Duration) -> Result<()> {
        let begun = Instant::now();
        process::wait_for("a tick of the guest", limit, || {
            let text = std::fs::read(&self.console).unwrap_or_default();
            Ok(memchr::memmem::find(&text, b"TICK").map(|_| ()))
        })
        .with_context(|| {
            format!("after {} ms; QEMU says {:?}", begun.elapsed().as_millis(), self.qemu.said())
        })
    }
}
