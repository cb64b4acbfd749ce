//! TLS configurations of the control plane: TLS 1.3 only, nothing resumed, nothing early.

use std::sync::Arc;

use rustls::client::Resumption;
use rustls::client::danger::ServerCertVerifier;
use rustls::server::NoServerSessionStorage;
use rustls::server::danger::ClientCertVerifier;
use rustls::{ClientConfig, Error as TlsError, ServerConfig};

use super::LinkError;
use crate::channel::TlsFault;
use crate::identity::LiveIdentity;
use crate::provider::control_provider;

pub(crate) fn client_config(
    verifier: Arc<dyn ServerCertVerifier>,
    identity: Option<LiveIdentity>,
    alpn: &[u8],
) -> Result<Arc<ClientConfig>, LinkError> {
    let builder = ClientConfig::builder_with_provider(control_provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(unusable)?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match identity {
        Some(identity) => builder.with_client_cert_resolver(Arc::new(identity)),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![alpn.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    config.enable_sni = false;
    Ok(Arc::new(config))
}

pub(crate) fn server_config(
    verifier: Option<Arc<dyn ClientCertVerifier>>,
    identity: LiveIdentity,
    alpn: &[u8],
) -> Result<Arc<ServerConfig>, LinkError> {
    let builder = ServerConfig::builder_with_provider(control_provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(unusable)?;
    let builder = match verifier {
        Some(verifier) => builder.with_client_cert_verifier(verifier),
        None => builder.with_no_client_auth(),
    };
    let mut config = builder.with_cert_resolver(Arc::new(identity));
    config.alpn_protocols = vec![alpn.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Ok(Arc::new(config))
}

pub(crate) fn unusable(error: TlsError) -> LinkError {
    LinkError::Configuration(TlsFault(error))
}
