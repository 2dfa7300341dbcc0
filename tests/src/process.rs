//! A program under test: its output is kept, and it never outlives its test.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long anything may take before a test fails: machines are busy, so this is long, and nobody waits for it in vain.
const PATIENCE: Duration = Duration::from_secs(300);

/// Waits until `what` is so.
///
/// # Panics
/// When it is not so after five minutes.
pub fn wait_for(name: &str, what: impl FnMut() -> bool) {
    wait_for_or(what, || name.to_owned());
}

/// Waits until `what` is so; `name` says what was waited for, and what was there instead.
///
/// # Panics
/// When it is not so after five minutes.
pub fn wait_for_or(mut what: impl FnMut() -> bool, name: impl Fn() -> String) {
    let start = Instant::now();
    while !what() {
        assert!(start.elapsed() < PATIENCE, "waited too long for: {}", name());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A running program.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    output: Log,
    /// The threads that collect the output; each ends with its pipe.
    readers: Vec<JoinHandle<()>>,
    patience: Duration,
}

/// What a program says, as it says it.
#[derive(Clone, Debug, Default)]
pub struct Log(Arc<Mutex<String>>);

impl Log {
    fn lock(&self) -> MutexGuard<'_, String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Everything so far.
    #[must_use]
    pub fn text(&self) -> String {
        self.lock().clone()
    }
}

impl Process {
    /// Starts `command`; its output is collected.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn start(command: &mut Command) -> Self {
        Self::spawn(command.stdin(Stdio::null()))
    }

    /// The same for a program that is told things while it runs, by `input`.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn start_with_input(command: &mut Command) -> Self {
        Self::spawn(command.stdin(Stdio::piped()))
    }

    fn spawn(command: &mut Command) -> Self {
        let name = format!("{command:?}");
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        let output = Log::default();
        let pipes: [Option<Box<dyn Read + Send>>; 2] = [
            child.stdout.take().map(|pipe| Box::new(pipe) as Box<dyn Read + Send>),
            child.stderr.take().map(|pipe| Box::new(pipe) as Box<dyn Read + Send>),
        ];
        let collect = |pipe| {
            let output = output.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(pipe).split(b'\n').map_while(Result::ok) {
                    let mut output = output.lock();
                    output.push_str(&String::from_utf8_lossy(&line));
                    output.push('\n');
                }
            })
        };
        let readers = pipes.into_iter().flatten().map(collect).collect();
        Self { name, child, output, readers, patience: PATIENCE }
    }

    /// The same program, which may take this long for what it is waited for.
    #[must_use]
    pub const fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Writes to its standard input.
    ///
    /// # Panics
    /// When it reads none, or has ended.
    pub fn input(&mut self, text: &str) {
        let pipe = self.child.stdin.as_mut().expect("it was started with an input");
        if let Err(error) = pipe.write_all(text.as_bytes()) {
            self.end();
            panic!("{} takes no input ({error}):\n{}", self.name, self.output());
        }
    }

    /// Everything it has said.
    #[must_use]
    pub fn output(&self) -> String {
        self.output.text()
    }

    /// The same while it goes on, for other threads.
    #[must_use]
    pub fn log(&self) -> Log {
        self.output.clone()
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it has said `text`.
    ///
    /// # Panics
    /// When it ends first, or never says so.
    pub fn wait_for_output(&mut self, text: &str) {
        let start = Instant::now();
        while !self.output().contains(text) {
            if let Ok(Some(status)) = self.child.try_wait() {
                self.end();
                assert!(self.output().contains(text), "{} ended with {status}:\n{}", self.name, self.output());
            }
            assert!(start.elapsed() < self.patience, "{} never said {text:?}:\n{}", self.name, self.output());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Sends a signal.
    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.child.id().cast_signed()), signal);
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it does not end in two minutes, or how long it may take.
    pub fn end(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Ok(Some(status)) = self.child.try_wait() {
                // What it said last may still be in the pipes.
                for reader in self.readers.drain(..) {
                    let _ = reader.join();
                }
                return status;
            }
            assert!(start.elapsed() < self.patience, "{} does not end:\n{}", self.name, self.output());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for its end, which must be a good one; returns what it said.
    ///
    /// # Panics
    /// When it ends badly, or not at all.
    pub fn succeed(mut self) -> String {
        let status = self.end();
        assert!(status.success(), "{} ended with {status}:\n{}", self.name, self.output());
        self.output()
    }

    /// Whether it still runs.
    #[must_use]
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // One that has ended already needs no kill.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
