#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use proptest::prelude::*;

use super::*;

const KINDS: [TunnelKind; 2] = [TunnelKind::Vxlan, TunnelKind::Geneve];

/// What we send, as the specifications draw it.
#[test]
fn headers_are_as_the_specifications_have_them() {
    let vxlan = TunnelKind::Vxlan.header(0x12_3456, 4789).of_frame(0xc001, 60).unwrap();
    let udp = [0xc0, 0x01, 0x12, 0xb5, 0, 76, 0, 0];
    assert_eq!(vxlan.as_bytes(), [&udp[..], &[8, 0, 0, 0, 0x12, 0x34, 0x56, 0]].concat());
    let geneve = TunnelKind::Geneve.header(0x12_3456, 6081).of_frame(0xffff, 60).unwrap();
    let udp = [0xff, 0xff, 0x17, 0xc1, 0, 76, 0, 0];
    assert_eq!(geneve.as_bytes(), [&udp[..], &[0, 0, 0x65, 0x58, 0x12, 0x34, 0x56, 0]].concat());
}

#[test]
fn a_frame_that_no_datagram_can_hold_has_no_header() {
    let header = TunnelKind::Vxlan.header(1, 4789);
    assert!(header.of_frame(0xc000, 65535 - OUTER_HEADER_BYTES as u32).is_some());
    assert!(header.of_frame(0xc000, 65536 - OUTER_HEADER_BYTES as u32).is_none());
    assert!(header.of_frame(0xc000, u32::MAX).is_none());
}

#[test]
fn what_is_no_frame_is_refused() {
    let geneve = |first: u8, flags: u8, protocol: u16| {
        let [high, low] = protocol.to_be_bytes();
        TunnelKind::Geneve.parse(&[first, flags, high, low, 0, 0, 9, 0, 1, 2, 3, 4])
    };
    assert_eq!(geneve(0, 0, 0x6558), Ok(Encapsulated { vni: 9, frame_at: 8 }));
    assert_eq!(geneve(1, 0, 0x6558), Ok(Encapsulated { vni: 9, frame_at: 12 }), "options are passed over");
    assert_eq!(geneve(1, 0x3f, 0x6558), Ok(Encapsulated { vni: 9, frame_at: 12 }), "reserved bits are ignored");
    assert_eq!(geneve(2, 0, 0x6558), Err(NoFrame::TooShort), "options beyond the end");
    assert_eq!(geneve(0x3f, 0, 0x6558), Err(NoFrame::TooShort));
    assert_eq!(geneve(1, 0x40, 0x6558), Err(NoFrame::NotUnderstood), "an option that must be understood");
    assert_eq!(geneve(0, 0x80, 0x6558), Err(NoFrame::NotUnderstood), "a message between end points");
    assert_eq!(geneve(0x40, 0, 0x6558), Err(NoFrame::NotUnderstood), "another version");
    assert_eq!(geneve(0, 0, 0x0800), Err(NoFrame::NotUnderstood), "a packet without Ethernet");
    let vxlan = |first: u8| TunnelKind::Vxlan.parse(&[first, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
    assert_eq!(vxlan(0x08), Ok(Encapsulated { vni: VNI_MAX, frame_at: 8 }));
    assert_eq!(vxlan(0xff), Ok(Encapsulated { vni: VNI_MAX, frame_at: 8 }), "reserved bits are ignored");
    assert_eq!(vxlan(0xf7), Err(NoFrame::NoNetwork));
    for kind in KINDS {
        for bytes in 0..TUNNEL_HEADER_BYTES {
            assert_eq!(kind.parse(&[8; 8][..bytes]), Err(NoFrame::TooShort), "{kind:?}, {bytes}");
        }
    }
}

proptest! {
    #[test]
    fn what_is_sent_is_understood(vni in 0..=VNI_MAX, port: u16, source: u16, frame in prop::collection::vec(any::<u8>(), 0..99)) {
        for kind in KINDS {
            let header = kind.header(vni, port).of_frame(source, frame.len() as u32).unwrap();
            let datagram = [header.as_bytes(), &frame].concat();
            let (udp, _) = etherparse::UdpHeader::from_slice(&datagram).unwrap();
            let length = datagram.len() as u16;
            prop_assert_eq!((udp.source_port, udp.destination_port, udp.length), (source, port, length));
            let parsed = kind.parse(&datagram[UDP_HEADER_BYTES..]).unwrap();
            prop_assert_eq!(parsed.vni, vni);
            prop_assert_eq!(&datagram[UDP_HEADER_BYTES + parsed.frame_at..], &frame);
        }
    }

    #[test]
    fn a_frame_never_begins_outside(datagram in prop::collection::vec(any::<u8>(), 0..300)) {
        for kind in KINDS {
            if let Ok(Encapsulated { vni, frame_at }) = kind.parse(&datagram) {
                prop_assert!(vni <= VNI_MAX && frame_at <= datagram.len());
            }
        }
    }
}
