//! A tunnel's settings: the network's number, and between which end points its frames travel. VXLAN and Geneve have the same.

use std::fmt;
use std::net::IpAddr;

use super::field::{Fault, Field, Table};
use super::name::check_netns_name;
use super::raw::RawUplinkBackend;
use super::volume::doubled;

/// The largest number of a network: 24 bits.
const VNI_MAX: u64 = 0xff_ffff;
/// The longest datagram, less the headers over IPv6.
const MTU_MAX: u64 = 65535 - 70;
/// A copy of what is for everybody goes to each.
const REMOTES_MAX: usize = 256;

/// A tunnel over UDP.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TunnelConfig {
    /// The number of the network, 24 bits.
    pub vni: u32,
    /// Our own address.
    pub local: IpAddr,
    /// The other end points, at most 256, each once; of the same version of IP as `local`.
    pub remotes: Vec<IpAddr>,
    /// A VM's largest packet, bytes, 68 to 65465. `None`: what the underlay takes.
    pub mtu: Option<u16>,
    /// The UDP port of all end points.
    pub port: u16,
    /// The network namespace of the underlay, one of `ip netns`. `None`: the card's own.
    pub netns: Option<String>,
    /// Whose frames are taken, and what they teach.
    pub learn: LearnConfig,
}

/// Whose frames are taken, and what they teach about where stations are.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum LearnConfig {
    /// Those of `remote`, or of anybody if none is given; they are learned from.
    #[default]
    Listed,
    /// Those of anybody; they are learned from.
    Any,
    /// Those of `remote`; nothing is learned.
    None,
}

const LEARN: [(&str, LearnConfig); 3] =
    [("listed", LearnConfig::Listed), ("any", LearnConfig::Any), ("none", LearnConfig::None)];

impl LearnConfig {
    /// Its word in the configuration.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Listed => "listed",
            Self::Any => "any",
            Self::None => "none",
        }
    }
}

impl TunnelConfig {
    /// Where its datagrams come in, which other tunnels of the same type can share.
    #[must_use]
    pub fn endpoint(&self) -> String {
        let netns = self.netns.as_ref().map(|netns| format!(" of network namespace {netns:?}")).unwrap_or_default();
        format!("port {} of {}{netns}", self.port, self.local)
    }
}

/// The options behind the type.
impl fmt::Display for TunnelConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { vni, local, remotes, mtu, port, netns, learn } = self;
        write!(f, ",vni={vni},local={local}")?;
        if !remotes.is_empty() {
            let remotes: Vec<String> = remotes.iter().map(ToString::to_string).collect();
            write!(f, ",remote={}", doubled(remotes.join(",")))?;
        }
        if let Some(mtu) = mtu {
            write!(f, ",mtu={mtu}")?;
        }
        write!(f, ",port={port}")?;
        if let Some(netns) = netns {
            write!(f, ",netns={}", doubled(netns))?;
        }
        write!(f, ",learn={}", learn.name())
    }
}

pub(super) fn tunnel(table: &Table<'_>, raw: &RawUplinkBackend, port_default: u16) -> Result<TunnelConfig, Fault> {
    let vni = table.integer("vni", &raw.vni, 0..=VNI_MAX)?;
    let vni = table.required("vni", vni, "`vni = 42`, the number of the network")? as u32;
    let local = table.text("local", &raw.local)?;
    let local = table.required("local", local, "`local = \"10.9.0.1\"`, an address of the card")?;
    let local = address(local).map_err(|message| table.fault_at("local", &raw.local, message))?;
    let remotes = remotes(table, &raw.remote, local)?;
    let mtu = table.integer("mtu", &raw.mtu, 68..=MTU_MAX)?.map(|mtu| mtu as u16);
    let port = table.integer("port", &raw.port, 1..=u16::MAX.into())?.map_or(port_default, |port| port as u16);
    let netns = table.text("netns", &raw.netns)?;
    if let Some(netns) = netns {
        check_netns_name(netns).map_err(|message| table.fault_at("netns", &raw.netns, message))?;
    }
    let learn = table.word("learn", &raw.learn, &LEARN)?.unwrap_or_default();
    if learn == LearnConfig::None && remotes.is_empty() {
        let message = "without `remote` nothing could be sent; add `remote`, or leave this key out";
        return Err(table.fault_at("learn", &raw.learn, message));
    }
    Ok(TunnelConfig { vni, local, remotes, mtu, port, netns: netns.map(str::to_owned), learn })
}

/// The addresses of the other end points: in a file a list of texts, as an option one text with commas.
fn remotes(table: &Table<'_>, field: &Field, local: IpAddr) -> Result<Vec<IpAddr>, Fault> {
    let fault = |message: String| table.fault_at("remote", field, message);
    let given: Vec<IpAddr> = table.list("remote", field, address)?.unwrap_or_default();
    if given.len() > REMOTES_MAX {
        return Err(fault(format!("{} addresses are more than {REMOTES_MAX}", given.len())));
    }
    let mut remotes = Vec::with_capacity(given.len());
    for remote in given {
        if remote.is_ipv4() != local.is_ipv4() {
            return Err(fault(format!("{remote} and `local`, {local}, are of two versions of IP; use one")));
        }
        if remote == local {
            return Err(fault(format!("{remote} is `local`; give the other end points' addresses alone")));
        }
        if remotes.contains(&remote) {
            return Err(fault(format!("{remote} is given twice; remove one")));
        }
        remotes.push(remote);
    }
    Ok(remotes)
}

/// One machine's address.
fn address(text: &str) -> Result<IpAddr, String> {
    let Ok(address) = text.parse::<IpAddr>() else {
        return Err(format!("{text:?} is not an IP address; write one like \"10.9.0.1\" or \"2001:db8::1\""));
    };
    let address = address.to_canonical();
    let is_broadcast = matches!(address, IpAddr::V4(address) if address.is_broadcast());
    if address.is_unspecified() || address.is_multicast() || is_broadcast {
        return Err(format!("{address} is not the address of one machine"));
    }
    if matches!(address, IpAddr::V6(address) if address.is_unicast_link_local()) {
        return Err(format!("{address} is good on one link only; use a unique local or global address"));
    }
    Ok(address)
}
