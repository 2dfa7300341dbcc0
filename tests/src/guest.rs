//! A Linux guest under QEMU beside a card, and how QEMU is told things while it runs.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::{Card, Namespace, Process, wait_for};

/// The name of the guest beside a card that has only one.
const ONLY: &str = "guest";

/// What every guest's shell knows: `measure` is a client of iperf3, which writes its report. A server does not listen before it is there,
/// nor for a moment between two clients, and sends away who comes before it is done with the one before; any other failure is one, and
/// says why.
const MEASURE: &str = r#"measure() {
    for i in $(seq 300); do
        iperf3 --json "$@" >/tmp/measured && { cat /tmp/measured; return; }
        grep -qE "Connection refused|Connection reset by peer|server is busy|control socket has closed" /tmp/measured || break
        sleep 0.1
    done
    cat /tmp/measured >&2
    false
}
"#;

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
    /// Its memory, MiB.
    pub memory_mib: u32,
    /// An archive (cpio) that is unpacked over its root.
    pub archive: Option<&'a Path>,
    /// How long it may run.
    pub limit: Duration,
}

impl<'a> GuestSettings<'a> {
    /// A guest with its files in `folder`, and nothing unusual about it.
    #[must_use]
    pub const fn new(folder: &'a Path, job: &'a str, arguments: &'a [&'a str]) -> Self {
        Self {
            folder,
            name: ONLY,
            job,
            arguments,
            namespace: None,
            memory_mib: 256,
            archive: None,
            limit: Duration::from_secs(300),
        }
    }

    /// Boots the guest. The process ends with the job's status.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn boot(&self) -> Process {
        let script = self.folder.join(format!("{}-job.sh", self.name));
        std::fs::write(&script, MEASURE.to_owned() + self.job).expect("the guest's folder is writable");
        let socket = qmp_socket(self.folder, self.name);
        // That of an earlier guest.
        let _ = std::fs::remove_file(&socket);
        let runner = Path::new(env!("CARGO_MANIFEST_DIR")).join("rig/guest-run");
        let mut command = self.namespace.map_or_else(
            || Command::new(&runner),
            |namespace| namespace.command(runner.to_str().expect("the tree's path is text")),
        );
        command.arg("--job").arg(script).arg("--qmp").arg(socket);
        command.args(["--mem", &self.memory_mib.to_string(), "--timeout", &self.limit.as_secs().to_string()]);
        if let Some(archive) = self.archive {
            command.arg("--archive").arg(archive);
        }
        // The limit ends the guest first, and says so.
        Process::start(command.arg("--").args(self.arguments)).with_patience(self.limit + Duration::from_secs(10))
    }
}

fn qmp_socket(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}-qmp.sock"))
}

/// Boots the one guest beside `card` to run `job`, a shell script; `arguments` are QEMU's beside those that every guest has. The
/// process ends with the job's status.
///
/// # Panics
/// When it cannot be started.
#[must_use]
pub fn boot_guest(card: &Card, job: &str, arguments: &[&str]) -> Process {
    GuestSettings::new(card.folder(), job, arguments).boot()
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
    let mut qmp = Qmp::connect(folder, name);
    qmp.execute(command, arguments);
    qmp.heard
}

/// Sends one QMP command to the one guest beside `card`, and waits for an event that comes of it. False if QEMU ends instead.
///
/// # Panics
/// When QEMU refuses the command, or does neither.
#[must_use]
pub fn qmp_until(card: &Card, command: &str, arguments: &str, event: &str) -> bool {
    let mut qmp = Qmp::connect(card.folder(), ONLY);
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
    fn connect(folder: &Path, name: &str) -> Self {
        let path = qmp_socket(folder, name);
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
