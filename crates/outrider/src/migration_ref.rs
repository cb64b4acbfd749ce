//! How people name a migration: its id, a unique prefix of it, or the VM that it moves.

use types::MigrationId;
use types::migration::MigrationView;

/// Why a text names no migration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RefError {
    /// None matches.
    #[error("no migration is called {text:?}: it is no id, no prefix of one, and no VM with {wanted}")]
    Unknown {
        /// What was typed.
        text: String,
        /// What a VM's name would have meant.
        wanted: &'static str,
    },
    /// Several match.
    #[error("{text:?} may mean {}", list(candidates))]
    Ambiguous {
        /// What was typed.
        text: String,
        /// Some of them.
        candidates: Vec<MigrationId>,
    },
}

fn list(ids: &[MigrationId]) -> String {
    ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or ")
}

/// Which migration of a VM its name means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum VmMeans {
    /// The open one: for acts.
    Open,
    /// The open one, else the last: for looking.
    OpenOrLast,
}

/// The migration that `text` names among `known`.
pub(crate) fn resolve(text: &str, known: &[MigrationView], vm: VmMeans) -> Result<MigrationId, RefError> {
    let mut candidates: Vec<MigrationId> =
        known.iter().map(|m| m.id).filter(|id| is_prefix(text, *id)).collect();
    candidates.extend(of_vm(text, known, vm));
    candidates.sort_unstable();
    candidates.dedup();
    match candidates.as_slice() {
        [id] => Ok(*id),
        [] => Err(RefError::Unknown {
            text: text.chars().take(80).collect(),
            wanted: match vm {
                VmMeans::Open => "an open migration",
                VmMeans::OpenOrLast => "a migration",
            },
        }),
        many => Err(RefError::Ambiguous {
            text: text.chars().take(80).collect(),
            candidates: many.iter().copied().take(4).collect(),
        }),
    }
}

/// `m-12ab…` or `12ab…`; three digits at least, so that a short VM name is no prefix by accident.
fn is_prefix(text: &str, id: MigrationId) -> bool {
    let digits = text.strip_prefix("m-").unwrap_or(text);
    digits.len() >= 3 && id.to_string()["m-".len()..].starts_with(digits)
}

fn of_vm(text: &str, known: &[MigrationView], means: VmMeans) -> Option<MigrationId> {
    let of_vm = || known.iter().filter(|m| m.vm.as_str() == text);
    let open = of_vm().find(|m| !m.state.is_final());
    let last = || of_vm().max_by(|a, b| a.requested_at.cmp(&b.requested_at));
    match means {
        VmMeans::Open => open.map(|m| m.id),
        VmMeans::OpenOrLast => open.or_else(last).map(|m| m.id),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::output::samples::view;
    use types::migration::MigrationState;

    fn known() -> Vec<MigrationView> {
        let mut done = view(0xa1, "web", MigrationState::Completed);
        done.requested_at = "2026-11-23T10:00:00Z".to_owned();
        let mut failed = view(0xa2, "web", MigrationState::Failed);
        failed.requested_at = "2026-11-23T11:00:00Z".to_owned();
        vec![
            done,
            failed,
            view(0xb1, "db", MigrationState::MemoryTransfer),
            view(0xc1, "b1b", MigrationState::Setup),
        ]
    }

    fn check(text: &str, means: VmMeans, expect: Result<u8, &str>) {
        let got = resolve(text, &known(), means);
        match (got, expect) {
            (Ok(id), Ok(byte)) => assert_eq!(id, MigrationId::from_bytes([byte; 16]), "{text}"),
            (Err(error), Err(part)) => assert!(error.to_string().contains(part), "{text}: {error}"),
            (got, _) => panic!("{text}: {got:?}"),
        }
    }

    #[test]
    fn a_migration_is_named_by_id_prefix_or_vm() {
        use VmMeans::{Open, OpenOrLast};
        let whole = MigrationId::from_bytes([0xa1; 16]).to_string();
        check(&whole, Open, Ok(0xa1));
        check("m-a2a", Open, Ok(0xa2));
        check("a1a1", Open, Ok(0xa1));
        check("db", Open, Ok(0xb1));
        check("web", Open, Err("no VM with an open migration"));
        check("web", OpenOrLast, Ok(0xa2));
        check("b1b", Open, Err("may mean"));
        check("a1", Open, Err("no migration"));
        check("", OpenOrLast, Err("no migration"));
        check("m-", OpenOrLast, Err("no migration"));
    }
}
