#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use proptest::prelude::*;

use super::*;

#[test]
fn a_version_says_what_it_says() {
    let parse = |text: &[u8]| {
        Request::parse(command::VERSION, &[&[0, 0, 1, 0], text].concat()).map(|request| match request {
            Request::Version(version, capabilities) => (version.minor, capabilities),
            other => panic!("{other:?}"),
        })
    };
    assert_eq!(parse(b"").unwrap(), (1, Capabilities::default()), "the text is optional");
    assert_eq!(parse(b"\0").unwrap().1, Capabilities::default());
    let text = br#"{"capabilities":{"max_msg_fds":16,"migration":{"pgsize":4096},"write_multiple":true}}"#;
    let expected = Capabilities { max_msg_fds: Some(16), write_multiple: Some(true), ..Capabilities::default() };
    assert_eq!(parse(&[&text[..], b"\0junk"].concat()).unwrap().1, expected);
    assert_eq!(parse(&version_text(&expected)).unwrap().1, expected);
    for bad in [&b"{"[..], br#"{"capabilities":7}"#, br#"{"capabilities":{"max_msg_fds":-1}}"#, b"\xff\xff"] {
        assert_eq!(parse(bad), Err(BadRequest::Malformed(command::VERSION)));
    }
    assert!(parse(&[b' '; VERSION_BYTES_MAX + 1]).is_err());
    assert!(Request::parse(command::VERSION, &[0, 0, 1]).is_err());
}

#[test]
fn interrupts_take_one_action_and_one_kind_of_data() {
    let parse = |flags: u32, count: u32, data: &[u8]| {
        let set = IrqSet { argsz: 20, flags, index: 2, start: 1, count };
        let body = [set.as_bytes(), data].concat();
        match Request::parse(command::DEVICE_SET_IRQS, &body) {
            Ok(Request::SetIrqs(_, action, data)) => Some((action, format!("{data:?}"))),
            _ => None,
        }
    };
    assert_eq!(parse(0b10_0100, 3, &[]), Some((IrqAction::Trigger, "Events".to_owned())));
    assert_eq!(parse(0b01_0001, 1, &[]), Some((IrqAction::Unmask, "None".to_owned())));
    assert_eq!(parse(0b00_1010, 2, &[1, 0]), Some((IrqAction::Mask, "Bools([1, 0])".to_owned())));
    assert_eq!(parse(0b00_1010, 3, &[1, 0]), None, "a truth value for each");
    assert_eq!(parse(0b00_1010, u32::MAX, &[1, 0]), None);
    for flags in [0, 0b1000, 0b100, 0b11_0001, 0b10_0011, 0b11_1111] {
        assert_eq!(parse(flags, 0, &[]), None, "{flags:b}");
    }
}

#[test]
fn counts_fit_what_follows() {
    let access = |count: u32| RegionAccess { offset: 0, region: 0, count };
    let parse = |command: u16, count: u32, data: &[u8]| {
        Request::parse(command, &[access(count).as_bytes(), data].concat()).is_ok()
    };
    assert!(parse(command::REGION_WRITE, 2, &[1, 2]));
    assert!(!parse(command::REGION_WRITE, 3, &[1, 2]) && !parse(command::REGION_WRITE, 1, &[1, 2]));
    assert!(parse(command::REGION_READ, TRANSFER_BYTES_MAX, &[]));
    assert!(!parse(command::REGION_READ, TRANSFER_BYTES_MAX + 1, &[]) && !parse(command::REGION_READ, u32::MAX, &[]));
    let multi = |count: u64, bytes: usize| {
        Request::parse(command::REGION_WRITE_MULTI, &[count.as_bytes(), &vec![0; bytes]].concat()).is_ok()
    };
    assert!(multi(2, 48) && multi(0, 0) && multi(WRITES_MAX as u64, 24 * WRITES_MAX));
    assert!(!multi(2, 47) && !multi(1, 48) && !multi(u64::MAX, 24));
    assert!(!multi(WRITES_MAX as u64 + 1, 24 * (WRITES_MAX + 1)));
}

#[test]
fn what_is_unknown_is_unsupported() {
    for command in [0, 6, 11, 12, 14, 17, 18, 19, 0xffff] {
        assert_eq!(Request::parse(command, &[0; 64]), Err(BadRequest::Unsupported(command)));
    }
}

proptest! {
    #[test]
    fn no_body_breaks_the_parser(command in 0_u16..24, body in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = Request::parse(command, &body);
    }
}
