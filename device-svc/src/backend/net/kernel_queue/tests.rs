//! A queue on a socket of ours, at whose other end is a kernel that says what a test likes.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, send, socketpair};

use super::super::bed::{frame, take, until};
use super::*;

struct Nowhere;

impl Port for Nowhere {
    fn describe(&self) -> String {
        "a socket of a test".to_owned()
    }

    fn attach(&self, _file: &Arc<OwnedFd>, _attached: bool) -> Result<(), Errno> {
        Ok(())
    }

    fn leave_undone(&self, _offloads: Offloads) {}
}

#[test]
fn what_is_no_frame_is_counted_and_holds_up_nothing() {
    if io_uring::IoUring::new(2).is_err() {
        eprintln!("skipped: there is no io_uring here");
        return;
    }
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let (own, kernel) = socketpair(AddressFamily::Unix, SockType::Datagram, None, flags).unwrap();
    let mut queue = KernelQueue::new(Arc::new(Nowhere), own, Kind::Tap, Users::One).unwrap();
    queue.enable(true);
    let good = |number| [&[0; HEADER_BYTES as usize][..], &frame(number, 60)].concat();
    let with = |at: usize, bytes: &[u8]| {
        let mut message = good(9);
        message[at..at + bytes.len()].copy_from_slice(bytes);
        message
    };
    let bad: [&[u8]; 7] = [
        &[],
        &[0; 9],
        // Headers without a frame, or with less than Ethernet's.
        &good(9)[..10],
        &good(9)[..23],
        // No known kind of packet; a checksum outside; pieces of nothing.
        &with(1, &[0x55]),
        &with(0, &[1, 0, 0, 0, 0, 0, 34, 0, 60, 0]),
        &with(0, &[1, 1, 0, 0, 0, 0, 34, 0, 16, 0]),
    ];
    // One before, between and after each.
    let mut number = 0;
    for message in bad {
        for message in [good(number), message.to_vec()] {
            until(|| send(kernel.as_raw_fd(), &message, MsgFlags::empty()).is_ok());
        }
        number += 1;
        if number % 3 == 0 {
            let come: Vec<_> = take(&mut queue, 3).into_iter().map(|(_, bytes)| bytes).collect();
            assert_eq!(come, [frame(number - 3, 60), frame(number - 2, 60), frame(number - 1, 60)]);
        }
    }
    send(kernel.as_raw_fd(), &good(number), MsgFlags::empty()).unwrap();
    let come: Vec<_> = take(&mut queue, 2).into_iter().map(|(_, bytes)| bytes).collect();
    assert_eq!(come, [frame(number - 1, 60), frame(number, 60)]);
    assert_eq!(queue.missed(), Missed { bad_header: 7, ..Missed::NONE });
    assert_eq!(queue.missed(), Missed::NONE);
}
