//! `vm define`, `list`, `show`, `inspect`, `start`, `stop`.

use super::{DONE, Outcome, read_input};
use crate::args::{DefineVm, Format, InspectVm, VmCommand};
use crate::client::Client;
use crate::config::{MAX_FILE_BYTES, explain};
use crate::error::InputError;
use crate::output::{self, inspection, lists};
use std::path::Path;
use types::Digest;
use types::inventory::Enrolment;
use types::vm::VmSpec;

pub(super) async fn run(command: VmCommand, format: Format) -> Outcome {
    let view = match command {
        VmCommand::List(args) => {
            let vms = Client::new(&args.connection)?.vms().await?;
            output::print(format, &vms, |vms, width| lists::vms(vms, width));
            return Ok(DONE);
        }
        VmCommand::Digest { file } => {
            let digest = digest_of(&file)?;
            output::print(format, &digest, |digest, _| format!("{digest}\n"));
            return Ok(DONE);
        }
        VmCommand::Inspect(args) => return inspect(&args, format).await,
        VmCommand::Define(args) => define(&args).await?,
        VmCommand::Show(args) => Client::new(&args.connection)?.vm(&args.vm).await?,
        VmCommand::Start(args) => Client::new(&args.connection)?.start_vm(&args.vm, &args.on).await?,
        VmCommand::Stop(args) => Client::new(&args.connection)?.stop_vm(&args.vm).await?,
    };
    output::print(format, &view, lists::vm);
    Ok(DONE)
}

async fn inspect(args: &InspectVm, format: Format) -> Outcome {
    let shown = Client::new(&args.connection)?.inspect_vm(&args.vm).await?;
    if let Some(file) = &args.save {
        save(file, &shown.enrolment)?;
    }
    output::print(format, &shown, inspection::vm);
    if let Some(file) = &args.save {
        output::note(&format!("the enrolment is in {}", file.display()));
    }
    Ok(DONE)
}

fn save(file: &Path, enrolment: &Enrolment) -> Result<(), InputError> {
    let text = serde_json::to_vec_pretty(enrolment).map_err(std::io::Error::from);
    let written = text.and_then(|text| std::fs::write(file, text));
    written.map_err(|source| InputError::Write { path: file.to_owned(), source })
}

/// The spec is checked here first: a mistake is named with its line before anything is asked.
async fn define(args: &DefineVm) -> Result<api::http::VmView, crate::error::Error> {
    let spec = read_spec(&args.file)?;
    Ok(Client::new(&args.connection)?.define_vm(&spec).await?)
}

/// Read in pieces: an initrd need not fit in memory.
fn digest_of(file: &Path) -> Result<Digest, InputError> {
    let read = |source| InputError::Read { path: file.to_owned(), source };
    let mut hasher = blake3::Hasher::new();
    hasher.update_reader(std::fs::File::open(file).map_err(read)?).map_err(read)?;
    Ok(Digest(*hasher.finalize().as_bytes()))
}

fn read_spec(file: &Path) -> Result<VmSpec, InputError> {
    let text = read_input(file, MAX_FILE_BYTES)?;
    let name = if file == Path::new("-") { "standard input".to_owned() } else { file.display().to_string() };
    let spec: VmSpec = toml::from_str(&text).map_err(|error| {
        let (place, reason) = explain(&name, &text, &error);
        InputError::Malformed { place, reason }
    })?;
    spec.validate().map_err(|reason| InputError::Malformed { place: name, reason })?;
    Ok(spec)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use std::io::Write;

    const GOOD: &str = "uuid = '6f1e2d3c-0000-4000-8000-000000000001'\nname = 'web-1'\nvcpus = 1\nmemory_bytes = 268435456\n";

    fn check(text: &str) -> Result<VmSpec, String> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        read_spec(file.path()).map_err(|e| e.to_string().replace(&file.path().display().to_string(), "F"))
    }

    #[test]
    fn the_digest_of_a_file_is_the_one_that_hosts_compute() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let content = vec![7_u8; 200_000];
        file.write_all(&content).unwrap();
        assert_eq!(digest_of(file.path()).unwrap(), Digest::of(&content));
    }

    #[test]
    fn a_saved_enrolment_reads_back() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("vm.json");
        let mut enrolment = Enrolment::default();
        enrolment.inventory.machine = "pc-q35-10.0".to_owned();
        save(&file, &enrolment).unwrap();
        let text = std::fs::read_to_string(&file).unwrap();
        assert_eq!(serde_json::from_str::<Enrolment>(&text).unwrap(), enrolment);
        assert!(text.contains("\"catalogue\": null"), "{text}");
        let failed = save(&folder.path().join("no/vm.json"), &enrolment).unwrap_err();
        assert!(failed.to_string().starts_with("cannot write "), "{failed}");
    }

    #[test]
    fn mistakes_in_a_spec_name_the_line() {
        assert_eq!(check(GOOD).unwrap().vcpus, 1);
        let unknown = check(&format!("{GOOD}qemu_args = '-s'\n")).unwrap_err();
        assert!(unknown.starts_with("F:5: unknown field `qemu_args`"), "{unknown}");
        let rule = check(&GOOD.replace("vcpus = 1", "vcpus = 0")).unwrap_err();
        assert!(rule.starts_with("F: vcpus is 0"), "{rule}");
    }
}
