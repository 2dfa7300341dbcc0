//! What a VM may say it is: settings of a network function.

use std::net::IpAddr;

use toml::Spanned;

use super::field::{Fault, Reading, Table};
use super::raw::RawAntiSpoofing;

/// VLANs that a tag can name (IEEE 802.1Q, 9.6): 0 is none, and 4095 is reserved.
pub(super) const VLANS: std::ops::RangeInclusive<u64> = 1..=4094;

/// Addresses of a function at most.
const ADDRESSES_MAX: usize = 64;

/// What the frames that a VM sends may have in them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AntiSpoofingConfig {
    /// Whether they must have the function's own MAC address as their source.
    pub mac: bool,
    /// The VLANs that tags may name, each 1 to 4094; `None`: any. Frames without a tag are let through.
    pub vlans: Option<Vec<u16>>,
    /// The addresses that they may come from; `None`: any. Then nothing but IPv4, IPv6 and ARP is let through.
    pub addresses: Option<Vec<IpAddr>>,
}

pub(super) fn anti_spoofing(
    raw: &Spanned<RawAntiSpoofing>,
    place: &str,
    reading: Reading<'_>,
) -> Result<AntiSpoofingConfig, Fault> {
    let table = Table { place: format!("{place}: anti-spoofing"), span: raw.span(), reading };
    let raw = raw.get_ref();
    let vlan = |text: &str| match text.parse() {
        Ok(vlan) if VLANS.contains(&u64::from(vlan)) => Ok(vlan),
        _ => Err(format!("{text:?} is no VLAN; write numbers from {} to {}", VLANS.start(), VLANS.end())),
    };
    let address = |text: &str| match text.parse() {
        Ok(address) => Ok(address),
        Err(_) => Err(format!("{text:?} is no IP address; write some like \"10.0.0.5\" or \"fd00::5\"")),
    };
    let addresses: Option<Vec<IpAddr>> = table.list("ip", &raw.ip, address)?;
    if addresses.as_ref().is_some_and(|addresses| addresses.len() > ADDRESSES_MAX) {
        return Err(table.fault_at("ip", &raw.ip, format_args!("more than {ADDRESSES_MAX} addresses; name fewer")));
    }
    Ok(AntiSpoofingConfig {
        mac: table.boolean("mac", &raw.mac)?.unwrap_or(true),
        vlans: table.list("vlan", &raw.vlan, vlan)?,
        addresses,
    })
}
