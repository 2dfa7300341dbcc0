//! A Linux guest under QEMU beside a card, and how QEMU is told things while it runs.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::{Card, Namespace, Process, wait_for};

/// How a guest is booted.
#[derive(Clone, Copy, Debug)]
pub struct GuestSettings<'a> {
    /// The folder for its files, which other guests may share.
    pub folder: &'a Path,
    /// Its name, by which its files are told from others'.
    pub name: &'a str,
    /// A shell script that it runs, and then ends.
    pub job: &'a str,
    /// QEMU's arguments beside those that every guest has.
    pub arguments: &'a [&'a str],
    /// The namespace that QEMU runs in, if not the machine's own.
    pub namespace: Option<&'a Namespace>,
}

impl GuestSettings<'_> {
    /// Boots the guest. The process ends with the job's status.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn boot(&self) -> Process {
        let script = self.folder.join(format!("{}-job.sh", self.name));
        std::fs::write(&script, self.job).expect("the guest's folder is writable");
        let socket = qmp_socket(self.folder, self.name);
        // That of an earlier guest.
        let _ = std::fs::remove_file(&socket);
        let runner = Path::new(env!("CARGO_MANIFEST_DIR")).join("rig/guest-run");
        let mut command = self.namespace.map_or_else(
            || Command::new(&runner),
            |namespace| namespace.command(runner.to_str().expect("the tree's path is text")),
        );
        command.arg("--job").arg(script).arg("--qmp").arg(socket).args(["--timeout", "110", "--"]).args(self.arguments);
        Process::start(&mut command)
    }
}

fn qmp_socket(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}-qmp.sock"))
}

/// The name of the guest beside a card that has only one.
const ONLY: &str = "guest";

/// Boots the one guest beside `card` to run `job`, a shell script; `arguments` are QEMU's beside those that every guest has. The
/// process ends with the job's status.
///
/// # Panics
/// When it cannot be started.
#[must_use]
pub fn boot_guest(card: &Card, job: &str, arguments: &[&str]) -> Process {
    GuestSettings { folder: card.folder(), name: ONLY, job, arguments, namespace: None }.boot()
}

/// Sends one QMP command with its arguments, a JSON object, to the QEMU of the one guest beside `card`; returns all that QEMU
/// said.
///
/// # Panics
/// When QEMU refuses it, or hangs up.
pub fn qmp(card: &Card, command: &str, arguments: &str) -> String {
    qmp_of(card.folder(), ONLY, command, arguments)
}

/// The same for the guest `name` whose files are in `folder`.
///
/// # Panics
/// When QEMU refuses it, or hangs up.
pub fn qmp_of(folder: &Path, name: &str, command: &str, arguments: &str) -> String {
    let path = qmp_socket(folder, name);
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
