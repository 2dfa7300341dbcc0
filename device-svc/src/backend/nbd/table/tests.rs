#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use proptest::prelude::*;

use super::{Place, Purpose, Table};
use crate::backend::nbd::wire::{COMMAND_READ, RequestHeader};
use crate::backend::{BlockOperation, BlockRequest, Segments, Tag};

fn table_with_read(length: u32) -> (Table, u32) {
    let mut table = Table::new();
    let request = BlockRequest {
        tag: Tag { lane: 0, row: 0 },
        operation: BlockOperation::Read,
        offset: 4096,
        length: length.into(),
        segments: Segments::NONE,
    };
    let row = table.add(Purpose::Lane, request, 0).unwrap();
    let header = RequestHeader {
        command: COMMAND_READ.into(),
        offset: 4096.into(),
        length: length.into(),
        ..RequestHeader::default()
    };
    let part = table.add_part(row, 3, Place::new(Segments::NONE, 0), header).unwrap();
    (table, part)
}

#[test]
fn a_cookie_is_good_once_on_its_connection_and_after_it_was_sent() {
    let (mut table, row) = table_with_read(512);
    let cookie = table.parts[row as usize].header.cookie.get();
    assert!(table.find(cookie, 3).is_err(), "not sent yet");
    table.parts[row as usize].sent = true;
    assert!(table.find(cookie, 3).is_ok());
    assert!(table.find(cookie, 2).is_err());
    assert!(table.find(cookie + (1 << 32), 3).is_err());
    assert!(table.find(u64::MAX, 3).is_err());
    table.remove_part(row);
    assert!(table.find(cookie, 3).is_err());
}

#[test]
fn what_a_reply_makes_us_remember_has_a_bound() {
    let (mut table, row) = table_with_read(1 << 20);
    let part = &mut table.parts[row as usize];
    let taken = (0..).take_while(|number| part.arrive(4096 + number * 4, 1).is_ok()).count();
    assert_eq!(taken, super::GAPS_MAX);
}

proptest! {
    /// Against a bitmap as the oracle.
    #[test]
    fn chunks_cover_or_are_refused(chunks in proptest::collection::vec((4080u64..4180, 1u32..40), 1..40)) {
        let (mut table, row) = table_with_read(64);
        let part = &mut table.parts[row as usize];
        let mut covered = [false; 64];
        for (offset, length) in chunks {
            let range = offset..offset + u64::from(length);
            let inside = range.start >= 4096 && range.end <= 4160;
            let good = inside && !covered[(range.start - 4096) as usize..(range.end - 4096) as usize].contains(&true);
            prop_assert_eq!(part.arrive(offset, length).is_ok(), good);
            if good {
                covered[(range.start - 4096) as usize..(range.end - 4096) as usize].fill(true);
            }
            prop_assert_eq!(part.is_whole(), covered == [true; 64]);
        }
    }
}
