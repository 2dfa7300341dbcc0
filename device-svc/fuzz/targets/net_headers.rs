//! A virtio header and a frame, both of any bytes: what is accepted can be completed or cut, what comes of it is whole, and the same
//! comes out of a channel that does it on the way.
#![no_main]
#![expect(unsafe_code, reason = "gives a channel the addresses of a frame")]

use std::sync::Arc;

use device_svc::backend::Segments;
use device_svc::backend::net::loopback::LoopbackBackend;
use device_svc::backend::net::offload::checksum::{Sum, complete};
use device_svc::backend::net::offload::segment::{HEADERS_BYTES_MAX, PIECES_MAX};
use device_svc::backend::net::offload::{Cut, SoftwareOffload};
use device_svc::backend::net::{
    BURST, Checksum, NetBackend, NetHeader, Offloads, Outgoing, RawNetHeader, header::HEADER_BYTES,
};
use libfuzzer_sys::fuzz_target;
use zerocopy::FromBytes;

fuzz_target!(|bytes: &[u8]| {
    let Some((header, frame)) = bytes.split_first_chunk::<{ HEADER_BYTES as usize }>() else { return };
    let Ok(raw) = RawNetHeader::read_from_bytes(header) else { return };
    let Ok(header) = NetHeader::parse(&raw, frame.len() as u32, Offloads::ALL) else { return };
    let again = NetHeader::parse(&header.to_raw(0), frame.len() as u32, Offloads::ALL);
    assert_eq!(again, Ok(header), "a header that was understood is understood again");
    let expected = made_of(frame, &header);
    assert_eq!(through_a_channel(frame, header), expected);
});

/// What comes of a frame: nothing if it cannot be cut.
fn made_of(frame: &[u8], header: &NetHeader) -> Vec<Vec<u8>> {
    let mut frame = frame.to_vec();
    if header.segmentation.is_none() {
        if let Checksum::Needed { start, offset } = header.checksum {
            assert!(complete(&mut frame, start, offset), "what a header accepts is inside");
        }
        return vec![frame];
    }
    let Ok(cut) = Cut::new(&frame, header, u16::MAX) else { return Vec::new() };
    assert!((1..=PIECES_MAX).contains(&cut.pieces()));
    let mut headers = [0; HEADERS_BYTES_MAX];
    let mut pieces = Vec::new();
    let mut next = cut.header_bytes();
    for number in 0..cut.pieces() {
        let payload = cut.piece(number, &frame, &mut headers).expect("each piece is there");
        assert_eq!(payload.start, next, "no byte is left out");
        next = payload.end;
        let Checksum::Needed { start, .. } = header.checksum else { unreachable!("a cut frame has a checksum") };
        check_network(&headers[..cut.header_bytes()], usize::from(start), payload.len());
        pieces.push([&headers[..cut.header_bytes()], &frame[payload]].concat());
    }
    assert_eq!(next, frame.len(), "no byte is left out");
    assert_eq!(pieces.iter().map(Vec::len).sum::<usize>(), cut.bytes());
    assert_eq!(cut.piece(cut.pieces(), &frame, &mut headers), None);
    pieces
}

/// The header of IP, before the transport's at `transport_at`, says how long the piece is.
fn check_network(headers: &[u8], transport_at: usize, payload_bytes: usize) {
    let mut at = 14;
    while [[0x81, 0x00], [0x88, 0xa8]].contains(&[headers[at - 2], headers[at - 1]]) {
        at += 4;
    }
    let number = |at: usize| usize::from(u16::from_be_bytes([headers[at], headers[at + 1]]));
    if headers[at] >> 4 == 4 {
        assert_eq!(number(at + 2), headers.len() - at + payload_bytes);
        assert_eq!(Sum::default().over(&headers[at..transport_at]).checksum(), [0, 0]);
    } else {
        assert_eq!(number(at + 4), headers.len() - at - 40 + payload_bytes);
    }
}

/// What comes back of a frame from a loop that does nothing itself.
fn through_a_channel(frame: &[u8], header: NetHeader) -> Vec<Vec<u8>> {
    let mut channel = SoftwareOffload::new(Arc::new(LoopbackBackend::new())).open_channel().expect("a loop");
    channel.enable(true);
    let (first, second) = frame.split_at(frame.len() / 3);
    let ranges =
        [first, second].map(|part| libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() });
    // SAFETY: the ranges and their list outlive the call.
    let segments = unsafe { Segments::new(ranges.as_ptr(), ranges.len() as u32) };
    let sent = channel.transmit(&[Outgoing { header, segments, bytes: frame.len() as u32 }]);
    assert_eq!(sent.taken, 1);
    let mut came = Vec::new();
    loop {
        let frames = channel.receive(BURST);
        if frames.is_empty() {
            break;
        }
        for frame in frames {
            assert!(Offloads::NONE.cover(&frame.header));
            let mut bytes = frame.bytes().to_vec();
            // Sender and receiver have changed places.
            if let [destination, source, ..] = bytes.as_chunks_mut::<6>().0 {
                std::mem::swap(destination, source);
            }
            came.push(bytes);
        }
        let count = frames.len();
        channel.release(count);
    }
    assert_eq!(sent.lost, usize::from(came.is_empty()));
    came
}
