#![allow(clippy::unwrap_used, missing_docs, reason = "a test fails by panicking")]
//! A Linux guest under QEMU whose card's service is killed again and again: over vhost-user QEMU connects again and brings the record of
//! requests in flight, over vfio-user the keeper has both. The guest compares all that it writes, and sees a pause at most.

use std::time::Duration;

use nix::sys::signal::Signal;
use tests::{Card, CardSettings, GuestSettings, boot_guest, qmp, rig, rounds, wait_for, wait_for_or};

const DISK: &str = r#"
[[volume]]
name = "v"
backend = { type = "file", path = "@/disk", create = "64M" }
[[function]]
name = "f"
type = "blk"
link = { type = "LINK", socket = "@/f.sock"MORE }
volume = "v"
"#;

fn card(link: &str, more: &str) -> Card {
    let parts = DISK.replace("LINK", link).replace("MORE", more);
    Card::start(&CardSettings { parts, keeper: true, ..CardSettings::default() })
}

/// Boots a guest with QEMU's `arguments` and kills the service in each round of its work.
fn goes_on(card: &Card, arguments: &[&str]) {
    let kills = rounds(3, 50, 1000);
    let job = format!(
        "set -e
        [ -e /dev/vda ]
        for i in $(seq 1 {}); do
            dd if=/dev/urandom of=/tmp/a bs=64k count=8 2>/dev/null
            dd if=/tmp/a of=/dev/vda bs=64k seek=$((i * 8 % 960)) oflag=direct conv=fsync 2>/dev/null
            dd if=/dev/vda of=/tmp/b bs=64k skip=$((i * 8 % 960)) count=8 iflag=direct 2>/dev/null
            cmp /tmp/a /tmp/b
            echo ROUND $i
        done
        ! dmesg | grep -i 'I/O error'",
        kills + 1
    );
    let limit = Duration::from_secs(300 + 4 * u64::from(kills));
    let mut guest = GuestSettings { limit, ..GuestSettings::new(card.folder(), &job, arguments) }.boot();
    let mut random = 0x9e37_79b9_u64;
    let mut killed = None;
    for round in 1..=kills {
        guest.wait_for_output(&format!("ROUND {round}\r"));
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        std::thread::sleep(Duration::from_millis((random >> 33) % 120));
        // One that is dying already dies but once.
        wait_for("another service", || card.service_id().is_some_and(|id| Some(id) != killed));
        killed = card.service_id();
        card.kill_service(Signal::SIGKILL);
    }
    let output = guest.succeed();
    assert!(output.contains(&format!("ROUND {}\r", kills + 1)), "{output}");
    let died = || card.output().matches("the service died").count();
    // The last kill may have come when the guest was through already.
    wait_for_or(|| died() >= kills as usize, || card.output());
    assert_eq!(died(), kills as usize, "{}", card.output());
}

fn goes_on_over_vhost_user(more: &str) {
    let card = card("vhost-user", "");
    let chardev = format!("socket,id=c0,path={},reconnect-ms=100", card.path("f.sock").display());
    let device = format!("vhost-user-blk-pci,chardev=c0,num-queues=1{more}");
    goes_on(&card, &["-chardev", &chardev, "-device", &device]);
}

fn goes_on_over_vfio_user(more: &str, arguments: &[&str]) {
    let card = card("vfio-user", more);
    let path = card.path("f.sock");
    let device = format!(r#"{{"driver":"vfio-user-pci","socket":{{"type":"unix","path":"{}"}}}}"#, path.display());
    goes_on(&card, &[arguments, &["-device", &device]].concat());
}

#[test]
fn over_vhost_user() {
    if rig().is_some() {
        goes_on_over_vhost_user("");
        goes_on_over_vhost_user(",packed=on");
    }
}

/// What the function has ended, and what it still has.
fn ended_and_in_flight(card: &Card) -> (u64, u64) {
    let function = &card.stats()["functions"][0];
    let figure = |name: &str| function[name].as_u64().unwrap();
    (figure("reads") + figure("writes"), figure("in-flight"))
}

/// QEMU pauses the guest, by disabling its ring and asking for the ring's base. What waits for a limit is left to the record, and issued
/// when the guest goes on.
fn is_paused(more: &str) {
    // From the start, so that nothing but the guest's own work is waited for.
    let parts = DISK.replace("LINK", "vhost-user").replace("MORE", "") + "limit = { iops = 8 }\n";
    let card = Card::start(&CardSettings { parts, ..CardSettings::default() });
    let chardev = format!("socket,id=c0,path={}", card.path("f.sock").display());
    let device = format!("vhost-user-blk-pci,chardev=c0,num-queues=1,inflight-migration=on{more}");
    // More requests than pass while the rounds last; the limit goes behind them.
    let job = "set -e
        dd if=/dev/urandom of=/tmp/a bs=16k count=512 2>/dev/null
        for i in $(seq 0 63); do
            dd if=/tmp/a of=/dev/vda bs=4k skip=$((i * 32)) seek=$((i * 32)) count=32 oflag=direct 2>/dev/null &
        done
        wait
        dd if=/dev/vda of=/tmp/b bs=16k count=512 iflag=direct 2>/dev/null
        cmp /tmp/a /tmp/b
        ! dmesg | grep -i 'I/O error'";
    let guest = boot_guest(&card, job, &["-chardev", &chardev, "-device", &device]);
    for _ in 0..rounds(2, 3, 20) {
        let (mut before, mut waiting) = (0, 0);
        // So many that a busy machine has seconds to stop the ring before as many have passed.
        wait_for("requests that wait for their limit", || {
            (before, waiting) = ended_and_in_flight(&card);
            waiting >= 32
        });
        qmp(&card, "stop", "{}");
        // Its lane goes a moment after QEMU has its answer.
        wait_for("a queue that has handed over has nothing", || ended_and_in_flight(&card).1 == 0);
        let (after, _) = ended_and_in_flight(&card);
        // A few pass the limit while we look; a ring that drains would have ended them all.
        assert!(after - before < waiting, "{} of {waiting} ended before the ring stood still", after - before);
        std::thread::sleep(Duration::from_millis(600));
        assert_eq!(ended_and_in_flight(&card), (after, 0), "and does nothing");
        qmp(&card, "cont", "{}");
    }
    card.command(&["function", "set-limit", "f", "--limit", "iops=100000"]);
    guest.succeed();
}

#[test]
fn a_guest_that_is_paused_leaves_what_waits_to_its_record() {
    if rig().is_some() {
        is_paused("");
        is_paused(",packed=on");
    }
}

#[test]
fn over_vfio_user() {
    if rig().is_some() {
        goes_on_over_vfio_user("", &[]);
        goes_on_over_vfio_user(", msix = false", &[]);
    }
}

/// Each request's pages are mapped before it and unmapped after it, by messages that the service may die over.
#[test]
fn over_vfio_user_behind_an_iommu() {
    if rig().is_some() {
        let append = "console=ttyS0 quiet panic=-1 no_timer_check intel_iommu=on iommu.strict=1";
        let iommu = "intel-iommu,intremap=on,caching-mode=on";
        goes_on_over_vfio_user("", &["-machine", "q35,kernel-irqchip=split", "-device", iommu, "-append", append]);
    }
}
