//! The engine: rules in, places out.

use outrider_signature::Response;
use std::time::Duration;
use yara_x::{Compiler, MetaValue, Rule, Rules, Scanner, SourceCode};

/// A run of 256 KiB takes a fifth of a millisecond. The engine counts whole seconds: this is one to two of them.
const RUN_LIMIT: Duration = Duration::from_secs(2);
/// A guest can fill its memory with a pattern; more matches of one pattern in one run tell nothing new.
const MAX_MATCHES_PER_PATTERN: usize = 1000;
/// Places that are named for one rule in one run, the first of its page each.
const MAX_PLACES: usize = 8;
const PAGE_BYTES: u64 = 4096;
/// The metadata with which a rule says what comes of a match.
const RESPONSE: &str = "response";

/// A file of rules: name and text.
pub(crate) type Source = (String, Vec<u8>);

/// Where a rule matched.
pub(crate) struct Place {
    pub(crate) rule: String,
    pub(crate) response: Response,
    /// In the run.
    pub(crate) at: u64,
}

/// The rules of all files. Without modules and includes: they would read what the sandbox forbids, or parse files.
///
/// # Errors
/// What is wrong, with file, line and column.
pub(crate) fn compile(sources: &[Source]) -> Result<Rules, String> {
    let mut compiler = Compiler::new();
    compiler.enable_includes(false).colorize_errors(false);
    for (name, text) in sources {
        let source = SourceCode::from(text.as_slice()).with_origin(name.as_str());
        compiler.add_source(source).map_err(|error| format!("the rules do not compile: {error}"))?;
    }
    let rules = compiler.build();
    if rules.iter().len() == 0 {
        return Err("there is no rule in the files of rules".to_owned());
    }
    for rule in rules.iter() {
        response(&rule)?;
    }
    Ok(rules)
}

/// What a rule asks for when it matches.
fn response(rule: &Rule<'_, '_>) -> Result<Response, String> {
    let Some((_, value)) = rule.metadata().find(|(key, _)| *key == RESPONSE) else {
        return Ok(Response::Refuse);
    };
    match value {
        MetaValue::String("refuse") => Ok(Response::Refuse),
        MetaValue::String("report") => Ok(Response::Report),
        _ => {
            let rule = rule.identifier();
            Err(format!("the metadata {RESPONSE:?} of rule {rule} is neither \"refuse\" nor \"report\""))
        }
    }
}

/// Scans run after run.
pub(crate) struct Engine<'r> {
    scanner: Scanner<'r>,
}

impl<'r> Engine<'r> {
    /// An engine that has scanned once.
    ///
    /// # Errors
    /// It can't.
    pub(crate) fn new(rules: &'r Rules) -> Result<Self, String> {
        let mut scanner = Scanner::new(rules);
        scanner.set_timeout(RUN_LIMIT).max_matches_per_pattern(MAX_MATCHES_PER_PATTERN);
        scanner.scan(&[0; 4096]).map_err(|error| format!("the engine does not start: {error}"))?;
        Ok(Self { scanner })
    }

    /// Where rules match in a run; nothing when it took too long. What refuses comes first, then the first place of each
    /// rule: not all may be named.
    pub(crate) fn scan(&mut self, run: &[u8]) -> Option<Vec<Place>> {
        let results = self.scanner.scan(run).ok()?;
        let mut places = Vec::new();
        for rule in results.matching_rules() {
            let response = response(&rule).unwrap_or(Response::Refuse);
            let name = rule.identifier().to_owned();
            let matches = starts(&rule);
            places.extend(matches.into_iter().enumerate().map(|(nth, at)| {
                let place = Place { rule: name.clone(), response, at };
                ((response == Response::Report, nth), place)
            }));
        }
        places.sort_by_key(|(rank, _)| *rank);
        Some(places.into_iter().map(|(_, place)| place).collect())
    }
}

/// The first places of a rule; the head of the run, when its condition rests on no pattern.
fn starts(rule: &Rule<'_, '_>) -> Vec<u64> {
    let matches = rule.patterns().flat_map(|pattern| pattern.matches().map(|found| found.range().start));
    let mut all: Vec<u64> = matches.map(|at| at as u64).collect();
    all.sort_unstable();
    all.dedup_by_key(|at| *at / PAGE_BYTES);
    all.truncate(MAX_PLACES);
    if all.is_empty() {
        all.push(0);
    }
    all
}
