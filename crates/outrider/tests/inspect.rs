//! `outrider inspect` from outside: verdicts, exit codes, documents.

#![allow(clippy::unwrap_used)]

#[path = "../../engine/tests/support/mod.rs"]
mod streams;

use serde_json::Value;
use std::io::Write;
use std::path::{Path, PathBuf};

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }
}

/// Exit code, standard output and standard error.
fn run(arguments: &[&str], files: &[&Path]) -> (i32, String, String) {
    let mut command = assert_cmd::Command::new(env!("CARGO_BIN_EXE_outrider"));
    let output = command.arg("inspect").args(arguments).args(files).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

fn json(files: &[&Path]) -> (i32, Value) {
    let (code, out, _) = run(&["--output", "json"], files);
    (code, serde_json::from_str(&out).unwrap())
}

fn packed(bytes: &[u8]) -> [Vec<u8>; 2] {
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(bytes).unwrap();
    let mut xz = xz2::write::XzEncoder::new(Vec::new(), 0);
    xz.write_all(bytes).unwrap();
    [gz.finish().unwrap(), xz.finish().unwrap()]
}

#[test]
fn a_sound_stream_is_accepted_however_it_is_packed() {
    let (folder, stream) = (Folder::new(), streams::handmade());
    let [gz, xz] = packed(&stream);
    for (name, bytes) in [("plain", stream.clone()), ("gz", gz), ("xz", xz)] {
        let (code, report) = json(&[&folder.file(name, &bytes)]);
        assert_eq!((code, &report["verdict"]), (0, &Value::from("accept")), "{name}");
        assert_eq!(report["violations"], serde_json::json!([]));
        assert_eq!(report["machine"], "pc-q35-10.0");
        assert_eq!(report["pages"], serde_json::json!({"normal": 1, "zero": 9}));
        assert_eq!(report["bytes"], stream.len());
        let first = &report["sections"][0];
        assert_eq!((&first["name"], &first["instance"]), (&Value::from("timer"), &Value::from(0)));
        assert_eq!((&first["version"], &first["bytes"]), (&Value::from(2), &Value::from(24)));
    }
}

#[test]
fn a_violation_is_named_and_the_exit_code_is_one() {
    let (folder, good) = (Folder::new(), streams::handmade());
    for mutation in streams::mutations(&good) {
        // Without a record of the VM the stream is its own: another machine name or block length is nothing wrong.
        let own = [
            "8",
            "9",
            "10",
            "17",
            "18",
            "19",
            "4/5",
            "24",
            "device version",
            "another VM's uuid",
            "no return path",
        ];
        if own.contains(&mutation.row) {
            continue;
        }
        let (code, report) = json(&[&folder.file("bad", &mutation.bytes)]);
        assert_eq!((code, &report["verdict"]), (1, &Value::from("reject")), "{}", mutation.row);
        let violation = &report["violations"][0];
        assert!(violation["rule"].as_str().unwrap().starts_with("INV-"), "{violation}");
        assert!(violation["message"].as_str().unwrap().starts_with("expected "), "{violation}");
        assert!(violation["offset"].is_u64() && violation["channel"] == 0, "{violation}");
    }
}

#[test]
fn what_was_learned_judges_later_streams() {
    let (folder, good) = (Folder::new(), streams::handmade());
    let stream = folder.file("good", &good);
    let (code, learned, _) = run(&["--learn"], &[&stream]);
    assert_eq!(code, 0);
    let record = folder.file("vm.json", learned.as_bytes());
    let with = |stream: &Path| {
        let record = record.to_str().unwrap();
        let arguments = ["--report-unvouched", "--vm", record, "--output", "json"];
        let (code, out, _) = run(&arguments, &[stream]);
        (code, serde_json::from_str::<Value>(&out).unwrap())
    };
    assert_eq!(with(&stream).0, 0);
    for mutation in streams::mutations(&good).iter().filter(|m| ["8", "17", "18"].contains(&m.row)) {
        let (code, report) = with(&folder.file("bad", &mutation.bytes));
        assert_eq!(
            (code, &report["violations"][0]["rule"]),
            (1, &Value::from(mutation.rule)),
            "{}",
            mutation.row
        );
    }
}

#[test]
fn the_return_path_is_judged_too() {
    let (folder, good) = (Folder::new(), streams::handmade());
    let stream = folder.file("good", &good);
    let answers = |bytes: &[u8]| {
        let file = folder.file("answers", bytes);
        run(&["--return-path", file.to_str().unwrap()], &[&stream]).0
    };
    assert_eq!(answers(&[0, 2, 0, 4, 0, 0, 0, 1, 0, 1, 0, 4, 0, 0, 0, 0]), 0);
    assert_eq!(answers(&[0, 2, 0, 4, 0, 0, 0, 9]), 1);
    assert_eq!(answers(&[0, 2, 0]), 1);
}

#[test]
fn mistakes_of_the_caller_are_no_verdict() {
    let folder = Folder::new();
    let stream = folder.file("good", &streams::handmade());
    let [gz, _] = packed(&streams::handmade());
    let cut = folder.file("cut.gz", &gz[..gz.len() / 2]);
    let nonsense = folder.file("vm.json", b"{\"inventory\": 1}");
    assert_eq!(run(&[], &[]).0, 2);
    assert_eq!(run(&[], &[Path::new("/nonexistent")]).0, 2);
    assert_eq!(run(&[], &[&cut]).0, 2);
    let (code, _, error) = run(&["--vm", nonsense.to_str().unwrap()], &[&stream]);
    assert_eq!(code, 2);
    assert!(error.contains("vm.json"), "{error}");
    assert_eq!(run(&["--learn", "--vm", "x"], &[&stream]).0, 2);
}
