//! The invariants about journals, and the accounting of losses that no rule can make good.

use super::super::journal::{SourceFact, TargetFact};
use super::super::{Resolution, source, target};
use super::Invariant;
use super::hypervisor::Phase;
use super::plan::Fault;
use super::world::World;
use types::handover::Statement;

const OPENED: u32 = 1;
const FREEZING: u32 = 1 << 1;
const NO_VOTE: u32 = 1 << 2;
const FROZEN: u32 = 1 << 3;
const ASKED: u32 = 1 << 4;
const FREED: u32 = 1 << 5;
const KILLING: u32 = 1 << 6;
const RELEASED: u32 = 1 << 7;

const CONSUMED: u32 = 1;
const VOTED: u32 = 1 << 1;
const RUN: u32 = 1 << 2;
const RENOUNCED: u32 = 1 << 3;

pub(super) fn source_wrote(world: &mut World<'_>, m: usize, fact: &SourceFact) {
    world.migrations[m].written[0] |= match fact {
        SourceFact::Opened { .. } => OPENED,
        SourceFact::Freezing => FREEZING,
        SourceFact::NoVote { .. } | SourceFact::Declined { .. } | SourceFact::Lost => NO_VOTE,
        SourceFact::Frozen { .. } => FROZEN,
        SourceFact::Asked { .. } => ASKED,
        SourceFact::RenunciationAccepted { .. }
        | SourceFact::FenceAccepted { resolution: Resolution::Thaw } => FREED,
        SourceFact::Releasing | SourceFact::FenceAccepted { resolution: Resolution::Discard } => KILLING,
        SourceFact::Released => RELEASED,
        SourceFact::Closed => 0,
    };
}

pub(super) fn target_wrote(world: &mut World<'_>, m: usize, fact: &TargetFact) {
    world.migrations[m].written[1] |= match fact {
        TargetFact::Consumed { .. } => CONSUMED,
        TargetFact::Voted { .. } => VOTED,
        TargetFact::Run { .. } => RUN,
        TargetFact::Renounced { .. } => RENOUNCED,
        TargetFact::Prepared { .. } | TargetFact::Lost | TargetFact::Closed => 0,
    };
}

pub(super) fn source_effect(world: &mut World<'_>, m: usize, effect: &source::Effect) {
    use source::Effect as E;
    let written = world.migrations[m].written[0];
    let needs = match effect {
        E::StartMigration => OPENED,
        E::Freeze => FREEZING | FROZEN,
        E::Thaw => NO_VOTE | FREED,
        E::KillFrozenQemu(_) => KILLING,
        E::AskRenounce(_) => ASKED,
        E::Send(Statement::Frozen(_)) => FROZEN,
        E::Send(Statement::NoVote(_)) => NO_VOTE,
        E::Send(Statement::Released(_)) => RELEASED,
        E::Send(Statement::Thawed(_)) | E::Present(_) => FREED,
        _ => return,
    };
    if !world.options.check_journal {
        return;
    }
    if *effect == E::Thaw && written & FROZEN != 0 && written & FREED == 0 {
        world.violate(Invariant::HThawNeedsProof, format!("m{m}: thawed after FROZEN without a proof"));
    }
    if written & needs == 0 {
        world.violate(
            Invariant::I6JournalFirst,
            format!("m{m}: the source's journal lacks the ground of {effect:?}"),
        );
    }
}

pub(super) fn target_effect(world: &mut World<'_>, m: usize, effect: &target::Effect) {
    use target::Effect as E;
    if let E::PrepareQemu { .. } = effect {
        world.migrations[m].prepared_times += 1;
        if world.migrations[m].prepared_times > 1 {
            world.violate(Invariant::I4ConsumedOnce, format!("m{m}: its permit prepared a second QEMU"));
        }
    }
    let written = world.migrations[m].written[1];
    let needs = match effect {
        E::PrepareQemu { .. } => CONSUMED,
        E::Cont => RUN,
        E::Send(Statement::Prepared(_)) => VOTED,
        E::Send(Statement::Running(_)) => RUN,
        E::Send(Statement::Renounced(_)) => RENOUNCED,
        _ => return,
    };
    if !world.options.check_journal {
        return;
    }
    if matches!(effect, E::Send(Statement::Renounced(_)))
        && world.qemus.iter().any(|q| q.alive && q.of_target(m))
    {
        world.violate(Invariant::HSignOverDead, format!("m{m}: a renunciation is signed over a living QEMU"));
    }
    if *effect == E::Cont && !world.migrations[m].committed {
        world.violate(Invariant::I6JournalFirst, format!("m{m}: cont, and no registry ever held the commit"));
    }
    if written & needs == 0 {
        world.violate(
            Invariant::I6JournalFirst,
            format!("m{m}: the target's journal lacks the ground of {effect:?}"),
        );
    }
}

/// A copy is about to be lost. Was it the last valid one, as far as the promise goes?
pub(super) fn before_loss(world: &mut World<'_>, q: usize, with_host: bool) {
    let qemu = &world.qemus[q];
    let planned = |f: fn(&Fault) -> bool| world.plan.strikes.iter().any(|s| f(&s.fault));
    let fragile = world.manager.gone
        || planned(|f| matches!(f, Fault::LoseManager | Fault::RestoreRegistry { .. } | Fault::RefuseCont));
    let newest = world.migrations.len().wrapping_sub(1);
    let lost = match qemu.phase {
        Phase::Device(m) if m == newest => {
            let [source, target] = world.migrations[m].written;
            let copy = world.qemus.iter().find(|c| c.alive && c.of_target(m) && c.host != qemu.host);
            let runs = copy.is_some_and(|c| c.executed);
            let held = copy.is_some() && target & VOTED != 0 && target & RENOUNCED == 0;
            let decided = world.both_votes_on_record(m) && source & ASKED == 0;
            !(runs || held && decided && !fragile)
        }
        Phase::Incoming(m, _) | Phase::Loaded(m) if m == newest => {
            let target = world.migrations[m].written[1];
            let survives = world.qemus.iter().any(|c| {
                c.alive
                    && c.host != qemu.host
                    && matches!(
                        c.phase,
                        Phase::Plain | Phase::Active(_) | Phase::Device(_) | Phase::Loaded(_)
                    )
            });
            target & RUN != 0 || !survives || with_host && fragile
        }
        // An ordinary VM, or one whose memory still moves: it crashed, as VMs do.
        _ => qemu.vcpus || matches!(qemu.phase, Phase::Device(_)),
    };
    world.lost |= lost;
    world.note(|| format!("q{q} is lost: the VM is lost with it: {lost}"));
}

/// A target daemon dies with RUN journalled, and its QEMU is dead already or refuses `cont` sooner or later: its next
/// life can't know that nothing ran (H9), and only the operator can go on.
pub(super) fn before_crash(world: &mut World<'_>, host: usize) {
    let refuses = world.plan.strikes.iter().any(|s| s.fault == Fault::RefuseCont);
    let Some((m, newest)) = world.migrations.iter().enumerate().next_back() else { return };
    let started = newest.to == host && newest.written[1] & RUN != 0 && newest.written[1] & RENOUNCED == 0;
    let dead = !world.qemus.iter().any(|q| q.alive && q.of_target(m));
    world.lost |= started && (refuses || dead);
}
