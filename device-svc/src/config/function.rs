//! A function's settings: what a VM is shown, and by which link. What all types have is here; [`blk`](super::blk) and
//! [`net`](super::net) have the rest.

use toml::Spanned;

use super::blk::{BlkConfig, blk};
use super::field::{Fault, Field, Reading, Table};
use super::link::{LinkConfig, LinkKind, link};
use super::name::check_name;
use super::net::{NetConfig, net};
use super::raw::RawFunction;
use super::{PollConfig, ReactorsConfig};

/// The largest queue of a split ring (virtio 1.3, 2.7) and of a packed one (2.8.10.1).
const QUEUE_SIZE_MAX: u64 = 32768;

/// A block request of one segment takes 3 descriptors, so a smaller power of two carries none.
const QUEUE_SIZE_MIN: u64 = 4;

/// One function, as configured.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FunctionConfig {
    /// Its name on this card: 1 to 63 letters, digits, `.`, `_`, `-`.
    pub name: String,
    /// How the VM reaches it.
    pub link: LinkConfig,
    /// Entries of a queue at most; a power of two from 4 to 32768.
    pub queue_size: u16,
    /// Whether the packed ring is offered (`VIRTIO_F_RING_PACKED`).
    pub packed: bool,
    /// What the VM sees.
    pub device: DeviceConfig,
}

/// What a VM sees, by its type.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DeviceConfig {
    /// virtio-blk.
    Blk(BlkConfig),
    /// virtio-net.
    Net(NetConfig),
}

impl DeviceConfig {
    /// The type's name in the configuration.
    #[must_use]
    pub const fn type_name(&self) -> &'static str {
        match self {
            Self::Blk(_) => "blk",
            Self::Net(_) => "net",
        }
    }

    /// The name of its volume, if it is a disk.
    #[must_use]
    pub fn volume(&self) -> Option<&str> {
        match self {
            Self::Blk(blk) => Some(&blk.volume),
            Self::Net(_) => None,
        }
    }

    /// The name of its uplink, if it is a network interface.
    #[must_use]
    pub fn uplink(&self) -> Option<&str> {
        match self {
            Self::Blk(_) => None,
            Self::Net(net) => Some(&net.uplink),
        }
    }

    /// The limit group that it belongs to, if any.
    #[must_use]
    pub fn limit_group(&self) -> Option<&str> {
        match self {
            Self::Blk(blk) => blk.limit_group.as_deref(),
            Self::Net(_) => None,
        }
    }
}

impl FunctionConfig {
    /// How many queues the card serves. Over vhost-user the VMM keeps a network interface's control queue to itself.
    #[must_use]
    pub const fn queues(&self) -> u16 {
        match (&self.device, self.link.kind) {
            (DeviceConfig::Blk(blk), _) => blk.queues,
            (DeviceConfig::Net(net), LinkKind::VhostUser { .. }) => 2 * net.queue_pairs,
            (DeviceConfig::Net(net), LinkKind::VfioUser { .. }) => 2 * net.queue_pairs + 1,
        }
    }

    /// The first key in which `other` differs, if any.
    #[must_use]
    pub fn first_difference(&self, other: &Self) -> Option<&'static str> {
        let device = || match (&self.device, &other.device) {
            (DeviceConfig::Blk(this), DeviceConfig::Blk(other)) => this.first_difference(other),
            (DeviceConfig::Net(this), DeviceConfig::Net(other)) => this.first_difference(other),
            _ => Some("type"),
        };
        [
            ("name", self.name != other.name),
            ("link", self.link != other.link),
            ("queue-size", self.queue_size != other.queue_size),
            ("packed", self.packed != other.packed),
        ]
        .into_iter()
        .find_map(|(key, differs)| differs.then_some(key))
        .or_else(device)
    }

    /// The first key in which `other` differs and that a VM would notice while it runs, if any.
    #[must_use]
    pub fn fixed_difference(&self, other: &Self) -> Option<&'static str> {
        let device = || match (&self.device, &other.device) {
            (DeviceConfig::Blk(this), DeviceConfig::Blk(other)) => this.fixed_difference(other),
            (DeviceConfig::Net(this), DeviceConfig::Net(other)) => this.fixed_difference(other),
            _ => Some("type"),
        };
        [
            ("link", self.link.socket != other.link.socket || self.link.kind != other.link.kind),
            ("queue-size", self.queue_size != other.queue_size),
            ("packed", self.packed != other.packed),
        ]
        .into_iter()
        .find_map(|(key, differs)| differs.then_some(key))
        .or_else(device)
    }

    /// Whether reactors of this kind can serve it.
    ///
    /// # Errors
    /// The key that stands against it and why.
    pub fn check_reactors(&self, reactors: &ReactorsConfig) -> Result<(), (&'static str, String)> {
        if self.link.is_silent() && reactors.poll != PollConfig::Always {
            return Err((
                "link",
                "with `notify = \"mapped\"` no doorbell wakes a reactor; set `poll = \"always\"` in [reactors], or \
                 `notify = \"message\"`"
                    .to_owned(),
            ));
        }
        Ok(())
    }

    /// Whether this function can be beside `other` on one card; `shared` says whether several may have this one's volume.
    ///
    /// # Errors
    /// The key that stands against it and why.
    pub fn check_beside(&self, other: &Self, shared: bool) -> Result<(), (&'static str, String)> {
        if self.name == other.name {
            return Err(("name", format!("there is already a function {:?}; choose another name", self.name)));
        }
        if self.link.socket == other.link.socket {
            let socket = self.link.socket.display();
            return Err(("link", format!("function {:?} has the socket {socket} already; choose another", other.name)));
        }
        match (&self.device, &other.device) {
            (DeviceConfig::Blk(this), DeviceConfig::Blk(that)) if this.volume == that.volume && !shared => Err((
                "volume",
                format!(
                    "volume {:?} is used by function {:?} already and would be written twice; \
                     give each its own volume, or set the volume's `read-only = true`",
                    this.volume, other.name
                ),
            )),
            (DeviceConfig::Net(this), DeviceConfig::Net(that)) if this.mac == that.mac => {
                Err(("mac", format!("function {:?} has the address {} already; give another", other.name, that.mac)))
            }
            _ => Ok(()),
        }
    }
}

#[derive(Clone, Copy)]
enum Type {
    Blk,
    Net,
}

pub(super) fn function(raw: Spanned<RawFunction>, reading: Reading<'_>) -> Result<FunctionConfig, Fault> {
    let (table, name, raw) = named(raw, reading)?;
    let kind = table.word("type", &raw.r#type, &[("blk", Type::Blk), ("net", Type::Net)])?;
    let kind = table.required("type", kind, "`type = \"blk\"` or `type = \"net\"`")?;
    refuse_other_keys(&table, &raw, kind)?;
    let raw_link = raw.link.as_ref();
    let raw_link = table.required("link", raw_link, "`link = { type = \"vhost-user\", socket = \"…\" }`")?;
    let link = link(raw_link, &table.place, reading)?;
    let queue_size =
        table.integer("queue-size", &raw.queue_size, QUEUE_SIZE_MIN..=QUEUE_SIZE_MAX)?.unwrap_or(256) as u16;
    if !queue_size.is_power_of_two() {
        let below = 1_u16 << queue_size.ilog2();
        let above = u32::from(below) * 2;
        return Err(table.fault_at(
            "queue-size",
            &raw.queue_size,
            format_args!("{queue_size} is not a power of two; use {below} or {above}"),
        ));
    }
    let packed = table.boolean("packed", &raw.packed)?.unwrap_or(true);
    let device = match kind {
        Type::Blk => DeviceConfig::Blk(blk(&table, &raw, queue_size)?),
        Type::Net => DeviceConfig::Net(net(&table, &raw, &name)?),
    };
    if matches!((&device, link.kind), (DeviceConfig::Net(NetConfig { rss: true, .. }), LinkKind::VhostUser { .. })) {
        let message = "over vhost-user the VMM keeps the driver's commands to itself; remove it, or give a link of type \"vfio-user\"";
        return Err(table.fault_at("rss", &raw.rss, message));
    }
    Ok(FunctionConfig { name, link, queue_size, packed, device })
}

/// A function's name, with a table that reads the rest and calls it so.
pub(super) fn named(
    raw: Spanned<RawFunction>,
    reading: Reading<'_>,
) -> Result<(Table<'_>, String, RawFunction), Fault> {
    let mut table = Table { place: "function".to_owned(), span: raw.span(), reading };
    let raw = raw.into_inner();
    let name = table.text("name", &raw.name)?;
    let name = table.required("name", name, "`name = \"…\"`")?.to_owned();
    check_name(&name).map_err(|message| table.fault_at("name", &raw.name, message))?;
    table.place = format!("function {name:?}");
    Ok((table, name, raw))
}

/// Keys that the type at hand has no use for: a mistake that would otherwise pass unseen.
fn refuse_other_keys(table: &Table<'_>, raw: &RawFunction, kind: Type) -> Result<(), Fault> {
    if let (Type::Blk, Some(table_of_net)) = (kind, &raw.anti_spoofing) {
        let message = format!("{}: `anti-spoofing`: only a function of type \"net\" has it; remove it", table.place);
        return Err(Fault { span: table_of_net.span(), message });
    }
    let (other, keys): (_, &[(&str, &Field, &str)]) = match kind {
        Type::Blk => (
            "net",
            &[
                ("uplink", &raw.uplink, "remove it"),
                ("mac", &raw.mac, "remove it"),
                ("mtu", &raw.mtu, "remove it"),
                ("queue-pairs", &raw.queue_pairs, "write `queues`"),
                ("rss", &raw.rss, "remove it"),
                ("vlan", &raw.vlan, "remove it"),
            ],
        ),
        Type::Net => (
            "blk",
            &[
                ("volume", &raw.volume, "give an `uplink`"),
                ("queues", &raw.queues, "write `queue-pairs`"),
                ("seg-max", &raw.seg_max, "remove it"),
                ("block-size", &raw.block_size, "remove it"),
                ("write-cache", &raw.write_cache, "remove it"),
                ("limit-group", &raw.limit_group, "give it a `limit` of its own"),
            ],
        ),
    };
    match keys.iter().find(|(_, field, _)| field.is_some()) {
        None => Ok(()),
        Some((key, field, next)) => {
            Err(table.fault_at(key, field, format_args!("only a function of type {other:?} has it; {next}")))
        }
    }
}
