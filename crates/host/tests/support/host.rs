//! A host daemon as its own process (this test binary again), so that it can be killed; and what it left behind.

use super::Manager;
use outrider_host::cgroup::{Group, Hierarchies};
use outrider_host::qmp::Qmp;
use outrider_host::{Config, JoinConfig};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Names the configuration file of the daemon that a child process is to be.
pub const CHILD: &str = "OUTRIDER_TEST_HOST_CONFIG";

/// The agent binary, or why the test can't run.
pub fn missing() -> Option<String> {
    let agent = agent();
    if !Path::new("/usr/bin/qemu-system-x86_64").exists() {
        return Some("QEMU is not installed".to_owned());
    }
    if !agent.exists() {
        return Some(format!("{} is not built (cargo build -p outrider-agent)", agent.display()));
    }
    None
}

/// The scanner, or why a test of it can't run.
pub fn scanner() -> Result<PathBuf, String> {
    let path = agent().with_file_name("outrider-scanner");
    if path.is_file() {
        return Ok(path);
    }
    Err(format!("{} is not built (`cargo xtask test` builds it)", path.display()))
}

fn agent() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    test.parent().unwrap().parent().unwrap().join("outrider-agent")
}

/// What the child does.
pub async fn run_child() {
    let Ok(path) = std::env::var(CHILD) else { return };
    let config = Config::load(Path::new(&path)).unwrap();
    tracing_subscriber::fmt()
        .with_ansi(false)
        .with_env_filter("info,outrider_host=debug")
        .with_writer(std::io::stderr)
        .init();
    let ended = outrider_host::run(config, std::future::pending()).await;
    panic!("the daemon ended: {ended:?}");
}

pub struct Host {
    pub name: &'static str,
    folder: PathBuf,
    config: PathBuf,
    cgroup: String,
    child: Option<Child>,
}

/// A daemon keeps so many agents started ahead.
const SPARE_AGENTS: usize = 1;

impl Host {
    /// Joins and starts.
    pub async fn start(manager: &Manager, base: &Path, name: &'static str, address: &str) -> Self {
        Self::start_with(manager, base, name, address, "").await
    }

    /// The same with more lines of configuration.
    pub async fn start_with(
        manager: &Manager,
        base: &Path,
        name: &'static str,
        address: &str,
        more: &str,
    ) -> Self {
        let folder = base.join(&name[name.len() - 1..]);
        std::fs::create_dir_all(&folder).unwrap();
        let cgroup = format!("outrider-test-{}/{name}/vms", base.file_name().unwrap().to_str().unwrap());
        let config = folder.join("host.toml");
        let text = format!(
            "migration_address = '{address}'\nstate_folder = '{0}/s'\nrun_folder = '{0}/r'\ncgroup = '{cgroup}'\n\
             agent_binary = '{1}'\ndata_ports = '{2}'\n{more}",
            folder.display(),
            agent().display(),
            if name == "host-a" { "17600-17619" } else { "17620-17639" },
        );
        std::fs::write(&config, &text).unwrap();
        let parsed = Config::parse(&text).unwrap();
        let (token, state_folder) = (manager.token(name), folder.join("s"));
        let join = JoinConfig { token, state_folder, manager: None, tpm: parsed.tpm, tpm_event_log: None };
        outrider_host::join(&join).await.unwrap();
        let mut host = Self { name, folder, config, cgroup, child: None };
        host.launch();
        manager.attached(name).await;
        host
    }

    pub fn launch(&mut self) {
        let log =
            std::fs::OpenOptions::new().create(true).append(true).open(self.folder.join("log")).unwrap();
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["host_process", "--exact", "--nocapture", "--test-threads=1"])
            .env(CHILD, &self.config)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.child = Some(child);
    }

    /// kill -9.
    pub fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Starts it anew with another QEMU, of which nothing is known yet.
    pub fn restart_with(&mut self, qemu: &Path) {
        self.kill();
        std::fs::remove_dir_all(self.folder.join("s/catalogue")).ok();
        self.configure(&format!("qemu_binary = '{}'\n", qemu.display()));
        self.launch();
    }

    /// Starts it anew with a scanner and its rules.
    pub fn restart_with_scanner(&mut self, scanner: &Path, rules: &Path) {
        self.kill();
        let (scanner, rules) = (scanner.display(), rules.display());
        self.configure(&format!("scanner_binary = '{scanner}'\nsignature_rules = '{rules}'\n"));
        self.launch();
    }

    fn configure(&self, lines: &str) {
        let text = std::fs::read_to_string(&self.config).unwrap();
        std::fs::write(&self.config, format!("{text}{lines}")).unwrap();
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    pub fn group(&self) -> Group {
        Hierarchies::detect().group(&self.cgroup)
    }

    /// Processes of QEMUs (not agents).
    pub fn qemus(&self) -> Vec<u32> {
        let all = self.group().children();
        all.iter()
            .filter(|g| !["/agents", "/scanners", "/probes"].iter().any(|own| g.path().ends_with(own)))
            .flat_map(Group::processes)
            .collect()
    }

    pub fn agents(&self) -> Vec<u32> {
        self.group().child("agents").children().iter().flat_map(Group::processes).collect()
    }

    pub async fn until(&self, what: &str, mut holds: impl FnMut(&Self) -> bool) {
        let start = Instant::now();
        while !holds(self) {
            assert!(start.elapsed() < super::PATIENCE, "never on {}: {what}\n{}", self.name, self.log());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }

    /// A command on the second monitor of the only QEMU.
    pub async fn qmp(&self, command: &str) -> serde_json::Value {
        self.qmp_with(command, serde_json::json!({})).await
    }

    /// One with arguments.
    pub async fn qmp_with(&self, command: &str, arguments: serde_json::Value) -> serde_json::Value {
        let folder = std::fs::read_dir(self.folder.join("r")).unwrap().flatten();
        let folder = folder.map(|e| e.path()).find(|p| p.join("qmp2").exists()).unwrap();
        let (qmp, _) = Qmp::connect(&folder.join("qmp2"), false, super::PATIENCE).await.unwrap();
        qmp.execute(command, arguments).await.unwrap()
    }

    /// How its guest stands.
    pub async fn guest(&self) -> String {
        self.qmp("query-status").await["status"].as_str().unwrap().to_owned()
    }

    /// Waits until the guest runs: QEMU says so a moment after it was told, or resumed by itself.
    pub async fn runs(&self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.guest().await != "running" {
            assert!(Instant::now() < deadline, "the guest does not run");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub fn kill_qemu(&self) {
        for pid in self.qemus() {
            assert!(Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap().success());
        }
    }

    /// kill -9 of every agent.
    pub fn kill_agents(&self) {
        for pid in self.agents() {
            assert!(Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap().success());
        }
    }

    /// One QEMU whose vCPUs run: its CPU time or its monitor's word can't be asked without the daemon, so the count of
    /// processes that are neither frozen nor stopped is what this sees.
    pub fn unfrozen(&self) -> usize {
        self.qemus().iter().filter(|pid| !frozen(&self.group(), **pid)).count()
    }

    /// Nothing is left of any migration: no agents but the spare one, no sockets, no records but those of `vms` running VMs.
    pub async fn only(&self, vms: usize) {
        self.until("only running VMs are left", |h| {
            let count = |sub: &str| {
                let all = std::fs::read_dir(h.folder.join(sub)).map(|d| d.flatten().collect::<Vec<_>>());
                all.unwrap_or_default()
                    .iter()
                    .filter(|e| e.file_name() != "agents" && e.file_name() != "scanners")
                    .count()
            };
            h.qemus().len() == vms
                && h.agents().len() <= SPARE_AGENTS
                && count("r") == vms
                && count("s/vms") == vms
                && count("s/migrations") == 0
                && count("r/agents") <= SPARE_AGENTS
                && count("r/scanners") == 0
                && h.group().child("scanners").children().is_empty()
                && h.group().child("agents").children().len() <= SPARE_AGENTS
        })
        .await;
    }
}

fn frozen(group: &Group, pid: u32) -> bool {
    group.children().iter().filter(|g| g.processes().contains(&pid)).any(|g| {
        let events = g.v2().and_then(|f| std::fs::read_to_string(f.join("cgroup.events")).ok());
        events.is_some_and(|text| text.contains("frozen 1"))
    })
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().ok();
            child.wait().ok();
        }
        // What a failed test left: by pid, out of this host's own groups, and thawed so that it dies.
        let own = [self.group().child("agents").children(), self.group().children()].concat();
        for child in &own {
            for pid in child.processes() {
                Command::new("kill").args(["-9", &pid.to_string()]).status().ok();
            }
            for _ in 0..200 {
                if child.remove().is_ok() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        let mut group = self.group();
        group.child("agents").remove().ok();
        while !group.path().is_empty() {
            group.remove().ok();
            group = group.parent();
        }
        if std::thread::panicking() || std::env::var("OUTRIDER_TEST_LOGS").is_ok() {
            eprintln!("==== log of {}\n{}", self.name, self.log());
        }
    }
}
