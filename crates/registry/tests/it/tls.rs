//! A server over TCP: its certificate counts, and the password goes nowhere else.

use crate::place::append;
use crate::postgres::Cluster;
use crate::skip;
use outrider_registry::{Database, Registry};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use types::{ErrorCode, Problem};

const PASSWORD: &str = "p@ss/w:rd %41 ü";

struct Ca {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

fn ca() -> Ca {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let pem = params.self_signed(&key).unwrap().pem();
    Ca { pem, issuer: Issuer::new(params, key) }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn private(path: &Path, text: &str) {
    std::fs::write(path, text).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
}

#[tokio::test]
async fn a_server_is_believed_by_its_certificate_only_and_gets_the_password_of_the_file() {
    let port = free_port();
    let settings = format!(
        "listen_addresses = '127.0.0.1'\nport = {port}\nssl = on\nssl_cert_file = 'tls.pem'\n\
         ssl_key_file = 'tls.key'\npassword_encryption = 'scram-sha-256'\n"
    );
    let mut cluster = match Cluster::prepare(&settings) {
        Ok(cluster) => cluster,
        Err(why) => return skip::skip(&why),
    };
    cluster.listen_on(port);
    let (ours, other) = (ca(), ca());
    let key = KeyPair::generate().unwrap();
    let certificate = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    cluster.write("tls.pem", &certificate.signed_by(&key, &ours.issuer).unwrap().pem());
    cluster.write("tls.key", &key.serialize_pem());
    cluster.write("pg_hba.conf", "local all all trust\nhostssl all all 127.0.0.1/32 scram-sha-256\n");
    cluster.run();
    cluster.sql("postgres", "CREATE DATABASE registry");
    cluster.sql("postgres", &format!("ALTER ROLE outrider PASSWORD '{PASSWORD}'"));

    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    private(&at("ours.pem"), &ours.pem);
    private(&at("other.pem"), &other.pem);
    private(&at("password"), &format!("{PASSWORD}\n"));
    private(&at("wrong"), "hunter2\n");
    let open = async |host: &str, root: &str, password: &str| {
        let root = at(root);
        // No sslmode: over a network verify-full is the default, on loopback it has to be said.
        let url = format!(
            "postgres://outrider@{host}:{port}/registry?sslmode=verify-full&sslrootcert={}",
            root.display()
        );
        let database: Database = url.parse().unwrap();
        let opened = Registry::open(&database.with_password_file(&at(password)).unwrap()).await;
        opened.map_err(Problem::from)
    };
    let registry = open("localhost", "ours.pem", "password").await.unwrap();
    append(&registry, "over TLS").await.unwrap();
    let sessions = "SELECT count(*) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) \
                    WHERE ssl AND usename = 'outrider'";
    assert_ne!(cluster.sql("postgres", sessions), "0");
    registry.close().await;

    for (host, root, password, part) in [
        ("localhost", "other.pem", "password", "certificate"),
        ("127.0.0.1", "ours.pem", "password", "certificate"),
        ("localhost", "ours.pem", "wrong", "password authentication failed"),
    ] {
        let problem = open(host, root, password).await.map(|_| ()).unwrap_err();
        assert_eq!(problem.code, ErrorCode::RegistryUnavailable);
        assert!(problem.detail.contains(part), "{host} {root} {password}: {}", problem.detail);
        assert!(
            !problem.detail.contains(PASSWORD) && !problem.detail.contains("hunter2"),
            "{}",
            problem.detail
        );
    }
    // A server, or somebody before it, that speaks no TLS gets nothing.
    cluster.sql("postgres", "ALTER SYSTEM SET ssl = off");
    cluster.stop();
    cluster.run();
    let problem = open("localhost", "ours.pem", "password").await.map(|_| ()).unwrap_err();
    assert!(problem.detail.contains("TLS"), "{}", problem.detail);
}
