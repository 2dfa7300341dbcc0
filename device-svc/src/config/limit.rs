//! How fast a function, or a group of functions, may go.

use std::ops::RangeInclusive;
use std::time::Duration;

use toml::Spanned;

use super::field::{Fault, Field, Reading, Table};
use super::name::check_name;
use super::raw::{RawLimit, RawLimitGroup};

/// How much may be saved up while idle, unless told otherwise.
pub const BURST_DEFAULT: Duration = Duration::from_secs(1);

/// What a reactor can count in a second without overflow of its nanosecond arithmetic.
const RATES: RangeInclusive<u64> = 1..=1_000_000_000;

/// Of a disk: requests and bytes per second; `None` is no limit. Reads and writes are held to their own limit and to the common one;
/// discard and write zeroes count as writes without bytes, flushes are not limited.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LimitConfig {
    /// Requests per second, reads and writes together; at least 1.
    pub iops: Option<u64>,
    /// Bytes per second, reads and writes together; at least 1.
    pub bandwidth: Option<u64>,
    /// Reads per second.
    pub read_iops: Option<u64>,
    /// Writes per second.
    pub write_iops: Option<u64>,
    /// Bytes read per second.
    pub read_bandwidth: Option<u64>,
    /// Bytes written per second.
    pub write_bandwidth: Option<u64>,
    /// How much a function that was idle may catch up at once: this much time at the full rate. 1 ms to 1 h.
    pub burst: Duration,
}

impl LimitConfig {
    /// No limit at all.
    pub const NONE: Self = Self {
        iops: None,
        bandwidth: None,
        read_iops: None,
        write_iops: None,
        read_bandwidth: None,
        write_bandwidth: None,
        burst: BURST_DEFAULT,
    };

    /// Whether nothing is limited.
    #[must_use]
    pub fn is_none(&self) -> bool {
        Self { burst: BURST_DEFAULT, ..self.clone() } == Self::NONE
    }
}

impl Default for LimitConfig {
    fn default() -> Self {
        Self::NONE
    }
}

/// Of a network interface: packets and bytes per second; `None` is no limit. What the VM sends and what it receives is held to its
/// own limit and to the common one. A packet that the other side has still to cut counts as one, with all its bytes; bytes are those
/// of Ethernet frames, without preamble, checksum and gap.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NetLimitConfig {
    /// Packets per second, both ways together; at least 1.
    pub packets: Option<u64>,
    /// Bytes per second, both ways together; at least 1.
    pub bandwidth: Option<u64>,
    /// Packets per second from the VM.
    pub transmit_packets: Option<u64>,
    /// Packets per second to the VM.
    pub receive_packets: Option<u64>,
    /// Bytes per second from the VM.
    pub transmit_bandwidth: Option<u64>,
    /// Bytes per second to the VM.
    pub receive_bandwidth: Option<u64>,
    /// How much a function that was idle may catch up at once: this much time at the full rate. 1 ms to 1 h.
    pub burst: Duration,
}

impl NetLimitConfig {
    /// No limit at all.
    pub const NONE: Self = Self {
        packets: None,
        bandwidth: None,
        transmit_packets: None,
        receive_packets: None,
        transmit_bandwidth: None,
        receive_bandwidth: None,
        burst: BURST_DEFAULT,
    };
}

impl Default for NetLimitConfig {
    fn default() -> Self {
        Self::NONE
    }
}

/// A limit that several functions share.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LimitGroupConfig {
    /// Its name, which functions give as `limit-group`.
    pub name: String,
    /// What they may do together.
    pub limit: LimitConfig,
}

pub(super) fn limit_group(raw: Spanned<RawLimitGroup>, reading: Reading<'_>) -> Result<LimitGroupConfig, Fault> {
    let mut table = Table { place: "limit-group".to_owned(), span: raw.span(), reading };
    let (name_field, raw) = raw.into_inner().split();
    let name = table.text("name", &name_field)?;
    let name = table.required("name", name, "`name = \"…\"`")?.to_owned();
    check_name(&name).map_err(|message| table.fault_at("name", &name_field, message))?;
    table.place = format!("limit-group {name:?}");
    let limit = limit(&table, &raw)?;
    if limit.is_none() {
        return Err(table.fault("limits nothing; add `iops = …` or `bandwidth = \"…\"`"));
    }
    Ok(LimitGroupConfig { name, limit })
}

pub(super) fn limit(table: &Table<'_>, raw: &RawLimit) -> Result<LimitConfig, Fault> {
    let others = [
        ("packets", &raw.packets, "write `iops`"),
        ("transmit-packets", &raw.transmit_packets, "write `write-iops`"),
        ("receive-packets", &raw.receive_packets, "write `read-iops`"),
        ("transmit-bandwidth", &raw.transmit_bandwidth, "write `write-bandwidth`"),
        ("receive-bandwidth", &raw.receive_bandwidth, "write `read-bandwidth`"),
    ];
    refuse_other_keys(table, "net", others)?;
    Ok(LimitConfig {
        iops: table.integer("iops", &raw.iops, RATES)?,
        bandwidth: table.size("bandwidth", &raw.bandwidth)?,
        read_iops: table.integer("read-iops", &raw.read_iops, RATES)?,
        write_iops: table.integer("write-iops", &raw.write_iops, RATES)?,
        read_bandwidth: table.size("read-bandwidth", &raw.read_bandwidth)?,
        write_bandwidth: table.size("write-bandwidth", &raw.write_bandwidth)?,
        burst: burst(table, raw)?,
    })
}

pub(super) fn net_limit(table: &Table<'_>, raw: &RawLimit) -> Result<NetLimitConfig, Fault> {
    let others = [
        ("iops", &raw.iops, "write `packets`"),
        ("read-iops", &raw.read_iops, "write `receive-packets`"),
        ("write-iops", &raw.write_iops, "write `transmit-packets`"),
        ("read-bandwidth", &raw.read_bandwidth, "write `receive-bandwidth`"),
        ("write-bandwidth", &raw.write_bandwidth, "write `transmit-bandwidth`"),
    ];
    refuse_other_keys(table, "blk", others)?;
    Ok(NetLimitConfig {
        packets: table.integer("packets", &raw.packets, RATES)?,
        bandwidth: table.size("bandwidth", &raw.bandwidth)?,
        transmit_packets: table.integer("transmit-packets", &raw.transmit_packets, RATES)?,
        receive_packets: table.integer("receive-packets", &raw.receive_packets, RATES)?,
        transmit_bandwidth: table.size("transmit-bandwidth", &raw.transmit_bandwidth)?,
        receive_bandwidth: table.size("receive-bandwidth", &raw.receive_bandwidth)?,
        burst: burst(table, raw)?,
    })
}

fn burst(table: &Table<'_>, raw: &RawLimit) -> Result<Duration, Fault> {
    let range = Duration::from_millis(1)..=Duration::from_secs(3600);
    Ok(table.duration("burst", &raw.burst, range)?.unwrap_or(BURST_DEFAULT))
}

/// Keys that the type at hand has no use for: each with what to do instead.
fn refuse_other_keys<const N: usize>(
    table: &Table<'_>,
    other: &str,
    keys: [(&str, &Field, &str); N],
) -> Result<(), Fault> {
    match keys.into_iter().find(|(_, field, _)| field.is_some()) {
        None => Ok(()),
        Some((key, field, next)) => Err(table.fault_at(
            key,
            field,
            format_args!("only the limit of a function of type {other:?} has it; {next}"),
        )),
    }
}
