//! The one place where a volume's settings become its storage, and an uplink's its network.

use std::sync::Arc;

use crate::backend::file::{DirectIo, FileBackend, FileSettings};
use crate::backend::nbd::{NbdBackend, NbdSettings, NbdUri, TlsSettings};
use crate::backend::net::af_packet::{AfPacketBackend, AfPacketSettings};
use crate::backend::net::af_xdp::{AfXdpBackend, AfXdpSettings};
use crate::backend::net::loopback::LoopbackBackend;
use crate::backend::net::null::NullNet;
use crate::backend::net::offload::SoftwareOffload;
use crate::backend::net::switch::SwitchBackend;
use crate::backend::net::tap::{TapBackend, TapSettings};
use crate::backend::net::tunnel::remotes::Learning;
use crate::backend::net::tunnel::wire::TunnelKind;
use crate::backend::net::tunnel::{TunnelBackend, TunnelSettings};
use crate::backend::net::{NetBackend, Offloads};
use crate::backend::null::{NullBackend, NullSettings};
use crate::backend::ram::{RamBackend, RamSettings};
use crate::backend::{BackendError, BlockBackend};
use crate::config::{
    AfPacketConfig, AfXdpConfig, BackendConfig, LearnConfig, NbdConfig, TapConfig, TunnelConfig, UplinkBackendConfig,
    UplinkConfig, VolumeConfig,
};

/// Opens the storage of `config`.
///
/// # Errors
/// When the storage refuses or cannot be reached, in words that name the volume's storage and the next step.
pub fn open_backend(config: &VolumeConfig) -> Result<Arc<dyn BlockBackend>, BackendError> {
    let read_only = config.read_only;
    Ok(match &config.backend {
        BackendConfig::Null { size_bytes } => {
            Arc::new(NullBackend::new(&NullSettings { size_bytes: *size_bytes, read_only })?)
        }
        BackendConfig::Ram { size_bytes } => {
            Arc::new(RamBackend::new(&RamSettings { size_bytes: *size_bytes, read_only })?)
        }
        BackendConfig::File { path, create_bytes, direct } => {
            let direct = match direct {
                None => DirectIo::Auto,
                Some(true) => DirectIo::Always,
                Some(false) => DirectIo::Never,
            };
            let settings = FileSettings { path: path.clone(), create_bytes: *create_bytes, read_only, direct };
            Arc::new(FileBackend::open(&settings)?)
        }
        BackendConfig::Nbd(config) => Arc::new(NbdBackend::open(nbd_settings(config, read_only)?)?),
    })
}

fn nbd_settings(config: &NbdConfig, read_only: bool) -> Result<NbdSettings, BackendError> {
    let uri: NbdUri = config.uri.parse().map_err(|error| BackendError::Refused(format!("{error}")))?;
    let asks_tls = config.uri.starts_with("nbds");
    let tls = asks_tls.then(|| TlsSettings {
        authorities: config.tls_ca.clone(),
        identity: config.tls_identity.clone().map(|identity| (identity.certificate, identity.key)),
        server_name: config.tls_hostname.clone(),
    });
    let connections = usize::from(config.connections);
    Ok(NbdSettings { connections, tls, read_only, ..NbdSettings::new(uri) })
}

/// Opens the network of `config`; `on` is the one that it uses itself, if it names one.
///
/// # Errors
/// When the network refuses or cannot be reached, in words that name it and the next step.
pub fn open_uplink(config: &UplinkConfig, on: Option<&dyn NetBackend>) -> Result<Arc<dyn NetBackend>, BackendError> {
    let backend: Arc<dyn NetBackend> = match &config.backend {
        UplinkBackendConfig::Null => Arc::new(NullNet::new()),
        UplinkBackendConfig::Loopback => Arc::new(LoopbackBackend::new()),
        UplinkBackendConfig::Tap(TapConfig { name, netns, mtu }) => {
            let settings = TapSettings { name: name.clone(), netns: netns.clone(), mtu: *mtu };
            Arc::new(TapBackend::new(settings)?)
        }
        UplinkBackendConfig::Vxlan(config) => Arc::new(TunnelBackend::new(&tunnel(TunnelKind::Vxlan, config))?),
        UplinkBackendConfig::Geneve(config) => Arc::new(TunnelBackend::new(&tunnel(TunnelKind::Geneve, config))?),
        UplinkBackendConfig::AfPacket(AfPacketConfig { interface, netns }) => {
            let settings = AfPacketSettings { interface: interface.clone(), netns: netns.clone() };
            Arc::new(AfPacketBackend::new(&settings)?)
        }
        UplinkBackendConfig::AfXdp(AfXdpConfig { interface, netns, queues }) => {
            let settings = AfXdpSettings { interface: interface.clone(), netns: netns.clone(), queues: *queues };
            Arc::new(AfXdpBackend::new(&settings)?)
        }
        UplinkBackendConfig::Switch { .. } => Arc::new(SwitchBackend::new(on)?),
    };
    // VMs are offered the same everywhere; what a network leaves to them the card does itself.
    let info = backend.info();
    let does_all = info.transmit == Offloads::ALL && info.receive == Offloads::ALL;
    Ok(if does_all { backend } else { Arc::new(SoftwareOffload::new(backend)) })
}

fn tunnel(kind: TunnelKind, config: &TunnelConfig) -> TunnelSettings {
    TunnelSettings {
        kind,
        vni: config.vni,
        local: config.local,
        remotes: config.remotes.clone(),
        learning: match config.learn {
            LearnConfig::Listed => Learning::Listed,
            LearnConfig::Any => Learning::Any,
            LearnConfig::None => Learning::Nothing,
        },
        port: config.port,
        mtu: config.mtu,
        netns: config.netns.clone(),
    }
}
