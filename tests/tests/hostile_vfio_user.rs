#![allow(clippy::unwrap_used, missing_docs, reason = "a test fails by panicking")]
//! VMMs that mean harm: thousands of half-right conversations over vfio-user, while a neighbour on the same reactor goes on
//! undisturbed.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use device_svc::driver::client::Through;
use device_svc::driver::hostile::vfio_user::{converse, truncate_memory};
use device_svc::driver::vfio_user::Sharing;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tests::{Besieged, Siege, wait_for};

/// The functions that are attacked.
const ATTACKED: [Besieged; 4] = [
    ("null", r#"{ type = "null", size = "64M" }"#, "", ""),
    ("ram", r#"{ type = "ram", size = "8M" }"#, "", ""),
    ("file", r#"{ type = "file", path = "@/disk", create = "8M" }"#, "", ""),
    ("ram-copy", r#"{ type = "ram", size = "8M" }"#, r#", payload = "copy""#, "queue-size = 1024"),
];

const SIEGE: Siege = Siege {
    link: "vfio-user",
    through: Through::VfioUser(Sharing::Whole),
    attacked: &ATTACKED,
    converse,
    truncate_memory,
    attached: "a VMM is attached",
};

#[test]
fn thousands_of_hostile_conversations_disturb_nobody() {
    SIEGE.lay();
}

#[test]
fn a_memory_file_cut_short_ends_that_function_only() {
    SIEGE.cut_memory();
}

/// A conversation that cannot go on ends for both sides: nobody is left waiting for a reply.
#[test]
fn who_breaks_the_protocol_is_hung_up_on() {
    let (card, _alone) = SIEGE.card();
    let mut stream = UnixStream::connect(card.path("ram.sock")).unwrap();
    // A header that says that the message is shorter than the header.
    stream.write_all(&[1, 0, 1, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    assert_eq!(stream.read(&mut [0; 16]).unwrap(), 0);
    SIEGE.serves(&card, "ram", 1);
}

/// Who knocks while the function has a VMM costs a thread for a second, and there are few of those however many knock.
#[test]
fn a_crowd_at_a_busy_socket_is_turned_away() {
    let (mut card, _alone) = SIEGE.card();
    let client = SIEGE.connect(&card, "ram", false);
    let threads = format!("/proc/{}/task", card.process().id());
    let threads = || std::fs::read_dir(&threads).map_or(0, Iterator::count);
    let before = threads();
    let mut most = 0;
    let mut crowd = Vec::new();
    for _ in 0..100 {
        crowd.push(UnixStream::connect(card.path("ram.sock")));
        most = most.max(threads());
    }
    assert!(crowd.iter().all(Result::is_ok));
    // Those beyond the few are hung up on at once, so all that are left are the few.
    wait_for("most of the crowd to be gone", || crowd.iter().filter(|one| has_hung_up(one)).count() >= 92);
    most = most.max(threads());
    // Some that are done may not be gone yet.
    assert!(most <= before + 16, "{before} threads became {most}");
    drop(crowd);
    let mut said = || card.process().output().matches("a second VMM was refused").count();
    wait_for("word of it", || said() > 0);
    assert_eq!(said(), 1, "once for each VMM that is served");
    assert!(client.leave().is_ok());
    SIEGE.serves(&card, "ram", 1);
}

fn has_hung_up(stream: &std::io::Result<UnixStream>) -> bool {
    let Ok(stream) = stream else { return false };
    let mut fds = [PollFd::new(stream.as_fd(), PollFlags::empty())];
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|count| count > 0)
}
