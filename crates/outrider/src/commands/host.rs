//! `host add`, `host list`, `host show`.

use super::{DONE, NEGATIVE, Outcome, now};
use crate::args::{Format, HostAdd, ListHosts, ShowHost};
use crate::client::Client;
use crate::error::{Error, InputError};
use crate::output::{self, lists, platforms};
use api::http::HostAdded;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;
use types::host::{Capacity, HostSpec, TpmSpec};
use types::{ErrorCode, Problem};

pub(super) async fn add(args: HostAdd, format: Format) -> Outcome {
    let tpm = tpm(&args)?;
    let client = Client::new(&args.connection)?;
    let spec = HostSpec {
        name: args.name,
        control_address: args.control_address,
        migration_address: args.migration_address,
        macs: args.macs.iter().map(|mac| mac.to_ascii_lowercase()).collect(),
        capacity: Capacity { memory_bytes: args.memory, vcpus: args.vcpus, vms: args.vms },
        zone: args.zone,
        tpm,
    };
    let added = client.add_host(&spec).await?;
    output::print(format, &added, |added, _| added_text(added));
    Ok(DONE)
}

/// A TPM vendor's certificate has a kilobyte or two.
const CERTIFICATE_LIMIT_BYTES: u64 = 64 * 1024;

/// The TPM that the record is to name, if any.
fn tpm(args: &HostAdd) -> Result<Option<TpmSpec>, Error> {
    let vendor_roots = args.ek_vendor_roots.iter().map(|path| certificate(path));
    let spec = TpmSpec {
        ek_name: args.ek_name.clone(),
        vendor_roots: vendor_roots.collect::<Result<_, _>>()?,
        class: args.class.clone(),
        record_pcrs: args.record_pcrs.clone(),
    };
    let names_one = spec.ek_name.is_some() || !spec.vendor_roots.is_empty();
    if !names_one && spec != TpmSpec::default() {
        let detail = "--class and --record-pcrs are of a TPM, and none is named";
        let hint = "give --ek-name with what `outrider host ek` prints on that machine";
        return Err(Error::Daemon(Problem::new(ErrorCode::BadRequest, detail).hint(hint)));
    }
    Ok(Some(spec).filter(|_| names_one))
}

/// A certificate, PEM or DER, as DER in base64.
fn certificate(path: &Path) -> Result<String, InputError> {
    let read = |source| InputError::Read { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    File::open(path)
        .map_err(read)?
        .take(CERTIFICATE_LIMIT_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(read)?;
    if bytes.len() as u64 > CERTIFICATE_LIMIT_BYTES {
        return Err(InputError::TooLarge { path: path.to_owned(), limit_bytes: CERTIFICATE_LIMIT_BYTES });
    }
    let Ok(text) = str::from_utf8(&bytes) else { return Ok(STANDARD.encode(&bytes)) };
    let body =
        text.split_once("-----BEGIN CERTIFICATE-----").and_then(|(_, rest)| rest.split_once("-----END"));
    let body = body.ok_or_else(|| InputError::Malformed {
        place: path.display().to_string(),
        reason: "neither a certificate in PEM nor one in DER".to_owned(),
    })?;
    Ok(body.0.split_whitespace().collect())
}

/// The token is the point, alone on its line so that it can be copied whole.
fn added_text(added: &HostAdded) -> String {
    format!(
        "{name} is enrolled. On {name}, as root, run:\n\n  outrider host join {token}\n\n\
         The token works once and is not shown again.\n",
        name = added.host.name,
        token = output::text::clean(&added.join_token),
    )
}

pub(super) async fn list(args: ListHosts, format: Format) -> Outcome {
    let hosts = Client::new(&args.connection)?.hosts().await?;
    output::print(format, &hosts, |hosts, width| lists::hosts(hosts, now(), width));
    Ok(DONE)
}

pub(super) async fn show(args: ShowHost, format: Format) -> Outcome {
    let host = Client::new(&args.connection)?.host(&args.name).await?;
    output::print(format, &host, |host, width| lists::host(host, now(), width));
    Ok(DONE)
}

pub(super) async fn attest(args: ShowHost, format: Format) -> Outcome {
    let seen = Client::new(&args.connection)?.attest_host(&args.name).await?;
    output::print(format, &seen, |seen, width| platforms::attestation(seen, now(), width));
    Ok(if seen.verdict == "trusted" { DONE } else { NEGATIVE })
}
