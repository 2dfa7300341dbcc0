//! The source port of an encapsulated frame: a hash of the flow inside, so that routers with several ways, and the queues of whoever
//! receives, spread flows without looking inside, and no flow is torn apart (RFC 7348, section 5; RFC 8926, section 3.3).
//!
//! The hash is no secret: all that it decides is which way a frame takes.

use crate::backend::net::flow::{Flow, mix};

/// Bytes from the front of a frame that are looked at: Ethernet, two VLAN tags, IPv6, ports.
pub const HEAD_BYTES: usize = 14 + 8 + 40 + 4;

/// The first of the ports that are for anyone's use (RFC 6335): 49152 to 65535.
const FIRST_PORT: u16 = 0xc000;
const PORT_BITS: u32 = 14;

/// The source port for a frame of which these are the first [`HEAD_BYTES`], or all: 49152 to 65535.
#[inline]
#[must_use]
pub fn source_port(head: &[u8]) -> u16 {
    let hash = match Flow::of(head) {
        Some(flow) => flow.mixed(),
        // What is not IP is told apart by its stations.
        None => {
            let (words, _) = head.get(..12).unwrap_or_default().as_chunks::<4>();
            words.iter().fold(0, |state, word| mix(state, u64::from(u32::from_be_bytes(*word))))
        }
    };
    FIRST_PORT | (mix(hash, 0) >> (64 - PORT_BITS)) as u16
}

#[cfg(test)]
mod tests;
