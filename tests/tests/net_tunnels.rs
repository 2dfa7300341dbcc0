#![allow(clippy::unwrap_used, missing_docs, reason = "a test fails by panicking")]
//! Linux guests under QEMU on tunnels of the card: to the kernel's own vxlan, to the geneve of another guest's kernel, and between
//! two uplinks of the card.

use std::path::Path;

use tests::{
    Archive, Capture, Captured, Card, CardSettings, GuestSettings, IperfReport, IperfServer, Namespace, Process,
    network_rig, rounds,
};

/// The network inside.
const OWN: &str = "192.0.2.1";
const GUEST: &str = "192.0.2.2";

/// The other end of a tunnel, with its addresses in `far`; ours are in `near`.
fn underlay(rig: &Path) -> (Namespace, Namespace) {
    let (near, far) = (Namespace::new(rig, "near"), Namespace::new(rig, "far"));
    near.join("eth0", &far, "eth0");
    for (namespace, number) in [(&near, 1), (&far, 2)] {
        // The wire: what a veth hands on without offloads.
        namespace.run("ethtool", &["-K", "eth0", "tx", "off", "tso", "off", "gso", "off", "gro", "off"]);
        namespace.address("eth0", &format!("10.9.0.{number}/24"));
        namespace.address("eth0", &format!("2001:db8:9::{number}/64"));
    }
    (near, far)
}

/// An uplink and the function on it.
fn function(name: &str, uplink: &str, mtu: u16, pairs: u16) -> String {
    let tail = name.as_bytes()[0];
    format!(
        r#"
[[uplink]]
name = "{name}"
backend = {{ {uplink} }}
[[function]]
name = "{name}"
type = "net"
link = {{ type = "vfio-user", socket = "@/{name}.sock" }}
uplink = "{name}"
mac = "52:54:00:12:34:{tail:02x}"
mtu = {mtu}
queue-pairs = {pairs}
"#
    )
}

/// Boots a guest on a function; it runs `job`.
fn boot(card: &Card, name: &str, job: &str, archive: Option<&Path>) -> Process {
    let path = card.path(&format!("{name}.sock"));
    let device = format!(r#"{{"driver":"vfio-user-pci","socket":{{"type":"unix","path":"{}"}}}}"#, path.display());
    let job = format!("set -e\n{job}");
    let settings = GuestSettings::new(card.folder(), &job, &[]);
    GuestSettings { name, arguments: &["-device", &device, "-smp", "2"], archive, ..settings }.boot()
}

/// What a guest has said whose work was done; if it was not, the reason may be with the other one.
fn succeed_beside(mut guest: Process, other: &Process) -> String {
    let status = guest.end();
    assert!(status.success(), "{status}:\n{}\nthe other one:\n{}", guest.output(), other.output());
    guest.output()
}

/// What a guest does first that has this address in the network inside.
fn set_up(number: u8) -> String {
    format!(
        "ip.iproute2 address add 192.0.2.{number}/24 dev eth0
        ip.iproute2 address add 2001:db8::{number}/64 dev eth0 nodad
        ip.iproute2 link set eth0 up
        reach() {{ for i in $(seq 300); do ping -c 1 -W 1 $1 >/dev/null && return; done; false; }}\n"
    )
}

/// The reports of iperf3 that a guest has shown behind `REPORT name`.
fn report(output: &str, name: &str) -> IperfReport {
    let text = output.split(&format!("REPORT {name}\r\n")).nth(1).unwrap_or_else(|| panic!("no {name} in {output}"));
    IperfReport::parse(text.split("REPORT").next().unwrap())
}

/// What the card sent is as it should be on a wire, and its flows have ports of their own.
fn check_wire(captured: &Captured, own: &str, tunnel: &str, flows: usize) {
    assert_eq!(captured.bad_checksums(), [] as [&str; 0]);
    let lines = captured.fields(&format!("{own} && {tunnel}"), &["udp.srcport", "ip.flags.df"]);
    let ports: std::collections::BTreeSet<&str> =
        lines.iter().filter_map(|line| line.split([',', '\t']).next()).collect();
    assert!(ports.len() >= flows, "{ports:?}");
    assert!(ports.iter().all(|port| port.parse::<u16>().unwrap() >= 49152), "{ports:?}");
    assert_eq!(captured.count("ip.flags.mf == 1 || ip.frag_offset > 0 || ipv6.fraghdr"), 0, "a fragment");
}

/// The kernel's vxlan is the peer: small packets and large ones, either version of IP inside, TCP and UDP, both ways.
#[test]
fn a_guest_talks_to_the_kernels_vxlan() {
    let Some(rig) = network_rig() else { return };
    let (near, far) = underlay(&rig);
    far.ip(&[
        "link", "add", "vx0", "type", "vxlan", "id", "42", "local", "10.9.0.2", "remote", "10.9.0.1", "dstport", "4789",
    ]);
    far.ip(&["link", "set", "vx0", "up"]);
    far.address("vx0", &format!("{OWN}/24"));
    far.address("vx0", "2001:db8::1/64");
    let uplink =
        format!(r#"type = "vxlan", vni = 42, local = "10.9.0.1", remote = ["10.9.0.2"], netns = "{}""#, near.name());
    let card = Card::start(&CardSettings { parts: function("f", &uplink, 1450, 1), ..CardSettings::default() });
    let mut server = IperfServer::start(&far);
    let capture = Capture::start(&rig, &far, "eth0");
    let bytes = u64::from(rounds(2, 4, 100)) << 20;
    let job = set_up(2)
        + &format!(
            "[ $(cat /sys/class/net/eth0/mtu) = 1450 ]
            reach {OWN}
            ping -c 2 {OWN}
            ping -c 2 -s 1422 {OWN}
            ping6 -c 2 -s 1402 2001:db8::1
            measure -n {bytes} --client {OWN} >/tmp/out
            measure -n {bytes} -P 4 --reverse --client {OWN} >/tmp/in
            measure -n {bytes} --client 2001:db8::1 >/tmp/six
            measure -u -b 20M -n 2M -l 1400 --client {OWN} >/tmp/udp
            measure -u -b 20M -n 2M -l 1400 --reverse --client {OWN} >/tmp/udp-in
            for report in out in six udp udp-in; do echo REPORT $report; cat /tmp/$report; done
            iperf3 --server --one-off >/tmp/server &
            until grep -q ':1451 [0:]* 0A' /proc/net/tcp /proc/net/tcp6; do sleep 0.1; done
            echo SERVES
            wait"
        );
    let mut guest = boot(&card, "f", &job, None);
    guest.wait_for_output("SERVES");
    let measured = IperfReport::measure(&far, GUEST, &["-n", &bytes.to_string()]);
    // Whoever sends tells the receiver to stop on another connection, which overtakes what is queued on a busy machine.
    assert!(measured.received_bytes >= bytes / 2, "{measured:?}");
    let output = guest.succeed();
    assert_eq!(output.matches(" 0% packet loss").count(), 3, "{output}");
    for name in ["out", "in", "six"] {
        let report = report(&output, name);
        println!("{name}: {:.0} Mbit/s", report.received_bits_per_second / 1e6);
        assert!(report.received_bytes >= bytes / 2, "{name}: {report:?}");
    }
    for name in ["udp", "udp-in"] {
        let report = report(&output, name);
        assert!(report.datagrams > 1400 && report.datagrams_lost < report.datagrams / 10 * 9, "{name}: {report:?}");
    }
    assert!(server.process().is_running());
    let captured = capture.stop();
    check_wire(&captured, "ip.src == 10.9.0.1", "vxlan.vni == 42", 8);
    assert!(captured.count("vxlan && ip.src == 10.9.0.1 && tcp") > 500);
}

/// A stranger's datagrams change nothing; the link goes down and comes again with the underlay's.
#[test]
fn the_link_follows_the_underlay() {
    let Some(rig) = network_rig() else { return };
    let (near, far) = underlay(&rig);
    far.ip(&[
        "link", "add", "vx0", "type", "vxlan", "id", "42", "local", "10.9.0.2", "remote", "10.9.0.1", "dstport", "4789",
    ]);
    far.ip(&["link", "set", "vx0", "up"]);
    far.address("vx0", &format!("{OWN}/24"));
    let uplink =
        format!(r#"type = "vxlan", vni = 42, local = "10.9.0.1", remote = ["10.9.0.2"], netns = "{}""#, near.name());
    let card = Card::start(&CardSettings { parts: function("f", &uplink, 1450, 1), ..CardSettings::default() });
    let job = set_up(2)
        + &format!(
            "state() {{ for i in $(seq 300); do [ $(cat /sys/class/net/eth0/carrier) = $1 ] && return; sleep 0.1; done; false; }}
            reach {OWN}
            echo UP
            state 0
            echo DOWN
            state 1
            reach {OWN}
            echo AGAIN"
        );
    let mut guest = boot(&card, "f", &job, None);
    guest.wait_for_output("UP\r");
    near.ip(&["link", "set", "eth0", "down"]);
    guest.wait_for_output("DOWN\r");
    near.ip(&["link", "set", "eth0", "up"]);
    guest.wait_for_output("AGAIN\r");
    guest.succeed();
}

/// Two guests on two uplinks of one card, over IPv6, with two queue pairs each; tagged for a VLAN as well.
#[test]
fn two_uplinks_of_the_card_speak_to_each_other() {
    let Some(rig) = network_rig() else { return };
    let (near, far) = underlay(&rig);
    let uplink = |namespace: &Namespace, own: u8, other: u8| {
        format!(
            r#"type = "geneve", vni = 16777215, local = "2001:db8:9::{own}", remote = ["2001:db8:9::{other}"], netns = "{}""#,
            namespace.name()
        )
    };
    let parts = function("a", &uplink(&near, 1, 2), 1430, 2) + &function("b", &uplink(&far, 2, 1), 1430, 2);
    let card = Card::start(&CardSettings { parts, ..CardSettings::default() });
    let capture = Capture::start(&rig, &far, "eth0");
    let tagged = |number: u8| {
        format!(
            "ethtool -L eth0 combined 2
            load 8021q
            ip.iproute2 link add link eth0 name eth0.5 mtu 1426 type vlan id 5
            ip.iproute2 address add 198.51.100.{number}/24 dev eth0.5
            ip.iproute2 link set eth0.5 up\n"
        )
    };
    let mut server = boot(&card, "b", &(set_up(1) + &tagged(1) + "echo READY\niperf3 --server"), None);
    server.wait_for_output("READY\r");
    let job = set_up(2)
        + &tagged(2)
        + &format!(
            "reach {OWN}
            ping -c 2 -s 1402 {OWN}
            ping6 -c 2 2001:db8::1
            ping -c 2 -s 1398 198.51.100.1
            measure -P 4 -n 2M --client {OWN} >/tmp/out
            measure -P 4 -n 2M --reverse --client {OWN} >/tmp/in
            for report in out in; do echo REPORT $report; cat /tmp/$report; done"
        );
    let output = succeed_beside(boot(&card, "a", &job, None), &server);
    assert_eq!(output.matches(" 0% packet loss").count(), 3, "{output}");
    for name in ["out", "in"] {
        let report = report(&output, name);
        println!("{name}: {:.0} Mbit/s", report.received_bits_per_second / 1e6);
        assert!(report.received_bytes >= 1 << 20, "{name}: {report:?}");
    }
    let captured = capture.stop();
    // Those of UDP are computed over IPv6.
    check_wire(&captured, "ipv6.src == 2001:db8:9::1", "geneve.vni == 16777215", 8);
    assert!(captured.count("geneve && vlan.id == 5 && icmp") >= 4);
}

/// A guest's own geneve is the peer: this machine's kernel may have none.
#[test]
fn a_guest_talks_to_another_kernels_geneve() {
    let Some(rig) = network_rig() else { return };
    let underlay = Namespace::new(&rig, "under");
    underlay.tap("under0", &["multi_queue"]);
    underlay.address("under0", "10.9.1.1/24");
    // Frames of up to 64 KiB would leave the capture few places.
    underlay.run("ethtool", &["-K", "under0", "tso", "off", "gso", "off", "gro", "off"]);
    let geneve = format!(
        r#"type = "geneve", vni = 7, local = "10.9.1.1", remote = ["10.9.1.2", "10.9.1.3"], mtu = 1450, netns = "{}""#,
        underlay.name()
    );
    let tap = format!(r#"type = "tap", name = "under0", netns = "{}""#, underlay.name());
    let parts = function("a", &geneve, 1450, 1) + &function("p", &tap, 1500, 1);
    let card = Card::start(&CardSettings { parts, ..CardSettings::default() });
    let archive = Archive::new(card.folder());
    archive.add_module(&rig, "geneve");
    let archive = archive.pack();
    let peer = format!(
        "ip.iproute2 address add 10.9.1.2/24 dev eth0
        ip.iproute2 link set eth0 up
        load vxlan
        insmod /lib/modules/geneve.ko
        ip.iproute2 link add gen0 type geneve id 7 remote 10.9.1.1 noudpcsum
        ip.iproute2 link set gen0 mtu 1450 up
        ip.iproute2 address add {OWN}/24 dev gen0
        ip.iproute2 address add 2001:db8::1/64 dev gen0 nodad
        echo READY
        iperf3 --server"
    );
    let mut peer = boot(&card, "p", &peer, Some(&archive));
    peer.wait_for_output("READY\r");
    let capture = Capture::start(&rig, &underlay, "under0");
    let job = set_up(2)
        + &format!(
            "reach {OWN}
            ping -c 2 -s 1422 {OWN}
            ping6 -c 2 2001:db8::1
            measure -n 2M --client {OWN} >/tmp/out
            measure -n 2M --reverse --client {OWN} >/tmp/in
            for report in out in; do echo REPORT $report; cat /tmp/$report; done"
        );
    let output = succeed_beside(boot(&card, "a", &job, None), &peer);
    assert_eq!(output.matches(" 0% packet loss").count(), 2, "{output}");
    for name in ["out", "in"] {
        assert!(report(&output, name).received_bytes >= 1 << 20, "{name}: {output}");
    }
    let captured = capture.stop();
    check_wire(&captured, "ip.src == 10.9.1.1", "geneve.vni == 7", 4);
    // What is for everybody went to both remotes; what is for the peer, once it was heard, to it alone.
    let to = |address: u8, what: &str| captured.count(&format!("ip.dst == 10.9.1.{address} && geneve && {what}"));
    assert!(to(2, "tcp") > 500, "{}", to(2, "tcp"));
    assert_eq!(to(3, "tcp"), 0);
}
