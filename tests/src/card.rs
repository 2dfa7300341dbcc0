//! A card under test: `device-svc serve` on a configuration of the test's, in a folder of its own.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::process::Process;

/// A served card. It ends with the test.
#[derive(Debug)]
pub struct Card {
    process: Process,
    folder: tempfile::TempDir,
    log: String,
    keeper: bool,
}

/// What a test's card has.
#[derive(Clone, Debug, Default)]
pub struct CardSettings {
    /// The `[[volume]]`, `[[function]]` and further parts of the configuration; `@` stands for the card's folder.
    pub parts: String,
    /// `reactors.poll`; adaptive if empty.
    pub poll: String,
    /// `reactors.count`; 1 if empty.
    pub count: String,
    /// `RUST_LOG`; as the tests' own if empty.
    pub log: String,
    /// Whether the process that is started is a keeper, and the service another one.
    pub keeper: bool,
}

impl Card {
    /// Starts a card and waits until it serves.
    ///
    /// # Panics
    /// When it does not.
    #[must_use]
    pub fn start(settings: &CardSettings) -> Self {
        let folder = tempfile::Builder::new().prefix("dray-test").tempdir().expect("there is a temporary folder");
        let or = |text: &str, default: &str| if text.is_empty() { default.to_owned() } else { text.to_owned() };
        let text = format!(
            "[reactors]\ncount = {}\npoll = \"{}\"\n[control]\nlisten = \"unix:@/card.sock\"\nstate = \"@/state\"\n{}",
            or(&settings.count, "1"),
            or(&settings.poll, "adaptive"),
            settings.parts
        );
        let path = folder.path().join("card.toml");
        std::fs::write(&path, text.replace('@', &folder.path().display().to_string())).expect("the folder is writable");
        let (log, keeper) = (settings.log.clone(), settings.keeper);
        Self { process: Self::serve(&path, &log, keeper), folder, log, keeper }
    }

    fn serve(config: &Path, log: &str, keeper: bool) -> Process {
        let mut command = Command::new(crate::program("device-svc"));
        if !log.is_empty() {
            command.env("RUST_LOG", log);
        }
        command.arg("serve").arg("--config").arg(config);
        if !keeper {
            command.arg("--no-keeper");
        }
        let mut process = Process::start(&mut command);
        process.wait_for_output("ready:");
        process
    }

    /// Ends the card by a signal and starts it again on the same configuration.
    pub fn restart(&mut self, signal: nix::sys::signal::Signal) {
        self.process.signal(signal);
        self.process.end();
        self.process = Self::serve(&self.folder.path().join("card.toml"), &self.log, self.keeper);
    }

    /// The process that serves for a keeper: the youngest of its children. `None`: there is none just now.
    #[must_use]
    pub fn service_id(&self) -> Option<i32> {
        let keeper = self.process.id();
        let children = std::fs::read_to_string(format!("/proc/{keeper}/task/{keeper}/children")).ok()?;
        children.split_whitespace().last()?.parse().ok()
    }

    /// Kills the process that serves for the keeper, which starts another.
    ///
    /// # Panics
    /// When there is none for two minutes.
    pub fn kill_service(&self, signal: nix::sys::signal::Signal) {
        let mut service = None;
        crate::wait_for("a service", || {
            service = self.service_id();
            service.is_some()
        });
        // It may have died by itself in the meantime, which the test will see by other means.
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(service.unwrap_or_default()), signal);
    }

    /// A path in the card's folder.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The card's folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Everything that the service has said.
    #[must_use]
    pub fn output(&self) -> String {
        self.process.output()
    }

    /// The service's process.
    pub const fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Runs a command of `device-svc` against this card, which must succeed; returns what it said.
    ///
    /// # Panics
    /// When it fails.
    pub fn command(&self, arguments: &[&str]) -> String {
        let control = format!("unix:{}", self.path("card.sock").display());
        Process::start(Command::new(crate::program("device-svc")).args(arguments).arg("--control").arg(control))
            .succeed()
    }

    /// The card's statistics.
    ///
    /// # Panics
    /// When it gives none.
    #[must_use]
    pub fn stats(&self) -> serde_json::Value {
        serde_json::from_str(&self.command(&["stats", "--json"])).expect("statistics are JSON")
    }
}

impl Drop for Card {
    fn drop(&mut self) {
        // What a card said explains why its test failed.
        if std::thread::panicking() {
            eprintln!("the card said:\n{}", self.process.output());
        }
    }
}
