//! A function's settings: what a VM is shown, and by which link.

use toml::Spanned;

use super::field::{Fault, Reading, Table};
use super::limit::{LimitConfig, limit};
use super::link::{LinkConfig, link};
use super::name::check_name;
use super::raw::RawFunction;
use super::volume::VolumeConfig;
use super::{PollConfig, ReactorsConfig};

/// vhost-user carries a queue's number in 8 bits of its messages about file descriptors.
const QUEUES_MAX: u64 = 256;

/// The largest queue of a split ring (virtio 1.3, 2.7) and of a packed one (2.8.10.1).
const QUEUE_SIZE_MAX: u64 = 32768;

/// A request of one segment takes 3 descriptors, so a smaller power of two carries none.
const QUEUE_SIZE_MIN: u64 = 4;

/// Segments of a request, unless told otherwise: 128 descriptors with header and status, half a queue of 256.
pub const SEG_MAX_DEFAULT: u16 = 126;

/// One function, as configured.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FunctionConfig {
    /// Its name on this card: 1 to 63 letters, digits, `.`, `_`, `-`.
    pub name: String,
    /// What the VM sees.
    pub kind: FunctionKind,
    /// How the VM reaches it.
    pub link: LinkConfig,
    /// The name of its volume.
    pub volume: String,
    /// Request queues; 1 to 256.
    pub queues: u16,
    /// Entries of a queue at most; a power of two from 4 to 32768.
    pub queue_size: u16,
    /// Whether the packed ring is offered (`VIRTIO_F_RING_PACKED`).
    pub packed: bool,
    /// Data segments of a request at most (`VIRTIO_BLK_F_SEG_MAX`); with header and status they fit a queue.
    pub seg_max: u16,
    /// Logical block size shown to the VM, bytes: 512 or 4096. `None`: the volume's own.
    pub block_bytes: Option<u32>,
    /// Whether the write cache is on when the VM does not say otherwise (`VIRTIO_BLK_F_CONFIG_WCE`).
    pub write_cache: bool,
    /// How fast it may go.
    pub limit: LimitConfig,
    /// The limit group it belongs to; its own limit holds beside that.
    pub limit_group: Option<String>,
}

/// The device types.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FunctionKind {
    /// virtio-blk.
    Blk,
}

impl FunctionKind {
    /// The type's name in the configuration.
    #[must_use]
    pub const fn type_name(self) -> &'static str {
        match self {
            Self::Blk => "blk",
        }
    }
}

impl FunctionConfig {
    /// The first key in which `other` differs, if any.
    #[must_use]
    pub fn first_difference(&self, other: &Self) -> Option<&'static str> {
        [
            ("name", self.name != other.name),
            ("type", self.kind != other.kind),
            ("link", self.link != other.link),
            ("volume", self.volume != other.volume),
            ("queues", self.queues != other.queues),
            ("queue-size", self.queue_size != other.queue_size),
            ("packed", self.packed != other.packed),
            ("seg-max", self.seg_max != other.seg_max),
            ("block-size", self.block_bytes != other.block_bytes),
            ("write-cache", self.write_cache != other.write_cache),
            ("limit", self.limit != other.limit),
            ("limit-group", self.limit_group != other.limit_group),
        ]
        .into_iter()
        .find_map(|(key, differs)| differs.then_some(key))
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

    /// Whether this function can be beside `other` on one card; `volume` is this one's.
    ///
    /// # Errors
    /// The key that stands against it and why.
    pub fn check_beside(&self, other: &Self, volume: &VolumeConfig) -> Result<(), (&'static str, String)> {
        if self.name == other.name {
            return Err(("name", format!("there is already a function {:?}; choose another name", self.name)));
        }
        if self.link.socket == other.link.socket {
            let socket = self.link.socket.display();
            return Err(("link", format!("function {:?} has the socket {socket} already; choose another", other.name)));
        }
        if self.volume == other.volume && !volume.read_only {
            return Err((
                "volume",
                format!(
                    "volume {:?} is used by function {:?} already and would be written twice; \
                     give each its own volume, or set the volume's `read-only = true`",
                    self.volume, other.name
                ),
            ));
        }
        Ok(())
    }
}

pub(super) fn function(raw: Spanned<RawFunction>, reading: Reading<'_>) -> Result<FunctionConfig, Fault> {
    let mut table = Table { place: "function".to_owned(), span: raw.span(), reading };
    let raw = raw.into_inner();
    let name = table.text("name", &raw.name)?;
    let name = table.required("name", name, "`name = \"…\"`")?.to_owned();
    check_name(&name).map_err(|message| table.fault_at("name", &raw.name, message))?;
    table.place = format!("function {name:?}");

    let kind = table.word("type", &raw.r#type, &[("blk", FunctionKind::Blk)])?;
    let kind = table.required("type", kind, "`type = \"blk\"`")?;
    let raw_link = table.required("link", raw.link, "`link = { type = \"vhost-user\", socket = \"…\" }`")?;
    let link = link(&raw_link, &table.place, reading)?;
    let volume = table.text("volume", &raw.volume)?;
    let volume = table.required("volume", volume, "`volume = \"…\"`, the name of a volume")?.to_owned();
    check_name(&volume).map_err(|message| table.fault_at("volume", &raw.volume, message))?;

    let queues = table.integer("queues", &raw.queues, 1..=QUEUES_MAX)?.unwrap_or(1) as u16;
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
    // A chain is never longer than its queue (virtio 1.3, 2.7.5.3.1), and header and status take a descriptor each.
    let seg_limit = queue_size - 2;
    let seg_max = table
        .integer("seg-max", &raw.seg_max, 1..=u64::from(seg_limit))?
        .map_or(SEG_MAX_DEFAULT.min(seg_limit), |segments| segments as u16);
    let block_bytes = match table.integer("block-size", &raw.block_size, 512..=4096)? {
        None => None,
        Some(bytes @ (512 | 4096)) => Some(bytes as u32),
        Some(bytes) => {
            return Err(table.fault_at("block-size", &raw.block_size, format_args!("{bytes} is neither 512 nor 4096")));
        }
    };
    let limit = match &raw.limit {
        None => LimitConfig::NONE,
        Some(raw) => {
            let place = format!("{}: limit", table.place);
            limit(&Table { place, span: raw.span(), reading }, raw.get_ref())?
        }
    };
    let limit_group = table.text("limit-group", &raw.limit_group)?.map(str::to_owned);
    if let Some(group) = &limit_group {
        check_name(group).map_err(|message| table.fault_at("limit-group", &raw.limit_group, message))?;
    }
    Ok(FunctionConfig {
        name,
        kind,
        link,
        volume,
        queues,
        queue_size,
        packed: table.boolean("packed", &raw.packed)?.unwrap_or(true),
        seg_max,
        block_bytes,
        write_cache: table.boolean("write-cache", &raw.write_cache)?.unwrap_or(true),
        limit,
        limit_group,
    })
}
