//! Uplinks and channels that share an address and port: each datagram comes to the one that it is for.

use std::net::UdpSocket;

use super::super::steering::{CHANNELS_MAX, SOCKETS_MAX};
use super::*;

/// Sends a frame from a port of its own, as a flow does.
fn send(bed: &Bed, vni: u32, number: usize) {
    let sender = bed.namespace.run(|| UdpSocket::bind((address(false, 2), 0))).unwrap().unwrap();
    let frame = frame(station(1), station(9), number, 60);
    sender.send_to(&datagram(vni, &frame), (address(false, 1), 4789)).unwrap();
}

#[test]
fn uplinks_of_one_end_point_get_what_is_theirs() {
    let Some(bed) = Bed::new() else { return };
    let tunnels = [5, 6, 0].map(|vni| bed.tunnel(vni, 1, &[2]));
    let mut channels = [0, 1, 2].map(|number| channel(&tunnels[number]));
    for round in 0..10 {
        for (position, vni) in [5, 6, 0, 7, 5].into_iter().enumerate() {
            send(&bed, vni, round * 10 + position);
        }
    }
    let numbers = |frames: Vec<Vec<u8>>| -> Vec<usize> { frames.iter().map(|frame| frame[14].into()).collect() };
    let come = channels.each_mut().map(|channel| numbers(came(&mut **channel)));
    let expected = [&[0, 4][..], &[1], &[2]]
        .map(|positions| (0..10).flat_map(|round| positions.iter().map(move |at| round * 10 + at)).collect::<Vec<_>>());
    assert_eq!(come, expected);
    // One goes: the others stay as they are, and its own socket serves the next.
    let [_, second, _] = channels;
    drop(second);
    let mut third = channel(&tunnels[2]);
    let mut again = channel(&tunnels[1]);
    send(&bed, 6, 1);
    send(&bed, 7, 2);
    assert_eq!(numbers(take(&mut *again, 1)), [1]);
    assert!(came(&mut *third).is_empty());
}

#[test]
fn flows_spread_over_the_channels_that_are_enabled() {
    let Some(bed) = Bed::new() else { return };
    let tunnel = bed.tunnel(5, 1, &[2]);
    let mut channels = [(); 4].map(|()| tunnel.open_channel().unwrap());
    let counts = |channels: &mut [Box<dyn NetChannel>; 4]| {
        for number in 0..200 {
            send(&bed, 5, number);
        }
        channels.each_mut().map(|channel| came(&mut **channel).len())
    };
    assert_eq!(counts(&mut channels), [0; 4], "none is enabled");
    channels[1].enable(true);
    assert_eq!(counts(&mut channels), [0, 200, 0, 0], "what came before is gone");
    for channel in &mut channels {
        channel.enable(true);
    }
    let spread = counts(&mut channels);
    assert_eq!(spread.iter().sum::<usize>(), 200);
    assert!(spread.iter().all(|count| *count > 10), "{spread:?}");
    // A flow stays with one.
    let flow = bed.stranger(2);
    for number in 0..50 {
        flow.send_to(&datagram(5, &frame(station(1), station(9), number, 60)), (address(false, 1), 4789)).unwrap();
    }
    let come = channels.each_mut().map(|channel| came(&mut **channel).len());
    assert_eq!((come.iter().max(), come.iter().sum::<usize>()), (Some(&50), 50), "{come:?}");
    // What waits in one that is disabled is thrown away, and nothing is sent to it any more.
    for number in 0..200 {
        send(&bed, 5, number);
    }
    for number in [0, 2, 3] {
        channels[number].enable(false);
    }
    let waiting = came(&mut *channels[1]).len();
    assert!((10..200).contains(&waiting), "{waiting}");
    assert_eq!(counts(&mut channels), [0, 200, 0, 0]);
    channels[0].enable(true);
    assert_eq!(came(&mut *channels[0]).len(), 0);
}

/// The port is free again when the last uplink is gone, and an uplink's network when that one is.
#[test]
fn what_is_closed_can_be_opened_again() {
    let Some(bed) = Bed::new() else { return };
    for round in 0..3 {
        let kind = KINDS[round % 2];
        let settings = TunnelSettings { kind, ..bed.settings(false, 5, 1, &[2]) };
        let tunnel = TunnelBackend::new(&settings).unwrap();
        let other = TunnelBackend::new(&TunnelSettings { vni: 6, ..settings.clone() }).unwrap();
        let used = [channel(&tunnel), channel(&other)];
        drop((tunnel, used));
        let tunnel = TunnelBackend::new(&settings).unwrap();
        drop((tunnel, other));
    }
}

#[test]
fn an_end_point_has_so_many_channels() {
    let Some(bed) = Bed::new() else { return };
    let tunnels: Vec<_> = (0..=SOCKETS_MAX as u32 / 64).map(|vni| bed.tunnel(vni, 1, &[2])).collect();
    let mut channels = Vec::new();
    let error = loop {
        assert!(channels.len() < SOCKETS_MAX);
        match tunnels[channels.len() / usize::from(CHANNELS_MAX)].open_channel() {
            Ok(mut channel) => {
                channel.enable(true);
                channels.push(channel);
            }
            Err(error) => break error.to_string(),
        }
    };
    assert_eq!(channels.len(), SOCKETS_MAX - 1);
    assert!(error.contains("has all the channels that it can have: give further uplinks another `port`"), "{error}");
    // The kernel took the longest program.
    send(&bed, 4, 1);
    let come: usize = channels.iter_mut().map(|channel| came(&mut **channel).len()).sum();
    assert_eq!(come, 1);
    channels.clear();
    let mut last = channel(&tunnels[0]);
    send(&bed, 0, 1);
    assert_eq!(take(&mut *last, 1).len(), 1);
}
