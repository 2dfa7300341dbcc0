#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::*;

fn pair() -> (Framing, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (Framing::new(ours, 1000, 8), theirs)
}

fn bytes(id: u16, size: u32, body: &[u8]) -> Vec<u8> {
    let header = Header { id, command: 4, size, flags: 0, error: 0 };
    [header.as_bytes(), body].concat()
}

#[test]
fn messages_come_whole_however_they_are_cut() {
    let (mut framing, mut theirs) = pair();
    let stream = [bytes(1, 20, b"abcd"), bytes(2, 16, b""), bytes(3, 17, b"x")].concat();
    let writer = std::thread::spawn(move || {
        for byte in stream {
            theirs.write_all(&[byte]).unwrap();
        }
    });
    let mut message = Message::default();
    for (id, body) in [(1, &b"abcd"[..]), (2, b""), (3, b"x")] {
        framing.receive(&mut message).unwrap();
        assert_eq!((message.header.id, &message.body[..]), (id, body));
    }
    assert!(matches!(framing.receive(&mut message), Err(FramingError::Closed)));
    writer.join().unwrap();
}

#[test]
fn descriptors_stay_with_their_message() {
    let (mut framing, theirs) = pair();
    let peer = Framing::new(theirs, 1000, 8);
    let (reader, mut writer) = std::io::pipe().unwrap();
    let header = Header { id: 7, command: 2, ..Header::default() };
    peer.send(header, &[b"one"], &[]).unwrap();
    peer.send(header, &[b"two", b"more"], &[reader.as_fd(), reader.as_fd()]).unwrap();
    peer.send(header, &[], &[]).unwrap();
    let mut message = Message::default();
    framing.receive(&mut message).unwrap();
    assert_eq!((&message.body[..], message.fds.len()), (&b"one"[..], 0));
    framing.receive(&mut message).unwrap();
    assert_eq!((&message.body[..], message.fds.len()), (&b"twomore"[..], 2));
    writer.write_all(b"!").unwrap();
    let mut got = [0];
    std::fs::File::from(message.fds.pop().unwrap()).read_exact(&mut got).unwrap();
    assert_eq!(&got, b"!");
    framing.receive(&mut message).unwrap();
    assert!(message.body.is_empty() && message.fds.is_empty());
}

#[test]
fn what_is_not_a_message_is_refused() {
    for (size, bad) in [(15, true), (0, true), (1017, true), (u32::MAX, true), (1016, false)] {
        let (mut framing, mut theirs) = pair();
        theirs.write_all(&bytes(1, size, &[0; 1000])).unwrap();
        let received = framing.receive(&mut Message::default());
        assert_eq!(matches!(received, Err(FramingError::BadSize(said)) if said == size), bad, "{size}: {received:?}");
    }
    for cut in [1, 15, 16, 19] {
        let (mut framing, mut theirs) = pair();
        theirs.write_all(&bytes(1, 20, b"abcd")[..cut]).unwrap();
        theirs.shutdown(Shutdown::Write).unwrap();
        let received = framing.receive(&mut Message::default());
        assert!(matches!(received, Err(FramingError::Truncated)), "{cut}: {received:?}");
    }
}

#[test]
fn too_many_descriptors_are_closed() {
    for count in [8, 9, DESCRIPTORS_MAX] {
        let (mut framing, theirs) = pair();
        let (mut reader, writer) = std::io::pipe().unwrap();
        Framing::new(theirs, 0, 0).send(Header::default(), &[], &vec![writer.as_fd(); count]).unwrap();
        drop(writer);
        let mut message = Message::default();
        assert_eq!(framing.receive(&mut message).is_ok(), count == 8);
        drop((framing, message));
        fcntl(&reader, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        assert_eq!(reader.read(&mut [0]).unwrap(), 0, "all are closed");
    }
}

/// A process that has as many descriptors open as it may is given some of a message's, and must not keep them.
#[test]
fn descriptors_that_come_in_part_are_closed() {
    let (mut framing, theirs) = pair();
    // As if the kernel could make two.
    framing.control = nix::cmsg_space!([i32; 2]);
    let (reader, mut writer) = std::io::pipe().unwrap();
    let peer = Framing::new(theirs, 1000, 8);
    peer.send(Header::default(), &[b"x"], &[reader.as_fd(); 5]).unwrap();
    let mut message = Message::default();
    let end = framing.receive(&mut message);
    assert!(matches!(end, Err(FramingError::System(Errno::EMFILE))), "{end:?}");
    assert_eq!(message.fds.len(), 2);
    drop((message, framing, peer, reader));
    assert_eq!(
        writer.write(b"!").unwrap_err().kind(),
        std::io::ErrorKind::BrokenPipe,
        "nobody else holds the other end"
    );
}
