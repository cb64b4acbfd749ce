//! `plan create`, `plan list`, `plan revoke`: maintenance.

use super::{DONE, Outcome};
use crate::args::{Format, PlanCommand};
use crate::client::Client;
use crate::output::{self, policies};
use api::http::AddPlan;
use std::time::{SystemTime, UNIX_EPOCH};

const HOUR_S: u64 = 3_600;

pub(super) async fn run(command: PlanCommand, format: Format) -> Outcome {
    match command {
        PlanCommand::Create(args) => {
            let now_s = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
            let order = AddPlan {
                host: args.host,
                targets: args.targets,
                zones: args.zones,
                not_before_unix_s: None,
                not_after_unix_s: now_s + u64::from(args.hours) * HOUR_S,
            };
            let plan = Client::new(&args.connection)?.add_plan(&order).await?;
            output::print(format, &plan, |plan, width| policies::plans(std::slice::from_ref(plan), width));
        }
        PlanCommand::List(args) => {
            let plans = Client::new(&args.connection)?.plans().await?;
            output::print(format, &plans, |plans, width| policies::plans(plans, width));
        }
        PlanCommand::Revoke(args) => {
            let plan = Client::new(&args.connection)?.revoke_plan(args.id).await?;
            output::print(format, &plan, |plan, width| policies::plans(std::slice::from_ref(plan), width));
        }
    }
    Ok(DONE)
}
