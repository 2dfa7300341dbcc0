//! What commands print: aligned columns for people, JSON in the words of the configuration for programs.

use std::io::{ErrorKind, Write};
use std::time::Duration;

use anyhow::{Context, Result};
use device_svc::config::quantity::{format_duration, format_size};
use proto::v1;
use serde_json::{Value, json};

/// Writes to standard output. A reader that has seen enough (`| head`) is no error.
pub(crate) fn print(text: &str) -> Result<()> {
    let mut output = std::io::stdout().lock();
    match output.write_all(text.as_bytes()).and_then(|()| output.flush()) {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
        result => result.context("standard output"),
    }
}

/// Rows in columns as wide as their widest cell.
pub(crate) fn columns(head: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = head.iter().map(|cell| cell.len()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: Vec<&str>| {
        let padded = cells.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        format!("{}\n", padded.collect::<Vec<_>>().join("  ").trim_end())
    };
    let mut text = line(head.to_vec());
    for row in rows {
        text.push_str(&line(row.iter().map(String::as_str).collect()));
    }
    text
}

/// A JSON value on its own lines.
pub(crate) fn json_text(value: &Value) -> String {
    format!("{value:#}\n")
}

fn us(microseconds: u64) -> String {
    format_duration(Duration::from_micros(microseconds))
}

fn without_nulls(mut value: Value) -> Value {
    if let Some(object) = value.as_object_mut() {
        object.retain(|_, value| !value.is_null());
    }
    value
}

fn positive(number: u64) -> Value {
    if number == 0 { Value::Null } else { number.into() }
}

pub(crate) fn state_name(state: v1::State) -> &'static str {
    match state {
        v1::State::Unspecified => "unknown",
        v1::State::Waiting => "waiting",
        v1::State::Attached => "attached",
        v1::State::NeedsReset => "needs-reset",
        v1::State::Failed => "failed",
    }
}

/// A backend as its option's text, and as JSON.
pub(crate) fn backend(backend: Option<&v1::Backend>) -> (String, Value) {
    use v1::backend::Kind;
    match backend.and_then(|backend| backend.kind.as_ref()) {
        None => ("unknown".to_owned(), Value::Null),
        Some(Kind::Null(nowhere)) => {
            let size = format_size(nowhere.size_bytes);
            (format!("null,size={size}"), json!({ "type": "null", "size": nowhere.size_bytes }))
        }
        Some(Kind::Ram(ram)) => {
            let size = format_size(ram.size_bytes);
            (format!("ram,size={size}"), json!({ "type": "ram", "size": ram.size_bytes }))
        }
        Some(Kind::File(file)) => {
            let value = json!({
                "type": "file", "path": file.path, "create": file.create_bytes, "direct": file.direct,
            });
            (format!("file,path={}", file.path), without_nulls(value))
        }
        Some(Kind::Nbd(nbd)) => {
            let value = json!({
                "type": "nbd", "uri": nbd.uri, "connections": nbd.connections, "tls-ca": nbd.tls_ca,
                "tls-certificate": nbd.tls_certificate, "tls-key": nbd.tls_key, "tls-hostname": nbd.tls_hostname,
            });
            (format!("nbd,uri={},connections={}", nbd.uri, nbd.connections), without_nulls(value))
        }
    }
}

/// A volume as JSON.
pub(crate) fn volume_json(volume: &v1::Volume) -> Value {
    let settings = volume.settings.clone().unwrap_or_default();
    json!({
        "name": settings.name,
        "uuid": settings.uuid,
        "serial": settings.serial,
        "backend": backend(settings.backend.as_ref()).1,
        "io-timeout": us(settings.io_timeout_us.unwrap_or_default()),
        "recovery": settings.recovery,
        "read-only": volume.read_only,
        "size-bytes": volume.size_bytes,
        "block-bytes": volume.block_bytes,
        "physical-block-bytes": volume.physical_block_bytes,
        "volatile-cache": volume.volatile_cache,
        "discard": volume.discard,
        "write-zeroes": volume.write_zeroes,
        "functions": volume.functions,
        "failed": if volume.failed.is_empty() { Value::Null } else { volume.failed.clone().into() },
    })
}

/// A limit as JSON, and as its option's text; empty where nothing is limited.
pub(crate) fn limit(limit: Option<&v1::Limit>) -> (String, Value) {
    let limit = limit.copied().unwrap_or_default();
    let rates = [
        ("iops", limit.iops, false),
        ("packets", limit.packets, false),
        ("bandwidth", limit.bandwidth, true),
        ("read-iops", limit.read_iops, false),
        ("write-iops", limit.write_iops, false),
        ("read-bandwidth", limit.read_bandwidth, true),
        ("write-bandwidth", limit.write_bandwidth, true),
        ("transmit-packets", limit.transmit_packets, false),
        ("receive-packets", limit.receive_packets, false),
        ("transmit-bandwidth", limit.transmit_bandwidth, true),
        ("receive-bandwidth", limit.receive_bandwidth, true),
    ];
    let mut parts = Vec::new();
    let mut object = serde_json::Map::new();
    for (key, rate, is_bytes) in rates.into_iter().filter(|(_, rate, _)| *rate != 0) {
        parts.push(format!("{key}={}", if is_bytes { format_size(rate) } else { rate.to_string() }));
        object.insert(key.to_owned(), rate.into());
    }
    if parts.is_empty() {
        return (String::new(), Value::Null);
    }
    parts.push(format!("burst={}", us(limit.burst_us)));
    object.insert("burst".to_owned(), us(limit.burst_us).into());
    (parts.join(","), Value::Object(object))
}

/// A link's settings in the order in which they are written; those that its type does not have are left out.
fn link_parts(link: &v1::Link) -> impl Iterator<Item = (&'static str, Value)> + use<> {
    let word = |text: &String| (!text.is_empty()).then(|| Value::from(text.clone()));
    [
        ("type", word(&link.r#type)),
        ("socket", word(&link.socket)),
        ("mode", word(&link.mode)),
        ("socket-mode", Some(format!("{:04o}", link.socket_mode.unwrap_or_default()).into())),
        ("payload", word(&link.payload)),
        ("notify", word(&link.notify)),
        ("msix", link.msix.map(Value::from)),
    ]
    .into_iter()
    .filter_map(|(key, value)| Some((key, value?)))
}

fn link_json(link: &v1::Link) -> Value {
    Value::Object(link_parts(link).map(|(key, value)| (key.to_owned(), value)).collect())
}

fn link_text(link: &v1::Link) -> String {
    let parts = link_parts(link).map(|(key, value)| {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        if key == "type" { value } else { format!("{key}={value}") }
    });
    parts.collect::<Vec<_>>().join(",")
}

/// A function as JSON.
pub(crate) fn function_json(function: &v1::Function) -> Value {
    let settings = function.settings.clone().unwrap_or_default();
    let link = settings.link.clone().unwrap_or_default();
    let mut value = json!({
        "name": settings.name,
        "type": settings.r#type,
        "link": link_json(&link),
        "queue-size": settings.queue_size,
        "packed": settings.packed,
        "limit": limit(settings.limit.as_ref()).1,
        "state": state_name(v1::State::try_from(function.state).unwrap_or_default()),
        "queues-running": function.queues_running,
        "reason": if function.reason.is_empty() { Value::Null } else { function.reason.clone().into() },
    });
    let device = match &function.link_state {
        None => json!({
            "volume": settings.volume,
            "queues": settings.queues,
            "seg-max": settings.seg_max,
            "block-size": positive(settings.block_size.into()),
            "write-cache": settings.write_cache,
            "limit-group": if settings.limit_group.is_empty() { Value::Null } else { settings.limit_group.into() },
            "volume-uuid": function.volume_uuid,
            "serial": function.serial,
            "size-bytes": function.size_bytes,
        }),
        Some(link) => json!({
            "uplink": settings.uplink,
            "mac": settings.mac,
            "mtu": settings.mtu,
            "queue-pairs": settings.queue_pairs,
            "rss": settings.rss,
            "vlan": positive(settings.vlan.into()),
            "anti-spoofing": settings.anti_spoofing.map_or(Value::Null, |config| json!({
                "mac": config.mac,
                "vlan": config.vlans.map(|list| list.vlans),
                "ip": config.addresses.map(|list| list.addresses),
            })),
            "link-state": if is_up(link) { "up" } else { "down" },
            "link-set": if link.set_up { "up" } else { "down" },
            "carrier": link.carrier,
        }),
    };
    if let (Some(value), Value::Object(device)) = (value.as_object_mut(), device) {
        value.extend(device);
    }
    value
}

/// Whether a network interface's link is up.
pub(crate) const fn is_up(link: &v1::LinkState) -> bool {
    link.set_up && link.carrier
}

/// Why it is, or is not.
const fn link_state_text(link: &v1::LinkState) -> &'static str {
    match (link.set_up, link.carrier) {
        (true, true) => "up",
        (true, false) => "down: its uplink has no carrier",
        (false, true) => "down: it was set so",
        (false, false) => "down: it was set so, and its uplink has no carrier",
    }
}

/// Whether an uplink's network is there.
pub(crate) const fn carrier_name(carrier: bool) -> &'static str {
    if carrier { "carrier up" } else { "no carrier" }
}

/// A network as its option's text, and as JSON.
pub(crate) fn network(backend: Option<&v1::UplinkBackend>) -> (String, Value) {
    use v1::uplink_backend::Kind;
    match backend.and_then(|backend| backend.kind.as_ref()) {
        None => ("unknown".to_owned(), Value::Null),
        Some(Kind::Null(_)) => ("null".to_owned(), json!({ "type": "null" })),
        Some(Kind::Loopback(_)) => ("loopback".to_owned(), json!({ "type": "loopback" })),
        Some(Kind::Tap(tap)) => {
            let netns = tap.netns.as_ref().map(|netns| format!(",netns={netns}")).unwrap_or_default();
            let mtu = tap.mtu.map(|mtu| format!(",mtu={mtu}")).unwrap_or_default();
            let value = json!({ "type": "tap", "name": tap.name, "netns": tap.netns, "mtu": tap.mtu });
            (format!("tap,name={}{netns}{mtu}", tap.name), without_nulls(value))
        }
        Some(Kind::Vxlan(tunnel)) => self::tunnel("vxlan", tunnel),
        Some(Kind::Geneve(tunnel)) => self::tunnel("geneve", tunnel),
        Some(Kind::AfPacket(packet)) => {
            let netns = packet.netns.as_ref().map(|netns| format!(",netns={netns}")).unwrap_or_default();
            let value = json!({ "type": "af-packet", "interface": packet.interface, "netns": packet.netns });
            (format!("af-packet,interface={}{netns}", packet.interface), without_nulls(value))
        }
        Some(Kind::AfXdp(xdp)) => {
            let netns = xdp.netns.as_ref().map(|netns| format!(",netns={netns}")).unwrap_or_default();
            let queues = xdp.queues.map(|queues| format!(",queues={queues}")).unwrap_or_default();
            let value =
                json!({ "type": "af-xdp", "interface": xdp.interface, "netns": xdp.netns, "queues": xdp.queues });
            (format!("af-xdp,interface={}{netns}{queues}", xdp.interface), without_nulls(value))
        }
        Some(Kind::Switch(v1::SwitchUplink { uplink })) => {
            let on = uplink.as_ref().map(|uplink| format!(",uplink={uplink}")).unwrap_or_default();
            (format!("switch{on}"), without_nulls(json!({ "type": "switch", "uplink": uplink })))
        }
    }
}

fn tunnel(kind: &str, tunnel: &v1::TunnelUplink) -> (String, Value) {
    let v1::TunnelUplink { vni, local, remote, mtu, port, netns, learn } = tunnel;
    let mut text = format!("{kind},vni={},local={local}", vni.unwrap_or_default());
    let number = |key: &str, value: &Option<u32>| value.map(|value| format!(",{key}={value}")).unwrap_or_default();
    if !remote.is_empty() {
        // A comma within a value, as options write it.
        text += &format!(",remote={}", remote.join(",,"));
    }
    text += &number("mtu", mtu);
    text += &number("port", port);
    text += &netns.as_ref().map(|netns| format!(",netns={netns}")).unwrap_or_default();
    if !learn.is_empty() {
        text += &format!(",learn={learn}");
    }
    let value = json!({
        "type": kind, "vni": vni, "local": local, "remote": remote, "mtu": mtu, "port": port, "netns": netns, "learn": learn,
    });
    (text, without_nulls(value))
}

/// How many functions an uplink serves; `None` where nothing limits that.
fn functions_max(uplink: &v1::Uplink) -> Option<u64> {
    // Nothing has so many.
    (uplink.functions_max <= u64::from(u32::MAX)).then_some(uplink.functions_max)
}

/// An uplink as JSON.
pub(crate) fn uplink_json(uplink: &v1::Uplink) -> Value {
    let settings = uplink.settings.clone().unwrap_or_default();
    json!({
        "name": settings.name,
        "backend": network(settings.backend.as_ref()).1,
        "carrier": uplink.carrier,
        "mtu-max": uplink.mtu_max,
        "queue-pairs-max": uplink.queue_pairs_max,
        "functions-max": functions_max(uplink),
        "functions": uplink.functions,
        "uplinks": uplink.uplinks,
        "failed": if uplink.failed.is_empty() { Value::Null } else { uplink.failed.clone().into() },
    })
}

/// An uplink, one key a line.
pub(crate) fn uplink_text(uplink: &v1::Uplink) -> String {
    let settings = uplink.settings.clone().unwrap_or_default();
    let list = |names: &[String]| if names.is_empty() { "none".to_owned() } else { names.join(", ") };
    lines(&[
        ("name", settings.name),
        ("backend", network(settings.backend.as_ref()).0),
        ("carrier", if uplink.carrier { "up" } else { "down" }.to_owned()),
        ("mtu-max", uplink.mtu_max.to_string()),
        ("queue-pairs-max", uplink.queue_pairs_max.to_string()),
        ("functions-max", functions_max(uplink).map_or_else(|| "no limit".to_owned(), |most| most.to_string())),
        ("functions", list(&uplink.functions)),
        ("uplinks", list(&uplink.uplinks)),
        ("state", state_text(&uplink.failed)),
    ])
}

/// A size for people.
pub(crate) fn size(bytes: u64) -> String {
    format_size(bytes)
}

/// A volume, one key a line.
pub(crate) fn volume_text(volume: &v1::Volume) -> String {
    let settings = volume.settings.clone().unwrap_or_default();
    let functions = if volume.functions.is_empty() { "none".to_owned() } else { volume.functions.join(", ") };
    lines(&[
        ("name", settings.name),
        ("uuid", settings.uuid),
        ("serial", settings.serial),
        ("backend", backend(settings.backend.as_ref()).0),
        ("size", format!("{} ({} bytes)", size(volume.size_bytes), volume.size_bytes)),
        ("block-size", format!("{} (physical {})", volume.block_bytes, volume.physical_block_bytes)),
        ("io-timeout", us(settings.io_timeout_us.unwrap_or_default())),
        ("recovery", settings.recovery),
        ("read-only", volume.read_only.to_string()),
        ("volatile-cache", volume.volatile_cache.to_string()),
        ("discard", volume.discard.to_string()),
        ("write-zeroes", volume.write_zeroes.to_string()),
        ("functions", functions),
        ("state", state_text(&volume.failed)),
    ])
}

/// Whether a volume or an uplink could be opened.
fn state_text(failed: &str) -> String {
    if failed.is_empty() { "open".to_owned() } else { format!("failed: {failed}") }
}

/// A function, one key a line.
pub(crate) fn function_text(function: &v1::Function) -> String {
    let settings = function.settings.clone().unwrap_or_default();
    let link = settings.link.clone().unwrap_or_default();
    let or = |text: String, otherwise: &str| if text.is_empty() { otherwise.to_owned() } else { text };
    let state = state_name(v1::State::try_from(function.state).unwrap_or_default());
    let state = if function.reason.is_empty() { state.to_owned() } else { format!("{state}: {}", function.reason) };
    let block_size = if settings.block_size == 0 { "the volume's".to_owned() } else { settings.block_size.to_string() };
    let limit = or(limit(settings.limit.as_ref()).0, "none");
    let mut pairs = vec![
        ("name", settings.name),
        ("type", settings.r#type),
        ("state", state),
        ("queues-running", function.queues_running.to_string()),
        ("link", link_text(&link)),
    ];
    let (queue_size, packed) = (settings.queue_size.to_string(), settings.packed.unwrap_or_default().to_string());
    match &function.link_state {
        None => pairs.extend([
            ("volume", settings.volume),
            ("volume-uuid", function.volume_uuid.clone()),
            ("serial", function.serial.clone()),
            ("size", format!("{} ({} bytes)", size(function.size_bytes), function.size_bytes)),
            ("queues", settings.queues.to_string()),
            ("queue-size", queue_size),
            ("packed", packed),
            ("seg-max", settings.seg_max.to_string()),
            ("block-size", block_size),
            ("write-cache", settings.write_cache.unwrap_or_default().to_string()),
            ("limit", limit),
            ("limit-group", or(settings.limit_group, "none")),
        ]),
        Some(state) => pairs.extend([
            ("link-state", link_state_text(state).to_owned()),
            ("uplink", settings.uplink),
            ("mac", settings.mac),
            ("mtu", settings.mtu.to_string()),
            ("queue-pairs", settings.queue_pairs.to_string()),
            ("rss", settings.rss.to_string()),
            ("vlan", if settings.vlan == 0 { "all".to_owned() } else { settings.vlan.to_string() }),
            ("anti-spoofing", anti_spoofing_text(settings.anti_spoofing)),
            ("queue-size", queue_size),
            ("packed", packed),
            ("limit", limit),
        ]),
    }
    lines(&pairs)
}

/// What a VM may say it is, as an option takes it.
fn anti_spoofing_text(config: Option<v1::AntiSpoofing>) -> String {
    let Some(v1::AntiSpoofing { mac, vlans, addresses }) = config else { return "none".to_owned() };
    let vlans = vlans.map(|list| list.vlans.iter().map(u32::to_string).collect::<Vec<_>>().join(",,"));
    let addresses = addresses.map(|list| list.addresses.join(",,"));
    let given =
        [("vlan", vlans), ("ip", addresses)].into_iter().filter_map(|(key, list)| Some(format!(",{key}={}", list?)));
    format!("mac={mac}{}", given.collect::<String>())
}

fn lines(pairs: &[(&str, String)]) -> String {
    let width = pairs.iter().map(|(key, _)| key.len()).max().unwrap_or(0);
    pairs.iter().map(|(key, value)| format!("{key:width$}  {value}\n")).collect()
}
