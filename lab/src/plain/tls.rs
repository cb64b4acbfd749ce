//! What QEMU's own TLS needs: an authority, a certificate per host, file names that QEMU prescribes, parameters.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose,
};
use serde_json::{Value, json};

use crate::net::Machine;

/// A folder per side in the form that QEMU's `tls-creds-x509` reads.
pub(super) struct Certificates {
    folder: PathBuf,
}

impl Certificates {
    pub(super) fn make(folder: &Path) -> Result<Self> {
        let key = KeyPair::generate().context("making the authority's key")?;
        let mut authority = params("outrider lab authority", vec![])?;
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let pem = authority.self_signed(&key).context("signing the authority")?.pem();
        let issuer = Issuer::new(authority, key);
        for host in Machine::HOSTS {
            write_host(&folder.join(host.name()), host, &issuer, &pem)?;
        }
        Ok(Self { folder: folder.to_owned() })
    }

    pub(super) fn source_arguments(&self) -> Vec<String> {
        self.arguments(Machine::HostA, "client")
    }

    pub(super) fn target_arguments(&self) -> Vec<String> {
        let mut words = self.arguments(Machine::HostB, "server");
        let source = Machine::HostA.name();
        words.extend(["-object".to_owned(), format!("authz-simple,id=authz0,identity=CN={source}")]);
        words
    }

    fn arguments(&self, host: Machine, endpoint: &str) -> Vec<String> {
        let folder = self.folder.join(host.name());
        let object =
            format!("tls-creds-x509,id=tls0,dir={},endpoint={endpoint},verify-peer=yes", folder.display());
        vec!["-object".to_owned(), object]
    }
}

pub(super) fn source_parameters() -> Value {
    json!({"tls-creds": "tls0", "tls-hostname": Machine::HostB.name()})
}

pub(super) fn target_parameters() -> Value {
    json!({"tls-creds": "tls0", "tls-authz": "authz0"})
}

fn params(name: &str, alternatives: Vec<String>) -> Result<CertificateParams> {
    let mut params = CertificateParams::new(alternatives).context("naming a certificate")?;
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    Ok(params)
}

fn write_host(folder: &Path, host: Machine, issuer: &Issuer<'_, KeyPair>, authority: &str) -> Result<()> {
    let key = KeyPair::generate().context("making a host's key")?;
    let mut host_params = params(host.name(), vec![host.name().to_owned(), host.migration_address()])?;
    // QEMU insists on keyEncipherment, also for keys that can't encipher.
    host_params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
    host_params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let certificate = host_params.signed_by(&key, issuer).context("signing a host's certificate")?;
    fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
    write(&folder.join("ca-cert.pem"), authority)?;
    for endpoint in ["client", "server"] {
        write(&folder.join(format!("{endpoint}-cert.pem")), &certificate.pem())?;
        write(&folder.join(format!("{endpoint}-key.pem")), &key.serialize_pem())?;
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<()> {
    let mut options = OpenOptions::new();
    let file = options.write(true).create(true).truncate(true).mode(0o600).open(path);
    file.and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("writing {}", path.display()))
}
