//! Settings as the options that would give them: the way back of [`options`](super::options), for what is kept and read again.

use std::net::IpAddr;

use super::quantity::format_duration;
use super::{
    BlkConfig, ConfigError, DeviceConfig, FunctionConfig, LimitConfig, NetConfig, NetLimitConfig, Options,
    UplinkConfig, VolumeConfig,
};

impl VolumeConfig {
    /// The options that give this volume.
    ///
    /// # Errors
    /// Never in practice: settings are written as options take them.
    pub fn written(&self) -> Result<Options, ConfigError> {
        Options::default()
            .with("name", Some(&self.name))
            .with("uuid", Some(self.uuid))
            .with("serial", Some(self.serial_text()))
            .with("io-timeout", Some(format_duration(self.io_timeout)))
            .with("read-only", Some(self.read_only))
            .with("recovery", Some(self.recovery.word()))
            .with_typed_table("backend", Some(&self.backend.to_string()))
    }
}

impl UplinkConfig {
    /// The options that give this uplink.
    ///
    /// # Errors
    /// Never in practice: settings are written as options take them.
    pub fn written(&self) -> Result<Options, ConfigError> {
        Options::default().with("name", Some(&self.name)).with_typed_table("backend", Some(&self.backend.to_string()))
    }
}

impl FunctionConfig {
    /// The options that give this function.
    ///
    /// # Errors
    /// Never in practice: settings are written as options take them.
    pub fn written(&self) -> Result<Options, ConfigError> {
        let options = Options::default()
            .with("name", Some(&self.name))
            .with("type", Some(self.device.type_name()))
            .with("queue-size", Some(self.queue_size))
            .with("packed", Some(self.packed))
            .with_typed_table("link", Some(&self.link.to_string()))?;
        Ok(match &self.device {
            DeviceConfig::Blk(blk) => disk(options, blk),
            DeviceConfig::Net(net) => interface(options, net),
        })
    }
}

fn disk(options: Options, blk: &BlkConfig) -> Options {
    options
        .with("volume", Some(&blk.volume))
        .with("queues", Some(blk.queues))
        .with("seg-max", Some(blk.seg_max))
        .with("block-size", blk.block_bytes)
        .with("write-cache", Some(blk.write_cache))
        .with("limit-group", blk.limit_group.as_ref())
        .with_pairs("limit", disk_limit(&blk.limit))
}

fn interface(options: Options, net: &NetConfig) -> Options {
    let options = options
        .with("uplink", Some(&net.uplink))
        .with("mac", Some(net.mac))
        .with("mtu", Some(net.mtu))
        .with("queue-pairs", Some(net.queue_pairs))
        .with("rss", Some(net.rss))
        .with("vlan", net.vlan)
        .with_pairs("limit", interface_limit(&net.limit));
    let Some(anti_spoofing) = &net.anti_spoofing else { return options };
    let vlans = anti_spoofing.vlans.as_ref().map(|vlans| listed(vlans.iter().map(u16::to_string)));
    let addresses = anti_spoofing.addresses.as_ref().map(|all| listed(all.iter().map(IpAddr::to_string)));
    options
        .with_pairs("anti-spoofing", [("mac", Some(anti_spoofing.mac.to_string())), ("vlan", vlans), ("ip", addresses)])
}

fn listed(values: impl Iterator<Item = String>) -> String {
    values.collect::<Vec<_>>().join(",")
}

fn number(value: Option<u64>) -> Option<String> {
    value.map(|value| value.to_string())
}

fn disk_limit(limit: &LimitConfig) -> [(&'static str, Option<String>); 7] {
    [
        ("iops", number(limit.iops)),
        ("bandwidth", number(limit.bandwidth)),
        ("read-iops", number(limit.read_iops)),
        ("write-iops", number(limit.write_iops)),
        ("read-bandwidth", number(limit.read_bandwidth)),
        ("write-bandwidth", number(limit.write_bandwidth)),
        ("burst", Some(format_duration(limit.burst))),
    ]
}

fn interface_limit(limit: &NetLimitConfig) -> [(&'static str, Option<String>); 7] {
    [
        ("packets", number(limit.packets)),
        ("bandwidth", number(limit.bandwidth)),
        ("transmit-packets", number(limit.transmit_packets)),
        ("receive-packets", number(limit.receive_packets)),
        ("transmit-bandwidth", number(limit.transmit_bandwidth)),
        ("receive-bandwidth", number(limit.receive_bandwidth)),
        ("burst", Some(format_duration(limit.burst))),
    ]
}
