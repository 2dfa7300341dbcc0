//! The program that takes frames off an interface before the card's stack sees them, and hands each to the socket of its queue.
//!
//! It is six instructions, made here: `bpf_redirect_map(&sockets, queue, XDP_PASS)`. The map has a socket for each queue; where
//! it has none, because no VM is there, the frame goes on to the stack as if there were no program.
#![expect(unsafe_code, reason = "bpf(2), which has no wrapper")]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use zerocopy::{Immutable, IntoBytes};

/// Commands, types and flags of `linux/bpf.h`.
const MAP_CREATE: libc::c_long = 0;
const MAP_UPDATE_ELEM: libc::c_long = 2;
const MAP_DELETE_ELEM: libc::c_long = 3;
const PROG_LOAD: libc::c_long = 5;
const LINK_CREATE: libc::c_long = 28;
const MAP_TYPE_XSKMAP: u32 = 17;
const PROG_TYPE_XDP: u32 = 6;
const ATTACH_XDP: u32 = 37;
const XDP_FLAGS_SKB_MODE: u32 = 1 << 1;
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;
const XDP_PASS: i32 = 2;
const FUNCTION_REDIRECT_MAP: i32 = 51;
/// Where `struct xdp_md` has the number of the queue.
const QUEUE_AT: i16 = 16;
/// How often a command is given that the kernel breaks off because the thread has something else to do (a signal, work of an io_uring).
const TRIES_MAX: u32 = 10;
const LICENSE: &std::ffi::CStr = c"Apache-2.0";

/// `struct bpf_insn`.
#[derive(Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

const fn instruction(code: u8, to: u8, from: u8, offset: i16, immediate: i32) -> Instruction {
    // Two fields of four bits: which one comes first is the machine's order.
    let registers = if cfg!(target_endian = "big") { to << 4 | from } else { from << 4 | to };
    Instruction { code, registers, offset, immediate }
}

const fn program(map: RawFd) -> [Instruction; 6] {
    const LOAD_WORD: u8 = 0x61;
    const LOAD_LONG: u8 = 0x18;
    const MAP_FD: u8 = 1;
    const MOVE: u8 = 0xb7;
    const CALL: u8 = 0x85;
    const EXIT: u8 = 0x95;
    [
        // r2 = context.queue
        instruction(LOAD_WORD, 2, 1, QUEUE_AT, 0),
        // r1 = map, in two parts
        instruction(LOAD_LONG, 1, MAP_FD, 0, map),
        instruction(0, 0, 0, 0, 0),
        // r3 = what to do where the map has none
        instruction(MOVE, 3, 0, 0, XDP_PASS),
        instruction(CALL, 0, 0, 0, FUNCTION_REDIRECT_MAP),
        instruction(EXIT, 0, 0, 0, 0),
    ]
}

/// The program and its map, for any interface.
#[derive(Debug)]
pub(super) struct Program {
    program: OwnedFd,
    map: OwnedFd,
}

/// How a program is on an interface.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Mode {
    /// The driver runs it.
    Driver,
    /// The kernel runs it before its stack, because the driver cannot.
    Generic,
}

/// A program on an interface; it falls off with this.
#[derive(Debug)]
pub(super) struct Attached {
    _link: OwnedFd,
    pub(super) mode: Mode,
}

impl Program {
    /// Loads it, with a map for so many queues, all empty.
    pub(super) fn load(queues: u32) -> Result<Self, Errno> {
        #[derive(IntoBytes, Immutable)]
        #[repr(C)]
        struct MapCreate {
            kind: u32,
            key_bytes: u32,
            value_bytes: u32,
            entries: u32,
        }
        #[derive(IntoBytes, Immutable)]
        #[repr(C)]
        struct ProgLoad {
            kind: u32,
            count: u32,
            instructions: u64,
            license: u64,
        }
        let create = MapCreate { kind: MAP_TYPE_XSKMAP, key_bytes: 4, value_bytes: 4, entries: queues };
        // SAFETY: the attributes lead nowhere.
        let map = unsafe { bpf_descriptor(MAP_CREATE, &create) }?;
        let instructions = program(map.as_raw_fd());
        let load = ProgLoad {
            kind: PROG_TYPE_XDP,
            count: instructions.len() as u32,
            instructions: instructions.as_ptr().addr() as u64,
            license: LICENSE.as_ptr().addr() as u64,
        };
        // SAFETY: the instructions are as many as said, and the license ends with a NUL.
        let program = unsafe { bpf_descriptor(PROG_LOAD, &load) }?;
        Ok(Self { program, map })
    }

    /// Puts it on an interface; in its namespace. In the driver if that can, else before the stack.
    pub(super) fn attach(&self, index: i32) -> Result<Attached, Errno> {
        #[derive(IntoBytes, Immutable)]
        #[repr(C)]
        struct LinkCreate {
            program: u32,
            index: u32,
            kind: u32,
            flags: u32,
        }
        let attach = |mode, flags| {
            let program = self.program.as_raw_fd() as u32;
            let create = LinkCreate { program, index: index as u32, kind: ATTACH_XDP, flags };
            // SAFETY: the attributes lead nowhere.
            unsafe { bpf_descriptor(LINK_CREATE, &create) }.map(|link| Attached { _link: link, mode })
        };
        match attach(Mode::Driver, XDP_FLAGS_DRV_MODE) {
            // In the other way it would be no better.
            Err(errno @ (Errno::EPERM | Errno::EACCES | Errno::EBUSY | Errno::EEXIST | Errno::ENODEV)) => Err(errno),
            Err(_) => attach(Mode::Generic, XDP_FLAGS_SKB_MODE),
            attached => attached,
        }
    }

    /// From now on frames of this queue go to a socket, or to the stack. A socket that is closed is taken out by the kernel.
    pub(super) fn set(&self, queue: u32, socket: Option<RawFd>) -> Result<(), Errno> {
        #[derive(IntoBytes, Immutable)]
        #[repr(C)]
        struct Element {
            map: u32,
            padding: u32,
            key: u64,
            value: u64,
            flags: u64,
        }
        let element = Element {
            map: self.map.as_raw_fd() as u32,
            padding: 0,
            key: (&raw const queue).addr() as u64,
            // What a command has no use for must be 0.
            value: socket.as_ref().map_or(0, |socket| std::ptr::from_ref(socket).addr() as u64),
            flags: 0,
        };
        let command = if socket.is_some() { MAP_UPDATE_ELEM } else { MAP_DELETE_ELEM };
        // SAFETY: key and value are words, as the map was made for, and are only read.
        match unsafe { bpf(command, &element) } {
            Err(Errno::ENOENT) if socket.is_none() => Ok(()),
            result => result.map(|_| ()),
        }
    }
}

/// # Safety
/// What the attributes lead to must be as long as they say.
unsafe fn bpf<T: IntoBytes + Immutable>(command: libc::c_long, attributes: &T) -> Result<libc::c_long, Errno> {
    let mut tries_left = TRIES_MAX;
    loop {
        tries_left -= 1;
        // SAFETY: the attributes are as long as said; no command used here writes to what they lead to.
        let done = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_ref(attributes), size_of::<T>()) };
        match Errno::result(done) {
            Err(Errno::EAGAIN) if tries_left > 0 => {}
            result => return result,
        }
    }
}

/// # Safety
/// As for `bpf`; the command makes a descriptor.
unsafe fn bpf_descriptor<T: IntoBytes + Immutable>(command: libc::c_long, attributes: &T) -> Result<OwnedFd, Errno> {
    // SAFETY: the caller's promise; the descriptor is new (and closes on exec), so nobody else has it.
    unsafe { bpf(command, attributes).map(|fd| OwnedFd::from_raw_fd(fd as RawFd)) }
}
