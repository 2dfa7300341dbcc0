//! Frames for tests of networks of the kernel's, and who gives and takes them.
#![expect(unsafe_code, reason = "describes frames by their addresses")]

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::socket::{MsgFlags, recv, send};

use super::until;
use crate::backend::Segments;
use crate::backend::net::{Checksum, NetChannel, NetHeader, Outgoing, Sent};

/// An EtherType for experiments: nobody in the kernel answers.
pub(in crate::backend::net) const EXPERIMENT: u16 = 0x88b5;

/// A frame with a number in it.
pub(in crate::backend::net) fn frame(number: usize, bytes: usize) -> Vec<u8> {
    let mut frame = vec![0x5a; bytes];
    frame[..12].copy_from_slice(&[2, 0, 0, 0, 0, 0x77, 2, 0, 0, 0, 0, 1]);
    frame[12..14].copy_from_slice(&EXPERIMENT.to_be_bytes());
    frame[14..18].copy_from_slice(&(number as u32).to_le_bytes());
    frame
}

pub(in crate::backend::net) fn number(frame: &[u8]) -> usize {
    u32::from_le_bytes(frame[14..18].try_into().unwrap()) as usize
}

/// Gives frames to a channel, each in two ranges.
pub(in crate::backend::net) fn transmit(channel: &mut dyn NetChannel, frames: &[(NetHeader, Vec<u8>)]) -> Sent {
    let ranges: Vec<[libc::iovec; 2]> = frames
        .iter()
        .map(|(_, bytes)| {
            let (first, rest) = bytes.split_at(bytes.len() / 2);
            [first, rest].map(|part| libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() })
        })
        .collect();
    let outgoing: Vec<Outgoing> = frames
        .iter()
        .zip(&ranges)
        .map(|((header, bytes), ranges)| Outgoing {
            header: *header,
            // SAFETY: the ranges outlive the call.
            segments: unsafe { Segments::new(ranges.as_ptr(), 2) },
            bytes: bytes.len() as u32,
        })
        .collect();
    channel.transmit(&outgoing)
}

pub(in crate::backend::net) fn plain(numbers: std::ops::Range<usize>, bytes: usize) -> Vec<(NetHeader, Vec<u8>)> {
    numbers.map(|number| (NetHeader::DONE, frame(number, bytes))).collect()
}

/// What a packet socket has.
pub(in crate::backend::net) fn received(packets: &OwnedFd) -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    let mut buffer = vec![0; 70000];
    while let Ok(bytes) = recv(packets.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
        all.push(buffer[..bytes].to_vec());
    }
    all
}

/// Takes the next `count` frames from a channel.
#[track_caller]
pub(in crate::backend::net) fn take(channel: &mut dyn NetChannel, count: usize) -> Vec<(NetHeader, Vec<u8>)> {
    let mut all = Vec::new();
    until(|| {
        let frames = channel.receive(count - all.len());
        all.extend(frames.iter().map(|frame| (frame.header, frame.bytes().to_vec())));
        let taken = frames.len();
        channel.release(taken);
        all.len() >= count
    });
    all
}

pub(in crate::backend::net) fn all_sent(count: usize) -> Sent {
    Sent { taken: count, lost: 0 }
}

/// A packet of IPv4 from 10.9.8.2 to 10.9.8.1 with a checksum that is still to be computed, in a frame for `to`.
pub(in crate::backend::net) fn transport(
    to: [u8; 6],
    protocol: u8,
    ports: (u16, u16),
    payload: usize,
) -> (Vec<u8>, Checksum) {
    let (header_bytes, offset) = if protocol == 6 { (20, 16) } else { (8, 6) };
    let length = header_bytes + payload;
    let mut frame = vec![0; 34];
    frame[..6].copy_from_slice(&to);
    frame[6..12].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
    frame[12..14].copy_from_slice(&[8, 0]);
    frame[14] = 0x45;
    frame[16..18].copy_from_slice(&((20 + length) as u16).to_be_bytes());
    frame[22] = 64;
    frame[23] = protocol;
    frame[26..34].copy_from_slice(&[10, 9, 8, 2, 10, 9, 8, 1]);
    let checksum = !sum(0, &frame[14..34]);
    frame[24..26].copy_from_slice(&checksum.to_be_bytes());
    let pseudo = sum(u32::from(protocol) + length as u32, &frame[26..34]);
    frame.extend(ports.0.to_be_bytes());
    frame.extend(ports.1.to_be_bytes());
    if protocol == 6 {
        frame.extend([0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff]);
    } else {
        frame.extend((length as u16).to_be_bytes());
    }
    frame.extend([0; 4]);
    frame.truncate(34 + header_bytes);
    frame[34 + offset..36 + offset].copy_from_slice(&pseudo.to_be_bytes());
    frame.extend((0..payload).map(|byte| byte as u8));
    (frame, Checksum::Needed { start: 34, offset: offset as u16 })
}

pub(in crate::backend::net) fn sum(start: u32, bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum = start + words.sum::<u32>();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// Whether the checksum of a TCP packet is right.
pub(in crate::backend::net) fn is_valid(frame: &[u8]) -> bool {
    let length = u16::from_be_bytes(frame[16..18].try_into().unwrap()) - 20;
    let pseudo = sum(u32::from(frame[23]) + u32::from(length), &frame[26..34]);
    sum(pseudo.into(), &frame[34..34 + usize::from(length)]) == 0xffff
}

/// Waits for edges as a reactor does.
pub(in crate::backend::net) struct Sleeper(Epoll);

impl Sleeper {
    pub(in crate::backend::net) fn new(channel: &dyn NetChannel) -> Self {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        // SAFETY: the channel outlives the sleeper.
        let fd = unsafe { BorrowedFd::borrow_raw(channel.wake_fd().unwrap()) };
        epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 0)).unwrap();
        Self(epoll)
    }

    pub(in crate::backend::net) fn is_woken(&self, wait_ms: u16) -> bool {
        self.0.wait(&mut [EpollEvent::empty()], wait_ms).unwrap() == 1
    }
}

/// Sends a frame by a packet socket.
pub(in crate::backend::net) fn give(packets: &OwnedFd, bytes: &[u8]) {
    assert_eq!(send(packets.as_raw_fd(), bytes, MsgFlags::empty()), Ok(bytes.len()));
}

/// The same frame with a VLAN tag.
pub(in crate::backend::net) fn tagged(mut frame: Vec<u8>, tag: [u8; 4]) -> Vec<u8> {
    frame.splice(12..12, tag);
    frame
}
