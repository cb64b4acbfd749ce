//! The VM as a whole, and the balloon that lends its memory.

use crate::inspect::devices::rule::Expect::{AtMost, Check};
use crate::inspect::devices::rule::{Breach, Fields, ValueRule};

/// The rules on the run state and the balloon.
pub const RULES: &[ValueRule] = &[
    // The run state's name and its length; what the target does next depends on it.
    ValueRule::state("globalstate", "size", AtMost(100)),
    ValueRule::state("globalstate", "runstate", Check(known_run_state)),
    ValueRule::state("globalstate", "has_vm_was_suspended", AtMost(1)),
    ValueRule::state("globalstate", "vm_was_suspended", AtMost(1)),
    // Stopped, asked for, started, done.
    ValueRule::state("virtio-balloon-device/free-page-report", "free_page_hint_status", AtMost(3)),
];

/// The states that a VM can be in when its migration starts. Others (another migration's, replication's, a debugger's)
/// are never sent by an honest source, or lead the target into a role that nobody permitted.
const RUN_STATES: &[&[u8]] = &[
    b"running",
    b"paused",
    b"prelaunch",
    b"suspended",
    b"io-error",
    b"watchdog",
    b"guest-panicked",
    b"internal-error",
    b"shutdown",
];

fn known_run_state(fields: &Fields<'_, '_>) -> Result<(), Breach> {
    let text = fields.bytes("runstate").unwrap_or_default();
    let Some(end) = text.iter().position(|byte| *byte == 0) else {
        return Err(Breach::by_number("a run state that ends in its field", "none"));
    };
    // What is behind the name says nothing: QEMU leaves rests of longer names there, and newer ones put flags of theirs
    // into it that older ones read as padding.
    let name = text.get(..end).unwrap_or_default();
    if !RUN_STATES.contains(&name) {
        let shown = &name[..name.len().min(24)];
        return Err(Breach::by_number("a run state of a VM that is being moved", shown.escape_ascii()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(text: &[u8]) -> bool {
        known_run_state(&Fields { fields: &[("runstate", text)] }).is_ok()
    }

    #[test]
    fn a_known_name_and_whatever_is_behind_it() {
        assert!(judge(b"running\0\0\0"));
        assert!(judge(b"io-error\0"));
        assert!(!judge(b"running"));
        assert!(judge(b"paused\0ch\0"));
        assert!(!judge(b"runnin\0"));
        assert!(!judge(b"colo\0"));
        assert!(!judge(b"inmigrate\0"));
        assert!(!judge(b"\0"));
        assert!(known_run_state(&Fields { fields: &[] }).is_err());
    }
}
