//! What `outrider inspect` says.

use crate::output::layout::{Facts, columns};
use crate::output::text::{Tone, bold, toned};
use crate::size::format_bytes;
use engine::inspect::devices::{JudgedSection, Vouched};
use engine::inspect::{Pages, Refused, finding};
use serde::Serialize;
use types::migration::Finding;

/// The verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Verdict {
    /// A target's QEMU may have it.
    Accept,
    /// It may not.
    Reject,
}

/// The whole answer. Documented in the README: other people's scripts read it.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) verdict: Verdict,
    pub(super) violations: Vec<ViolationView>,
    pub(super) machine: Option<String>,
    pub(super) sections: Vec<SectionView>,
    pub(super) pages: PagesView,
    /// Bytes of all channels that came, source to target.
    pub(super) bytes: u64,
    /// Whether the source opened a return path; a migration without one is not permitted.
    pub(super) return_path: bool,
}

#[derive(Debug, Serialize)]
pub(super) struct ViolationView {
    rule: String,
    channel: u16,
    offset: u64,
    message: String,
    section: String,
    threat: String,
}

#[derive(Debug, Serialize)]
pub(super) struct SectionView {
    name: String,
    instance: u32,
    version: u32,
    bytes: usize,
    /// How its length is known: from the layout, or only because no other cut is possible.
    vouched: &'static str,
}

#[derive(Debug, Default, Serialize)]
pub(super) struct PagesView {
    normal: u64,
    zero: u64,
}

impl From<Pages> for PagesView {
    fn from(pages: Pages) -> Self {
        Self { normal: pages.normal, zero: pages.zero }
    }
}

impl From<&Refused> for ViolationView {
    fn from(refused: &Refused) -> Self {
        let Finding { rule, threat, section, expected, found, .. } =
            finding(&refused.violation, refused.channel, "");
        let message = format!("expected {expected}, found {found}");
        Self { rule, channel: refused.channel, offset: refused.violation.offset, message, section, threat }
    }
}

impl From<&JudgedSection> for SectionView {
    fn from(section: &JudgedSection) -> Self {
        let vouched = match section.vouched {
            Vouched::Layout => "layout",
            Vouched::FixedLength => "fixed-length",
            Vouched::Partly => "partly",
            Vouched::UniqueCut => "unique-cut",
        };
        let JudgedSection { name, instance, version, bytes, .. } = section.clone();
        Self { name, instance, version, bytes, vouched }
    }
}

/// The report for people.
pub(super) fn render(report: &Report, width: usize) -> String {
    let verdict = match report.verdict {
        Verdict::Accept => toned(Tone::Good, "accepted"),
        Verdict::Reject => toned(Tone::Bad, "rejected"),
    };
    let machine = report.machine.as_deref().unwrap_or("unknown machine");
    let mut facts = Facts::new(format!("{}: {verdict}", bold(machine)));
    facts.add("Stream", format!("{} on all channels", format_bytes(report.bytes)));
    facts.add("Pages", format!("{} with content, {} of zeros", report.pages.normal, report.pages.zero));
    let return_path = if report.return_path { "open" } else { "none: such a migration is not permitted" };
    facts.add("Return path", return_path);
    for violation in &report.violations {
        let ViolationView { rule, channel, offset, section, threat, message } = violation;
        let at = format!("{rule} ({threat}) on channel {channel} at byte {offset}, in {section}");
        facts.add("Violation", format!("{at}: {message}"));
    }
    let mut text = facts.render(width);
    if !report.sections.is_empty() {
        let row = |s: &SectionView| {
            let numbers = [s.instance.to_string(), s.version.to_string(), s.bytes.to_string()];
            let [instance, version, bytes] = numbers;
            vec![s.name.clone(), instance, version, bytes, s.vouched.to_owned()]
        };
        let headings = ["DEVICE", "INSTANCE", "VERSION", "BYTES", "KNOWN BY"];
        text.push('\n');
        text.push_str(&columns(&headings, report.sections.iter().map(row).collect(), width, ""));
    }
    text
}
