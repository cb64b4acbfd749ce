//! `backup` and `restore` of a manager's registry: the file around `registry::back_up` and `registry::restore`, the locks,
//! and the old database, which is kept.

use crate::authority::{StateFolder, lock_database};
use crate::clock;
use crate::config::Config;
use registry::BackupHeader;
use serde::Serialize;
use std::fs::{File, OpenOptions};
use std::io::{BufWriter, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use types::{ErrorCode, Problem};

/// A backup that was made.
#[derive(Debug, Clone, Serialize)]
pub struct BackedUp {
    /// Where it is.
    pub file: PathBuf,
    /// Its length.
    pub bytes: u64,
    /// What it holds.
    #[serde(flatten)]
    pub header: BackupHeader,
}

/// A registry that was restored.
#[derive(Debug, Clone, Serialize)]
pub struct Restored {
    /// Where the database that was there before is now.
    pub kept: Option<PathBuf>,
    /// What was restored.
    #[serde(flatten)]
    pub header: BackupHeader,
}

fn bad(what: &str, path: &Path, error: &std::io::Error) -> Problem {
    Problem::new(ErrorCode::BadConfiguration, format!("cannot {what} {}: {error}", path.display()))
}

/// Copies the registry into a new file, for its owner alone; the manager may run.
///
/// # Errors
/// `already-exists` when there is a file of that name; those of the database and the disk, and then there is no file.
pub async fn back_up(config: &Config, to: &Path) -> Result<BackedUp, Problem> {
    if to.exists() {
        return Err(exists(to));
    }
    let database = config.database()?;
    let mut draft = to.as_os_str().to_owned();
    draft.push(format!(".{}.part", std::process::id()));
    let draft = Draft(PathBuf::from(draft));
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft.0);
    let file = file.map_err(|e| bad("write", &draft.0, &e))?;
    let mut out = BufWriter::new(&file);
    let header = registry::back_up(&database, clock::now_us(), &mut out).await?;
    out.flush().and_then(|()| file.sync_all()).map_err(|e| bad("write", &draft.0, &e))?;
    drop(out);
    // A link does not take the place of a file that came meanwhile, as a rename would.
    std::fs::hard_link(&draft.0, to).map_err(|e| match e.kind() {
        ErrorKind::AlreadyExists => exists(to),
        _ => bad("name", to, &e),
    })?;
    let folder = to.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    sync(folder)?;
    let bytes = file.metadata().map_err(|e| bad("look at", to, &e))?.len();
    Ok(BackedUp { file: to.to_owned(), bytes, header })
}

fn exists(path: &Path) -> Problem {
    let detail = format!("{} exists already; a backup takes the place of nothing", path.display());
    Problem::new(ErrorCode::AlreadyExists, detail)
}

fn sync(folder: &Path) -> Result<(), Problem> {
    File::open(folder).and_then(|f| f.sync_all()).map_err(|e| bad("sync", folder, &e))
}

/// A file that goes when it is given up.
struct Draft(PathBuf);

impl Drop for Draft {
    fn drop(&mut self) {
        drop(std::fs::remove_file(&self.0));
    }
}

/// Puts a backup in the place of the registry, which is kept beside it (SQLite), or into an empty database (PostgreSQL).
/// The manager decides nothing new by it until it was reconciled from the hosts.
///
/// # Errors
/// `wrong-state` while the manager runs; `bad-request` for a backup that is damaged or of a newer version: then the
/// registry is as it was.
pub async fn restore(config: &Config, from: &Path) -> Result<Restored, Problem> {
    let database = config.database()?;
    let _folder = StateFolder::open(&config.state_folder)?;
    let _database = lock_database(&database)?;
    let input = File::open(from).map_err(|e| bad("read", from, &e))?;
    let (now_us, actor) = (clock::now_us(), format!("manager/{}", config.name));
    let path = match &database {
        registry::Database::Postgres(_) => {
            let header = registry::restore(&database, now_us, &actor, input).await?;
            return Ok(Restored { kept: None, header });
        }
        registry::Database::Sqlite(path) => path,
    };
    let fresh = Fresh(beside(path, ".restoring"));
    fresh.remove();
    // Its mode first: SQLite makes files as the umask says.
    let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&fresh.0);
    drop(made.map_err(|e| bad("make", &fresh.0, &e))?);
    let into = registry::Database::Sqlite(fresh.0.clone());
    let header = registry::restore(&into, now_us, &actor, input).await?;
    if beside(&fresh.0, "-wal").exists() {
        return Err(Problem::new(
            ErrorCode::Internal,
            "the restored registry was not closed; nothing was changed",
        ));
    }
    File::open(&fresh.0).and_then(|f| f.sync_all()).map_err(|e| bad("sync", &fresh.0, &e))?;
    let kept = exchange(path, &fresh.0, now_us)?;
    Ok(Restored { kept, header })
}

fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    PathBuf::from(name)
}

/// A database that is being made, with SQLite's files beside it.
struct Fresh(PathBuf);

impl Fresh {
    fn remove(&self) {
        for ending in ["", "-wal", "-shm", "-journal"] {
            drop(std::fs::remove_file(beside(&self.0, ending)));
        }
    }
}

impl Drop for Fresh {
    fn drop(&mut self) {
        self.remove();
    }
}

/// The old database gets another name, the new one its name. The old one's log first: beside a new database it would be
/// taken for that one's. A crash in between leaves an old database without its last commits, or none, which the manager
/// notices by its anchor, or which a second restore mends; nothing of the old one is lost.
fn exchange(path: &Path, fresh: &Path, now_us: i64) -> Result<Option<PathBuf>, Problem> {
    let kept = beside(path, &format!(".before-restore-{now_us}"));
    let old = path.exists();
    for ending in ["-wal", "-shm", ""] {
        let (from, to) = (beside(path, ending), beside(&kept, ending));
        match std::fs::rename(&from, &to) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(bad("keep", &from, &e)),
            _ => {}
        }
    }
    std::fs::rename(fresh, path).map_err(|e| bad("put in place", path, &e))?;
    sync(path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new(".")))?;
    Ok(old.then_some(kept))
}
