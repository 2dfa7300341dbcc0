//! Notices when an interface comes, goes, or is set up or down: one thread for each network namespace in use, which ends with its
//! last user.
//!
//! The kernel's messages (rtnetlink, of links and of their addresses) only say that it is time to look. What a link's state is, each user asks the kernel
//! then: so no message has to be understood or believed, and one that was lost because too many came costs nothing.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recvfrom, socket};

use super::namespace::Namespace;
use crate::backend::BackendError;

/// After this long somebody who asks for it looks again.
pub(super) const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// What is followed: links, and the addresses on them.
const GROUPS: libc::c_int = libc::RTMGRP_LINK | libc::RTMGRP_IPV4_IFADDR | libc::RTMGRP_IPV6_IFADDR;

/// Who wants to look when something has happened to a link or its addresses.
pub(super) trait Watched: Send + Sync {
    /// Looks, on the thread that watches, which is in the namespace. Returns whether it wants to look again after [`LOOK_AGAIN`]
    /// although nothing happens.
    fn look(&self) -> bool;
}

/// A thread that runs, and what tells its namespace from others.
type Known = ((u64, u64), Weak<Watch>);
static WATCHES: Mutex<Vec<Known>> = Mutex::new(Vec::new());

type Users = Mutex<Vec<Weak<dyn Watched>>>;

/// The watch over the links of one namespace.
#[derive(Debug)]
pub(super) struct Watch {
    namespace: Arc<Namespace>,
    users: Arc<UserList>,
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct UserList(Users);

impl std::fmt::Debug for UserList {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("UserList").field("count", &lock(&self.0).len()).finish()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Watch {
    /// The watch over a namespace; it is started if there is none.
    pub(super) fn open(netns: Option<&str>) -> Result<Arc<Self>, BackendError> {
        let namespace = Namespace::open(netns)?;
        let identity = namespace.identity()?;
        let mut watches = lock(&WATCHES);
        watches.retain(|(_, watch)| watch.strong_count() > 0);
        let known = watches.iter().find(|(of, _)| *of == identity);
        if let Some(watch) = known.and_then(|(_, watch)| watch.upgrade()) {
            return Ok(watch);
        }
        let watch = Arc::new(Self::start(Arc::new(namespace))?);
        watches.push((identity, Arc::downgrade(&watch)));
        Ok(watch)
    }

    fn start(namespace: Arc<Namespace>) -> Result<Self, BackendError> {
        let what = namespace.describe();
        let failed = |errno: Errno| BackendError::Unavailable(format!("links{what} cannot be watched: {errno}"));
        let netlink = namespace.run(open_netlink)?.map_err(failed)?;
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let stop = Arc::new(EventFd::from_flags(flags).map_err(failed)?);
        let users = Arc::new(UserList::default());
        let thread = {
            let (namespace, users, stop) = (Arc::clone(&namespace), Arc::clone(&users), Arc::clone(&stop));
            let run = move || match namespace.enter() {
                Ok(()) => watch(&netlink, &stop, &users),
                Err(errno) => tracing::error!("links{} are not watched: {errno}", namespace.describe()),
            };
            std::thread::Builder::new()
                .name("links".to_owned())
                .spawn(run)
                .map_err(|error| BackendError::Unavailable(format!("no thread to watch links: {error}")))?
        };
        Ok(Self { namespace, users, stop, thread: Some(thread) })
    }

    /// The namespace.
    pub(super) const fn namespace(&self) -> &Arc<Namespace> {
        &self.namespace
    }

    /// From now on `user` looks when something happens, and once soon.
    pub(super) fn follow(&self, user: Weak<dyn Watched>) {
        lock(&self.users.0).push(user);
        let _ = self.stop.write(FOLLOW);
    }
}

/// What is added to the event counter: a new user, or the end.
const FOLLOW: u64 = 1;
const STOP: u64 = 1 << 32;

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.stop.write(STOP);
        // The last user may go while it looks: then this is the thread itself, which ends when that returns.
        if let Some(thread) = self.thread.take().filter(|thread| thread.thread().id() != std::thread::current().id()) {
            let _ = thread.join();
        }
    }
}

fn open_netlink() -> Result<OwnedFd, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let netlink = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)?;
    bind(netlink.as_raw_fd(), &NetlinkAddr::new(0, GROUPS as u32))?;
    Ok(netlink)
}

fn watch(netlink: &OwnedFd, stop: &EventFd, users: &UserList) {
    let mut again = false;
    loop {
        let timeout = if again { PollTimeout::from(LOOK_AGAIN.as_millis() as u16) } else { PollTimeout::NONE };
        let mut fds = [PollFd::new(netlink.as_fd(), PollFlags::POLLIN), PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
        let count = match poll(&mut fds, timeout) {
            Ok(count) => count,
            Err(Errno::EINTR) => continue,
            Err(errno) => {
                tracing::error!("links are not watched any more: {errno}");
                return;
            }
        };
        let added = stop.read().unwrap_or(0);
        if added >= STOP {
            return;
        }
        if !drain(netlink) && added == 0 && count > 0 {
            continue;
        }
        // Looked at without the lock: a user that goes while it looks is dropped here, and may be the last one.
        let present: Vec<Arc<dyn Watched>> = {
            let mut users = lock(&users.0);
            users.retain(|user| user.strong_count() > 0);
            users.iter().filter_map(Weak::upgrade).collect()
        };
        again = false;
        for user in present {
            again |= user.look();
        }
    }
}

/// Takes all messages. Returns whether there was one from the kernel, or one was lost.
fn drain(netlink: &OwnedFd) -> bool {
    let mut told = false;
    let mut message = [0u8; 8192];
    loop {
        // What is longer than the buffer is cut off: nobody reads it.
        match recvfrom::<NetlinkAddr>(netlink.as_raw_fd(), &mut message) {
            // The kernel's own address is 0; any process may send, too.
            Ok((_, sender)) => told |= sender.is_some_and(|sender| sender.pid() == 0),
            Err(Errno::EINTR) => {}
            Err(Errno::ENOBUFS) => told = true,
            Err(_) => return told,
        }
    }
}
