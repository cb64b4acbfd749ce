//! The two folders of the daemon, and writing small files so that a crash leaves the old or the new, never half.

use crate::error::HostError;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use types::{ErrorCode, Problem};

/// What of a program's own words goes into a problem.
const LAST_WORDS_BYTES: usize = 600;

/// Where things are.
#[derive(Debug, Clone)]
pub struct Folders {
    /// Keys, journal, records.
    pub state: PathBuf,
    /// Sockets.
    pub run: PathBuf,
}

impl Folders {
    /// Makes both, mode 0700.
    ///
    /// # Errors
    /// They can't be made.
    pub fn create(state: &Path, run: &Path) -> Result<Self, HostError> {
        for folder in [state, run, &state.join("vms")] {
            private_folder(folder)?;
        }
        Ok(Self { state: state.to_owned(), run: run.to_owned() })
    }

    /// The journal.
    #[must_use]
    pub fn journal(&self) -> PathBuf {
        self.state.join("journal")
    }

    /// The records of QEMUs.
    #[must_use]
    pub fn records(&self) -> PathBuf {
        self.state.join("vms")
    }

    /// Takes the state folder for this daemon alone; released when the descriptor closes.
    ///
    /// # Errors
    /// Another daemon has it.
    pub fn lock(&self) -> Result<OwnedFd, Problem> {
        let path = self.state.join("lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(|e| HostError::file("cannot open", &path, e).problem())?;
        rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).map_err(|_| {
            Problem::new(
                ErrorCode::WrongState,
                format!("another host daemon uses the state folder {}", self.state.display()),
            )
            .hint("stop it, or give this one its own state_folder")
        })?;
        Ok(file.into())
    }
}

/// A folder for its owner alone.
///
/// # Errors
/// It can't be made or its mode can't be set.
pub fn private_folder(folder: &Path) -> Result<(), HostError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .and_then(|()| fs::set_permissions(folder, fs::Permissions::from_mode(0o700)))
        .map_err(|e| HostError::file("cannot make private folder", folder, e))
}

/// Gives a folder to the user under whom QEMU runs.
///
/// # Errors
/// There is no such user.
pub async fn give(folder: &Path, user: &str) -> Result<(), Problem> {
    let status = tokio::process::Command::new("chown").arg(user).arg(folder).status().await;
    match status {
        Ok(status) if status.success() => Ok(()),
        _ => Err(Problem::new(ErrorCode::BadConfiguration, format!("qemu_user {user:?} does not exist"))),
    }
}

/// The end of a log, for people.
#[must_use]
pub fn last_words(log: &Path) -> String {
    let bytes = fs::read(log).unwrap_or_default();
    let tail = &bytes[bytes.len().saturating_sub(LAST_WORDS_BYTES)..];
    let text = String::from_utf8_lossy(tail).trim().to_owned();
    if text.is_empty() { "it said nothing".to_owned() } else { text }
}

/// Writes a private file durably: the old content or the new one survives a crash.
///
/// # Errors
/// The disk is full, or the folder can't be written.
pub fn write_durably(path: &Path, bytes: &[u8]) -> Result<(), HostError> {
    let draft = path.with_extension("new");
    let write = || -> std::io::Result<()> {
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&draft)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&draft, path)?;
        File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
    };
    write().map_err(|e| {
        fs::remove_file(&draft).ok();
        HostError::file("cannot write", path, e)
    })
}

/// Removes a file; one that is not there is fine.
pub fn remove_file(path: &Path) {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "cannot remove file");
    }
}
