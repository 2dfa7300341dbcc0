//! Between the messages of the control interface and our own types.
//!
//! Settings that arrive are read by the rules of the configuration file, so that a client can bring nothing that a file
//! could not.

use std::path::Path;
use std::time::Duration;

use proto::v1;

use super::events::{Event, EventKind};
use super::inventory::{FunctionState, VolumeState};
use super::seam::Standing;
use crate::config::quantity::format_duration;
use crate::config::{
    BackendConfig, ConfigError, FunctionConfig, LimitConfig, LinkConfig, LinkKind, Options, VolumeConfig,
};
use crate::metrics::{QueueCounters, ReactorCounters, RequestKind};

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
        .with("read-only", Some(settings.read_only));
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
    options.function(Path::new(ROOT))
}

fn limit_pairs(limit: &v1::Limit) -> [(&'static str, Option<String>); 7] {
    [
        ("iops", positive(limit.iops)),
        ("bandwidth", positive(limit.bandwidth)),
        ("read-iops", positive(limit.read_iops)),
        ("write-iops", positive(limit.write_iops)),
        ("read-bandwidth", positive(limit.read_bandwidth)),
        ("write-bandwidth", positive(limit.write_bandwidth)),
        ("burst", (limit.burst_us != 0).then(|| micros(limit.burst_us))),
    ]
}

/// Reads a limit.
///
/// # Errors
/// The first value that is out of range.
pub fn limit_config(limit: &v1::Limit) -> Result<LimitConfig, ConfigError> {
    let given = limit_pairs(limit).into_iter().filter_map(|(key, value)| Some(format!("{key}={}", value?)));
    Options::limit(&given.collect::<Vec<_>>().join(","))
}

/// A limit as a message.
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
    }
}

/// A function's settings as a message.
#[must_use]
pub fn function_settings(config: &FunctionConfig) -> v1::FunctionSettings {
    v1::FunctionSettings {
        name: config.name.clone(),
        r#type: config.kind.type_name().to_owned(),
        link: Some(link_message(&config.link)),
        volume: config.volume.clone(),
        queues: config.queues.into(),
        queue_size: config.queue_size.into(),
        packed: Some(config.packed),
        seg_max: config.seg_max.into(),
        block_size: config.block_bytes.unwrap_or(0),
        write_cache: Some(config.write_cache),
        limit: Some(limit_message(&config.limit)),
        limit_group: config.limit_group.clone().unwrap_or_default(),
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
    v1::Volume {
        settings: Some(volume_settings(&state.config)),
        size_bytes: state.info.size_bytes,
        block_bytes: state.info.block_bytes,
        physical_block_bytes: state.info.physical_block_bytes,
        read_only: state.info.read_only,
        volatile_cache: state.info.volatile_cache,
        discard: state.info.discard,
        write_zeroes: state.info.write_zeroes,
        functions: state.functions,
    }
}

fn state_of(standing: &Standing) -> v1::State {
    match standing {
        Standing::Waiting => v1::State::Waiting,
        Standing::Attached { .. } => v1::State::Attached,
        Standing::NeedsReset { .. } => v1::State::NeedsReset,
    }
}

pub(super) fn function_message(state: FunctionState) -> v1::Function {
    let running = if let Standing::Attached { running } = state.standing { running } else { 0 };
    v1::Function {
        settings: Some(function_settings(&state.config)),
        state: state_of(&state.standing).into(),
        queues_running: running.into(),
        reason: if let Standing::NeedsReset { reason } = state.standing { reason } else { String::new() },
        volume_uuid: state.volume.uuid.to_string(),
        serial: state.volume.serial_text(),
        size_bytes: state.size_bytes,
    }
}

pub(super) fn function_view(state: FunctionState) -> v1::FunctionView {
    v1::FunctionView {
        link: format!("{}:{}", state.config.link.type_name(), state.config.link.socket.display()),
        name: state.config.name,
        r#type: state.config.kind.type_name().to_owned(),
        volume_uuid: state.volume.uuid.to_string(),
        serial: state.volume.serial_text(),
        size_bytes: state.size_bytes,
        state: state_of(&state.standing).into(),
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
    };
    v1::Event {
        sequence: event.sequence,
        unix_ms: event.unix_ms,
        kind: kind.into(),
        function: event.function,
        volume_uuid: event.volume.to_string(),
        size_bytes: if let EventKind::Resized { size_bytes } = event.kind { size_bytes } else { 0 },
        reason: if let EventKind::NeedsReset { reason } = event.kind { reason } else { String::new() },
    }
}

pub(super) fn queue_stats(index: usize, counters: &QueueCounters) -> v1::QueueStats {
    let kinds = RequestKind::ALL.into_iter().map(|kind| v1::KindStats {
        kind: kind.name().to_owned(),
        requests: counters.requests[kind as usize].get(),
        bytes: counters.bytes[kind as usize].get(),
    });
    v1::QueueStats {
        index: index as u32,
        kinds: kinds.collect(),
        errors: counters.errors.get(),
        in_flight: counters.in_flight.get(),
        held: counters.held.get(),
        throttled: counters.throttled.get(),
        interrupts: counters.interrupts.get(),
        doorbells: counters.doorbells.get(),
        latency_buckets: counters.latency.buckets.iter().map(crate::metrics::Counter::get).collect(),
        latency_sum_ns: counters.latency.sum_ns.get(),
        dma_reads: counters.dma_reads.get(),
        dma_writes: counters.dma_writes.get(),
        dma_read_bytes: counters.dma_read_bytes.get(),
        dma_write_bytes: counters.dma_write_bytes.get(),
        dma_empty_polls: counters.dma_empty_polls.get(),
        dma_lent: counters.dma_lent.get(),
        dma_lent_bytes: counters.dma_lent_bytes.get(),
    }
}

pub(super) fn reactor_stats(index: usize, counters: &ReactorCounters) -> v1::ReactorStats {
    v1::ReactorStats {
        index: index as u32,
        turns_busy: counters.turns_busy.get(),
        turns_idle: counters.turns_idle.get(),
        busy_ns: counters.busy_ns.get(),
        idle_ns: counters.idle_ns.get(),
        asleep_ns: counters.asleep_ns.get(),
        sleeps: counters.sleeps.get(),
        turn_ns_max: counters.turn_ns_max.get(),
        lanes: counters.lanes.get(),
    }
}
