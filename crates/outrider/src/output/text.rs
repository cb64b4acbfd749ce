//! Texts from elsewhere are shown, never obeyed: a terminal must not run what a peer put into a name.

use anstyle::{AnsiColor, Style};
use types::migration::MigrationState;

/// The text without anything that a terminal would act on or that would reorder what a reader sees.
pub(crate) fn clean(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if is_unsafe(c) { out.extend(c.escape_unicode()) } else { out.push(c) }
    }
    out
}

fn is_unsafe(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

/// The first `limit` characters, with a sign that there was more.
pub(crate) fn cut(text: &str, limit: usize) -> String {
    if text.chars().count() <= limit {
        return text.to_owned();
    }
    let mut out: String = text.chars().take(limit.saturating_sub(1)).collect();
    out.push('…');
    out
}

/// Good, attention, bad: the only three colours, never the only sign.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tone {
    /// As it should be.
    Good,
    /// Worth a look.
    Attention,
    /// Not as it should be.
    Bad,
    /// Neither.
    Plain,
}

/// The text in its tone. `anstream` removes it where there is no terminal.
pub(crate) fn toned(tone: Tone, text: &str) -> String {
    let color = match tone {
        Tone::Good => AnsiColor::Green,
        Tone::Attention => AnsiColor::Yellow,
        Tone::Bad => AnsiColor::Red,
        Tone::Plain => return text.to_owned(),
    };
    paint(Style::new().fg_color(Some(color.into())), text)
}

/// The text in bold.
pub(crate) fn bold(text: &str) -> String {
    paint(Style::new().bold(), text)
}

fn paint(style: Style, text: &str) -> String {
    format!("{style}{text}{style:#}")
}

/// How a state is to be read.
pub(crate) const fn tone_of(state: MigrationState) -> Tone {
    match state {
        MigrationState::Completed => Tone::Good,
        MigrationState::Refused
        | MigrationState::Failed
        | MigrationState::Terminated
        | MigrationState::NeedsOperator => Tone::Bad,
        MigrationState::Aborting => Tone::Attention,
        MigrationState::Requested
        | MigrationState::Deciding
        | MigrationState::Setup
        | MigrationState::MemoryTransfer
        | MigrationState::Switchover
        | MigrationState::Committed
        | MigrationState::NetworkCleanup => Tone::Plain,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_terminal_acts_on_survives() {
        assert_eq!(clean("host-a \u{1b}[2J\r\nx\u{202e}é"), "host-a \\u{1b}[2J\\u{d}\\u{a}x\\u{202e}é");
        assert_eq!(cut("abcdef", 4), "abc…");
        assert_eq!(cut("abcd", 4), "abcd");
    }
}
