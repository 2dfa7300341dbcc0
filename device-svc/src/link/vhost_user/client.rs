//! The VMM listens: the card connects, and whenever the connection ends it connects again, more and more slowly.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

use super::Shared;

const WAIT_MIN: Duration = Duration::from_millis(20);
const WAIT_MAX: Duration = Duration::from_secs(1);

/// Serves front ends until the link stops.
pub(super) fn run(shared: &Shared, waker: &EventFd) {
    let mut wait = WAIT_MIN;
    let mut said = false;
    while !shared.is_stopping() {
        match UnixStream::connect(&shared.settings.socket) {
            Ok(stream) => {
                said = false;
                let since = Instant::now();
                shared.serve(stream);
                // A front end that hangs up at once is not called back at once.
                wait = if since.elapsed() > WAIT_MAX { WAIT_MIN } else { (wait * 2).min(WAIT_MAX) };
            }
            Err(error) => {
                if !std::mem::replace(&mut said, true) {
                    tracing::info!(
                        function = %shared.settings.function,
                        socket = %shared.settings.socket.display(),
                        %error,
                        "nobody listens yet; trying again"
                    );
                }
                wait = (wait * 2).min(WAIT_MAX);
            }
        }
        if !shared.is_stopping() {
            let mut fds = [PollFd::new(waker.as_fd(), PollFlags::POLLIN)];
            let milliseconds = u16::try_from(wait.as_millis()).unwrap_or(u16::MAX);
            let _ = poll(&mut fds, PollTimeout::from(milliseconds));
        }
    }
}
