#![allow(clippy::unwrap_used, missing_docs, reason = "a test fails by panicking")]
//! DPDK's virtio-user driver, without a VM, on a network function over vhost-user.

use tests::{Card, CardSettings, Driver, Port, Testpmd, TestpmdSettings, network_rig};

/// A card with one network function on an uplink of this kind.
fn card(backend: &str, pairs: u16) -> Card {
    let parts = format!(
        r#"
[[uplink]]
name = "u"
backend = {{ type = "{backend}" }}
[[function]]
name = "f"
type = "net"
link = {{ type = "vhost-user", socket = "@/f.sock" }}
uplink = "u"
mtu = 9000
queue-pairs = {pairs}
"#
    );
    Card::start(&CardSettings { parts, ..CardSettings::default() })
}

/// What the function counted of `what`, one way: `receive` or `transmit`.
fn counted(card: &Card, what: &str, way: &str) -> u64 {
    card.stats()["functions"][0][way][what].as_u64().unwrap()
}

/// Frames go round and round: none is lost, none changes its length, with every kind of ring.
#[test]
fn frames_of_a_driver_come_back() {
    let Some(rig) = network_rig() else { return };
    let plain = Driver { mergeable: false, in_order: false, ..Driver::default() };
    let cases = [
        (Driver::default(), 64),
        (Driver { packed: true, ..Driver::default() }, 64),
        (Driver { packed: true, ..plain }, 1500),
        (plain, 1500),
        (Driver { in_order: false, ..Driver::default() }, 1500),
        (Driver { queue_pairs: 2, ..plain }, 64),
        (Driver::default(), 9000),
        (Driver { packed: true, ..Driver::default() }, 9000),
    ];
    for (driver, frame_bytes) in cases {
        let card = card("loopback", driver.queue_pairs);
        let settings = TestpmdSettings { cpu: 1, forward: "io", frame_bytes, ..TestpmdSettings::default() };
        let mut testpmd = Testpmd::start(&rig, &[Port::VirtioUser(card.path("f.sock"), driver)], &settings);
        testpmd.go(2);
        testpmd.wait_for_received(0, 20_000);
        testpmd.stop();
        let driven = testpmd.counts(0);
        testpmd.quit();
        let (sent, brought) = (counted(&card, "packets", "transmit"), counted(&card, "packets", "receive"));
        let case = format!("{driver:?}, {frame_bytes} bytes: driver {driven:?}, card {sent} and {brought}");
        let going_round = 2 * 32 * u64::from(driver.queue_pairs);
        assert!(driven.sent >= driven.received && driven.sent <= driven.received + going_round, "{case}");
        assert_eq!((driven.received_errors, driven.sent_errors), (0, 0), "{case}");
        assert_eq!(driven.received_bytes, driven.received * u64::from(frame_bytes), "{case}");
        assert!(sent <= driven.sent && brought >= driven.received && brought <= sent, "{case}");
        let stats = card.stats();
        for way in ["receive", "transmit"] {
            let drops = stats["functions"][0][way]["drops"].as_object().unwrap();
            assert!(drops.is_empty(), "{case}: {stats}");
        }
    }
}

/// Where nobody is everything is taken.
#[test]
fn a_network_without_anybody_takes_everything() {
    let Some(rig) = network_rig() else { return };
    let card = card("null", 1);
    let settings = TestpmdSettings { cpu: 1, forward: "txonly", ..TestpmdSettings::default() };
    let mut testpmd = Testpmd::start(&rig, &[Port::VirtioUser(card.path("f.sock"), Driver::default())], &settings);
    testpmd.go(0);
    tests::wait_for("frames", || counted(&card, "packets", "transmit") > 100_000);
    testpmd.stop();
    let driven = testpmd.counts(0);
    testpmd.quit();
    let sent = counted(&card, "packets", "transmit");
    assert!(sent <= driven.sent && counted(&card, "bytes", "transmit") == sent * 64, "{driven:?}, {sent}");
}

/// One driver after another, each in the middle of its traffic: the function is as new each time.
#[test]
fn drivers_come_and_go() {
    let Some(rig) = network_rig() else { return };
    let card = card("loopback", 1);
    for round in 0..4 {
        let driver = Driver { packed: round % 2 == 1, ..Driver::default() };
        let settings = TestpmdSettings { cpu: 1, forward: "io", ..TestpmdSettings::default() };
        let mut testpmd = Testpmd::start(&rig, &[Port::VirtioUser(card.path("f.sock"), driver)], &settings);
        testpmd.go(2);
        testpmd.wait_for_received(0, 1000);
        testpmd.process().signal(nix::sys::signal::Signal::SIGKILL);
        testpmd.process().end();
    }
    tests::wait_for("the last to be gone", || card.command(&["function", "show", "f"]).contains("waiting"));
}
