//! The source port of an encapsulated frame: a hash of the flow inside, so that routers with several ways, and the queues of whoever
//! receives, spread flows without looking inside, and no flow is torn apart (RFC 7348, section 5; RFC 8926, section 3.3; RFC 6438 for
//! the flow label).
//!
//! Fragments have no ports but the first, so none of them is told apart by ports. The hash is no secret: all that it decides is which
//! way a frame takes.

/// Bytes from the front of a frame that are looked at: Ethernet, two VLAN tags, IPv6, ports.
pub const HEAD_BYTES: usize = 14 + 8 + 40 + 4;

/// The first of the ports that are for anyone's use (RFC 6335): 49152 to 65535.
const FIRST_PORT: u16 = 0xc000;
const PORT_BITS: u32 = 14;

const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const VLAN: [u16; 2] = [0x8100, 0x88a8];
const TCP: u8 = 6;
const UDP: u8 = 17;
const SCTP: u8 = 132;

#[inline]
fn short(head: &[u8], at: usize) -> Option<u16> {
    head.get(at..)?.first_chunk().map(|bytes| u16::from_be_bytes(*bytes))
}

#[inline]
fn long(head: &[u8], at: usize) -> Option<u64> {
    head.get(at..)?.first_chunk().map(|bytes| u64::from_be_bytes(*bytes))
}

#[inline]
const fn has_ports(protocol: u8) -> bool {
    matches!(protocol, TCP | UDP | SCTP)
}

/// Both ports as one number.
#[inline]
fn ports(head: &[u8], at: usize, protocol: u8) -> Option<u64> {
    if !has_ports(protocol) {
        return Some(0);
    }
    Some(u64::from(short(head, at)?) << 16 | u64::from(short(head, at + 2)?))
}

#[inline]
const fn mix(state: u64, word: u64) -> u64 {
    let product = (state ^ word) as u128 * 0x9e37_79b9_7f4a_7c15;
    (product >> 64) as u64 ^ product as u64
}

/// What tells an IPv4 packet's flow from others, or `None` where the packet is cut off.
fn of_ipv4(head: &[u8], at: usize) -> Option<u64> {
    let header_bytes = usize::from(head.get(at)? & 0xf) * 4;
    let protocol = *head.get(at + 9)?;
    // More fragments, or not the first one.
    let is_fragment = short(head, at + 6)? & 0x3fff != 0;
    let ports = if is_fragment { 0 } else { ports(head, at + header_bytes.max(20), protocol)? };
    Some(mix(mix(u64::from(protocol), long(head, at + 12)?), ports))
}

/// The same of an IPv6 packet. One with a flow label says itself what its flow is.
fn of_ipv6(head: &[u8], at: usize) -> Option<u64> {
    let label = long(head, at)? >> 32 & 0xf_ffff;
    let addresses = (0..4).try_fold(0, |state, word| Some(mix(state, long(head, at + 8 + word * 8)?)))?;
    let protocol = *head.get(at + 6)?;
    let rest = if label == 0 { ports(head, at + 40, protocol)? << 8 | u64::from(protocol) } else { label };
    Some(mix(addresses, rest))
}

fn hash(head: &[u8]) -> u64 {
    let mut at = 12;
    let mut protocol = short(head, at).unwrap_or(0);
    for _ in 0..2 {
        if VLAN.contains(&protocol) {
            at += 4;
            protocol = short(head, at).unwrap_or(0);
        }
    }
    let inner = match protocol {
        IPV4 => of_ipv4(head, at + 2),
        IPV6 => of_ipv6(head, at + 2),
        _ => None,
    };
    // Everything else is told apart by its stations.
    inner.unwrap_or_else(|| mix(mix(0, long(head, 0).unwrap_or(0)), long(head, 6).unwrap_or(0)))
}

/// The source port for a frame of which these are the first [`HEAD_BYTES`], or all: 49152 to 65535.
#[inline]
#[must_use]
pub fn source_port(head: &[u8]) -> u16 {
    FIRST_PORT | (mix(hash(head), 0) >> (64 - PORT_BITS)) as u16
}

#[cfg(test)]
mod tests;
