#![allow(clippy::unwrap_used, missing_docs, reason = "a test fails by panicking")]
//! The harness for tests of networks, tried on parts that are not ours: DPDK's vhost-user back end, virtual Ethernet of the
//! kernel, QEMU's own tap. What a test of ours sees with these it may ask of our functions.

use std::net::Ipv4Addr;
use std::path::Path;

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, sendto, socket};
use tests::{
    Capture, Driver, GuestSettings, IperfReport, IperfServer, Namespace, Port, Testpmd, TestpmdSettings, network_rig,
};

/// Two namespaces joined by a pair of interfaces `eth0`, with the addresses 192.0.2.1 and 192.0.2.2.
fn joined(rig: &Path) -> [Namespace; 2] {
    let pair = [Namespace::new(rig, "a"), Namespace::new(rig, "b")];
    pair[0].join("eth0", &pair[1], "eth0");
    for (namespace, number) in pair.iter().zip(1..) {
        namespace.address("eth0", &format!("192.0.2.{number}/24"));
        namespace.address("eth0", &format!("2001:db8::{number}/64"));
    }
    pair
}

#[test]
fn frames_of_a_driver_come_back_from_a_back_end() {
    let Some(rig) = network_rig() else { return };
    let folder = tempfile::tempdir().unwrap();
    let plain = Driver { mergeable: false, in_order: false, ..Driver::default() };
    let cases = [
        (Driver::default(), 64),
        (Driver { packed: true, ..Driver::default() }, 1500),
        (Driver { packed: true, ..plain }, 64),
        (Driver { queue_pairs: 2, ..plain }, 1500),
        (Driver::default(), 9000),
    ];
    for (number, (driver, frame_bytes)) in cases.into_iter().enumerate() {
        let socket = folder.path().join(format!("{number}.sock"));
        let settings = TestpmdSettings { forward: "macswap", frame_bytes, ..TestpmdSettings::default() };
        let ports = [Port::Vhost(socket.clone(), driver.queue_pairs)];
        let mut back_end = Testpmd::start(&rig, &ports, &settings);
        back_end.go(0);
        let settings = TestpmdSettings { cpu: 1, forward: "io", ..settings };
        let mut front_end = Testpmd::start(&rig, &[Port::VirtioUser(socket, driver)], &settings);
        // So many go round, and fit into the rings: none may be lost.
        front_end.go(2);
        front_end.wait_for_received(0, 1000);
        front_end.stop();
        back_end.stop();
        let (front, back) = (front_end.counts(0), back_end.counts(0));
        let case = format!("{driver:?}, {frame_bytes} bytes: driver {front:?}, back end {back:?}");
        let going_round = 2 * 32 * u64::from(driver.queue_pairs);
        assert!(front.sent >= front.received && front.sent <= front.received + going_round, "{case}");
        assert!(back.received <= front.sent && front.received <= back.sent, "{case}");
        assert_eq!((front.received_errors, front.sent_errors, back.received_errors), (0, 0, 0), "{case}");
        assert_eq!(front.received_bytes, front.received * u64::from(frame_bytes), "{case}");
        assert_eq!(back.received_bytes, back.received * u64::from(frame_bytes), "{case}");
        front_end.quit();
        back_end.quit();
    }
}

#[test]
fn testpmd_sends_into_a_namespace() {
    let Some(rig) = network_rig() else { return };
    // Without addresses nobody answers.
    let [a, b] = [Namespace::new(&rig, "a"), Namespace::new(&rig, "b")];
    a.join("eth0", &b, "eth0");
    let capture = Capture::start(&rig, &b, "eth0");
    let settings = TestpmdSettings { forward: "io", namespace: Some(&a), ..TestpmdSettings::default() };
    let mut testpmd = Testpmd::start(&rig, &[Port::AfPacket("eth0".to_owned())], &settings);
    testpmd.go(2);
    testpmd.stop();
    let sent = testpmd.counts(0).sent;
    testpmd.quit();
    let captured = capture.stop();
    // Two bursts of 32, from testpmd's own addresses.
    assert_eq!((sent, captured.count("ip.src == 198.18.0.1 && udp")), (64, 64));
    assert!(captured.bad_checksums().is_empty(), "{:?}", captured.bad_checksums());
}

#[test]
fn iperf_counts_what_it_moves() {
    let Some(rig) = network_rig() else { return };
    let [a, b] = joined(&rig);
    let _server = IperfServer::start(&b);
    // Each of iperf3's streams is a thread that is cut off at the end: of what it last wrote or read, a buffer of TCP's or a
    // datagram may have moved without being counted.
    let (wanted, uncounted) = (20 << 20, 2 * (128 << 10));
    for arguments in [&["-n", "20M"][..], &["-n", "20M", "-R"], &["-n", "20M", "-P", "2"]] {
        for address in ["192.0.2.2", "2001:db8::2"] {
            let report = IperfReport::measure(&a, address, arguments);
            assert!(report.sent_bytes + uncounted >= wanted, "{report:?}");
            // What was sent last may come after the receiver was told to stop.
            assert!(report.received_bytes >= wanted / 2, "{report:?}");
            assert!(report.received_bytes <= report.sent_bytes + uncounted, "{report:?}");
            assert!(report.received_bits_per_second > 0.0 && report.datagrams == 0, "{report:?}");
        }
    }
    let report = IperfReport::measure(&a, "192.0.2.2", &["-u", "-b", "50M", "-l", "1400", "-n", "1400K"]);
    let arrived = (report.datagrams - report.datagrams_lost) * 1400;
    assert!(report.datagrams >= 1000 && report.sent_bytes.abs_diff(report.datagrams * 1400) <= 1400, "{report:?}");
    assert!(report.received_bytes.abs_diff(arrived) <= 1400, "{report:?}");
}

/// An IPv4 packet with a UDP datagram of `payload` from 192.0.2.1 to 192.0.2.2, port 9, with the right checksum of UDP. The
/// kernel writes that of IP.
fn datagram(payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + payload.len()).unwrap();
    let (source, destination) = (Ipv4Addr::new(192, 0, 2, 1).octets(), Ipv4Addr::new(192, 0, 2, 2).octets());
    let mut udp = [&[0, 9, 0, 9][..], &length.to_be_bytes(), &[0, 0], payload].concat();
    let pseudo = [&source[..], &destination, &[0, 17], &length.to_be_bytes(), &udp].concat();
    let mut sum: u32 =
        pseudo.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    udp[6..8].copy_from_slice(&(!u16::try_from(sum).unwrap()).to_be_bytes());
    [&[0x45, 0, 0, 0, 0, 1, 0, 0, 64, 17, 0, 0][..], &source, &destination, &udp].concat()
}

#[test]
fn tshark_tells_good_checksums_from_bad() {
    let Some(rig) = network_rig() else { return };
    let [a, b] = joined(&rig);
    // Without offloads the kernel sends what would be on a wire.
    for namespace in [&a, &b] {
        namespace.run("ethtool", &["-K", "eth0", "tx", "off", "tso", "off", "gso", "off", "gro", "off"]);
    }
    let _server = IperfServer::start(&b);
    let capture = Capture::start(&rig, &b, "eth0");
    a.run("ping", &["-c", "2", "-i", "0.2", "192.0.2.2"]);
    a.run("ping", &["-c", "2", "-i", "0.2", "2001:db8::2"]);
    let _report = IperfReport::measure(&a, "192.0.2.2", &["-n", "1M"]);
    let captured = capture.stop();
    assert_eq!(captured.bad_checksums(), [] as [&str; 0]);
    assert_eq!((captured.count("icmp"), captured.count("icmpv6.type == 128 || icmpv6.type == 129")), (4, 4));
    assert!(captured.count("tcp") > 700 && captured.good_checksums() >= captured.count("tcp || icmp || icmpv6"));

    let capture = Capture::start(&rig, &b, "eth0");
    let good = datagram(b"sound");
    let mut bad = good.clone();
    *bad.last_mut().unwrap() ^= 1;
    a.inside(|| {
        let raw = socket(AddressFamily::Inet, SockType::Raw, SockFlag::empty(), SockProtocol::Raw).unwrap();
        for packet in [&good, &bad, &good] {
            let to = SockaddrIn::new(192, 0, 2, 2, 0);
            sendto(std::os::fd::AsRawFd::as_raw_fd(&raw), packet, &to, MsgFlags::empty()).unwrap();
        }
    });
    let captured = capture.stop();
    let frames = captured.fields("udp.dstport == 9 && !icmp", &["udp.checksum.status"]);
    assert_eq!(frames, ["1", "0", "1"]);
    assert_eq!(captured.bad_checksums().len(), 1);
}

#[test]
fn a_namespace_goes_with_its_programs() {
    let Some(rig) = network_rig() else { return };
    let namespace = Namespace::new(&rig, "short");
    let name = Path::new("/run/netns").join(namespace.name());
    assert!(name.exists());
    let mut server = IperfServer::start(&namespace);
    drop(namespace);
    tests::wait_for("the server's end", || !server.process().is_running());
    assert!(!name.exists());
}

#[test]
fn two_guests_behind_taps_of_qemu_reach_a_namespace_and_one_another() {
    let Some(rig) = network_rig() else { return };
    let folder = tempfile::tempdir().unwrap();
    let namespace = Namespace::new(&rig, "taps");
    for tap in ["tap0", "tap1"] {
        namespace.tap(tap, &["vnet_hdr"]);
    }
    namespace.bridge("br0", &["tap0", "tap1"]);
    namespace.address("br0", "192.0.2.1/24");
    namespace.address("br0", "2001:db8::1/64");
    let boot = |number: u32, job: &str| {
        let job = format!(
            "set -e
            ip.iproute2 address add 192.0.2.1{number}/24 dev eth0
            ip.iproute2 address add 2001:db8::1{number}/64 dev eth0 nodad
            ip.iproute2 link set eth0 up
            {job}"
        );
        let netdev = format!("tap,id=n0,ifname=tap{number},script=no,downscript=no");
        let device = format!("virtio-net-pci,netdev=n0,mac=52:54:00:00:00:0{number}");
        let arguments = ["-netdev", &netdev, "-device", &device];
        let name = format!("guest{number}");
        let settings = GuestSettings::new(folder.path(), &job, &arguments);
        GuestSettings { name: &name, namespace: Some(&namespace), ..settings }.boot()
    };
    let server = boot(0, "iperf3 --server --one-off");
    let client = boot(
        1,
        "ping -c 2 192.0.2.1
        ping6 -c 2 2001:db8::1
        until ping -c 1 -W 1 192.0.2.10; do true; done
        ethtool -k eth0 | grep 'tcp-segmentation-offload: on'
        measure -n 4M --client 192.0.2.10 >/tmp/report
        cat /tmp/report",
    );
    let output = client.succeed();
    let report = IperfReport::parse(&output);
    // What was sent last may come after the server was told to stop.
    assert!(report.received_bytes >= 2 << 20, "{output}");
    assert_eq!(output.matches(" 0% packet loss").count(), 3, "{output}");
    server.succeed();
}
