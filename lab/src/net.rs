//! Network namespaces that stand for machines, joined by three separate bridged networks.
//!
//! ```text
//!            control 10.81.0.0/24        migration 10.82.0.0/24      guest 10.83.0.0/24
//! manager    .1  ctl0
//! host-a     .11 ctl0                    .11 mig0                    br-guest (no address)
//! host-b     .12 ctl0                    .12 mig0                    br-guest (no address)
//! client                                                             .100 eth0   (the guest: .50)
//! ```
//!
//! Every run has a prefix of its own (`or<pid>`), so that runs don't meet; everything that a run makes is
//! found again by that prefix alone, and is removed on drop, on SIGINT, SIGTERM and SIGHUP, and by a later
//! run if this one was killed.

mod teardown;

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::cgroup::Cgroup;
use crate::process;
pub use teardown::{destroy, is_ending, leftovers, on_signal_destroy, stale_prefixes, yield_to_signal};

/// Sockets, logs and other files of the runs.
const RUN_FOLDER: &str = "/run/outrider-lab";
/// Where `ip netns` keeps the names of namespaces.
const NAMESPACES: &str = "/run/netns";

/// How long the kernel may take to bring the bridges' ports up.
const FORWARDING_LIMIT: Duration = Duration::from_secs(15);

/// The guest's address in the guest network.
pub const GUEST_ADDRESS: &str = "10.83.0.50";
/// The guest's MAC in the guest network.
pub const GUEST_MAC: &str = "52:54:00:83:00:50";
/// The client's address in the guest network.
pub const CLIENT_ADDRESS: &str = "10.83.0.100";
/// The bridge on each host that guests are attached to.
pub const GUEST_BRIDGE: &str = "br-guest";

/// The machines of the lab.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Machine {
    /// Runs the control manager.
    Manager,
    /// First host.
    HostA,
    /// Second host.
    HostB,
    /// Talks to the guest.
    Client,
}

impl Machine {
    /// Every machine.
    pub const ALL: [Self; 4] = [Self::Manager, Self::HostA, Self::HostB, Self::Client];
    /// The machines that run VMs.
    pub const HOSTS: [Self; 2] = [Self::HostA, Self::HostB];

    /// The machine's name, also as a host of Outrider.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Manager => "manager",
            Self::HostA => "host-a",
            Self::HostB => "host-b",
            Self::Client => "client",
        }
    }

    /// Last byte of its addresses.
    fn number(self) -> u8 {
        match self {
            Self::Manager => 1,
            Self::HostA => 11,
            Self::HostB => 12,
            Self::Client => 100,
        }
    }

    /// Address in the control network (the client has none there).
    #[must_use]
    pub fn control_address(self) -> String {
        format!("10.81.0.{}", self.number())
    }

    /// Address in the migration network (hosts only).
    #[must_use]
    pub fn migration_address(self) -> String {
        format!("10.82.0.{}", self.number())
    }

    /// MAC of the interface in the control network, `ctl0`.
    #[must_use]
    pub fn control_mac(self) -> String {
        format!("02:81:00:00:00:{:02x}", self.number())
    }

    /// MAC of the interface in the migration network, `mig0`.
    #[must_use]
    pub fn migration_mac(self) -> String {
        format!("02:82:00:00:00:{:02x}", self.number())
    }
}

/// A running set of namespaces. Dropping it removes everything.
#[derive(Debug)]
pub struct Net {
    prefix: String,
    nodes: Vec<Node>,
}

/// One machine of a running lab.
#[derive(Debug, Clone)]
pub struct Node {
    machine: Machine,
    namespace: String,
    cgroup: Cgroup,
    run_folder: PathBuf,
}

impl Net {
    /// Makes the machines and networks under the prefix `or<pid>`, after removing what dead runs left.
    pub fn up() -> Result<Self> {
        Self::up_as(&format!("or{}", std::process::id()))
    }

    /// The same under a prefix of the caller's choice: letters, then the number of the process that owns it.
    pub fn up_as(prefix: &str) -> Result<Self> {
        for stale in stale_prefixes() {
            // Another run may be removing it at this moment; it is no reason not to start.
            let _raced = destroy(&stale);
        }
        on_signal_destroy(prefix)?;
        let net = Self {
            prefix: prefix.to_owned(),
            nodes: Machine::ALL.map(|machine| Node::new(prefix, machine)).to_vec(),
        };
        // From here on, dropping `net` removes whatever was made.
        fs::create_dir_all(net.run_folder())
            .with_context(|| format!("making {}", net.run_folder().display()))?;
        net.make_namespaces()?;
        net.make_cards()?;
        for host in Machine::HOSTS {
            net.make_guest_bridge(net.node(host))?;
        }
        for node in &net.nodes {
            node.cgroup.create()?;
        }
        net.wait_forwarding()?;
        Ok(net)
    }

    /// The prefix of everything that this run makes.
    #[must_use]
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Folder for sockets, state and logs of this run.
    #[must_use]
    pub fn run_folder(&self) -> PathBuf {
        run_folder(&self.prefix)
    }

    /// One machine.
    #[must_use]
    pub fn node(&self, machine: Machine) -> &Node {
        self.nodes.iter().find(|node| node.machine == machine).expect("a net has every machine")
    }

    /// The namespace that holds the bridge of the migration network.
    #[must_use]
    pub fn migration_switch(&self) -> String {
        self.switch(Network::Migration)
    }

    /// Limits what each host can send and receive in the migration network (a token bucket: no delay, no loss model).
    pub fn limit_migration_mbit(&self, rate_mbit: u32) -> Result<()> {
        let switch = self.switch(Network::Migration);
        let rate = format!("{rate_mbit}mbit");
        for (namespace, device) in Machine::HOSTS.iter().flat_map(|host| {
            [
                (self.node(*host).namespace.clone(), "mig0".to_owned()),
                (switch.clone(), host.name().to_owned()),
            ]
        }) {
            let bucket = ["root", "tbf", "rate", &rate, "burst", "256kb", "latency", "20ms"];
            process::run(
                Command::new("tc").args(["-n", &namespace, "qdisc", "replace", "dev", &device]).args(bucket),
            )?;
        }
        Ok(())
    }

    /// Attaches a namespace of its own to the migration network as a silent station that hears every frame.
    ///
    /// The bridge then forgets addresses at once and floods: a hub, which is what an attacker arranges.
    /// Returns the namespace; its only card is `cap0`.
    pub fn attach_listener(&self) -> Result<String> {
        let namespace = format!("{}-capture", self.prefix);
        let switch = self.switch(Network::Migration);
        ip(
            None,
            &format!(
                "netns add {namespace}\nlink add cap0 netns {namespace} type veth peer name capture netns {switch}\n"
            ),
        )?;
        ip(Some(&namespace), "link set cap0 addrgenmode none\nlink set cap0 up\n")?;
        ip(
            Some(&switch),
            "link set capture addrgenmode none\nlink set capture master br0\nlink set capture up\nlink set br0 type bridge ageing_time 0\n",
        )?;
        process::wait_for("the listener to hear", FORWARDING_LIMIT, || {
            Ok(forwards(&switch, "br0")?.then_some(()))
        })?;
        Ok(namespace)
    }

    /// Undoes [`Net::attach_listener`].
    pub fn detach_listener(&self) -> Result<()> {
        let namespace = format!("{}-capture", self.prefix);
        ip(
            Some(&self.switch(Network::Migration)),
            "link set br0 type bridge ageing_time 30000\nlink del capture\n",
        )?;
        ip(None, &format!("netns del {namespace}\n"))
    }

    /// Waits until every bridge forwards: the kernel tells bridges about new carriers up to a second late,
    /// and what is sent before that is lost.
    fn wait_forwarding(&self) -> Result<()> {
        let switches = Network::ALL.map(|network| (self.switch(network), "br0"));
        let hosts = Machine::HOSTS.map(|host| (self.node(host).namespace.clone(), GUEST_BRIDGE));
        for (namespace, bridge) in switches.into_iter().chain(hosts) {
            process::wait_for("the networks to forward", FORWARDING_LIMIT, || {
                Ok(forwards(&namespace, bridge)?.then_some(()))
            })?;
        }
        Ok(())
    }

    fn switch(&self, network: Network) -> String {
        format!("{}-sw-{}", self.prefix, network.name())
    }

    fn make_namespaces(&self) -> Result<()> {
        let switches = Network::ALL.map(|network| self.switch(network));
        let machines = self.nodes.iter().map(|node| node.namespace.clone());
        let names: Vec<String> = switches.iter().cloned().chain(machines).collect();
        let add: String = names.iter().map(|name| format!("netns add {name}\n")).collect();
        ip(None, &add)?;
        for name in &names {
            ip(Some(name), "link set lo up\n")?;
        }
        for switch in &switches {
            ip(Some(switch), "link add br0 type bridge\nlink set br0 addrgenmode none\nlink set br0 up\n")?;
        }
        Ok(())
    }

    /// Each card is a veth pair between the machine and the network's switch, where it has the machine's name.
    fn make_cards(&self) -> Result<()> {
        let mut pairs = String::new();
        for card in CARDS {
            let (machine, switch) = (self.node(card.machine), self.switch(card.network));
            pairs.push_str(&format!(
                "link add {} address {} netns {} type veth peer name {} netns {switch}\n",
                card.device,
                card.mac(),
                machine.namespace,
                card.machine.name(),
            ));
        }
        ip(None, &pairs)?;
        for card in CARDS {
            let (device, port) = (card.device, card.machine.name());
            let address =
                card.address().map(|a| format!("addr add {a}/24 dev {device}\n")).unwrap_or_default();
            let here = format!("link set {device} addrgenmode none\nlink set {device} up\n{address}");
            ip(Some(&self.node(card.machine).namespace), &here)?;
            let there =
                format!("link set {port} addrgenmode none\nlink set {port} master br0\nlink set {port} up\n");
            ip(Some(&self.switch(card.network)), &there)?;
        }
        Ok(())
    }

    fn make_guest_bridge(&self, host: &Node) -> Result<()> {
        let bridge = GUEST_BRIDGE;
        let lines = format!(
            "link add {bridge} type bridge\nlink set {bridge} addrgenmode none\nlink set {bridge} up\nlink set gst0 master {bridge}\n"
        );
        ip(Some(&host.namespace), &lines)
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        yield_to_signal();
        if let Err(error) = destroy(&self.prefix) {
            eprintln!("lab: {error:#}");
        }
    }
}

impl Node {
    fn new(prefix: &str, machine: Machine) -> Self {
        let name = machine.name();
        Self {
            machine,
            namespace: format!("{prefix}-{name}"),
            cgroup: Cgroup::of_run(prefix).child(name),
            run_folder: run_folder(prefix).join(name),
        }
    }

    /// Which machine this is.
    #[must_use]
    pub fn machine(&self) -> Machine {
        self.machine
    }

    /// The machine's network namespace, as `ip netns` names it.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The machine's cgroup.
    #[must_use]
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// A folder of the machine's own for sockets, state and logs; made on first use.
    pub fn folder(&self) -> Result<PathBuf> {
        fs::create_dir_all(&self.run_folder)
            .with_context(|| format!("making {}", self.run_folder.display()))?;
        Ok(self.run_folder.clone())
    }

    /// A command that runs inside the machine: its network, its cgroup, a session of its own.
    ///
    /// Three programs replace each other in one process, so the pid is the command's own. `ip netns exec` is
    /// not used: it hides `/sys/fs/cgroup`.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={NAMESPACES}/{}", self.namespace));
        command.args(["setsid", "sh", "-c", ENTER_CGROUPS, "sh"]);
        let entrances = self.cgroup.entrances();
        command.arg(entrances.len().to_string()).args(entrances);
        command.arg(program);
        command
    }

    /// Starts a program inside the machine with its output in `NAME.log` in the machine's folder.
    pub fn spawn(
        &self,
        name: &str,
        program: impl AsRef<OsStr>,
        arguments: &[impl AsRef<OsStr>],
    ) -> Result<Child> {
        let log = self.folder()?.join(format!("{name}.log"));
        let file = fs::File::create(&log).with_context(|| format!("making {}", log.display()))?;
        let copy = file.try_clone().context("sharing the log file")?;
        self.command(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(copy)
            .spawn()
            .with_context(|| format!("starting {name} in {}", self.namespace))
    }

    /// Attaches a new tap card to the guest bridge.
    pub fn add_tap(&self, device: &str) -> Result<()> {
        let lines = format!(
            "tuntap add {device} mode tap\nlink set {device} addrgenmode none\nlink set {device} master {GUEST_BRIDGE}\nlink set {device} up\n"
        );
        ip(Some(&self.namespace), &lines)
    }

    /// Removes a tap card.
    pub fn remove_tap(&self, device: &str) -> Result<()> {
        ip(Some(&self.namespace), &format!("link del {device}\n"))
    }

    /// The number by which the kernel knows the machine's network namespace.
    pub fn namespace_inode(&self) -> Result<u64> {
        namespace_inode(Path::new(NAMESPACES).join(&self.namespace).as_path())
    }
}

/// Arguments: the number of files, the files, the program and its arguments.
const ENTER_CGROUPS: &str = r#"
count=$1; shift
while [ "$count" -gt 0 ]; do echo $$ > "$1" || exit 126; shift; count=$((count-1)); done
exec "$@""#;

/// Whether every port of the bridge has its carrier and forwards.
fn forwards(namespace: &str, bridge: &str) -> Result<bool> {
    let show = ["-n", namespace, "-json", "-details", "link", "show", "master", bridge];
    let text = process::run(Command::new("ip").args(show))?;
    let ports: serde_json::Value = serde_json::from_str(&text).context("reading what ip says of a bridge")?;
    let ready = |port: &serde_json::Value| {
        port["operstate"] == "UP" && port["linkinfo"]["info_slave_data"]["state"] == "forwarding"
    };
    Ok(ports.as_array().is_some_and(|ports| !ports.is_empty() && ports.iter().all(ready)))
}

fn run_folder(prefix: &str) -> PathBuf {
    Path::new(RUN_FOLDER).join(prefix)
}

fn namespace_inode(path: &Path) -> Result<u64> {
    let data = fs::metadata(path).with_context(|| format!("looking at {}", path.display()))?;
    Ok(data.ino())
}

/// The three networks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Network {
    Control,
    Migration,
    Guest,
}

impl Network {
    const ALL: [Self; 3] = [Self::Control, Self::Migration, Self::Guest];

    fn name(self) -> &'static str {
        match self {
            Self::Control => "ctl",
            Self::Migration => "mig",
            Self::Guest => "gst",
        }
    }

    fn number(self) -> u8 {
        match self {
            Self::Control => 81,
            Self::Migration => 82,
            Self::Guest => 83,
        }
    }
}

/// A machine's card in a network.
struct Card {
    machine: Machine,
    network: Network,
    device: &'static str,
}

const fn card(machine: Machine, network: Network, device: &'static str) -> Card {
    Card { machine, network, device }
}

const CARDS: [Card; 8] = [
    card(Machine::Manager, Network::Control, "ctl0"),
    card(Machine::HostA, Network::Control, "ctl0"),
    card(Machine::HostB, Network::Control, "ctl0"),
    card(Machine::HostA, Network::Migration, "mig0"),
    card(Machine::HostB, Network::Migration, "mig0"),
    card(Machine::HostA, Network::Guest, "gst0"),
    card(Machine::HostB, Network::Guest, "gst0"),
    card(Machine::Client, Network::Guest, "eth0"),
];

impl Card {
    fn mac(&self) -> String {
        format!("02:{}:00:00:00:{:02x}", self.network.number(), self.machine.number())
    }

    /// The guest network's cards on hosts belong to a bridge and have no address.
    fn address(&self) -> Option<String> {
        let bridged = self.network == Network::Guest && self.machine != Machine::Client;
        (!bridged).then(|| format!("10.{}.0.{}", self.network.number(), self.machine.number()))
    }
}

/// Runs lines of `ip` commands, in a namespace or outside; the first that fails ends it.
fn ip(namespace: Option<&str>, lines: &str) -> Result<()> {
    let mut command = Command::new("ip");
    if let Some(namespace) = namespace {
        command.args(["-n", namespace]);
    }
    let mut child = command
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("starting ip")?;
    let mut input = child.stdin.take().context("ip has no input")?;
    input.write_all(lines.as_bytes()).context("writing to ip")?;
    drop(input);
    let output = child.wait_with_output().context("waiting for ip")?;
    if !output.status.success() {
        let place = namespace.unwrap_or("the root namespace");
        bail!("ip in {place}: {}: {}", lines.trim(), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// Runs `work` with the calling code's sockets made inside a namespace, and hands back what it made.
///
/// A socket belongs for ever to the namespace of the thread that made it, so only making it needs a thread there.
pub fn inside<T: Send + 'static>(
    namespace: &str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let path = Path::new(NAMESPACES).join(namespace);
    let file = fs::File::open(&path).with_context(|| format!("opening {}", path.display()))?;
    let thread = std::thread::spawn(move || {
        let kind = Some(rustix::thread::LinkNameSpaceType::Network);
        rustix::thread::move_into_link_name_space(file.as_fd(), kind).context("entering the namespace")?;
        work()
    });
    thread.join().map_err(|_| anyhow::anyhow!("the thread inside {namespace} panicked"))?
}
