#![allow(clippy::unwrap_used, missing_docs, reason = "a test fails by panicking")]
//! Linux guests under QEMU with network functions, over both links, on taps of the card.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tests::{Capture, Card, CardSettings, GuestSettings, IperfReport, IperfServer, Namespace, Process, network_rig};

/// A card with one network function, which is on a tap in a namespace.
struct Lab {
    card: Card,
    namespace: Namespace,
    link: &'static str,
    pairs: u16,
}

const OWN: &str = "192.0.2.1";
const GUEST: &str = "192.0.2.2";
const MAC: &str = "52:54:00:12:34:56";

impl Lab {
    fn new(rig: &Path, link: &'static str, pairs: u16) -> Self {
        Self::on(Namespace::new(rig, "net"), link, pairs)
    }

    /// The same on a namespace that may have the tap already; then it is not the card's own.
    fn on(namespace: Namespace, link: &'static str, pairs: u16) -> Self {
        let parts = format!(
            r#"
[[uplink]]
name = "u"
backend = {{ type = "tap", name = "dray0", netns = "{}" }}
[[function]]
name = "f"
type = "net"
link = {{ type = "{link}", socket = "@/f.sock" }}
uplink = "u"
mac = "{MAC}"
queue-pairs = {pairs}
"#,
            namespace.name()
        );
        let card = Card::start(&CardSettings { parts, ..CardSettings::default() });
        namespace.address("dray0", &format!("{OWN}/24"));
        namespace.address("dray0", "2001:db8::1/64");
        Self { card, namespace, link, pairs }
    }

    /// Boots a guest whose interface is set up; then it runs `job`.
    fn boot(&self, job: &str) -> Process {
        self.boot_for(job, 0)
    }

    /// The same for a guest that keeps a file of so many MiB in its memory, and moves it many times.
    fn boot_for(&self, job: &str, file_mib: u32) -> Process {
        let path = self.card.path("f.sock");
        let path = path.display();
        let job = format!(
            "set -e
            ip.iproute2 address add {GUEST}/24 dev eth0
            ip.iproute2 address add 2001:db8::2/64 dev eth0 nodad
            ip.iproute2 link set eth0 up
            {job}"
        );
        let vfio = format!(r#"{{"driver":"vfio-user-pci","socket":{{"type":"unix","path":"{path}"}}}}"#);
        let chardev = format!("socket,id=c0,path={path}");
        let netdev = format!("vhost-user,id=n0,chardev=c0,queues={}", self.pairs);
        let vectors = self.pairs * 2 + 2;
        let device = format!("virtio-net-pci,netdev=n0,mac={MAC},mq=on,vectors={vectors}");
        let arguments = match self.link {
            "vfio-user" => vec!["-device", &vfio, "-smp", "2"],
            _ => vec!["-chardev", &chardev, "-netdev", &netdev, "-device", &device, "-smp", "2"],
        };
        let settings = GuestSettings::new(self.card.folder(), &job, &arguments);
        // Half of a guest's memory is for files; a MiB takes seconds at worst, 32 times over.
        let limit = settings.limit + Duration::from_secs(20) * file_mib;
        GuestSettings { memory_mib: settings.memory_mib + 4 * file_mib, limit, ..settings }.boot()
    }

    /// What each queue of one way counted of `what`; `receive` or `transmit`.
    fn counted(&self, what: &str, way: &str) -> Vec<u64> {
        let stats: serde_json::Value =
            serde_json::from_str(&self.card.command(&["stats", "--json", "--queues"])).unwrap();
        let queues = stats["functions"].as_array().unwrap();
        let first = usize::from(way == "transmit");
        let pairs = usize::from(self.pairs);
        queues[..pairs * 2].iter().skip(first).step_by(2).map(|queue| queue[way][what].as_u64().unwrap()).collect()
    }
}

/// A report that a guest printed.
fn report(output: &str, name: &str) -> IperfReport {
    let text = output.split(&format!("REPORT {name}\r\n")).nth(1).unwrap();
    IperfReport::parse(text.split("REPORT").next().unwrap())
}

const LINKS: [&str; 2] = ["vhost-user", "vfio-user"];

/// Addresses are found, small packets and large ones pass, by either version of IP, over TCP and UDP, both ways; and what goes over
/// the tap has right checksums.
#[test]
fn a_guest_talks_to_the_network() {
    let Some(rig) = network_rig() else { return };
    for link in LINKS {
        let lab = Lab::new(&rig, link, 1);
        let mut server = IperfServer::start(&lab.namespace);
        let mut guest = lab.boot(&format!(
            "[ $(cat /sys/class/net/eth0/address) = {MAC} ]
            [ $(cat /sys/class/net/eth0/mtu) = 1500 ]
            ping -c 2 {OWN}
            ping -c 2 -s 1400 {OWN}
            ping6 -c 2 2001:db8::1
            measure -n 8M --client {OWN} >/tmp/out
            measure -n 8M --reverse --client {OWN} >/tmp/in
            measure -n 4M --client 2001:db8::1 >/tmp/six
            measure -u -b 20M -n 2M -l 1400 --client {OWN} >/tmp/udp
            measure -u -b 20M -n 2M -l 1400 --reverse --client {OWN} >/tmp/udp-in
            for report in out in six udp udp-in; do echo REPORT $report; cat /tmp/$report; done
            ip.iproute2 -s link show eth0
            iperf3 --server --one-off >/tmp/server &
            until grep -q ':1451 [0:]* 0A' /proc/net/tcp /proc/net/tcp6; do sleep 0.1; done
            echo SERVES
            wait"
        ));
        guest.wait_for_output("SERVES");
        let measured = IperfReport::measure(&lab.namespace, GUEST, &["-n", "8M"]);
        // Whoever sends tells the receiver to stop on another connection, which overtakes what is queued on a busy machine.
        assert!(measured.received_bytes >= 4 << 20, "{link}: {measured:?}");
        let output = guest.succeed();
        assert_eq!(output.matches(" 0% packet loss").count(), 3, "{link}: {output}");
        for (name, bytes) in [("out", 4 << 20), ("in", 7 << 20), ("six", 2 << 20)] {
            let report = report(&output, name);
            assert!(report.received_bytes >= bytes, "{link}, {name}: {report:?}");
        }
        for name in ["udp", "udp-in"] {
            let report = report(&output, name);
            assert!(
                report.datagrams > 1400 && report.datagrams_lost < report.datagrams / 10 * 9,
                "{link}, {name}: {report:?}"
            );
        }
        assert!(server.process().is_running());
        let sent: u64 = lab.counted("bytes", "transmit").iter().sum();
        let brought: u64 = lab.counted("bytes", "receive").iter().sum();
        assert!(sent > 8 << 20 && brought > 16 << 20, "{link}: {sent} bytes out, {brought} in");
    }
}

/// With two pairs and two CPUs both pairs carry traffic.
#[test]
fn both_queue_pairs_carry_traffic() {
    let Some(rig) = network_rig() else { return };
    for link in LINKS {
        let lab = Lab::new(&rig, link, 2);
        let _server = IperfServer::start(&lab.namespace);
        let job = format!(
            "ethtool -L eth0 combined 2
            ethtool -l eth0
            measure -P 8 -n 16M --client {OWN} >/dev/null
            measure -P 8 -n 16M --reverse --client {OWN} >/dev/null"
        );
        lab.boot(&job).succeed();
        for way in ["receive", "transmit"] {
            let packets = lab.counted("packets", way);
            assert!(packets.iter().all(|count| *count > 50), "{link}: {packets:?}");
        }
    }
}

/// A file arrives as it was sent, with every combination of the offloads of both sides.
#[test]
fn a_file_arrives_bit_exact_whatever_is_left_undone() {
    let Some(rig) = network_rig() else { return };
    let mib = tests::rounds(1, 4, 100);
    let bytes = mib as usize * (1 << 20);
    for link in LINKS {
        let lab = Lab::new(&rig, link, 1);
        let mut expected = Vec::with_capacity(bytes);
        let mut state = 0x1234_5678_u32;
        while expected.len() < bytes {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            expected.extend(state.to_be_bytes());
        }
        let expected = Arc::new(expected);
        let file = lab.card.path("file");
        std::fs::write(&file, expected.as_slice()).unwrap();
        let sums = String::from_utf8(std::process::Command::new("md5sum").arg(&file).output().unwrap().stdout).unwrap();
        let sum = sums.split_whitespace().next().unwrap();
        let (gives, takes) = lab.namespace.inside(|| {
            let listen = |port: u16| TcpListener::bind((OWN, port)).unwrap();
            (listen(7000), listen(7001))
        });
        let given = Arc::clone(&expected);
        // Both end with the test's process.
        std::thread::spawn(move || gives.incoming().for_each(|stream| drop(stream.unwrap().write_all(&given))));
        let (said, taken) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for stream in takes.incoming() {
                let mut bytes = Vec::new();
                stream.unwrap().read_to_end(&mut bytes).unwrap();
                said.send(bytes == *expected).unwrap();
            }
        });
        let job = format!(
            "for tx in on off; do for sg in on off; do for tso in on off; do for rx in on off; do
                ethtool -K eth0 rx $rx gro $rx tx $tx sg $sg tso $tso 2>/dev/null || true
                nc {OWN} 7000 </dev/null >/tmp/file
                echo \"$tx $sg $tso $rx $(md5sum </tmp/file)\"
                [ \"$(md5sum </tmp/file)\" = \"{sum}  -\" ]
                nc {OWN} 7001 </tmp/file
            done; done; done; done; echo ALL"
        );
        let output = lab.boot_for(&job, mib).succeed();
        assert!(output.contains("ALL"), "{output}");
        for number in 0..16 {
            assert!(taken.recv_timeout(Duration::from_secs(60)).unwrap(), "{link}: file {number} differs");
        }
    }
}

/// What leaves the card by its tap is as it should be on a wire, once the kernel has done what was left to it.
#[test]
fn what_is_captured_has_right_checksums() {
    let Some(rig) = network_rig() else { return };
    let lab = Lab::new(&rig, "vfio-user", 1);
    let other = Namespace::new(&rig, "peer");
    lab.namespace.join("eth1", &other, "eth0");
    lab.namespace.run("sh", &["-c", "echo 1 >/proc/sys/net/ipv4/ip_forward"]);
    lab.namespace.address("eth1", "198.51.100.1/24");
    // The wire: what a veth hands on without offloads.
    lab.namespace.run("ethtool", &["-K", "eth1", "tx", "off", "tso", "off", "gso", "off"]);
    other.address("eth0", "198.51.100.2/24");
    other.ip(&["route", "add", "default", "via", "198.51.100.1"]);
    other.run("ethtool", &["-K", "eth0", "tx", "off", "tso", "off", "gso", "off", "gro", "off"]);
    let _server = IperfServer::start(&other);
    let capture = Capture::start(&rig, &other, "eth0");
    let job = format!(
        "ip.iproute2 route add default via {OWN}
        ping -c 2 198.51.100.2
        measure -n 2M --client 198.51.100.2 >/dev/null
        measure -n 2M --reverse --client 198.51.100.2 >/dev/null"
    );
    lab.boot(&job).succeed();
    let captured = capture.stop();
    assert_eq!(captured.bad_checksums(), [] as [&str; 0]);
    assert!(captured.count("tcp") > 1000 && captured.count("icmp") == 4, "{}", captured.count("tcp"));
}

/// The operator takes the link down and up again, and changes the address: the guest sees it.
#[test]
fn the_guest_sees_what_the_operator_does() {
    let Some(rig) = network_rig() else { return };
    let lab = Lab::new(&rig, "vfio-user", 1);
    let mut guest = lab.boot(&format!(
        "state() {{ for i in $(seq 300); do [ $(cat /sys/class/net/eth0/carrier) = $1 ] && return; sleep 0.1; done; false; }}
        state 1
        echo UP
        state 0
        echo DOWN
        state 1
        ping -c 1 {OWN}
        echo AGAIN"
    ));
    guest.wait_for_output("UP\r");
    lab.card.command(&["function", "set", "f", "--link", "down"]);
    guest.wait_for_output("DOWN\r");
    lab.card.command(&["function", "set", "f", "--link", "up"]);
    guest.wait_for_output("AGAIN\r");
    guest.succeed();
}

/// An interface that is deleted under a running guest: the link goes down, and up again when it returns.
#[test]
fn a_tap_that_is_deleted_comes_back() {
    let Some(rig) = network_rig() else { return };
    let namespace = Namespace::new(&rig, "net");
    // Not the card's own, which the card would make again before a busy guest has looked.
    namespace.tap("dray0", &["multi_queue"]);
    let lab = Lab::on(namespace, "vfio-user", 1);
    let mut guest = lab.boot(&format!(
        "state() {{ for i in $(seq 300); do [ $(cat /sys/class/net/eth0/carrier) = $1 ] && return; sleep 0.1; done; false; }}
        ping -c 1 {OWN}
        echo UP
        state 0
        echo DOWN
        state 1
        until ping -c 1 -W 1 {OWN}; do true; done
        echo AGAIN"
    ));
    guest.wait_for_output("UP\r");
    lab.namespace.ip(&["link", "delete", "dray0"]);
    guest.wait_for_output("DOWN\r");
    lab.namespace.tap("dray0", &["multi_queue"]);
    lab.namespace.address("dray0", &format!("{OWN}/24"));
    guest.wait_for_output("AGAIN\r");
    guest.succeed();
}
