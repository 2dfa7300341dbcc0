//! Which frames a VM may send: those that say truly where they come from.
//!
//! Judged is the row's own copy of the first bytes, which is what is sent. What cannot be seen in them is not let through: a second
//! tag where VLANs are restricted, or extension headers of IPv6 that reach beyond them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::filter::Octets;
use crate::backend::net::ETHERNET_BYTES;

/// So many first bytes of a frame are judged: room for two tags, IPv6 and some extension headers.
pub(super) const JUDGED_BYTES: usize = 192;

const IPV4: [u8; 2] = [0x08, 0x00];
const ARP: [u8; 2] = [0x08, 0x06];
const IPV6: [u8; 2] = [0x86, 0xdd];
/// IEEE 802.1Q and 802.1ad.
const TAGS: [[u8; 2]; 2] = [[0x81, 0x00], [0x88, 0xa8]];
/// The head of an ARP packet that is about IPv4 over Ethernet (RFC 826).
const ARP_HEAD: [u8; 6] = [0, 1, 8, 0, 6, 4];
const UDP: u8 = 17;
const ICMPV6: u8 = 58;
/// Ports of a DHCP client and its server, as they stand in the header (RFC 2131, 4.1).
const DHCP_PORTS: [u8; 4] = [0, 68, 0, 67];
/// ICMPv6's neighbour advertisement (RFC 4861, 4.4).
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
/// Extension headers that may stand before ICMPv6: hop-by-hop, routing, destination options (RFC 8200, 4.1).
const EXTENSIONS: [u8; 3] = [0, 43, 60];

/// What the frames of one VM may have in them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AntiSpoofing {
    /// Their source must be the function's MAC address.
    pub mac: bool,
    /// The VLANs that a tag may name, and then there is one tag at most; `None`: any.
    pub vlans: Option<Vec<u16>>,
    /// The addresses that they may come from, and then nothing but IPv4, IPv6 and ARP is let through; `None`: any.
    pub addresses: Option<Vec<IpAddr>>,
}

impl AntiSpoofing {
    /// Whether a frame may be sent by the function whose address is `mac`: `None` if not, or else by how many of its first bytes it was
    /// judged. Those must stay as they are: a checksum that is still to be computed is not to be stored there. `frame` has its first
    /// [`JUDGED_BYTES`], or all.
    #[must_use]
    pub(super) fn judge(&self, mac: Octets, frame: &[u8]) -> Option<usize> {
        let (addresses, mut rest) = frame.split_first_chunk::<{ ETHERNET_BYTES as usize - 2 }>()?;
        holds(!self.mac || addresses[6..] == mac)?;
        let mut tags = 0;
        let kind = loop {
            let (kind, behind) = rest.split_first_chunk::<2>()?;
            rest = behind;
            if !TAGS.contains(kind) {
                break *kind;
            }
            let (tag, behind) = rest.split_first_chunk::<2>()?;
            rest = behind;
            tags += 1;
            let vlan = u16::from_be_bytes(*tag) & 0xfff;
            // VLAN 0 is none: the tag is there for its priority.
            holds(self.vlans.as_ref().is_none_or(|vlans| tags == 1 && (vlan == 0 || vlans.contains(&vlan))))?;
        };
        let before = frame.len() - rest.len();
        let Some(allowed) = &self.addresses else { return Some(before) };
        let judged = match kind {
            IPV4 => judge_ipv4(allowed, rest),
            ARP => self.judge_arp(allowed, mac, rest),
            IPV6 => judge_ipv6(allowed, mac, rest),
            _ => None,
        };
        Some(before + judged?)
    }

    fn judge_arp(&self, allowed: &[IpAddr], mac: Octets, packet: &[u8]) -> Option<usize> {
        let (head, rest) = packet.split_first_chunk::<8>()?;
        let (hardware, rest) = rest.split_first_chunk::<6>()?;
        let sender = Ipv4Addr::from(*rest.first_chunk::<4>()?);
        holds(head[..6] == ARP_HEAD && (!self.mac || *hardware == mac))?;
        // Nobody's address: it asks whether an address is free (RFC 5227, 2.1.1).
        holds(sender.is_unspecified() || allowed.contains(&IpAddr::V4(sender)))?;
        Some(8 + 6 + 4)
    }
}

fn holds(condition: bool) -> Option<()> {
    condition.then_some(())
}

fn judge_ipv4(allowed: &[IpAddr], packet: &[u8]) -> Option<usize> {
    let header = packet.first_chunk::<20>()?;
    let source = Ipv4Addr::from(*header[12..].first_chunk::<4>()?);
    let asks_for_address = || {
        // In one piece and without options, so that the ports are where they are looked for.
        let whole = header[0] == 0x45 && header[6] & 0x3f == 0 && header[7] == 0;
        whole && header[9] == UDP && packet.get(20..24) == Some(&DHCP_PORTS)
    };
    if allowed.contains(&IpAddr::V4(source)) {
        return Some(20);
    }
    holds(source.is_unspecified() && asks_for_address())?;
    Some(24)
}

fn judge_ipv6(allowed: &[IpAddr], mac: Octets, packet: &[u8]) -> Option<usize> {
    let (header, mut rest) = packet.split_first_chunk::<40>()?;
    let own = link_local(mac);
    let may = |address: Ipv6Addr| address == own || allowed.contains(&IpAddr::V6(address));
    let source = Ipv6Addr::from(*header[8..].first_chunk::<16>()?);
    // Nobody's address: it asks whether an address is free (RFC 4862, 5.4.2).
    holds(source.is_unspecified() || may(source))?;
    let mut next = header[6];
    while EXTENSIONS.contains(&next) {
        let [following, length, ..] = *rest else { return None };
        next = following;
        rest = rest.get((usize::from(length) + 1) * 8..)?;
    }
    let before = packet.len() - rest.len();
    if next != ICMPV6 {
        holds(!source.is_unspecified())?;
        return Some(before);
    }
    if *rest.first()? != NEIGHBOUR_ADVERTISEMENT {
        return Some(before + 1);
    }
    holds(may(Ipv6Addr::from(*rest.get(8..)?.first_chunk::<16>()?)))?;
    Some(before + 24)
}

/// The address that follows from a MAC address (RFC 4291, appendix A), which a host has for its own link whatever it is given.
fn link_local(mac: Octets) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac;
    Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

#[cfg(test)]
mod tests;
