#![allow(clippy::unwrap_used, missing_docs, reason = "a test fails by panicking")]
//! Storage servers that misbehave under a client's verify job.

use std::path::{Path, PathBuf};
use std::process::Command;

use tests::{Card, CardSettings, Process, rig, rounds, wait_for};

fn nbdkit(rig: &Path, socket: &Path, arguments: &[&str]) -> Process {
    let _ = std::fs::remove_file(socket);
    let process = Process::start(Command::new(rig.join("bin/nbdkit")).args(["-f", "-U"]).arg(socket).args(arguments));
    wait_for("nbdkit", || socket.exists());
    process
}

fn card(socket: &Path) -> Card {
    let parts = format!(
        r#"
[[volume]]
name = "v"
backend = {{ type = "nbd", uri = "nbd+unix:///?socket={}", connections = 2 }}
io-timeout = "60s"
[[function]]
name = "f"
type = "blk"
link = {{ type = "vhost-user", socket = "@/f.sock" }}
volume = "v"
"#,
        socket.display()
    );
    Card::start(&CardSettings { parts, ..CardSettings::default() })
}

fn verify(rig: &Path, card: &Card, size: &str) -> Process {
    Process::start(
        Command::new(rig.join("bin/fio"))
            .args(["--name=job", "--ioengine=libblkio", "--libblkio_driver=virtio-blk-vhost-user", "--thread=1"])
            .arg(format!("--libblkio_path={}", card.path("f.sock").display()))
            .args([
                "--rw=randwrite",
                "--bs=4k",
                "--iodepth=16",
                "--fsync=64",
                "--verify=crc32c",
                "--verify_state_save=0",
                "--do_verify=1",
            ])
            .arg(format!("--size={size}")),
    )
}

fn disk(folder: &Path) -> PathBuf {
    let disk = folder.join("disk");
    std::fs::File::create(&disk).unwrap().set_len(64 << 20).unwrap();
    disk
}

/// The server is killed and started again under the job; the client sees no error and finds what it wrote.
#[test]
fn a_server_that_is_killed_is_not_noticed() {
    let Some(rig) = rig() else { return };
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("nbd.sock");
    let file = disk(folder.path());
    let arguments = ["--filter=delay", "file", file.to_str().unwrap(), "delay-write=1ms"];
    let mut server = nbdkit(&rig, &socket, &arguments);
    let card = card(&socket);
    let mut job = verify(&rig, &card, "16M");
    let mut kills = 0;
    for _ in 0..rounds(5, 10, 50) {
        if !job.is_running() {
            break;
        }
        let before = card.stats()["functions"][0]["writes"].as_u64().unwrap();
        wait_for("some progress", || {
            !job.is_running() || card.stats()["functions"][0]["writes"].as_u64().unwrap() > before + 50
        });
        server.signal(nix::sys::signal::Signal::SIGKILL);
        server.end();
        server = nbdkit(&rig, &socket, &arguments);
        kills += 1;
    }
    let output = job.succeed();
    assert!(output.contains("err= 0"), "{output}");
    assert!(kills >= 3, "the job ended after {kills} kills");
    let stats = card.stats();
    assert_eq!(stats["functions"][0]["errors"], 0, "{stats}");
}

/// Errors that pass are retried within the volume's time limit.
#[test]
fn errors_that_pass_are_not_noticed() {
    let Some(rig) = rig() else { return };
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("nbd.sock");
    let server = nbdkit(&rig, &socket, &["--filter=error", "memory", "64M", "error=EIO", "error-rate=2%"]);
    let card = card(&socket);
    let output = verify(&rig, &card, "8M").succeed();
    assert!(output.contains("err= 0"), "{output}");
    assert_eq!(card.stats()["functions"][0]["errors"], 0);
    drop(server);
}

/// While the server is away for longer than a client has patience, the card stops and its functions are deleted at once.
#[test]
fn a_held_request_delays_neither_deletion_nor_the_end() {
    let Some(rig) = rig() else { return };
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("nbd.sock");
    let mut server = nbdkit(&rig, &socket, &["memory", "64M"]);
    let mut card = card(&socket);
    let mut job = verify(&rig, &card, "64M");
    wait_for("some progress", || card.stats()["functions"][0]["writes"].as_u64().unwrap() > 100);
    server.signal(nix::sys::signal::Signal::SIGKILL);
    server.end();
    wait_for("requests are held", || card.stats()["functions"][0]["held"].as_u64().unwrap() > 0);
    let start = std::time::Instant::now();
    card.process().signal(nix::sys::signal::Signal::SIGTERM);
    assert!(card.process().end().success(), "{}", card.process().output());
    // Far below the io-timeout of 60 s: nothing waited for the server.
    assert!(start.elapsed().as_secs() < 30, "the end took {:?}", start.elapsed());
    job.signal(nix::sys::signal::Signal::SIGKILL);
    job.end();
}
