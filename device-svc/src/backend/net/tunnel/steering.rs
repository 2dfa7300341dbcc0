//! Which socket of one address and port a datagram goes to: a classic BPF program that reads the number of its network, and among the
//! channels of that network chooses by the sender's source port, so that a flow stays with one channel.
//!
//! The kernel runs it over the payload of a datagram (`SO_ATTACH_REUSEPORT_CBPF`) and takes what it returns as a place in the group of
//! sockets. It is assembled here anew whenever a channel is enabled or not.

use std::collections::BTreeMap;

use super::wire::VNI_AT;

/// The place of a socket that takes what is for nobody.
pub(super) const NOBODY: u32 = 0;
/// Sockets of a group at most. Each takes four instructions or fewer, and a program may have 4096 and 20 KiB of memory
/// (`net.core.optmem_max` as older kernels have it, at 8 bytes for each of two that an instruction may become).
pub(super) const SOCKETS_MAX: usize = 320;
/// Channels of one network at most: a jump over all of them has 8 bits.
pub(super) const CHANNELS_MAX: u16 = 64;

/// A socket that wants datagrams of a network.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Wanted {
    pub(super) vni: u32,
    /// Its place in the group.
    pub(super) place: u32,
}

const LOAD_WORD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const LOAD_HALF: u32 = libc::BPF_LD | libc::BPF_H | libc::BPF_ABS;
const SHIFT_RIGHT: u32 = libc::BPF_ALU | libc::BPF_RSH | libc::BPF_K;
const MODULO: u32 = libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K;
const JUMP_IF_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;

const fn instruction(code: u32, if_true: u8, if_false: u8, operand: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt: if_true, jf: if_false, k: operand }
}

/// A program that takes nothing.
pub(super) const NOTHING: [libc::sock_filter; 1] = [instruction(RETURN, 0, 0, 0)];

/// The program for these sockets; `ip_header_bytes` are those of the underlay's IP without options, 20 or 40.
pub(super) fn program(wanted: impl IntoIterator<Item = Wanted>, ip_header_bytes: u32) -> Vec<libc::sock_filter> {
    let mut networks: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
    for Wanted { vni, place } in wanted {
        networks.entry(vni).or_default().push(place);
    }
    // A datagram too short to load from ends the program with 0: nobody.
    let mut program = vec![instruction(LOAD_WORD, 0, 0, VNI_AT as u32), instruction(SHIFT_RIGHT, 0, 0, 8)];
    for (vni, mut places) in networks {
        places.truncate(CHANNELS_MAX.into());
        let choice = choice(&places, ip_header_bytes);
        program.push(instruction(JUMP_IF_EQUAL, 0, choice.len() as u8, vni));
        program.extend(choice);
    }
    program.push(instruction(RETURN, 0, 0, NOBODY));
    program
}

/// Returns one of these places, by the source port.
fn choice(places: &[u32], ip_header_bytes: u32) -> Vec<libc::sock_filter> {
    let Some((last, others)) = places.split_last() else { return NOTHING.to_vec() };
    let mut choice = Vec::new();
    if !others.is_empty() {
        // The network's header is before the payload: such places are named from this negative number on.
        let source_port = (libc::SKF_NET_OFF as u32).wrapping_add(ip_header_bytes);
        choice.push(instruction(LOAD_HALF, 0, 0, source_port));
        choice.push(instruction(MODULO, 0, 0, places.len() as u32));
    }
    for (number, place) in others.iter().enumerate() {
        choice.push(instruction(JUMP_IF_EQUAL, 0, 1, number as u32));
        choice.push(instruction(RETURN, 0, 0, *place));
    }
    choice.push(instruction(RETURN, 0, 0, *last));
    choice
}

#[cfg(test)]
mod tests;
