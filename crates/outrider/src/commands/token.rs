//! `token add`, `token list`, `token revoke`.

use super::{DONE, Outcome};
use crate::args::{Format, TokenCommand};
use crate::client::Client;
use crate::output::{self, lists};
use api::http::{AddToken, TokenAdded};

pub(super) async fn run(command: TokenCommand, format: Format) -> Outcome {
    match command {
        TokenCommand::Add(args) => {
            let tenants = (!args.tenants.is_empty()).then_some(args.tenants);
            let order = AddToken { name: args.name, role: args.role, expires_in_days: args.days, tenants };
            let added = Client::new(&args.connection)?.add_token(&order).await?;
            output::print(format, &added, |added, _| added_text(added));
        }
        TokenCommand::List(args) => {
            let tokens = Client::new(&args.connection)?.tokens().await?;
            output::print(format, &tokens, |tokens, width| lists::tokens(tokens, width));
        }
        TokenCommand::Revoke(args) => {
            let left = Client::new(&args.connection)?.revoke_token(&args.name).await?;
            output::print(format, &left, |left, width| lists::tokens(left, width));
        }
    }
    Ok(DONE)
}

/// The token is the point, alone on its line so that it can be copied whole.
fn added_text(added: &TokenAdded) -> String {
    let view = &added.token_view;
    let may = match added.may.is_empty() {
        true => "nothing on the fleet by the manager's policies; check the role".to_owned(),
        false => added.may.join(", "),
    };
    format!(
        "{} ({}) may: {may}. Each migration is judged by itself.\nThe token is good until {} and is not shown again:\n\n  {}\n\n\
         Put it into a file that only its owner can read, and name that file in OUTRIDER_TOKEN_FILE.\n",
        output::text::clean(&view.name),
        output::text::clean(&view.role),
        view.expires_at.as_deref().map_or_else(|| "it is revoked".to_owned(), output::text::clean),
        output::text::clean(&added.token),
    )
}
