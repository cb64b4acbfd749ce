//! Judges a recorded stream's device state by the catalogue of a dry run, and prints how each section was vouched
//! for and how long it took: `judge DRY_RUN DUMP STREAM…`.

#![allow(clippy::unwrap_used)]

use outrider_engine::inspect::devices::{Unvouched, Vouched, compile, judge};
use std::time::Instant;
use types::inventory::Inventory;
use wire::qemu::{Event, Parser, ParserOptions};

/// The device state of a stream, and its offset. A main channel beside multifd channels can't be parsed; its
/// device state then has to start with `timer`, as it does on machines without PCI bridges.
fn device_state(stream: &[u8]) -> (u64, &[u8]) {
    let mut parser = Parser::new(ParserOptions { return_path_required: false, ..ParserOptions::default() });
    let mut begin = None;
    let parsed = parser.feed(stream, &mut |at: u64, event: Event<'_>| {
        if event == Event::DevicesBegin {
            begin = Some(at);
        }
        Ok(())
    });
    let start = b"\x04\0\0\0\0\x05timer";
    let at = match (parsed, begin) {
        (Ok(_), Some(at)) => usize::try_from(at).unwrap(),
        _ => stream.windows(start.len()).rposition(|window| window == start).unwrap(),
    };
    (at as u64, &stream[at..])
}

fn main() {
    let mut args = std::env::args().skip(1);
    let dry_run = std::fs::read(args.next().unwrap()).unwrap();
    let dump = std::fs::read(args.next().unwrap()).ok();
    let begin = Instant::now();
    let catalogue = compile(&dry_run, dump.as_deref(), "qemu").unwrap();
    let json = serde_json::to_vec(&catalogue).unwrap();
    println!(
        "compiled in {:?}: {} layouts, {} bytes of JSON",
        begin.elapsed(),
        catalogue.layouts.len(),
        json.len()
    );
    for section in catalogue.sections.iter().filter(|s| s.layout.is_none()) {
        println!("  no layout: {} ({})", section.name, section.why);
    }
    let inventory = Inventory { machine: catalogue.machine.clone(), ..Inventory::default() };
    for path in args {
        let stream = std::fs::read(&path).unwrap();
        let (base, blob) = device_state(&stream);
        let mut best = None;
        let mut verdict = None;
        for _ in 0..20 {
            let begin = Instant::now();
            let judged = judge(blob, base, u32::MAX, 4096, &inventory, Some(&catalogue), Unvouched::Report);
            best = best.into_iter().chain([begin.elapsed()]).min();
            verdict = Some(judged);
        }
        match verdict.unwrap() {
            Ok(judged) => {
                let weak: Vec<_> = judged
                    .sections
                    .iter()
                    .filter(|s| s.vouched != Vouched::Layout)
                    .map(|s| &s.name)
                    .collect();
                let exact = judged.sections.len() - weak.len();
                println!(
                    "{path}: {} bytes, {exact} exact, not exact: {weak:?}, {:?}",
                    blob.len(),
                    best.unwrap()
                );
            }
            Err(violation) => println!("{path}: refused: {violation}"),
        }
    }
}
