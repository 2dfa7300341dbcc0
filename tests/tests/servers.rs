#![allow(clippy::unwrap_used, missing_docs, reason = "a test fails by panicking")]
//! Storage servers that misbehave under a client's verify job.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use device_svc::driver::client::{Client, ClientSettings};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tests::{Card, CardSettings, Process, rig, rounds, wait_for};

fn nbdkit(rig: &Path, socket: &Path, arguments: &[&str]) -> Process {
    let _ = std::fs::remove_file(socket);
    let process = Process::start(Command::new(rig.join("bin/nbdkit")).args(["-f", "-U"]).arg(socket).args(arguments));
    wait_for("nbdkit", || socket.exists());
    process
}

fn card(socket: &Path) -> Card {
    card_of(&format!(r#"uri = "nbd+unix:///?socket={}""#, socket.display()))
}

fn card_of(backend: &str) -> Card {
    let parts = format!(
        r#"
[[volume]]
name = "v"
backend = {{ type = "nbd", {backend}, connections = 2 }}
io-timeout = "60s"
[[function]]
name = "f"
type = "blk"
link = {{ type = "vhost-user", socket = "@/f.sock" }}
volume = "v"
"#
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
    let arguments = ["--filter=delay", "file", file.to_str().unwrap(), "delay-write=10ms"];
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

/// Says a letter to nbdkit's pause filter and waits for its answer.
fn pause_filter(control: &Path, letter: u8, answer: u8) {
    let mut stream = UnixStream::connect(control).unwrap();
    stream.write_all(&[letter]).unwrap();
    let mut said = [0];
    stream.read_exact(&mut said).unwrap();
    assert_eq!(said[0], answer);
}

/// A server that answers nothing for a while delays its client and nothing else: not the control interface, not a reset.
#[test]
fn a_server_that_pauses_is_waited_for() {
    let Some(rig) = rig() else { return };
    let folder = tempfile::tempdir().unwrap();
    let (socket, control) = (folder.path().join("nbd.sock"), folder.path().join("pause.sock"));
    let to_control = format!("pause-control={}", control.display());
    let server = nbdkit(&rig, &socket, &["--filter=pause", "memory", "64M", &to_control]);
    wait_for("the pause filter", || control.exists());
    let card = card(&socket);
    let mut job = verify(&rig, &card, "16M");
    let writes = || card.stats()["functions"][0]["writes"].as_u64().unwrap();
    for _ in 0..rounds(3, 5, 20) {
        if !job.is_running() {
            break;
        }
        let before = writes();
        wait_for("some progress", || !job.is_running() || writes() > before + 50);
        pause_filter(&control, b'p', b'P');
        // All that the server had taken is answered, and the last answers may still be on their way. Nothing more comes, however
        // often one looks.
        let comes_to_rest = || {
            let paused_at = writes();
            (0..20).all(|_| writes() == paused_at)
        };
        assert!((0..20).any(|_| comes_to_rest()), "writes go on though the server pauses");
        pause_filter(&control, b'r', b'R');
    }
    let output = job.succeed();
    assert!(output.contains("err= 0"), "{output}");
    assert_eq!(card.stats()["functions"][0]["errors"], 0);

    // A client that is killed while its requests are on their way is replaced by another at once.
    let mut job = verify(&rig, &card, "16M");
    let before = writes();
    wait_for("some progress", || writes() > before + 50);
    pause_filter(&control, b'p', b'P');
    job.signal(nix::sys::signal::Signal::SIGKILL);
    job.end();
    let settings = ClientSettings { depth: 1, ..ClientSettings::default() };
    let mut client = Client::connect(&card.path("f.sock"), settings).unwrap();
    assert!(client.queue().read(0, 0, 4096));
    client.publish();
    wait_for("the new client's read is on its way", || card.stats()["functions"][0]["in-flight"].as_u64().unwrap() > 0);
    pause_filter(&control, b'r', b'R');
    let ended = client.wait().unwrap();
    assert_eq!(ended.status, 0);
    drop(server);
}

/// nbdkit insists on TLS and on the card's certificate.
#[test]
fn fio_verifies_over_tls() {
    let Some(rig) = rig() else { return };
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, pem: String| std::fs::write(folder.path().join(name), pem).unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    write("ca-cert.pem", authority.pem());
    for (who, name) in [("server", "storage.example"), ("client", "card.example")] {
        let key = KeyPair::generate().unwrap();
        let certificate = CertificateParams::new(vec![name.to_owned()]).unwrap().signed_by(&key, &authority).unwrap();
        write(&format!("{who}-cert.pem"), certificate.pem());
        write(&format!("{who}-key.pem"), key.serialize_pem());
    }
    let socket = folder.path().join("nbd.sock");
    let certificates = format!("--tls-certificates={}", folder.path().display());
    let server = nbdkit(&rig, &socket, &["--tls=require", "--tls-verify-peer", &certificates, "memory", "64M"]);
    let at = folder.path().display();
    let card = card_of(&format!(
        r#"uri = "nbds+unix:///?socket={at}/nbd.sock", tls-ca = "{at}/ca-cert.pem", tls-hostname = "storage.example", tls-certificate = "{at}/client-cert.pem", tls-key = "{at}/client-key.pem""#
    ));
    let output = verify(&rig, &card, "16M").succeed();
    assert!(output.contains("err= 0"), "{output}");
    assert_eq!(card.stats()["functions"][0]["errors"], 0);
    drop(server);
}
