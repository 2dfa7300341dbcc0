#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::*;

/// The front end's handle and ours. As it says, in blocking mode: set back after the card has set it otherwise.
fn event() -> (EventFd, Event) {
    let theirs = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC).unwrap();
    let ours = Event::new(File::from(nix::unistd::dup(&theirs).unwrap())).unwrap();
    fcntl(&theirs, FcntlArg::F_SETFL(OFlag::O_RDWR)).unwrap();
    (theirs, ours)
}

#[test]
fn an_interrupt_is_raised_and_a_full_counter_does_not_block() {
    let (theirs, ours) = event();
    let mut bell = Bell::new(ours);
    if bell.chime.is_none() {
        // Without io_uring a full counter does block, as the head of the file says.
        return;
    }
    for _ in 0..1000 {
        bell.signal();
    }
    assert_eq!(theirs.read().unwrap(), 1000);
    theirs.write(u64::MAX - 1).unwrap();
    bell.signal();
    bell.signal();
    assert!(theirs.read().unwrap() >= u64::MAX - 1);
    bell.signal();
    assert_eq!(theirs.read().unwrap(), 1);
}

#[test]
fn one_thread_signals_many_events_and_a_full_counter_does_not_block() {
    if Chime::new().is_err() {
        return;
    }
    let (first, second) = (event(), event());
    for _ in 0..1000 {
        first.1.signal_once();
        second.1.signal_once();
    }
    assert_eq!((first.0.read().unwrap(), second.0.read().unwrap()), (1000, 1000));
    first.0.write(u64::MAX - 1).unwrap();
    first.1.signal_once();
    first.1.signal_once();
    assert!(first.0.read().unwrap() >= u64::MAX - 1);
    second.1.signal_once();
    assert_eq!(second.0.read().unwrap(), 1);
}

#[test]
fn a_doorbell_that_somebody_else_has_taken_does_not_block() {
    let (theirs, mut ours) = event();
    theirs.write(3).unwrap();
    assert!(ours.take());
    assert!(!ours.take());
}

#[test]
fn only_eventfds_are_taken() {
    let (reader, writer) = nix::unistd::pipe().unwrap();
    assert!(Event::new(reader.into()).is_err());
    assert!(Event::new(writer.into()).is_err());
    assert!(Event::new(File::open("/dev/null").unwrap()).is_err());
}
