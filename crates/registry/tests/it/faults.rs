//! Faults of a PostgreSQL server and of the processes that use it: killed, restarted, frozen, hung, not
//! durable.

use crate::place::{Place, append, count, whole};
use crate::postgres::Cluster;
use crate::skip;
use outrider_registry::{Registry, RegistryError};
use rand::{Rng, SeedableRng};
use serde_json::json;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};
use types::ErrorCode;

/// Names, for the process that is held, the database; without it that "test" does nothing.
const HELD_URL: &str = "OUTRIDER_REGISTRY_HELD_URL";
/// The stated bound is 2 s without a statement; the rest is for a loaded machine.
const FREED_WITHIN: Duration = Duration::from_secs(6);

fn cluster(settings: &str) -> Option<Cluster> {
    Cluster::start_with(settings).inspect_err(|why| skip::skip(why)).ok()
}

/// A server, and a registry on it that has written once.
async fn started() -> Option<(Cluster, Place, Registry)> {
    let cluster = cluster("")?;
    let place = Place::at(cluster.database());
    let registry = place.open().await;
    append(&registry, "before").await.unwrap();
    Some((cluster, place, registry))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_killed_between_statements_takes_the_transaction_with_it() {
    let Some((mut cluster, _, registry)) = started().await else { return };
    let mut tx = registry.begin("killed", 2).await.unwrap();
    tx.audit("x", "killed", "half", json!({})).await.unwrap();
    cluster.kill();
    let failed = tx.audit("x", "killed", "half", json!({})).await.unwrap_err();
    assert_eq!(failed.code(), ErrorCode::RegistryUnavailable, "{failed:?}");
    assert!(matches!(tx.commit().await, Err(RegistryError::Spoilt { .. })));
    let since = Instant::now();
    let error = append(&registry, "down").await.unwrap_err();
    assert!(since.elapsed() < Duration::from_secs(15), "it took {:?} to say so", since.elapsed());
    assert!(matches!(error, RegistryError::Unavailable { .. }), "{error:?}");
    cluster.run();
    append(&registry, "after").await.unwrap();
    assert_eq!((count(&registry, "half").await, count(&registry, "down").await), (0, 0));
    assert_eq!(whole(&registry).await, 2);
}

/// Kills the whole server at a random moment around a commit, and starts it again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_killed_at_a_commit_has_committed_or_not() {
    let Some((mut cluster, _, registry)) = started().await else { return };
    let seed: u64 = rand::rng().random();
    println!("seed {seed}");
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let (mut done, mut not_done, mut unknown) = (0, 0, 0);
    for round in 0..30 {
        let subject = format!("round {round}");
        let mut tx = registry.begin("commit", 2).await.unwrap();
        tx.audit("x", "commit", &subject, json!({})).await.unwrap();
        let processes = cluster.processes();
        let (commit_us, kill_us) = (random.random_range(0..1_000), random.random_range(0..1_500));
        let committing = tokio::spawn(async move {
            std::thread::sleep(Duration::from_micros(commit_us));
            tx.commit().await
        });
        std::thread::sleep(Duration::from_micros(kill_us));
        cluster.kill_these(&processes);
        cluster.run();
        let result = committing.await.unwrap();
        let there = count(&registry, &subject).await;
        match &result {
            Ok(()) => assert_eq!(there, 1, "{subject} was told as done"),
            Err(RegistryError::Unavailable { .. }) => assert_eq!(there, 0, "{subject} was told as not done"),
            Err(RegistryError::CommitUnknown { .. }) => {
                assert!(there <= 1, "{subject}");
                unknown += 1;
            }
            Err(other) => panic!("{other:?}"),
        }
        (done, not_done) = (done + there, not_done + (1 - there));
    }
    println!("{done} commits happened, {not_done} did not; of {unknown} nobody was told");
    assert!(unknown < 15, "the server is back at once: most can be asked after");
    assert_eq!(whole(&registry).await, 1 + done as u64);
}

/// Every connection of the pool is dead after a restart; nobody is to notice.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_restart_of_the_server_the_first_tries_succeed() {
    let Some((mut cluster, _, registry)) = started().await else { return };
    for round in 0..2 {
        let readers = futures::future::join_all((0..6).map(|_| registry.read("fill the pool"))).await;
        for mut reader in readers.into_iter().map(Result::unwrap) {
            reader.audit_head().await.unwrap();
        }
        if round == 0 {
            cluster.stop()
        } else {
            cluster.kill()
        }
        cluster.run();
        append(&registry, "after").await.unwrap();
        let reads = (0..6).map(|_| async { registry.read("look").await?.audit_head().await });
        for read in futures::future::join_all(reads).await {
            read.unwrap();
        }
    }
    assert_eq!(whole(&registry).await, 3);
}

/// A process of its own with a transaction that has written and does not commit, until it is told to.
struct Held {
    process: Child,
    stdin: ChildStdin,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Held {
    fn start(place: &Place) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "faults::a_process_that_is_held", "--ignored", "--nocapture"])
            .env(HELD_URL, place.url())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (stdin, stdout) = (process.stdin.take().unwrap(), process.stdout.take().unwrap());
        let mut held = Self { process, stdin, lines: BufReader::new(stdout).lines() };
        held.wait_for("HOLDING");
        held
    }

    fn wait_for(&mut self, word: &str) -> String {
        for line in self.lines.by_ref() {
            let line = line.unwrap();
            if line.starts_with(word) {
                return line;
            }
        }
        panic!("it never said {word}");
    }

    fn signal(&self, name: &str) {
        let pid = self.process.id().to_string();
        assert!(Command::new("kill").args([&format!("-{name}"), &pid]).status().unwrap().success());
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        drop(self.process.kill());
        self.process.wait().unwrap();
    }
}

#[test]
#[ignore = "a process that other tests start and stop"]
fn a_process_that_is_held() {
    let Some(url) = std::env::var_os(HELD_URL) else { return };
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let registry = Place::at(url.into_string().unwrap()).open().await;
        let mut tx = registry.begin("held", 2).await.unwrap();
        tx.audit("x", "held", "frozen", json!({})).await.unwrap();
        println!("HOLDING");
        std::io::stdin().lock().read_line(&mut String::new()).unwrap();
        let told = match tx.commit().await {
            Ok(()) => "done".to_owned(),
            Err(RegistryError::Unavailable { source, .. }) => format!("not done: {source}"),
            Err(other) => format!("{other:?}"),
        };
        println!("TOLD {told}");
        let again = append(&registry, "thawed").await;
        println!("AGAIN {again:?}");
    });
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_manager_that_is_frozen_in_a_transaction_does_not_freeze_the_others() {
    let Some(place) = Place::postgres() else { return };
    let registry = place.open().await;
    let mut held = Held::start(&place);
    held.signal("STOP");
    let since = Instant::now();
    append(&registry, "meanwhile").await.unwrap();
    let waited = since.elapsed();
    println!("the next writer waited {waited:?}");
    assert!(waited < FREED_WITHIN, "it waited {waited:?}");
    held.signal("CONT");
    held.stdin.write_all(b"commit\n").unwrap();
    let told = held.wait_for("TOLD");
    assert!(told.starts_with("TOLD not done"), "{told}");
    assert_eq!(held.wait_for("AGAIN"), "AGAIN Ok(())");
    assert_eq!(count(&registry, "frozen").await, 0);
    assert_eq!((count(&registry, "meanwhile").await, count(&registry, "thawed").await), (1, 1));
    assert_eq!(whole(&registry).await, 2);
}

/// A manager that was killed has no time-out to wait for: its connection closes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_manager_that_is_killed_in_a_transaction_is_gone_at_once() {
    let Some(place) = Place::postgres() else { return };
    let registry = place.open().await;
    let held = Held::start(&place);
    held.signal("KILL");
    let since = Instant::now();
    append(&registry, "meanwhile").await.unwrap();
    assert!(since.elapsed() < Duration::from_millis(1_500), "it waited {:?}", since.elapsed());
    assert_eq!((count(&registry, "frozen").await, whole(&registry).await), (0, 1));
}

/// Never idle for long enough, and never done: the next writer ends it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_transaction_that_is_kept_busy_is_ended_by_the_next_writer() {
    let Some(place) = Place::postgres() else { return };
    let (registry, endless) = (place.open().await, place.open().await);
    let mut tx = endless.begin("endless", 2).await.unwrap();
    tx.audit("x", "endless", "endless", json!({})).await.unwrap();
    let busy = tokio::spawn(async move {
        loop {
            if let Err(error) = tx.audit_head().await {
                return (tx.commit().await, error);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    let since = Instant::now();
    append(&registry, "next").await.unwrap();
    println!("the next writer waited {:?}", since.elapsed());
    assert!(since.elapsed() < Duration::from_secs(14), "it waited {:?}", since.elapsed());
    let (committed, error) = busy.await.unwrap();
    assert!(matches!(committed, Err(RegistryError::Spoilt { .. })), "{committed:?}");
    assert_eq!(error.code(), ErrorCode::RegistryUnavailable);
    assert_eq!((count(&registry, "endless").await, whole(&registry).await), (0, 1));
}

/// A server that takes connections and answers nothing: everybody is told, in bounded time, and it goes on
/// after.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_hangs_is_told_in_time() {
    let Some((cluster, _, registry)) = started().await else { return };
    cluster.signal_all("STOP");
    let since = Instant::now();
    let tries = (0..8).map(|n| {
        let registry = registry.clone();
        async move {
            if n % 2 == 0 {
                append(&registry, "hung").await
            } else {
                async { registry.read("hung").await?.audit_head().await }.await.map(|_| ())
            }
        }
    });
    for told in futures::future::join_all(tries).await {
        assert!(matches!(told, Err(RegistryError::Unavailable { .. })), "{told:?}");
    }
    let waited = since.elapsed();
    cluster.signal_all("CONT");
    println!("told after {waited:?}");
    assert!(waited < Duration::from_secs(35), "told after {waited:?}");
    append(&registry, "after").await.unwrap();
    assert_eq!((count(&registry, "hung").await, whole(&registry).await), (0, 2));
}

/// With a replica that has to confirm and does not, a commit is not done, whatever the server's role says:
/// neither the role's `synchronous_commit` nor a time-out may make a success of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_no_replica_confirms_is_not_told_as_done() {
    let Some((cluster, place, first)) = started().await else { return };
    cluster.sql("postgres", "ALTER ROLE outrider SET synchronous_commit = off");
    cluster.sql("postgres", "ALTER ROLE outrider SET statement_timeout = '1s'");
    first.close().await;
    let registry = place.open().await;
    cluster.sql("postgres", "ALTER SYSTEM SET synchronous_standby_names = 'nobody'");
    cluster.sql("postgres", "SELECT pg_reload_conf()");
    wait_for_setting(&cluster, "nobody");
    let error = append(&registry, "unconfirmed").await.unwrap_err();
    assert!(matches!(error, RegistryError::CommitUnknown { .. }), "{error:?}");
    cluster.sql("postgres", "ALTER SYSTEM RESET synchronous_standby_names");
    cluster.sql("postgres", "SELECT pg_reload_conf()");
    append(&registry, "confirmed").await.unwrap();
    assert_eq!(count(&registry, "unconfirmed").await, 1);
    assert_eq!(whole(&registry).await, 3);
}

fn wait_for_setting(cluster: &Cluster, value: &str) {
    let since = Instant::now();
    while cluster.sql("postgres", "SHOW synchronous_standby_names") != value {
        assert!(since.elapsed() < Duration::from_secs(20), "the server never took its new configuration");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[tokio::test]
async fn a_server_whose_word_does_not_count_is_refused() {
    let Some(cluster) = cluster("fsync = off\n") else { return };
    let refused = async |url: String, part: &str| {
        let error = Registry::open(&url.parse().unwrap()).await.map(|_| ()).unwrap_err();
        assert_eq!(error.code(), ErrorCode::RegistryUnavailable);
        let text = types::Problem::from(error).detail;
        assert!(text.contains(part), "{text} does not say {part}");
    };
    refused(cluster.database(), "fsync").await;
    cluster.sql("postgres", "CREATE DATABASE odd ENCODING 'SQL_ASCII' TEMPLATE template0 LOCALE 'C'");
    cluster.sql("postgres", "ALTER SYSTEM SET fsync = on");
    cluster.sql("postgres", "SELECT pg_reload_conf()");
    let since = Instant::now();
    while cluster.sql("postgres", "SHOW fsync") != "on" {
        assert!(since.elapsed() < Duration::from_secs(20), "fsync stays off");
        std::thread::sleep(Duration::from_millis(20));
    }
    refused(cluster.url("odd"), "UTF8").await;
    refused(cluster.url("nowhere"), "nowhere").await;
    let newer = Place::at(cluster.database());
    newer.open().await.close().await;
    let mut intruder = newer.intruder().await;
    let later = "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time) \
                 VALUES (999, 'of a later version', true, '', 0)";
    sqlx::query(later).execute(&mut intruder).await.unwrap();
    refused(newer.url().to_owned(), "999").await;
}
