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
        }
    }

    /// What two uplinks must not share; `None` for what nobody else can reach.
    #[must_use]
    pub fn interface(&self) -> Option<String> {
        match self {
            Self::Null | Self::Loopback => None,
            Self::Tap(TapConfig { name, netns: None, .. }) => Some(format!("interface {name:?}")),
            Self::Tap(TapConfig { name, netns: Some(netns), .. }) => {
                Some(format!("interface {name:?} of network namespace {netns:?}"))
            }
            Self::Vxlan(tunnel) | Self::Geneve(tunnel) => Some(format!("VNI {} of {}", tunnel.vni, tunnel.endpoint())),
        }
    }

    /// The network namespace that it is in, if one is named.
    #[must_use]
    pub fn netns(&self) -> Option<&str> {
        match self {
            Self::Null | Self::Loopback => None,
            Self::Tap(tap) => tap.netns.as_deref(),
            Self::Vxlan(tunnel) | Self::Geneve(tunnel) => tunnel.netns.as_deref(),
        }
    }
}

/// As an option of a command, which takes it back: `tap,name=dray0,netns=blue`.
impl fmt::Display for UplinkBackendConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.type_name())?;
        match self {
            Self::Null | Self::Loopback => Ok(()),
            Self::Tap(TapConfig { name, netns, mtu }) => {
                write!(f, ",name={}", doubled(name))?;
                if let Some(netns) = netns {
                    write!(f, ",netns={}", doubled(netns))?;
                }
                mtu.map_or(Ok(()), |mtu| write!(f, ",mtu={mtu}"))
            }
            Self::Vxlan(tunnel) | Self::Geneve(tunnel) => tunnel.fmt(f),
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
const TYPES: [(&str, (&[&str], Read)); 5] = [
    ("null", (&[], |_, _| Ok(UplinkBackendConfig::Null))),
    ("loopback", (&[], |_, _| Ok(UplinkBackendConfig::Loopback))),
    ("tap", (&["name", "netns", "mtu"], |table, raw| tap(table, raw).map(UplinkBackendConfig::Tap))),
    ("vxlan", (TUNNEL_KEYS, |table, raw| tunnel(table, raw, VXLAN_PORT).map(UplinkBackendConfig::Vxlan))),
    ("geneve", (TUNNEL_KEYS, |table, raw| tunnel(table, raw, GENEVE_PORT).map(UplinkBackendConfig::Geneve))),
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
    let (keys, read) = table.required("type", kind, "`type = \"tap\"`, \"loopback\" or \"null\"")?;
    // Keys that the type at hand has no use for: a mistake that would otherwise pass unseen.
    let given: [(&str, &Field); 8] = [
        ("name", &raw.name),
        ("netns", &raw.netns),
        ("mtu", &raw.mtu),
        ("vni", &raw.vni),
        ("local", &raw.local),
        ("remote", &raw.remote),
        ("port", &raw.port),
        ("learn", &raw.learn),
    ];
    if let Some((key, field)) = given.into_iter().find(|(key, field)| field.is_some() && !keys.contains(key)) {
        let owners: Vec<&str> =
            TYPES.iter().filter(|(_, (keys, _))| keys.contains(&key)).map(|(name, _)| *name).collect();
        let message = format!("a key of type {} alone; remove it", owners.join(" and "));
        return Err(table.fault_at(key, field, message));
    }
    read(&table, raw)
}

fn tap(table: &Table<'_>, raw: &RawUplinkBackend) -> Result<TapConfig, Fault> {
    let name = table.text("name", &raw.name)?;
    let name = table.required("name", name, "`name = \"dray0\"`, the interface")?;
    check_interface_name(name).map_err(|message| table.fault_at("name", &raw.name, message))?;
    let netns = table.text("netns", &raw.netns)?;
    if let Some(netns) = netns {
        check_netns_name(netns).map_err(|message| table.fault_at("netns", &raw.netns, message))?;
    }
    let mtu = table.integer("mtu", &raw.mtu, 68..=TAP_MTU_MAX)?.map(|mtu| mtu as u16);
    Ok(TapConfig { name: name.to_owned(), netns: netns.map(str::to_owned), mtu })
}
