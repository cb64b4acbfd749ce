//! A whole Outrider in the lab: manager and two hosts as the built programs, each in its own namespace, set up as
//! an admin would.
//!
//! Everything goes through the `outrider` command; nothing here knows the inside of a daemon.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use types::vm::{Accel, DiskSpec, FileRef, NicSpec, VmSpec};
use types::{Digest, Name, VmId};
use uuid::Uuid;

use crate::guest::{GuestImage, GuestLoad};
use crate::net::{GUEST_BRIDGE, GUEST_MAC, Machine, Net};
use crate::process;

/// Operators' port of the manager.
const OPERATOR_PORT: u16 = 7443;
/// Hosts' port of the manager.
const HOST_PORT: u16 = 7444;
/// A debug build's daemon on a busy machine is up well within this.
const START_LIMIT: Duration = Duration::from_secs(20);

/// The built programs.
#[derive(Debug, Clone)]
pub struct Programs {
    /// `outrider`.
    pub outrider: PathBuf,
    /// `outrider-agent`.
    pub agent: PathBuf,
}

impl Programs {
    /// Those beside the running program, or in the folder above (tests run from `deps`).
    pub fn locate() -> Result<Self> {
        let own = std::env::current_exe().context("finding the running program")?;
        let folders = own.ancestors().skip(1).take(2);
        for folder in folders {
            let (outrider, agent) = (folder.join("outrider"), folder.join("outrider-agent"));
            if outrider.is_file() && agent.is_file() {
                return Ok(Self { outrider, agent });
            }
        }
        bail!(
            "outrider and outrider-agent are not built beside {} (run `cargo build --workspace`)",
            own.display()
        )
    }
}

/// What one run of the `outrider` command gave.
#[derive(Debug)]
pub struct Answer {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Answer {
    /// The exit code; `None` after a signal.
    #[must_use]
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// The JSON document on standard output.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.stdout)
            .with_context(|| format!("reading JSON from {:?} (stderr {:?})", self.stdout, self.stderr))
    }
}

/// A VM for the lab.
#[derive(Debug, Clone)]
pub struct Guest {
    /// Name in the registry.
    pub name: String,
    /// UUID.
    pub uuid: Uuid,
    /// Memory, in MiB.
    pub memory_mib: u64,
    /// What it does.
    pub load: GuestLoad,
    /// A shared raw disk that both hosts see.
    pub disk: Option<PathBuf>,
}

impl Guest {
    /// A 256 MiB guest with a new UUID.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let load = GuestLoad::default();
        Self { name: name.to_owned(), uuid: Uuid::new_v4(), memory_mib: 256, load, disk: None }
    }

    fn spec(&self, image: &GuestImage) -> Result<VmSpec> {
        let disks = self.disk.iter().map(|path| DiskSpec {
            path: path.display().to_string(),
            format: "raw".to_owned(),
            volume: format!("lab:{}", self.name),
            shared: true,
        });
        Ok(VmSpec {
            uuid: VmId::from_bytes(*self.uuid.as_bytes()),
            name: self.name.parse::<Name>()?,
            tenant: "lab".parse::<Name>()?,
            labels: BTreeMap::new(),
            accel: Accel::Tcg,
            machine: "q35".to_owned(),
            cpu_model: "qemu64".to_owned(),
            vcpus: 1,
            memory_bytes: self.memory_mib << 20,
            kernel: Some(file_ref(&image.kernel)?),
            initrd: Some(file_ref(&image.initrd)?),
            cmdline: self.load.command_line(),
            disks: disks.collect(),
            nics: vec![NicSpec { mac: GUEST_MAC.to_owned(), bridge: GUEST_BRIDGE.to_owned() }],
            tpm: false,
            responsive_tcp_port: Some(7),
        })
    }
}

fn file_ref(path: &Path) -> Result<FileRef> {
    let bytes = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    Ok(FileRef { path: path.display().to_string(), blake3: Digest::of(&bytes) })
}

/// Manager and hosts. Dropping it ends them; the [`Net`] removes what is left.
#[derive(Debug)]
pub struct Fleet {
    /// The machines and networks.
    pub net: Net,
    programs: Programs,
    daemons: BTreeMap<Machine, Child>,
    /// A software TPM for each host that is to prove its platform: the machine's own, which outlives the daemon.
    tpms: BTreeMap<Machine, Child>,
}

impl Fleet {
    /// Lays the networks and starts the manager; no host is enrolled yet.
    pub fn up(programs: &Programs) -> Result<Self> {
        let net = Net::up()?;
        Self::on(net, programs)
    }

    /// The same on networks that are there.
    pub fn on(net: Net, programs: &Programs) -> Result<Self> {
        let mut fleet =
            Self { net, programs: programs.clone(), daemons: BTreeMap::new(), tpms: BTreeMap::new() };
        fleet.configure_manager()?;
        fleet.start(Machine::Manager)?;
        Ok(fleet)
    }

    /// Lays the networks, starts the manager, gives both hosts a TPM, enrols, joins and starts them.
    pub fn ready(programs: &Programs) -> Result<Self> {
        let mut fleet = Self::up(programs)?;
        for host in Machine::HOSTS {
            fleet.give_tpm(host)?;
            fleet.enrol(host)?;
            fleet.start(host)?;
        }
        Ok(fleet)
    }

    /// Puts a TPM into a host that is not enrolled yet: a swtpm with a state of its own.
    pub fn give_tpm(&mut self, host: Machine) -> Result<()> {
        let folder = self.net.node(host).folder()?;
        let state = folder.join("tpm");
        fs::create_dir_all(&state).with_context(|| format!("making {}", state.display()))?;
        let arguments = [
            "socket",
            "--tpm2",
            "--flags",
            "not-need-init,startup-clear",
            "--tpmstate",
            &format!("dir={},mode=0600", state.display()),
            "--server",
            &format!("type=unixio,path={},mode=0600", self.tpm_socket(host).display()),
        ];
        let child = self.net.node(host).spawn("tpm", "swtpm", &arguments)?;
        self.tpms.insert(host, child);
        process::wait_for("the TPM to listen", START_LIMIT, || {
            Ok(self.tpm_socket(host).exists().then_some(()))
        })
    }

    /// The socket of a host's TPM, which serves one connection at a time.
    #[must_use]
    pub fn tpm_socket(&self, host: Machine) -> PathBuf {
        self.net.run_folder().join(host.name()).join("tpm.sock")
    }

    fn tpm_address(&self, host: Machine) -> Option<String> {
        self.tpms.contains_key(&host).then(|| format!("unix:{}", self.tpm_socket(host).display()))
    }

    /// The name of the endorsement key of a host's TPM, as its admin would read it there.
    fn ek_name(&self, host: Machine) -> Result<Option<String>> {
        let Some(address) = self.tpm_address(host) else { return Ok(None) };
        let mut ek = self.net.node(host).command(&self.programs.outrider);
        ek.args(["host", "ek", "--tpm", &address]);
        let answer = run_with_input(ek, "")?;
        ensure!(answer.status.success(), "host ek on {}: {}", host.name(), answer.stderr.trim());
        Ok(Some(answer.stdout.trim().to_owned()))
    }

    /// `outrider host add` at the manager, `outrider host join` on the host; with `host ek` before, where it has a TPM.
    pub fn enrol(&self, host: Machine) -> Result<()> {
        let macs = format!("{},{}", host.control_mac(), host.migration_mac());
        let (control, migration) = (host.control_address(), host.migration_address());
        let arguments = [
            "host",
            "add",
            host.name(),
            "--control-address",
            &control,
            "--migration-address",
            &migration,
            "--mac",
            &macs,
            "--memory",
            "8GiB",
            "--vcpus",
            "8",
        ];
        let ek_name = self.ek_name(host)?;
        let mut arguments = arguments.to_vec();
        if let Some(name) = &ek_name {
            arguments.extend(["--ek-name", name, "--record-pcrs", "0,2,4,7"]);
        }
        let added = self.json(&arguments)?;
        let token = added["join_token"].as_str().context("host add printed no join token")?;
        self.configure_host(host)?;
        let config = self.config_file(host)?;
        let mut join = self.net.node(host).command(&self.programs.outrider);
        join.args(["host", "join", "-", "--config"]).arg(config);
        let answer = run_with_input(join, token)?;
        ensure!(answer.status.success(), "host join on {}: {}", host.name(), answer.stderr.trim());
        Ok(())
    }

    /// Starts a daemon and waits until it serves.
    pub fn start(&mut self, machine: Machine) -> Result<()> {
        let noun = if machine == Machine::Manager { "manager" } else { "host" };
        let config = self.config_file(machine)?.display().to_string();
        let arguments = [noun, "run", "--config", &config, "--log-format", "json"];
        let child = self.net.node(machine).spawn(noun, &self.programs.outrider, &arguments)?;
        self.daemons.insert(machine, child);
        process::wait_for(&format!("{} to serve", machine.name()), START_LIMIT, || {
            self.still_runs(machine)?;
            Ok(self.serves(machine).then_some(()))
        })
    }

    fn serves(&self, machine: Machine) -> bool {
        let Ok(hosts) = self.json(&["host", "list"]) else { return false };
        if machine == Machine::Manager {
            return true;
        }
        let states = hosts["hosts"].as_array().or_else(|| hosts.as_array()).cloned().unwrap_or_default();
        states.iter().any(|host| host["name"] == machine.name() && host["state"] == "connected")
    }

    fn still_runs(&mut self, machine: Machine) -> Result<()> {
        let Some(child) = self.daemons.get_mut(&machine) else {
            bail!("{} was never started", machine.name())
        };
        if let Some(status) = child.try_wait().context("looking at a daemon")? {
            bail!("{} ended ({status}): {}", machine.name(), self.log(machine));
        }
        Ok(())
    }

    /// Kills a daemon at once (SIGKILL), as a crash would.
    pub fn kill(&mut self, machine: Machine) -> Result<()> {
        if let Some(mut child) = self.daemons.remove(&machine) {
            child.kill().context("killing a daemon")?;
            child.wait().context("waiting for a killed daemon")?;
        }
        Ok(())
    }

    /// Waits for a daemon that was told to end.
    pub fn wait_end(&mut self, machine: Machine, limit: Duration) -> Result<()> {
        let Some(mut child) = self.daemons.remove(&machine) else { return Ok(()) };
        let ended = process::wait_for(&format!("{} to end", machine.name()), limit, || {
            Ok(child.try_wait().context("looking at a daemon")?.map(|_| ()))
        });
        if ended.is_err() {
            child.kill().context("killing a daemon")?;
            child.wait().context("waiting for a killed daemon")?;
        }
        ended
    }

    /// Sends a signal to a daemon.
    pub fn signal(&self, machine: Machine, signal: Signal) -> Result<()> {
        let child = self.daemons.get(&machine).context("the daemon does not run")?;
        let pid = Pid::from_child(child);
        kill_process(pid, signal).with_context(|| format!("signalling {}", machine.name()))
    }

    /// The process id of a daemon.
    #[must_use]
    pub fn pid(&self, machine: Machine) -> Option<u32> {
        self.daemons.get(&machine).map(Child::id)
    }

    /// Where a daemon's log is; a restart of the daemon begins it anew.
    #[must_use]
    pub fn log_file(&self, machine: Machine) -> PathBuf {
        let noun = if machine == Machine::Manager { "manager" } else { "host" };
        self.net.run_folder().join(machine.name()).join(format!("{noun}.log"))
    }

    /// The last lines of a daemon's log.
    #[must_use]
    pub fn log(&self, machine: Machine) -> String {
        let text = fs::read_to_string(self.log_file(machine)).unwrap_or_default();
        let lines: Vec<&str> = text.lines().rev().take(30).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join("\n")
    }

    /// Runs `outrider …` as an operator on the manager's machine.
    pub fn outrider(&self, arguments: &[&str]) -> Result<Answer> {
        run_with_input(self.command(arguments), "")
    }

    /// The command itself, for callers that want to watch it.
    #[must_use]
    pub fn command(&self, arguments: &[&str]) -> Command {
        let state = self.state_folder(Machine::Manager);
        let mut command = self.net.node(Machine::Manager).command(&self.programs.outrider);
        command.args(arguments);
        command.env(
            "OUTRIDER_MANAGER",
            format!("https://{}:{OPERATOR_PORT}", Machine::Manager.control_address()),
        );
        command.env("OUTRIDER_TOKEN_FILE", state.join("admin.token"));
        command.env("OUTRIDER_CA", state.join("ca.pem"));
        command
    }

    /// Runs `outrider … --output json`, which must succeed, and returns the document.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        let mut all = arguments.to_vec();
        all.extend(["--output", "json"]);
        let answer = self.outrider(&all)?;
        let said = if answer.stderr.trim().is_empty() { &answer.stdout } else { &answer.stderr };
        ensure!(answer.status.success(), "outrider {}: {}", arguments.join(" "), said.trim());
        answer.json()
    }

    /// Writes the VM's spec and defines it.
    pub fn define(&self, guest: &Guest, image: &GuestImage) -> Result<()> {
        let file = self.net.node(Machine::Manager).folder()?.join(format!("{}.toml", guest.name));
        let text = toml::to_string(&guest.spec(image)?).context("writing the VM's spec")?;
        fs::write(&file, text).with_context(|| format!("writing {}", file.display()))?;
        self.json(&["vm", "define", &file.display().to_string()])?;
        Ok(())
    }

    /// Starts a VM on a host and waits until the registry says that it runs.
    pub fn start_vm(&self, guest: &Guest, host: Machine) -> Result<()> {
        self.json(&["vm", "start", &guest.name, "--on", host.name()])?;
        process::wait_for("the VM to run", START_LIMIT, || {
            let vm = self.json(&["vm", "show", &guest.name])?;
            let vm = vm.get("vm").cloned().unwrap_or(vm);
            Ok((vm["state"] == "running").then_some(()))
        })
    }

    /// Asks for a migration without waiting; its id.
    pub fn migrate(&self, vm: &str, to: Machine) -> Result<String> {
        let accepted = self.json(&["migrate", vm, "--to", to.name(), "--detach"])?;
        let id = accepted["id"].as_str().or_else(|| accepted["migration"]["id"].as_str());
        Ok(id.context("migrate printed no id")?.to_owned())
    }

    /// A migration as `migration show` gives it.
    pub fn migration(&self, id: &str) -> Result<Value> {
        let shown = self.json(&["migration", "show", id])?;
        Ok(shown.get("migration").cloned().unwrap_or(shown))
    }

    /// Waits until a migration is in one of these states; the last sight of it.
    pub fn wait_migration(&self, id: &str, states: &[&str], limit: Duration) -> Result<Value> {
        process::wait_for(&format!("migration {id} to be {states:?}"), limit, || {
            let shown = self.migration(id)?;
            let state = shown["state"].as_str().unwrap_or_default().to_owned();
            Ok(states.contains(&state.as_str()).then_some(shown))
        })
    }

    /// A daemon's state folder.
    #[must_use]
    pub fn state_folder(&self, machine: Machine) -> PathBuf {
        self.net.run_folder().join(machine.name()).join("state")
    }

    fn config_file(&self, machine: Machine) -> Result<PathBuf> {
        Ok(self.net.node(machine).folder()?.join("config.toml"))
    }

    fn configure_manager(&self) -> Result<()> {
        let address = Machine::Manager.control_address();
        let config = json!({
            "state_folder": self.state_folder(Machine::Manager),
            "operator_listen": format!("{address}:{OPERATOR_PORT}"),
            "hosts_listen": format!("{address}:{HOST_PORT}"),
        });
        self.write_config(Machine::Manager, &config)
    }

    fn configure_host(&self, host: Machine) -> Result<()> {
        let folder = self.net.node(host).folder()?;
        let group = self.net.node(host).cgroup().path().display().to_string();
        let mut config = json!({
            "state_folder": self.state_folder(host),
            "run_folder": folder.join("run"),
            "agent_binary": self.programs.agent,
            "migration_address": host.migration_address(),
            "cgroup": format!("{}/vms", group.trim_start_matches('/')),
            "serial_log": true,
        });
        if let Some(address) = self.tpm_address(host) {
            config["tpm"] = address.into();
        }
        self.write_config(host, &config)
    }

    fn write_config(&self, machine: Machine, config: &Value) -> Result<()> {
        let file = self.config_file(machine)?;
        let text = toml::to_string(config).context("writing a configuration")?;
        fs::write(&file, text).with_context(|| format!("writing {}", file.display()))
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        for child in self.daemons.values_mut().chain(self.tpms.values_mut()) {
            // A daemon that is gone already is what we want; the net's teardown ends what lives in the cgroups.
            let _gone = child.kill();
            let _reaped = child.wait();
        }
    }
}

fn run_with_input(mut command: Command, input: &str) -> Result<Answer> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("starting outrider")?;
    let mut stdin = child.stdin.take().context("outrider has no standard input")?;
    if !input.is_empty() {
        stdin.write_all(format!("{input}\n").as_bytes()).context("writing to outrider")?;
    }
    drop(stdin);
    let output = child.wait_with_output().context("waiting for outrider")?;
    Ok(Answer {
        status: output.status,
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}
