//! A PostgreSQL server for tests: a cluster of its own in a temporary folder, reached by a socket in it, run
//! by an unprivileged user, and never the distribution's.
//!
//! A janitor holds the reading end of a pipe whose writing end is this process's: when the test ends, fails
//! or is killed the pipe closes, and the janitor stops the server and removes the folder.
#![allow(dead_code, unreachable_pub)]

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Where Debian keeps what only the server's owner runs.
const VERSIONS: &str = "/usr/lib/postgresql";
/// Who runs it when the tests are root's, which PostgreSQL refuses.
const USER: &str = "postgres";
/// Part of the socket's name only: unless a test asks for it the server listens to no network.
const PORT: u16 = 5432;
/// For a start or a stop on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// Stops the server of the folder $1, however often it was restarted, and removes the folder.
const JANITOR: &str = "cat >/dev/null; \
    read -r pid <\"$1/data/postmaster.pid\" 2>/dev/null && kill -QUIT \"$pid\" 2>/dev/null; \
    while [ -n \"$pid\" ] && kill -0 \"$pid\" 2>/dev/null; do sleep 0.05; done; rm -rf -- \"$1\"";

/// A server.
pub struct Cluster {
    folder: PathBuf,
    programs: PathBuf,
    port: u16,
    server: Option<Child>,
    janitor: Child,
}

impl Cluster {
    /// Makes and starts one; `Err` says what the machine lacks.
    pub fn start() -> Result<Self, String> {
        Self::start_with("")
    }

    /// The same with lines of `postgresql.conf`.
    pub fn start_with(settings: &str) -> Result<Self, String> {
        let mut cluster = Self::prepare(settings)?;
        cluster.run();
        Ok(cluster)
    }

    /// Makes one that does not run yet.
    pub fn prepare(settings: &str) -> Result<Self, String> {
        let programs = programs().ok_or_else(|| format!("no PostgreSQL server under {VERSIONS}"))?;
        let folder = tempfile::Builder::new().prefix("outrider-pg-").tempdir().unwrap().keep();
        let janitor = janitor(&folder);
        own(&folder);
        let cluster = Self { folder, programs, port: PORT, server: None, janitor };
        cluster.init(settings);
        Ok(cluster)
    }

    fn init(&self, settings: &str) {
        let mut initdb = self.as_owner("initdb");
        initdb.args(["--no-sync", "--auth=trust", "--username=outrider", "--encoding=UTF8"]);
        let done = initdb.arg("--locale=C.UTF-8").arg("-D").arg(self.data()).output().unwrap();
        assert!(done.status.success(), "initdb: {}", String::from_utf8_lossy(&done.stderr));
        let mut text = String::new();
        writeln!(text, "listen_addresses = ''\nunix_socket_directories = '{}'", self.folder.display())
            .unwrap();
        // Few and small: the machine has other tests to run.
        text.push_str(
            "max_connections = 60\nshared_buffers = 16MB\nmax_wal_size = 128MB\nautovacuum = off\n",
        );
        text.push_str(settings);
        let mut file =
            std::fs::OpenOptions::new().append(true).open(self.data().join("postgresql.conf")).unwrap();
        file.write_all(text.as_bytes()).unwrap();
    }

    /// Starts the server, and waits until it answers.
    pub fn run(&mut self) {
        let log = std::fs::OpenOptions::new().create(true).append(true).open(self.log()).unwrap();
        let mut postgres = self.as_owner("postgres");
        postgres.arg("-D").arg(self.data()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.server = Some(postgres.spawn().unwrap());
        let since = Instant::now();
        while !self.answers() {
            let ended = self.server.as_mut().unwrap().try_wait().unwrap();
            assert!(ended.is_none() && since.elapsed() < PATIENCE, "no server ({ended:?}): {}", self.said());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn answers(&self) -> bool {
        let ready = Command::new(self.programs.join("pg_isready"))
            .args(["--quiet", "--dbname=postgres", "--username=outrider", "--host"])
            .arg(&self.folder)
            .arg(format!("--port={}", self.port))
            .status();
        ready.is_ok_and(|s| s.success())
    }

    /// The server and all of its processes, as they are now.
    pub fn processes(&self) -> Vec<u32> {
        let server = self.server.as_ref().unwrap().id();
        let mut all = vec![server];
        all.extend(children(server));
        all
    }

    /// Kills the server and all of its processes at once, as a machine that loses power would.
    pub fn kill(&mut self) {
        self.kill_these(&self.processes());
    }

    /// The same without a search, so that the moment can be chosen.
    pub fn kill_these(&mut self, processes: &[u32]) {
        for pid in processes {
            // One that ended by itself meanwhile is no failure.
            let pid = rustix::process::Pid::from_raw(i32::try_from(*pid).unwrap()).unwrap();
            rustix::process::kill_process(pid, rustix::process::Signal::KILL).ok();
        }
        self.server.take().unwrap().wait().unwrap();
        wait_gone(processes);
    }

    /// Stops it in an orderly way, cutting every session.
    pub fn stop(&mut self) {
        let mut server = self.server.take().unwrap();
        signal("INT", &[server.id()]);
        server.wait().unwrap();
    }

    /// SIGSTOP or SIGCONT to the server and all of its processes.
    pub fn signal_all(&self, name: &str) {
        signal(name, &self.processes());
    }

    /// Makes a fresh database; its URL.
    pub fn database(&self) -> String {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("t{}", COUNT.fetch_add(1, Ordering::Relaxed));
        self.sql("postgres", &format!("CREATE DATABASE {name}"));
        self.url(&name)
    }

    pub fn url(&self, database: &str) -> String {
        format!("postgres://outrider@localhost:{}/{database}?host={}", self.port, self.folder.display())
    }

    /// The socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.join(format!(".s.PGSQL.{}", self.port))
    }

    /// Says at which port the settings let it listen.
    pub fn listen_on(&mut self, port: u16) {
        self.port = port;
    }

    /// Writes a file of the server's own (mode 600) into its folder of data; where it is.
    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.data().join(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        own(&path);
        path
    }

    /// What an administrator does by hand; what it prints.
    pub fn sql(&self, database: &str, sql: &str) -> String {
        let done = Command::new(self.programs.join("psql"))
            .args(["--no-psqlrc", "--quiet", "--tuples-only", "--no-align", "--username=outrider", "--host"])
            .arg(&self.folder)
            .args(["--port", &self.port.to_string(), "--dbname", database, "--command", sql])
            .output()
            .unwrap();
        assert!(done.status.success(), "{sql}: {}", String::from_utf8_lossy(&done.stderr));
        String::from_utf8(done.stdout).unwrap().trim().to_owned()
    }

    fn data(&self) -> PathBuf {
        self.folder.join("data")
    }

    fn log(&self) -> PathBuf {
        self.folder.join("log")
    }

    /// The server's log.
    pub fn said(&self) -> String {
        std::fs::read_to_string(self.log()).unwrap_or_default()
    }

    fn as_owner(&self, program: &str) -> Command {
        let program = self.programs.join(program);
        if !is_root() {
            return Command::new(program);
        }
        let mut command = Command::new("setpriv");
        command.args([&format!("--reuid={USER}"), &format!("--regid={USER}"), "--clear-groups", "--"]);
        command.arg(program).current_dir(&self.folder);
        command
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        drop(self.janitor.stdin.take());
        if let Some(mut server) = self.server.take() {
            server.wait().unwrap();
        }
        self.janitor.wait().unwrap();
    }
}

/// The one server that the tests of this process share; it ends with the process.
pub fn shared() -> Result<&'static Cluster, String> {
    static SHARED: OnceLock<Result<Cluster, String>> = OnceLock::new();
    SHARED.get_or_init(Cluster::start).as_ref().map_err(Clone::clone)
}

fn programs() -> Option<PathBuf> {
    let versions = std::fs::read_dir(VERSIONS).ok()?.filter_map(Result::ok).map(|e| e.path().join("bin"));
    versions.filter(|bin| bin.join("postgres").exists() && bin.join("initdb").exists()).max()
}

fn janitor(folder: &Path) -> Child {
    // A session of its own: whoever kills the test's process group must not kill what cleans up behind it.
    Command::new("setsid")
        .args(["sh", "-c", JANITOR, "janitor"])
        .arg(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn own(folder: &Path) {
    if is_root() {
        let done = Command::new("chown").arg(format!("{USER}:{USER}")).arg(folder).status().unwrap();
        assert!(done.success(), "no user {USER}: is the package postgresql installed?");
    }
}

fn signal(name: &str, pids: &[u32]) {
    let pids: Vec<String> = pids.iter().map(ToString::to_string).collect();
    if !pids.is_empty() {
        // One that ended by itself meanwhile is no failure.
        drop(
            Command::new("kill").arg(format!("-{name}")).arg("--").args(&pids).stderr(Stdio::null()).status(),
        );
    }
}

fn children(of: u32) -> Vec<u32> {
    let parent = |stat: &str| stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse::<u32>().ok();
    let pids =
        std::fs::read_dir("/proc").unwrap().filter_map(|e| e.ok()?.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| {
        std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| parent(&stat) == Some(of))
    })
    .collect()
}

fn wait_gone(pids: &[u32]) {
    let since = Instant::now();
    let lives = |pid: &u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with('Z'))
    };
    while pids.iter().any(lives) {
        assert!(since.elapsed() < PATIENCE, "{pids:?} do not end");
        std::thread::sleep(Duration::from_millis(5));
    }
}
