//! Connections that break at a chosen point: before a commit reaches the server, after it was carried out but
//! before the answer comes back, in the middle of a transaction, or that fall silent. A decision stays
//! single: what is told as done is there once, what is told as not done is not there, and what is told as
//! unknown is one or the other.

use crate::place::{Place, append, count, whole};
use crate::{postgres, skip};
use outrider_registry::{Registry, RegistryError};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::watch;

/// Where a connection breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    Nowhere,
    /// What holds this text never reaches the server.
    Before(&'static str),
    /// It does, and is answered; the answer never comes back.
    After(&'static str),
    /// It is sent on, and both ways are cut at that moment.
    With(&'static str),
    /// It never reaches the server, and the connection stays open.
    Silence(&'static str),
}

/// A relay between a registry and the server, with a fault that strikes once.
struct Relay {
    port: u16,
    plan: Arc<Mutex<Plan>>,
}

struct Plan {
    /// Tells every connection to end.
    close: watch::Sender<()>,
    cut: Cut,
    /// Whether connections are let through, after the cut as well.
    open_after: bool,
    open: bool,
}

impl Relay {
    async fn to(socket: PathBuf) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let close = watch::Sender::new(());
        let plan = Arc::new(Mutex::new(Plan { close, cut: Cut::Nowhere, open_after: true, open: true }));
        let shared = Arc::clone(&plan);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                if shared.lock().unwrap().open {
                    let server = UnixStream::connect(&socket).await.unwrap();
                    tokio::spawn(relay(client, server, Arc::clone(&shared)));
                }
            }
        });
        Self { port, plan }
    }

    fn plan(&self, cut: Cut, open_after: bool) {
        let mut plan = self.plan.lock().unwrap();
        (plan.cut, plan.open_after, plan.open) = (cut, open_after, true);
    }

    fn url(&self, database: &str) -> String {
        format!("postgres://outrider@127.0.0.1:{}/{database}", self.port)
    }
}

/// Takes the fault, if it strikes here; from then on it is spent.
fn strike(plan: &Mutex<Plan>, sent: &[u8]) -> Cut {
    let mut plan = plan.lock().unwrap();
    let (Cut::Before(text) | Cut::After(text) | Cut::With(text) | Cut::Silence(text)) = plan.cut else {
        return Cut::Nowhere;
    };
    if !sent.windows(text.len()).any(|w| w == text.as_bytes()) {
        return Cut::Nowhere;
    }
    plan.open = plan.open_after;
    if !plan.open {
        plan.close.send_replace(());
    }
    std::mem::replace(&mut plan.cut, Cut::Nowhere)
}

async fn relay(mut client: TcpStream, mut server: UnixStream, plan: Arc<Mutex<Plan>>) {
    let mut close = plan.lock().unwrap().close.subscribe();
    let (mut from_client, mut from_server) = (vec![0; 1 << 16], vec![0; 1 << 16]);
    loop {
        tokio::select! {
            _ = close.changed() => return,
            read = client.read(&mut from_client) => {
                let Ok(length @ 1..) = read else { return };
                let sent = &from_client[..length];
                match strike(&plan, sent) {
                    Cut::Before(_) => return,
                    Cut::Silence(_) => return std::future::pending().await,
                    Cut::With(_) => return drop(server.write_all(sent).await),
                    Cut::After(_) => {
                        server.write_all(sent).await.unwrap();
                        assert!(server.read(&mut from_server).await.unwrap() > 0, "no answer");
                        return;
                    }
                    Cut::Nowhere if server.write_all(sent).await.is_err() => return,
                    Cut::Nowhere => {}
                }
            }
            read = server.read(&mut from_server) => {
                let Ok(length @ 1..) = read else { return };
                if client.write_all(&from_server[..length]).await.is_err() {
                    return;
                }
            }
        }
    }
}

/// A registry behind a relay, and one that reaches the same database directly.
struct Setting {
    relay: Relay,
    behind: Registry,
    direct: Registry,
}

async fn setting() -> Option<Setting> {
    let cluster = match postgres::shared() {
        Ok(cluster) => cluster,
        Err(why) => {
            skip::skip(&why);
            return None;
        }
    };
    let url = cluster.database();
    let direct = Place::at(url.clone()).open().await;
    let relay = Relay::to(cluster.socket()).await;
    let behind = Place::at(relay.url(database_name(&url).unwrap())).open().await;
    append(&behind, "before").await.unwrap();
    Some(Setting { relay, behind, direct })
}

fn database_name(url: &str) -> Option<&str> {
    let path = url.split_once("://")?.1.split_once('/')?.1;
    path.split('?').next()
}

/// What is told of a commit.
#[derive(Debug, PartialEq, Eq)]
enum Told {
    Done,
    NotDone,
    Unknown,
}

fn told(result: &Result<(), RegistryError>) -> Told {
    match result {
        Ok(()) => Told::Done,
        Err(RegistryError::Unavailable { .. }) => Told::NotDone,
        Err(RegistryError::CommitUnknown { .. }) => Told::Unknown,
        Err(other) => panic!("{other:?}"),
    }
}

async fn check(cut: Cut, open_after: bool, expect: Told, expect_count: usize) {
    let Some(setting) = setting().await else { return };
    setting.relay.plan(cut, open_after);
    let since = Instant::now();
    let result = append(&setting.behind, "cut").await;
    assert_eq!(told(&result), expect, "{cut:?}: {result:?}");
    // Answer, then asking after it; generous for a loaded machine, but no waiting for ever.
    assert!(since.elapsed() < Duration::from_secs(30), "{cut:?} took {:?}", since.elapsed());
    // Whoever writes next waits until it is over, and sees what came of it.
    append(&setting.direct, "next").await.unwrap();
    assert_eq!(count(&setting.direct, "cut").await, expect_count, "{cut:?}");
    setting.relay.plan(Cut::Nowhere, true);
    append(&setting.behind, "again").await.unwrap();
    assert_eq!(whole(&setting.behind).await, 3 + expect_count as u64);
}

#[tokio::test]
async fn a_commit_that_never_arrived_is_told_as_not_done() {
    check(Cut::Before("COMMIT\0"), true, Told::NotDone, 0).await;
}

#[tokio::test]
async fn a_commit_whose_answer_was_lost_is_told_as_done() {
    check(Cut::After("COMMIT\0"), true, Told::Done, 1).await;
}

#[tokio::test]
async fn a_commit_that_never_arrived_is_unknown_while_the_server_cannot_be_asked() {
    check(Cut::Before("COMMIT\0"), false, Told::Unknown, 0).await;
}

#[tokio::test]
async fn a_commit_whose_answer_was_lost_is_unknown_while_the_server_cannot_be_asked() {
    check(Cut::After("COMMIT\0"), false, Told::Unknown, 1).await;
}

#[tokio::test]
async fn a_commit_that_is_never_answered_is_asked_after() {
    check(Cut::Silence("COMMIT\0"), true, Told::NotDone, 0).await;
}

#[tokio::test]
async fn a_statement_that_is_cut_or_never_answered_leaves_nothing() {
    check(Cut::Before("INSERT INTO audit "), true, Told::NotDone, 0).await;
    check(Cut::After("INSERT INTO audit "), true, Told::NotDone, 0).await;
    check(Cut::Silence("INSERT INTO audit "), true, Told::NotDone, 0).await;
}

/// Nothing has happened yet when the beginning breaks: it is tried again.
#[tokio::test]
async fn a_beginning_that_is_cut_is_tried_again() {
    check(Cut::Before("BEGIN"), true, Told::Done, 1).await;
    check(Cut::After("BEGIN"), true, Told::Done, 1).await;
}

/// The connection ends at the very moment at which the commit is sent: the server may be before it, in it or
/// past it.
#[tokio::test]
async fn whatever_a_commit_came_to_it_is_told_rightly() {
    let Some(setting) = setting().await else { return };
    let mut done = 0;
    for round in 0..40 {
        let subject = format!("round {round}");
        setting.relay.plan(Cut::With("COMMIT\0"), true);
        let told = told(&append(&setting.behind, &subject).await);
        let there = count(&setting.direct, &subject).await;
        assert_eq!((told == Told::Done, told == Told::NotDone), (there == 1, there == 0), "{subject}");
        done += there;
    }
    println!("{done} of 40 commits happened");
    assert_eq!(whole(&setting.direct).await, 1 + done as u64);
}
