//! What the driver says on the control queue, and what it changes.

use super::*;
use crate::backend::net::offload::SoftwareOffload;
use crate::metrics::DropReason;

const OK: u8 = spec::VIRTIO_NET_OK as u8;
const REFUSED: u8 = spec::VIRTIO_NET_ERR as u8;
const OTHER: Octets = [0x52, 0x54, 0, 7, 7, 7];
const GROUP: Octets = [0x33, 0x33, 0, 0, 0, 1];
const EVERYBODY: Octets = [0xff; 6];

fn tables(named: &[Octets], groups: &[Octets]) -> Vec<u8> {
    let table = |list: &[Octets]| [&(list.len() as u32).to_le_bytes()[..], &list.concat()].concat();
    [table(named), table(groups)].concat()
}

/// Whether a frame to that address is brought: the loop swaps the addresses, so it is sent as if from there.
#[track_caller]
fn is_brought(bed: &mut Bed, destination: Octets, tag: Option<u16>) -> bool {
    let mut frame = frame_to([2, 2, 2, 2, 2, 2], 80, 1);
    frame[6..12].copy_from_slice(&destination);
    if let Some(tag) = tag {
        frame[12..14].copy_from_slice(&[0x81, 0]);
        frame[14..16].copy_from_slice(&tag.to_be_bytes());
    }
    bed.receive.add_buffers(1, 1);
    let before = bed.drops(0, DropReason::NotForUs);
    bed.send(&frame);
    let mut come = None;
    bed.until("frame or drop", |bed| {
        come = bed.receive.take();
        (come.is_some() || bed.drops(0, DropReason::NotForUs) > before).then_some(())
    });
    come.is_some()
}

#[test]
fn the_filter_brings_what_the_driver_asked_for() {
    for late in [None, Some(3)] {
        let mut bed = Bed::new(&Shape { late, ..Shape::new() });
        let rx = spec::VIRTIO_NET_CTRL_RX;
        assert!(is_brought(&mut bed, OTHER, None), "until the driver says something all are brought");
        assert_eq!(bed.command(rx, spec::VIRTIO_NET_CTRL_RX_PROMISC, &[0]), OK);
        let kinds = [(MAC, true), (OTHER, false), (GROUP, false), (EVERYBODY, true)];
        for (address, brought) in kinds {
            assert_eq!(is_brought(&mut bed, address, None), brought, "{address:x?}");
        }
        let table = spec::VIRTIO_NET_CTRL_MAC_TABLE_SET;
        assert_eq!(bed.command(spec::VIRTIO_NET_CTRL_MAC, table, &tables(&[OTHER], &[GROUP])), OK);
        assert!(is_brought(&mut bed, OTHER, None) && is_brought(&mut bed, GROUP, None));
        assert_eq!(bed.command(spec::VIRTIO_NET_CTRL_MAC, table, &tables(&[], &[])), OK);
        for (command, address, brought) in [
            (spec::VIRTIO_NET_CTRL_RX_ALLMULTI, GROUP, true),
            (spec::VIRTIO_NET_CTRL_RX_ALLUNI, OTHER, true),
            (spec::VIRTIO_NET_CTRL_RX_NOMULTI, GROUP, false),
            (spec::VIRTIO_NET_CTRL_RX_NOUNI, MAC, false),
            (spec::VIRTIO_NET_CTRL_RX_NOBCAST, EVERYBODY, false),
        ] {
            let before = is_brought(&mut bed, address, None);
            assert_eq!(bed.command(rx, command, &[1]), OK);
            assert_eq!(is_brought(&mut bed, address, None), brought, "command {command}");
            assert_eq!(bed.command(rx, command, &[0]), OK);
            assert_eq!(is_brought(&mut bed, address, None), before, "command {command} taken back");
        }
        // More than are kept: all of that kind.
        let many: Vec<Octets> = (0..65).map(|number| [2, 0, 0, 0, 1, number]).collect();
        assert_eq!(bed.command(spec::VIRTIO_NET_CTRL_MAC, table, &tables(&many, &[])), OK);
        assert!(is_brought(&mut bed, OTHER, None) && !is_brought(&mut bed, GROUP, None));
        // Another address of its own.
        assert_eq!(bed.command(spec::VIRTIO_NET_CTRL_MAC, table, &tables(&[], &[])), OK);
        assert_eq!(bed.command(spec::VIRTIO_NET_CTRL_MAC, spec::VIRTIO_NET_CTRL_MAC_ADDR_SET, &OTHER), OK);
        assert!(is_brought(&mut bed, OTHER, None) && !is_brought(&mut bed, MAC, None));
        assert_eq!(bed.shared.config_space()[..6], OTHER);
    }
}

#[test]
fn vlans_are_filtered_from_the_first_that_is_named_on() {
    let mut bed = Bed::new(&Shape::new());
    assert!(is_brought(&mut bed, MAC, Some(5)));
    let vlan = |number: u16| number.to_le_bytes();
    assert_eq!(bed.command(spec::VIRTIO_NET_CTRL_VLAN, spec::VIRTIO_NET_CTRL_VLAN_ADD, &vlan(5)), OK);
    for (tag, brought) in [(Some(5), true), (Some(0xe005), true), (Some(6), false), (Some(0), true), (None, true)] {
        assert_eq!(is_brought(&mut bed, MAC, tag), brought, "{tag:?}");
    }
    assert_eq!(bed.command(spec::VIRTIO_NET_CTRL_VLAN, spec::VIRTIO_NET_CTRL_VLAN_DEL, &vlan(5)), OK);
    assert!(!is_brought(&mut bed, MAC, Some(5)));
    assert_eq!(bed.command(spec::VIRTIO_NET_CTRL_VLAN, spec::VIRTIO_NET_CTRL_VLAN_ADD, &vlan(4096)), REFUSED);
}

#[test]
fn a_pair_that_the_driver_does_not_use_brings_nothing() {
    let mut shape = Shape::new();
    shape.settings.pairs = 4;
    // The control queue is behind all pairs once there may be several; here the first three queues are wired.
    shape.wanted &= !(1 << spec::VIRTIO_NET_F_MQ);
    let bed = Bed::new(&shape);
    assert_eq!(bed.shared.control_queue(1 << spec::VIRTIO_NET_F_MQ), Some(8));
    assert_eq!(bed.shared.control_queue(0), Some(2));
    assert_eq!(bed.shared.role(2, 0), NetRole::Control);
    assert_eq!(bed.shared.role(2, 1 << spec::VIRTIO_NET_F_MQ), NetRole::Receive(1));
    assert_eq!(bed.shared.chosen().pairs, 1);
}

#[test]
fn an_announcement_is_asked_for_until_it_is_acknowledged() {
    let mut bed = Bed::new(&Shape::new());
    assert!(bed.shared.announce());
    assert_eq!(bed.shared.config_space()[6], 3, "the link is up, and the driver shall announce itself");
    assert_eq!(bed.command(spec::VIRTIO_NET_CTRL_ANNOUNCE, spec::VIRTIO_NET_CTRL_ANNOUNCE_ACK, &[]), OK);
    assert_eq!(bed.shared.config_space()[6], 1);
}

#[test]
fn a_reset_forgets_what_the_driver_chose() {
    let mut bed = Bed::new(&Shape::new());
    assert_eq!(bed.command(spec::VIRTIO_NET_CTRL_RX, spec::VIRTIO_NET_CTRL_RX_PROMISC, &[0]), OK);
    assert!(!is_brought(&mut bed, OTHER, None));
    bed.shared.announce();
    bed.shared.reset();
    assert!(is_brought(&mut bed, OTHER, None));
    assert_eq!(bed.shared.config_space()[6], 1);
}

#[test]
fn what_is_not_a_command_is_refused_and_changes_nothing() {
    let mut bed = Bed::new(&Shape::new());
    let before = bed.shared.chosen();
    let long = vec![0; 5000];
    let cases: [(u32, u32, &[u8]); 16] = [
        (spec::VIRTIO_NET_CTRL_RX, 0, &[]),
        (spec::VIRTIO_NET_CTRL_RX, 0, &[2]),
        (spec::VIRTIO_NET_CTRL_RX, 0, &[0, 0]),
        (spec::VIRTIO_NET_CTRL_RX, 6, &[0]),
        (spec::VIRTIO_NET_CTRL_MAC, 0, &[]),
        (spec::VIRTIO_NET_CTRL_MAC, 0, &[1, 0, 0, 0]),
        (spec::VIRTIO_NET_CTRL_MAC, 0, &[0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]),
        (spec::VIRTIO_NET_CTRL_MAC, 0, &[0, 0, 0, 0, 0, 0, 0, 0, 0]),
        (spec::VIRTIO_NET_CTRL_MAC, 0, &long),
        (spec::VIRTIO_NET_CTRL_MAC, 1, &[1, 2, 3, 4, 5]),
        (spec::VIRTIO_NET_CTRL_MAC, 1, &GROUP),
        (spec::VIRTIO_NET_CTRL_VLAN, 2, &[1, 0]),
        (spec::VIRTIO_NET_CTRL_ANNOUNCE, 1, &[]),
        // With one pair there is no choice to make, and without offloads none of them.
        (spec::VIRTIO_NET_CTRL_MQ, 0, &[1, 0]),
        (spec::VIRTIO_NET_CTRL_GUEST_OFFLOADS, 0, &[0; 8]),
        (99, 0, &[0]),
    ];
    for (class, command, data) in cases {
        assert_eq!(bed.command(class, command, data), REFUSED, "{class} {command} {:x?}", &data[..data.len().min(9)]);
    }
    assert_eq!(bed.shared.chosen(), before);
    assert_eq!(bed.counters[2].errors.get(), 16);
    assert!(bed.faults.0.lock().unwrap().is_empty());
}

/// What the card says in the place of a driver that knows no such thing.
#[test]
fn the_card_announces_an_address() {
    let mut bed = Bed::new(&Shape::new());
    bed.receive.add_buffers(2, 1);
    bed.shared.announce_for(OTHER);
    let (_, frame) = bed.frame();
    assert_eq!((&frame[..6], &frame[6..12], &frame[12..14]), (&OTHER[..], &EVERYBODY[..], &[0x80, 0x35][..]));
    assert_eq!((&frame[22..28], &frame[32..38]), (&OTHER[..], &OTHER[..]));
    for _ in 0..10 {
        bed.turn();
    }
    assert!(bed.receive.take().is_none(), "once");
}

#[test]
fn hashes_are_reported_to_a_driver_that_asked_for_them() {
    use super::super::hashing::TYPES;
    use super::super::hashing::tests::{KEY, known, rss};
    const MQ: u32 = spec::VIRTIO_NET_CTRL_MQ;
    let mut shape = Shape::new();
    assert_eq!(
        Bed::new(&shape).command(MQ, spec::VIRTIO_NET_CTRL_MQ_RSS_CONFIG, &rss(TYPES, &[0], 0, 1, &KEY)),
        REFUSED
    );
    shape.settings.rss = true;
    for late in [None, Some(7)] {
        let mut bed = Bed::new(&Shape { late, ..shape.clone() });
        let space = bed.shared.config_space();
        assert_eq!(space[17..], [&[40_u8, 128, 0][..], &TYPES.to_le_bytes()].concat());
        bed.receive.add_buffers(8, 1);
        // The loop swaps the addresses of Ethernet alone.
        bed.send(&known(true));
        let (header, frame) = bed.frame();
        assert_eq!((header.hash, header.hash_report), (0, 0), "nothing is asked for yet");
        assert_eq!(frame, looped(&known(true)));
        let hash = [&TYPES.to_le_bytes()[..], &[0; 8], &[40], &KEY].concat();
        assert_eq!(bed.command(MQ, spec::VIRTIO_NET_CTRL_MQ_HASH_CONFIG, &hash), OK);
        bed.send(&known(true));
        let (header, frame) = bed.frame();
        assert_eq!((header.hash, header.hash_report), (0x51cc_c178, 2));
        assert_eq!(frame, looped(&known(true)));
        let alone = rss(spec::VIRTIO_NET_RSS_HASH_TYPE_IPv4, &[0, 0], 0, 1, &KEY);
        assert_eq!(bed.command(MQ, spec::VIRTIO_NET_CTRL_MQ_RSS_CONFIG, &alone), OK);
        assert_eq!(bed.shared.chosen().pairs, 1);
        bed.send(&known(false));
        let (header, _) = bed.frame();
        assert_eq!((header.hash, header.hash_report), (0x323e_8fc2, 1));
        assert_eq!(bed.command(MQ, spec::VIRTIO_NET_CTRL_MQ_RSS_CONFIG, &rss(TYPES, &[1], 0, 1, &KEY)), REFUSED);
        bed.shared.reset();
        bed.send(&known(true));
        assert_eq!(bed.frame().0.hash_report, 0, "forgotten with a reset");
        assert!(bed.faults.0.lock().unwrap().is_empty());
    }
}

/// What changes channels is done by system calls, on a reactor that others use: a driver that toggles gets its turn now and then.
#[test]
fn a_driver_that_toggles_its_channels_waits() {
    const REST_NS: u64 = 10_000_000;
    let network = SoftwareOffload::new(Arc::new(LoopbackBackend::new()));
    let mut bed = Bed::over(&Shape::new(), &network);
    let (class, set) = (spec::VIRTIO_NET_CTRL_GUEST_OFFLOADS, spec::VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET);
    let (rx, promiscuous) = (spec::VIRTIO_NET_CTRL_RX, spec::VIRTIO_NET_CTRL_RX_PROMISC);
    let start = bed.now;
    for _ in 0..50 {
        assert_eq!(bed.command(rx, promiscuous, &[0]), OK);
    }
    assert!(bed.now - start < REST_NS, "what costs nothing is done at once");
    for _ in 0..3 {
        let start = bed.now;
        assert_eq!(bed.command(class, set, &0_u64.to_le_bytes()), OK);
        assert!(bed.now - start < REST_NS);
        assert!(bed.lanes[2].deadline().is_some(), "its reactor may sleep meanwhile");
        assert_eq!(bed.command(rx, promiscuous, &[1]), OK);
        assert!(bed.now - start >= REST_NS);
    }
    assert_eq!(bed.lanes[2].deadline(), None);
}

/// Lanes on other reactors may be asleep when the driver, or the operator, changes something.
#[test]
fn lanes_are_woken_for_what_has_changed() {
    let mut bed = Bed::new(&Shape::new());
    let woken = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&woken);
    bed.shared.wake_lanes_by(move || {
        count.fetch_add(1, Ordering::Relaxed);
    });
    assert_eq!(bed.command(spec::VIRTIO_NET_CTRL_RX, spec::VIRTIO_NET_CTRL_RX_PROMISC, &[0]), OK);
    assert_eq!(woken.load(Ordering::Relaxed), 1);
    bed.shared.set_mac(OTHER);
    bed.shared.set_wanted_up(false);
    assert_eq!(woken.load(Ordering::Relaxed), 3);
}
