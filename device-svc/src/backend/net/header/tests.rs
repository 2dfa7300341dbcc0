#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
//! Headers of frames, good and bad.

use super::*;

const NEEDS: u8 = spec::VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
const TCP4: u8 = spec::VIRTIO_NET_HDR_GSO_TCPV4 as u8;
const ECN: u8 = spec::VIRTIO_NET_HDR_GSO_ECN as u8;

fn cut(kind: u8, segment_bytes: u16) -> RawNetHeader {
    RawNetHeader {
        flags: NEEDS,
        gso_type: kind,
        header_bytes: 54,
        segment_bytes,
        checksum_start: 34,
        checksum_offset: 16,
        buffers: 0,
    }
}

#[test]
fn nothing_undone_is_the_usual_case() {
    let raw = RawNetHeader { header_bytes: 7, segment_bytes: 9, checksum_start: 60000, ..RawNetHeader::default() };
    assert_eq!(NetHeader::parse(&raw, 60, Offloads::NONE), Ok(NetHeader::DONE));
}

#[test]
fn a_checksum_must_lie_in_the_frame() {
    let raw = |start, offset| RawNetHeader {
        flags: NEEDS,
        checksum_start: start,
        checksum_offset: offset,
        ..RawNetHeader::default()
    };
    let needed = Checksum::Needed { start: 34, offset: 16 };
    assert_eq!(NetHeader::parse(&raw(34, 16), 52, Offloads::ALL).map(|header| header.checksum), Ok(needed));
    assert_eq!(NetHeader::parse(&raw(34, 16), 51, Offloads::ALL), Err(BadHeader::ChecksumOutside));
    assert_eq!(NetHeader::parse(&raw(u16::MAX, u16::MAX), 65553, Offloads::ALL), Err(BadHeader::ChecksumOutside));
    assert_eq!(NetHeader::parse(&raw(34, 16), 52, Offloads::NONE), Err(BadHeader::NotNegotiated));
    // Over the headers of Ethernet and IP nothing is written.
    for (start, offset) in [(33, 17), (14, 16), (12, 2), (0, 6)] {
        let refused = NetHeader::parse(&raw(start, offset), 60, Offloads::ALL);
        assert_eq!(refused, Err(BadHeader::ChecksumOutside), "{start}, {offset}");
    }
}

#[test]
fn a_frame_is_cut_only_as_it_can_be() {
    let good = NetHeader::parse(&cut(TCP4, 1448), 3000, Offloads::ALL).unwrap();
    assert_eq!(good.segmentation.unwrap().bytes, 1448);
    assert_eq!(good.to_raw(0), cut(TCP4, 1448));
    assert_eq!(good.to_raw(0x1234).to_bytes(), IntoBytes::as_bytes(&good.to_raw(0x1234)));
    let with_ecn = NetHeader::parse(&cut(TCP4 | ECN, 1448), 3000, Offloads::ALL).unwrap();
    assert_eq!(with_ecn.to_raw(3), RawNetHeader { buffers: 3, ..cut(TCP4 | ECN, 1448) });
    assert_eq!(NetHeader::parse(&cut(TCP4, 0), 3000, Offloads::ALL), Err(BadHeader::BadSegmentation));
    let unchecked = RawNetHeader { flags: 0, ..cut(TCP4, 1448) };
    assert_eq!(NetHeader::parse(&unchecked, 3000, Offloads::ALL), Err(BadHeader::BadSegmentation));
    for (kind, left_out) in [
        (TCP4, Offloads { tso4: false, ..Offloads::ALL }),
        (TCP4 | ECN, Offloads { ecn: false, ..Offloads::ALL }),
        (spec::VIRTIO_NET_HDR_GSO_TCPV6 as u8, Offloads { tso6: false, ..Offloads::ALL }),
        (spec::VIRTIO_NET_HDR_GSO_UDP_L4 as u8, Offloads { uso: false, ..Offloads::ALL }),
    ] {
        assert_eq!(NetHeader::parse(&cut(kind, 1448), 3000, left_out), Err(BadHeader::NotNegotiated));
        assert!(NetHeader::parse(&cut(kind, 1448), 3000, Offloads::ALL).is_ok());
    }
    for kind in [2, spec::VIRTIO_NET_HDR_GSO_UDP as u8, ECN, 0x7f] {
        assert_eq!(NetHeader::parse(&cut(kind, 1448), 3000, Offloads::ALL), Err(BadHeader::NotNegotiated));
    }
}
