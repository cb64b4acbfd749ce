//! What TPMs say, and what they are expected to say.

use super::layout::{Facts, columns};
use super::text::bold;
use super::time::instant;
use api::http::{AttestationView, PcrView, ReferenceView};
use jiff::Timestamp;

/// Enough of a digest to compare by eye; the JSON has all of it.
const SHORT_DIGITS: usize = 16;

/// Expected against found.
pub(crate) fn attestation(seen: &AttestationView, now: Timestamp, width: usize) -> String {
    let mut facts = Facts::new(format!("{}: {}", bold(seen.host.as_str()), seen.verdict));
    facts.add("Asked", seen.at.as_ref().map_or_else(|| "never".to_owned(), |at| instant(at, now)));
    facts.add_some("Reason", seen.reason.as_ref());
    facts
        .add_some("TPM", seen.ek_name.as_ref())
        .add_some("Signs with", seen.ak_name.as_ref())
        .add("Measured against", seen.reference.as_deref().unwrap_or("nothing: no reference values are set"))
        .add_some("TPM firmware", seen.firmware_version.as_ref());
    for note in &seen.notes {
        facts.add("Note", note);
    }
    let mut text = facts.render(width);
    if !seen.pcrs.is_empty() {
        text.push('\n');
        text.push_str(&columns(
            &["PCR", "", "EXPECTED", "FOUND", "STANDS FOR"],
            seen.pcrs.iter().map(row).collect(),
            width,
            "",
        ));
    }
    for pcr in seen.pcrs.iter().filter(|pcr| pcr.explanation.is_some()) {
        let mut facts = Facts::new(format!("PCR {}", pcr.pcr));
        facts.add_some("Why", pcr.explanation.as_ref());
        text.push('\n');
        text.push_str(&facts.render(width));
    }
    text
}

fn row(pcr: &PcrView) -> Vec<String> {
    let found = pcr.expected.iter().position(|expected| *expected == pcr.found);
    let note = found.and_then(|at| pcr.notes.get(at)).cloned().unwrap_or_default();
    let expected = match &pcr.expected[..] {
        [] => "nothing is allowed now".to_owned(),
        [one] => short(one),
        several => format!("one of {}", several.len()),
    };
    let matches = if pcr.matches { "ok" } else { "DIFFERS" };
    vec![pcr.pcr.to_string(), matches.to_owned(), expected, short(&pcr.found), note]
}

fn short(digest: &str) -> String {
    let cut: String = digest.chars().take(SHORT_DIGITS).collect();
    if cut.len() < digest.len() { format!("{cut}…") } else { cut }
}

/// Whose values are set.
pub(crate) fn references(all: &[ReferenceView], width: usize) -> String {
    let row = |one: &ReferenceView| {
        vec![one.scope.clone(), one.pcrs.clone(), short(&one.digest), one.set_at.clone(), one.set_by.clone()]
    };
    columns(
        &["SCOPE", "PCRS", "DIGEST", "SET", "BY"],
        all.iter().map(row).collect(),
        width,
        "no reference values yet; take those of a host that you trust with: outrider reference record",
    )
}
