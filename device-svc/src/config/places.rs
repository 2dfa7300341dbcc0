//! Whether the files and folders that a configuration names are there, before anything is started.

use std::ops::Range;
use std::path::Path;

use super::field::Fault;
use super::{BackendConfig, Config, Spans, UplinkConfig, VolumeConfig};

/// Where `ip netns` keeps network namespaces.
const NETNS_FOLDER: &str = "/run/netns";

/// Checks every path of `config`.
pub(super) fn check(config: &Config, spans: &Spans) -> Result<(), Fault> {
    for (volume, span) in config.volumes.iter().zip(&spans.volumes) {
        check_volume(volume).map_err(|(key, message)| fault(span, "volume", &volume.name, key, &message))?;
    }
    for (uplink, span) in config.uplinks.iter().zip(&spans.uplinks) {
        check_uplink(uplink).map_err(|(key, message)| fault(span, "uplink", &uplink.name, key, &message))?;
    }
    // The control socket's folder is made when the card starts, and functions may have their sockets in it too.
    let made = config.control.listen.socket().parent();
    for (function, span) in config.functions.iter().zip(&spans.functions) {
        let socket = &function.link.socket;
        let folder = socket.parent();
        if folder != made {
            let problem = folder.and_then(folder_problem);
            if let Some(message) = problem {
                return Err(fault(span, "function", &function.name, "link", &message));
            }
        }
        let taken =
            [&config.control.listen, &config.control.shim].into_iter().any(|address| address.socket() == socket);
        if taken {
            let message = format!("{} is a socket of [control]; choose another", socket.display());
            return Err(fault(span, "function", &function.name, "link", &message));
        }
    }
    Ok(())
}

fn fault(span: &Range<usize>, table: &str, name: &str, key: &str, message: &str) -> Fault {
    Fault { span: span.clone(), message: format!("{table} {name:?}: `{key}`: {message}") }
}

fn check_volume(volume: &VolumeConfig) -> Result<(), (&'static str, String)> {
    match &volume.backend {
        BackendConfig::Null { .. } | BackendConfig::Ram { .. } => Ok(()),
        BackendConfig::File { path, create_bytes, .. } => {
            if path.is_dir() {
                return Err(("backend", format!("{} is a folder; give a file or block device", path.display())));
            }
            if path.exists() {
                return Ok(());
            }
            if create_bytes.is_none() {
                let message = format!("{} does not exist; check the path, or add `create = \"10G\"`", path.display());
                return Err(("backend", message));
            }
            path.parent().and_then(folder_problem).map_or(Ok(()), |message| Err(("backend", message)))
        }
        BackendConfig::Nbd(nbd) => {
            let identity = nbd.tls_identity.as_ref();
            let files =
                [nbd.tls_ca.as_deref(), identity.map(|i| i.certificate.as_path()), identity.map(|i| i.key.as_path())];
            match files.into_iter().flatten().find(|path| !path.is_file()) {
                Some(path) => Err(("backend", format!("{} is not a file; check the `tls-…` keys", path.display()))),
                None => Ok(()),
            }
        }
    }
}

/// A network namespace is not made: nothing would lead out of it.
fn check_uplink(uplink: &UplinkConfig) -> Result<(), (&'static str, String)> {
    match uplink.backend.netns() {
        Some(netns) if !Path::new(NETNS_FOLDER).join(netns).exists() => {
            let message = format!("there is no network namespace {netns:?}; `ip netns add {netns}` makes it");
            Err(("backend", message))
        }
        _ => Ok(()),
    }
}

fn folder_problem(folder: &Path) -> Option<String> {
    (!folder.is_dir()).then(|| format!("the folder {} does not exist; make it first", folder.display()))
}
