//! A Linux guest under QEMU beside a card, and how QEMU is told things while it runs.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use crate::{Card, Process, wait_for};

/// What a guest has beside its job, and beside QEMU's arguments.
#[derive(Clone, Copy, Debug)]
pub struct GuestSettings<'a> {
    /// Its memory, MiB.
    pub memory_mib: u32,
    /// An archive (cpio) that is unpacked over its root.
    pub archive: Option<&'a Path>,
    /// How long it may run.
    pub limit: Duration,
}

impl Default for GuestSettings<'_> {
    fn default() -> Self {
        Self { memory_mib: 256, archive: None, limit: Duration::from_secs(110) }
    }
}

/// Boots a guest to run `job`, a shell script; `arguments` are QEMU's beside those that every guest has. The process ends with
/// the job's status.
///
/// # Panics
/// When it cannot be started.
#[must_use]
pub fn boot_guest(card: &Card, job: &str, arguments: &[&str]) -> Process {
    boot_guest_with(card, GuestSettings::default(), job, arguments)
}

/// The same, with a guest that is not like the others.
///
/// # Panics
/// When it cannot be started.
#[must_use]
pub fn boot_guest_with(card: &Card, settings: GuestSettings<'_>, job: &str, arguments: &[&str]) -> Process {
    let script = card.path("job.sh");
    std::fs::write(&script, job).expect("the card's folder is writable");
    // That of an earlier guest.
    let _ = std::fs::remove_file(card.path("qmp.sock"));
    let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("rig/guest-run"));
    command.arg("--job").arg(script).arg("--qmp").arg(card.path("qmp.sock"));
    command.args(["--mem", &settings.memory_mib.to_string(), "--timeout", &settings.limit.as_secs().to_string()]);
    if let Some(archive) = settings.archive {
        command.arg("--archive").arg(archive);
    }
    // The limit ends the guest first, and says so.
    Process::start(command.arg("--").args(arguments)).with_patience(settings.limit + Duration::from_secs(10))
}

/// Sends one QMP command with its arguments, a JSON object, to the guest's QEMU; returns all that QEMU said.
///
/// # Panics
/// When QEMU refuses it, or hangs up.
pub fn qmp(card: &Card, command: &str, arguments: &str) -> String {
    let mut qmp = Qmp::connect(card);
    qmp.execute(command, arguments);
    qmp.heard
}

/// Sends one QMP command and waits for an event that comes of it. False if QEMU ends instead.
///
/// # Panics
/// When QEMU refuses the command, or does neither.
#[must_use]
pub fn qmp_until(card: &Card, command: &str, arguments: &str, event: &str) -> bool {
    let mut qmp = Qmp::connect(card);
    qmp.execute(command, arguments);
    let event = format!("\"event\": \"{event}\"");
    while !qmp.heard.contains(&event) {
        if !qmp.hear() {
            return false;
        }
    }
    true
}

/// A conversation with QEMU.
struct Qmp {
    stream: UnixStream,
    heard: String,
    /// Answers that were waited for.
    answers: usize,
}

impl Qmp {
    fn connect(card: &Card) -> Self {
        let path = card.path("qmp.sock");
        wait_for("QMP", || path.exists());
        let stream = UnixStream::connect(path).expect("QEMU listens");
        stream.set_read_timeout(Some(Duration::from_secs(60))).expect("sockets have timeouts");
        let mut qmp = Self { stream, heard: String::new(), answers: 0 };
        qmp.execute("qmp_capabilities", "{}");
        qmp
    }

    fn execute(&mut self, command: &str, arguments: &str) {
        let words = format!("{{\"execute\":\"{command}\",\"arguments\":{arguments}}}\n");
        self.stream.write_all(words.as_bytes()).expect("QEMU hears");
        self.answers += 1;
        while self.heard.matches("\"return\"").count() < self.answers {
            assert!(self.hear() && !self.heard.contains("\"error\""), "{words}: {}", self.heard);
        }
    }

    /// Hears more; false if QEMU hung up.
    fn hear(&mut self) -> bool {
        let mut bytes = [0; 4096];
        match self.stream.read(&mut bytes) {
            Ok(count) => {
                self.heard.push_str(&String::from_utf8_lossy(&bytes[..count]));
                count > 0
            }
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => false,
            Err(error) => panic!("{error} after {}", self.heard),
        }
    }
}
