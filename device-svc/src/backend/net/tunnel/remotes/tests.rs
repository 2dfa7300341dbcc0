#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::{IpAddr, Ipv4Addr};

use super::*;

const STATION: [u8; 6] = [2, 0, 0, 0, 0, 1];
const GROUP: [u8; 6] = [1, 0, 0x5e, 0, 0, 1];

fn end_point(number: u8) -> OuterAddress {
    IpAddr::from(Ipv4Addr::new(10, 9, 0, number)).into()
}

#[test]
fn named_remotes_are_believed_and_nobody_else() {
    let remotes = Remotes::new([3, 2, 3].map(end_point), Learning::Listed);
    assert_eq!(remotes.named(), [2, 3].map(end_point), "each once");
    assert!(remotes.takes(end_point(2)) && remotes.takes(end_point(3)) && !remotes.takes(end_point(4)));
    assert!(remotes.learns());
    remotes.hear(STATION, end_point(3), 0);
    assert_eq!(remotes.find(STATION, 0), Some(end_point(3)));
    assert_eq!(remotes.find([9; 6], 0), None);
}

#[test]
fn anybody_is_believed_where_none_is_named_or_it_was_said() {
    for remotes in [Remotes::new([], Learning::Listed), Remotes::new([end_point(2)], Learning::Any)] {
        assert!(remotes.takes(end_point(9)));
        remotes.hear(STATION, end_point(9), 0);
        assert_eq!(remotes.find(STATION, 0), Some(end_point(9)));
    }
}

/// A group or everybody is no station, even if somebody says that it speaks.
#[test]
fn groups_go_to_all() {
    let remotes = Remotes::new([2, 3].map(end_point), Learning::Listed);
    for group in [GROUP, [0xff; 6]] {
        remotes.hear(group, end_point(3), 0);
        assert_eq!(remotes.find(group, 0), None);
    }
}

#[test]
fn nothing_is_learned_where_it_would_not_help_or_shall_not() {
    for (named, learning) in [(&[2, 3][..], Learning::Nothing), (&[2], Learning::Listed)] {
        let remotes = Remotes::new(named.iter().copied().map(end_point), learning);
        remotes.hear(STATION, end_point(2), 0);
        assert_eq!((remotes.learns(), remotes.find(STATION, 0)), (false, None));
        assert!(remotes.takes(end_point(2)) && !remotes.takes(end_point(9)));
    }
}
