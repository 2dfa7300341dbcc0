//! Reactors: one pinned thread per core, each turning its lanes to completion.
//!
//! ```text
//!   turn:  mailbox ─► every lane: fetch, submit ─► every channel: poll ─► every lane: publish, interrupt
//! ```
//!
//! A lane belongs to one reactor; other threads reach it only by the mailbox. Between turns, and only then, a lane starts,
//! stops, or changes its memory.

mod cpus;
mod function;
mod mailbox;
mod turn;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

pub use cpus::{available_cpus, quota_cpus};
pub use mailbox::{Message, QueueKey, Stopped};

use crate::config::{PollConfig, ReactorCount, ReactorsConfig};
use crate::metrics::ReactorCounters;
use mailbox::Mailbox;

/// Why reactors could not be started.
#[derive(Debug, thiserror::Error)]
pub enum ReactorError {
    /// More reactors than CPUs that this process may use.
    #[error(
        "{asked} reactors asked for, but this process may use {available} CPUs; set `reactors.count` to at most that"
    )]
    TooMany {
        /// What was asked for.
        asked: usize,
        /// What there is.
        available: usize,
    },
    /// The kernel refused a thread or a descriptor.
    #[error("a reactor could not start: {0}")]
    Start(#[from] std::io::Error),
}

/// One reactor, seen from other threads.
#[derive(Clone)]
pub struct ReactorHandle {
    mailbox: Arc<Mailbox>,
    counters: Arc<ReactorCounters>,
    cpu: usize,
    /// Queues of functions that exist, running or not.
    placed: Arc<AtomicUsize>,
}

impl ReactorHandle {
    /// Hands the reactor a message; it is acted upon between turns. May block while the mailbox is full.
    pub fn post(&self, message: Message) {
        self.mailbox.post(message);
    }

    /// Has the reactor make a turn if it sleeps, so that its lanes look at what they share with other threads. Never blocks.
    pub fn nudge(&self) {
        self.mailbox.nudge();
    }

    /// What the reactor counts.
    #[must_use]
    pub const fn counters(&self) -> &Arc<ReactorCounters> {
        &self.counters
    }

    /// The CPU it is pinned to.
    #[must_use]
    pub const fn cpu(&self) -> usize {
        self.cpu
    }
}

/// All reactors of the service. Dropping it ends them.
pub struct Reactors {
    handles: Vec<ReactorHandle>,
    threads: Vec<JoinHandle<()>>,
}

impl Reactors {
    /// Starts as many reactors as configured, or as the CPUs that are really available allow.
    ///
    /// # Errors
    /// When more are asked for than CPUs may be used, or the kernel refuses.
    pub fn start(config: &ReactorsConfig) -> Result<Self, ReactorError> {
        let cpus = available_cpus()?;
        let count = match config.count {
            ReactorCount::Auto => quota_cpus().unwrap_or(cpus.len()).clamp(1, cpus.len()),
            ReactorCount::Exactly(asked) if usize::from(asked) > cpus.len() => {
                return Err(ReactorError::TooMany { asked: asked.into(), available: cpus.len() });
            }
            ReactorCount::Exactly(asked) => usize::from(asked).max(1),
        };
        let mut reactors = Self { handles: Vec::new(), threads: Vec::new() };
        for (number, cpu) in cpus.into_iter().take(count).enumerate() {
            let mailbox = Arc::new(Mailbox::new()?);
            let counters = Arc::new(ReactorCounters::default());
            let turning =
                turn::Turning::new(Arc::clone(&mailbox), Arc::clone(&counters), config.poll == PollConfig::Always)?;
            let thread = std::thread::Builder::new().name(format!("reactor-{number}")).spawn(move || {
                cpus::pin(cpu);
                turning.run();
            })?;
            reactors.handles.push(ReactorHandle { mailbox, counters, cpu, placed: Arc::default() });
            reactors.threads.push(thread);
        }
        Ok(reactors)
    }

    /// The reactors.
    #[must_use]
    pub fn handles(&self) -> &[ReactorHandle] {
        &self.handles
    }

    /// Chooses a reactor for each of `queues` queues of one function, those with the fewest queues first, and at most
    /// `spread` different ones. Returns their numbers; [`release`](Self::release) takes the queues off again.
    #[must_use]
    pub fn place(&self, queues: u16, spread: usize) -> Vec<usize> {
        let mut by_load: Vec<usize> = (0..self.handles.len()).collect();
        by_load.sort_by_key(|number| self.handles[*number].placed.load(Ordering::Relaxed));
        by_load.truncate(spread.max(1));
        let placement: Vec<usize> = by_load.into_iter().cycle().take(usize::from(queues)).collect();
        for number in &placement {
            self.handles[*number].placed.fetch_add(1, Ordering::Relaxed);
        }
        placement
    }

    /// The queues of a placement are gone.
    pub fn release(&self, placement: &[usize]) {
        for number in placement {
            self.handles[*number].placed.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Reactors {
    fn drop(&mut self) {
        for handle in &self.handles {
            handle.post(Message::Shutdown);
        }
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a reactor panicked");
            }
        }
    }
}

#[cfg(test)]
mod tests;
