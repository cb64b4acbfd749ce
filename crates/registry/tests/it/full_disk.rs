//! A disk that fills up under an SQLite registry.

use crate::place::Place;
use crate::skip::skip;
use outrider_registry::AuditVerdict;
use serde_json::json;
use std::path::Path;
use types::ErrorCode;

/// Fills a small file system of its own, writes until it is full, makes room, writes again.
#[tokio::test]
async fn a_full_disk_refuses_loses_nothing_and_recovers() {
    let folder = tempfile::tempdir().unwrap();
    let mount = folder.path().join("small");
    std::fs::create_dir(&mount).unwrap();
    let mounted = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=2m", "tmpfs"])
        .arg(&mount)
        .status()
        .is_ok_and(|s| s.success());
    if !mounted {
        skip("this user may not mount a tmpfs");
        return;
    }
    let _unmount = Unmount(&mount);
    let place = Place::at(mount.join("r.db").display().to_string());
    let (registry, _) = place.furnished().await;
    let ballast = mount.join("ballast");
    let mut size = 1 << 20;
    while size > 256 {
        let mut old = std::fs::read(&ballast).unwrap_or_default();
        old.resize(old.len() + size, 0);
        if std::fs::write(mount.join("next"), &old).is_err() {
            let _ignored = std::fs::remove_file(mount.join("next"));
            // Written in place, so that the last bytes are taken as well.
            use std::io::Write as _;
            let mut file = std::fs::OpenOptions::new().create(true).append(true).open(&ballast).unwrap();
            while file.write_all(&[0; 4096]).is_ok() {}
            break;
        }
        std::fs::rename(mount.join("next"), &ballast).unwrap();
        size /= 2;
    }
    let mut accepted = 0;
    let error = loop {
        let written = async {
            let mut tx = registry.begin("write", 2).await?;
            tx.audit("x", "fill", "disk", json!({ "n": "x".repeat(2000) })).await?;
            tx.commit().await
        };
        match written.await {
            Ok(()) => accepted += 1,
            Err(error) => break error,
        }
        assert!(accepted < 2000, "the disk never filled");
    };
    assert_eq!(error.code(), ErrorCode::RegistryUnavailable);
    assert!(registry.probe(3).await.is_err(), "still full");
    let mut tx = registry.read("look").await.unwrap();
    let AuditVerdict::Whole { entries, .. } = tx.verify_audit(None).await.unwrap() else {
        panic!("a full disk broke the chain")
    };
    assert_eq!(entries, 5 + accepted, "what was acknowledged is there, what was refused is not");
    drop(tx);
    std::fs::remove_file(&ballast).unwrap();
    registry.probe(4).await.unwrap();
    let mut tx = registry.begin("write", 5).await.unwrap();
    tx.audit("x", "room", "again", json!({})).await.unwrap();
    tx.commit().await.unwrap();
    registry.close().await;
}

struct Unmount<'a>(&'a Path);
impl Drop for Unmount<'_> {
    fn drop(&mut self) {
        let done = std::process::Command::new("umount").arg("--lazy").arg(self.0).status();
        assert!(done.is_ok_and(|s| s.success()), "cannot unmount {}", self.0.display());
    }
}
