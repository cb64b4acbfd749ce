//! Errors as RFC 9457 problem documents.

use axum::Json;
use axum::extract::{FromRequest, Request};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use registry::RegistryError;
use serde::de::DeserializeOwned;
use serde_json::json;
use types::{ErrorCode, Problem};

/// A problem on its way out.
#[derive(Debug)]
pub(crate) struct Failure(pub(crate) Problem);

impl From<Problem> for Failure {
    fn from(problem: Problem) -> Self {
        Self(problem)
    }
}

impl From<RegistryError> for Failure {
    fn from(error: RegistryError) -> Self {
        Self(error.into())
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let Self(problem) = self;
        let status =
            StatusCode::from_u16(problem.code.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        if status.is_server_error() {
            tracing::warn!(code = %problem.code, "{}", problem.detail);
        }
        let document = json!({
            "type": format!("urn:outrider:problem:{}", problem.code),
            "title": status.canonical_reason().unwrap_or("error"),
            "status": status.as_u16(),
            "code": problem.code, "detail": problem.detail, "hint": problem.hint,
        });
        let kind = (header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        (status, [kind], document.to_string()).into_response()
    }
}

/// A JSON body: bounded, of the right type, without unknown fields.
pub(crate) struct Body<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Failure;

    async fn from_request(request: Request, state: &S) -> Result<Self, Failure> {
        match Json::<T>::from_request(request, state).await {
            Ok(Json(value)) => Ok(Self(value)),
            Err(rejection) => Err(Failure(Problem::new(ErrorCode::BadRequest, rejection.body_text()))),
        }
    }
}
