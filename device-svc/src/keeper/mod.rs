//! The keeper: a small process that owns what a restart of the service must not lose.
//!
//! ```text
//!   device-svc serve = the keeper            mod.rs      signals, questions, connections by function
//!     ├─ device-svc serve --kept             service.rs  the service: started, started again, replaced
//!     └─ a VMM's connection, for each        connection.rs   messages through, each kept until it is answered
//!        vfio-user function that has one         └► kept.rs  what is settled, to be said again
//! ```
//!
//! A VMM that speaks vfio-user does not connect again, so the keeper holds its connection and everything that came with it: memory,
//! events, the function's registers, the record of requests in flight. The service converses through it (`crate::tether`). When
//! the service dies, another is started, which claims each function's connection and goes on. vhost-user front ends connect again
//! by themselves, and are left to do so; most bring their record along, and for those that keep none there is a file here.
//!
//! The keeper touches no storage: whoever waits for a dead service's lock on a volume waits for that service alone. If the keeper
//! itself dies, the service ends too, in good order, and VMMs on vfio-user lose their devices.
//!
//! Another program takes over the whole card at once, and not a volume or a switch at a time: reactors have their processors, uplinks their
//! interfaces, and the card its socket, and there is one of each; and when the new program fails, everything is with the one before, and
//! nothing half way. The price is that a VM waits for all others too: `bench recovery` measures it (`update`).

mod connection;
mod kept;
mod service;

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use self::connection::{Connection, pair};
use self::service::{Program, Restarts, Service};
use crate::tether::{Answer, Question, TetherError, receive, send};

/// How long a program that is to take over may take until it stands by.
const STAND_BY_TIME_MAX: Duration = Duration::from_secs(20);

/// How long a service may take to make room, or to serve when it takes over: longer than a card takes to stop by its own account.
const HAND_OVER_TIME_MAX: Duration = Duration::from_secs(30);

/// Why there is no keeper.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// The system refuses what it needs.
    #[error("the keeper: {0}")]
    System(#[from] io::Error),
    /// The service cannot be started.
    #[error("the keeper cannot start the service: {0}")]
    Start(io::Error),
}

impl From<Errno> for KeeperError {
    fn from(errno: Errno) -> Self {
        Self::System(errno.into())
    }
}

/// Another program that is to take over.
struct Successor {
    program: Arc<Program>,
    service: Service,
    until: Instant,
    /// It has said so.
    stands_by: bool,
}

/// The keeper.
struct Keeper<R: FnMut()> {
    /// What is started, and what was before, if that has not yet served.
    program: Arc<Program>,
    before: Option<Arc<Program>>,
    service: Option<Service>,
    successor: Option<Successor>,
    restarts: Restarts,
    /// When the next service is due.
    due: Option<Instant>,
    connections: HashMap<String, (u64, Arc<Connection>)>,
    numbers: u64,
    /// Files of functions, and whether this service knows of them.
    files: HashMap<String, (OwnedFd, bool)>,
    /// Connections that this service knows.
    known: Vec<u64>,
    on_ready: R,
    stopping: bool,
    /// The service was told to make room.
    hands_over: bool,
    /// When a service that takes over, or makes room, has had time enough: then it is killed, and what it leaves is as good.
    patience: Option<Instant>,
}

/// Starts the service and keeps it going, until it ends by itself or a signal ends it: SIGTERM or SIGINT, which it passes on.
/// `on_ready` is called whenever a service has everything started.
///
/// Must be called before the process has other threads.
///
/// # Errors
/// When the system refuses what it needs.
pub fn run(on_ready: impl FnMut()) -> Result<ExitCode, KeeperError> {
    let mut mask = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGCHLD] {
        mask.add(signal);
    }
    mask.thread_block()?;
    let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    // Each connection has a handful, and each vector of each function one.
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    let program = Arc::new(Program::own()?);
    let service = Service::start(&program, false).map_err(KeeperError::Start)?;
    let mut keeper = Keeper {
        program,
        before: None,
        service: Some(service),
        successor: None,
        restarts: Restarts::default(),
        due: None,
        connections: HashMap::new(),
        numbers: 0,
        files: HashMap::new(),
        known: Vec::new(),
        on_ready,
        stopping: false,
        hands_over: false,
        patience: None,
    };
    loop {
        keeper.wait(&signals)?;
        while let Some(signal) = signals.read_signal()? {
            if signal.ssi_signo as i32 != Signal::SIGCHLD as i32 {
                keeper.signalled(signal.ssi_signo as i32);
            }
        }
        if let Some(code) = keeper.look_after()? {
            return Ok(code);
        }
    }
}

impl<R: FnMut()> Keeper<R> {
    /// Waits for a signal or a question, answers the question.
    fn wait(&mut self, signals: &SignalFd) -> Result<(), KeeperError> {
        let standing_by = self.successor.as_ref().filter(|successor| !successor.stands_by);
        let until = [self.due, self.patience, standing_by.map(|successor| successor.until)].into_iter().flatten().min();
        let timeout = match until {
            None => PollTimeout::NONE,
            // Rounded up, so that it is due when we wake.
            Some(until) => {
                PollTimeout::try_from(until.saturating_duration_since(Instant::now()) + Duration::from_millis(1))
                    .unwrap_or(PollTimeout::MAX)
            }
        };
        let mut fds = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        let service = self.service.as_ref().filter(|service| service.is_talking());
        let successor =
            self.successor.as_ref().map(|successor| &successor.service).filter(|service| service.is_talking());
        fds.extend(service.iter().chain(&successor).map(|service| PollFd::new(service.socket(), PollFlags::POLLIN)));
        match poll(&mut fds, timeout) {
            Err(errno) if errno != Errno::EINTR => return Err(errno.into()),
            _ => {}
        }
        let mut ready = fds[1..].iter().map(|fd| fd.any().unwrap_or(false));
        let asks = service.is_some() && ready.next().unwrap_or(false);
        let successor_asks = successor.is_some() && ready.next().unwrap_or(false);
        drop(ready);
        if asks {
            self.hear();
        }
        if successor_asks {
            self.hear_successor();
        }
        Ok(())
    }

    fn signalled(&mut self, signal: i32) {
        let Some(service) = &self.service else {
            // Between two services there is nothing that must end in good order.
            self.stopping |= signal != Signal::SIGHUP as i32;
            return;
        };
        if signal == Signal::SIGHUP as i32 {
            service.signal(Signal::SIGHUP);
        } else {
            self.stopping = true;
            // As it came: SIGINT a second time ends the service at once.
            service.signal(if signal == Signal::SIGINT as i32 { Signal::SIGINT } else { Signal::SIGTERM });
        }
    }

    /// Ends, starts and replaces services as it is time. Returns with what the keeper ends.
    fn look_after(&mut self) -> Result<Option<ExitCode>, KeeperError> {
        self.look_after_successor();
        if self.patience.take_if(|patience| *patience <= Instant::now()).is_some()
            && let Some(service) = &self.service
        {
            tracing::error!(
                seconds = HAND_OVER_TIME_MAX.as_secs(),
                "a service takes too long to make room or to take over; it is killed"
            );
            service.signal(Signal::SIGKILL);
        }
        if let Some(service) = &mut self.service
            && let Some(end) = service.ended()?
        {
            let was_ready = service.was_ready();
            let lived = service.lived();
            self.service = None;
            self.known.clear();
            self.files.values_mut().for_each(|(_, is_known)| *is_known = false);
            let handed_over = std::mem::take(&mut self.hands_over);
            self.patience = None;
            if self.stopping {
                return Ok(Some(service::exit_code(end)));
            }
            if let Some(successor) = self.successor.take_if(|successor| successor.stands_by) {
                tracing::info!(program = %successor.program, "another program takes over");
                self.before = Some(std::mem::replace(&mut self.program, successor.program));
                let _ = send(&successor.service.socket(), &Answer::Done, &[]);
                self.service = Some(successor.service);
                self.patience = Some(Instant::now() + HAND_OVER_TIME_MAX);
                return Ok(None);
            }
            // It was asked for by one that is gone.
            self.successor = None;
            if handed_over {
                // Whoever stood by is dead.
                self.due = Some(Instant::now());
            } else if let Some(before) = self.before.take_if(|_| !was_ready) {
                tracing::error!(program = %self.program, %end, "the new program did not get to serve; the one before goes on");
                self.program = before;
                self.due = Some(Instant::now());
            } else if end.success() && was_ready {
                return Ok(Some(ExitCode::SUCCESS));
            } else if let Some(pause) = self.restarts.pause(was_ready) {
                let (end, lived_ms) = (service::describe(end), lived.as_millis() as u64);
                tracing::error!(%end, lived_ms, pause_ms = pause.as_millis() as u64, "the service died; another is started");
                self.due = Some(Instant::now() + pause);
            } else {
                // It has never served: whoever started us shall hear of it.
                return Ok(Some(service::exit_code(end)));
            }
        }
        if self.stopping && self.service.is_none() {
            return Ok(Some(ExitCode::SUCCESS));
        }
        if self.due.is_some_and(|due| due <= Instant::now()) {
            self.due = None;
            match Service::start(&self.program, false) {
                Ok(service) => self.service = Some(service),
                Err(error) => {
                    let pause = self.restarts.pause(false).unwrap_or(Duration::from_secs(1));
                    tracing::error!(%error, "the service cannot be started; it is tried again");
                    self.due = Some(Instant::now() + pause);
                }
            }
        }
        Ok(None)
    }

    fn look_after_successor(&mut self) {
        let Some(successor) = &mut self.successor else { return };
        let why = match successor.service.ended() {
            Ok(Some(end)) => {
                format!("{} ended before it could take over ({})", successor.program, service::describe(end))
            }
            _ if !successor.stands_by && successor.until <= Instant::now() => {
                format!("{} did not stand by within {} s", successor.program, STAND_BY_TIME_MAX.as_secs())
            }
            _ => return,
        };
        let is_expected = !successor.stands_by;
        self.successor = None;
        tracing::error!(%why, "no other program takes over");
        if is_expected {
            self.answer(&Answer::Refused { why }, &[]);
        }
    }

    fn answer(&self, answer: &Answer, fds: &[OwnedFd]) {
        let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
        // Whoever asked and died gets no answer.
        if let Some(service) = &self.service {
            let _ = send(&service.socket(), answer, &fds);
        }
    }

    fn hear_successor(&mut self) {
        let Some(successor) = &mut self.successor else { return };
        match receive::<Question>(&successor.service.socket()) {
            Ok((Question::StandBy, _)) => {
                successor.stands_by = true;
                self.hands_over = true;
                self.patience = Some(Instant::now() + HAND_OVER_TIME_MAX);
                // The service that is told this lets go and ends, and that is when the successor is told.
                self.answer(&Answer::Done, &[]);
            }
            // It has died, which is heard of otherwise, or is none of ours.
            _ => successor.service.hang_up(),
        }
    }

    fn hear(&mut self) {
        let Some(service) = &mut self.service else { return };
        let (question, fds) = match receive::<Question>(&service.socket()) {
            Ok(heard) => heard,
            // Of a later version, which does without what it cannot have.
            Err(TetherError::Foreign(error)) => {
                return self.answer(&Answer::Refused { why: error.to_string() }, &[]);
            }
            Err(error) => {
                tracing::debug!(%error, "the service says no more");
                service.hang_up();
                return;
            }
        };
        match question {
            Question::Keep { function } => self.keep(function, fds),
            Question::Claim { function } => self.claim(&function),
            Question::End { number } => {
                self.end_those(|known| known == number);
                self.known.retain(|known| *known != number);
                self.answer(&Answer::Done, &[]);
            }
            Question::KeepFile { function } => self.keep_file(function, fds),
            Question::ClaimFile { function } => self.claim_file(&function),
            Question::DropFile { function } => {
                self.files.remove(&function);
                self.answer(&Answer::Done, &[]);
            }
            Question::Await { function } => {
                if let Some((number, _)) = self.connections.get(&function) {
                    self.known.push(*number);
                }
                if let Some((_, is_known)) = self.files.get_mut(&function) {
                    *is_known = true;
                }
                self.answer(&Answer::Done, &[]);
            }
            Question::Ready => self.ready(),
            Question::Update { program } => match self.prepare(&program) {
                Ok(()) => {}
                Err(error) => {
                    let why = format!("{}: {error}", program.display());
                    self.answer(&Answer::Refused { why }, &[]);
                }
            },
            // It may begin at once: nobody is before it.
            Question::StandBy => self.answer(&Answer::Done, &[]),
        }
    }

    fn keep(&mut self, function: String, fds: Vec<OwnedFd>) {
        let Ok([vmm, service]) = <[OwnedFd; 2]>::try_from(fds) else {
            return self.answer(&Answer::Refused { why: "two descriptors are needed".to_owned() }, &[]);
        };
        if let Some((_, before)) = self.connections.remove(&function) {
            before.end();
        }
        match Connection::start(function.clone(), vmm.into(), service.into()) {
            Ok(connection) => {
                self.numbers += 1;
                let number = self.numbers;
                self.known.push(number);
                self.connections.insert(function, (number, connection));
                self.answer(&Answer::Kept { number }, &[]);
            }
            Err(error) => self.answer(&Answer::Refused { why: error.to_string() }, &[]),
        }
    }

    fn claim(&mut self, function: &str) {
        let found = self.connections.get(function).filter(|(_, connection)| !connection.is_ended());
        let Some((number, connection)) = found else {
            return self.answer(&Answer::Nothing, &[]);
        };
        let offered = pair().and_then(|(ours, theirs)| Ok((ours, [theirs, connection.vmm()?.into()])));
        match offered {
            Ok((ours, theirs)) => {
                connection.offer(ours);
                self.known.push(*number);
                self.answer(&Answer::Kept { number: *number }, &theirs);
            }
            Err(error) => self.answer(&Answer::Refused { why: error.to_string() }, &[]),
        }
    }

    fn keep_file(&mut self, function: String, fds: Vec<OwnedFd>) {
        let Ok([file]) = <[OwnedFd; 1]>::try_from(fds) else {
            return self.answer(&Answer::Refused { why: "a descriptor is needed".to_owned() }, &[]);
        };
        self.files.insert(function, (file, true));
        self.answer(&Answer::Done, &[]);
    }

    fn claim_file(&mut self, function: &str) {
        let Some((file, is_known)) = self.files.get_mut(function) else {
            return self.answer(&Answer::Nothing, &[]);
        };
        *is_known = true;
        match file.try_clone() {
            Ok(file) => self.answer(&Answer::Done, &[file]),
            Err(error) => self.answer(&Answer::Refused { why: error.to_string() }, &[]),
        }
    }

    /// Ends connections, by their numbers. Returns whose they were.
    fn end_those(&mut self, is_meant: impl Fn(u64) -> bool) -> Vec<String> {
        let ended = self.connections.extract_if(|_, (number, _)| is_meant(*number));
        ended
            .map(|(function, (_, connection))| {
                connection.end();
                function
            })
            .collect()
    }

    fn ready(&mut self) {
        if let Some(service) = &mut self.service {
            service.set_ready();
        }
        self.restarts.served();
        self.before = None;
        self.patience = None;
        let known = std::mem::take(&mut self.known);
        for function in self.end_those(|number| !known.contains(&number)) {
            tracing::warn!(function, "nobody serves this function any more; its VMM's connection ends");
        }
        self.known = known;
        self.files.retain(|_, (_, is_known)| *is_known);
        (self.on_ready)();
        self.answer(&Answer::Done, &[]);
    }

    /// Has another program stand by. It is told when, and the service too.
    fn prepare(&mut self, program: &std::path::Path) -> io::Result<()> {
        if self.successor.is_some() {
            return Err(io::Error::other("another update is under way"));
        }
        let program = Arc::new(Program::open(program)?);
        let service = Service::start(&program, true)?;
        let until = Instant::now() + STAND_BY_TIME_MAX;
        self.successor = Some(Successor { program, service, until, stands_by: false });
        Ok(())
    }
}
