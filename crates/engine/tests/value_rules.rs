//! The value rules against what real QEMUs send: honest values hold, wild ones are refused, and every rule's field
//! exists.

#![allow(clippy::unwrap_used)]

#[path = "support/machines.rs"]
#[allow(unreachable_pub)]
mod machines;
#[path = "support/skip.rs"]
mod skip;
#[path = "support/walk.rs"]
#[allow(unreachable_pub)]
mod walk;

use machines::{MACHINES, Runs};
use outrider_engine::inspect::devices::rule::{Breach, Expect, Fields, ValueRule, holds};
use outrider_engine::inspect::devices::rules;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use walk::Instance;

/// What no recording here has, and why. Their checks have unit tests beside them.
const NOT_RECORDED: &[(&str, &str, &str)] = &[
    ("cpu/arch_lbr", "env.msr_lbr_depth", "KVM on a processor with branch records"),
    ("cpu/kvm_nested_state", "size", "KVM with a guest that runs guests"),
    ("cpu/kvm_nested_state", "format", "KVM with a guest that runs guests"),
    ("hpet", "num_timers", "the name in QEMU 7.2; later ones say num_timers_save"),
    ("serial/tsr", "tsr_retry", "a line whose other end takes nothing"),
    ("serial/thr_ipending", "thr_ipending", "a moment between two interrupts"),
    ("serial/timeout_ipending", "timeout_ipending", "a moment between two interrupts"),
    ("serial/poll", "poll_msl", "a real serial line"),
    ("ide_bus/error", "retry_unit", "a disk with errors that stop the VM"),
    ("tpm-crb", "regs", "a TPM emulator; the corpus has one"),
    ("tpm-tis", "state.active_locty", "a TPM emulator"),
    ("tpm-tis", "state.aborting_locty", "a TPM emulator"),
    ("tpm-tis", "state.next_locty", "a TPM emulator"),
    ("tpm-tis", "state.rw_offset", "a TPM emulator"),
    ("igb", "core.rx_desc_len", "QEMU 8.0 and later"),
    ("smbus-device", "data_len", "a memory module in the middle of a message"),
    ("fdc/phase", "phase", "a floppy controller in the middle of a command"),
    ("uefi-vars", "buf_size", "QEMU 10.0 and later"),
    ("uefi-vars", "pio_xfer_offset", "QEMU 10.0 and later"),
    ("uefi-variable", "name_size", "in a list, which the stream does not describe"),
    ("uefi-variable", "data_size", "in a list, which the stream does not describe"),
    ("uefi-var-policy", "entry_size", "in a list, which the stream does not describe"),
    (
        "virtio-balloon-device/free-page-report",
        "free_page_hint_status",
        "inside virtio, which has no description",
    ),
];

struct Sample {
    name: String,
    instances: Vec<Instance>,
    /// The elements that the VM's own paused stream holds, where it was recorded.
    dry_run: Pins,
}

type Pins = BTreeMap<(String, String), Vec<u8>>;

static SAMPLES: LazyLock<Vec<Sample>> = LazyLock::new(|| {
    let mut samples = recorded();
    let here = samples.len();
    samples.extend(stored());
    println!("{here} streams recorded here, {} stored ones", samples.len() - here);
    samples
});

const QEMU: &str = "qemu-system-x86_64";

fn recorded() -> Vec<Sample> {
    let mut samples = Vec::new();
    for machine in MACHINES {
        let Some(paused) = machines::record(QEMU, machine, Runs::Nothing) else {
            skip::skip(&format!("no {QEMU} on this machine to record from"));
            return samples;
        };
        let paused = walk::instances(&paused);
        let dry_run = pins(&paused);
        let mut running = vec![(Runs::Ports, "ports written"), (Runs::Firmware, "firmware up")];
        match machines::guest() {
            Some(_) => running.push((Runs::Guest, "guest up")),
            None => skip::skip(&format!("no guest has been built for {}", machine.name)),
        }
        for (runs, what) in running {
            let name = format!("recorded {}, {what}", machine.name);
            let instances = walk::instances(&machines::record(QEMU, machine, runs).unwrap());
            samples.push(Sample { name, instances, dry_run: dry_run.clone() });
        }
        samples.push(Sample { name: format!("recorded {}", machine.name), instances: paused, dry_run });
    }
    samples
}

/// The corpus, where it is there, and the streams of the folder that `OUTRIDER_STREAMS` names.
fn stored() -> Vec<Sample> {
    let corpus = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/corpus");
    let mut files = Vec::new();
    for folder in files_in(&corpus) {
        files.extend(files_in(&folder).into_iter().filter(|file| file.to_string_lossy().contains("ch0.fwd")));
    }
    if let Some(folder) = std::env::var_os("OUTRIDER_STREAMS") {
        files.extend(files_in(Path::new(&folder)));
    }
    let samples = files.into_iter().map(|file| {
        let instances = walk::instances(&unpack(&file));
        let dry_run = pins(&instances);
        Sample { name: file.display().to_string(), instances, dry_run }
    });
    samples.filter(|sample| !sample.instances.is_empty()).collect()
}

fn files_in(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut paths: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    paths
}

fn unpack(file: &Path) -> Vec<u8> {
    let packed = std::fs::read(file).unwrap_or_default();
    let mut bytes = Vec::new();
    match file.extension().and_then(|e| e.to_str()) {
        Some("gz") => flate2::read::GzDecoder::new(&packed[..]).read_to_end(&mut bytes).map(drop).unwrap(),
        Some("xz") => xz2::read::XzDecoder::new(&packed[..]).read_to_end(&mut bytes).map(drop).unwrap(),
        _ => bytes = packed,
    }
    bytes
}

fn pins(instances: &[Instance]) -> Pins {
    let fields = instances.iter().flat_map(|i| i.fields.iter().map(move |f| (i, f)));
    fields.map(|(i, f)| ((i.path.clone(), f.name.clone()), f.bytes.clone())).collect()
}

/// Judges each element of the rule's field.
fn judge(rule: &ValueRule, instance: &Instance, dry_run: &Pins) -> Result<(), Breach> {
    let fields: Vec<_> = instance.fields.iter().map(|f| (f.name.as_str(), &f.bytes[..])).collect();
    let fields = Fields { fields: &fields };
    for field in instance.fields.iter().filter(|f| f.name == rule.field) {
        let pinned = dry_run.get(&(instance.path.clone(), field.name.clone()));
        for (n, element) in field.bytes.chunks(field.width).enumerate() {
            let pinned = pinned.and_then(|bytes| bytes.chunks(field.width).nth(n));
            holds(&rule.expect, &fields, rule.field, element, pinned)?;
        }
    }
    Ok(())
}

fn holders<'a>(rule: &'a ValueRule, sample: &'a Sample) -> impl Iterator<Item = &'a Instance> {
    let holds_it = |i: &&Instance| i.vmsd == rule.vmsd && i.fields.iter().any(|f| f.name == rule.field);
    sample.instances.iter().filter(holds_it)
}

#[test]
fn what_an_honest_source_sends_holds() {
    let mut judged = 0;
    let mut broken = Vec::new();
    for sample in SAMPLES.iter() {
        for rule in rules::all() {
            for instance in holders(rule, sample) {
                judged += 1;
                if let Err(breach) = judge(rule, instance, &sample.dry_run) {
                    broken.push(format!(
                        "{}: {}: {}.{}: {breach:?}",
                        sample.name, instance.path, rule.vmsd, rule.field
                    ));
                }
            }
        }
    }
    println!("{judged} fields judged in {} streams", SAMPLES.len());
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

#[test]
fn every_rule_is_on_a_field_that_exists() {
    if SAMPLES.is_empty() {
        return println!("skipped: nothing is recorded or stored here");
    }
    let excepted: BTreeSet<_> = NOT_RECORDED.iter().map(|(vmsd, field, _)| (*vmsd, *field)).collect();
    let missing: Vec<_> = rules::all()
        .filter(|rule| !SAMPLES.iter().any(|sample| holders(rule, sample).next().is_some()))
        .map(|rule| (rule.vmsd, rule.field))
        .filter(|rule| !excepted.contains(rule))
        .collect();
    assert!(missing.is_empty(), "no recording has {missing:#?}");
}

#[test]
fn exceptions_are_on_rules_that_exist() {
    let known: BTreeSet<_> = rules::all().map(|rule| (rule.vmsd, rule.field)).collect();
    for (vmsd, field, why) in NOT_RECORDED {
        assert!(known.contains(&(*vmsd, *field)), "no rule on {vmsd}.{field} ({why})");
    }
}

#[test]
fn every_rule_refuses_a_wild_value() {
    for rule in rules::all() {
        let recorded =
            SAMPLES.iter().flat_map(|sample| holders(rule, sample).map(|i| (i, &sample.dry_run))).next();
        let refused = match recorded {
            Some((instance, dry_run)) => {
                wild(rule, instance).any(|mutant| judge(rule, &mutant, dry_run).is_err())
            }
            None => alone(rule).any(|mutant| judge(rule, &mutant, &Pins::new()).is_err()),
        };
        assert!(
            refused,
            "no wild value of {}.{} is refused by {} ({:?})",
            rule.vmsd, rule.field, rule.rule, rule.expect
        );
    }
}

/// Numbers as wide as an element, each far from what an honest VM holds.
fn patterns(width: usize) -> Vec<Vec<u8>> {
    let ones = vec![0xff; width];
    let most = [vec![0x7f], vec![0xff; width - 1]].concat();
    let upper = (0..width).map(|n| if n < width / 2 { 0xff } else { 0 }).collect();
    let middle = (0..width).map(|n| if n + 1 == width { 7 } else { 1 }).collect();
    vec![ones, most, upper, middle, vec![0; width]]
}

/// The struct with one element of the rule's field replaced; alone, or with a neighbour that a check looks at.
fn wild<'a>(rule: &'a ValueRule, instance: &'a Instance) -> impl Iterator<Item = Instance> + 'a {
    let at = instance.fields.iter().position(|f| f.name == rule.field).unwrap();
    let field = &instance.fields[at];
    let elements = (field.bytes.len() / field.width).min(64);
    let mutants = (0..elements)
        .flat_map(move |n| patterns(field.width).into_iter().map(move |p| replaced(instance, at, n, &p)));
    let neighbours = if matches!(rule.expect, Expect::Check(_)) { instance.fields.len() } else { 0 };
    mutants.flat_map(move |mutant| {
        let both: Vec<_> = (0..neighbours).filter(|m| *m != at).map(|m| with_ones(&mutant, m)).collect();
        std::iter::once(mutant).chain(both)
    })
}

fn replaced(instance: &Instance, at: usize, n: usize, with: &[u8]) -> Instance {
    let mut mutant = instance.clone();
    let field = &mut mutant.fields[at];
    field.bytes[n * field.width..(n + 1) * field.width].copy_from_slice(with);
    mutant
}

fn with_ones(instance: &Instance, at: usize) -> Instance {
    let mut mutant = instance.clone();
    mutant.fields[at].bytes.fill(0xff);
    mutant
}

/// The rule's field without neighbours.
fn alone(rule: &ValueRule) -> impl Iterator<Item = Instance> + '_ {
    patterns(4).into_iter().map(|bytes| Instance {
        path: String::new(),
        vmsd: rule.vmsd.into(),
        fields: vec![walk::Field { name: rule.field.into(), bytes, width: 4 }],
    })
}
