//! `outrider inspect`: the inspector of the VM agent on recorded streams, offline.

mod recording;
mod report;

use crate::args::{Compression, Format, Inspect};
use crate::error::{Error, InputError, chain};
use crate::output;
use engine::inspect::devices::{Unvouched, compile};
use engine::inspect::{
    Inspector, LearnError, Learned, Learner, Limits, Multifd, Refused, Unsupported, Violation,
};
use recording::Recording;
use report::{PagesView, Report, SectionView, Verdict, ViolationView};
use std::path::Path;
use types::inventory::{Enrolment, Inventory};
use types::layout::MAX_CATALOGUE_BYTES;
use wire::qemu::multifd::Method;
use wire::qemu::return_path::{Decoder, PrecopyReturn};

/// Accepted, or learned.
const DONE: u8 = 0;
/// Rejected.
const REJECTED: u8 = 1;
/// An enrolment is a catalogue and an inventory.
const MAX_ENROLMENT_BYTES: u64 = 2 * MAX_CATALOGUE_BYTES as u64;

/// A VM is enrolled from a recording of a fresh, small one; its pages are of no interest.
const MAX_LEARNED_BYTES: usize = 1 << 30;
/// `-dump-vmstate` writes under a megabyte.
const MAX_DUMP_BYTES: usize = 16 << 20;

/// Runs the command.
pub(crate) fn run(args: &Inspect, format: Format) -> Result<u8, Error> {
    let report = if args.learn {
        match learn_enrolment(args)? {
            Ok(enrolment) => {
                output::print_json(&enrolment);
                return Ok(DONE);
            }
            Err(violation) => rejected_early(violation),
        }
    } else {
        inspect(args)?
    };
    output::print(format, &report, report::render);
    Ok(if report.verdict == Verdict::Accept { DONE } else { REJECTED })
}

fn learn_enrolment(args: &Inspect) -> Result<Result<Enrolment, Violation>, Error> {
    let inventory = match learn(&args.main, &args.hypervisor)? {
        Ok(learned) => learned.inventory,
        Err(violation) => return Ok(Err(violation)),
    };
    let dump = args.dump_vmstate.as_deref().map(|path| read_whole(path, MAX_DUMP_BYTES)).transpose()?;
    let recording = read_whole(&args.main, MAX_LEARNED_BYTES)?;
    let catalogue = compile(&recording, dump.as_deref(), &args.hypervisor)
        .map_err(|error| malformed(&args.main, chain(&error).join(": ")))?;
    Ok(Ok(Enrolment { inventory, catalogue: Some(catalogue) }))
}

fn read_whole(path: &Path, limit_bytes: usize) -> Result<Vec<u8>, InputError> {
    let (mut recording, mut all) = (Recording::open(path)?, Vec::new());
    loop {
        let piece = recording.piece()?;
        if piece.is_empty() {
            return Ok(all);
        }
        if all.len() + piece.len() > limit_bytes {
            return Err(InputError::TooLarge { path: path.to_owned(), limit_bytes: limit_bytes as u64 });
        }
        all.extend_from_slice(piece);
    }
}

/// What a recording says of its own VM; a recording that breaks the grammar is a verdict, not an error.
fn learn(path: &Path, hypervisor: &str) -> Result<Result<Learned, Violation>, Error> {
    let (mut recording, mut learner) = (Recording::open(path)?, Learner::default());
    let outcome = loop {
        let piece = recording.piece()?;
        if piece.is_empty() {
            break learner.finish(hypervisor);
        }
        if let Err(error) = learner.feed(piece) {
            break Err(error);
        }
    };
    match outcome {
        Ok(learned) => Ok(Ok(learned)),
        Err(LearnError::Broken(violation)) => Ok(Err(violation)),
        Err(error @ LearnError::Incomplete { .. }) => {
            Ok(Err(Violation::new("INV-S10", 0, "stream", "a complete stream", error.to_string())))
        }
        Err(error @ LearnError::NotText { .. }) => {
            Ok(Err(Violation::new("INV-S5", 0, "stream", "names that are text", error.to_string())))
        }
    }
}

fn malformed(path: &Path, reason: String) -> Error {
    InputError::Malformed { place: path.display().to_string(), reason }.into()
}

fn rejected_early(violation: Violation) -> Report {
    Report {
        verdict: Verdict::Reject,
        violations: vec![ViolationView::from(&Refused { channel: 0, violation })],
        machine: None,
        sections: Vec::new(),
        pages: PagesView::default(),
        bytes: 0,
        return_path: false,
    }
}

fn inspect(args: &Inspect) -> Result<Report, Error> {
    let given = args.vm.as_deref().map(read_enrolment).transpose()?;
    // Without a record of the VM the stream is held to its own word: grammar, completeness, one possible cut.
    let (enrolment, return_path) = match (given, learn(&args.main, &args.hypervisor)?) {
        (Some(enrolment), learned) => (enrolment, learned.is_ok_and(|learned| learned.return_path)),
        (None, Ok(learned)) => {
            let Learned { inventory, return_path, .. } = learned;
            (Enrolment { inventory, catalogue: None }, return_path)
        }
        (None, Err(violation)) => return Ok(rejected_early(violation)),
    };
    let mut inspector = Inspector::new(&enrolment.inventory, enrolment.catalogue.as_ref(), &limits(args))
        .map_err(|error| unusable(args, &error))?;
    let verdict = feed(args, &mut inspector)?.and_then(|()| inspector.finish());
    let mut report = Report {
        verdict: Verdict::Accept,
        violations: Vec::new(),
        machine: Some(enrolment.inventory.machine),
        sections: Vec::new(),
        pages: inspector.pages().into(),
        bytes: inspector.stream_bytes(),
        return_path,
    };
    match verdict {
        Ok(held) => report.sections = held.sections.iter().map(SectionView::from).collect(),
        Err(refused) => report.violations.push(ViolationView::from(&refused)),
    }
    if let Some(path) = &args.return_path {
        let refused = inspect_return_path(path, return_path)?;
        report.violations.extend(refused.as_ref().map(ViolationView::from));
    }
    if !report.violations.is_empty() {
        report.verdict = Verdict::Reject;
    }
    Ok(report)
}

fn unusable(args: &Inspect, error: &Unsupported) -> Error {
    malformed(args.vm.as_deref().unwrap_or(&args.main), error.to_string())
}

fn limits(args: &Inspect) -> Limits {
    let method = match args.compression {
        None => Method::Plain,
        Some(Compression::Zlib) => Method::Zlib,
        Some(Compression::Zstd) => Method::Zstd,
    };
    let channels = u16::try_from(args.channels.len()).unwrap_or(u16::MAX);
    Limits {
        multifd: (channels > 0).then_some(Multifd { channels, method }),
        return_path_required: args.require_return_path,
        unvouched: if args.report_unvouched { Unvouched::Report } else { Unvouched::Refuse },
        ..Limits::default()
    }
}

fn read_enrolment(path: &Path) -> Result<Enrolment, Error> {
    let text = crate::commands::read_input(path, MAX_ENROLMENT_BYTES)?;
    // An inventory alone is one too, as the manager's API shows it.
    serde_json::from_str::<Enrolment>(&text)
        .or_else(|error| {
            serde_json::from_str::<Inventory>(&text)
                .map(|inventory| Enrolment { inventory, catalogue: None })
                .map_err(|_| error)
        })
        .map_err(|error| malformed(path, format!("line {}: {error}", error.line())))
}

/// Every channel's bytes, each as far as the others allow.
fn feed(args: &Inspect, inspector: &mut Inspector) -> Result<Result<(), Refused>, Error> {
    let paths = std::iter::once(&args.main).chain(&args.channels);
    let mut open =
        paths.map(|path| Ok(Some(Recording::open(path)?))).collect::<Result<Vec<_>, InputError>>()?;
    let mut moved = true;
    while moved {
        moved = false;
        for (channel, place) in (0u16..).zip(&mut open) {
            let Some(recording) = place.as_mut().filter(|_| inspector.wants(channel)) else { continue };
            let piece = recording.piece()?;
            moved = true;
            if piece.is_empty() {
                *place = None;
            } else if let Err(refused) = inspector.feed(channel, piece, &mut |_: u16, _: &[u8]| {}) {
                return Ok(Err(refused));
            }
        }
    }
    Ok(Ok(()))
}

/// What the target said. It is named as channel 0, whose other direction it is.
fn inspect_return_path(path: &Path, return_path: bool) -> Result<Option<Refused>, Error> {
    let (mut recording, mut decoder) = (Recording::open(path)?, Decoder::default());
    let mut checker = PrecopyReturn::new(true);
    if return_path {
        checker.ping(1);
    }
    let mut read = 0u64;
    let refuse = |offset, rule, expected: &str, found: String| {
        let violation = Violation::new(rule, offset, "return path", expected, found);
        Ok(Some(Refused { channel: 0, violation }))
    };
    loop {
        let piece = recording.piece()?;
        if piece.is_empty() {
            break;
        }
        read += piece.len() as u64;
        let mut verdict = Ok(());
        let fed = decoder.feed(piece, |message| {
            if verdict.is_ok() {
                verdict = checker.check(&message);
            }
        });
        if let Err(error) = verdict.and(fed) {
            return refuse(read, error.rule(), "what pre-copy's return path may hold", error.to_string());
        }
    }
    if !decoder.at_message_boundary() {
        return refuse(read, "INV-P1", "whole messages", "the end inside one".to_owned());
    }
    Ok(None)
}
