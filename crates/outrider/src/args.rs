//! The command line, as clap reads it.

use crate::size::parse_size_bytes;
use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::Serialize;
use std::net::IpAddr;
use std::path::PathBuf;
use types::{HostName, Name, Nonce};

const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    a check answered no (inspect, audit verify, policy test, doctor)
  2    usage: bad argument, bad file, unknown name
  3    refused: authentication, policy, load, limit
  4    failed
  5    terminated by a monitor or an operator
  6    the manager cannot be reached
  130  detached with Ctrl-C; the migration goes on";

/// Secure live migration of virtual machines
///
/// Outrider moves running QEMU guests between hosts. No VM moves without a permit, no byte of it reaches the
/// target uninspected, and no VM ever runs twice or not at all.
#[derive(Debug, Parser)]
#[command(name = "outrider", version, propagate_version = true, max_term_width = 100)]
#[command(disable_help_subcommand = true, after_help = EXIT_CODES)]
pub(crate) struct Cli {
    /// Form of the result
    #[arg(long, value_enum, default_value_t, global = true, value_name = "FORMAT", display_order = 900)]
    pub(crate) output: Format,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// How results are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum Format {
    // Tables and reports for people
    #[default]
    Table,
    // One JSON document on standard output
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the control manager
    #[command(subcommand)]
    Manager(ManagerCommand),
    /// Run, enrol and list hosts
    #[command(subcommand)]
    Host(HostCommand),
    /// Define, start, stop and list virtual machines
    #[command(subcommand)]
    Vm(VmCommand),
    /// Move a running VM to another host and watch it move
    Migrate(Migrate),
    /// List, follow and control migrations
    #[command(subcommand)]
    Migration(MigrationCommand),
    /// Read and verify the audit log
    #[command(subcommand)]
    Audit(AuditCommand),
    /// Copy the registry into one file, while the manager runs
    Backup(Backup),
    /// Put a backup in the place of the registry; the manager then decides nothing until `audit reconcile`
    Restore(Restore),
    /// Make, list and revoke operators' tokens
    #[command(subcommand)]
    Token(TokenCommand),
    /// Set and show what hosts are expected to measure
    #[command(subcommand)]
    Reference(ReferenceCommand),
    /// Check and test policies, put them into force, and see which are
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// Make, list and revoke plans of maintenance
    #[command(subcommand)]
    Plan(PlanCommand),
    /// Judge a recorded migration stream as a target would; exit code 1 when it is rejected
    Inspect(Inspect),
    /// Check whether this machine is ready, and say what to do where it is not
    Doctor(Doctor),
    /// Print a completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// How to reach the manager.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Connection")]
pub(crate) struct Connection {
    /// The manager's address
    #[arg(
        long = "manager",
        env = "OUTRIDER_MANAGER",
        hide_env_values = true,
        value_name = "URL",
        default_value = "https://127.0.0.1:7443"
    )]
    pub(crate) manager_url: String,
    /// File that holds the API token [default: /var/lib/outrider/manager/admin.token]
    #[arg(long, env = "OUTRIDER_TOKEN_FILE", hide_env_values = true, value_name = "FILE")]
    pub(crate) token_file: Option<PathBuf>,
    /// File that holds the manager's CA certificate [default: /var/lib/outrider/manager/ca.pem]
    #[arg(long, env = "OUTRIDER_CA", hide_env_values = true, value_name = "FILE")]
    pub(crate) ca: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ManagerCommand {
    /// Run the control manager in the foreground
    Run(ManagerRun),
}

#[derive(Debug, Args)]
pub(crate) struct ManagerRun {
    /// Configuration file [default: /etc/outrider/manager.toml when it exists]
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// State folder: keys, registry, admin token
    #[arg(long, env = "OUTRIDER_MANAGER_STATE", hide_env_values = true, value_name = "FOLDER")]
    pub(crate) state: Option<PathBuf>,
    /// Name of this manager
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Address for operators (HTTPS)
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) operator_listen: Option<String>,
    /// Address for hosts (gRPC)
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) hosts_listen: Option<String>,
    /// Address that join tokens tell hosts to dial, when `hosts-listen` is a wildcard
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) hosts_advertise: Option<String>,
    #[command(flatten)]
    pub(crate) log: Log,
}

/// How a daemon logs.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Logging")]
pub(crate) struct Log {
    /// What to log, e.g. `info` or `outrider_manager=debug`
    #[arg(long = "log", env = "OUTRIDER_LOG", hide_env_values = true, value_name = "FILTER")]
    #[arg(default_value = "info")]
    pub(crate) filter: String,
    /// How to log
    #[arg(long, value_enum, default_value_t, value_name = "FORMAT")]
    pub(crate) log_format: LogFormat,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub(crate) enum LogFormat {
    // Lines for people
    #[default]
    Human,
    // One JSON object per line
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum HostCommand {
    /// Run the host daemon in the foreground
    Run(HostRun),
    /// Enrol a host: make its record and a single-use join token
    Add(HostAdd),
    /// Join this machine to the manager with a token from `host add`
    Join(HostJoin),
    /// List hosts
    List(ListHosts),
    /// Show one host
    Show(ShowHost),
    /// Ask a host's TPM now, and show expected against found; exit code 1 when it is not trusted
    Attest(ShowHost),
    /// Print the name of this machine's endorsement key, for `host add --ek-name`
    Ek(HostEk),
}

#[derive(Debug, Args)]
pub(crate) struct HostEk {
    /// The TPM: device:/dev/tpmrm0, or a swtpm's unix:PATH or tcp:IP:PORT [default: `tpm` of the configuration file]
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) tpm: Option<host::platform::Address>,
    /// Configuration file [default: /etc/outrider/host.toml when it exists]
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct HostRun {
    /// Configuration file [default: /etc/outrider/host.toml when it exists]
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) settings: HostSettings,
    #[command(flatten)]
    pub(crate) log: Log,
}

/// What flags and environment may override in the host's configuration file.
#[derive(Debug, Clone, Args)]
pub(crate) struct HostSettings {
    /// State folder: identity, signing key, journal
    #[arg(long, env = "OUTRIDER_HOST_STATE", hide_env_values = true, value_name = "FOLDER")]
    pub(crate) state: Option<PathBuf>,
    /// Folder for sockets
    #[arg(long, value_name = "FOLDER")]
    pub(crate) run_folder: Option<PathBuf>,
    /// The manager's address for hosts
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) manager_address: Option<String>,
    /// Name of this host
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<HostName>,
    /// Address on the migration network
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) migration_address: Option<IpAddr>,
    /// Control group under which VMs live
    #[arg(long, value_name = "PATH")]
    pub(crate) cgroup: Option<String>,
    /// The QEMU program
    #[arg(long, value_name = "FILE")]
    pub(crate) qemu_binary: Option<PathBuf>,
    /// The VM agent's program
    #[arg(long, value_name = "FILE")]
    pub(crate) agent_binary: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct HostAdd {
    /// Name of the host: a-z, 0-9 and '-'
    pub(crate) name: HostName,
    /// Address from which its daemon dials the manager
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) control_address: IpAddr,
    /// Its address on the migration network
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) migration_address: IpAddr,
    /// MAC of its control or migration interface; give one per interface
    #[arg(long = "mac", value_name = "MAC", required = true, value_delimiter = ',')]
    pub(crate) macs: Vec<String>,
    /// Memory for guests, e.g. 64GiB
    #[arg(long, value_name = "SIZE", value_parser = parse_size_bytes)]
    pub(crate) memory: u64,
    /// Virtual CPUs for guests
    #[arg(long, value_name = "COUNT")]
    pub(crate) vcpus: u32,
    /// Most guests at a time
    #[arg(long, value_name = "COUNT", default_value_t = 100)]
    pub(crate) vms: u32,
    /// Zone, for policy
    #[arg(long, value_name = "NAME", default_value = "")]
    pub(crate) zone: String,
    /// Name of its TPM's endorsement key, as `outrider host ek` prints it there; without a TPM it is unattested
    #[arg(long, value_name = "HEX", conflicts_with = "ek_vendor_roots", help_heading = "Attestation")]
    pub(crate) ek_name: Option<String>,
    /// Instead: certificate of a TPM vendor (PEM or DER); any TPM that it certified will do
    #[arg(long = "ek-vendor-root", value_name = "FILE", help_heading = "Attestation")]
    pub(crate) ek_vendor_roots: Vec<PathBuf>,
    /// Class of hosts whose reference values count for it
    #[arg(long, value_name = "NAME", help_heading = "Attestation")]
    pub(crate) class: Option<Name>,
    /// PCRs whose values at its join become its reference, e.g. 0,2,4,7
    #[arg(long, value_name = "PCRS", value_delimiter = ',', help_heading = "Attestation")]
    pub(crate) record_pcrs: Vec<u8>,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Args)]
pub(crate) struct HostJoin {
    /// The token that `host add` printed; `-` reads it from standard input, so that it stays out of process lists
    #[arg(env = "OUTRIDER_JOIN_TOKEN", hide_env_values = true)]
    pub(crate) token: String,
    /// Configuration file [default: /etc/outrider/host.toml when it exists]
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// State folder: identity, signing key, journal
    #[arg(long, env = "OUTRIDER_HOST_STATE", hide_env_values = true, value_name = "FOLDER")]
    pub(crate) state: Option<PathBuf>,
    /// Dial this address instead of the one in the token
    #[arg(long, value_name = "ADDRESS:PORT")]
    pub(crate) manager_address: Option<String>,
    /// The TPM with which this host proves itself [default: `tpm` of the configuration file]
    #[arg(long, value_name = "ADDRESS")]
    pub(crate) tpm: Option<host::platform::Address>,
}

#[derive(Debug, Args)]
pub(crate) struct ListHosts {
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Args)]
pub(crate) struct ShowHost {
    /// The host
    pub(crate) name: HostName,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Subcommand)]
pub(crate) enum VmCommand {
    /// Record a VM from its spec, a TOML file
    Define(DefineVm),
    /// Print the BLAKE3 digest of a kernel or initrd, as a spec wants it
    Digest {
        /// The file
        file: PathBuf,
    },
    /// List VMs
    List(ListVms),
    /// Show one VM
    Show(OneVm),
    /// Show what a VM's stream is compared with: memory, firmware, devices, and what vouches for each device
    Inspect(InspectVm),
    /// Start a VM on a host
    Start(StartVm),
    /// Stop a VM; its record stays
    Stop(OneVm),
}

#[derive(Debug, Args)]
pub(crate) struct DefineVm {
    /// The spec; `-` reads standard input
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Args)]
pub(crate) struct ListVms {
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Args)]
pub(crate) struct OneVm {
    /// The VM
    pub(crate) vm: Name,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Args)]
pub(crate) struct InspectVm {
    /// The VM
    pub(crate) vm: Name,
    /// Write the enrolment document here, as `inspect --vm` reads it
    #[arg(long, value_name = "FILE")]
    pub(crate) save: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Args)]
pub(crate) struct StartVm {
    /// The VM
    pub(crate) vm: Name,
    /// Where to start it
    #[arg(long, value_name = "HOST")]
    pub(crate) on: HostName,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Ctrl-C detaches: the migration goes on, and the command says how to follow or stop it."
)]
pub(crate) struct Migrate {
    /// The VM
    pub(crate) vm: Name,
    /// Where to
    #[arg(long, value_name = "HOST")]
    pub(crate) to: HostName,
    /// Where you believe it runs; refused when wrong
    #[arg(long, value_name = "HOST")]
    pub(crate) from: Option<HostName>,
    /// Multifd channels for the memory, beside the main one [default: the manager's, 0 if not configured]
    #[arg(long, value_name = "N")]
    pub(crate) channels: Option<u16>,
    /// Compress the memory on those channels
    #[arg(long, value_name = "METHOD", requires = "channels")]
    pub(crate) compression: Option<Compression>,
    /// A plan of maintenance that covers the move
    #[arg(long, value_name = "ID")]
    pub(crate) plan: Option<Nonce>,
    /// Ask every gate and say what each answers; nothing is moved
    #[arg(long, conflicts_with = "detach")]
    pub(crate) dry_run: bool,
    /// Print the migration's id and do not wait
    #[arg(long)]
    pub(crate) detach: bool,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

/// What QEMU compresses pages with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Compression {
    /// Deflate
    Zlib,
    /// Zstandard
    Zstd,
}

impl Compression {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Zlib => "zlib",
            Self::Zstd => "zstd",
        }
    }
}

const REFERENCE: &str = "ID may be shortened to a unique prefix. A VM's name means its open migration.";

#[derive(Debug, Subcommand)]
pub(crate) enum MigrationCommand {
    /// List migrations, newest first
    List(ListMigrations),
    /// Where the VM runs, who asked, what is awaited, and what happens next by itself
    Show(ShowMigration),
    /// Follow a migration to its end
    Watch(OneMigration),
    /// Hold a migration: nothing more is sent, the guest runs on at the source
    Suspend(OneMigration),
    /// Let a suspended migration go on
    Resume(OneMigration),
    /// End a migration: both sides are cleaned up, the guest runs on at the source
    Terminate(OneMigration),
    /// Give your word that a side's host is dead, where no rule can decide (break-glass, audited)
    Resolve(ResolveMigration),
}

#[derive(Debug, Args)]
pub(crate) struct ListMigrations {
    /// Only those that are still open
    #[arg(long)]
    pub(crate) open: bool,
    /// Only those of this VM
    #[arg(long, value_name = "VM")]
    pub(crate) vm: Option<Name>,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Args)]
#[command(after_help = REFERENCE)]
pub(crate) struct OneMigration {
    /// The migration
    pub(crate) id: String,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

const RESOLVE: &str = "\
The word of an operator replaces proof: if the host that is called dead runs the VM after all, the VM runs twice. Cut
its power first.";

#[derive(Debug, Args)]
#[command(after_help = RESOLVE)]
#[group(id = "fenced", required = true, multiple = false, args = ["target_fenced", "source_fenced"])]
pub(crate) struct ResolveMigration {
    /// The migration
    pub(crate) id: String,
    /// The target's host is dead and stays so
    #[arg(long)]
    pub(crate) target_fenced: bool,
    /// The source's host is dead and stays so
    #[arg(long)]
    pub(crate) source_fenced: bool,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Args)]
#[command(
    after_help = "ID may be shortened to a unique prefix. A VM's name means its open migration, or its last."
)]
pub(crate) struct ShowMigration {
    /// The migration
    pub(crate) id: String,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ReferenceCommand {
    /// List whose values are set, by whom and when
    List(ListReferences),
    /// Print the values of a host or a class as the document that `set` takes
    Show(OneReference),
    /// Set the values of a host or a class from a document (JSON)
    Set(SetReference),
    /// Allow one more value of a register: a planned change, registered ahead
    Allow(AllowReference),
    /// Take the present state of a host, which you trust, as reference
    Record(RecordReference),
    /// Forget the values of a host or a class: the host falls back to its class, or proves nothing any more
    Remove(OneReference),
}

#[derive(Debug, Args)]
pub(crate) struct ListReferences {
    #[command(flatten)]
    pub(crate) connection: Connection,
}

/// Whose values: `host/NAME` or `class/NAME`.
#[derive(Debug, Clone)]
pub(crate) struct Scope(pub(crate) String);

impl std::str::FromStr for Scope {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let named = match text.split_once('/') {
            Some(("host", name)) => name.parse::<HostName>().map(|_| ()),
            Some(("class", name)) => name.parse::<Name>().map(|_| ()),
            _ => return Err("it is host/NAME or class/NAME".to_owned()),
        };
        named.map(|()| Self(text.to_owned())).map_err(|e| e.to_string())
    }
}

#[derive(Debug, Args)]
pub(crate) struct OneReference {
    /// host/NAME or class/NAME
    pub(crate) scope: Scope,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Args)]
pub(crate) struct SetReference {
    /// host/NAME or class/NAME
    pub(crate) scope: Scope,
    /// The document; `-` reads standard input
    pub(crate) file: PathBuf,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Args)]
pub(crate) struct AllowReference {
    /// host/NAME or class/NAME
    pub(crate) scope: Scope,
    /// The register, 0 to 23
    #[arg(long, value_name = "N")]
    pub(crate) pcr: u8,
    /// The value
    #[arg(long, value_name = "HEX")]
    pub(crate) digest: String,
    /// What it stands for, e.g. "kernel 6.1.148, change 4711"
    #[arg(long, value_name = "TEXT")]
    pub(crate) note: Option<String>,
    /// Not accepted before this time (RFC 3339)
    #[arg(long, value_name = "TIME")]
    pub(crate) not_before: Option<jiff::Timestamp>,
    /// Not accepted after this time (RFC 3339)
    #[arg(long, value_name = "TIME")]
    pub(crate) not_after: Option<jiff::Timestamp>,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Args)]
pub(crate) struct RecordReference {
    /// The host
    pub(crate) host: HostName,
    /// The registers, e.g. 0,2,4,7
    #[arg(long, value_name = "PCRS", value_delimiter = ',', required = true)]
    pub(crate) pcrs: Vec<u8>,
    /// Take them for this class of hosts instead of for the host
    #[arg(long, value_name = "NAME")]
    pub(crate) class: Option<Name>,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TokenCommand {
    /// Make a token for a person or a program; it is shown once
    Add(AddToken),
    /// List tokens: whose, which role, until when
    List(ListTokens),
    /// Revoke a token: it opens nothing from then on
    Revoke(RevokeToken),
}

#[derive(Debug, Args)]
pub(crate) struct AddToken {
    /// Whose; every act is attributed to this name
    pub(crate) name: Name,
    /// Role: admin, operator, auditor, viewer, or one of your own policies
    #[arg(long, value_name = "ROLE")]
    pub(crate) role: Name,
    /// Days until it expires
    #[arg(long, value_name = "N", default_value_t = 90)]
    pub(crate) days: u32,
    /// A tenant whose VMs it may see and move; `all` for all; may be given several times
    #[arg(long = "tenant", value_name = "TENANT")]
    pub(crate) tenants: Vec<Name>,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Args)]
pub(crate) struct ListTokens {
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Args)]
pub(crate) struct RevokeToken {
    /// Whose
    pub(crate) name: Name,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PolicyCommand {
    /// Load a folder of policies as the manager does, and list them
    Check(CheckPolicy),
    /// Ask every case of a table; exit code 1 when one comes out otherwise than expected
    Test(TestPolicy),
    /// Put a folder of policies into force, or a set that was before
    Apply(ApplyPolicy),
    /// Show the set in force
    Show(ShowPolicy),
    /// List every set that was applied
    History(ShowPolicy),
}

#[derive(Debug, Args)]
#[group(id = "set", required = true, multiple = false, args = ["folder", "digest"])]
pub(crate) struct ApplyPolicy {
    /// Folder of *.cedar files, with zones.toml if wanted
    #[arg(value_name = "FOLDER")]
    pub(crate) folder: Option<PathBuf>,
    /// A set that was in force: its digest, or 8 characters of its beginning
    #[arg(long, value_name = "DIGEST")]
    pub(crate) digest: Option<String>,
    /// Table of expectations that must all hold
    #[arg(long, value_name = "TABLE", requires = "folder")]
    pub(crate) expect: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Args)]
pub(crate) struct ShowPolicy {
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PlanCommand {
    /// Make a plan: VMs of a host may be moved, in a window, where policy would else not permit it
    Create(CreatePlan),
    /// List plans
    List(ShowPolicy),
    /// Take a plan back: nothing that is decided from then on rests on it
    Revoke(RevokePlan),
}

#[derive(Debug, Args)]
pub(crate) struct CreatePlan {
    /// The host that VMs are moved from
    #[arg(long, value_name = "HOST")]
    pub(crate) host: HostName,
    /// A host that they may be moved to, several times if wanted [default: any]
    #[arg(long = "target", value_name = "HOST")]
    pub(crate) targets: Vec<HostName>,
    /// A zone that they may be moved to, several times if wanted [default: any]
    #[arg(long = "zone", value_name = "ZONE")]
    pub(crate) zones: Vec<String>,
    /// For how long the plan holds from now on
    #[arg(long, value_name = "HOURS", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=720))]
    pub(crate) hours: u32,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Args)]
pub(crate) struct RevokePlan {
    /// The plan
    pub(crate) id: Nonce,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Args)]
pub(crate) struct CheckPolicy {
    /// Folder of *.cedar files [default: the built-in policies]
    #[arg(value_name = "FOLDER")]
    pub(crate) folder: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct TestPolicy {
    /// Table of hosts, VMs and cases (TOML; `-` for standard input)
    #[arg(value_name = "TABLE")]
    pub(crate) table: PathBuf,
    /// Folder of *.cedar files [default: the built-in policies]
    #[arg(long, value_name = "FOLDER")]
    pub(crate) policy: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum AuditCommand {
    /// Verify the chain of the whole log; exit code 1 when an entry was changed, removed or moved
    Verify(VerifyAudit),
    /// List entries, oldest first
    List(ListAudit),
    /// Write the whole log as JSON lines, oldest first; `audit verify --file` checks such a file without a manager
    Export(ExportAudit),
    /// Write everything about one migration that can be verified offline: `audit verify --bundle` does
    Bundle(BundleAudit),
    /// Let a registry that was set back decide again, once every host has said what it holds
    Reconcile(ReconcileAudit),
}

#[derive(Debug, Args)]
#[command(
    after_help = "ID may be shortened to a unique prefix. A VM's name means its open migration, or its last."
)]
pub(crate) struct BundleAudit {
    /// The migration
    pub(crate) id: String,
    /// Write to this file, which must not exist yet [default: standard output]
    #[arg(long, value_name = "FILE")]
    pub(crate) output_file: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

const RECONCILE: &str = "\
Without --accept it says what each host holds, what becomes of each VM, and what is in the way; nothing is changed. With
--accept the registry follows the hosts, and everything that may have been used since the loss counts as used: permits,
join tokens, requests. API tokens that were revoked since are good again: look through `outrider token list`.

The word of an operator replaces proof: if a host that is called lost runs a VM after all, that VM may run twice. Cut its
power first.

Exit codes: 0 done, or nothing is in the way; 1 something is in the way";

#[derive(Debug, Args)]
#[command(after_help = RECONCILE)]
pub(crate) struct ReconcileAudit {
    /// This host is dead and stays so; give one per host
    #[arg(long, value_name = "HOST", value_delimiter = ',')]
    pub(crate) lost: Vec<HostName>,
    /// Do it: accept what is lost
    #[arg(long)]
    pub(crate) accept: bool,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

/// Where a manager keeps its registry.
#[derive(Debug, Args)]
pub(crate) struct RegistryPlace {
    /// Configuration file [default: /etc/outrider/manager.toml when it exists]
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// State folder
    #[arg(long, env = "OUTRIDER_MANAGER_STATE", hide_env_values = true, value_name = "FOLDER")]
    pub(crate) state: Option<PathBuf>,
}

const BACKUP: &str = "\
The file is one picture of an instant, with a digest, readable by its owner only; it restores into SQLite and PostgreSQL
alike. It holds no keys: copy ca.pem, ca-key.pem and permit-key.pem from the manager's state folder to another place.";

#[derive(Debug, Args)]
#[command(after_help = BACKUP)]
pub(crate) struct Backup {
    /// Write to this file, which must not exist yet
    #[arg(long, value_name = "FILE")]
    pub(crate) to: PathBuf,
    #[command(flatten)]
    pub(crate) registry: RegistryPlace,
}

const RESTORE: &str = "\
The manager must not run. SQLite: the registry that is there is kept beside the new one. PostgreSQL: the database must be
empty; make a new one and name it in manager.toml. See docs/runbooks/restore.md.";

#[derive(Debug, Args)]
#[command(after_help = RESTORE)]
pub(crate) struct Restore {
    /// The backup
    #[arg(long, value_name = "FILE")]
    pub(crate) from: PathBuf,
    #[command(flatten)]
    pub(crate) registry: RegistryPlace,
}

#[derive(Debug, Args)]
pub(crate) struct ExportAudit {
    /// Write to this file, which must not exist yet [default: standard output]
    #[arg(long, value_name = "FILE")]
    pub(crate) out: Option<PathBuf>,
    /// Only entries behind this number; such a file can't be verified by itself
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    pub(crate) after: u64,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Args)]
pub(crate) struct VerifyAudit {
    /// A log that was exported, instead of the manager's
    #[arg(long, value_name = "FILE")]
    pub(crate) file: Option<PathBuf>,
    /// A bundle of one migration, instead of a log; no manager is asked
    #[arg(long, value_name = "FILE", conflicts_with = "file")]
    pub(crate) bundle: Option<PathBuf>,
    /// A manager's permit key that counts, raw Ed25519 in hexadecimal, as in a host's identity/host.json; give one per
    /// manager [default: any, and the verdict names it]
    #[arg(long, value_name = "KEY", requires = "bundle")]
    pub(crate) key: Vec<String>,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

#[derive(Debug, Args)]
pub(crate) struct ListAudit {
    /// Show the last so many
    #[arg(long, value_name = "COUNT", default_value_t = 50)]
    pub(crate) limit: usize,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

const INSPECT: &str = "\
Recordings are the bytes of one connection in one direction, plain, .gz or .xz. Without --vm a stream is held to its
own word: its grammar, its completeness, and one possible reading of its device state. With --vm it is compared with
what was enrolled. To enrol, record a fresh VM: QEMU with -S, then `migrate file:FILE` in its monitor.

Exit codes: 0 accepted, 1 rejected, 2 usage";

#[derive(Debug, Args)]
#[command(after_help = INSPECT)]
pub(crate) struct Inspect {
    /// The main channel
    #[arg(value_name = "MAIN")]
    pub(crate) main: PathBuf,
    /// The multifd channels, in any order
    #[arg(value_name = "CHANNEL", conflicts_with = "learn")]
    pub(crate) channels: Vec<PathBuf>,
    /// The other direction of the main channel
    #[arg(long, value_name = "FILE", conflicts_with = "learn")]
    pub(crate) return_path: Option<PathBuf>,
    /// What the VM must look like: from --learn, or from `outrider vm inspect --save`
    #[arg(long, value_name = "INVENTORY", conflicts_with = "learn")]
    pub(crate) vm: Option<PathBuf>,
    /// Print the inventory that the recording shows, for --vm
    #[arg(long)]
    pub(crate) learn: bool,
    /// Which QEMU the recording is of, for --learn
    #[arg(long, value_name = "NAME", default_value = "unknown")]
    pub(crate) hypervisor: String,
    /// What the same QEMU's `-machine TYPE -dump-vmstate FILE` wrote: lets --learn know what a fresh VM does not show
    #[arg(long, value_name = "FILE", requires = "learn")]
    pub(crate) dump_vmstate: Option<PathBuf>,
    /// How pages are packed on the multifd channels
    #[arg(long, value_enum, value_name = "METHOD")]
    pub(crate) compression: Option<Compression>,
    /// Reject a stream without a return path, as a migration would be
    #[arg(long)]
    pub(crate) require_return_path: bool,
    /// Let devices through that the inventory's catalogue cannot vouch for
    #[arg(long)]
    pub(crate) report_unvouched: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "Exit code 1 when a check fails. Warnings do not count as failures.")]
pub(crate) struct Doctor {
    /// What this machine is to be
    #[arg(long, value_enum, default_value_t, value_name = "ROLE")]
    pub(crate) role: Role,
    /// The host daemon's state folder
    #[arg(long, value_name = "FOLDER", default_value = "/var/lib/outrider/host")]
    pub(crate) host_state: PathBuf,
    /// The manager's state folder
    #[arg(long, value_name = "FOLDER", default_value = "/var/lib/outrider/manager")]
    pub(crate) manager_state: PathBuf,
    #[command(flatten)]
    pub(crate) connection: Connection,
}

/// What a machine is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Role {
    // Runs guests
    #[default]
    Host,
    // Runs the control manager
    Manager,
    // Runs this command only
    Operator,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    /// Every command's `--help`, exactly as people see it at 100 columns.
    #[test]
    fn help_of_every_command() {
        let mut paths = Vec::new();
        let mut command = Cli::command();
        command.build();
        collect(&command, &mut vec!["outrider".to_owned()], &mut paths);
        let text: String = paths.iter().map(|path| help(path)).collect();
        insta::assert_snapshot!("help", text);
    }

    fn collect(command: &clap::Command, path: &mut Vec<String>, paths: &mut Vec<Vec<String>>) {
        paths.push(path.clone());
        for child in command.get_subcommands() {
            path.push(child.get_name().to_owned());
            collect(child, path, paths);
            path.pop();
        }
    }

    fn help(path: &[String]) -> String {
        let words = path.iter().cloned().chain(["--help".to_owned()]);
        let shown = Cli::command().term_width(100).try_get_matches_from(words);
        let shown = shown.expect_err("clap hands out help as an error");
        assert_eq!(shown.kind(), clap::error::ErrorKind::DisplayHelp, "{path:?}: {shown}");
        format!("===== {} =====\n{shown}\n", path.join(" "))
    }
}
