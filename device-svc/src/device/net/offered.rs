//! What a virtio-net function offers: feature bits, and its configuration space (virtio 1.3, 5.1.3 and 5.1.4).

use std::sync::atomic::Ordering;

use virtio_bindings::virtio_net as spec;
use zerocopy::{Immutable, IntoBytes};

use super::{NetSettings, NetShared, hashing};
use crate::backend::net::Offloads;
use crate::backend::net::header::HEADER_BYTES;
use crate::virtqueue::features;

/// Bytes of the header of a driver that knows nothing of virtio 1, nor of merged buffers (virtio 1.3, 5.1.6.1).
const LEGACY_HEADER_BYTES: u32 = HEADER_BYTES - 2;
/// Bytes of the header that has the frame's hash behind it (virtio 1.3, 5.1.6.1).
pub(super) const HASH_HEADER_BYTES: u32 = HEADER_BYTES + 8;
/// The speed of a link that nobody knows (virtio 1.3, 5.1.4).
const SPEED_UNKNOWN: u32 = u32::MAX;
const DUPLEX_FULL: u8 = 1;

/// `struct virtio_net_config` up to what we offer (virtio 1.3, 5.1.4).
#[derive(IntoBytes, Immutable, Debug)]
#[repr(C)]
struct ConfigSpace {
    mac: [u8; 6],
    status: u16,
    pairs: u16,
    mtu: u16,
    speed: u32,
    duplex: u8,
    rss_key_bytes: u8,
    rss_table_entries: u16,
    hash_types: u32,
}

/// Features that go with the offloads when the card takes frames from the driver: checksum, TSO 4 and 6, ECN, USO.
const TRANSMIT_FEATURES: [u32; 5] = [
    spec::VIRTIO_NET_F_CSUM,
    spec::VIRTIO_NET_F_HOST_TSO4,
    spec::VIRTIO_NET_F_HOST_TSO6,
    spec::VIRTIO_NET_F_HOST_ECN,
    spec::VIRTIO_NET_F_HOST_USO,
];

/// Features that go with the offloads when the card brings frames to the driver, in the same order. Datagrams have two: one for each
/// version of IP.
pub(super) const RECEIVE_FEATURES: [u32; 5] = [
    spec::VIRTIO_NET_F_GUEST_CSUM,
    spec::VIRTIO_NET_F_GUEST_TSO4,
    spec::VIRTIO_NET_F_GUEST_TSO6,
    spec::VIRTIO_NET_F_GUEST_ECN,
    spec::VIRTIO_NET_F_GUEST_USO4,
];
pub(super) const RECEIVE_USO6: u32 = spec::VIRTIO_NET_F_GUEST_USO6;

fn offloads_of(features: u64, bits: [u32; 5]) -> Offloads {
    let has = |bit: u32| features >> bit & 1 == 1;
    let [checksum, tso4, tso6, ecn, uso] = bits.map(has);
    Offloads { checksum, tso4, tso6, ecn, uso }
}

/// What the driver may leave undone.
pub(super) fn transmit_offloads(features: u64) -> Offloads {
    offloads_of(features, TRANSMIT_FEATURES)
}

/// What may be left undone for the driver, unless it chooses less.
pub(super) fn receive_offloads(features: u64) -> Offloads {
    let offloads = offloads_of(features, RECEIVE_FEATURES);
    // A datagram to be cut may be of either version.
    Offloads { uso: offloads.uso && features >> RECEIVE_USO6 & 1 == 1, ..offloads }
}

/// Bytes of the header before each frame.
pub(super) const fn header_bytes(accepted: u64) -> u32 {
    if accepted & 1 << spec::VIRTIO_NET_F_HASH_REPORT != 0 {
        HASH_HEADER_BYTES
    } else if accepted & (features::VERSION_1 | 1 << spec::VIRTIO_NET_F_MRG_RXBUF) != 0 {
        HEADER_BYTES
    } else {
        LEGACY_HEADER_BYTES
    }
}

impl NetShared {
    /// The device's feature bits.
    #[must_use]
    pub fn offered_features(&self) -> u64 {
        let mut bits = features::VERSION_1 | features::INDIRECT | features::EVENT_INDEX | features::IN_ORDER;
        let NetSettings { packed, pairs, control, .. } = self.settings;
        let always = [
            spec::VIRTIO_NET_F_MAC,
            spec::VIRTIO_NET_F_MTU,
            spec::VIRTIO_NET_F_STATUS,
            spec::VIRTIO_NET_F_MRG_RXBUF,
            spec::VIRTIO_NET_F_SPEED_DUPLEX,
        ];
        let commands = [
            spec::VIRTIO_NET_F_CTRL_VQ,
            spec::VIRTIO_NET_F_CTRL_RX,
            spec::VIRTIO_NET_F_CTRL_RX_EXTRA,
            spec::VIRTIO_NET_F_CTRL_VLAN,
            spec::VIRTIO_NET_F_CTRL_MAC_ADDR,
            spec::VIRTIO_NET_F_GUEST_ANNOUNCE,
        ];
        bits |= always.into_iter().chain(commands.into_iter().filter(|_| control)).fold(0, |all, bit| all | 1 << bit);
        if packed {
            bits |= features::RING_PACKED;
        }
        if pairs > 1 {
            bits |= 1 << spec::VIRTIO_NET_F_MQ;
        }
        if self.hashes() {
            bits |= 1 << spec::VIRTIO_NET_F_RSS | 1 << spec::VIRTIO_NET_F_HASH_REPORT;
        }
        let Offloads { checksum, tso4, tso6, ecn, uso } = self.uplink.transmit;
        let transmit = TRANSMIT_FEATURES.into_iter().zip([checksum, tso4, tso6, ecn, uso]);
        bits |= transmit.filter(|(_, offered)| *offered).fold(0, |all, (bit, _)| all | 1 << bit);
        let Offloads { checksum, tso4, tso6, ecn, uso } = self.uplink.receive;
        let receive = RECEIVE_FEATURES.into_iter().zip([checksum, tso4, tso6, ecn, uso]);
        let further = [(RECEIVE_USO6, uso), (spec::VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, control && checksum)];
        receive.chain(further).filter(|(_, offered)| *offered).fold(bits, |all, (bit, _)| all | 1 << bit)
    }

    pub(super) const fn hashes(&self) -> bool {
        self.settings.rss && self.settings.control
    }

    /// The configuration space.
    #[must_use]
    pub fn config_space(&self) -> Vec<u8> {
        let up = if self.is_link_up() { spec::VIRTIO_NET_S_LINK_UP } else { 0 };
        let announce = if self.announce.load(Ordering::Acquire) { spec::VIRTIO_NET_S_ANNOUNCE } else { 0 };
        let space = ConfigSpace {
            mac: self.mac(),
            status: (up | announce) as u16,
            pairs: self.settings.pairs,
            mtu: self.mtu(),
            speed: SPEED_UNKNOWN,
            duplex: DUPLEX_FULL,
            rss_key_bytes: if self.hashes() { hashing::KEY_BYTES_MAX } else { 0 },
            rss_table_entries: if self.hashes() { hashing::TABLE_ENTRIES_MAX } else { 0 },
            hash_types: if self.hashes() { hashing::TYPES } else { 0 },
        };
        space.as_bytes().to_vec()
    }
}
