//! One VMM's conversation, from connection to hang-up: requests in, replies out.
//!
//! Requests are handled in the order in which they come, and each is done when its reply leaves. What is refused is answered with an
//! error number; what is malformed too, and the stream goes on. A reply never waits for a storage server, because a VMM gives up on
//! one after a few seconds: queues stop, and memory goes, as soon as what touches the VM's memory has ended.

mod irqs;
mod regions;

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use zerocopy::{FromBytes, IntoBytes};

use self::irqs::IRQS;
use self::regions::{REGIONS, pages, space_of};
use super::VfioUserSettings;
use super::dma_table::DmaTable;
use super::framing::{FLAG_KEEPER, FLAG_NO_REPLY, FLAG_TYPE, FramingError, Header, Message, TYPE_COMMAND, TYPE_REPLY};
use super::function::ShownFunction;
use super::message::{
    Capabilities, DeviceInfo, DmaMap, DmaUnmap, RegionAccess, Request, SmallWrite, TRANSFER_BYTES_MAX, VersionBody,
    command::kept, version_text,
};
use super::wire::{Wire, answer_error};
use crate::address::Iova;
use crate::dma::{Access, Direction, DistantMemory, PAGE_BYTES, RANGES_MAX};
use crate::link::{FunctionSide, drain};
use crate::tether::KeptConnection;

/// The version that is spoken: 0.1.
const MAJOR: u16 = 0;
const MINOR: u16 = 1;

const DEVICE_RESET: u32 = 1;
const DEVICE_PCI: u32 = 1 << 1;

const UNMAP_DIRTY: u32 = 1 << 1;
const UNMAP_ALL: u32 = 1 << 2;

/// Descriptors that we say we take with one message: one for each of as many vectors. More are taken too.
const DESCRIPTORS_SAID: u32 = 16;

/// A reply, but for its header.
#[derive(Default)]
struct Reply {
    body: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl Reply {
    fn of(body: &[u8]) -> Self {
        Self { body: body.to_vec(), fds: Vec::new() }
    }
}

/// Why a request is answered with an error.
#[derive(Debug)]
struct Refusal {
    errno: Errno,
    why: String,
}

fn refusal<T>(errno: Errno, why: impl std::fmt::Display) -> Result<T, Refusal> {
    Err(Refusal { errno, why: why.to_string() })
}

struct Session {
    name: String,
    wire: Arc<Wire>,
    function: ShownFunction,
    side: Arc<dyn FunctionSide>,
    dma: DmaTable,
    /// The pages of the virtio BAR, if the VMM may map its notify registers.
    notify: Option<OwnedFd>,
    /// The function is what a service before has left, if one has.
    restored: bool,
    /// VERSION has been agreed upon.
    greeted: bool,
    /// Something was refused, and people were told: once for each VMM, which could otherwise fill a disk with our words.
    warned: bool,
}

/// Converses until the VMM hangs up or breaks the protocol, or the link is `stopping` and ends the connection. With a keeper between,
/// the conversation may have begun with a service before.
pub(super) fn run(
    stream: UnixStream,
    kept: Option<&KeptConnection>,
    settings: &VfioUserSettings,
    side: &Arc<dyn FunctionSide>,
    stopping: &AtomicBool,
) {
    let name = &settings.function;
    let mut session = match Session::new(stream, kept.is_some(), settings, side) {
        Ok(session) => session,
        Err(error) => {
            tracing::warn!(function = name, %error, "a VMM could not be served");
            return;
        }
    };
    tracing::info!(function = name, "a VMM is attached");
    let end = session.converse(kept);
    if let (Some(kept), FramingError::Kept(why)) = (kept, &end) {
        kept.restored(Err(format!("{name}: {why}")));
    }
    match end {
        _ if stopping.load(Ordering::Acquire) => {
            tracing::info!(function = name, "the link ends the connection");
            drain(side.as_ref(), 0..side.queue_count());
        }
        FramingError::Closed | FramingError::Truncated => tracing::info!(function = name, "the VMM is gone"),
        error if session.warned => {
            tracing::info!(function = name, %error, "the VMM broke the protocol; the connection ends");
        }
        error => tracing::warn!(function = name, %error, "the VMM broke the protocol; the connection ends"),
    }
    session.function.detach();
}

/// Answers the first request with "busy", and ends the conversation.
pub(super) fn refuse(stream: UnixStream) -> std::io::Result<()> {
    let (wire, mut message) = (Wire::new(stream, false)?, Message::default());
    if wire.receive(&mut message).is_ok() {
        // A peer that is gone already needs no answer.
        let _ = answer_error(&wire, message.header, Errno::EBUSY);
    }
    Ok(())
}

impl Session {
    fn new(
        stream: UnixStream,
        kept: bool,
        settings: &VfioUserSettings,
        side: &Arc<dyn FunctionSide>,
    ) -> std::io::Result<Self> {
        let wire = Arc::new(Wire::new(stream, kept)?);
        let notify = if settings.mapped { Some(pages()?) } else { None };
        let function = ShownFunction::new(settings, side)?;
        let dma = DmaTable::new(Arc::clone(&wire) as Arc<dyn DistantMemory>);
        side.set_memory(Arc::clone(dma.memory()));
        Ok(Self {
            name: settings.function.clone(),
            wire,
            function,
            side: Arc::clone(side),
            dma,
            notify,
            restored: false,
            greeted: false,
            warned: false,
        })
    }

    fn converse(&mut self, kept: Option<&KeptConnection>) -> FramingError {
        let mut message = Message::default();
        loop {
            let done = self.wire.receive(&mut message).and_then(|()| self.serve(&mut message));
            if let (Some(kept), true) = (kept, self.restored) {
                kept.restored(Ok(()));
            }
            if let Err(end) = done {
                return end;
            }
        }
    }

    fn serve(&mut self, message: &mut Message) -> Result<(), FramingError> {
        let header = message.header;
        if header.flags & FLAG_TYPE != TYPE_COMMAND {
            // A reply to nothing that was asked.
            self.warn(header.command, &"a reply that nobody waits for");
            return Ok(());
        }
        tracing::trace!(function = %self.name, ?header, body = ?&message.body[..message.body.len().min(64)], "a request");
        let fds = std::mem::take(&mut message.fds);
        let again = self.wire.is_kept() && header.flags & FLAG_KEEPER != 0;
        if again && header.command == kept::RESTORE {
            // Empty where the VMM has not said a thing yet.
            if !message.body.is_empty() {
                self.restore(&message.body, fds)?;
            }
            self.restored = true;
            return self.wire.done(None);
        }
        let result = match Request::parse(header.command, &message.body) {
            Ok(request) => self.handle(request, fds),
            Err(bad) => refusal(bad.errno(), bad),
        };
        if again {
            // It was good for the service before.
            result.map_err(|refusal| FramingError::Kept(refusal.why))?;
            return self.wire.done(None);
        }
        self.keep_state()?;
        let wanted = header.flags & FLAG_NO_REPLY == 0;
        match result {
            Ok(reply) if wanted => {
                let header = Header { flags: TYPE_REPLY, error: 0, ..header };
                let fds: Vec<BorrowedFd<'_>> = reply.fds.iter().map(AsFd::as_fd).collect();
                self.wire.send(header, &[&reply.body], &fds)
            }
            Ok(_) => self.wire.done(None),
            Err(refusal) => {
                self.warn(header.command, &refusal.why);
                if wanted {
                    answer_error(&self.wire, header, refusal.errno)
                } else {
                    self.wire.done(Some(refusal.errno))
                }
            }
        }
    }

    /// Has the keeper keep what the function has become, before the reply tells the VMM.
    fn keep_state(&mut self) -> Result<(), FramingError> {
        if !self.wire.is_kept() || !self.function.take_changed() {
            return Ok(());
        }
        let kept = |error: &dyn std::fmt::Display| FramingError::Kept(error.to_string());
        let fresh = self.function.make_files().map_err(|error| kept(&error))?;
        let state = serde_json::to_vec(&self.function.save()).map_err(|error| kept(&error))?;
        let fds: Vec<BorrowedFd<'_>> = fresh.iter().map(AsFd::as_fd).collect();
        self.wire.keep_state(&state, &fds)
    }

    /// The function goes on as a service before has left it.
    fn restore(&mut self, state: &[u8], fds: Vec<OwnedFd>) -> Result<(), FramingError> {
        let kept = |error: &dyn std::fmt::Display| FramingError::Kept(error.to_string());
        let saved = serde_json::from_slice(state).map_err(|error| kept(&error))?;
        let files = fds.into_iter().map(File::from);
        self.function.restore(&saved, files).map_err(|why| kept(&why))?;
        self.come_back();
        tracing::info!(function = %self.name, "the function goes on where a service before has left it");
        Ok(())
    }

    fn warn(&mut self, command: u16, why: &dyn std::fmt::Display) {
        if std::mem::replace(&mut self.warned, true) {
            tracing::debug!(function = %self.name, command, %why, "refused");
        } else {
            tracing::warn!(function = %self.name, command, %why, "refused; what is refused after it is not reported");
        }
    }

    fn handle(&mut self, request: Request<'_>, fds: Vec<OwnedFd>) -> Result<Reply, Refusal> {
        if let Request::Version(version, capabilities) = request {
            return self.greet(version, &capabilities);
        }
        if !self.greeted {
            return refusal(Errno::EINVAL, "the first message must be the version");
        }
        match request {
            Request::Version(..) => unreachable!("answered above"),
            Request::DmaMap(map) => self.map(map, &fds),
            Request::DmaUnmap(unmap) => self.unmap(unmap),
            Request::DeviceInfo(info) => {
                let needed = size_of::<DeviceInfo>() as u32;
                check_room(info.argsz, needed)?;
                let flags = DEVICE_RESET | DEVICE_PCI;
                Ok(Reply::of(DeviceInfo { argsz: needed, flags, regions: REGIONS, irqs: IRQS }.as_bytes()))
            }
            Request::RegionInfo(info) => self.region_info(info),
            Request::IrqInfo(info) => self.irq_info(info),
            Request::SetIrqs(set, action, data) => self.set_irqs(set, action, data, fds),
            Request::RegionRead(access) => {
                let mut reply = access.as_bytes().to_vec();
                reply.resize(reply.len() + access.count as usize, 0);
                let space = space_of(access.region)?;
                let data = &mut reply[size_of::<RegionAccess>()..];
                match self.function.read(space, access.offset, data) {
                    Ok(()) => Ok(Reply { body: reply, fds: Vec::new() }),
                    Err(bad) => refusal(Errno::EINVAL, bad),
                }
            }
            Request::RegionWrite(access, data) => {
                self.write(access.region, access.offset, data)?;
                Ok(Reply::of(access.as_bytes()))
            }
            Request::RegionWriteMulti(writes) => {
                for bytes in writes {
                    let Ok(write) = SmallWrite::read_from_bytes(bytes) else { continue };
                    match write.data.get(..write.count as usize) {
                        Some(data) => self.write(write.region, write.offset, data)?,
                        None => return refusal(Errno::EINVAL, "a small write of more than 8 bytes"),
                    }
                }
                Ok(Reply::of(&(writes.len() as u64).to_ne_bytes()))
            }
            Request::DeviceReset => {
                self.function.reset();
                Ok(Reply::default())
            }
            // Migration is the only feature that the protocol has, and this function cannot be migrated.
            Request::DeviceFeature(_) => refusal(Errno::ENOTTY, "there is no such device feature"),
        }
    }

    fn greet(&mut self, version: VersionBody, capabilities: &Capabilities) -> Result<Reply, Refusal> {
        if self.greeted {
            return refusal(Errno::EINVAL, "a second version");
        }
        if version.major != MAJOR {
            return refusal(
                Errno::ENOTSUP,
                format!("version {}.{}; {MAJOR}.{MINOR} is spoken here", version.major, version.minor),
            );
        }
        self.greeted = true;
        self.wire.set_transfer_bytes_max(capabilities.max_data_xfer_size.unwrap_or(TRANSFER_BYTES_MAX));
        tracing::debug!(function = %self.name, ?version, ?capabilities, "a VMM has said what it can do");
        let reply = VersionBody { major: MAJOR, minor: version.minor.min(MINOR) };
        let ours = Capabilities {
            max_msg_fds: Some(DESCRIPTORS_SAID),
            max_data_xfer_size: Some(TRANSFER_BYTES_MAX),
            max_dma_maps: Some(RANGES_MAX as u32),
            pgsizes: Some(PAGE_BYTES),
            write_multiple: capabilities.write_multiple,
            twin_socket: None,
        };
        Ok(Reply::of(&[reply.as_bytes(), &version_text(&ours)].concat()))
    }

    fn map(&mut self, map: DmaMap, fds: &[OwnedFd]) -> Result<Reply, Refusal> {
        if fds.len() > 1 {
            return refusal(Errno::EINVAL, format!("{} descriptors for one range", fds.len()));
        }
        let access = Access::from_bits(map.flags as usize);
        match self.dma.map(Iova(map.address), map.size, access, map.offset, fds.first()) {
            Ok(()) => {
                self.come_back();
                Ok(Reply::default())
            }
            Err(why) => refusal(why.errno(), why),
        }
    }

    fn unmap(&mut self, unmap: DmaUnmap) -> Result<Reply, Refusal> {
        if unmap.flags & UNMAP_DIRTY != 0 {
            return refusal(Errno::ENOTSUP, "dirty pages are not tracked");
        }
        if unmap.flags & UNMAP_ALL != 0 {
            return refusal(Errno::ENOTSUP, "ranges are taken away one by one");
        }
        let start = Iova(unmap.address);
        self.function.leave(start, unmap.size);
        match self.dma.unmap(start, unmap.size) {
            Ok(removed) => {
                // Returns when nothing touches what is gone.
                self.side.release_memory(removed);
                Ok(Reply::of(unmap.as_bytes()))
            }
            Err(why) => {
                self.come_back();
                refusal(why.errno(), why)
            }
        }
    }

    /// Queues whose memory is there go on.
    fn come_back(&mut self) {
        let memory = self.dma.memory();
        self.function.come_back(|start, length| memory.reaches(start, length, Direction::FromHost));
    }

    fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), Refusal> {
        let space = space_of(region)?;
        match self.function.write(space, offset, data) {
            Ok(false) => Ok(()),
            Ok(true) => {
                self.come_back();
                Ok(())
            }
            Err(bad) => refusal(Errno::EINVAL, bad),
        }
    }
}

/// The sender must have room for at least the structure itself.
fn check_room(argsz: u32, needed: u32) -> Result<(), Refusal> {
    if argsz < needed {
        return refusal(Errno::EINVAL, format!("room for {argsz} bytes; the reply has {needed}"));
    }
    Ok(())
}
