//! A Linux guest under QEMU beside a card, and how QEMU is told things while it runs.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::{Card, Process, wait_for};

/// Boots a guest to run `job`, a shell script; `arguments` are QEMU's beside those that every guest has. The process ends with
/// the job's status.
///
/// # Panics
/// When it cannot be started.
#[must_use]
pub fn boot_guest(card: &Card, job: &str, arguments: &[&str]) -> Process {
    let script = card.path("job.sh");
    std::fs::write(&script, job).expect("the card's folder is writable");
    // That of an earlier guest.
    let _ = std::fs::remove_file(card.path("qmp.sock"));
    let runner = Path::new(env!("CARGO_MANIFEST_DIR")).join("rig/guest-run");
    Process::start(
        Command::new(runner)
            .arg("--job")
            .arg(script)
            .arg("--qmp")
            .arg(card.path("qmp.sock"))
            .args(["--timeout", "110", "--"])
            .args(arguments),
    )
}

/// Sends one QMP command with its arguments, a JSON object, to the guest's QEMU; returns all that QEMU said.
///
/// # Panics
/// When QEMU refuses it, or hangs up.
pub fn qmp(card: &Card, command: &str, arguments: &str) -> String {
    let path = card.path("qmp.sock");
    wait_for("QMP", || path.exists());
    let mut stream = UnixStream::connect(path).expect("QEMU listens");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("sockets have timeouts");
    let mut heard = String::new();
    let mut say = |words: &str, answers: usize| {
        stream.write_all(words.as_bytes()).expect("QEMU hears");
        while heard.matches("\"return\"").count() < answers {
            let mut bytes = [0; 4096];
            let count = stream.read(&mut bytes).unwrap_or_else(|error| panic!("{error} after {heard}"));
            assert!(count > 0 && !heard.contains("\"error\""), "{words}: {heard}");
            heard.push_str(&String::from_utf8_lossy(&bytes[..count]));
        }
    };
    say("{\"execute\":\"qmp_capabilities\"}\n", 1);
    say(&format!("{{\"execute\":\"{command}\",\"arguments\":{arguments}}}\n"), 2);
    heard
}
