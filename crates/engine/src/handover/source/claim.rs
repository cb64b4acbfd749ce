//! Who may touch the VM's QEMU.

use super::super::target::Target;
use super::Source;

/// The right to start an attempt on the VM's QEMU: no earlier attempt will touch that QEMU any more. Without it a
/// late abort of the attempt before thaws what this one has frozen.
#[derive(Debug)]
pub struct Claim(());

impl Claim {
    /// From every machine of this VM on this host. `None`: one still has something to do to its QEMU; decline, and
    /// the manager asks again.
    pub fn new<'a>(
        sources: impl IntoIterator<Item = &'a Source>,
        targets: impl IntoIterator<Item = &'a Target>,
    ) -> Option<Self> {
        let free = sources.into_iter().all(Source::has_let_go) && targets.into_iter().all(Target::has_let_go);
        free.then_some(Self(()))
    }
}
