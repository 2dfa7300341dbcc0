//! The card listens: one front end after another.
//!
//! A front end that sets a device up and then runs it (libblkio, fio) connects twice in a row, and a VMM that restarts may
//! connect before the end of its old connection was noticed: so a second connection waits in the listen queue until the first
//! has ended.

use nix::sys::eventfd::EventFd;

use super::Shared;
use crate::link::listening::Listening;

/// Serves front ends until the link stops.
pub(super) fn run(shared: &Shared, listening: &Listening, waker: &EventFd) {
    while !shared.is_stopping() {
        if let Some(stream) = listening.accept(&shared.settings.function, waker) {
            shared.serve(stream);
        }
    }
}
