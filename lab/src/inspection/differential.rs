//! The differential check: what the inspector accepts, stock QEMU must complete, without dying, hanging or running.
//!
//! A value inside a device's state that only QEMU checks, and refuses in order, is counted by its field and kept,
//! but is no failure by itself: nothing runs, and the source goes on.
//!
//! The other way round, a sample of what it refuses is given to QEMU as well: to count what QEMU would have taken.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::{Parser, ValueEnum};
use serde_json::{Value, json};

use super::feed::{Fate, feed};
use super::gate::{self, Enrolled, Unvouched, Violation};
use super::mutate::{Base, Mutant};
use super::rng::Rng;
use super::shape::{Chipset, Device, Shape};
use super::{Stop, enrol, keep, run_folder};
use crate::qemu::{Program, Qemu, Version};

/// How long the firmware of a base runs that is not fresh: long enough to have touched its devices.
const FIRMWARE_TIME: Duration = Duration::from_millis(700);
/// Between two lines about how far it is.
const PROGRESS: Duration = Duration::from_secs(30);

/// Compare the inspector with stock QEMU on mutated streams.
#[derive(Debug, Clone, Parser)]
#[command(name = "differential")]
struct Options {
    /// How many streams.
    #[arg(long, default_value_t = 10_000)]
    count: u64,
    /// What the mutations are made from.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The QEMUs that take part.
    #[arg(long, value_enum, default_value_t = WhichVersions::Both)]
    version: WhichVersions,
    /// One in so many refused streams is given to QEMU too.
    #[arg(long, default_value_t = 4)]
    refused_sample: u64,
    /// Streams at a time.
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// A value inside a device's state that only QEMU refused is a failure as well.
    #[arg(long)]
    strict: bool,
    /// Only this case of the seed, and all about it.
    #[arg(long)]
    case: Option<u64>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum WhichVersions {
    #[value(name = "7.2")]
    V72,
    #[value(name = "10.0")]
    V10,
    Both,
}

/// The VMs whose streams are mutated; each version has each, fresh and after its firmware has run.
const BASES: [(Chipset, &[Device]); 4] = [
    (Chipset::Pc, &[]),
    (Chipset::Q35, &[]),
    (Chipset::Pc, &[Device::Net, Device::Block, Device::Rng]),
    (Chipset::Q35, &[Device::Ahci, Device::Tablet, Device::Serial, Device::Balloon, Device::Scsi]),
];

/// Something that the inspector accepted and QEMU did not complete.
#[derive(Debug, Clone)]
pub struct Difference {
    /// The case.
    pub case: u64,
    /// The base.
    pub base: String,
    /// The field that QEMU complains of, as far as it can be told, else the first that was changed.
    pub field: String,
    /// Whether that field is inside the state of a device.
    pub inside_device: bool,
    /// What QEMU did.
    pub fate: Fate,
}

/// What was counted.
#[derive(Debug, Default)]
pub struct Tally {
    /// Streams.
    pub streams: u64,
    /// Honest streams that the inspector refused; their mutations were not tried.
    pub refused_bases: Vec<String>,
    /// Accepted by the inspector; QEMU got each of them.
    pub accepted: u64,
    /// Of these, completed by QEMU.
    pub completed: u64,
    /// The others.
    pub differences: Vec<Difference>,
    /// Refused by the inspector.
    pub refused: u64,
    /// Refused, and given to QEMU.
    pub refused_fed: u64,
    /// Of these, by what QEMU did.
    pub refused_fates: BTreeMap<&'static str, u64>,
    /// Refused, by rule.
    pub rules: BTreeMap<&'static str, u64>,
    /// Refused by a rule, yet taken by QEMU.
    pub rules_qemu_lacks: BTreeMap<&'static str, u64>,
}

impl Tally {
    /// The document that ends the output.
    #[must_use]
    pub fn document(&self) -> Value {
        let (mut orderly, mut others, mut fates) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        for difference in &self.differences {
            let fields = if difference.is_orderly() { &mut orderly } else { &mut others };
            *fields.entry(difference.field.as_str()).or_insert(0u64) += 1;
            *fates.entry(difference.fate.name()).or_insert(0u64) += 1;
        }
        json!({
            "streams": self.streams,
            "honest_refused": self.refused_bases,
            "accepted": self.accepted,
            "accepted_completed": self.completed,
            "accepted_not_completed": fates,
            "values_that_only_qemu_refused_by_field": orderly,
            "unexplained_by_field": others,
            "refused": self.refused,
            "refused_fed": self.refused_fed,
            "refused_fed_fates": self.refused_fates,
            "refused_by_rule": self.rules,
            "refused_yet_taken_by_qemu_by_rule": self.rules_qemu_lacks,
        })
    }

    /// Whether the honest streams were accepted and every accepted one was completed, orderly refusals of values aside
    /// unless `strict`.
    #[must_use]
    pub fn is_sound(&self, strict: bool) -> bool {
        self.refused_bases.is_empty()
            && self.differences.iter().all(|difference| !strict && difference.is_orderly())
    }

    fn add(&mut self, case: u64, base: &Base, mutant: &Mutant, outcome: &Outcome) {
        self.streams += 1;
        match outcome {
            Outcome { verdict: Ok(()), fate: Some(Fate::Completed) } => {
                (self.accepted, self.completed) = (self.accepted + 1, self.completed + 1);
            }
            Outcome { verdict: Ok(()), fate } => {
                self.accepted += 1;
                let fate = fate.clone().unwrap_or(Fate::Hung { status: "not fed".to_owned() });
                let blamed = mutant.blamed(fate.complaint());
                self.differences.push(Difference {
                    case,
                    base: base.name.clone(),
                    field: blamed.map_or_else(String::new, |change| change.field.clone()),
                    inside_device: blamed.is_some_and(|change| change.inside_device),
                    fate,
                });
            }
            Outcome { verdict: Err(violation), fate } => {
                self.refused += 1;
                *self.rules.entry(violation.rule).or_default() += 1;
                let Some(fate) = fate else { return };
                self.refused_fed += 1;
                *self.refused_fates.entry(fate.name()).or_default() += 1;
                if matches!(fate, Fate::Completed | Fate::Runs) {
                    *self.rules_qemu_lacks.entry(violation.rule).or_default() += 1;
                }
            }
        }
    }

    fn merge(&mut self, other: Self) {
        self.streams += other.streams;
        self.accepted += other.accepted;
        self.completed += other.completed;
        self.differences.extend(other.differences);
        self.refused += other.refused;
        self.refused_fed += other.refused_fed;
        for (into, from) in [
            (&mut self.refused_fates, other.refused_fates),
            (&mut self.rules, other.rules),
            (&mut self.rules_qemu_lacks, other.rules_qemu_lacks),
        ] {
            for (key, count) in from {
                *into.entry(key).or_default() += count;
            }
        }
    }
}

impl Difference {
    /// A value inside a device's state that QEMU itself checks and refuses in order: nothing runs, the source goes
    /// on. Anything else has to be looked into.
    #[must_use]
    pub fn is_orderly(&self) -> bool {
        self.inside_device && matches!(self.fate, Fate::Refused { .. })
    }
}

impl Fate {
    fn complaint(&self) -> &str {
        match self {
            Self::Completed | Self::Runs => "",
            Self::Refused { said } | Self::Died { said } | Self::Hung { status: said } => said,
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Runs => "runs",
            Self::Refused { .. } => "refused",
            Self::Died { .. } => "died",
            Self::Hung { .. } => "hung",
        }
    }
}

/// Runs the command.
pub fn run(arguments: &[String]) -> Result<ExitCode> {
    let words = std::iter::once("differential".to_owned()).chain(arguments.iter().cloned());
    let options = match Options::try_parse_from(words) {
        Ok(options) => options,
        Err(error) => error.exit(),
    };
    let versions = match options.version {
        WhichVersions::V72 => vec![Version::V72],
        WhichVersions::V10 => vec![Version::V10],
        WhichVersions::Both => Version::ALL.to_vec(),
    };
    let stop = Stop::on_signal()?;
    let bench = Bench::new(stop.clone(), &versions)?;
    if let Some(case) = options.case {
        return bench.show(options.seed, case);
    }
    let tally = bench.many(options.seed, options.count, options.refused_sample, options.jobs)?;
    println!("{}", tally.document());
    ensure!(!stop.is_set(), "interrupted");
    Ok(ExitCode::from(u8::from(!tally.is_sound(options.strict))))
}

/// The bases and the programs that judge their mutants.
#[derive(Debug)]
pub struct Bench {
    stop: Stop,
    bases: Vec<Base>,
    refused_bases: Vec<String>,
    programs: BTreeMap<Version, Program>,
    folder: tempfile::TempDir,
}

/// The verdicts on one stream.
#[derive(Debug)]
struct Outcome {
    verdict: Result<(), Violation>,
    fate: Option<Fate>,
}

impl Bench {
    /// Records the bases and makes sure that QEMU completes each as it is. One that the inspector refuses is a false
    /// reject: it is kept, counted, and not mutated.
    pub fn new(stop: Stop, versions: &[Version]) -> Result<Self> {
        let folder = run_folder()?;
        let programs = versions.iter().map(|version| Ok((*version, version.program()?)));
        let programs: BTreeMap<_, _> = programs.collect::<Result<_>>()?;
        let mut bench = Self { stop, bases: Vec::new(), refused_bases: Vec::new(), programs, folder };
        for (version, program) in &bench.programs {
            for (chipset, devices) in BASES {
                let shape = Shape::small(*version, chipset, devices);
                let bases = record(program, &shape, bench.folder.path())
                    .with_context(|| format!("recording {}", shape.machine()))?;
                bench.bases.extend(bases);
            }
        }
        for base in std::mem::take(&mut bench.bases) {
            let fate = bench.feed(&base, &base.stream, 0)?;
            ensure!(fate == Fate::Completed, "QEMU does not complete {}: {fate:?}", base.name);
            match gate::judge(&base.enrolled, &base.stream)? {
                Ok(passed) => {
                    ensure!(passed == base.stream, "the inspector changed {}", base.name);
                    bench.bases.push(base);
                }
                Err(violation) => bench.refused_bases.push(refused_base(&base, &violation)?),
            }
        }
        Ok(bench)
    }

    fn feed(&self, base: &Base, stream: &[u8], worker: usize) -> Result<Fate> {
        let program = self.programs.get(&base.shape.from).context("the base's QEMU takes no part")?;
        feed(program, &base.shape, stream, &self.folder.path().join(format!("errors-{worker}")))
    }

    /// Cases 0 to `count` of a seed.
    pub fn many(&self, seed: u64, count: u64, refused_sample: u64, jobs: usize) -> Result<Tally> {
        let (next, begun) = (AtomicU64::new(0), Instant::now());
        let worker = |number: usize| -> Result<Tally> {
            let (mut tally, mut told) = (Tally::default(), Instant::now());
            loop {
                let case = next.fetch_add(1, Ordering::AcqRel);
                if case >= count || self.stop.is_set() {
                    return Ok(tally);
                }
                self.case(seed, case, refused_sample, number, &mut tally)
                    .with_context(|| format!("seed {seed}, case {case}"))?;
                if number == 0 && told.elapsed() > PROGRESS {
                    told = Instant::now();
                    eprintln!("{case} of {count} streams after {} s", begun.elapsed().as_secs());
                }
            }
        };
        thread::scope(|scope| {
            let workers: Vec<_> =
                (0..jobs.max(1)).map(|number| scope.spawn(move || worker(number))).collect();
            let mut whole = Tally::default();
            for worker in workers {
                let Ok(tally) = worker.join() else { bail!("a worker panicked") };
                whole.merge(tally?);
            }
            whole.differences.sort_by_key(|difference| difference.case);
            whole.refused_bases.clone_from(&self.refused_bases);
            Ok(whole)
        })
    }

    fn mutant(&self, seed: u64, case: u64) -> Result<(&Base, Mutant)> {
        let mut rng = Rng::of(seed, case);
        let base = rng.pick(&self.bases).context("there are no bases")?;
        Ok((base, base.mutate(&mut rng)))
    }

    fn case(
        &self,
        seed: u64,
        case: u64,
        refused_sample: u64,
        worker: usize,
        tally: &mut Tally,
    ) -> Result<()> {
        let (base, mutant) = self.mutant(seed, case)?;
        let verdict = gate::judge(&base.enrolled, &mutant.stream)?;
        if let Ok(passed) = &verdict {
            ensure!(*passed == mutant.stream, "what was released is not what was sent");
        }
        let verdict = verdict.map(|_| ());
        let wanted = verdict.is_ok() || (refused_sample > 0 && case.is_multiple_of(refused_sample));
        let fate = if wanted { Some(self.feed(base, &mutant.stream, worker)?) } else { None };
        let outcome = Outcome { verdict, fate };
        let differs = outcome.verdict.is_ok() && outcome.fate != Some(Fate::Completed);
        if differs {
            report(seed, case, base, &mutant, &outcome)?;
        }
        tally.add(case, base, &mutant, &outcome);
        Ok(())
    }

    /// One case, told in full.
    fn show(&self, seed: u64, case: u64) -> Result<ExitCode> {
        let (base, mutant) = self.mutant(seed, case)?;
        let verdict = gate::judge(&base.enrolled, &mutant.stream)?.map(|_| ());
        let outcome = Outcome { verdict, fate: Some(self.feed(base, &mutant.stream, 0)?) };
        report(seed, case, base, &mutant, &outcome)?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Keeps an honest stream that was refused; gives what is to be said of it.
fn refused_base(base: &Base, violation: &Violation) -> Result<String> {
    let said = format!("{}: {violation}", base.name);
    let name: String = base.name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    let folder =
        keep(&format!("honest-{name}"), &[("base.bin", &base.stream), ("note.txt", said.as_bytes())])?;
    eprintln!("FALSE REJECT of {said}: kept in {}", folder.display());
    Ok(said)
}

/// Says what happened and keeps the stream.
fn report(seed: u64, case: u64, base: &Base, mutant: &Mutant, outcome: &Outcome) -> Result<()> {
    let note = json!({
        "seed": seed,
        "case": case,
        "base": base.name,
        "changes": mutant.changes,
        "inspector": outcome.verdict.as_ref().map_or_else(ToString::to_string, |()| "accepted".to_owned()),
        "qemu": format!("{:?}", outcome.fate),
    });
    let text = serde_json::to_string_pretty(&note)?;
    let name = format!("differential-{seed}-{case}");
    let folder = keep(
        &name,
        &[("stream.bin", &mutant.stream), ("base.bin", &base.stream), ("note.json", text.as_bytes())],
    )?;
    eprintln!("seed {seed}, case {case}: kept in {}\n{text}", folder.display());
    Ok(())
}

/// The streams of one VM: fresh, and after its firmware has run.
fn record(program: &Program, shape: &Shape, folder: &Path) -> Result<[Base; 2]> {
    let mut arguments = shape.arguments(None, None);
    arguments.push("-S".to_owned());
    let mut qemu = Qemu::start(program, &arguments, &folder.join("errors-base"))?;
    let mut qmp = qemu.monitor()?;
    let fresh = enrol::record(&mut qmp, folder)?;
    qmp.execute("cont", json!({}))?;
    thread::sleep(FIRMWARE_TIME);
    qmp.execute("stop", json!({}))?;
    let ran = enrol::record(&mut qmp, folder)?;
    let devices: String = shape.devices.iter().map(|device| format!(" {device:?}")).collect();
    let name = |state: &str| format!("{} {}{devices}, {state}", shape.from.name(), shape.machine());
    let dump = enrol::dump(program, shape, folder)?;
    let mut enrolled = Enrolled::learn(&fresh, &fresh, Some(&dump))?;
    // The outer grammar and the unique cut are to be tried as well, and some controllers have no description.
    enrolled.unvouched = Unvouched::Report;
    let base = |state, stream| Base::new(&name(state), shape, stream, &enrolled);
    Ok([base("fresh", &fresh)?, base("ran", &ran)?])
}
