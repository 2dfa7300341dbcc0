//! How frames for a VM are hashed, and which queue pair a hash leads to (virtio 1.3, 5.1.6.4.3 and 5.1.6.5.7).

use virtio_bindings::virtio_net as spec;
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::command::BadCommand;
use crate::backend::net::flow::{Flow, KEY_BYTES, Protocol, Toeplitz};

/// Entries of an indirection table at most: what the specification asks for at least.
pub(super) const TABLE_ENTRIES_MAX: u16 = 128;
/// Bytes of a key at most.
pub(super) const KEY_BYTES_MAX: u8 = KEY_BYTES as u8;
/// What can be hashed: addresses of either version of IP, alone or with the ports of TCP or UDP.
pub(super) const TYPES: u32 = {
    let (v4, v6) = (&KINDS[0], &KINDS[1]);
    v4[0].0 | v4[1].0 | v4[2].0 | v6[0].0 | v6[1].0 | v6[2].0
};
/// For either version of IP: what asks for a hash of addresses alone, of TCP and of UDP, and how each is reported.
const KINDS: [[(u32, u32); 3]; 2] = [
    [
        (spec::VIRTIO_NET_RSS_HASH_TYPE_IPv4, spec::VIRTIO_NET_HASH_REPORT_IPv4),
        (spec::VIRTIO_NET_RSS_HASH_TYPE_TCPv4, spec::VIRTIO_NET_HASH_REPORT_TCPv4),
        (spec::VIRTIO_NET_RSS_HASH_TYPE_UDPv4, spec::VIRTIO_NET_HASH_REPORT_UDPv4),
    ],
    [
        (spec::VIRTIO_NET_RSS_HASH_TYPE_IPv6, spec::VIRTIO_NET_HASH_REPORT_IPv6),
        (spec::VIRTIO_NET_RSS_HASH_TYPE_TCPv6, spec::VIRTIO_NET_HASH_REPORT_TCPv6),
        (spec::VIRTIO_NET_RSS_HASH_TYPE_UDPv6, spec::VIRTIO_NET_HASH_REPORT_UDPv6),
    ],
];

/// A frame's hash and what was hashed, as its header reports them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct FrameHash {
    /// The hash; 0 if nothing was hashed.
    pub(super) value: u32,
    /// `VIRTIO_NET_HASH_REPORT_…`
    pub(super) report: u16,
}

/// What the driver asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hashing {
    types: u32,
    toeplitz: Toeplitz,
    /// Where hashes lead to; nothing if they are only reported.
    table: Option<Table>,
}

/// Queue pairs by the low bits of the hash.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Table {
    /// A power of two of them.
    pairs: Vec<u16>,
    /// For frames that are not hashed.
    unclassified: u16,
}

/// The first part of `struct virtio_net_rss_config`.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RssHead {
    types: U32,
    mask: U16,
    unclassified: U16,
}

/// The first part of `struct virtio_net_hash_config`.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct HashHead {
    types: U32,
    _reserved: [u8; 8],
}

fn toeplitz(data: &[u8]) -> Result<Toeplitz, BadCommand> {
    let (length, rest) = data.split_first().ok_or(BadCommand)?;
    // What is behind it is nothing to us: Linux 6.12 sends one byte more than it says.
    let key = rest.get(..usize::from(*length)).filter(|key| key.len() <= KEY_BYTES).ok_or(BadCommand)?;
    let mut whole = [0; KEY_BYTES];
    whole[..key.len()].copy_from_slice(key);
    Ok(Toeplitz::new(&whole))
}

const fn known_types(types: u32) -> Result<u32, BadCommand> {
    if types & !TYPES == 0 { Ok(types) } else { Err(BadCommand) }
}

impl Hashing {
    /// Reads the data of `VIRTIO_NET_CTRL_MQ_RSS_CONFIG`, on a function with so many pairs. Returns how many are used from then on.
    pub(super) fn parse_rss(data: &[u8], pairs: u16) -> Result<(Self, u16), BadCommand> {
        let (head, rest) = RssHead::ref_from_prefix(data).map_err(|_| BadCommand)?;
        let entries = usize::from(head.mask.get()) + 1;
        if !entries.is_power_of_two() || entries > usize::from(TABLE_ENTRIES_MAX) {
            return Err(BadCommand);
        }
        let (table, rest) = <[U16]>::ref_from_prefix_with_elems(rest, entries).map_err(|_| BadCommand)?;
        let (transmitting, rest) = U16::ref_from_prefix(rest).map_err(|_| BadCommand)?;
        // The numbers are those of receiving queues, halved: pairs.
        let table =
            Table { pairs: table.iter().map(|pair| pair.get()).collect(), unclassified: head.unclassified.get() };
        let highest = table.pairs.iter().copied().fold(table.unclassified, u16::max);
        let transmitting = transmitting.get();
        if highest >= pairs || !(1..=pairs).contains(&transmitting) {
            return Err(BadCommand);
        }
        let hashing = Self { types: known_types(head.types.get())?, toeplitz: toeplitz(rest)?, table: Some(table) };
        Ok((hashing, transmitting.max(highest + 1)))
    }

    /// Reads the data of `VIRTIO_NET_CTRL_MQ_HASH_CONFIG`.
    pub(super) fn parse_hash(data: &[u8]) -> Result<Self, BadCommand> {
        let (head, rest) = HashHead::ref_from_prefix(data).map_err(|_| BadCommand)?;
        Ok(Self { types: known_types(head.types.get())?, toeplitz: toeplitz(rest)?, table: None })
    }

    /// These settings with what is hashed of other ones, and their own table.
    pub(super) fn with_table_of(self, other: Option<&Self>) -> Self {
        Self { table: other.and_then(|other| other.table.clone()), ..self }
    }

    /// These settings without a table: hashes are reported, and lead nowhere.
    pub(super) fn without_table(&self) -> Self {
        Self { table: None, ..self.clone() }
    }

    /// A frame's hash.
    #[inline]
    pub(super) fn of(&self, frame: &[u8]) -> FrameHash {
        const NONE: FrameHash = FrameHash { value: 0, report: spec::VIRTIO_NET_HASH_REPORT_NONE as u16 };
        if self.types == 0 {
            return NONE;
        }
        let Some(flow) = Flow::of(frame) else { return NONE };
        let [alone, tcp, udp] = KINDS[usize::from(flow.is_ipv6)];
        let with_ports = match flow.protocol {
            Protocol::Ip => None,
            Protocol::Tcp => Some(tcp),
            Protocol::Udp => Some(udp),
        };
        // The most that was asked for.
        let kinds = [with_ports.map(|kind| (kind, true)), Some((alone, false))];
        let wanted = kinds.into_iter().flatten().find(|((kind, _), _)| self.types & kind != 0);
        wanted.map_or(NONE, |((_, report), with_ports)| FrameHash {
            value: self.toeplitz.hash(flow.text(with_ports)),
            report: report as u16,
        })
    }

    /// The pair that a frame is for, if the driver said so.
    #[inline]
    pub(super) fn pair_of(&self, frame: &[u8]) -> Option<u16> {
        let table = self.table.as_ref()?;
        let FrameHash { value, report } = self.of(frame);
        if u32::from(report) == spec::VIRTIO_NET_HASH_REPORT_NONE {
            return Some(table.unclassified);
        }
        table.pairs.get(value as usize & (table.pairs.len() - 1)).copied()
    }
}

#[cfg(test)]
pub(super) mod tests;
