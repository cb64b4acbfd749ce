//! What the fuzzers kept is read again, without a fuzzer.

#![allow(clippy::unwrap_used)]

use outrider_fuzz_targets::{TARGETS, seeds};
use std::path::PathBuf;

fn corpus(name: &str) -> Vec<Vec<u8>> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../corpus").join(name);
    let mut files: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.iter().map(|file| std::fs::read(file).unwrap()).collect()
}

#[test]
fn every_corpus_is_there_and_breaks_nothing() {
    for (name, run) in TARGETS {
        let kept = corpus(name);
        assert!(!kept.is_empty(), "{name} has no corpus");
        println!("{name}: {} inputs", kept.len());
        for input in kept.iter().chain(&seeds(name)) {
            run(input);
        }
    }
}

/// A target that could not fail would find nothing: garbage and cut seeds reach it too.
#[test]
fn cut_and_damaged_seeds_break_nothing() {
    for (name, run) in TARGETS {
        for seed in seeds(name) {
            for step in 1..200 {
                let at = seed.len() * step / 200;
                run(&seed[..at]);
                let mut damaged = seed.clone();
                if let Some(byte) = damaged.get_mut(at) {
                    *byte ^= 1 << (step % 8);
                }
                run(&damaged);
            }
        }
    }
}
