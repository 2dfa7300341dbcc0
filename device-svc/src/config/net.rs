//! The settings of a virtio-net function: a network interface on an uplink.

use std::ops::RangeInclusive;

use toml::Spanned;

use super::anti_spoofing::{AntiSpoofingConfig, VLANS, anti_spoofing};
use super::field::{Fault, Reading, Table};
use super::function::named;
use super::limit::{NetLimitConfig, net_limit};
use super::mac::MacAddress;
use super::name::check_name;
use super::raw::RawFunction;

/// Each pair is two queues, and vhost-user carries a queue's number in 8 bits. The control queue after them is vfio-user's alone.
const QUEUE_PAIRS_MAX: u64 = 128;

/// The least that IPv4 asks of a network (virtio 1.3, 5.1.4.1), and the most that a device can say.
const MTU: RangeInclusive<u64> = 68..=65535;

/// The largest IP packet, unless told otherwise: Ethernet's.
pub const MTU_DEFAULT: u16 = 1500;

/// What a function has that is a network interface.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NetConfig {
    /// The name of its uplink.
    pub uplink: String,
    /// Its MAC address. Where none is given it is derived from the function's name and the machine, so that it is the same after
    /// every restart.
    pub mac: MacAddress,
    /// The largest IP packet that the VM may send and is sent, bytes (`VIRTIO_NET_F_MTU`); 68 to 65535.
    pub mtu: u16,
    /// Pairs of a receive and a transmit queue; 1 to 128.
    pub queue_pairs: u16,
    /// Whether the driver may spread flows over its queue pairs and be told their hashes (`VIRTIO_NET_F_RSS`,
    /// `VIRTIO_NET_F_HASH_REPORT`).
    pub rss: bool,
    /// The VLAN of the switch's port that it is plugged into, 1 to 4094: what it sends is in this VLAN, and it sees no other.
    /// `None`: a port with all VLANs, tagged.
    pub vlan: Option<u16>,
    /// What the VM may say it is; `None`: anything.
    pub anti_spoofing: Option<AntiSpoofingConfig>,
    /// How fast it may go.
    pub limit: NetLimitConfig,
}

impl NetConfig {
    /// The first key in which `other` differs, if any.
    pub(super) fn first_difference(&self, other: &Self) -> Option<&'static str> {
        [
            ("uplink", self.uplink != other.uplink),
            ("mac", self.mac != other.mac),
            ("mtu", self.mtu != other.mtu),
            ("queue-pairs", self.queue_pairs != other.queue_pairs),
            ("rss", self.rss != other.rss),
            ("vlan", self.vlan != other.vlan),
            ("anti-spoofing", self.anti_spoofing != other.anti_spoofing),
            ("limit", self.limit != other.limit),
        ]
        .into_iter()
        .find_map(|(key, differs)| differs.then_some(key))
    }
}

impl NetConfig {
    /// The first key in which `other` differs and that a VM would notice while it runs, if any.
    pub(super) fn fixed_difference(&self, other: &Self) -> Option<&'static str> {
        [("queue-pairs", self.queue_pairs != other.queue_pairs), ("rss", self.rss != other.rss)]
            .into_iter()
            .find_map(|(key, differs)| differs.then_some(key))
    }
}

/// What changes of a network interface that runs; what is `None` stays as it is.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct NetChange {
    /// Whether its link shall be up, as far as that depends on us: without the uplink's carrier it is down.
    pub link_up: Option<bool>,
    /// Its MAC address.
    pub mac: Option<MacAddress>,
    /// The largest IP packet, bytes; 68 to 65535.
    pub mtu: Option<u16>,
    /// How fast it may go.
    pub limit: Option<NetLimitConfig>,
}

impl NetChange {
    /// The settings after this change of `before`. Of the link's state settings say nothing.
    #[must_use]
    pub fn of(&self, before: &NetConfig) -> NetConfig {
        NetConfig {
            mac: self.mac.unwrap_or(before.mac),
            mtu: self.mtu.unwrap_or(before.mtu),
            limit: self.limit.clone().unwrap_or_else(|| before.limit.clone()),
            ..before.clone()
        }
    }
}

pub(super) fn net(table: &Table<'_>, raw: &RawFunction, name: &str) -> Result<NetConfig, Fault> {
    let uplink = table.text("uplink", &raw.uplink)?;
    let uplink = table.required("uplink", uplink, "`uplink = \"…\"`, the name of an uplink")?.to_owned();
    check_name(&uplink).map_err(|message| table.fault_at("uplink", &raw.uplink, message))?;
    let NetChange { mac, mtu, limit, .. } = changes(table, raw)?;
    Ok(NetConfig {
        uplink,
        mac: mac.unwrap_or_else(|| MacAddress::of_function(name)),
        mtu: mtu.unwrap_or(MTU_DEFAULT),
        queue_pairs: table.integer("queue-pairs", &raw.queue_pairs, 1..=QUEUE_PAIRS_MAX)?.unwrap_or(1) as u16,
        rss: table.boolean("rss", &raw.rss)?.unwrap_or(false),
        vlan: table.integer("vlan", &raw.vlan, VLANS)?.map(|vlan| vlan as u16),
        anti_spoofing: raw
            .anti_spoofing
            .as_ref()
            .map(|raw| anti_spoofing(raw, &table.place, table.reading))
            .transpose()?,
        limit: limit.unwrap_or_default(),
    })
}

/// What a change of a network interface that runs says, but for its link's state, which no file has.
pub(super) fn net_change(raw: Spanned<RawFunction>, reading: Reading<'_>) -> Result<NetChange, Fault> {
    let (table, _, raw) = named(raw, reading)?;
    changes(&table, &raw)
}

/// Those settings that can also be changed while it runs.
fn changes(table: &Table<'_>, raw: &RawFunction) -> Result<NetChange, Fault> {
    let mac = table.text("mac", &raw.mac)?.map(MacAddress::parse);
    let limit = |raw: &Spanned<_>| {
        let place = format!("{}: limit", table.place);
        net_limit(&Table { place, span: raw.span(), reading: table.reading }, raw.get_ref())
    };
    Ok(NetChange {
        link_up: None,
        mac: mac.transpose().map_err(|message| table.fault_at("mac", &raw.mac, message))?,
        mtu: table.integer("mtu", &raw.mtu, MTU)?.map(|mtu| mtu as u16),
        limit: raw.limit.as_ref().map(limit).transpose()?,
    })
}
