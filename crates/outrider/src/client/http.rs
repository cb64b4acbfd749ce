//! HTTP/1.1 over the operators' TLS stream of `link`: one connection per request, everything bounded.

use super::settings::{Token, read_ca};
use super::sse::{Parser, SseEvent};
use super::{CONNECT_LIMIT, ClientError, Endpoint, MAX_ANSWER_BYTES, REQUEST_LIMIT};
use crate::args::Connection;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use link::ca::CaCertificate;
use link::control::connect_operator;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::VecDeque;
use std::time::Duration;
use types::{ErrorCode, Problem};

type Boxed = Box<dyn std::error::Error + Send + Sync>;

/// Asks the manager.
#[derive(Debug)]
pub(crate) struct Client {
    endpoint: Endpoint,
    ca: CaCertificate,
    token: Option<Token>,
}

/// What `/healthz` and `/readyz` say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Health {
    /// HTTP status.
    pub(crate) status: u16,
    /// What it says.
    pub(crate) text: String,
    /// Its clock, from the `Date` header, to the second.
    pub(crate) date: Option<String>,
}

impl Client {
    /// With the operator's token.
    pub(crate) fn new(connection: &Connection) -> Result<Self, ClientError> {
        let mut client = Self::anonymous(connection)?;
        client.token = Some(Token::read(connection)?);
        Ok(client)
    }

    /// Without a token: good for health only.
    pub(crate) fn anonymous(connection: &Connection) -> Result<Self, ClientError> {
        let endpoint = Endpoint::parse(&connection.manager_url)?;
        Ok(Self { endpoint, ca: read_ca(connection)?, token: None })
    }

    /// Where the manager is.
    pub(crate) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// `GET`, answered with a JSON document.
    pub(super) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.get_within(path, REQUEST_LIMIT).await
    }

    /// `GET` of what takes the manager longer.
    pub(super) async fn get_within<T: DeserializeOwned>(
        &self,
        path: &str,
        limit: Duration,
    ) -> Result<T, ClientError> {
        self.ask(Method::GET, path, Bytes::new(), limit).await
    }

    /// `POST` of a JSON document, answered with one.
    pub(super) async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &(impl Serialize + Sync),
        limit: Duration,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(|error| ClientError::BadAnswer {
            request: format!("POST {path}"),
            reason: format!("the request does not serialise: {error}"),
        })?;
        self.ask(Method::POST, path, body.into(), limit).await
    }

    /// `POST` without a body.
    pub(super) async fn post_empty<T: DeserializeOwned>(
        &self,
        path: &str,
        limit: Duration,
    ) -> Result<T, ClientError> {
        self.ask(Method::POST, path, Bytes::new(), limit).await
    }

    /// `/healthz` or `/readyz`.
    pub(crate) async fn health(&self, path: &str) -> Result<Health, ClientError> {
        within(REQUEST_LIMIT, "answer", &self.endpoint.url, async {
            let response = self.send(Method::GET, path, Bytes::new(), "*/*").await?;
            let status = response.status().as_u16();
            let date =
                response.headers().get(hyper::header::DATE).and_then(|d| d.to_str().ok()).map(str::to_owned);
            let text = self.body(response).await?;
            Ok(Health { status, text: String::from_utf8_lossy(&text).trim().to_owned(), date })
        })
        .await
    }

    /// Opens a stream of events.
    pub(super) async fn events(&self, path: &str) -> Result<EventStream, ClientError> {
        let response = within(REQUEST_LIMIT, "answer", &self.endpoint.url, async {
            let response = self.send(Method::GET, path, Bytes::new(), "text/event-stream").await?;
            if response.status() != StatusCode::OK {
                let status = response.status();
                return Err(problem_of(status, &self.body(response).await?));
            }
            Ok(response)
        })
        .await?;
        Ok(EventStream {
            body: response.into_body(),
            parser: Parser::default(),
            ready: VecDeque::new(),
            url: self.endpoint.url.clone(),
        })
    }

    async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        limit: Duration,
    ) -> Result<T, ClientError> {
        let request = format!("{method} {path}");
        let (status, answer) = within(limit, "answer", &self.endpoint.url, async {
            let response = self.send(method, path, body, "application/json").await?;
            Ok((response.status(), self.body(response).await?))
        })
        .await?;
        if !status.is_success() {
            return Err(problem_of(status, &answer));
        }
        // A success without a document is the document `null`.
        let answer = if answer.is_empty() { Bytes::from_static(b"null") } else { answer };
        serde_json::from_slice(&answer)
            .map_err(|error| ClientError::BadAnswer { request, reason: error.to_string() })
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        accept: &str,
    ) -> Result<Response<Incoming>, ClientError> {
        let url = &self.endpoint.url;
        let stream = within(CONNECT_LIMIT, "accept a connection", url, async {
            let connected = connect_operator(&self.endpoint.authority(), &self.ca).await;
            connected.map_err(|source| ClientError::NotConnected { url: url.clone(), source: source.into() })
        })
        .await?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|e| self.broken(e))?;
        // Ends by itself: with the answer, or when the sender is dropped.
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "the connection to the manager ended");
            }
        });
        let request = self.request(method, path, body, accept)?;
        sender.send_request(request).await.map_err(|e| self.broken(e))
    }

    fn request(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
        accept: &str,
    ) -> Result<Request<Full<Bytes>>, ClientError> {
        let mut builder = Request::builder()
            .method(method)
            .uri(path)
            .header(hyper::header::HOST, self.endpoint.authority())
            .header(hyper::header::ACCEPT, accept)
            .header(hyper::header::USER_AGENT, concat!("outrider/", env!("CARGO_PKG_VERSION")));
        if let Some(token) = &self.token {
            builder = builder.header(hyper::header::AUTHORIZATION, token.header());
        }
        if !body.is_empty() {
            builder = builder.header(hyper::header::CONTENT_TYPE, "application/json");
        }
        builder.body(Full::new(body)).map_err(|_| ClientError::BadUrl {
            url: self.endpoint.url.clone(),
            reason: "it does not make a valid request",
        })
    }

    async fn body(&self, response: Response<Incoming>) -> Result<Bytes, ClientError> {
        let limited = Limited::new(response.into_body(), MAX_ANSWER_BYTES);
        let whole = limited.collect().await;
        whole
            .map(http_body_util::Collected::to_bytes)
            .map_err(|source| ClientError::Broken { url: self.endpoint.url.clone(), source })
    }

    fn broken(&self, error: hyper::Error) -> ClientError {
        ClientError::Broken { url: self.endpoint.url.clone(), source: error.into() }
    }
}

async fn within<T>(
    limit: Duration,
    act: &'static str,
    url: &str,
    work: impl Future<Output = Result<T, ClientError>>,
) -> Result<T, ClientError> {
    tokio::time::timeout(limit, work)
        .await
        .unwrap_or_else(|_| Err(ClientError::TimedOut { url: url.to_owned(), act, limit_s: limit.as_secs() }))
}

/// The error in an answer: a problem document, or the best that can be said of something else.
fn problem_of(status: StatusCode, body: &[u8]) -> ClientError {
    if let Ok(problem) = serde_json::from_slice::<Problem>(body) {
        return ClientError::Answer(problem);
    }
    let code = match status.as_u16() {
        400 | 413 | 415 | 422 => ErrorCode::BadRequest,
        401 => ErrorCode::Unauthenticated,
        403 => ErrorCode::Forbidden,
        429 => ErrorCode::LimitReached,
        _ => ErrorCode::Internal,
    };
    let text: String = String::from_utf8_lossy(body).trim().chars().take(200).collect();
    let said = if text.is_empty() { "nothing more".to_owned() } else { format!("{text:?}") };
    ClientError::Answer(Problem::new(code, format!("the manager answered {status} and said {said}")))
}

/// Events as they come.
#[derive(Debug)]
pub(crate) struct EventStream {
    body: Incoming,
    parser: Parser,
    ready: VecDeque<SseEvent>,
    url: String,
}

impl EventStream {
    /// The next event; `None` when the manager closed the stream. May be dropped while it waits: nothing is lost.
    pub(crate) async fn next(&mut self) -> Result<Option<SseEvent>, ClientError> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(Some(event));
            }
            let Some(frame) = self.body.frame().await else { return Ok(None) };
            let frame = frame.map_err(|e| self.broken(e.into()))?;
            if let Some(data) = frame.data_ref() {
                let events = self.parser.push(data).map_err(|e| self.broken(e.into()))?;
                self.ready.extend(events);
            }
        }
    }

    fn broken(&self, source: Boxed) -> ClientError {
        ClientError::Broken { url: self.url.clone(), source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_document_keeps_its_code_and_anything_else_gets_one() {
        let document =
            br#"{"type":"about:blank","status":403,"code":"policy-denied","detail":"no","hint":"ask"}"#;
        let ClientError::Answer(problem) = problem_of(StatusCode::FORBIDDEN, document) else {
            panic!("a problem is an answer")
        };
        assert_eq!(problem, Problem::new(ErrorCode::PolicyDenied, "no").hint("ask"));
        for (status, code) in [
            (StatusCode::UNAUTHORIZED, ErrorCode::Unauthenticated),
            (StatusCode::BAD_GATEWAY, ErrorCode::Internal),
            (StatusCode::BAD_REQUEST, ErrorCode::BadRequest),
        ] {
            let ClientError::Answer(problem) = problem_of(status, b"<html>") else { panic!("an answer") };
            assert_eq!(problem.code, code);
        }
    }
}
