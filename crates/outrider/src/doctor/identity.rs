//! Whether this host has joined, and how long its certificate is good.

use super::Check;
use crate::output::time::distance;
use host::identity::IdentityFolder;
use jiff::Timestamp;
use link::identity::TlsIdentity;
use std::path::Path;
use std::time::{Duration, SystemTime};

/// A certificate lives a day and is renewed at half its life: less than this means that renewal does not work.
const LEFT_WARN: Duration = Duration::from_secs(6 * 3600);

/// The host's identity in its state folder.
pub(super) fn check(state: &Path, now: SystemTime) -> Check {
    if !IdentityFolder::new(state).is_joined() {
        return Check::warn(
            "identity",
            "this host has not joined",
            "run `outrider host join` with the token that `outrider host add` prints",
        );
    }
    // Read here, not by the daemon's own loader, which makes what is missing: a check changes nothing.
    let read = |name: &str| std::fs::read_to_string(state.join("identity").join(name));
    let identity = read("chain.pem").and_then(|chain| Ok((chain, read("key.pem")?)));
    let identity = identity.map_err(|e| e.to_string()).and_then(|(chain, key)| {
        TlsIdentity::from_pem(&chain, &key).map_err(|e| crate::error::chain(&e).join(": "))
    });
    match identity {
        Ok(tls) => judge(tls.identity().name.as_str(), tls.not_after(), now),
        Err(why) => {
            Check::fail("identity", format!("it cannot be used: {why}"), "join again with a new token")
        }
    }
}

fn judge(name: &str, not_after: SystemTime, now: SystemTime) -> Check {
    let left = not_after.duration_since(now).unwrap_or_default();
    let (Ok(end), Ok(at)) = (Timestamp::try_from(not_after), Timestamp::try_from(now)) else {
        return Check::fail("identity", format!("{name}: the certificate's end is no date"), "join again");
    };
    let found = format!("joined as {name}; its certificate ends {}", distance(end, at));
    if left.is_zero() {
        Check::fail("identity", found, "join again with a new token")
    } else if left < LEFT_WARN {
        Check::warn("identity", found, "it should have been renewed: is the daemon connected to the manager?")
    } else {
        Check::ok("identity", found)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::Status;
    use super::*;

    #[test]
    fn a_certificate_is_judged_by_what_is_left_of_it() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let hours = |h: u64| Duration::from_secs(h * 3600);
        assert_eq!(judge("a", now + hours(20), now).status, Status::Ok);
        assert_eq!(judge("a", now + hours(2), now).status, Status::Warn);
        assert_eq!(judge("a", now, now).status, Status::Fail);
        let past = judge("a", now - hours(3), now);
        assert_eq!(
            (past.status, past.found.as_str()),
            (Status::Fail, "joined as a; its certificate ends 3 h ago")
        );
    }

    #[test]
    fn a_host_that_has_not_joined_or_is_damaged_is_told_so() {
        let state = tempfile::tempdir().unwrap();
        assert_eq!(check(state.path(), SystemTime::now()).status, Status::Warn);
        std::fs::create_dir(state.path().join("identity")).unwrap();
        std::fs::write(state.path().join("identity/host.json"), "{").unwrap();
        assert_eq!(check(state.path(), SystemTime::now()).status, Status::Fail);
    }
}
