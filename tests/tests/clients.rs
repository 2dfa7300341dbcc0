#![allow(clippy::unwrap_used, missing_docs, reason = "a test fails by panicking")]
//! Real clients without a VM: fio with libblkio, and the crate `virtio-driver`, over vhost-user.

use std::path::Path;
use std::process::Command;

use tests::{Card, CardSettings, Process, rig, rounds};

/// A function `f` on a volume `v` with this backend and further keys of the link and the function.
fn parts(backend: &str, link: &str, keys: &str) -> String {
    format!(
        r#"
[[volume]]
name = "v"
backend = {backend}
[[function]]
name = "f"
type = "blk"
link = {{ type = "vhost-user", socket = "@/f.sock"{link} }}
volume = "v"
{keys}
"#
    )
}

fn fio(rig: &Path, socket: &Path, arguments: &[&str]) -> String {
    let mut command = Command::new(rig.join("bin/fio"));
    command
        .args(["--name=job", "--ioengine=libblkio", "--libblkio_driver=virtio-blk-vhost-user", "--thread=1"])
        .arg(format!("--libblkio_path={}", socket.display()))
        .args(arguments);
    Process::start(&mut command).succeed()
}

/// Writes with checksums in random order and sizes, reads back and checks.
fn verify(rig: &Path, card: &Card) {
    for _ in 0..rounds(1, 2, 20) {
        let output = fio(
            rig,
            &card.path("f.sock"),
            &[
                "--rw=randwrite",
                "--bsrange=512-128k",
                "--iodepth=32",
                "--size=64M",
                "--verify=crc32c",
                "--do_verify=1",
                "--verify_state_save=0",
            ],
        );
        assert!(output.contains("err= 0"), "{output}");
    }
    let stats = card.stats();
    assert!(stats["functions"][0]["writes"].as_u64().unwrap() > 500, "{stats}");
    assert_eq!(stats["functions"][0]["errors"], 0, "{stats}");
    assert_eq!(stats["functions"][0]["in-flight"], 0, "{stats}");
}

#[test]
fn fio_verifies_every_local_backend_in_place_and_copied() {
    let Some(rig) = rig() else { return };
    for backend in [r#"{ type = "ram", size = "64M" }"#, r#"{ type = "file", path = "@/disk", create = "64M" }"#] {
        for payload in ["in-place", "copy"] {
            let link = format!(r#", payload = "{payload}""#);
            let card = Card::start(&CardSettings { parts: parts(backend, &link, ""), ..CardSettings::default() });
            verify(&rig, &card);
        }
    }
}

#[test]
fn fio_verifies_over_nbd() {
    let Some(rig) = rig() else { return };
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("nbd.sock");
    let nbdkit =
        Process::start(Command::new(rig.join("bin/nbdkit")).args(["-f", "-U"]).arg(&socket).args(["memory", "64M"]));
    tests::wait_for("nbdkit", || socket.exists());
    let backend = format!(r#"{{ type = "nbd", uri = "nbd+unix:///?socket={}", connections = 2 }}"#, socket.display());
    let card = Card::start(&CardSettings { parts: parts(&backend, "", ""), ..CardSettings::default() });
    verify(&rig, &card);
    drop(nbdkit);
}

#[test]
fn fio_reads_null_and_connects_again_and_again() {
    let Some(rig) = rig() else { return };
    let settings = parts(r#"{ type = "null", size = "1G" }"#, "", "queues = 2");
    let card = Card::start(&CardSettings { parts: settings, poll: "always".to_owned(), ..CardSettings::default() });
    // Each run connects twice: to set up, and to run.
    for _ in 0..rounds(5, 10, 100) {
        let output = fio(&rig, &card.path("f.sock"), &["--rw=randread", "--bs=4k", "--iodepth=64", "--size=64M"]);
        assert!(output.contains("err= 0"), "{output}");
    }
}

#[test]
fn a_limit_slows_a_client_down_and_another_does_not_notice() {
    let Some(rig) = rig() else { return };
    let two = parts(r#"{ type = "null", size = "64M" }"#, "", "limit = { iops = 1000, burst = \"1ms\" }")
        + &parts(r#"{ type = "null", size = "64M" }"#, "", "")
            .replace("name = \"v\"", "name = \"w\"")
            .replace("name = \"f\"", "name = \"g\"")
            .replace("f.sock", "g.sock")
            .replace("volume = \"v\"", "volume = \"w\"");
    let card = Card::start(&CardSettings { parts: two, ..CardSettings::default() });
    let arguments = ["--rw=randread", "--bs=4k", "--iodepth=16", "--size=64M", "--time_based", "--runtime=2"];
    let limited = fio(&rig, &card.path("f.sock"), &arguments);
    let free = fio(&rig, &card.path("g.sock"), &arguments);
    let stats = card.stats();
    let reads = |function: usize| stats["functions"][function]["reads"].as_u64().unwrap();
    // Two seconds at a thousand, and what fio's own end takes longer; the other is bounded by nothing. How many fewer says only how
    // late a busy machine wakes the card: with a burst of 1 ms what was missed is not made up for.
    assert!((100..20_000).contains(&reads(0)), "{limited}{stats}");
    assert!(reads(1) > reads(0) * 2, "{free}{stats}");
}
