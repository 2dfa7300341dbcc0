#![allow(clippy::unwrap_used, missing_docs, reason = "a test fails by panicking")]
//! Linux guests under QEMU on the ports of a switch, and one whose driver says where flows go.

use std::path::Path;

use tests::{Card, CardSettings, GuestSettings, IperfReport, IperfServer, Namespace, Process, network_rig};

const OWN: &str = "192.0.2.1";
const FIRST: &str = "192.0.2.2";
const SECOND: &str = "192.0.2.3";

/// The arguments that plug in the function at `path`.
fn device(link: &str, path: &Path, mac: &str, pairs: u16) -> Vec<String> {
    let path = path.display();
    let arguments = match link {
        "vfio-user" => {
            vec![
                "-device".to_owned(),
                format!(r#"{{"driver":"vfio-user-pci","socket":{{"type":"unix","path":"{path}"}}}}"#),
            ]
        }
        _ => vec![
            "-chardev".to_owned(),
            format!("socket,id=c0,path={path}"),
            "-netdev".to_owned(),
            format!("vhost-user,id=n0,chardev=c0,queues={pairs}"),
            "-device".to_owned(),
            format!("virtio-net-pci,netdev=n0,mac={mac},mq=on,vectors={}", pairs * 2 + 2),
        ],
    };
    arguments.into_iter().chain(["-smp".to_owned(), "2".to_owned()]).collect()
}

fn boot(card: &Card, name: &str, address: &str, arguments: &[String], job: &str) -> Process {
    let last = address.rsplit('.').next().unwrap();
    let job = format!(
        "set -e
        ip.iproute2 address add {address}/24 dev eth0
        ip.iproute2 address add 2001:db8::{last}/64 dev eth0 nodad
        ip.iproute2 link set eth0 up
        {job}"
    );
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    GuestSettings { name, ..GuestSettings::new(card.folder(), &job, &arguments) }.boot()
}

/// What a queue of a function counted: `receive` or `transmit`.
fn counts(card: &Card, function: &str, queue: usize, way: &str) -> serde_json::Value {
    let stats: serde_json::Value = serde_json::from_str(&card.command(&["stats", "--json", "--queues"])).unwrap();
    let queues = stats["functions"].as_array().unwrap().iter().filter(|row| row["function"] == function);
    let queue = queues.clone().nth(queue).unwrap_or_else(|| panic!("{function} has no queue {queue}: {stats}"));
    queue[way].clone()
}

/// Bytes that a receiving queue brought.
fn bytes(card: &Card, function: &str, queue: usize) -> u64 {
    counts(card, function, queue, "receive")["bytes"].as_u64().unwrap()
}

/// Two guests, one over each link, on access ports of one VLAN reach each other and, tagged, a tap; not what is in another VLAN.
#[test]
fn guests_reach_each_other_and_the_uplink() {
    let Some(rig) = network_rig() else { return };
    let namespace = Namespace::new(&rig, "switch");
    let function = |name: &str, link: &str, last: u8, more: &str| {
        format!(
            "[[function]]\nname = \"{name}\"\ntype = \"net\"\nuplink = \"lan\"\nmac = \"52:54:00:12:34:{last:02}\"\n{more}\n\
             link = {{ type = \"{link}\", socket = \"@/{name}.sock\" }}\n"
        )
    };
    let spoof = |address: &str, last: u8| {
        format!("vlan = 10\nanti-spoofing = {{ vlan = [], ip = [\"{address}\", \"2001:db8::{last}\"] }}")
    };
    let parts = format!(
        "[[uplink]]\nname = \"lan\"\nbackend = {{ type = \"switch\", uplink = \"wan\" }}\n\
         [[uplink]]\nname = \"wan\"\nbackend = {{ type = \"tap\", name = \"dray0\", netns = \"{}\" }}\n{}{}",
        namespace.name(),
        function("one", "vhost-user", 2, &spoof(FIRST, 2)),
        function("two", "vfio-user", 3, &spoof(SECOND, 3)),
    );
    let card = Card::start(&CardSettings { parts, ..CardSettings::default() });
    namespace.ip(&["link", "set", "dray0", "up"]);
    // It answers for what is on the interface that is asked alone.
    namespace.run("sh", &["-c", "echo 1 >/proc/sys/net/ipv4/conf/all/arp_ignore"]);
    for (vlan, address) in [("10", OWN), ("20", "192.0.2.4")] {
        let name = format!("dray0.{vlan}");
        namespace.ip(&["link", "add", "link", "dray0", "name", &name, "type", "vlan", "id", vlan]);
        namespace.address(&name, &format!("{address}/32"));
    }
    namespace.ip(&["route", "add", "192.0.2.0/24", "dev", "dray0.10", "src", OWN]);
    namespace.address("dray0.10", "2001:db8::1/64");
    let mut server = IperfServer::start(&namespace);
    let serves = "ping -c 2 192.0.2.1
        for turn in tcp reverse udp; do iperf3 --server --one-off >/dev/null; done
        echo SERVED";
    let mut second = boot(&card, "second", SECOND, &device("vfio-user", &card.path("two.sock"), "", 1), serves);
    let asks = format!(
        "until ping -c 1 -W 1 {SECOND} >/dev/null; do :; done
        ping -c 2 {SECOND}
        ping6 -c 2 2001:db8::3
        ping -c 2 {OWN}
        until iperf3 --json -n 8M --client {SECOND} >/tmp/tcp; do :; done
        until iperf3 --json -n 8M --reverse --client {SECOND} >/tmp/reverse; do :; done
        until iperf3 --json -u -b 20M -n 2M -l 1400 --client {SECOND} >/tmp/udp; do :; done
        iperf3 --json -n 8M --client {OWN} >/tmp/out
        iperf3 --json -n 8M --reverse --client {OWN} >/tmp/in
        for report in tcp reverse udp out in; do echo REPORT $report; cat /tmp/$report; done
        # Nobody there, in this VLAN.
        if ping -c 2 -W 1 192.0.2.4; then exit 1; fi
        # It may not say that it is another.
        ip.iproute2 address add 192.0.2.77/24 dev eth0
        if ping -c 2 -W 1 -I 192.0.2.77 {SECOND}; then exit 1; fi
        echo ASKED"
    );
    let mac = "52:54:00:12:34:02";
    let first = boot(&card, "first", FIRST, &device("vhost-user", &card.path("one.sock"), mac, 1), &asks);
    let output = first.succeed();
    assert!(output.contains("ASKED"), "{output}");
    for (name, bytes) in [("tcp", 8 << 20), ("reverse", 8 << 20), ("out", 8 << 20), ("in", 8 << 20)] {
        let text = output.split(&format!("REPORT {name}\r\n")).nth(1).unwrap();
        let report = IperfReport::parse(text.split("REPORT").next().unwrap());
        assert!(report.received_bytes >= bytes, "{name}: {report:?}");
    }
    second.wait_for_output("SERVED");
    assert!(second.succeed().contains(" 0% packet loss"));
    assert!(server.process().is_running());
    let spoofed = counts(&card, "one", 1, "transmit")["drops"]["spoofed"].as_u64().unwrap_or(0);
    assert!(spoofed > 0, "what it said it was not was dropped");
    let brought = bytes(&card, "two", 0);
    assert!(brought > 8 << 20, "{brought}");
}

/// With `rss` a driver says which flows go to which pair, and they do.
#[test]
fn a_driver_says_which_pair_takes_a_flow() {
    let Some(rig) = network_rig() else { return };
    let namespace = Namespace::new(&rig, "rss");
    let parts = format!(
        "[[uplink]]\nname = \"u\"\nbackend = {{ type = \"tap\", name = \"dray0\", netns = \"{}\" }}\n\
         [[function]]\nname = \"f\"\ntype = \"net\"\nuplink = \"u\"\nqueue-pairs = 2\nrss = true\n\
         link = {{ type = \"vfio-user\", socket = \"@/f.sock\" }}\n",
        namespace.name()
    );
    let card = Card::start(&CardSettings { parts, count: "2".to_owned(), ..CardSettings::default() });
    namespace.address("dray0", &format!("{OWN}/24"));
    let _server = IperfServer::start(&namespace);
    let job = format!(
        "ethtool -L eth0 combined 2
        ethtool -x eth0
        for weights in '0 1' '1 0'; do
            ethtool -X eth0 weight $weights
            iperf3 --json -P 4 -n 4M --reverse --client {OWN} >/dev/null
            echo PART $weights
            sleep 2
        done
        ethtool -X eth0 equal 2
        iperf3 --json -P 8 -n 8M --reverse --client {OWN} >/dev/null
        echo ALL"
    );
    let mut guest = boot(&card, "guest", FIRST, &device("vfio-user", &card.path("f.sock"), "", 2), &job);
    let brought = || [0, 2].map(|queue| bytes(&card, "f", queue));
    guest.wait_for_output("PART 0 1");
    let after_first = brought();
    assert!(after_first[1] > 4 << 20, "{after_first:?}");
    guest.wait_for_output("PART 1 0");
    let after_second = brought();
    let grown = [0, 1].map(|pair| after_second[pair] - after_first[pair]);
    assert!(grown[0] > 4 << 20 && grown[1] < 1 << 20, "{after_first:?} {after_second:?}");
    let output = guest.succeed();
    assert!(output.contains("RX flow hash indirection table for eth0 with 2 RX ring(s)"), "{output}");
    let all = brought();
    let grown = [0, 1].map(|pair| all[pair] - after_second[pair]);
    assert!(grown.iter().all(|bytes| *bytes > 100_000), "both have some: {grown:?}");
}
