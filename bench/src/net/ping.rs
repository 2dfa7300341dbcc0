//! Round trips of echo requests (RFC 792), one after the other: the kernel on the other side answers, so nothing else has to run there.

use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::time::Instant;

use ::tests::Namespace;
use anyhow::{Result, ensure};
use device_svc::driver::latency::Latencies;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, connect, recv, send, setsockopt, socket,
    sockopt,
};
use nix::sys::time::TimeVal;

/// Bytes of a request: the header, and as much as `ping` sends behind it.
const REQUEST_BYTES: usize = 64;
const ECHO_REQUEST: u8 = 8;
const ECHO_REPLY: u8 = 0;
/// Requests that are not counted: addresses are found, caches are filled.
const WARM_UP: usize = 20;
/// A request that is not answered by then is lost.
const PATIENCE: TimeVal = TimeVal::new(1, 0);
/// The Internet checksum is right when all words add up to this.
const WORD_MAX: u32 = 0xffff;

/// A request with this number.
fn request(identifier: u16, number: u16) -> [u8; REQUEST_BYTES] {
    let mut packet = [0; REQUEST_BYTES];
    packet[0] = ECHO_REQUEST;
    packet[4..6].copy_from_slice(&identifier.to_be_bytes());
    packet[6..8].copy_from_slice(&number.to_be_bytes());
    let words = packet.as_chunks::<2>().0.iter().map(|word| u32::from(u16::from_be_bytes(*word)));
    let sum: u32 = words.sum();
    let folded = (sum & WORD_MAX) + (sum >> 16);
    packet[2..4].copy_from_slice(&(!(folded as u16)).to_be_bytes());
    packet
}

/// Whether a packet, with its IP header, is the answer.
fn answers(packet: &[u8], identifier: u16, number: u16) -> bool {
    let header_bytes = packet.first().map_or(0, |first| usize::from(first & 15) * 4);
    let Some(message) = packet.get(header_bytes..) else { return false };
    message.first() == Some(&ECHO_REPLY)
        && message.get(4..6) == Some(&identifier.to_be_bytes())
        && message.get(6..8) == Some(&number.to_be_bytes())
}

/// `count` round trips from a namespace to an address.
pub(super) fn round_trips(namespace: &Namespace, address: Ipv4Addr, count: usize) -> Result<Latencies> {
    namespace.inside(|| {
        let socket = socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Icmp)?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &PATIENCE)?;
        connect(socket.as_raw_fd(), &SockaddrIn::from(std::net::SocketAddrV4::new(address, 0)))?;
        let identifier = std::process::id() as u16;
        let mut latencies = Latencies::default();
        let mut lost = 0;
        let mut bytes = [0; 1500];
        for number in 0..WARM_UP + count {
            let sent = Instant::now();
            send(socket.as_raw_fd(), &request(identifier, number as u16), MsgFlags::empty())?;
            let answered = loop {
                match recv(socket.as_raw_fd(), &mut bytes, MsgFlags::empty()) {
                    Ok(length) if answers(&bytes[..length], identifier, number as u16) => break true,
                    Ok(_) if sent.elapsed().as_secs() < 1 => {}
                    Ok(_) | Err(nix::Error::EAGAIN) => break false,
                    Err(error) => return Err(error.into()),
                }
            };
            if !answered {
                lost += 1;
                ensure!(lost < 5, "{address} does not answer");
            } else if number >= WARM_UP {
                latencies.record(sent.elapsed().as_nanos() as u64);
            }
        }
        Ok(latencies)
    })
}

#[cfg(test)]
mod tests;
