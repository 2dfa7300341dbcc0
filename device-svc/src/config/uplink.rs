//! An uplink's settings: its name, and the network behind it.

use std::fmt;

use toml::Spanned;

use super::field::{Fault, Field, Reading, Table};
use super::name::{check_interface_name, check_name, check_netns_name};
use super::raw::{RawUplink, RawUplinkBackend};
use super::tunnel::{TunnelConfig, tunnel};
use super::volume::doubled;

/// What the kernel lets a tap's MTU be: 65535 bytes with the Ethernet header.
const TAP_MTU_MAX: u64 = 65521;
/// Queue pairs of a function at most.
const AF_XDP_QUEUES_MAX: u64 = 64;

/// One uplink, as configured.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UplinkConfig {
    /// Its name on this card: 1 to 63 letters, digits, `.`, `_`, `-`.
    pub name: String,
    /// The network behind it.
    pub backend: UplinkBackendConfig,
}

/// The network behind an uplink.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum UplinkBackendConfig {
    /// None: what is sent is dropped, and nothing comes.
    Null,
    /// None: what is sent comes back.
    Loopback,
    /// A tap interface of the kernel.
    Tap(TapConfig),
    /// A tunnel over UDP (VXLAN).
    Vxlan(TunnelConfig),
    /// A tunnel over UDP (Geneve).
    Geneve(TunnelConfig),
    /// An interface that is there, by packet sockets.
    AfPacket(AfPacketConfig),
    /// An interface that is there, past the kernel's stack.
    AfXdp(AfXdpConfig),
    /// A switch on the card, between functions and one other uplink.
    Switch {
        /// The name of that uplink; `None`: functions reach each other alone.
        uplink: Option<String>,
    },
}

/// A tap interface.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TapConfig {
    /// The interface; made if it is not there. 1 to 15 bytes.
    pub name: String,
    /// The network namespace that it is in, one of `ip netns`. `None`: the card's own.
    pub netns: Option<String>,
    /// Set this MTU, bytes; 68 to 65521. `None`: leave it as it is.
    pub mtu: Option<u16>,
}

/// An interface that the card does not make.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AfPacketConfig {
    /// The interface. 1 to 15 bytes.
    pub interface: String,
    /// The network namespace that it is in, one of `ip netns`. `None`: the card's own.
    pub netns: Option<String>,
}

/// An interface that the card does not make, and some of its hardware queues.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AfXdpConfig {
    /// The interface. 1 to 15 bytes.
    pub interface: String,
    /// The network namespace that it is in, one of `ip netns`. `None`: the card's own.
    pub netns: Option<String>,
    /// Its first so many queues; 1 to 64.
    pub queues: u16,
}

impl UplinkBackendConfig {
    /// The type's name in the configuration.
    #[must_use]
    pub const fn type_name(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Loopback => "loopback",
            Self::Tap(_) => "tap",
            Self::Vxlan(_) => "vxlan",
            Self::Geneve(_) => "geneve",
            Self::AfPacket(_) => "af-packet",
            Self::AfXdp(_) => "af-xdp",
            Self::Switch { .. } => "switch",
        }
    }

    /// What two uplinks must not share; `None` for what nobody else can reach.
    #[must_use]
    pub fn interface(&self) -> Option<String> {
        let name = match self {
            Self::Null | Self::Loopback | Self::Switch { .. } => return None,
            Self::Tap(tap) => &tap.name,
            Self::AfPacket(packet) => &packet.interface,
            Self::AfXdp(xdp) => &xdp.interface,
            Self::Vxlan(tunnel) | Self::Geneve(tunnel) => {
                return Some(format!("VNI {} of {}", tunnel.vni, tunnel.endpoint()));
            }
        };
        Some(match self.netns() {
            None => format!("interface {name:?}"),
            Some(netns) => format!("interface {name:?} of network namespace {netns:?}"),
        })
    }

    /// The uplink that it uses itself, if any.
    #[must_use]
    pub fn uplink(&self) -> Option<&str> {
        match self {
            Self::Switch { uplink } => uplink.as_deref(),
            _ => None,
        }
    }

    /// The network namespace that it is in, if one is named.
    #[must_use]
    pub fn netns(&self) -> Option<&str> {
        match self {
            Self::Null | Self::Loopback | Self::Switch { .. } => None,
            Self::Tap(tap) => tap.netns.as_deref(),
            Self::Vxlan(tunnel) | Self::Geneve(tunnel) => tunnel.netns.as_deref(),
            Self::AfPacket(packet) => packet.netns.as_deref(),
            Self::AfXdp(xdp) => xdp.netns.as_deref(),
        }
    }
}

/// As an option of a command, which takes it back: `tap,name=dray0,netns=blue`.
impl fmt::Display for UplinkBackendConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.type_name())?;
        match self {
            Self::Null | Self::Loopback => Ok(()),
            Self::Switch { uplink } => {
                uplink.as_ref().map_or(Ok(()), |uplink| write!(f, ",uplink={}", doubled(uplink)))
            }
            Self::Tap(TapConfig { name, netns, mtu }) => {
                write!(f, ",name={}", doubled(name))?;
                if let Some(netns) = netns {
                    write!(f, ",netns={}", doubled(netns))?;
                }
                mtu.map_or(Ok(()), |mtu| write!(f, ",mtu={mtu}"))
            }
            Self::Vxlan(tunnel) | Self::Geneve(tunnel) => tunnel.fmt(f),
            Self::AfPacket(AfPacketConfig { interface, netns }) => {
                write!(f, ",interface={}", doubled(interface))?;
                netns.as_ref().map_or(Ok(()), |netns| write!(f, ",netns={}", doubled(netns)))
            }
            Self::AfXdp(AfXdpConfig { interface, netns, queues }) => {
                write!(f, ",interface={}", doubled(interface))?;
                if let Some(netns) = netns {
                    write!(f, ",netns={}", doubled(netns))?;
                }
                write!(f, ",queues={queues}")
            }
        }
    }
}

impl UplinkConfig {
    /// The first key in which `other` differs, if any.
    #[must_use]
    pub fn first_difference(&self, other: &Self) -> Option<&'static str> {
        [("name", self.name != other.name), ("backend", self.backend != other.backend)]
            .into_iter()
            .find_map(|(key, differs)| differs.then_some(key))
    }

    /// Whether this uplink can use `other`, which it names.
    ///
    /// # Errors
    /// The key that stands against it and why.
    pub fn check_on(&self, other: &Self) -> Result<(), (&'static str, String)> {
        match &other.backend {
            UplinkBackendConfig::Switch { .. } => {
                let message = format!("uplink {:?} is a switch as well; name one of another type", other.name);
                Err(("backend", message))
            }
            _ => Ok(()),
        }
    }

    /// Whether this uplink can be beside `other` on one card.
    ///
    /// # Errors
    /// The key that stands against it and why.
    pub fn check_beside(&self, other: &Self) -> Result<(), (&'static str, String)> {
        if self.name == other.name {
            return Err(("name", format!("there is already an uplink {:?}; choose another name", self.name)));
        }
        if let (UplinkBackendConfig::Vxlan(one), UplinkBackendConfig::Geneve(another))
        | (UplinkBackendConfig::Geneve(one), UplinkBackendConfig::Vxlan(another)) = (&self.backend, &other.backend)
            && one.endpoint() == another.endpoint()
        {
            let (endpoint, kind) = (one.endpoint(), other.backend.type_name());
            let why = "and datagrams do not say of which type they are; choose another `port`";
            return Err(("backend", format!("uplink {:?} of type {kind} has {endpoint} already, {why}", other.name)));
        }
        match self.backend.interface() {
            Some(interface) if other.backend.interface().as_ref() == Some(&interface) => {
                Err(("backend", format!("uplink {:?} has {interface} already; choose another", other.name)))
            }
            _ => Ok(()),
        }
    }
}

pub(super) fn uplink(raw: Spanned<RawUplink>, reading: Reading<'_>) -> Result<UplinkConfig, Fault> {
    let mut table = Table { place: "uplink".to_owned(), span: raw.span(), reading };
    let raw = raw.into_inner();
    let name = table.text("name", &raw.name)?;
    let name = table.required("name", name, "`name = \"…\"`")?.to_owned();
    check_name(&name).map_err(|message| table.fault_at("name", &raw.name, message))?;
    table.place = format!("uplink {name:?}");
    let backend = table.required("backend", raw.backend, "`backend = { type = \"tap\", name = \"…\" }` or another")?;
    let backend = backend_config(&backend, &table.place, reading)?;
    Ok(UplinkConfig { name, backend })
}

type Read = fn(&Table<'_>, &RawUplinkBackend) -> Result<UplinkBackendConfig, Fault>;

/// The types: the keys that each has beside `type`, and what reads them.
const TYPES: [(&str, (&[&str], Read)); 8] = [
    ("null", (&[], |_, _| Ok(UplinkBackendConfig::Null))),
    ("loopback", (&[], |_, _| Ok(UplinkBackendConfig::Loopback))),
    ("tap", (&["name", "netns", "mtu"], |table, raw| tap(table, raw).map(UplinkBackendConfig::Tap))),
    ("af-packet", (&["interface", "netns"], |table, raw| af_packet(table, raw).map(UplinkBackendConfig::AfPacket))),
    ("af-xdp", (&["interface", "netns", "queues"], |table, raw| af_xdp(table, raw).map(UplinkBackendConfig::AfXdp))),
    ("vxlan", (TUNNEL_KEYS, |table, raw| tunnel(table, raw, VXLAN_PORT).map(UplinkBackendConfig::Vxlan))),
    ("geneve", (TUNNEL_KEYS, |table, raw| tunnel(table, raw, GENEVE_PORT).map(UplinkBackendConfig::Geneve))),
    ("switch", (&["uplink"], switch)),
];

const TUNNEL_KEYS: &[&str] = &["netns", "mtu", "vni", "local", "remote", "port", "learn"];
/// Where end points listen (IANA).
const VXLAN_PORT: u16 = 4789;
const GENEVE_PORT: u16 = 6081;

fn backend_config(
    raw: &Spanned<RawUplinkBackend>,
    place: &str,
    reading: Reading<'_>,
) -> Result<UplinkBackendConfig, Fault> {
    let table = Table { place: format!("{place}: backend"), span: raw.span(), reading };
    let raw = raw.get_ref();
    let kind = table.word("type", &raw.r#type, &TYPES)?;
    let (keys, read) = table.required("type", kind, "`type = \"tap\"` or another")?;
    // Keys that the type at hand has no use for: a mistake that would otherwise pass unseen.
    let given: [(&str, &Field); 11] = [
        ("interface", &raw.interface),
        ("name", &raw.name),
        ("netns", &raw.netns),
        ("mtu", &raw.mtu),
        ("vni", &raw.vni),
        ("local", &raw.local),
        ("remote", &raw.remote),
        ("port", &raw.port),
        ("learn", &raw.learn),
        ("queues", &raw.queues),
        ("uplink", &raw.uplink),
    ];
    if let Some((key, field)) = given.into_iter().find(|(key, field)| field.is_some() && !keys.contains(key)) {
        let owners: Vec<&str> =
            TYPES.iter().filter(|(_, (keys, _))| keys.contains(&key)).map(|(name, _)| *name).collect();
        let message = format!("a key of type {} alone; remove it", owners.join(" and "));
        return Err(table.fault_at(key, field, message));
    }
    read(&table, raw)
}

fn switch(table: &Table<'_>, raw: &RawUplinkBackend) -> Result<UplinkBackendConfig, Fault> {
    let uplink = table.text("uplink", &raw.uplink)?;
    if let Some(uplink) = uplink {
        check_name(uplink).map_err(|message| table.fault_at("uplink", &raw.uplink, message))?;
    }
    Ok(UplinkBackendConfig::Switch { uplink: uplink.map(str::to_owned) })
}

fn tap(table: &Table<'_>, raw: &RawUplinkBackend) -> Result<TapConfig, Fault> {
    let name = interface(table, "name", &raw.name, "`name = \"dray0\"`, the interface")?;
    let netns = netns(table, raw)?;
    let mtu = table.integer("mtu", &raw.mtu, 68..=TAP_MTU_MAX)?.map(|mtu| mtu as u16);
    Ok(TapConfig { name, netns, mtu })
}

fn af_packet(table: &Table<'_>, raw: &RawUplinkBackend) -> Result<AfPacketConfig, Fault> {
    let interface = interface(table, "interface", &raw.interface, "`interface = \"eth1\"`")?;
    Ok(AfPacketConfig { interface, netns: netns(table, raw)? })
}

fn af_xdp(table: &Table<'_>, raw: &RawUplinkBackend) -> Result<AfXdpConfig, Fault> {
    let interface = interface(table, "interface", &raw.interface, "`interface = \"eth1\"`")?;
    let netns = netns(table, raw)?;
    let queues = table.integer("queues", &raw.queues, 1..=AF_XDP_QUEUES_MAX)?.map_or(1, |queues| queues as u16);
    Ok(AfXdpConfig { interface, netns, queues })
}

fn interface(table: &Table<'_>, key: &str, field: &Field, example: &str) -> Result<String, Fault> {
    let name = table.text(key, field)?;
    let name = table.required(key, name, example)?;
    check_interface_name(name).map_err(|message| table.fault_at(key, field, message))?;
    Ok(name.to_owned())
}

fn netns(table: &Table<'_>, raw: &RawUplinkBackend) -> Result<Option<String>, Fault> {
    let Some(netns) = table.text("netns", &raw.netns)? else { return Ok(None) };
    check_netns_name(netns).map_err(|message| table.fault_at("netns", &raw.netns, message))?;
    Ok(Some(netns.to_owned()))
}
