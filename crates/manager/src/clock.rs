//! Time and randomness: the two things that no pure room may reach for.

use std::time::{SystemTime, UNIX_EPOCH};
use types::{ErrorCode, Problem};

/// Microseconds since the Unix epoch.
pub(crate) fn now_us() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_micros()).unwrap_or(i64::MAX)
}

/// Seconds since the Unix epoch.
pub(crate) fn now_s() -> u64 {
    u64::try_from(now_us() / 1_000_000).unwrap_or(0)
}

/// RFC 3339 of microseconds since the Unix epoch.
pub(crate) fn rfc3339(us: i64) -> String {
    jiff::Timestamp::from_microsecond(us).map_or_else(|_| us.to_string(), |t| t.to_string())
}

/// Milliseconds between two times.
#[allow(clippy::cast_precision_loss)]
pub(crate) fn between_ms(from_us: i64, to_us: i64) -> f64 {
    // Durations of migrations are far below 2^53 microseconds.
    (to_us.saturating_sub(from_us)) as f64 / 1000.0
}

/// Bytes from the system's random number generator.
pub(crate) fn random<const N: usize>() -> Result<[u8; N], Problem> {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes)
        .map_err(|_| Problem::new(ErrorCode::Internal, "the system gives no random numbers"))?;
    Ok(bytes)
}
