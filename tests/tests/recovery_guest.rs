#![allow(clippy::unwrap_used, missing_docs, reason = "a test fails by panicking")]
//! A Linux guest under QEMU whose card's service is killed again and again: over vhost-user QEMU connects again and brings the record of
//! requests in flight, over vfio-user the keeper has both. The guest compares all that it writes, and sees a pause at most.

use std::time::Duration;

use nix::sys::signal::Signal;
use tests::{Card, CardSettings, GuestSettings, rig, rounds, wait_for};

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
    let kills = rounds(3, 50, 500);
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
    let limit = Duration::from_secs(110 + 4 * u64::from(kills));
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
    let died = card.output().matches("the service died").count();
    assert_eq!(died, kills as usize, "{}", card.output());
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
