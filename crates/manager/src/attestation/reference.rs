//! Reference values: what hosts and classes of hosts are expected to measure. Only an admin sets them.

use super::{enrolment, failed, host_id, read};
use crate::clock;
use crate::core::Manager;
use crate::http::Caller;
use crate::migration::gates;
use api::http::{AllowValue, RecordReference, ReferenceView};
use attest::verify::{AllowedDigest, Expectation, LastSeen, appraise};
use attest::{Bank, Binding, Enrolled, PcrDigest, PcrIndex, PcrSelection, Purpose, ReferenceValues};
use registry::{HostRow, ReferenceRow, Tx};
use serde_json::json;
use types::{ErrorCode, HostName, Name, Nonce, Problem};

/// Enough for a scope for each host of a large fleet.
const SCOPES_MAX: usize = 20_000;

/// The scope of one host.
pub(crate) fn host_scope(host: &HostName) -> String {
    format!("host/{host}")
}

fn class_scope(class: &Name) -> String {
    format!("class/{class}")
}

/// A scope as operators write it.
///
/// # Errors
/// `bad-request`.
pub(crate) fn scope(kind: &str, name: &str) -> Result<String, Problem> {
    let bad = |detail: String| Problem::new(ErrorCode::BadRequest, detail);
    match kind {
        "host" => Ok(host_scope(&name.parse().map_err(|e: types::id::MalformedId| bad(e.to_string()))?)),
        "class" => Ok(class_scope(&name.parse().map_err(|e: types::id::MalformedId| bad(e.to_string()))?)),
        other => Err(bad(format!("{other:?} is neither \"host\" nor \"class\""))),
    }
}

/// The row that counts for a host: its own, or that of its class.
async fn row_of(tx: &mut Tx, host: &HostName, class: Option<&Name>) -> Result<Option<ReferenceRow>, Problem> {
    if let Some(own) = tx.reference(&host_scope(host)).await? {
        return Ok(Some(own));
    }
    match class {
        Some(class) => Ok(tx.reference(&class_scope(class)).await?),
        None => Ok(None),
    }
}

/// The values that count for a host.
///
/// # Errors
/// The registry fails, or holds what can't be read.
pub(crate) async fn of_host(
    tx: &mut Tx,
    host: &HostName,
    class: Option<&Name>,
) -> Result<Option<ReferenceValues>, Problem> {
    let row = row_of(tx, host, class).await?;
    row.map(|row| read(&format!("the reference values of {}", row.scope), &row.document)).transpose()
}

/// Whose values count for a host.
///
/// # Errors
/// The registry fails.
pub(crate) async fn scope_of(
    tx: &mut Tx,
    host: &HostName,
    class: Option<&Name>,
) -> Result<Option<String>, Problem> {
    Ok(row_of(tx, host, class).await?.map(|row| row.scope))
}

fn view(row: ReferenceRow) -> Result<ReferenceView, Problem> {
    let values: ReferenceValues = read(&format!("the reference values of {}", row.scope), &row.document)?;
    Ok(ReferenceView {
        scope: row.scope,
        digest: values.digest().to_string(),
        set_at: clock::rfc3339(row.set_at_us),
        set_by: row.set_by,
        pcrs: values.selection().to_string(),
        values: None,
    })
}

/// One scope's values, in full.
///
/// # Errors
/// `bad-request`: there are none.
pub(crate) async fn show(manager: &Manager, scope: &str) -> Result<ReferenceView, Problem> {
    let row = manager.registry.read("show reference values").await?.reference(scope).await?;
    let row = row.ok_or_else(|| none(scope))?;
    let values = read(&format!("the reference values of {scope}"), &row.document)?;
    Ok(ReferenceView { values: Some(values), ..view(row)? })
}

fn none(scope: &str) -> Problem {
    let detail = format!("there are no reference values for {scope}");
    Problem::new(ErrorCode::BadRequest, detail).hint("`outrider reference list` shows all")
}

/// Every scope's values.
///
/// # Errors
/// The registry fails.
pub(crate) async fn list(manager: &Manager) -> Result<Vec<ReferenceView>, Problem> {
    let rows = manager.registry.read("list reference values").await?.references().await?;
    rows.into_iter().map(view).collect()
}

/// Sets a scope's values.
///
/// # Errors
/// `bad-request`.
pub(crate) async fn set(
    manager: &Manager,
    caller: &Caller,
    scope: &str,
    values: serde_json::Value,
) -> Result<ReferenceView, Problem> {
    let values = serde_json::from_value(values)
        .map_err(|e| Problem::new(ErrorCode::BadRequest, format!("reference values: {e}")))?;
    let mut tx = manager.begin("set reference values").await?;
    let held = store(&mut tx, caller, scope, &values, "reference.set", json!({})).await?;
    tx.commit().await?;
    Ok(held)
}

async fn store(
    tx: &mut Tx,
    caller: &Caller,
    scope: &str,
    values: &ReferenceValues,
    action: &str,
    mut detail: serde_json::Value,
) -> Result<ReferenceView, Problem> {
    let before = tx.reference(scope).await?;
    if before.is_none() && tx.references().await?.len() >= SCOPES_MAX {
        return Err(Problem::new(
            ErrorCode::LimitReached,
            format!("there are {SCOPES_MAX} reference values"),
        ));
    }
    let document =
        serde_json::to_string(values).map_err(|e| Problem::new(ErrorCode::Internal, e.to_string()))?;
    tx.set_reference(scope, &document, &caller.audit_name()).await?;
    let before: Option<ReferenceValues> = before.and_then(|row| serde_json::from_str(&row.document).ok());
    detail["digest"] = json!(values.digest());
    detail["before"] = json!(before.map(|values| values.digest()));
    tx.audit(&caller.audit_name(), action, scope, detail).await?;
    let row = tx.reference(scope).await?;
    view(row.ok_or_else(|| Problem::new(ErrorCode::Internal, "the values were not recorded"))?)
}

/// Allows one more value of one register: a planned change, registered ahead.
///
/// # Errors
/// `bad-request`: no such scope or register, a malformed value, too many of them.
pub(crate) async fn allow(
    manager: &Manager,
    caller: &Caller,
    scope: &str,
    order: AllowValue,
) -> Result<ReferenceView, Problem> {
    let bad = |detail: String| Problem::new(ErrorCode::BadRequest, detail);
    let mut tx = manager.begin("allow a value").await?;
    let row = tx.reference(scope).await?;
    let row = row.ok_or_else(|| none(scope))?;
    let values: ReferenceValues = read(&format!("the reference values of {scope}"), &row.document)?;
    let index = PcrIndex::try_from(order.pcr).map_err(|e| bad(e.to_owned()))?;
    let mut pcrs = values.pcrs().clone();
    let digest = hex::decode(&order.digest).map_err(|_| bad("the digest is not hexadecimal".to_owned()))?;
    let digest = PcrDigest::new(&digest).map_err(|e| bad(e.to_owned()))?;
    let pcr = pcrs.get_mut(&index).ok_or_else(|| {
        bad(format!("{index} is not among the registers of {scope}")).hint("set the whole document instead")
    })?;
    pcr.allowed.retain(|allowed| allowed.digest != digest);
    pcr.allowed.push(AllowedDigest {
        digest,
        note: order.note,
        not_before_unix_s: order.not_before_unix_s,
        not_after_unix_s: order.not_after_unix_s,
    });
    let values = ReferenceValues::new(values.bank(), pcrs).map_err(|e| bad(e.to_string()))?;
    let detail = json!({ "pcr": order.pcr, "allowed": order.digest });
    let held = store(&mut tx, caller, scope, &values, "reference.allow", detail).await?;
    tx.commit().await?;
    Ok(held)
}

/// Forgets a scope's values: a host falls back to its class, and without one it proves nothing any more.
///
/// # Errors
/// `bad-request`: there are none.
pub(crate) async fn remove(
    manager: &Manager,
    caller: &Caller,
    scope: &str,
) -> Result<Vec<ReferenceView>, Problem> {
    let mut tx = manager.begin("remove reference values").await?;
    if !tx.remove_reference(scope).await? {
        return Err(none(scope));
    }
    tx.audit(&caller.audit_name(), "reference.remove", scope, json!({})).await?;
    let rows = tx.references().await?;
    tx.commit().await?;
    rows.into_iter().map(view).collect()
}

/// Takes the present state of a host, which an admin trusts, as reference: of that host, or of a class.
///
/// # Errors
/// `attestation-failed`: the quote itself is not good; `bad-request`.
pub(crate) async fn record(
    manager: &Manager,
    caller: &Caller,
    host: &HostRow,
    order: RecordReference,
) -> Result<ReferenceView, Problem> {
    let name = host.name();
    let indices = enrolment::pcrs(&order.pcrs)?;
    if indices.is_empty() {
        return Err(Problem::new(ErrorCode::BadRequest, "no PCR is named"));
    }
    let row = manager.registry.read("platform").await?.platform(name).await?;
    let row = row.ok_or_else(|| failed(format!("host {name} has not proved a TPM")))?;
    let enrolled: Enrolled = read("the enrolled platform", &row.enrolled)?;
    let session = gates::live(manager, host)?;
    let binding = Binding {
        nonce: Nonce::from_bytes(clock::random()?),
        purpose: Purpose::HostCheck,
        host: host_id(manager, name)?,
        host_spki: session.key,
    };
    let selection = PcrSelection::of(Bank::Sha256, indices);
    let evidence = super::ask(&session, &binding, &selection, true).await?;
    let values = enrolment::record(&evidence)?;
    let expectation = Expectation {
        enrolled: &enrolled,
        reference: &values,
        binding: &binding,
        last_seen: LastSeen::Never,
        now_unix_s: clock::now_s(),
    };
    // Against itself: what remains is that this TPM quoted it, now.
    appraise(&expectation, &evidence).map_err(|refusal| failed(refusal.to_string()))?;
    if values.selection() != selection {
        return Err(failed(format!("host {name} quoted {}, asked was {selection}", values.selection())));
    }
    let scope = order.class.as_ref().map_or_else(|| host_scope(name), class_scope);
    let mut tx = manager.begin("record reference values").await?;
    let detail = json!({ "host": name, "evidence": evidence.digest() });
    let held = store(&mut tx, caller, &scope, &values, "reference.record", detail).await?;
    tx.commit().await?;
    Ok(held)
}
