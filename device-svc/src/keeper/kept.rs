//! What is settled of one VMM's conversation, so that it can be told to a service that was not there: the version, the memory that
//! is mapped, the events of interrupts, and the function's state. Commands settle something when the service has answered them, all at
//! once: before that they count as never heard.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::fstat;
use zerocopy::IntoBytes;

use crate::link::vfio_user::framing::{FLAG_ERROR, FLAG_KEEPER, FLAG_NO_REPLY, Header, Message, TYPE_COMMAND};
use crate::link::vfio_user::message::{DmaMap, DmaUnmap, IrqAction, IrqData, IrqSet, Request, command};

/// A message that can be sent again and again.
#[derive(Clone, Debug)]
pub(super) struct Said {
    pub(super) header: Header,
    pub(super) body: Vec<u8>,
    pub(super) fds: Vec<Arc<OwnedFd>>,
}

impl Said {
    /// One of a VMM's, without what only a keeper may say.
    /// `None`: with more files than one may have.
    pub(super) fn by_vmm(message: &mut Message, files: &mut Files) -> Option<Self> {
        let header = Header { flags: message.header.flags & !FLAG_KEEPER, ..message.header };
        let fds = message.fds.drain(..).map(|fd| files.one_of(fd)).collect::<Option<_>>()?;
        Some(Self { header, body: std::mem::take(&mut message.body), fds })
    }

    /// One that was settled, said again to a service that has not heard it; nothing of it goes back to the VMM.
    fn again(command: u16, body: Vec<u8>, fds: Vec<Arc<OwnedFd>>) -> Self {
        let flags = TYPE_COMMAND | FLAG_NO_REPLY | FLAG_KEEPER;
        Self { header: Header { id: 0, command, size: 0, flags, error: 0 }, body, fds }
    }

    pub(super) fn borrowed(&self) -> Vec<BorrowedFd<'_>> {
        self.fds.iter().map(|fd| fd.as_fd()).collect()
    }
}

/// Files of one VMM at most, give or take those that it has just let go of: every descriptor here is one less for the others.
const FILES_MAX: usize = 4096;

/// Which file a descriptor is of, and what may be done with it.
type FileIdentity = (u64, u64, i32);

/// Descriptors of files, one of each: a guest behind an IOMMU maps one file tens of thousands of times.
#[derive(Debug, Default)]
pub(super) struct Files {
    by_identity: HashMap<FileIdentity, Weak<OwnedFd>>,
    swept_at: usize,
}

impl Files {
    /// The descriptor by which the file of `fd` is known already, or else this one.
    fn one_of(&mut self, fd: OwnedFd) -> Option<Arc<OwnedFd>> {
        let Some(identity) = identity(&fd) else { return Some(Arc::new(fd)) };
        if let Some(known) = self.by_identity.get(&identity).and_then(Weak::upgrade) {
            return Some(known);
        }
        if self.by_identity.len() >= 2 * self.swept_at.max(16) {
            self.by_identity.retain(|_, file| file.strong_count() > 0);
            self.swept_at = self.by_identity.len();
        }
        if self.swept_at >= FILES_MAX {
            return None;
        }
        let file = Arc::new(fd);
        self.by_identity.insert(identity, Arc::downgrade(&file));
        Some(file)
    }
}

/// `None`: of no file that has an identity of its own; all eventfds share one inode.
fn identity(fd: &OwnedFd) -> Option<FileIdentity> {
    let stat = fstat(fd).ok()?;
    let is_file = stat.st_mode & libc::S_IFMT == libc::S_IFREG;
    let flags = OFlag::from_bits_truncate(fcntl(fd, FcntlArg::F_GETFL).ok()?) & OFlag::O_ACCMODE;
    is_file.then_some((stat.st_dev, stat.st_ino, flags.bits()))
}

/// A range of memory that is mapped.
#[derive(Debug)]
struct Mapped {
    map: DmaMap,
    file: Option<Arc<OwnedFd>>,
}

/// What is settled.
#[derive(Debug, Default)]
pub(super) struct Settled {
    version: Option<Vec<u8>>,
    ranges: BTreeMap<u64, Mapped>,
    /// The event of each interrupt, by kind and number.
    events: BTreeMap<(u32, u32), Arc<OwnedFd>>,
    state: Option<Vec<u8>>,
    /// What the function writes to without saying so: the record of requests in flight, what its driver commands.
    files: Vec<Arc<OwnedFd>>,
}

impl Settled {
    /// What the function has become by a command, whether or not that was refused.
    pub(super) fn set_state(&mut self, state: Vec<u8>) {
        self.state = Some(state);
    }

    /// The service has carried out a command.
    pub(super) fn settle(&mut self, said: &Said) {
        match Request::parse(said.header.command, &said.body) {
            Ok(Request::Version(..)) => self.version = Some(said.body.clone()),
            Ok(Request::DmaMap(map)) => {
                self.ranges.insert(map.address, Mapped { map, file: said.fds.first().cloned() });
            }
            Ok(Request::DmaUnmap(unmap)) => self.unmap(unmap),
            Ok(Request::SetIrqs(set, action, data)) => self.set_events(set, action, data, &said.fds),
            // What others change is in the state.
            _ => {}
        }
    }

    fn unmap(&mut self, unmap: DmaUnmap) {
        let end = u128::from(unmap.address) + u128::from(unmap.size);
        let inside = |mapped: &Mapped| u128::from(mapped.map.address) + u128::from(mapped.map.size) <= end;
        let gone: Vec<u64> = self
            .ranges
            .range(unmap.address..)
            .take_while(|(at, _)| u128::from(**at) < end)
            .filter(|(_, mapped)| inside(mapped))
            .map(|(at, _)| *at)
            .collect();
        for at in gone {
            self.ranges.remove(&at);
        }
    }

    fn set_events(&mut self, set: IrqSet, action: IrqAction, data: IrqData<'_>, fds: &[Arc<OwnedFd>]) {
        if data == IrqData::None && action == IrqAction::Trigger && set.count == 0 {
            self.events.retain(|(kind, _), _| *kind != set.index);
        } else if data == IrqData::Events {
            // The service has found the range good; ours may not be as long as the VMM says all the same.
            let end = set.start.saturating_add(set.count);
            self.events.retain(|(kind, number), _| *kind != set.index || !(set.start..end).contains(number));
            self.events
                .extend((set.start..end).zip(fds).map(|(number, event)| ((set.index, number), Arc::clone(event))));
        }
    }

    pub(super) fn set_files(&mut self, files: Vec<OwnedFd>) {
        self.files = files.into_iter().map(Arc::new).collect();
    }

    /// All of it, for a service that knows nothing of it.
    pub(super) fn say_again(&self) -> Vec<Said> {
        const EVENT_TRIGGERS: u32 = 1 << 2 | 1 << 5;
        let mut said = Vec::new();
        said.extend(self.version.iter().map(|version| Said::again(command::VERSION, version.clone(), Vec::new())));
        let ranges = self.ranges.values();
        said.extend(ranges.map(|Mapped { map, file }| {
            Said::again(command::DMA_MAP, map.as_bytes().to_vec(), file.iter().cloned().collect())
        }));
        said.extend(self.events.iter().map(|((index, start), event)| {
            let argsz = size_of::<IrqSet>() as u32;
            let set = IrqSet { argsz, flags: EVENT_TRIGGERS, index: *index, start: *start, count: 1 };
            Said::again(command::DEVICE_SET_IRQS, set.as_bytes().to_vec(), vec![Arc::clone(event)])
        }));
        // Last: queues start by it. Without a state the VMM has not said a thing yet.
        let state = self.state.clone().unwrap_or_default();
        said.push(Said::again(command::kept::RESTORE, state, self.files.clone()));
        said
    }
}

/// A command that the service has not answered yet.
#[derive(Debug)]
pub(super) struct Awaited {
    pub(super) said: Said,
    /// Services that were told, and are dead.
    pub(super) deaths: u32,
}

impl Awaited {
    pub(super) const fn new(said: Said) -> Self {
        Self { said, deaths: 0 }
    }
}

/// Questions to the VMM, by the number under which it knows them. `None`: the service that asked is gone.
#[derive(Debug, Default)]
pub(super) struct Questions {
    next: u16,
    asked: HashMap<u16, Option<u16>>,
}

impl Questions {
    /// A number for a question that the service calls `id`.
    pub(super) fn ask(&mut self, id: u16) -> Option<u16> {
        (0..=u16::MAX).find_map(|_| {
            let number = self.next;
            self.next = number.wrapping_add(1);
            (!self.asked.contains_key(&number)).then(|| {
                self.asked.insert(number, Some(id));
                number
            })
        })
    }

    /// What the service calls the question that is answered, if it still waits for that.
    pub(super) fn answered(&mut self, number: u16) -> Option<u16> {
        self.asked.remove(&number).flatten()
    }

    /// Whoever asked is gone; the answers come all the same.
    pub(super) fn forget(&mut self) {
        self.asked.values_mut().for_each(|id| *id = None);
    }
}

/// Whether a reply says that the command was carried out.
pub(super) const fn is_success(reply: Header) -> bool {
    reply.flags & FLAG_ERROR == 0
}

/// Bytes that commands take which wait for their answer; a descriptor counts as many as a message may have.
pub(super) fn weight(awaited: &VecDeque<Awaited>) -> usize {
    const DESCRIPTOR_BYTES: usize = 32 << 10;
    awaited.iter().map(|one| one.said.body.len() + one.said.fds.len() * DESCRIPTOR_BYTES).sum()
}
