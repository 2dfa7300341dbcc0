//! Frames through one inbox, from one thread and from several.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(unsafe_code, reason = "waits for the bell")]

use super::*;
use crate::backend::net::Checksum;

fn opened() -> (Arc<Inbox>, Outbox) {
    let (inbox, mut outbox) = Inbox::pair().unwrap();
    outbox.open(true);
    (inbox, outbox)
}

fn put(inbox: &Inbox, bytes: u32, with: u8) -> bool {
    inbox.put(NetHeader::DONE, bytes, |room| room.fill(with))
}

#[test]
fn frames_come_out_as_they_went_in_and_in_order() {
    let (inbox, mut outbox) = opened();
    let mut state = 1_u32;
    let mut waiting = std::collections::VecDeque::new();
    for number in 0..20_000_u32 {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        // All lengths, so that the end of the ring is met in every way.
        let bytes = 1 + (state >> 8) % if number % 50 == 0 { FRAME_BYTES_MAX } else { 2000 };
        let checksum = Checksum::Needed { start: number as u16, offset: 0 };
        let header = NetHeader { checksum, segmentation: None };
        if inbox.put(header, bytes, |room| room.fill(number as u8)) {
            waiting.push_back((number, bytes));
        }
        if state & 3 == 0 {
            let frames = outbox.frames(1 + number as usize % 40);
            let count = frames.len();
            for frame in frames {
                let (number, bytes) = waiting.pop_front().unwrap();
                assert_eq!(frame.bytes(), vec![number as u8; bytes as usize]);
                assert_eq!(frame.header.checksum, Checksum::Needed { start: number as u16, offset: 0 });
            }
            outbox.release(count);
        }
    }
    while !outbox.is_empty() {
        let count = outbox.frames(BURST).len();
        waiting.drain(..count);
        outbox.release(count);
    }
    assert!(waiting.is_empty());
}

#[test]
fn what_finds_no_room_is_counted_and_the_rest_comes() {
    let (inbox, mut outbox) = opened();
    let taken = (0..FRAMES + 10).filter(|number| put(&inbox, 60, *number as u8)).count();
    assert_eq!(taken, FRAMES as usize);
    assert_eq!((outbox.missed().no_buffers, outbox.missed().no_buffers), (10, 0));
    assert_eq!(outbox.frames(BURST).len(), BURST);
    // Those that are handed over stay until they are released.
    assert!(!put(&inbox, 60, 1));
    outbox.release(1);
    assert!(put(&inbox, 60, 1));
    outbox.open(false);
    assert!(outbox.is_empty());
    assert!(!put(&inbox, 60, 1), "closed");
    outbox.open(true);
    let long = (0..10).filter(|_| put(&inbox, FRAME_BYTES_MAX, 3)).count();
    assert!((2..=4).contains(&long), "{long}");
    assert!(!put(&inbox, FRAME_BYTES_MAX + 1, 3));
    assert!(!put(&inbox, 0, 3));
}

#[test]
fn several_put_in_at_once() {
    const EACH: u32 = 40_000;
    let (inbox, mut outbox) = opened();
    let writers: Vec<_> = (0..3_u32)
        .map(|writer| {
            let inbox = Arc::clone(&inbox);
            std::thread::spawn(move || {
                for number in 0..EACH {
                    let text = (writer << 24 | number).to_le_bytes();
                    let bytes = 4 + (number.wrapping_mul(2_654_435_761) >> 20);
                    let fill = |room: &mut [u8]| {
                        room.fill(number as u8);
                        room[..4].copy_from_slice(&text);
                    };
                    while !inbox.put(NetHeader::DONE, bytes, fill) {
                        std::thread::yield_now();
                    }
                    inbox.ring();
                }
            })
        })
        .collect();
    let mut next = [0_u32; 3];
    while next != [EACH; 3] {
        if outbox.arm() {
            // A writer that finds no room may be all that is awake; then it rings when it has put in.
            let mut bell = libc::pollfd { fd: outbox.bell_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one descriptor that is ours.
            let come = unsafe { libc::poll(&raw mut bell, 1, 20_000) };
            assert_eq!(come, 1, "a wake-up was lost at {next:?}");
            outbox.silence();
        }
        let frames = outbox.frames(BURST);
        let count = frames.len();
        for frame in frames {
            let text = u32::from_le_bytes(*frame.bytes().first_chunk().unwrap());
            let (writer, number) = ((text >> 24) as usize, text & 0xff_ffff);
            assert_eq!(number, next[writer], "in order for each who puts in");
            assert_eq!(frame.length(), 4 + (number.wrapping_mul(2_654_435_761) >> 20));
            assert!(frame.bytes()[4..].iter().all(|byte| *byte == number as u8));
            next[writer] += 1;
        }
        outbox.release(count);
    }
    for writer in writers {
        writer.join().unwrap();
    }
}
