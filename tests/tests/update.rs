#![allow(clippy::unwrap_used, missing_docs, reason = "a test fails by panicking")]
//! Another program takes over a card under load: a build whose saved state has the next format, and back again. Drivers notice a pause,
//! nothing else. One that cannot take over leaves the old one serving.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use device_svc::driver::vfio_user::Sharing;
use device_svc::virtqueue::features;
use tests::{Card, CardSettings, Process, Verifier, program, rounds, wait_for};

const DISKS: &str = r#"
[[volume]]
name = "v"
backend = { type = "file", path = "@/disk", create = "64M" }
[[volume]]
name = "w"
backend = { type = "file", path = "@/disk2", create = "64M" }
[[function]]
name = "f"
type = "blk"
link = { type = "vfio-user", socket = "@/f.sock" }
volume = "v"
[[function]]
name = "g"
type = "blk"
link = { type = "vhost-user", socket = "@/g.sock" }
volume = "w"
"#;

fn card() -> Card {
    Card::start(&CardSettings { parts: DISKS.to_owned(), keeper: true, ..CardSettings::default() })
}

fn update(card: &Card, binary: &Path) -> Process {
    let control = format!("unix:{}", card.path("card.sock").display());
    let mut command = Command::new(program("device-svc"));
    Process::start(command.args(["update", "--json", "--control", &control, "--binary"]).arg(binary))
}

/// A program that is not one that serves.
fn script(card: &Card, name: &str, text: &str) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let path = card.path(name);
    std::fs::write(&path, text).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    path
}

#[test]
fn another_version_takes_over_and_gives_back() {
    let (this, next) = (program("device-svc"), program("device-svc-next"));
    for (ring, sharing) in [(0, Sharing::Whole), (features::RING_PACKED, Sharing::Pages)] {
        let card = card();
        let wanted = features::EVENT_INDEX | ring;
        let mut kept = Verifier::connect_by_vfio_user(&card.path("f.sock"), wanted, sharing);
        let mut again = Verifier::connect(&card.path("g.sock"), wanted);
        for round in 0..rounds(2, 10, 200) {
            for verifier in [&mut kept, &mut again] {
                verifier.fill();
                verifier.go_on(100, true);
                verifier.fill();
            }
            let binary = if round % 2 == 0 { &next } else { &this };
            let mut update = update(&card, binary);
            // Its requests end meanwhile, and others begin.
            while update.is_running() {
                kept.go_on(10, true);
                again.take();
            }
            let said: serde_json::Value = serde_json::from_str(&update.succeed()).unwrap();
            assert_eq!(said["after"]["program"], binary.display().to_string(), "{said}");
            assert_eq!(i64::from(card.service_id().unwrap()), said["after"]["pid"].as_i64().unwrap(), "{said}");
            again.reconnect(&card.path("g.sock"));
        }
        for (verifier, disk) in [(&mut kept, "disk"), (&mut again, "disk2")] {
            verifier.fill();
            verifier.finish(&card.path(disk));
        }
        let stats = card.stats();
        assert!(stats["functions"].as_array().unwrap().iter().all(|function| function["errors"] == 0), "{stats}");
    }
}

#[test]
fn who_cannot_take_over_leaves_the_old_one_serving() {
    let card = card();
    let mut verifier = Verifier::connect_by_vfio_user(&card.path("f.sock"), features::EVENT_INDEX, Sharing::Whole);
    let before = card.service_id();
    let missing = card.path("missing");
    let folder = card.folder().to_owned();
    for (binary, why) in [
        (missing, "No such file"),
        (folder, "is not a program"),
        (script(&card, "text", "no program"), "format"),
        (PathBuf::from("/bin/false"), "ended before it could take over (exit status: 1)"),
    ] {
        verifier.fill();
        let mut update = update(&card, &binary);
        assert!(!update.end().success());
        assert!(update.output().contains(why), "{}", update.output());
        verifier.go_on(40, true);
        assert_eq!(card.service_id(), before);
    }
    verifier.finish(&card.path("disk"));
}

/// It stands by, and dies when it is its turn.
#[test]
fn who_does_not_get_to_serve_is_replaced_by_the_old_one() {
    let card = card();
    let mut verifier = Verifier::connect_by_vfio_user(&card.path("f.sock"), features::EVENT_INDEX, Sharing::Whole);
    verifier.fill();
    verifier.go_on(100, true);
    // It reads its configuration before it stands by, and cannot have the metrics address afterwards.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let configuration = card.path("card.toml");
    let text = std::fs::read_to_string(&configuration).unwrap();
    let listen = format!("[control]\nmetrics = \"{}\"", taken.local_addr().unwrap());
    std::fs::write(&configuration, text.replace("[control]", &listen)).unwrap();
    let mut update = update(&card, &program("device-svc-next"));
    wait_for("its end", || card.output().contains("did not get to serve"));
    // The old one reads it too: it goes on as soon as it can.
    drop(taken);
    while update.is_running() {
        verifier.take();
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(!update.end().success());
    let said = update.output();
    assert!(said.contains("did not get to serve") && said.contains("goes on"), "{said}");
    verifier.fill();
    verifier.go_on(100, true);
    verifier.finish(&card.path("disk"));
    assert!(
        card.output().contains("the new program did not get to serve; the one before goes on"),
        "{}",
        card.output()
    );
}

#[test]
fn without_a_keeper_nobody_takes_over() {
    let card = Card::start(&CardSettings { parts: DISKS.to_owned(), ..CardSettings::default() });
    let mut update = update(&card, &program("device-svc"));
    assert!(!update.end().success());
    assert!(update.output().contains("start it without --no-keeper"), "{}", update.output());
}
