//! Dry runs of the QEMU of this machine, and the device state of recorded streams.

#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use wire::qemu::device::{DeviceSection, DeviceState};

/// A QEMU binary and the arguments that it always needs.
#[derive(Debug, Clone)]
pub struct Qemu {
    pub binary: String,
    pub args: Vec<String>,
}

/// The QEMUs of this machine: the one on the path, and those that `OUTRIDER_TEST_QEMUS` names (binaries with their
/// arguments, separated by semicolons).
pub fn qemus() -> Vec<Qemu> {
    let more = std::env::var("OUTRIDER_TEST_QEMUS").unwrap_or_default();
    let mut commands = vec!["qemu-system-x86_64"];
    commands.extend(more.split(';').map(str::trim).filter(|c| !c.is_empty()));
    let qemu = |command: &str| {
        let mut words = command.split_whitespace().map(str::to_owned);
        Qemu { binary: words.next().unwrap(), args: words.collect() }
    };
    let works = |qemu: &Qemu| {
        Command::new(&qemu.binary)
            .arg("--version")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok()
    };
    commands.into_iter().map(qemu).filter(works).collect()
}

impl Qemu {
    fn command(&self) -> Command {
        let mut command = Command::new(&self.binary);
        command.args(&self.args).args(["-display", "none", "-no-user-config"]).stderr(Stdio::null());
        command
    }

    /// What `-dump-vmstate` writes for a machine type; nothing if this QEMU has no such type.
    pub fn dump(&self, machine: &str) -> Option<Vec<u8>> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("dump");
        let status = self.command().args(["-M", machine, "-dump-vmstate"]).arg(&file).status().ok()?;
        status.success().then(|| std::fs::read(&file).unwrap())
    }

    /// The stream of a VM with these devices that has not run; nothing if this QEMU can't make it.
    pub fn dry_run(&self, machine: &str, devices: &[&str]) -> Option<Vec<u8>> {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("stream");
        let mut qemu = self
            .command()
            .args(["-accel", "tcg", "-cpu", "qemu64", "-m", "32", "-nodefaults", "-S", "-M", machine])
            .args(devices)
            .args(["-qmp", "stdio"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .ok()?;
        let mut to_qemu = qemu.stdin.take().unwrap();
        let mut lines = BufReader::new(qemu.stdout.take().unwrap()).lines();
        let uri = format!("exec:cat > {}", file.display());
        let capability = serde_json::json!({"capability": "events", "state": true});
        let commands = [
            serde_json::json!({"execute": "qmp_capabilities"}),
            serde_json::json!({"execute": "migrate-set-capabilities", "arguments": {"capabilities": [capability]}}),
            serde_json::json!({"execute": "migrate", "arguments": {"uri": uri}}),
        ];
        for command in commands {
            // A QEMU that refused its arguments is gone; that shows below.
            if writeln!(to_qemu, "{command}").is_err() {
                break;
            }
        }
        let ends = |line: &String| {
            line.contains("\"MIGRATION\"") && (line.contains("completed") || line.contains("failed"))
        };
        let done = lines.by_ref().map_while(Result::ok).find(ends);
        if writeln!(to_qemu, r#"{{"execute":"quit"}}"#).is_ok() {
            lines.for_each(drop);
        }
        qemu.wait().unwrap();
        done.filter(|line| line.contains("completed")).map(|_| std::fs::read(&file).unwrap())
    }
}

/// The main channel of a stream of the corpus; nothing when it is not there.
pub fn corpus(name: &str) -> Option<Vec<u8>> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/corpus").join(name);
    let mut bytes = Vec::new();
    if let Ok(file) = std::fs::File::open(folder.join("ch0.fwd.gz")) {
        flate2::read::GzDecoder::new(file).read_to_end(&mut bytes).unwrap();
    } else {
        xz2::read::XzDecoder::new(std::fs::File::open(folder.join("ch0.fwd.xz")).ok()?)
            .read_to_end(&mut bytes)
            .unwrap();
    }
    Some(bytes)
}

/// The device state of a stream, and where it is. Recorded streams start it with `timer`.
pub fn device_state(stream: &[u8]) -> (u64, &[u8]) {
    let start = b"\x04\0\0\0\0\x05timer";
    let at = stream.windows(start.len()).rposition(|window| window == start).unwrap();
    (at as u64, &stream[at..])
}

/// Machine type in the configuration section.
pub fn machine(stream: &[u8]) -> String {
    let length = u32::from_be_bytes(stream[9..13].try_into().unwrap()) as usize;
    String::from_utf8(stream[13..13 + length].to_vec()).unwrap()
}

/// A device state that tests change, its description beside it.
#[derive(Debug, Clone)]
pub struct Blob {
    /// Sections and end mark.
    pub bytes: Vec<u8>,
    pub description: serde_json::Value,
}

impl Blob {
    pub fn of(stream: &[u8]) -> Self {
        let (base, blob) = device_state(stream);
        let state = DeviceState::read(blob, base, u32::MAX, 4096).unwrap();
        let description = serde_json::from_slice(state.description(blob)).unwrap();
        Self { bytes: blob[..state.end_mark].to_vec(), description }
    }

    /// With end mark and description.
    pub fn to_bytes(&self) -> Vec<u8> {
        let json = self.description.to_string();
        let length = (json.len() as u32).to_be_bytes();
        [&self.bytes[..], &[0, 6], &length, json.as_bytes()].concat()
    }

    /// Id, whole section and state of a section.
    pub fn section(&self, name: &str) -> (u32, std::ops::Range<usize>, std::ops::Range<usize>) {
        let whole = self.to_bytes();
        let state = DeviceState::read(&whole, 0, u32::MAX, 4096).unwrap();
        let found = |s: &&DeviceSection<'_>| s.name == name || s.name.ends_with(&format!("/{name}"));
        let section = state.sections.iter().find(found).unwrap();
        (section.id, section.start..section.payload.end + 5, section.payload.clone())
    }

    /// Where `needle` is in a section's state.
    pub fn find(&self, name: &str, needle: &[u8]) -> usize {
        let (_, _, state) = self.section(name);
        let bytes = &self.bytes[state.clone()];
        state.start + bytes.windows(needle.len()).position(|window| window == needle).unwrap()
    }

    /// Replaces bytes; the description of a section may then lie about its length.
    pub fn splice(&mut self, range: std::ops::Range<usize>, with: &[u8]) {
        self.bytes.splice(range, with.iter().copied());
    }

    /// Makes the description say that a section's state is one buffer of so many bytes.
    pub fn redescribe(&mut self, name: &str, length: usize) {
        let device = self.device(name);
        device["fields"] = serde_json::json!([{"name": "a", "type": "buffer", "size": length}]);
        device["subsections"] = serde_json::json!([]);
    }

    /// Where a section's state starts, even when its length no longer fits the description.
    pub fn section_start(&self, name: &str) -> usize {
        let header = [&[name.len() as u8], name.as_bytes(), &[0; 4]].concat();
        let at = self.bytes.windows(header.len()).position(|window| window == header).unwrap();
        at + header.len() + 4
    }

    /// Changes the list of devices in the description.
    pub fn edit_devices(&mut self, edit: impl FnOnce(&mut Vec<serde_json::Value>)) {
        edit(self.description["devices"].as_array_mut().unwrap());
    }

    fn device(&mut self, name: &str) -> &mut serde_json::Value {
        let suffix = format!("/{name}");
        let devices = self.description["devices"].as_array_mut().unwrap();
        devices
            .iter_mut()
            .find(|d| d["name"] == name || d["name"].as_str().unwrap().ends_with(&suffix))
            .unwrap()
    }
}
