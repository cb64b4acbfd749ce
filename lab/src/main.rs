//! `outrider-lab`: the lab's commands. Not packaged; `outrider lab` starts it where it is there.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use outrider_lab::client::{self, Client};
use outrider_lab::inspection::{differential, migrations};
use outrider_lab::net::{self, Machine, Net};
use outrider_lab::{bench, demo, guest};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// Namespaces, a real guest, an outside observer.
#[derive(Debug, Parser)]
#[command(name = "outrider-lab", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Live-migrate a real guest with everything switched on, and check every claim.
    Demo {
        /// Options of the demo.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Compare with plain QEMU.
    Bench {
        /// Options of the benchmark.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Pack the guest image (`cargo xtask setup` calls this).
    Guest {
        /// Folder with the unpacked kernel and busybox packages.
        #[arg(long)]
        unpacked: PathBuf,
        /// The static guest daemon.
        #[arg(long)]
        daemon: PathBuf,
        /// Where the image goes.
        #[arg(long)]
        out: PathBuf,
    },
    /// Migrate real VMs of random shapes through the inspector: none may be refused.
    InspectMigrations {
        /// Options of the runs.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Give mutated streams to the inspector and to stock QEMU: what the one accepts, the other must complete.
    Differential {
        /// Options of the runs.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Lay the namespaces and keep them until Ctrl-C.
    Up,
    /// Remove what dead runs left behind.
    Down,
    /// Talk to the guest until Ctrl-C, then print what it was like.
    Client {
        /// Address and port of the guest daemon.
        #[arg(long, default_value_t = client::guest_address())]
        address: SocketAddr,
    },
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(code) => code,
        Err(error) => {
            net::yield_to_signal();
            eprintln!("outrider-lab: {error:#}");
            ExitCode::from(4)
        }
    }
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        Command::Demo { arguments } => demo::run(&arguments),
        Command::Bench { arguments } => bench::run(&arguments),
        Command::Guest { unpacked, daemon, out } => {
            guest::make(&unpacked, &daemon, &out).map(|_| ExitCode::SUCCESS)
        }
        Command::InspectMigrations { arguments } => migrations::run(&arguments),
        Command::Differential { arguments } => differential::run(&arguments),
        Command::Up => up(),
        Command::Down => down(),
        Command::Client { address } => talk(address),
    }
}

fn up() -> Result<ExitCode> {
    let net = Net::up()?;
    for machine in Machine::ALL {
        println!("{}\tip netns exec {} …", machine.name(), net.node(machine).namespace());
    }
    println!("Ctrl-C removes everything.");
    // The signal that ends this also tears the net down.
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

fn down() -> Result<ExitCode> {
    for prefix in net::stale_prefixes() {
        println!("removing what {prefix} left");
        net::destroy(&prefix)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn talk(address: SocketAddr) -> Result<ExitCode> {
    let mut signals = Signals::new([SIGINT, SIGTERM]).context("catching signals")?;
    let client = Client::start_here(address)?;
    signals.forever().next();
    let summary = client.finish();
    println!("{}", serde_json::to_string(&summary).context("writing the summary")?);
    Ok(ExitCode::from(u8::from(!summary.connection_survived)))
}
