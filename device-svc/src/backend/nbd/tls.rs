//! TLS for `nbds`: what to trust and what to show, read from files when the backend is opened and used for every later
//! connection, so that a certificate which is taken away does not end a volume that runs.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::crypto::ring;
use rustls::{ClientConfig, ClientConnection, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};

use super::uri::{NbdAddress, NbdUri};

/// The certificates that Debian and Ubuntu trust, used when the configuration names none.
const SYSTEM_AUTHORITIES: &str = "/etc/ssl/certs/ca-certificates.crt";

/// What TLS trusts and shows.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct TlsSettings {
    /// PEM file with the authorities that may vouch for the server; the system's when `None`.
    pub authorities: Option<PathBuf>,
    /// PEM files with the client's certificate chain and its private key, where the server asks for them.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// The name that the server's certificate must carry; the URI's host when `None` (`localhost` for a Unix socket).
    pub server_name: Option<String>,
}

/// Settings that have been read and checked.
#[derive(Clone, Debug)]
pub(super) struct Tls {
    config: Arc<ClientConfig>,
    server_name: ServerName<'static>,
}

impl Tls {
    /// Reads the files. The error is a line for the configuration's author.
    pub(super) fn new(settings: &TlsSettings, uri: &NbdUri) -> Result<Self, String> {
        let name = match (&settings.server_name, &uri.address) {
            (Some(name), _) => name.clone(),
            (None, NbdAddress::Tcp { host, .. }) => host.clone(),
            (None, NbdAddress::Unix(_)) => "localhost".to_owned(),
        };
        let server_name =
            ServerName::try_from(name.clone()).map_err(|_| format!("{uri}: `{name}` cannot be a TLS server's name"))?;
        let path = settings.authorities.as_deref().unwrap_or(Path::new(SYSTEM_AUTHORITIES));
        let mut roots = RootCertStore::empty();
        roots.add_parsable_certificates(certificates(path)?);
        if roots.is_empty() {
            return Err(format!("{}: holds no usable certificate", path.display()));
        }
        let builder = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|error| format!("{uri}: {error}"))?
            .with_root_certificates(roots);
        let config = match &settings.identity {
            None => builder.with_no_client_auth(),
            Some((chain, key)) => {
                let secret =
                    PrivateKeyDer::from_pem_file(key).map_err(|error| format!("{}: {error}", key.display()))?;
                builder
                    .with_client_auth_cert(certificates(chain)?, secret)
                    .map_err(|error| format!("{}: {error}", chain.display()))?
            }
        };
        Ok(Self { config: Arc::new(config), server_name })
    }

    /// The client's side of one more connection.
    pub(super) fn client(&self) -> Result<ClientConnection, rustls::Error> {
        ClientConnection::new(Arc::clone(&self.config), self.server_name.clone())
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let read = || CertificateDer::pem_file_iter(path)?.collect::<Result<Vec<_>, _>>();
    match read() {
        Ok(list) if list.is_empty() => Err(format!("{}: holds no certificate", path.display())),
        Ok(list) => Ok(list),
        Err(error) => Err(format!("{}: {error}", path.display())),
    }
}
