//! How fast a function, or a group of functions, may go.

use std::time::Duration;

use toml::Spanned;

use super::field::{Fault, Reading, Table};
use super::name::check_name;
use super::raw::{RawLimit, RawLimitGroup};

/// How much may be saved up while idle, unless told otherwise.
pub const BURST_DEFAULT: Duration = Duration::from_secs(1);

/// Requests and bytes per second; `None` is no limit. Reads and writes are held to their own limit and to the common one;
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
    // What a reactor can count in a second without overflow of its nanosecond arithmetic.
    let rates = 1..=1_000_000_000;
    Ok(LimitConfig {
        iops: table.integer("iops", &raw.iops, rates.clone())?,
        bandwidth: table.size("bandwidth", &raw.bandwidth)?,
        read_iops: table.integer("read-iops", &raw.read_iops, rates.clone())?,
        write_iops: table.integer("write-iops", &raw.write_iops, rates)?,
        read_bandwidth: table.size("read-bandwidth", &raw.read_bandwidth)?,
        write_bandwidth: table.size("write-bandwidth", &raw.write_bandwidth)?,
        burst: table
            .duration("burst", &raw.burst, Duration::from_millis(1)..=Duration::from_secs(3600))?
            .unwrap_or(BURST_DEFAULT),
    })
}
