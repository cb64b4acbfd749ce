//! `manager run`, `host run`, `host join`.

use super::Outcome;
use crate::args::{Format, HostJoin, HostRun, ManagerRun};
use crate::error::Error;
use types::{ErrorCode, Problem};

fn not_built_in() -> Outcome {
    Err(Error::Daemon(Problem::new(ErrorCode::Internal, "this build of outrider contains no daemons yet")))
}

pub(super) fn run_manager(_args: &ManagerRun) -> Outcome {
    not_built_in()
}

pub(super) fn run_host(_args: &HostRun) -> Outcome {
    not_built_in()
}

pub(super) fn join(_args: &HostJoin, _format: Format) -> Outcome {
    not_built_in()
}
