#![allow(clippy::unwrap_used, missing_docs, reason = "a test fails by panicking")]
//! Linux guests under QEMU on the ports of a switch, and one whose driver says where flows go.

use std::net::UdpSocket;

use tests::{Card, CardSettings, GuestSettings, IperfReport, IperfServer, Namespace, Process, network_rig, wait_for};

const OWN: &str = "192.0.2.1";
const FIRST: &str = "192.0.2.2";
const SECOND: &str = "192.0.2.3";

/// The arguments that plug in the function of that name.
fn device(card: &Card, link: &str, name: &str, mac: &str, pairs: u16) -> Vec<String> {
    let path = card.path(&format!("{name}.sock"));
    let path = path.display();
    match link {
        "vfio-user" => {
            let socket = format!(r#"{{"driver":"vfio-user-pci","socket":{{"type":"unix","path":"{path}"}}}}"#);
            vec!["-device".to_owned(), socket]
        }
        _ => vec![
            "-chardev".to_owned(),
            format!("socket,id=c-{name},path={path}"),
            "-netdev".to_owned(),
            format!("vhost-user,id=n-{name},chardev=c-{name},queues={pairs}"),
            "-device".to_owned(),
            format!("virtio-net-pci,netdev=n-{name},mac={mac},mq=on,vectors={}", pairs * 2 + 2),
        ],
    }
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
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).chain(["-smp", "2"]).collect();
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

/// Two guests, one over each link, reach each other and what is behind the uplink by their trunks, and each other by access ports of one
/// VLAN; not across, and not as somebody else.
#[test]
fn guests_reach_each_other_and_the_uplink() {
    const THIRD: &str = "192.0.2.200";
    let Some(rig) = network_rig() else { return };
    let namespace = Namespace::new(&rig, "switch");
    let function = |name: &str, link: &str, last: u8, more: &str| {
        format!(
            "[[function]]\nname = \"{name}\"\ntype = \"net\"\nuplink = \"lan\"\nmac = \"52:54:00:12:34:{last:02}\"\n{more}\n\
             link = {{ type = \"{link}\", socket = \"@/{name}.sock\" }}\n"
        )
    };
    let only = |addresses: &str| format!("anti-spoofing = {{ vlan = [], ip = [{addresses}, \"192.0.2.200\"] }}");
    let parts = [
        "[[uplink]]\nname = \"lan\"\nbackend = { type = \"switch\", uplink = \"wan\" }\n[[uplink]]\nname = \"wan\"\n"
            .to_owned(),
        format!("backend = {{ type = \"tap\", name = \"dray0\", netns = \"{}\" }}\n", namespace.name()),
        function("one", "vhost-user", 2, &only("\"192.0.2.2\", \"2001:db8::2\"")),
        function("two", "vfio-user", 3, &only("\"192.0.2.3\", \"2001:db8::3\"")),
        function("one-ten", "vhost-user", 12, "vlan = 10"),
        function("two-ten", "vfio-user", 13, "vlan = 10"),
    ]
    .concat();
    let card = Card::start(&CardSettings { parts, ..CardSettings::default() });
    namespace.address("dray0", &format!("{OWN}/24"));
    let mut server = IperfServer::start(&namespace);
    let serves = format!(
        "echo 1 >/proc/sys/net/ipv4/conf/all/arp_ignore
        ip.iproute2 address add {THIRD}/32 dev eth0
        ip.iproute2 address add 198.51.100.3/24 dev eth1
        ip.iproute2 link set eth1 up
        ping -c 2 {OWN}
        for turn in tcp reverse udp udp-reverse; do iperf3 --server --one-off >/dev/null; done
        echo SERVED"
    );
    let plugs = [device(&card, "vfio-user", "two", "", 1), device(&card, "vfio-user", "two-ten", "", 1)].concat();
    let mut second = boot(&card, "second", SECOND, &plugs, &serves);
    let asks = format!(
        "ip.iproute2 address add 198.51.100.2/24 dev eth1
        ip.iproute2 link set eth1 up
        until ping -c 1 -W 1 {SECOND} >/dev/null; do :; done
        ping -c 2 {SECOND}
        ping6 -c 2 2001:db8::3
        ping -c 2 {OWN}
        until ping -c 1 -W 1 198.51.100.3 >/dev/null; do :; done
        ping -c 2 198.51.100.3
        # From the VLAN what is outside of it is not reached, though it is there.
        ping -c 2 {THIRD}
        ip.iproute2 route add {THIRD}/32 dev eth1
        ip.iproute2 neigh flush all
        if ping -c 2 -W 1 {THIRD}; then exit 1; fi
        ip.iproute2 route del {THIRD}/32 dev eth1
        # It may not say that it is another.
        ip.iproute2 address add 192.0.2.77/24 dev eth0
        if ping -c 2 -W 1 -I 192.0.2.77 {SECOND}; then exit 1; fi
        ip.iproute2 address del 192.0.2.77/24 dev eth0
        measure -n 8M --client {SECOND} >/tmp/tcp
        measure -n 8M --reverse --client {SECOND} >/tmp/reverse
        measure -u -b 20M -n 2M -l 1400 --client {SECOND} >/tmp/udp
        measure -u -b 20M -n 2M -l 1400 --reverse --client {SECOND} >/tmp/udp-reverse
        measure -n 8M --client {OWN} >/tmp/out
        measure -n 8M --reverse --client {OWN} >/tmp/in
        for report in tcp reverse udp udp-reverse out in; do echo REPORT $report; cat /tmp/$report; done
        echo ASKED"
    );
    let plugs = [
        device(&card, "vhost-user", "one", "52:54:00:12:34:02", 1),
        device(&card, "vhost-user", "one-ten", "52:54:00:12:34:12", 1),
    ];
    let output = boot(&card, "first", FIRST, &plugs.concat(), &asks).succeed();
    assert!(output.contains("ASKED"), "{output}");
    let report = |name: &str| {
        let text = output.split(&format!("REPORT {name}\r\n")).nth(1).unwrap();
        IperfReport::parse(text.split("REPORT").next().unwrap())
    };
    for name in ["tcp", "reverse", "out", "in"] {
        assert!(report(name).received_bytes >= 4 << 20, "{name}: {:?}", report(name));
    }
    for name in ["udp", "udp-reverse"] {
        let report = report(name);
        assert!(report.datagrams > 1400 && report.datagrams_lost < report.datagrams / 10 * 9, "{name}: {report:?}");
    }
    second.wait_for_output("SERVED");
    assert!(second.succeed().contains(" 0% packet loss"));
    assert!(server.process().is_running());
    let spoofed = counts(&card, "one", 1, "transmit")["drops"]["spoofed"].as_u64().unwrap_or(0);
    assert!(spoofed > 0, "what it said it was not was dropped");
    let brought = bytes(&card, "two", 0);
    assert!(brought > 7 << 20, "{brought}");
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
        "told() {{ until ping -c 1 -W 1 192.0.2.$1 >/dev/null; do true; done; }}
        ethtool -L eth0 combined 2
        ethtool -x eth0
        next=101
        for weights in '0 1' '1 0'; do
            ethtool -X eth0 weight $weights
            measure -P 4 -n 4M --reverse --client {OWN} >/dev/null
            echo PART $weights
            told $next
            next=$((next + 1))
        done
        ethtool -X eth0 equal 2
        echo EQUAL
        told 103"
    );
    // The guest goes on when this machine has that address.
    let tell = |last: u8| namespace.address("dray0", &format!("192.0.2.{last}/24"));
    let mut guest = boot(&card, "guest", FIRST, &device(&card, "vfio-user", "f", "", 2), &job);
    let brought = || [0, 2].map(|queue| bytes(&card, "f", queue));
    guest.wait_for_output("PART 0 1");
    let after_first = brought();
    assert!(after_first[1] > 4 << 20, "{after_first:?}");
    tell(101);
    guest.wait_for_output("PART 1 0");
    let after_second = brought();
    let grown = [0, 1].map(|pair| after_second[pair] - after_first[pair]);
    assert!(grown[0] > 4 << 20 && grown[1] < 1 << 20, "{after_first:?} {after_second:?}");
    tell(102);
    guest.wait_for_output("EQUAL\r");
    // Connections of one program have ports side by side, which one key in fifty leads to one pair; these may have any.
    let mut port = 1024;
    wait_for("both pairs to have some", || {
        namespace.inside(|| {
            for _ in 0..100 {
                port = 1024 + (port * 29) % 32_768;
                UdpSocket::bind((OWN, 0)).unwrap().send_to(&[0; 1000], (FIRST, port as u16)).unwrap();
            }
        });
        let all = brought();
        (0..2).all(|pair| all[pair] - after_second[pair] > 100_000)
    });
    tell(103);
    let output = guest.succeed();
    assert!(output.contains("RX flow hash indirection table for eth0 with 2 RX ring(s)"), "{output}");
}
