//! The driver's commands (virtio 1.3, 5.1.6.5): bytes to something that cannot be wrong, and what it changes.

use std::sync::Arc;

use virtio_bindings::virtio_net as spec;

use super::NetShared;
use super::filter::{Octets, Which, is_group};
use super::hashing::Hashing;
use super::offered::{RECEIVE_FEATURES, RECEIVE_USO6, receive_offloads};
use crate::backend::net::Offloads;

/// Bytes of the longest command: tables of addresses far larger than are kept.
pub(super) const COMMAND_BYTES_MAX: u32 = 4096;
/// The part before a command's own data: class and command.
const PREFIX_BYTES: usize = 2;

/// A command, understood.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Command {
    Promiscuous(bool),
    Unicast(Which),
    Multicast(Which),
    Broadcast(bool),
    Addresses {
        named: Vec<Octets>,
        groups: Vec<Octets>,
    },
    Address(Octets),
    Vlan {
        vlan: u16,
        brought: bool,
    },
    Announced,
    Pairs(u16),
    Undone(Offloads),
    /// Frames go where their hash leads; so many pairs are used.
    Steer(Box<Hashing>, u16),
    /// Hashes are reported.
    Hash(Box<Hashing>),
}

/// A command that is not one, or is not negotiated: the driver is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a command that is not known, not negotiated or not whole")]
pub(super) struct BadCommand;

fn on_or_off(data: &[u8]) -> Result<bool, BadCommand> {
    match data {
        [0] => Ok(false),
        [1] => Ok(true),
        _ => Err(BadCommand),
    }
}

fn number(data: &[u8]) -> Result<u16, BadCommand> {
    data.try_into().map(u16::from_le_bytes).map_err(|_| BadCommand)
}

/// One table of addresses (`struct virtio_net_ctrl_mac`), and what stands behind it.
fn table(data: &[u8]) -> Result<(Vec<Octets>, &[u8]), BadCommand> {
    let (count, rest) = data.split_first_chunk::<4>().ok_or(BadCommand)?;
    let bytes = (u32::from_le_bytes(*count) as usize).checked_mul(6).ok_or(BadCommand)?;
    let (addresses, rest) = rest.split_at_checked(bytes).ok_or(BadCommand)?;
    Ok((addresses.as_chunks::<6>().0.to_vec(), rest))
}

impl Command {
    /// Reads a command of a driver that accepted these features, on a function with so many pairs.
    pub(super) fn parse(bytes: &[u8], accepted: u64, pairs: u16) -> Result<Self, BadCommand> {
        let (&[class, command], data) = bytes.split_first_chunk::<PREFIX_BYTES>().ok_or(BadCommand)?;
        let negotiated = |bit: u32| if accepted >> bit & 1 == 1 { Ok(()) } else { Err(BadCommand) };
        match u32::from(class) {
            spec::VIRTIO_NET_CTRL_RX => {
                let command = u32::from(command);
                let extra = command > spec::VIRTIO_NET_CTRL_RX_ALLMULTI;
                negotiated(if extra { spec::VIRTIO_NET_F_CTRL_RX_EXTRA } else { spec::VIRTIO_NET_F_CTRL_RX })?;
                let on = on_or_off(data)?;
                let or_named = |which: Which| if on { which } else { Which::Named };
                Ok(match command {
                    spec::VIRTIO_NET_CTRL_RX_PROMISC => Self::Promiscuous(on),
                    spec::VIRTIO_NET_CTRL_RX_ALLMULTI => Self::Multicast(or_named(Which::All)),
                    spec::VIRTIO_NET_CTRL_RX_ALLUNI => Self::Unicast(or_named(Which::All)),
                    spec::VIRTIO_NET_CTRL_RX_NOMULTI => Self::Multicast(or_named(Which::None)),
                    spec::VIRTIO_NET_CTRL_RX_NOUNI => Self::Unicast(or_named(Which::None)),
                    spec::VIRTIO_NET_CTRL_RX_NOBCAST => Self::Broadcast(!on),
                    _ => return Err(BadCommand),
                })
            }
            spec::VIRTIO_NET_CTRL_MAC => match u32::from(command) {
                spec::VIRTIO_NET_CTRL_MAC_TABLE_SET => {
                    negotiated(spec::VIRTIO_NET_F_CTRL_RX)?;
                    let (named, rest) = table(data)?;
                    let (groups, rest) = table(rest)?;
                    if rest.is_empty() { Ok(Self::Addresses { named, groups }) } else { Err(BadCommand) }
                }
                spec::VIRTIO_NET_CTRL_MAC_ADDR_SET => {
                    negotiated(spec::VIRTIO_NET_F_CTRL_MAC_ADDR)?;
                    let address = Octets::try_from(data).map_err(|_| BadCommand)?;
                    if is_group(address) { Err(BadCommand) } else { Ok(Self::Address(address)) }
                }
                _ => Err(BadCommand),
            },
            spec::VIRTIO_NET_CTRL_VLAN => {
                negotiated(spec::VIRTIO_NET_F_CTRL_VLAN)?;
                let brought = match u32::from(command) {
                    spec::VIRTIO_NET_CTRL_VLAN_ADD => true,
                    spec::VIRTIO_NET_CTRL_VLAN_DEL => false,
                    _ => return Err(BadCommand),
                };
                let vlan = number(data)?;
                if vlan < 4096 { Ok(Self::Vlan { vlan, brought }) } else { Err(BadCommand) }
            }
            spec::VIRTIO_NET_CTRL_ANNOUNCE => {
                negotiated(spec::VIRTIO_NET_F_GUEST_ANNOUNCE)?;
                let ack = u32::from(command) == spec::VIRTIO_NET_CTRL_ANNOUNCE_ACK && data.is_empty();
                if ack { Ok(Self::Announced) } else { Err(BadCommand) }
            }
            spec::VIRTIO_NET_CTRL_MQ => match u32::from(command) {
                spec::VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET => {
                    negotiated(spec::VIRTIO_NET_F_MQ)?;
                    let wanted = number(data)?;
                    if (1..=pairs).contains(&wanted) { Ok(Self::Pairs(wanted)) } else { Err(BadCommand) }
                }
                spec::VIRTIO_NET_CTRL_MQ_RSS_CONFIG => {
                    negotiated(spec::VIRTIO_NET_F_RSS)?;
                    Hashing::parse_rss(data, pairs).map(|(hashing, used)| Self::Steer(Box::new(hashing), used))
                }
                spec::VIRTIO_NET_CTRL_MQ_HASH_CONFIG => {
                    negotiated(spec::VIRTIO_NET_F_HASH_REPORT)?;
                    Hashing::parse_hash(data).map(|hashing| Self::Hash(Box::new(hashing)))
                }
                _ => Err(BadCommand),
            },
            spec::VIRTIO_NET_CTRL_GUEST_OFFLOADS => {
                negotiated(spec::VIRTIO_NET_F_CTRL_GUEST_OFFLOADS)?;
                if u32::from(command) != spec::VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET {
                    return Err(BadCommand);
                }
                let wanted = data.try_into().map(u64::from_le_bytes).map_err(|_| BadCommand)?;
                // Only what was negotiated can be chosen from (virtio 1.3, 5.1.6.5.6.2).
                let may = receive_offload_bits(accepted);
                if wanted & !may == 0 { Ok(Self::Undone(receive_offloads(wanted))) } else { Err(BadCommand) }
            }
            _ => Err(BadCommand),
        }
    }

    /// Whether channels are enabled or disabled for it, or told to do more or less.
    pub(super) const fn changes_channels(&self) -> bool {
        matches!(self, Self::Pairs(_) | Self::Steer(..) | Self::Undone(_))
    }

    /// Does it.
    ///
    /// # Errors
    /// When the function may not have the address that it is given.
    pub(super) fn carry_out(self, shared: &NetShared) -> Result<(), BadCommand> {
        if self == Self::Announced {
            shared.announced();
            return Ok(());
        }
        if let Self::Address(mac) = self {
            if !shared.may_be(mac) {
                return Err(BadCommand);
            }
            shared.set_mac(mac);
            return Ok(());
        }
        let done: Result<(), std::convert::Infallible> = shared.choose(|chosen| {
            let filter = &mut chosen.filter;
            match self {
                Self::Promiscuous(on) => filter.promiscuous = on,
                Self::Unicast(which) => filter.unicast = which,
                Self::Multicast(which) => filter.multicast = which,
                Self::Broadcast(on) => filter.broadcast = on,
                Self::Addresses { named, groups } => filter.set_tables(&named, &groups),
                Self::Vlan { vlan, brought } => filter.set_vlan(vlan, brought),
                Self::Pairs(pairs) => {
                    // The device steers by its own rules again (virtio 1.3, 5.1.6.5.5).
                    chosen.pairs = pairs;
                    chosen.hashing = chosen.hashing.as_ref().map(|hashing| Arc::new(hashing.without_table()));
                }
                Self::Steer(hashing, pairs) => {
                    chosen.pairs = pairs;
                    chosen.hashing = Some(Arc::new(*hashing));
                }
                Self::Hash(hashing) => {
                    chosen.hashing = Some(Arc::new(hashing.with_table_of(chosen.hashing.as_deref())));
                }
                Self::Undone(offloads) => chosen.undone = Some(offloads),
                Self::Announced | Self::Address(_) => {}
            }
            Ok(())
        });
        let Ok(()) = done;
        Ok(())
    }
}

/// The feature bits that choose what may be left undone for the driver.
fn receive_offload_bits(accepted: u64) -> u64 {
    let bits = RECEIVE_FEATURES.into_iter().chain([RECEIVE_USO6]);
    accepted & bits.fold(0, |all, bit| all | 1 << bit)
}
