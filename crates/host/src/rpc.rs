//! The manager's gRPC service over a connection of `link`, and its refusals as problems.

use api::fleet::fleet_client::FleetClient;
use api::fleet::{self};
use hyper_util::rt::TokioIo;
use link::control::{LinkError, TlsConn};
use std::sync::Mutex;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};
use types::{ErrorCode, Problem};

/// Sits on a connection that stands already.
///
/// # Errors
/// The other end does not speak HTTP/2.
pub(crate) async fn client(connection: TlsConn) -> Result<FleetClient<Channel>, Problem> {
    // The connector is called once; there is no second connection to hand out.
    let once = Mutex::new(Some(connection));
    let connector = tower::service_fn(move |_| {
        let connection = once.lock().ok().and_then(|mut held| held.take());
        async move { connection.map(TokioIo::new).ok_or_else(|| std::io::Error::other("the connection was used")) }
    });
    let channel = Endpoint::from_static("http://manager.invalid")
        .connect_with_connector(connector)
        .await
        .map_err(|e| Problem::new(ErrorCode::ManagerUnreachable, crate::error::chain(&e)))?;
    Ok(FleetClient::new(channel))
}

/// A connection that did not come about.
#[must_use]
pub(crate) fn link_problem(error: &LinkError) -> Problem {
    Problem::new(error.error_code(), crate::error::chain(error))
}

/// A refusal: its message starts with the public code.
#[must_use]
pub(crate) fn status_problem(status: &Status) -> Problem {
    if let Some((code, detail)) = status.message().split_once(": ")
        && let Ok(code) = code.parse::<ErrorCode>()
    {
        return Problem::new(code, detail);
    }
    let code = match status.code() {
        Code::Unauthenticated => ErrorCode::Unauthenticated,
        Code::PermissionDenied => ErrorCode::Forbidden,
        _ => ErrorCode::ManagerUnreachable,
    };
    Problem::new(code, status.message().to_owned())
}

/// The network interfaces of this host's network namespace.
///
/// # Errors
/// `ip` is missing or says what can't be read.
pub(crate) async fn interfaces() -> Result<Vec<fleet::Interface>, Problem> {
    // /sys/class/net may show another namespace than the one that this process is in; netlink never does.
    let output = tokio::process::Command::new("ip")
        .args(["-j", "address", "show"])
        .stdin(std::process::Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .map_err(|e| Problem::new(ErrorCode::MissingProgram, format!("cannot run ip: {e}")))?;
    let parsed: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout)
        .map_err(|e| Problem::new(ErrorCode::Internal, format!("`ip -j address show`: {e}")))?;
    Ok(parsed.iter().map(interface).collect())
}

fn interface(value: &serde_json::Value) -> fleet::Interface {
    let text = |v: &serde_json::Value| v.as_str().unwrap_or_default().to_owned();
    let addresses = value["addr_info"].as_array().map(Vec::as_slice).unwrap_or_default();
    fleet::Interface {
        name: text(&value["ifname"]),
        mac: text(&value["address"]),
        addresses: addresses.iter().map(|a| text(&a["local"])).filter(|a| !a.is_empty()).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_keep_their_code() {
        let problem = status_problem(&Status::unauthenticated("unauthenticated: the token was used before"));
        assert_eq!(problem.code, ErrorCode::Unauthenticated);
        assert_eq!(problem.detail, "the token was used before");
        let problem = status_problem(&Status::unavailable("tcp connect error"));
        assert_eq!(problem.code, ErrorCode::ManagerUnreachable);
    }

    #[tokio::test]
    async fn the_loopback_is_there() {
        let all = interfaces().await.expect("ip is installed");
        let loopback = all.iter().find(|i| i.name == "lo").expect("every namespace has one");
        assert!(loopback.addresses.iter().any(|a| a == "127.0.0.1") || loopback.addresses.is_empty());
    }
}
