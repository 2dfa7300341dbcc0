//! Which frames a function brings to its VM (virtio 1.3, 5.1.6.5.1 to 5.1.6.5.3): by the address they are for, and by their VLAN.
//!
//! Without a control queue there is nobody to say, and all are brought; so it is after a reset until the driver says something.

pub use crate::backend::net::Octets;
use crate::backend::net::{ETHERNET_BYTES, VLAN_TAG_BYTES};

/// Addresses of each kind that a driver can name; one that names more gets all of that kind (virtio 1.3, 5.1.6.5.2).
pub(super) const TABLE_MAX: usize = 64;
/// Everybody's address.
pub(super) const BROADCAST: Octets = [0xff; 6];
const VLANS: usize = 4096;
/// The Ethernet type of a VLAN tag (IEEE 802.1Q).
const TAGGED: [u8; 2] = [0x81, 0x00];

/// Whether an address names a group of stations.
#[inline]
#[must_use]
pub(super) const fn is_group(address: Octets) -> bool {
    address[0] & 1 != 0
}

/// Which frames of one kind of address are brought.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Which {
    /// Those that are named.
    Named,
    /// All.
    All,
    /// None.
    None,
}

/// Which frames are brought.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Filter {
    mac: Octets,
    pub(super) promiscuous: bool,
    pub(super) unicast: Which,
    pub(super) multicast: Which,
    pub(super) broadcast: bool,
    named: Vec<Octets>,
    named_groups: Vec<Octets>,
    too_many: bool,
    too_many_groups: bool,
    /// A bit for each VLAN; nothing while VLANs are not filtered.
    vlans: Option<Box<[u64; VLANS / 64]>>,
}

impl Filter {
    /// Everything is brought; `mac` is the function's address once that matters.
    #[must_use]
    pub const fn all(mac: Octets) -> Self {
        Self {
            mac,
            promiscuous: true,
            unicast: Which::Named,
            multicast: Which::Named,
            broadcast: true,
            named: Vec::new(),
            named_groups: Vec::new(),
            too_many: false,
            too_many_groups: false,
            vlans: None,
        }
    }

    /// The function has another address.
    pub const fn set_mac(&mut self, mac: Octets) {
        self.mac = mac;
    }

    /// The addresses that the driver names beside its own: single stations, then groups.
    pub(super) fn set_tables(&mut self, named: &[Octets], groups: &[Octets]) {
        (self.too_many, self.too_many_groups) = (named.len() > TABLE_MAX, groups.len() > TABLE_MAX);
        self.named = named.iter().copied().take(TABLE_MAX).collect();
        self.named_groups = groups.iter().copied().take(TABLE_MAX).collect();
    }

    /// VLANs are filtered: from the first that is named on, others are not brought.
    pub(super) fn set_vlan(&mut self, vlan: u16, brought: bool) {
        let vlans = self.vlans.get_or_insert_with(|| Box::new([0; VLANS / 64]));
        let (word, bit) = (usize::from(vlan % VLANS as u16) / 64, 1 << (vlan % 64));
        if brought {
            vlans[word] |= bit;
        } else {
            vlans[word] &= !bit;
        }
    }

    /// Whether a frame is brought. A frame without a whole Ethernet header is for nobody.
    #[inline]
    #[must_use]
    pub fn brings(&self, frame: &[u8]) -> bool {
        if frame.len() < ETHERNET_BYTES as usize {
            return false;
        }
        (self.promiscuous && self.vlans.is_none()) || self.brings_filtered(frame)
    }

    fn brings_filtered(&self, frame: &[u8]) -> bool {
        let Some(destination) = frame.first_chunk::<6>().copied() else { return false };
        let tag = frame.get(12..(ETHERNET_BYTES + VLAN_TAG_BYTES) as usize);
        if let (Some(vlans), Some([a, b, high, low, ..])) = (&self.vlans, tag)
            && [*a, *b] == TAGGED
        {
            let vlan = u16::from_be_bytes([*high, *low]) % VLANS as u16;
            // VLAN 0 is none: the tag is there for its priority.
            if vlan != 0 && vlans[usize::from(vlan) / 64] >> (vlan % 64) & 1 == 0 {
                return false;
            }
        }
        if self.promiscuous {
            return true;
        }
        if destination == BROADCAST {
            return self.broadcast;
        }
        let (which, named, too_many) = if is_group(destination) {
            (self.multicast, &self.named_groups, self.too_many_groups)
        } else {
            (self.unicast, &self.named, self.too_many)
        };
        match which {
            Which::All => true,
            Which::None => false,
            Which::Named => too_many || destination == self.mac || named.contains(&destination),
        }
    }
}
