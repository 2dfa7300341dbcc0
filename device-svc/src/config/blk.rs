//! The settings of a virtio-blk function: a disk on a volume.

use toml::Spanned;

use super::field::{Fault, Reading, Table};
use super::function::named;
use super::limit::{LimitConfig, limit};
use super::name::check_name;
use super::raw::RawFunction;

/// vhost-user carries a queue's number in 8 bits of its messages about file descriptors.
const QUEUES_MAX: u64 = 256;

/// Segments of a request, unless told otherwise: 128 descriptors with header and status, half a queue of 256.
pub const SEG_MAX_DEFAULT: u16 = 126;

/// What a function has that is a disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BlkConfig {
    /// The name of its volume.
    pub volume: String,
    /// Request queues; 1 to 256.
    pub queues: u16,
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

impl BlkConfig {
    /// The first key in which `other` differs, if any.
    pub(super) fn first_difference(&self, other: &Self) -> Option<&'static str> {
        [
            ("volume", self.volume != other.volume),
            ("queues", self.queues != other.queues),
            ("seg-max", self.seg_max != other.seg_max),
            ("block-size", self.block_bytes != other.block_bytes),
            ("write-cache", self.write_cache != other.write_cache),
            ("limit", self.limit != other.limit),
            ("limit-group", self.limit_group != other.limit_group),
        ]
        .into_iter()
        .find_map(|(key, differs)| differs.then_some(key))
    }

    /// The first key in which `other` differs and that a VM would notice while it runs, if any.
    pub(super) fn fixed_difference(&self, other: &Self) -> Option<&'static str> {
        [
            ("volume", self.volume != other.volume),
            ("queues", self.queues != other.queues),
            ("seg-max", self.seg_max != other.seg_max),
            ("block-size", self.block_bytes != other.block_bytes),
            ("write-cache", self.write_cache != other.write_cache),
        ]
        .into_iter()
        .find_map(|(key, differs)| differs.then_some(key))
    }
}

pub(super) fn blk(table: &Table<'_>, raw: &RawFunction, queue_size: u16) -> Result<BlkConfig, Fault> {
    let volume = table.text("volume", &raw.volume)?;
    let volume = table.required("volume", volume, "`volume = \"…\"`, the name of a volume")?.to_owned();
    check_name(&volume).map_err(|message| table.fault_at("volume", &raw.volume, message))?;
    let queues = table.integer("queues", &raw.queues, 1..=QUEUES_MAX)?.unwrap_or(1) as u16;
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
    let limit_group = table.text("limit-group", &raw.limit_group)?.map(str::to_owned);
    if let Some(group) = &limit_group {
        check_name(group).map_err(|message| table.fault_at("limit-group", &raw.limit_group, message))?;
    }
    Ok(BlkConfig {
        volume,
        queues,
        seg_max,
        block_bytes,
        write_cache: table.boolean("write-cache", &raw.write_cache)?.unwrap_or(true),
        limit: blk_limit(table, raw)?.unwrap_or_default(),
        limit_group,
    })
}

fn blk_limit(table: &Table<'_>, raw: &RawFunction) -> Result<Option<LimitConfig>, Fault> {
    let read = |raw: &Spanned<_>| {
        let place = format!("{}: limit", table.place);
        limit(&Table { place, span: raw.span(), reading: table.reading }, raw.get_ref())
    };
    raw.limit.as_ref().map(read).transpose()
}

/// What a change of a disk that runs says of its limit.
pub(super) fn blk_change(raw: Spanned<RawFunction>, reading: Reading<'_>) -> Result<LimitConfig, Fault> {
    let (table, _, raw) = named(raw, reading)?;
    let changes = [("mac", &raw.mac), ("mtu", &raw.mtu)];
    if let Some((key, field)) = changes.into_iter().find(|(_, field)| field.is_some()) {
        return Err(table.fault_at(key, field, "only a function of type \"net\" has it; remove it"));
    }
    let limit = blk_limit(&table, &raw)?;
    table.required("limit", limit, "`limit = { iops = … }`, what can be changed of a disk that runs")
}
