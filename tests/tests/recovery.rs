#![allow(clippy::unwrap_used, missing_docs, reason = "a test fails by panicking")]
//! The card's service is killed at any moment and started again. Over vhost-user its front end keeps the record of what was in flight
//! and hands it back; over vfio-user a keeper has it, and the connection. Nobody sees an error, nothing is lost, nothing is done twice.

use std::path::{Path, PathBuf};
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

/// An NBD server with a disk, and two cards that reach it. The first has the limit.
struct Shared {
    folder: tempfile::TempDir,
    server: Process,
    cards: [Card; 2],
}

impl Shared {
    fn start(rig: &Path, limit: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::File::create(folder.path().join("disk")).unwrap().set_len(64 << 20).unwrap();
        let server = Self::serve(rig, folder.path());
        let uri = format!("nbd+unix:///?socket={}", folder.path().join("nbd.sock").display());
        let cards = [limit, ""].map(|limit| {
            let parts = format!(
                r#"
[[volume]]
name = "v"
backend = {{ type = "nbd", uri = "{uri}" }}
[[function]]
name = "f"
type = "blk"
link = {{ type = "vhost-user", socket = "@/f.sock" }}
volume = "v"
{limit}
"#
            );
            Card::start(&CardSettings { parts, ..CardSettings::default() })
        });
        Self { folder, server, cards }
    }

    fn serve(rig: &Path, folder: &Path) -> Process {
        let socket = folder.join("nbd.sock");
        let _ = std::fs::remove_file(&socket);
        let mut command = Command::new(rig.join("bin/nbdkit"));
        let process = Process::start(command.args(["-f", "-U"]).arg(&socket).arg("file").arg(folder.join("disk")));
        wait_for("nbdkit", || socket.exists());
        process
    }

    fn sockets(&self) -> [PathBuf; 2] {
        [0, 1].map(|card: usize| self.cards[card].path("f.sock"))
    }

    /// What a card's function counts.
    fn count(&self, card: usize, what: &str) -> u64 {
        self.cards[card].stats()["functions"][0][what].as_u64().unwrap()
    }

    fn ended(&self, card: usize) -> u64 {
        self.count(card, "reads") + self.count(card, "writes")
    }

    /// Lets everything end.
    fn finish(&self, verifier: &mut Verifier) {
        verifier.finish(&self.folder.path().join("disk"));
        assert_eq!([0, 1].map(|card| self.count(card, "errors")), [0, 0]);
    }
}

/// A queue that stops with most of its requests before a limit leaves them to the record, and another card does them; then the same with
/// requests at any other place, and back.
fn hand_over_before_a_limit(rig: &Path, wanted: u64) {
    let shared = Shared::start(rig, r#"limit = { iops = 1, burst = "1s" }"#);
    let [slow, fast] = shared.sockets();
    let mut verifier = Verifier::connect_to_hand_over(&slow, wanted);
    let (mut left, mut done) = (0, 0);
    for _ in 0..rounds(5, 10, 100) {
        verifier.fill();
        let requests = u64::from(verifier.in_flight());
        wait_for("all requests are there", || shared.count(0, "in-flight") + shared.ended(0) - done == requests);
        let handed = verifier.hand_over();
        assert_eq!(handed, verifier.in_flight(), "all that has not ended is in the record");
        left += handed;
        let before = std::mem::replace(&mut done, shared.ended(0));
        assert_eq!(u64::from(handed), requests - (done - before), "what it counts is what the driver sees");
        verifier.reconnect(&fast);
        let requests = verifier.below(300);
        verifier.go_on(u64::from(handed) + requests, true);
        verifier.fill();
        std::thread::sleep(Duration::from_micros(verifier.below(400)));
        verifier.hand_over();
        assert_eq!(shared.ended(0), done, "a queue that handed over does nothing");
        verifier.reconnect(&slow);
    }
    assert!(left > 40, "{left} requests were handed over");
    verifier.hand_over();
    verifier.reconnect(&fast);
    shared.finish(&mut verifier);
}

#[test]
fn a_queue_hands_over_what_waits_for_its_limit() {
    let Some(rig) = rig() else { return };
    hand_over_before_a_limit(&rig, features::EVENT_INDEX);
    hand_over_before_a_limit(&rig, features::EVENT_INDEX | features::RING_PACKED);
}

/// A queue that stops while its server is away leaves its requests to the record. The server is back before the next card has them; the
/// first, which waited for it, does none.
fn hand_over_without_a_server(rig: &Path, wanted: u64) {
    let mut shared = Shared::start(rig, "");
    let sockets = shared.sockets();
    let mut verifier = Verifier::connect_to_hand_over(&sockets[0], wanted);
    let mut left = 0;
    for round in 0..rounds(4, 6, 50) as usize {
        let (here, there) = (round % 2, (round + 1) % 2);
        let requests = verifier.below(300);
        verifier.fill();
        verifier.go_on(requests, true);
        shared.server.signal(Signal::SIGKILL);
        shared.server.end();
        left += verifier.hand_over();
        let done = shared.ended(here);
        shared.server = Shared::serve(rig, shared.folder.path());
        verifier.reconnect(&sockets[there]);
        verifier.go_on(u64::from(verifier.in_flight()), false);
        assert_eq!(shared.ended(here), done, "a queue that handed over does nothing");
    }
    assert!(left > 0, "no request waited for the server");
    shared.finish(&mut verifier);
}

#[test]
fn a_queue_hands_over_what_waits_for_a_server() {
    let Some(rig) = rig() else { return };
    hand_over_without_a_server(&rig, features::EVENT_INDEX);
    hand_over_without_a_server(&rig, features::EVENT_INDEX | features::RING_PACKED);
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
