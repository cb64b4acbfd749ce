//! The way to the manager: address, certificate, health, token, clock; or the room for one on this machine.

use super::Check;
use crate::args::{Doctor, Role};
use crate::client::{Client, ClientError, Health};
use crate::output::time::duration;
use jiff::Timestamp;
use std::net::{Ipv4Addr, TcpListener};

/// Operators' and hosts' ports of the manager.
const MANAGER_PORTS: [u16; 2] = [7443, 7444];
/// A request whose time stamp is farther from the manager's clock is refused.
const SKEW_FAIL_MS: i64 = 30_000;
/// The `Date` header has whole seconds and travels: less than this is agreement.
const SKEW_WARN_MS: i64 = 3_000;

/// Checks of the way to the manager.
pub(super) async fn checks(args: &Doctor) -> Vec<Check> {
    let client = match Client::anonymous(&args.connection) {
        Ok(client) => client,
        Err(error) => return unconfigured(args, &error),
    };
    let health = client.health("/healthz").await;
    let mut checks = Vec::new();
    if args.role == Role::Manager {
        checks.extend(ports(health.is_ok()));
    }
    match health {
        Ok(health) => {
            checks.push(reached(&client, &health));
            checks.push(ready(&client).await);
            checks.push(clock(&health));
            checks.push(token(args).await);
        }
        Err(error) if args.role == Role::Manager => {
            checks.push(Check::ok("manager", format!("not running yet ({})", error.problem().code)))
        }
        Err(error) => checks.push(failed("manager", &error)),
    }
    checks
}

/// Without a CA certificate nothing can be tried: normal before the first run, and on a host, which has its own.
fn unconfigured(args: &Doctor, error: &ClientError) -> Vec<Check> {
    match args.role {
        Role::Manager => {
            let mut checks = ports(false);
            checks.push(Check::ok("manager", "never ran here yet; its first run makes the CA"));
            checks
        }
        Role::Host => vec![Check::warn(
            "manager",
            format!("not tried: {error}"),
            "name the CA certificate with --ca to try the operators' interface from here",
        )],
        Role::Operator => vec![failed("manager", error)],
    }
}

fn failed(check: &'static str, error: &ClientError) -> Check {
    let problem = error.problem();
    Check::fail(check, problem.detail, problem.hint.unwrap_or_else(|| "see the manager's log".to_owned()))
}

fn ports(manager_runs: bool) -> Vec<Check> {
    if manager_runs {
        return Vec::new();
    }
    let port = |port: u16| match TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)) {
        Ok(_) => Check::ok("port", format!("{port} is free")),
        Err(error) => Check::fail(
            "port",
            format!("{port}: {error}"),
            format!("see who listens with: ss -ltnp 'sport = :{port}'"),
        ),
    };
    MANAGER_PORTS.into_iter().map(port).collect()
}

fn reached(client: &Client, health: &Health) -> Check {
    let url = &client.endpoint().url;
    if health.status == 200 {
        Check::ok("manager", format!("{url} answers, and its certificate is good"))
    } else {
        Check::fail(
            "manager",
            format!("{url}/healthz answers {}: {}", health.status, health.text),
            "see its log",
        )
    }
}

async fn ready(client: &Client) -> Check {
    match client.health("/readyz").await {
        Ok(health) if health.status == 200 => Check::ok("ready", "the manager takes requests"),
        Ok(health) => Check::fail(
            "ready",
            format!("the manager is not ready ({}): {}", health.status, health.text),
            "is its disk full or read-only? see its log",
        ),
        Err(error) => failed("ready", &error),
    }
}

fn clock(health: &Health) -> Check {
    let theirs = health.date.as_deref().and_then(parse_date);
    match theirs {
        Some(theirs) => judge_clock(Timestamp::now(), theirs),
        None => Check::warn("clock", "the manager does not say its time", "compare the clocks by hand"),
    }
}

fn parse_date(text: &str) -> Option<Timestamp> {
    jiff::fmt::rfc2822::parse(text).ok().map(|at| at.timestamp())
}

fn judge_clock(ours: Timestamp, theirs: Timestamp) -> Check {
    const ADVICE: &str = "run NTP on both machines (chrony, systemd-timesyncd)";
    let skew_ms = ours.as_millisecond().saturating_sub(theirs.as_millisecond()).saturating_abs();
    #[expect(clippy::cast_precision_loss, reason = "shown with three digits")]
    let found = format!("{} from the manager's clock", duration(skew_ms as f64));
    if skew_ms >= SKEW_FAIL_MS {
        Check::fail("clock", format!("{found}: requests will be refused as stale"), ADVICE)
    } else if skew_ms >= SKEW_WARN_MS {
        Check::warn("clock", found, ADVICE)
    } else {
        Check::ok("clock", "agrees with the manager's to the second")
    }
}

/// Only operators need a token; elsewhere its absence is a remark.
async fn token(args: &Doctor) -> Check {
    let asked = match Client::new(&args.connection) {
        Ok(client) => client.hosts().await,
        Err(error) => Err(error),
    };
    match asked {
        Ok(hosts) => Check::ok("token", format!("accepted; {} hosts are enrolled", hosts.len())),
        Err(error @ ClientError::NoToken { .. }) if args.role != Role::Operator => {
            Check::ok("token", format!("not tried: {error}"))
        }
        Err(error) => failed("token", &error),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::Status;
    use super::*;

    #[test]
    fn the_clock_is_judged_by_what_the_manager_tolerates() {
        let theirs = parse_date("Mon, 23 Nov 2026 14:13:00 GMT").unwrap();
        for (ours, status) in [
            ("2026-11-23T14:13:00.9Z", Status::Ok),
            ("2026-11-23T14:12:50Z", Status::Warn),
            ("2026-11-23T14:14:00Z", Status::Fail),
        ] {
            assert_eq!(judge_clock(ours.parse().unwrap(), theirs).status, status, "{ours}");
        }
    }
}
