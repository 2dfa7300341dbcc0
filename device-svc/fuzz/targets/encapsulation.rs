//! Datagrams of any bytes as they come to a tunnel: a frame begins inside or there is none, what is read again says the same, and what
//! we would send of it comes back as it was. And where stations are: whatever is heard, a station is where it was heard last or unknown.
#![no_main]

use std::collections::BTreeMap;

use device_svc::backend::net::stations::FORGET_SECONDS;
use device_svc::backend::net::tunnel::flow::{HEAD_BYTES, source_port};
use device_svc::backend::net::tunnel::outer::OuterAddress;
use device_svc::backend::net::tunnel::remotes::{Learning, Remotes};
use device_svc::backend::net::tunnel::wire::{
    Encapsulated, OUTER_HEADER_BYTES, TUNNEL_HEADER_BYTES, TunnelKind, UDP_HEADER_BYTES, VNI_MAX,
};
use fuzz::Choices;
use libfuzzer_sys::fuzz_target;
use zerocopy::IntoBytes;

fuzz_target!(|bytes: &[u8]| {
    let Some((choice, datagram)) = bytes.split_first() else { return };
    match choice % 3 {
        0 => encapsulated(TunnelKind::Vxlan, datagram),
        1 => encapsulated(TunnelKind::Geneve, datagram),
        _ => stations(Choices(datagram)),
    }
});

/// What the specifications say of a datagram, byte by byte: where its frame begins, if it has one that is for us.
fn expected(kind: TunnelKind, datagram: &[u8]) -> Option<usize> {
    let header = datagram.get(..TUNNEL_HEADER_BYTES)?;
    match kind {
        TunnelKind::Vxlan => (header[0] & 8 != 0).then_some(TUNNEL_HEADER_BYTES),
        TunnelKind::Geneve => {
            let at = TUNNEL_HEADER_BYTES + usize::from(header[0] % 64) * 4;
            let good = header[0] < 64 && header[1] < 64 && header[2..4] == [0x65, 0x58] && at <= datagram.len();
            good.then_some(at)
        }
    }
}

fn encapsulated(kind: TunnelKind, datagram: &[u8]) {
    let parsed = kind.parse(datagram);
    assert_eq!(parsed.ok().map(|encapsulated| encapsulated.frame_at), expected(kind, datagram));
    let Ok(Encapsulated { vni, frame_at }) = parsed else { return };
    assert!(vni <= VNI_MAX);
    let frame = &datagram[frame_at..];
    let port = source_port(&frame[..frame.len().min(HEAD_BYTES)]);
    assert!(port >= 0xc000);
    let header = kind.header(vni, kind.port()).of_frame(port, frame.len() as u32).expect("it came in a datagram");
    let header = header.as_bytes();
    let length = (OUTER_HEADER_BYTES + frame.len()) as u16;
    assert_eq!(header[..6], [port.to_be_bytes(), kind.port().to_be_bytes(), length.to_be_bytes()].concat());
    let again = [&header[UDP_HEADER_BYTES..], frame].concat();
    assert_eq!(kind.parse(&again), Ok(Encapsulated { vni, frame_at: TUNNEL_HEADER_BYTES }));
}

fn stations(mut choices: Choices<'_>) {
    let address = |number: u8| OuterAddress::from(std::net::IpAddr::from([10, 9, 0, number]));
    let learning = [Learning::Listed, Learning::Any, Learning::Nothing][usize::from(choices.byte() % 3)];
    let named = choices.byte() % 4;
    let remotes = Remotes::new((0..named).map(address), learning);
    let mut heard = BTreeMap::new();
    let mut now_seconds = 0;
    while !choices.is_empty() {
        let mut station = [0; 6];
        station[0] = choices.byte();
        station[5] = choices.byte();
        let from = address(choices.byte() % 8);
        now_seconds += u32::from(choices.byte());
        if remotes.takes(from) {
            remotes.hear(station, from, now_seconds);
            heard.insert(station, (from, now_seconds));
        }
        for (station, (at, when)) in &heard {
            if let Some(found) = remotes.find(*station, now_seconds) {
                assert_eq!(found, *at, "where it was heard last");
                assert!(station[0] & 1 == 0 && remotes.learns() && now_seconds - when <= FORGET_SECONDS);
            }
        }
    }
}
