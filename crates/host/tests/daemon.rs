//! The daemon's start: what it refuses, and that it runs without a manager.
#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use outrider_host::{Config, JoinConfig};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;
use support::Manager;
use types::{ErrorCode, Problem};

fn config(folder: &Path) -> Config {
    Config::parse(&format!(
        "migration_address = '127.0.0.1'\nstate_folder = '{0}/s'\nrun_folder = '{0}/r'\ncgroup = 'outrider-test-daemon'",
        folder.display()
    ))
    .unwrap()
}

async fn runs_for(config: Config, time: Duration) -> Option<Problem> {
    tokio::time::timeout(time, outrider_host::run(config, std::future::pending()))
        .await
        .ok()
        .map(Result::unwrap_err)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_has_not_joined_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let problem = runs_for(config(folder.path()), Duration::from_secs(10)).await.unwrap();
    assert_eq!(problem.code, ErrorCode::Unauthenticated);
    assert!(problem.hint.unwrap().contains("host join"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_join_needs_a_whole_token_and_a_manager() {
    let folder = tempfile::tempdir().unwrap();
    let join = |token: String| JoinConfig {
        token,
        state_folder: folder.path().join("s"),
        manager: None,
        tpm: None,
        tpm_event_log: None,
    };
    let problem = outrider_host::join(&join("ojt1.nonsense".to_owned())).await.unwrap_err();
    assert_eq!(problem.code, ErrorCode::BadRequest);
    let manager = Manager::start(folder.path()).await;
    let elsewhere = JoinConfig { manager: Some("127.0.0.1:9".to_owned()), ..join(manager.token("host-a")) };
    let problem = outrider_host::join(&elsewhere).await.unwrap_err();
    assert_eq!(problem.code, ErrorCode::ManagerUnreachable);
    // Another manager than the token's CA.
    let other = tempfile::tempdir().unwrap();
    let stranger = Manager::start(other.path()).await;
    let wrong = JoinConfig { manager: Some(stranger.address.to_string()), ..join(manager.token("host-a")) };
    assert!(outrider_host::join(&wrong).await.is_err());
    assert_eq!(outrider_host::join(&join(manager.token("host-a"))).await.unwrap().as_str(), "host-a");
}

#[tokio::test(flavor = "multi_thread")]
async fn it_refuses_a_taken_folder_another_name_and_a_damaged_journal() {
    let folder = tempfile::tempdir().unwrap();
    let manager = Manager::start(folder.path()).await;
    let token = manager.token("host-a");
    let join = JoinConfig {
        token,
        state_folder: folder.path().join("s"),
        manager: None,
        tpm: None,
        tpm_event_log: None,
    };
    outrider_host::join(&join).await.unwrap();

    let named = Config { name: Some("host-x".parse().unwrap()), ..config(folder.path()) };
    let problem = runs_for(named, Duration::from_secs(10)).await.unwrap();
    assert_eq!(problem.code, ErrorCode::BadConfiguration);

    // Without its manager a daemon runs, and holds its folder.
    let lonely = Config { manager: Some("127.0.0.1:9".to_owned()), ..config(folder.path()) };
    let first = tokio::spawn(outrider_host::run(lonely.clone(), std::future::pending()));
    // Until it holds the folder.
    let lock = folder.path().join("s/lock");
    let free = || {
        // Looking must not take it.
        let Ok(file) = std::fs::metadata(&lock) else { return true };
        !std::fs::read_to_string("/proc/locks").unwrap().contains(&format!(":{} ", file.ino()))
    };
    while free() {
        assert!(!first.is_finished());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let problem = runs_for(lonely.clone(), Duration::from_secs(10)).await.unwrap();
    assert_eq!(problem.code, ErrorCode::WrongState);
    assert!(problem.detail.contains("another host daemon"));
    assert!(!first.is_finished());
    first.abort();
    first.await.unwrap_err();

    let journal = folder.path().join("s/journal");
    let mut bytes = std::fs::read(&journal).unwrap();
    bytes[30] ^= 1;
    std::fs::write(&journal, bytes).unwrap();
    let problem = runs_for(config(folder.path()), Duration::from_secs(10)).await.unwrap();
    assert_eq!(problem.code, ErrorCode::WrongState);
    assert!(problem.detail.contains("damaged"), "{problem}");
}
