#![allow(clippy::unwrap_used, missing_docs, reason = "a test fails by panicking")]
//! Uplinks by an interface that is there: one end of a veth, whose other end is in a namespace that plays the network.

use std::path::Path;

use tests::{
    Capture, Card, CardSettings, Driver, GuestSettings, IperfReport, IperfServer, Namespace, Port, Process, Testpmd,
    TestpmdSettings, network_rig,
};

const OWN: &str = "192.0.2.1";
const GUEST: &str = "192.0.2.2";
const MAC: &str = "52:54:00:12:34:56";
const KINDS: [&str; 2] = ["af-packet", "af-xdp"];

/// A card with one function on an uplink of a kind, and the network.
struct Lab {
    card: Card,
    /// Where the card's end of the wire is, `eth1`.
    near: Namespace,
    /// Where the other end is, `eth0`.
    far: Namespace,
}

impl Lab {
    /// `None` where the kernel has no AF_XDP, and it is asked for.
    fn new(rig: &Path, kind: &str, link: &str) -> Option<Self> {
        Self::with_pairs(rig, kind, link, 1)
    }

    /// The same with so many queue pairs, and queues of the wire.
    fn with_pairs(rig: &Path, kind: &str, link: &str, pairs: u16) -> Option<Self> {
        if kind == "af-xdp" && !has_af_xdp() {
            eprintln!("skipped: this kernel has no AF_XDP");
            return None;
        }
        let (near, far) = (Namespace::new(rig, "near"), Namespace::new(rig, "far"));
        near.join("eth1", &far, "eth0");
        let queues = pairs.to_string();
        if pairs > 1 {
            // What is sent by a queue at one end comes by the same at the other.
            near.run("ethtool", &["-L", "eth1", "rx", &queues, "tx", &queues]);
            far.run("ethtool", &["-L", "eth0", "rx", &queues, "tx", &queues]);
        }
        if kind == "af-xdp" {
            // A far end that leaves checksums undone would leave them so for good.
            complete(&far, "eth0");
        }
        far.address("eth0", &format!("{OWN}/24"));
        far.address("eth0", "2001:db8::1/64");
        let parts = format!(
            r#"
[[uplink]]
name = "u"
backend = {{ type = "{kind}", interface = "eth1", netns = "{}"{} }}
[[function]]
name = "f"
type = "net"
link = {{ type = "{link}", socket = "@/f.sock" }}
uplink = "u"
mac = "{MAC}"
queue-pairs = {pairs}
"#,
            near.name(),
            if kind == "af-xdp" { format!(", queues = {queues}") } else { String::new() },
        );
        let card = Card::start(&CardSettings { parts, ..CardSettings::default() });
        Some(Self { card, near, far })
    }

    /// Boots a guest whose interface is set up; then it runs `job`.
    fn boot(&self, job: &str) -> Process {
        let job = format!(
            "set -e
            ip.iproute2 address add {GUEST}/24 dev eth0
            ip.iproute2 address add 2001:db8::2/64 dev eth0 nodad
            ip.iproute2 link set eth0 up
            {job}"
        );
        let socket = self.card.path("f.sock");
        let device =
            format!(r#"{{"driver":"vfio-user-pci","socket":{{"type":"unix","path":"{}"}}}}"#, socket.display());
        GuestSettings::new(self.card.folder(), &job, &["-device", &device, "-smp", "2"]).boot()
    }

    fn counted(&self, what: &str, way: &str) -> u64 {
        self.card.stats()["functions"][0][way][what].as_u64().unwrap()
    }
}

fn has_af_xdp() -> bool {
    // Its sockets are listed here as soon as the kernel knows them.
    std::fs::read_to_string("/proc/net/protocols").unwrap().lines().any(|line| line.starts_with("XDP "))
}

/// Has an interface do all that it is left, before frames go over the wire.
fn complete(namespace: &Namespace, interface: &str) {
    namespace.run("ethtool", &["-K", interface, "tx", "off", "tso", "off", "gso", "off"]);
}

/// Small packets and large ones pass, by either version of IP, over TCP and UDP, both ways; and what is on the wire has right
/// checksums.
#[test]
fn a_guest_talks_to_the_network() {
    let Some(rig) = network_rig() else { return };
    for kind in KINDS {
        let Some(lab) = Lab::new(&rig, kind, "vfio-user") else { continue };
        let mut guest = lab.boot(&format!(
            "[ $(cat /sys/class/net/eth0/mtu) = 1500 ]
            ping -c 2 {OWN}
            ping -c 2 -s 1400 {OWN}
            ping6 -c 2 2001:db8::1
            for number in $(seq 5); do
                iperf3 --server --one-off >/tmp/server &
                until grep -q ':1451 [0:]* 0A' /proc/net/tcp /proc/net/tcp6; do sleep 0.1; done
                echo SERVES $number
                wait
            done
            measure -n 1M --client {OWN} >/tmp/first
            measure -n 1M --reverse --client {OWN} >/tmp/in
            measure -n 1M --client 2001:db8::1 >/tmp/six
            measure -u -b 10M -n 1M -l 1400 --client {OWN} >/tmp/udp
            ping -c 2 {OWN}
            echo ALL"
        ));
        let runs: [(&str, &[&str]); 5] = [
            (GUEST, &["-n", "8M"]),
            (GUEST, &["-n", "8M", "-R"]),
            ("2001:db8::2", &["-n", "8M"]),
            (GUEST, &["-u", "-b", "10M", "-n", "1M", "-l", "1400"]),
            (GUEST, &["-u", "-b", "10M", "-n", "1M", "-l", "1400", "-R"]),
        ];
        for (number, (address, arguments)) in (1..).zip(runs) {
            guest.wait_for_output(&format!("SERVES {number}\r"));
            let report = IperfReport::measure(&lab.far, address, arguments);
            let case = format!("{kind}, {arguments:?}: {report:?}");
            if report.datagrams == 0 {
                assert!(report.received_bytes >= 4 << 20, "{case}");
            } else {
                assert!(report.datagrams > 700 && report.datagrams_lost < report.datagrams / 10 * 9, "{case}");
            }
        }
        // From here on the wire carries what a wire does.
        if kind == "af-packet" {
            complete(&lab.near, "eth1");
            complete(&lab.far, "eth0");
        }
        lab.far.run("ethtool", &["-K", "eth0", "gro", "off"]);
        let capture = Capture::start(&rig, &lab.far, "eth0");
        let _server = IperfServer::start(&lab.far);
        let output = guest.succeed();
        assert!(output.contains("ALL\r"), "{output}");
        assert_eq!(output.matches(" 0% packet loss").count(), 4, "{kind}: {output}");
        let captured = capture.stop();
        assert_eq!(captured.bad_checksums(), [] as [&str; 0], "{kind}");
        assert!(captured.count("tcp") > 1000 && captured.count("udp") > 700 && captured.count("icmp") >= 4, "{kind}");
        let (sent, brought) = (lab.counted("bytes", "transmit"), lab.counted("bytes", "receive"));
        assert!(sent > 6 << 20 && brought > 16 << 20, "{kind}: {sent} bytes out, {brought} in");
    }
}

/// With two pairs both carry traffic, both ways: flows are spread by sockets' filters, or by the queues of the wire.
#[test]
fn both_queue_pairs_carry_traffic() {
    let Some(rig) = network_rig() else { return };
    for kind in KINDS {
        let Some(lab) = Lab::with_pairs(&rig, kind, "vfio-user", 2) else { continue };
        let _server = IperfServer::start(&lab.far);
        let job = format!(
            "ethtool -L eth0 combined 2
            measure -P 8 -n 8M --client {OWN} >/tmp/out
            measure -P 8 -n 8M --reverse --client {OWN} >/tmp/in"
        );
        lab.boot(&job).succeed();
        let stats: serde_json::Value =
            serde_json::from_str(&lab.card.command(&["stats", "--json", "--queues"])).unwrap();
        for (queue, way) in (0..4).zip(["receive", "transmit"].into_iter().cycle()) {
            let packets = stats["functions"][queue][way]["packets"].as_u64().unwrap();
            assert!(packets > 50, "{kind}: queue {queue} has {packets}: {stats}");
        }
    }
}

/// The wire is cut and laid again under a running guest: its link goes down and up.
#[test]
fn an_interface_that_is_deleted_comes_back() {
    let Some(rig) = network_rig() else { return };
    for kind in KINDS {
        let Some(lab) = Lab::new(&rig, kind, "vfio-user") else { continue };
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
        lab.near.ip(&["link", "delete", "eth1"]);
        guest.wait_for_output("DOWN\r");
        lab.near.join("eth1", &lab.far, "eth0");
        lab.far.address("eth0", &format!("{OWN}/24"));
        guest.wait_for_output("AGAIN\r");
        guest.succeed();
    }
}

/// DPDK's driver sends back what comes: frames of a source at the far end go round.
#[test]
fn frames_of_a_source_come_back_from_a_driver() {
    let Some(rig) = network_rig() else { return };
    for kind in KINDS {
        let Some(lab) = Lab::new(&rig, kind, "vhost-user") else { continue };
        let driver = Port::VirtioUser(lab.card.path("f.sock"), Driver::default());
        let settings = TestpmdSettings { cpu: 1, forward: "macswap", ..TestpmdSettings::default() };
        let mut back = Testpmd::start(&rig, &[driver], &settings);
        back.go(0);
        let peer = format!("--eth-peer=0,{MAC}");
        let source = TestpmdSettings {
            forward: "flowgen",
            namespace: Some(&lab.far),
            arguments: &[&peer, "--flowgen-clones=0"],
            ..TestpmdSettings::default()
        };
        let mut source = Testpmd::start(&rig, &[Port::AfPacket("eth0".to_owned())], &source);
        source.go(0);
        back.wait_for_received(0, 5000);
        source.wait_for_received(0, 2000);
        source.stop();
        source.quit();
        back.stop();
        let driven = back.counts(0);
        back.quit();
        assert_eq!(driven.sent_errors, 0, "{kind}");
        let (sent, brought) = (lab.counted("packets", "transmit"), lab.counted("packets", "receive"));
        assert!(sent >= 2000 && brought >= 5000, "{kind}: {sent} out, {brought} in");
    }
}
