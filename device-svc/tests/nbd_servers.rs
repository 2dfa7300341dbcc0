//! The NBD backend against servers that others wrote: qemu-nbd and nbdkit, taken from `$DRAY_RIG/bin` or the path. Where
//! one is missing its tests say so and do nothing; with `DRAY_RIG` set they fail instead.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(unsafe_code, reason = "lends memory to a channel")]

use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use device_svc::address::CardAddress;
use device_svc::backend::nbd::{NbdBackend, NbdSettings};
use device_svc::backend::{
    BlockBackend, BlockChannel, BlockFault, BlockOperation, BlockRequest, Completion, Segments, Tag,
};
use device_svc::clock::Moment;
use device_svc::dma::CardMemory;
use nix::poll::{PollFd, PollFlags, PollTimeout};

const BOUND: Duration = Duration::from_secs(60);
const SLOTS: usize = 16;
const SLOT_BYTES: usize = 1 << 20;

fn tool(name: &str) -> Option<PathBuf> {
    let rig = std::env::var_os("DRAY_RIG").map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders = rig.iter().map(|rig| rig.join("bin")).chain(std::env::split_paths(&path));
    let found = folders.map(|folder| folder.join(name)).find(|file| file.is_file());
    if found.is_none() {
        assert!(rig.is_none(), "{name} is neither in $DRAY_RIG/bin nor in the path");
        eprintln!("SKIPPED: {name} is not in the path");
    }
    found
}

struct Server {
    command: Box<dyn Fn() -> Command>,
    socket: PathBuf,
    child: Child,
}

impl Server {
    fn start(socket: &Path, command: impl Fn() -> Command + 'static) -> Self {
        let child = spawn(&command, socket);
        Self { command: Box::new(command), socket: socket.to_owned(), child }
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn restart(&mut self) {
        self.child = spawn(&self.command, &self.socket);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn spawn(command: &dyn Fn() -> Command, socket: &Path) -> Child {
    drop(std::fs::remove_file(socket));
    let mut child = command().stdin(Stdio::null()).spawn().unwrap();
    let start = Instant::now();
    // Only a bound socket can be connected to; the server shrugs at a client that says nothing.
    while UnixStream::connect(socket).is_err() {
        assert!(child.try_wait().unwrap().is_none(), "the server ended");
        assert!(start.elapsed() < BOUND, "the server does not listen");
        std::thread::yield_now();
    }
    child
}

fn qemu_nbd(program: &Path, socket: &Path, image: &Path) -> Command {
    let mut command = Command::new(program);
    command.args(["--persistent", "--shared=8", "--format=raw", "--discard=unmap", "--export-name=disk"]);
    command.arg("--socket").arg(socket).arg(image);
    command
}

fn nbdkit(program: &Path, socket: &Path, filters: &[&str], rest: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(["--foreground", "--exit-with-parent", "--unix"]).arg(socket);
    command.args(filters.iter().map(|filter| format!("--filter={filter}"))).args(rest);
    command
}

/// Sixteen requests at a time, tried again when the server is away.
struct Lane {
    channel: Box<dyn BlockChannel>,
    memory: CardMemory,
    lists: Box<[[libc::iovec; 2]]>,
    under_way: [Option<BlockRequest>; SLOTS],
    results: [Option<Result<(), BlockFault>>; SLOTS],
    held: Vec<BlockRequest>,
    completions: Vec<Completion>,
    away: usize,
}

impl Lane {
    fn new(backend: &NbdBackend) -> Self {
        let empty = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        Self {
            channel: backend.open_channel().unwrap(),
            memory: CardMemory::new((SLOTS * SLOT_BYTES) as u32).unwrap(),
            lists: vec![[empty; 2]; SLOTS].into_boxed_slice(),
            under_way: [None; SLOTS],
            results: [None; SLOTS],
            held: Vec::new(),
            completions: Vec::new(),
            away: 0,
        }
    }

    fn start(&mut self, slot: usize, operation: BlockOperation, offset: u64, length: usize) {
        let at = CardAddress((slot * SLOT_BYTES) as u32);
        let cut = length / 3;
        self.lists[slot] = [
            libc::iovec { iov_base: self.memory.pointer(at, cut).cast(), iov_len: cut },
            libc::iovec {
                iov_base: self.memory.pointer(at.add(cut as u32), length - cut).cast(),
                iov_len: length - cut,
            },
        ];
        let segments = match operation {
            // SAFETY: list and memory stay where they are until the slot is used again, after its completion.
            BlockOperation::Read | BlockOperation::Write => unsafe { Segments::new(self.lists[slot].as_ptr(), 2) },
            _ => Segments::NONE,
        };
        let tag = Tag { lane: 0, row: slot as u32 };
        self.results[slot] = None;
        self.held.push(BlockRequest { tag, operation, offset, length: length as u64, segments });
    }

    fn turn(&mut self) {
        for request in std::mem::take(&mut self.held) {
            match self.channel.submit(request) {
                Ok(()) => self.under_way[request.tag.row as usize] = Some(request),
                Err(request) => self.held.push(request),
            }
        }
        self.channel.poll(Moment::now(), &mut self.completions);
        for completion in self.completions.drain(..) {
            let slot = completion.tag.row as usize;
            let request = self.under_way[slot].take().unwrap();
            if completion.result == Err(BlockFault::Away) {
                self.away += 1;
                self.held.push(request);
            } else {
                self.results[slot] = Some(completion.result);
            }
        }
    }

    fn finish(&mut self) {
        let start = Instant::now();
        loop {
            self.turn();
            if self.held.is_empty() && self.channel.in_flight() == 0 {
                return;
            }
            assert!(start.elapsed() < BOUND, "{} in flight, {} held", self.channel.in_flight(), self.held.len());
            if self.held.is_empty() {
                let fd = self.channel.wake_fd().unwrap();
                // SAFETY: the channel keeps its descriptor open for its life.
                let fd = unsafe { BorrowedFd::borrow_raw(fd) };
                nix::poll::poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], PollTimeout::from(1000u16)).unwrap();
            }
        }
    }

    fn run(&mut self, operation: BlockOperation, offset: u64, length: usize) {
        self.start(0, operation, offset, length);
        self.finish();
        assert_eq!(self.results[0], Some(Ok(())), "{operation:?} at {offset}");
    }

    fn put(&self, slot: usize, data: &[u8]) {
        self.memory.copy_in(CardAddress((slot * SLOT_BYTES) as u32), data);
    }

    fn get(&self, slot: usize, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.memory.copy_out(CardAddress((slot * SLOT_BYTES) as u32), &mut data);
        data
    }
}

fn pattern(seed: u64, length: usize) -> Vec<u8> {
    (0..length as u64).map(|at| (at.wrapping_mul(2_654_435_761).wrapping_add(seed * 977) >> 5) as u8).collect()
}

/// Writes, reads back, zeroes, trims, flushes; `between` is called with rounds of writes under way.
fn exercise(uri: &str, connections: usize, mut between: impl FnMut(usize)) -> usize {
    let settings = NbdSettings { connections, ..NbdSettings::new(uri.parse().unwrap()) };
    let backend = NbdBackend::open(settings).unwrap();
    let info = backend.info();
    assert_eq!(info.size_bytes, 64 << 20);
    let mut lane = Lane::new(&backend);
    let mut model = vec![0u8; 64 << 20];
    for round in 0..20 {
        for slot in 0..SLOTS {
            let length = [512, 4096, 65_536, 200_704, SLOT_BYTES][(round + slot) % 5];
            let offset = (slot << 22) + (round * 7919 % 2048) * 512;
            let data = pattern((round * SLOTS + slot) as u64, length);
            lane.put(slot, &data);
            lane.start(slot, BlockOperation::Write, offset as u64, length);
            model[offset..offset + length].copy_from_slice(&data);
        }
        lane.turn();
        between(round);
        lane.finish();
        assert!(lane.results.iter().all(|result| *result == Some(Ok(()))), "{:?}", lane.results);
        if round % 7 == 6 {
            lane.run(BlockOperation::Flush, 0, 0);
        }
    }
    if info.write_zeroes {
        for (unmap, offset) in [(false, 4096), (true, 1 << 22)] {
            lane.run(BlockOperation::WriteZeroes { unmap }, offset, 1 << 20);
            model[offset as usize..][..1 << 20].fill(0);
        }
    }
    for (number, expected) in model.chunks(SLOT_BYTES).enumerate() {
        lane.run(BlockOperation::Read, (number * SLOT_BYTES) as u64, SLOT_BYTES);
        assert!(lane.get(0, SLOT_BYTES) == expected, "MiB {number} differs");
    }
    if info.discard {
        lane.run(BlockOperation::Discard, 0, 1 << 20);
    }
    lane.run(BlockOperation::Flush, 0, 0);
    lane.away
}

fn image(folder: &tempfile::TempDir) -> PathBuf {
    let image = folder.path().join("image");
    std::fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
    image
}

#[test]
fn qemu_nbd_on_one_and_on_several_connections() {
    let Some(program) = tool("qemu-nbd") else { return };
    for connections in [1, 4] {
        let folder = tempfile::tempdir().unwrap();
        let (image, socket) = (image(&folder), folder.path().join("socket"));
        let (at, program) = (socket.clone(), program.clone());
        let _server = Server::start(&socket, move || qemu_nbd(&program, &at, &image));
        let uri = format!("nbd+unix:///disk?socket={}", socket.display());
        assert_eq!(exercise(&uri, connections, |_| {}), 0);
    }
}

#[test]
fn qemu_nbd_over_tcp() {
    let Some(program) = tool("qemu-nbd") else { return };
    let folder = tempfile::tempdir().unwrap();
    let (image, socket) = (image(&folder), folder.path().join("socket"));
    let at = socket.clone();
    let _server = Server::start(&socket, move || qemu_nbd(&program, &at, &image));
    // The server's own TCP port would have to be guessed free; this one is the kernel's choice.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let uri = format!("nbd://localhost:{}/disk", listener.local_addr().unwrap().port());
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (client, server) = (client.unwrap(), UnixStream::connect(&socket).unwrap());
            let (mut from_client, mut to_server) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            let (mut from_server, mut to_client) = (server, client);
            std::thread::spawn(move || std::io::copy(&mut from_client, &mut to_server));
            std::thread::spawn(move || std::io::copy(&mut from_server, &mut to_client));
        }
    });
    assert_eq!(exercise(&uri, 2, |_| {}), 0);
}

#[test]
fn qemu_nbd_killed_and_restarted_under_load() {
    let Some(program) = tool("qemu-nbd") else { return };
    let folder = tempfile::tempdir().unwrap();
    let (image, socket) = (image(&folder), folder.path().join("socket"));
    let at = socket.clone();
    let mut server = Server::start(&socket, move || qemu_nbd(&program, &at, &image));
    let uri = format!("nbd+unix:///disk?socket={}", socket.display());
    let mut killed = 0;
    exercise(&uri, 2, |round| {
        if round % 4 == 1 {
            server.kill();
            server.restart();
            killed += 1;
        }
    });
    assert_eq!(killed, 5);
}

#[test]
fn nbdkit_plain_delayed_limited_and_with_parts_missing() {
    let Some(program) = tool("nbdkit") else { return };
    let ways: [(&[&str], &[&str]); 5] = [
        (&[], &["memory", "64M"]),
        (&["delay"], &["memory", "64M", "delay-read=2ms", "delay-write=1ms"]),
        (
            &["blocksize-policy"],
            &[
                "memory",
                "64M",
                "blocksize-minimum=512",
                "blocksize-preferred=4096",
                "blocksize-maximum=65536",
                "blocksize-error-policy=error",
            ],
        ),
        (&["fua"], &["memory", "64M", "fuamode=emulate"]),
        (&["nozero"], &["memory", "64M", "zeromode=none"]),
    ];
    for (filters, rest) in ways {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("socket");
        let (at, program) = (socket.clone(), program.clone());
        let _server = Server::start(&socket, move || nbdkit(&program, &at, filters, rest));
        let uri = format!("nbd+unix:///disk?socket={}", socket.display());
        exercise(&uri, 4, |_| {});
    }
}

#[test]
fn nbdkit_that_fails_one_request_in_ten_is_tried_until_it_does_not() {
    let Some(program) = tool("nbdkit") else { return };
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let at = socket.clone();
    let rest = ["memory", "64M", "error=EIO", "error-pread-rate=10%", "error-pwrite-rate=10%"];
    let _server = Server::start(&socket, move || nbdkit(&program, &at, &["error"], &rest));
    let uri = format!("nbd+unix:///disk?socket={}", socket.display());
    assert!(exercise(&uri, 2, |_| {}) > 0);
}
