//! Scanners: one sandboxed process per migration that looks for signatures in guest pages. The daemon starts it, sends
//! it the rules over its socket (its standard input), and hands its own end of that socket to the VM agent: not a byte
//! of guest memory passes here.

use crate::cgroup::Group;
use crate::error::{HostError, chain};
use crate::folders::{private_folder, remove_file};
use crate::process::{Process, Spawn, watch};
use crate::sweep;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType};
use rustix::process::Signal;
use signature::frame::{AnswerReader, MAX_NAME_BYTES, MAX_RULES_BYTES, MAX_SOURCE_BYTES};
use signature::{Answer, Request};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::unix::AsyncFd;
use types::{ErrorCode, Problem};

/// Fifty rules are compiled in a tenth of a second, thousands take some.
const READY_TIMEOUT: Duration = Duration::from_secs(30);
/// Files of rules in a folder.
const MAX_FILES: usize = 1000;
/// What such a file is called.
const EXTENSIONS: [&str; 2] = ["yar", "yara"];

/// Starts scanners.
#[derive(Debug, Clone)]
pub struct ScannerSpawner {
    binary: Option<PathBuf>,
    rules: Option<PathBuf>,
    group: Group,
    folder: PathBuf,
    started: Arc<AtomicU64>,
}

/// A live scanner, whose socket was handed on. It ends when the agent closes that, or when told to.
#[derive(Debug, Clone)]
pub struct Scanner {
    process: Process,
    group: Group,
    log: PathBuf,
}

/// What a fresh scanner said of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ready {
    /// How many rules it compiled.
    pub rules: u32,
    /// Which parts of its sandbox are in force.
    pub sandbox: String,
}

impl ScannerSpawner {
    /// Of scanners that run `binary` (the one beside this program when `None`) with the rules of a file or folder, in
    /// children of `group`, with their logs in `folder`.
    #[must_use]
    pub fn new(binary: Option<PathBuf>, rules: Option<PathBuf>, group: Group, folder: PathBuf) -> Self {
        Self { binary, rules, group, folder, started: Arc::default() }
    }

    /// Starts one that has its rules, and gives the socket for [`types::agent::Descriptor::Scanner`].
    ///
    /// # Errors
    /// `missing-program`; `bad-configuration` when there are no rules, or they do not compile.
    pub async fn spawn(&self) -> Result<(Scanner, OwnedFd, Ready), Problem> {
        let binary = self.locate()?;
        let sources = self.read_rules()?;
        let (scanner, socket) = self.start(&binary).map_err(|e| e.problem())?;
        match tokio::time::timeout(READY_TIMEOUT, introduce(&socket, &sources)).await {
            Ok(Ok(ready)) => {
                tracing::debug!(rules = ready.rules, sandbox = ready.sandbox, "a scanner is ready");
                Ok((scanner, socket.into_inner(), ready))
            }
            Ok(Err(problem)) => {
                scanner.end().await;
                Err(problem)
            }
            Err(_) => {
                scanner.end().await;
                Err(Problem::new(ErrorCode::Internal, "the scanner did not compile its rules in time"))
            }
        }
    }

    /// Whether there is a scanner, and rules that can be read: known before anything is started for a migration.
    ///
    /// # Errors
    /// As [`Self::spawn`].
    pub fn check(&self) -> Result<(), Problem> {
        self.locate()?;
        self.read_rules().map(drop)
    }

    /// At the daemon's start: scanners of an earlier daemon are ended, and what was made for them is removed.
    pub async fn end_orphans(&self) {
        sweep::end_orphans(&self.group, &self.folder).await;
    }

    fn locate(&self) -> Result<PathBuf, Problem> {
        let beside = || {
            let mut path = std::env::current_exe().ok()?;
            path.set_file_name("outrider-scanner");
            Some(path)
        };
        self.binary.clone().or_else(beside).filter(|path| path.is_file()).ok_or_else(|| {
            let text =
                "the permit asks for signatures, and the scanner `outrider-scanner` does not exist here";
            Problem::new(ErrorCode::MissingProgram, text).hint(
                "install it beside the outrider program, or set scanner_binary in the host's configuration",
            )
        })
    }

    fn read_rules(&self) -> Result<Vec<(String, Vec<u8>)>, Problem> {
        let bad = |text: String| Problem::new(ErrorCode::BadConfiguration, text);
        let path = self.rules.as_ref().ok_or_else(|| {
            bad("the permit asks for signatures, and signature_rules is not set in the host's configuration".to_owned())
        })?;
        let unreadable = |e: HostError| bad(chain(&e));
        let mut sources = Vec::new();
        for file in rule_files(path).map_err(unreadable)? {
            let text = std::fs::read(&file)
                .map_err(|e| unreadable(HostError::file("cannot read the rules", &file, e)))?;
            let name = file.file_name().unwrap_or(file.as_os_str()).to_string_lossy().into_owned();
            let fits = text.len() <= MAX_SOURCE_BYTES && name.len() <= MAX_NAME_BYTES;
            if !fits {
                let most = MAX_SOURCE_BYTES >> 20;
                return Err(bad(format!("{}: a file of rules has at most {most} MiB", file.display())));
            }
            sources.push((name, text));
        }
        let total: usize = sources.iter().map(|(_, text)| text.len()).sum();
        if sources.is_empty() || total > MAX_RULES_BYTES {
            let most = MAX_RULES_BYTES >> 20;
            let text =
                format!("{}: no files *.yar or *.yara, or more than {most} MiB of them", path.display());
            return Err(bad(text));
        }
        Ok(sources)
    }

    fn start(&self, binary: &Path) -> Result<(Scanner, AsyncFd<OwnedFd>), HostError> {
        let name = format!("scanner-{}", self.started.fetch_add(1, Ordering::Relaxed));
        let group = self.group.child(&name);
        let log = self.folder.join(format!("{name}.log"));
        group.create()?;
        self.start_in(binary, &group, &log).inspect_err(|_| {
            // Nothing runs in it: what could not be started has no use for its place.
            group.remove().ok();
            std::fs::remove_file(&log).ok();
        })
    }

    fn start_in(
        &self,
        binary: &Path,
        group: &Group,
        log: &Path,
    ) -> Result<(Scanner, AsyncFd<OwnedFd>), HostError> {
        private_folder(&self.folder)?;
        let system = |e: Errno| HostError::system("cannot make a socket pair", e);
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                .map_err(system)?;
        rustix::io::ioctl_fionbio(&ours, true).map_err(system)?;
        let process = Spawn {
            program: binary,
            arguments: vec![],
            environment: vec![],
            group,
            user: None,
            input: theirs.into(),
            log,
        }
        .start()?;
        let socket = watch(ours).map_err(|e| HostError::system("cannot watch a scanner's socket", e))?;
        Ok((Scanner { process, group: group.clone(), log: log.to_owned() }, socket))
    }
}

/// One file, or those of a folder, sorted.
fn rule_files(path: &Path) -> Result<Vec<PathBuf>, HostError> {
    let failed = |e| HostError::file("cannot read the rules", path, e);
    if !std::fs::metadata(path).map_err(failed)?.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let is_rules =
        |file: &PathBuf| file.extension().is_some_and(|e| EXTENSIONS.iter().any(|known| e == *known));
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(failed)? {
        files.extend(Some(entry.map_err(failed)?.path()).filter(is_rules));
    }
    files.sort();
    files.truncate(MAX_FILES);
    Ok(files)
}

/// Sends the rules; the scanner says what it made of them.
async fn introduce(socket: &AsyncFd<OwnedFd>, sources: &[(String, Vec<u8>)]) -> Result<Ready, Problem> {
    let internal = |text: String| Problem::new(ErrorCode::Internal, format!("the scanner: {text}"));
    let rules = sources.iter().map(|(name, source)| Request::Rules { name, source });
    for request in rules.chain([Request::Start]) {
        let frame = request.encode().map_err(|e| internal(e.to_string()))?;
        // One that closes early may have said why.
        if send_all(socket, &frame).await.is_err() {
            break;
        }
    }
    match first_answer(socket).await.map_err(internal)? {
        Answer::Ready { rules, sandbox } => Ok(Ready { rules, sandbox }),
        Answer::Refused { why } => {
            Err(Problem::new(ErrorCode::BadConfiguration, format!("signature_rules: {why}")))
        }
        _ => Err(internal("it answered out of turn".to_owned())),
    }
}

async fn send_all(socket: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> Result<(), String> {
    while !bytes.is_empty() {
        let mut ready = socket.writable().await.map_err(|e| e.to_string())?;
        match rustix::net::send(socket.get_ref(), bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(Errno::WOULDBLOCK) => ready.clear_ready(),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.to_string()),
        }
    }
    Ok(())
}

/// The one answer before any batch: nothing can come behind it that would be lost here.
async fn first_answer(socket: &AsyncFd<OwnedFd>) -> Result<Answer, String> {
    let (mut reader, mut answers, mut buffer) = (AnswerReader::default(), Vec::new(), [0; 4096]);
    while answers.is_empty() {
        let mut ready = socket.readable().await.map_err(|e| e.to_string())?;
        match rustix::net::recv(socket.get_ref(), &mut buffer[..], rustix::net::RecvFlags::DONTWAIT) {
            Ok((_, 0)) => return Err("it ended before it was ready".to_owned()),
            Ok((_, count)) => {
                let bytes = buffer.get(..count).unwrap_or_default();
                reader.feed(bytes, |answer| answers.push(answer)).map_err(|e| format!("it sent {e}"))?;
            }
            Err(Errno::WOULDBLOCK) => ready.clear_ready(),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.to_string()),
        }
    }
    if answers.len() > 1 {
        return Err("it answered out of turn".to_owned());
    }
    answers.pop().ok_or_else(|| "it did not answer".to_owned())
}

impl Scanner {
    /// Ends it, and removes what was made for it.
    pub async fn end(&self) {
        if let Err(error) = self.process.signal(Signal::KILL) {
            tracing::error!(%error, "cannot end a scanner");
        }
        self.process.exited().await;
        let scanner = self.clone();
        // Nobody waits for the sweeping.
        tokio::spawn(async move {
            sweep::remove_group(&scanner.group).await;
            let said = std::fs::read_to_string(&scanner.log).unwrap_or_default();
            for line in said.lines().take(50) {
                tracing::debug!(scanner = line);
            }
            remove_file(&scanner.log);
        });
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::cgroup::Hierarchies;

    fn spawner(rules: Option<PathBuf>) -> ScannerSpawner {
        let group = Hierarchies::default().group("unused");
        ScannerSpawner::new(None, rules, group, PathBuf::from("/nonexistent"))
    }

    #[test]
    fn rules_come_from_a_file_or_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in [("b.yar", "b"), ("a.yara", "a"), ("notes.txt", "n")] {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        let names = |path: PathBuf| {
            let sources = spawner(Some(path)).read_rules().unwrap();
            sources.into_iter().map(|(name, _)| name).collect::<Vec<_>>()
        };
        assert_eq!(names(folder.path().to_owned()), ["a.yara", "b.yar"]);
        assert_eq!(names(folder.path().join("notes.txt")), ["notes.txt"]);
    }

    #[test]
    fn missing_rules_are_said_to_be() {
        let empty = tempfile::tempdir().unwrap();
        for (rules, says) in [
            (None, "signature_rules is not set"),
            (Some(PathBuf::from("/nonexistent.yar")), "cannot read the rules"),
            (Some(empty.path().to_owned()), "no files"),
        ] {
            let problem = spawner(rules).read_rules().unwrap_err();
            assert_eq!(problem.code, ErrorCode::BadConfiguration);
            assert!(problem.detail.contains(says), "{}", problem.detail);
        }
    }
}
