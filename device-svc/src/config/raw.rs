//! The configuration as written: which keys there are, nothing about what they hold.

use serde::Deserialize;
use toml::Spanned;

use super::field::Field;

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub(super) struct RawConfig {
    pub(super) reactors: Option<Spanned<RawReactors>>,
    pub(super) control: Option<Spanned<RawControl>>,
    pub(super) volume: Vec<Spanned<RawVolume>>,
    pub(super) uplink: Vec<Spanned<RawUplink>>,
    pub(super) function: Vec<Spanned<RawFunction>>,
    pub(super) limit_group: Vec<Spanned<RawLimitGroup>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", expecting = "a table [reactors]")]
pub(super) struct RawReactors {
    pub(super) count: Field,
    pub(super) poll: Field,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", expecting = "a table [control]")]
pub(super) struct RawControl {
    pub(super) listen: Field,
    pub(super) shim: Field,
    pub(super) metrics: Field,
    pub(super) state: Field,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", expecting = "a table [[volume]]")]
pub(super) struct RawVolume {
    pub(super) name: Field,
    pub(super) uuid: Field,
    pub(super) serial: Field,
    pub(super) backend: Option<Spanned<RawBackend>>,
    pub(super) io_timeout: Field,
    pub(super) recovery: Field,
    pub(super) read_only: Field,
}

#[derive(Deserialize)]
#[serde(
    deny_unknown_fields,
    rename_all = "kebab-case",
    expecting = "a table like { type = \"file\", path = \"/srv/root.img\" }"
)]
pub(super) struct RawBackend {
    pub(super) r#type: Field,
    pub(super) size: Field,
    pub(super) path: Field,
    pub(super) create: Field,
    pub(super) direct: Field,
    pub(super) uri: Field,
    pub(super) connections: Field,
    pub(super) tls_ca: Field,
    pub(super) tls_certificate: Field,
    pub(super) tls_key: Field,
    pub(super) tls_hostname: Field,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", expecting = "a table [[uplink]]")]
pub(super) struct RawUplink {
    pub(super) name: Field,
    pub(super) backend: Option<Spanned<RawUplinkBackend>>,
}

#[derive(Deserialize)]
#[serde(
    deny_unknown_fields,
    rename_all = "kebab-case",
    expecting = "a table like { type = \"tap\", name = \"dray0\" }"
)]
pub(super) struct RawUplinkBackend {
    pub(super) r#type: Field,
    pub(super) interface: Field,
    pub(super) name: Field,
    pub(super) netns: Field,
    pub(super) mtu: Field,
    pub(super) vni: Field,
    pub(super) local: Field,
    pub(super) remote: Field,
    pub(super) port: Field,
    pub(super) learn: Field,
    pub(super) queues: Field,
    pub(super) uplink: Field,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", expecting = "a table [[function]]")]
pub(super) struct RawFunction {
    pub(super) name: Field,
    pub(super) r#type: Field,
    pub(super) link: Option<Spanned<RawLink>>,
    pub(super) volume: Field,
    pub(super) queues: Field,
    pub(super) queue_size: Field,
    pub(super) packed: Field,
    pub(super) seg_max: Field,
    pub(super) block_size: Field,
    pub(super) write_cache: Field,
    pub(super) uplink: Field,
    pub(super) mac: Field,
    pub(super) mtu: Field,
    pub(super) queue_pairs: Field,
    pub(super) rss: Field,
    pub(super) vlan: Field,
    pub(super) anti_spoofing: Option<Spanned<RawAntiSpoofing>>,
    pub(super) limit: Option<Spanned<RawLimit>>,
    pub(super) limit_group: Field,
}

#[derive(Deserialize)]
#[serde(
    deny_unknown_fields,
    rename_all = "kebab-case",
    expecting = "a table like { type = \"vhost-user\", socket = \"/run/dray/vm1.sock\" }"
)]
pub(super) struct RawLink {
    pub(super) r#type: Field,
    pub(super) socket: Field,
    pub(super) mode: Field,
    pub(super) socket_mode: Field,
    pub(super) payload: Field,
    pub(super) notify: Field,
    pub(super) msix: Field,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", expecting = "a table like { mac = true, ip = [\"10.0.0.5\"] }")]
pub(super) struct RawAntiSpoofing {
    pub(super) mac: Field,
    pub(super) vlan: Field,
    pub(super) ip: Field,
}

#[derive(Deserialize, Default)]
#[serde(
    deny_unknown_fields,
    rename_all = "kebab-case",
    default,
    expecting = "a table like { bandwidth = \"400M\", burst = \"2s\" }"
)]
pub(super) struct RawLimit {
    pub(super) iops: Field,
    pub(super) bandwidth: Field,
    pub(super) read_iops: Field,
    pub(super) write_iops: Field,
    pub(super) read_bandwidth: Field,
    pub(super) write_bandwidth: Field,
    pub(super) packets: Field,
    pub(super) transmit_packets: Field,
    pub(super) receive_packets: Field,
    pub(super) transmit_bandwidth: Field,
    pub(super) receive_bandwidth: Field,
    pub(super) burst: Field,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", expecting = "a table [[limit-group]]")]
pub(super) struct RawLimitGroup {
    pub(super) name: Field,
    pub(super) iops: Field,
    pub(super) bandwidth: Field,
    pub(super) read_iops: Field,
    pub(super) write_iops: Field,
    pub(super) read_bandwidth: Field,
    pub(super) write_bandwidth: Field,
    pub(super) burst: Field,
}

impl RawLimitGroup {
    /// The name, and the limits beside it.
    pub(super) fn split(self) -> (Field, RawLimit) {
        let limit = RawLimit {
            iops: self.iops,
            bandwidth: self.bandwidth,
            read_iops: self.read_iops,
            write_iops: self.write_iops,
            read_bandwidth: self.read_bandwidth,
            write_bandwidth: self.write_bandwidth,
            burst: self.burst,
            ..RawLimit::default()
        };
        (self.name, limit)
    }
}
