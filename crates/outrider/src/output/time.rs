//! Durations and instants for people.

use jiff::Timestamp;

/// A duration in its natural unit: `41.2 ms`, `2.41 s`, `3 min 05 s`.
pub(crate) fn duration(ms: f64) -> String {
    if !ms.is_finite() || ms < 0.0 {
        return "?".to_owned();
    }
    if ms < 10.0 {
        format!("{ms:.2} ms")
    } else if ms < 999.5 {
        format!("{ms:.1} ms")
    } else if ms < 59_995.0 {
        format!("{:.2} s", ms / 1000.0)
    } else {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked to be positive")]
        let seconds = (ms / 1000.0).round() as u64;
        format!("{} min {:02} s", seconds / 60, seconds % 60)
    }
}

/// An RFC 3339 instant with its distance from now: `2026-11-23T14:02:11Z (12 s ago)`.
pub(crate) fn instant(text: &str, now: Timestamp) -> String {
    match text.parse::<Timestamp>() {
        Ok(at) => format!("{} ({})", seconds_only(at), distance(at, now)),
        Err(_) => super::text::clean(text),
    }
}

/// Only the distance: `12 s ago`, `in 4 s`.
pub(crate) fn relative(text: &str, now: Timestamp) -> String {
    text.parse::<Timestamp>().map_or_else(|_| super::text::clean(text), |at| distance(at, now))
}

/// An RFC 3339 instant without fractions.
pub(crate) fn to_seconds(text: &str) -> String {
    text.parse::<Timestamp>().map_or_else(|_| super::text::clean(text), seconds_only)
}

fn seconds_only(at: Timestamp) -> String {
    at.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// How far an instant is: `12 s ago`, `in 4 s`.
pub(crate) fn distance(at: Timestamp, now: Timestamp) -> String {
    let seconds = at.as_second().saturating_sub(now.as_second());
    let magnitude = seconds.unsigned_abs();
    let text = match magnitude {
        0..120 => format!("{magnitude} s"),
        120..7200 => format!("{} min", magnitude / 60),
        7200..172_800 => format!("{} h", magnitude / 3600),
        _ => format!("{} d", magnitude / 86_400),
    };
    match seconds {
        0 => "now".to_owned(),
        s if s < 0 => format!("{text} ago"),
        _ => format!("in {text}"),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn durations_read_well() {
        for (ms, text) in [
            (0.0, "0.00 ms"),
            (41.23, "41.2 ms"),
            (999.4, "999.4 ms"),
            (2410.0, "2.41 s"),
            (185_000.0, "3 min 05 s"),
            (f64::NAN, "?"),
            (-1.0, "?"),
        ] {
            assert_eq!(duration(ms), text);
        }
    }

    #[test]
    fn instants_say_how_far_they_are() {
        let now: Timestamp = "2026-11-23T14:02:11Z".parse().unwrap();
        for (at, text) in [
            ("2026-11-23T14:02:11.4Z", "now"),
            ("2026-11-23T14:01:59Z", "12 s ago"),
            ("2026-11-23T14:02:15Z", "in 4 s"),
            ("2026-11-20T14:02:15Z", "2 d ago"),
            ("\u{1b}x", "\\u{1b}x"),
        ] {
            assert_eq!(relative(at, now), text);
        }
        assert_eq!(instant("2026-11-23T14:01:59.123Z", now), "2026-11-23T14:01:59Z (12 s ago)");
    }
}
