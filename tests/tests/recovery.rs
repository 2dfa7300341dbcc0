#![allow(clippy::unwrap_used, missing_docs, reason = "a test fails by panicking")]
//! The card's service is killed at any moment and started again. Over vhost-user its front end keeps the record of what was in flight
//! and hands it back; over vfio-user a keeper has it, and the connection. Nobody sees an error, nothing is lost, nothing is done twice.

use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use device_svc::driver::GuestMemory;
use device_svc::driver::vfio_user::Sharing;
use device_svc::driver::vhost_user::FrontEnd;
use device_svc::virtqueue::features;
use nix::sys::signal::Signal;
use tests::{Card, CardSettings, Process, Verifier, rig, rounds, wait_for};

const DISK: &str = r#"
[[volume]]
name = "v"
backend = { type = "file", path = "@/disk", create = "64M" }
[[function]]
name = "f"
type = "blk"
link = { type = "vhost-user", socket = "@/f.sock" }
volume = "v"
"#;

/// The same over vfio-user.
fn vfio_user_disk(more: &str) -> CardSettings {
    let link = format!("vfio-user\", socket = \"@/f.sock\"{more}");
    let parts = DISK.replace("vhost-user\", socket = \"@/f.sock\"", &link);
    CardSettings { parts, keeper: true, ..CardSettings::default() }
}

/// Kills the card in the middle of requests, again and again.
fn survive(mut card: Card, mut verifier: Verifier, kill: impl Fn(&mut Card)) {
    let socket = card.path("f.sock");
    let mut under_way = 0;
    for _ in 0..rounds(5, 50, 2000) {
        let requests = verifier.below(300);
        verifier.fill();
        verifier.go_on(requests, true);
        verifier.fill();
        // Somewhere in the twenty requests that were published just now.
        std::thread::sleep(Duration::from_micros(verifier.below(400)));
        kill(&mut card);
        verifier.take();
        under_way += verifier.in_flight();
        verifier.reconnect(&socket);
    }
    assert!(under_way > 0, "the card was never killed with a request under way");
    verifier.finish(&card.path("disk"));
    let stats = card.stats();
    assert_eq!(stats["functions"][0]["errors"], 0, "{stats}");
}

fn survive_over_vhost_user(wanted: u64) {
    let card = Card::start(&CardSettings { parts: DISK.to_owned(), ..CardSettings::default() });
    let verifier = Verifier::connect(&card.path("f.sock"), wanted);
    survive(card, verifier, |card| card.restart(Signal::SIGKILL));
}

fn survive_over_vfio_user(wanted: u64, sharing: Sharing, more: &str) {
    let card = Card::start(&vfio_user_disk(more));
    let verifier = Verifier::connect_by_vfio_user(&card.path("f.sock"), wanted, sharing);
    survive(card, verifier, kill_service);
}

/// Kills the service, and waits until the keeper has started another.
fn kill_service(card: &mut Card) {
    let service = card.service_id();
    card.kill_service(Signal::SIGKILL);
    wait_for("another service", || card.service_id().is_some_and(|id| Some(id) != service));
}

#[test]
fn a_card_that_is_killed_loses_nothing_of_a_split_ring() {
    survive_over_vhost_user(features::EVENT_INDEX);
}

#[test]
fn a_card_that_is_killed_loses_nothing_of_a_packed_ring() {
    survive_over_vhost_user(features::EVENT_INDEX | features::RING_PACKED);
}

/// The keeper has the record, and the front end says that its ring begins at 0.
fn survive_without_a_record(wanted: u64) {
    let card = Card::start(&CardSettings { parts: DISK.to_owned(), keeper: true, ..CardSettings::default() });
    let verifier = Verifier::connect_without_record(&card.path("f.sock"), wanted);
    survive(card, verifier, kill_service);
}

#[test]
fn a_front_end_that_keeps_no_record_loses_nothing_of_a_split_ring() {
    survive_without_a_record(features::EVENT_INDEX);
}

#[test]
fn a_front_end_that_keeps_no_record_loses_nothing_of_a_packed_ring() {
    survive_without_a_record(features::EVENT_INDEX | features::RING_PACKED);
}

#[test]
fn a_vmm_on_vfio_user_does_not_notice_that_the_service_is_killed() {
    survive_over_vfio_user(features::EVENT_INDEX, Sharing::Whole, "");
    survive_over_vfio_user(features::EVENT_INDEX | features::RING_PACKED, Sharing::Pages, "");
}

#[test]
fn a_vmm_on_vfio_user_that_shares_no_memory_does_not_notice_either() {
    survive_over_vfio_user(features::EVENT_INDEX, Sharing::Messages, "");
    survive_over_vfio_user(features::EVENT_INDEX | features::RING_PACKED, Sharing::Messages, "");
}

/// What the README says of it: without the record, what was in flight when it dies is done twice, or never.
#[test]
fn qemu_storage_daemon_keeps_no_record() {
    let Some(rig) = rig() else { return };
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("disk.sock");
    let export = format!("vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={}", socket.display());
    let mut command = Command::new(rig.join("bin/qemu-storage-daemon"));
    let disk = "driver=null-co,size=1048576,node-name=disk";
    let _daemon = Process::start(command.args(["--blockdev", disk, "--export", &export]));
    wait_for("its socket", || socket.exists());
    let memory = Arc::new(GuestMemory::new(0, 1 << 20).unwrap());
    let mut front_end = FrontEnd::connect(&socket, features::EVENT_INDEX, memory).unwrap();
    assert!(front_end.make_record(1, 64).is_err());
    // A card does, asked in the same way.
    let card = Card::start(&CardSettings { parts: DISK.to_owned(), ..CardSettings::default() });
    let memory = Arc::new(GuestMemory::new(0, 1 << 20).unwrap());
    let mut front_end = FrontEnd::connect(&card.path("f.sock"), features::EVENT_INDEX, memory).unwrap();
    assert!(front_end.make_record(1, 64).is_ok());
}
