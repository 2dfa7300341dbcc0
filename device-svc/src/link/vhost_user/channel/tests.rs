#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{IoSlice, Read};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{ControlMessage, sendmsg};

use super::*;

#[test]
fn no_descriptor_stays_open_however_many_come() {
    for count in [0, 1, 2, 3, 8, DESCRIPTORS_MAX] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut reader, writer) = std::io::pipe().unwrap();
        let header: Vec<u8> = [SET_BACKEND_REQ_FD, 1, 0].iter().flat_map(|word| word.to_ne_bytes()).collect();
        let fds = vec![writer.as_raw_fd(); count];
        let control = [ControlMessage::ScmRights(&fds)];
        let control = if count > 0 { &control[..] } else { &[] };
        sendmsg::<()>(theirs.as_raw_fd(), &[IoSlice::new(&header)], control, MsgFlags::empty(), None).unwrap();
        let peeked = Peeked::wait_for(&ours, false);
        assert_eq!(peeked.channel.is_some(), count > 0, "{count}");
        drop((peeked, ours, theirs, writer));
        // The end of the pipe is seen when every descriptor of its other side is closed; until then this would block.
        fcntl(&reader, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    }
}
