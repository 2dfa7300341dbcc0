//! Between the messages of the control interface and our own types.
//!
//! Settings that arrive are read by the rules of the configuration file, so that a client can bring nothing that a file
//! could not.

mod stats;

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use proto::v1;

use super::events::{Event, EventKind};
pub(super) use stats::{function_stats, reactor_stats};

use super::inventory::{BackingState, FunctionChange, FunctionState, UplinkState, VolumeState};
use super::seam::Standing;
use super::standing::LinkState;
use crate::config::quantity::format_duration;
use crate::config::{
    AfPacketConfig, AfXdpConfig, AntiSpoofingConfig, BackendConfig, ConfigError, DeviceConfig, FunctionConfig,
    LimitConfig, LinkConfig, LinkKind, NetChange, NetLimitConfig, Options, TapConfig, TunnelConfig,
    UplinkBackendConfig, UplinkConfig, VolumeConfig,
};

/// Relative paths mean nothing to a service; clients send absolute ones.
const ROOT: &str = "/";

fn given(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}

fn positive(number: u64) -> Option<String> {
    (number != 0).then(|| number.to_string())
}

fn micros(us: u64) -> String {
    format_duration(Duration::from_micros(us))
}

fn as_micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

fn path_text(path: &Path) -> String {
    path.display().to_string()
}

/// Reads a volume's settings.
///
/// # Errors
/// The first setting that is wrong.
pub fn volume_config(settings: v1::VolumeSettings) -> Result<VolumeConfig, ConfigError> {
    let options = Options::default()
        .with("name", given(&settings.name))
        .with("uuid", given(&settings.uuid))
        .with("serial", given(&settings.serial))
        .with("io-timeout", settings.io_timeout_us.map(micros))
        .with("read-only", Some(settings.read_only))
        .with("recovery", given(&settings.recovery));
    let options = match settings.backend.and_then(|backend| backend.kind) {
        None => options,
        Some(kind) => options.with_pairs("backend", backend_pairs(kind)),
    };
    options.volume(Path::new(ROOT))
}

fn backend_pairs(kind: v1::backend::Kind) -> Vec<(&'static str, Option<String>)> {
    use v1::backend::Kind;
    let named = |name: &str| ("type", Some(name.to_owned()));
    match kind {
        Kind::Null(null) => vec![named("null"), ("size", Some(null.size_bytes.to_string()))],
        Kind::Ram(ram) => vec![named("ram"), ("size", Some(ram.size_bytes.to_string()))],
        Kind::File(file) => vec![
            named("file"),
            ("path", Some(file.path)),
            ("create", file.create_bytes.map(|bytes| bytes.to_string())),
            ("direct", file.direct.map(|direct| direct.to_string())),
        ],
        Kind::Nbd(nbd) => vec![
            named("nbd"),
            ("uri", Some(nbd.uri)),
            ("connections", positive(nbd.connections.into())),
            ("tls-ca", nbd.tls_ca),
            ("tls-certificate", nbd.tls_certificate),
            ("tls-key", nbd.tls_key),
            ("tls-hostname", nbd.tls_hostname),
        ],
    }
}

/// A volume's settings as a message.
#[must_use]
pub fn volume_settings(config: &VolumeConfig) -> v1::VolumeSettings {
    use v1::backend::Kind;
    let kind = match &config.backend {
        BackendConfig::Null { size_bytes } => Kind::Null(v1::NullBackend { size_bytes: *size_bytes }),
        BackendConfig::Ram { size_bytes } => Kind::Ram(v1::RamBackend { size_bytes: *size_bytes }),
        BackendConfig::File { path, create_bytes, direct } => {
            Kind::File(v1::FileBackend { path: path_text(path), create_bytes: *create_bytes, direct: *direct })
        }
        BackendConfig::Nbd(nbd) => Kind::Nbd(v1::NbdBackend {
            uri: nbd.uri.clone(),
            connections: nbd.connections.into(),
            tls_ca: nbd.tls_ca.as_deref().map(path_text),
            tls_certificate: nbd.tls_identity.as_ref().map(|identity| path_text(&identity.certificate)),
            tls_key: nbd.tls_identity.as_ref().map(|identity| path_text(&identity.key)),
            tls_hostname: nbd.tls_hostname.clone(),
        }),
    };
    v1::VolumeSettings {
        name: config.name.clone(),
        uuid: config.uuid.to_string(),
        serial: config.serial_text(),
        backend: Some(v1::Backend { kind: Some(kind) }),
        io_timeout_us: Some(as_micros(config.io_timeout)),
        read_only: config.read_only,
        recovery: config.recovery.word().to_owned(),
    }
}

/// Reads an uplink's settings.
///
/// # Errors
/// The first setting that is wrong.
pub fn uplink_config(settings: v1::UplinkSettings) -> Result<UplinkConfig, ConfigError> {
    use v1::uplink_backend::Kind;
    let named = |name: &str| ("type", Some(name.to_owned()));
    let options = Options::default().with("name", given(&settings.name));
    let pairs = match settings.backend.and_then(|backend| backend.kind) {
        None => return options.uplink(),
        Some(Kind::Null(_)) => vec![named("null")],
        Some(Kind::Loopback(_)) => vec![named("loopback")],
        Some(Kind::Tap(tap)) => vec![
            named("tap"),
            ("name", Some(tap.name)),
            ("netns", tap.netns),
            ("mtu", tap.mtu.map(|mtu| mtu.to_string())),
        ],
        Some(Kind::Vxlan(tunnel)) => tunnel_pairs("vxlan", tunnel),
        Some(Kind::Geneve(tunnel)) => tunnel_pairs("geneve", tunnel),
        Some(Kind::AfPacket(packet)) => {
            vec![named("af-packet"), ("interface", Some(packet.interface)), ("netns", packet.netns)]
        }
        Some(Kind::AfXdp(xdp)) => vec![
            named("af-xdp"),
            ("interface", Some(xdp.interface)),
            ("netns", xdp.netns),
            ("queues", xdp.queues.map(|queues| queues.to_string())),
        ],
        Some(Kind::Switch(switch)) => vec![named("switch"), ("uplink", switch.uplink)],
    };
    options.with_pairs("backend", pairs).uplink()
}

/// An uplink's settings as a message.
#[must_use]
pub fn uplink_settings(config: &UplinkConfig) -> v1::UplinkSettings {
    use v1::uplink_backend::Kind;
    let kind = match &config.backend {
        UplinkBackendConfig::Null => Kind::Null(v1::NullUplink {}),
        UplinkBackendConfig::Loopback => Kind::Loopback(v1::LoopbackUplink {}),
        UplinkBackendConfig::Tap(TapConfig { name, netns, mtu }) => {
            Kind::Tap(v1::TapUplink { name: name.clone(), netns: netns.clone(), mtu: mtu.map(u32::from) })
        }
        UplinkBackendConfig::Vxlan(tunnel) => Kind::Vxlan(tunnel_settings(tunnel)),
        UplinkBackendConfig::Geneve(tunnel) => Kind::Geneve(tunnel_settings(tunnel)),
        UplinkBackendConfig::AfPacket(AfPacketConfig { interface, netns }) => {
            Kind::AfPacket(v1::AfPacketUplink { interface: interface.clone(), netns: netns.clone() })
        }
        UplinkBackendConfig::AfXdp(AfXdpConfig { interface, netns, queues }) => Kind::AfXdp(v1::AfXdpUplink {
            interface: interface.clone(),
            netns: netns.clone(),
            queues: Some((*queues).into()),
        }),
        UplinkBackendConfig::Switch { uplink } => Kind::Switch(v1::SwitchUplink { uplink: uplink.clone() }),
    };
    v1::UplinkSettings { name: config.name.clone(), backend: Some(v1::UplinkBackend { kind: Some(kind) }) }
}

fn tunnel_pairs(kind: &str, tunnel: v1::TunnelUplink) -> Vec<(&'static str, Option<String>)> {
    let text = |number: Option<u32>| number.map(|number| number.to_string());
    vec![
        ("type", Some(kind.to_owned())),
        ("vni", text(tunnel.vni)),
        ("local", given(&tunnel.local).map(str::to_owned)),
        ("remote", (!tunnel.remote.is_empty()).then(|| tunnel.remote.join(","))),
        ("mtu", text(tunnel.mtu)),
        ("port", text(tunnel.port)),
        ("netns", tunnel.netns),
        ("learn", given(&tunnel.learn).map(str::to_owned)),
    ]
}

fn tunnel_settings(tunnel: &TunnelConfig) -> v1::TunnelUplink {
    v1::TunnelUplink {
        vni: Some(tunnel.vni),
        local: tunnel.local.to_string(),
        remote: tunnel.remotes.iter().map(ToString::to_string).collect(),
        mtu: tunnel.mtu.map(u32::from),
        port: Some(tunnel.port.into()),
        netns: tunnel.netns.clone(),
        learn: tunnel.learn.name().to_owned(),
    }
}

/// Reads a function's settings.
///
/// # Errors
/// The first setting that is wrong.
pub fn function_config(settings: v1::FunctionSettings) -> Result<FunctionConfig, ConfigError> {
    let mut options = Options::default()
        .with("name", given(&settings.name))
        .with("type", given(&settings.r#type))
        .with("volume", given(&settings.volume))
        .with("queues", positive(settings.queues.into()))
        .with("queue-size", positive(settings.queue_size.into()))
        .with("packed", settings.packed)
        .with("seg-max", positive(settings.seg_max.into()))
        .with("block-size", positive(settings.block_size.into()))
        .with("write-cache", settings.write_cache)
        .with("uplink", given(&settings.uplink))
        .with("mac", given(&settings.mac))
        .with("mtu", positive(settings.mtu.into()))
        .with("queue-pairs", positive(settings.queue_pairs.into()))
        .with("rss", settings.rss.then_some(true))
        .with("vlan", positive(settings.vlan.into()))
        .with("limit-group", given(&settings.limit_group));
    if let Some(link) = settings.link {
        let pairs = [
            ("type", Some(given(&link.r#type).unwrap_or("vhost-user").to_owned())),
            ("socket", Some(link.socket)),
            ("mode", given(&link.mode).map(str::to_owned)),
            ("socket-mode", link.socket_mode.map(|mode| format!("{mode:o}"))),
            ("payload", given(&link.payload).map(str::to_owned)),
            ("notify", given(&link.notify).map(str::to_owned)),
            ("msix", link.msix.map(|msix| msix.to_string())),
        ];
        options = options.with_pairs("link", pairs);
    }
    if let Some(limit) = settings.limit {
        options = options.with_pairs("limit", limit_pairs(&limit));
    }
    if let Some(v1::AntiSpoofing { mac, vlans, addresses }) = settings.anti_spoofing {
        let vlans = vlans.map(|list| list.vlans.iter().map(u32::to_string).collect::<Vec<_>>().join(","));
        let addresses = addresses.map(|list| list.addresses.join(","));
        let pairs = [("mac", Some(mac.to_string())), ("vlan", vlans), ("ip", addresses)];
        options = options.with_pairs("anti-spoofing", pairs);
    }
    options.function(Path::new(ROOT))
}

fn limit_pairs(limit: &v1::Limit) -> [(&'static str, Option<String>); 12] {
    [
        ("iops", positive(limit.iops)),
        ("bandwidth", positive(limit.bandwidth)),
        ("read-iops", positive(limit.read_iops)),
        ("write-iops", positive(limit.write_iops)),
        ("read-bandwidth", positive(limit.read_bandwidth)),
        ("write-bandwidth", positive(limit.write_bandwidth)),
        ("packets", positive(limit.packets)),
        ("transmit-packets", positive(limit.transmit_packets)),
        ("receive-packets", positive(limit.receive_packets)),
        ("transmit-bandwidth", positive(limit.transmit_bandwidth)),
        ("receive-bandwidth", positive(limit.receive_bandwidth)),
        ("burst", (limit.burst_us != 0).then(|| micros(limit.burst_us))),
    ]
}

/// Reads what is to change of a function that is `device`.
///
/// # Errors
/// The first value that is wrong, or is for another type.
pub fn function_change(request: v1::SetFunctionRequest, device: &DeviceConfig) -> Result<FunctionChange, ConfigError> {
    let mut options =
        Options::default().with("name", Some(&request.name)).with("mac", request.mac).with("mtu", request.mtu);
    if let Some(limit) = request.limit {
        options = options.with_pairs("limit", limit_pairs(&limit));
    }
    match (device, request.link_up) {
        (DeviceConfig::Blk(_), None) => options.blk_change().map(FunctionChange::Blk),
        (DeviceConfig::Blk(_), Some(_)) => {
            let message =
                format!("function {:?}: only a function of type \"net\" has a link that can be set", request.name);
            Err(ConfigError::Options(message))
        }
        (DeviceConfig::Net(_), link_up) => {
            options.net_change().map(|change| FunctionChange::Net(NetChange { link_up, ..change }))
        }
    }
}

/// A disk's limit as a message.
#[must_use]
pub fn limit_message(limit: &LimitConfig) -> v1::Limit {
    v1::Limit {
        iops: limit.iops.unwrap_or(0),
        bandwidth: limit.bandwidth.unwrap_or(0),
        read_iops: limit.read_iops.unwrap_or(0),
        write_iops: limit.write_iops.unwrap_or(0),
        read_bandwidth: limit.read_bandwidth.unwrap_or(0),
        write_bandwidth: limit.write_bandwidth.unwrap_or(0),
        burst_us: as_micros(limit.burst),
        ..v1::Limit::default()
    }
}

/// A network interface's limit as a message.
#[must_use]
pub fn net_limit_message(limit: &NetLimitConfig) -> v1::Limit {
    v1::Limit {
        bandwidth: limit.bandwidth.unwrap_or(0),
        packets: limit.packets.unwrap_or(0),
        transmit_packets: limit.transmit_packets.unwrap_or(0),
        receive_packets: limit.receive_packets.unwrap_or(0),
        transmit_bandwidth: limit.transmit_bandwidth.unwrap_or(0),
        receive_bandwidth: limit.receive_bandwidth.unwrap_or(0),
        burst_us: as_micros(limit.burst),
        ..v1::Limit::default()
    }
}

/// A function's settings as a message.
#[must_use]
pub fn function_settings(config: &FunctionConfig) -> v1::FunctionSettings {
    let settings = v1::FunctionSettings {
        name: config.name.clone(),
        r#type: config.device.type_name().to_owned(),
        link: Some(link_message(&config.link)),
        queue_size: config.queue_size.into(),
        packed: Some(config.packed),
        ..v1::FunctionSettings::default()
    };
    match &config.device {
        DeviceConfig::Blk(blk) => v1::FunctionSettings {
            volume: blk.volume.clone(),
            queues: blk.queues.into(),
            seg_max: blk.seg_max.into(),
            block_size: blk.block_bytes.unwrap_or(0),
            write_cache: Some(blk.write_cache),
            limit: Some(limit_message(&blk.limit)),
            limit_group: blk.limit_group.clone().unwrap_or_default(),
            ..settings
        },
        DeviceConfig::Net(net) => v1::FunctionSettings {
            uplink: net.uplink.clone(),
            mac: net.mac.to_string(),
            mtu: net.mtu.into(),
            queue_pairs: net.queue_pairs.into(),
            rss: net.rss,
            vlan: net.vlan.unwrap_or(0).into(),
            anti_spoofing: net.anti_spoofing.as_ref().map(anti_spoofing_message),
            limit: Some(net_limit_message(&net.limit)),
            ..settings
        },
    }
}

fn anti_spoofing_message(config: &AntiSpoofingConfig) -> v1::AntiSpoofing {
    let vlan_list = |vlans: &Vec<u16>| v1::VlanList { vlans: vlans.iter().copied().map(u32::from).collect() };
    let address_list =
        |addresses: &Vec<IpAddr>| v1::AddressList { addresses: addresses.iter().map(IpAddr::to_string).collect() };
    v1::AntiSpoofing {
        mac: config.mac,
        vlans: config.vlans.as_ref().map(vlan_list),
        addresses: config.addresses.as_ref().map(address_list),
    }
}

fn link_message(link: &LinkConfig) -> v1::Link {
    let message = v1::Link {
        socket: path_text(&link.socket),
        socket_mode: Some(link.socket_mode),
        payload: link.payload.word().to_owned(),
        r#type: link.type_name().to_owned(),
        ..v1::Link::default()
    };
    match link.kind {
        LinkKind::VhostUser { mode } => v1::Link { mode: mode.word().to_owned(), ..message },
        LinkKind::VfioUser { notify, msix } => {
            v1::Link { notify: notify.word().to_owned(), msix: Some(msix), ..message }
        }
    }
}

pub(super) fn volume_message(state: VolumeState) -> v1::Volume {
    let volume = v1::Volume {
        settings: Some(volume_settings(&state.config)),
        read_only: state.config.read_only,
        functions: state.functions,
        ..v1::Volume::default()
    };
    match state.info {
        Ok(info) => v1::Volume {
            size_bytes: info.size_bytes,
            block_bytes: info.block_bytes,
            physical_block_bytes: info.physical_block_bytes,
            read_only: info.read_only,
            volatile_cache: info.volatile_cache,
            discard: info.discard,
            write_zeroes: info.write_zeroes,
            ..volume
        },
        Err(reason) => v1::Volume { failed: reason, ..volume },
    }
}

fn state_of(standing: &Standing) -> v1::State {
    match standing {
        Standing::Waiting => v1::State::Waiting,
        Standing::Attached { .. } => v1::State::Attached,
        Standing::NeedsReset { .. } => v1::State::NeedsReset,
        Standing::Failed { .. } => v1::State::Failed,
    }
}

const fn link_state(link: LinkState) -> v1::LinkState {
    v1::LinkState { set_up: link.set_up, carrier: link.carrier }
}

pub(super) fn uplink_message(state: UplinkState) -> v1::Uplink {
    let uplink = v1::Uplink {
        settings: Some(uplink_settings(&state.config)),
        carrier: state.carrier,
        functions: state.functions,
        uplinks: state.uplinks,
        ..v1::Uplink::default()
    };
    match state.info {
        Ok(info) => v1::Uplink {
            mtu_max: info.mtu_max.into(),
            queue_pairs_max: info.channels_max.into(),
            functions_max: info.functions_max as u64,
            ..uplink
        },
        Err(reason) => v1::Uplink { failed: reason, ..uplink },
    }
}

pub(super) fn function_message(state: FunctionState) -> v1::Function {
    let running = if let Standing::Attached { running } = state.standing { running } else { 0 };
    let function = v1::Function {
        settings: Some(function_settings(&state.config)),
        state: state_of(&state.standing).into(),
        queues_running: running.into(),
        queues: state.config.queues().into(),
        reason: match state.standing {
            Standing::NeedsReset { reason } | Standing::Failed { reason } => reason,
            Standing::Waiting | Standing::Attached { .. } => String::new(),
        },
        ..v1::Function::default()
    };
    match state.backing {
        BackingState::Volume { uuid, serial, size_bytes } => {
            v1::Function { volume_uuid: uuid.to_string(), serial, size_bytes, ..function }
        }
        BackingState::Uplink { link } => v1::Function { link_state: Some(link_state(link)), ..function },
    }
}

pub(super) fn function_view(state: FunctionState) -> v1::FunctionView {
    let view = v1::FunctionView {
        link: format!("{}:{}", state.config.link.type_name(), state.config.link.socket.display()),
        name: state.config.name,
        r#type: state.config.device.type_name().to_owned(),
        state: state_of(&state.standing).into(),
        mac: match &state.config.device {
            DeviceConfig::Blk(_) => String::new(),
            DeviceConfig::Net(net) => net.mac.to_string(),
        },
        ..v1::FunctionView::default()
    };
    match state.backing {
        BackingState::Volume { uuid, serial, size_bytes } => {
            v1::FunctionView { volume_uuid: uuid.to_string(), serial, size_bytes, ..view }
        }
        BackingState::Uplink { link } => v1::FunctionView { link_state: Some(link_state(link)), ..view },
    }
}

pub(super) fn event_message(event: Event) -> v1::Event {
    let kind = match event.kind {
        EventKind::Created => v1::EventKind::Created,
        EventKind::Deleted => v1::EventKind::Deleted,
        EventKind::Attached => v1::EventKind::Attached,
        EventKind::Detached => v1::EventKind::Detached,
        EventKind::NeedsReset { .. } => v1::EventKind::NeedsReset,
        EventKind::Recovered => v1::EventKind::Recovered,
        EventKind::Resized { .. } => v1::EventKind::Resized,
        EventKind::LinkUp => v1::EventKind::LinkUp,
        EventKind::LinkDown => v1::EventKind::LinkDown,
    };
    v1::Event {
        sequence: event.sequence,
        unix_ms: event.unix_ms,
        kind: kind.into(),
        function: event.function,
        volume_uuid: event.volume.map(|volume| volume.to_string()).unwrap_or_default(),
        size_bytes: if let EventKind::Resized { size_bytes } = event.kind { size_bytes } else { 0 },
        reason: if let EventKind::NeedsReset { reason } = event.kind { reason } else { String::new() },
    }
}
