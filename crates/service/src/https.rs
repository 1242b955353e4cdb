//! The connector of outgoing calls: plain and TLS, with the system's certificates.

use std::time::Duration;

use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::connect::HttpConnector;

/// Makes a connector. Where the machine has no certificates plain calls still work: `needs_tls` says that they would
/// not be enough.
///
/// # Errors
/// Why TLS can't be had, for operators.
pub fn connector(connect_timeout: Duration, needs_tls: bool) -> Result<HttpsConnector<HttpConnector>, String> {
    let mut tcp = HttpConnector::new();
    tcp.set_connect_timeout(Some(connect_timeout));
    tcp.set_nodelay(true);
    tcp.enforce_http(false);
    let provider = rustls::crypto::ring::default_provider();
    let roots = match HttpsConnectorBuilder::new().with_provider_and_native_roots(provider.clone()) {
        Ok(roots) => roots,
        Err(error) if needs_tls => return Err(format!("this machine's certificates: {error}")),
        // On a machine without certificates whatever plain calls lead to must be plain too.
        Err(_) => {
            let config = rustls::ClientConfig::builder_with_provider(std::sync::Arc::new(provider));
            let config = config.with_safe_default_protocol_versions().map_err(|error| error.to_string())?;
            let none = config.with_root_certificates(rustls::RootCertStore::empty()).with_no_client_auth();
            HttpsConnectorBuilder::new().with_tls_config(none)
        }
    };
    Ok(roots.https_or_http().enable_http1().wrap_connector(tcp))
}
