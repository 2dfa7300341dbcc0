//! An NBD server in a thread that can be told to misbehave. Its disk has a volatile cache: a power loss drops what was
//! not flushed.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use crate::backend::nbd::wire;

/// What the server claims and how it talks.
#[derive(Clone)]
pub(super) struct Manner {
    pub(super) flags: u16,
    pub(super) fixed: bool,
    pub(super) go: bool,
    pub(super) structured: bool,
    pub(super) block_sizes: Option<[u32; 3]>,
    pub(super) size: u64,
    pub(super) tls: Option<Arc<rustls::ServerConfig>>,
}

pub(super) const ALL_FLAGS: u16 = 1
    | wire::FLAG_SEND_FLUSH
    | wire::FLAG_SEND_FUA
    | wire::FLAG_SEND_TRIM
    | wire::FLAG_SEND_WRITE_ZEROES
    | wire::FLAG_CAN_MULTI_CONN;

impl Default for Manner {
    fn default() -> Self {
        Self { flags: ALL_FLAGS, fixed: true, go: true, structured: true, block_sizes: None, size: 1 << 20, tls: None }
    }
}

/// A request as the server sees it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    pub(super) flags: u16,
    pub(super) command: u16,
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) length: u32,
}

/// What to do with a request.
pub(super) enum Act {
    /// What it asks for.
    Serve,
    /// A read in chunks of 512 bytes, last first, holes where there are zeroes.
    Scatter,
    Error(u32),
    /// The power fails before it is done.
    PowerLossBefore,
    /// The power fails after it is done, and before the reply.
    PowerLossAfter,
    /// These bytes instead of a reply.
    Raw(Vec<u8>),
    /// These bytes, then the end.
    RawAndHangUp(Vec<u8>),
}

type Script = Box<dyn FnMut(Seen) -> Act + Send>;

struct Disk {
    durable: Vec<u8>,
    cache: Vec<u8>,
    /// Counts power losses: what an earlier life has accepted does nothing any more.
    life: u64,
    manner: Manner,
    script: Script,
    sockets: Vec<UnixStream>,
    seen: Vec<Seen>,
    connections: usize,
}

pub(super) struct Fake {
    disk: Arc<Mutex<Disk>>,
    closing: Arc<AtomicBool>,
    path: PathBuf,
    _folder: tempfile::TempDir,
}

impl Fake {
    pub(super) fn new(manner: Manner) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("nbd");
        let listener = UnixListener::bind(&path).unwrap();
        let disk = Arc::new(Mutex::new(Disk {
            durable: vec![0; manner.size as usize],
            cache: vec![0; manner.size as usize],
            life: 0,
            manner,
            script: Box::new(|_| Act::Serve),
            sockets: Vec::new(),
            seen: Vec::new(),
            connections: 0,
        }));
        let closing = Arc::new(AtomicBool::new(false));
        let (theirs, stop) = (Arc::clone(&disk), Arc::clone(&closing));
        std::thread::spawn(move || {
            for socket in listener.incoming() {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                let socket = socket.unwrap();
                let (life, manner) = {
                    let mut disk = theirs.lock().unwrap();
                    disk.connections += 1;
                    disk.sockets.push(socket.try_clone().unwrap());
                    (disk.life, disk.manner.clone())
                };
                let disk = Arc::clone(&theirs);
                let end = socket.try_clone().unwrap();
                std::thread::spawn(move || {
                    // However it ends, it is the end of a connection, of which `sockets` holds a duplicate.
                    drop(serve(&disk, socket, life, &manner));
                    drop(end.shutdown(std::net::Shutdown::Both));
                });
            }
        });
        Self { disk, closing, path, _folder: folder }
    }

    pub(super) fn uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.path.display())
    }

    pub(super) fn script(&self, script: impl FnMut(Seen) -> Act + Send + 'static) {
        self.disk.lock().unwrap().script = Box::new(script);
    }

    pub(super) fn change(&self, change: impl FnOnce(&mut Manner)) {
        change(&mut self.disk.lock().unwrap().manner);
    }

    pub(super) fn lose_power(&self) {
        lose_power(&mut self.disk.lock().unwrap());
    }

    pub(super) fn seen(&self) -> Vec<Seen> {
        self.disk.lock().unwrap().seen.clone()
    }

    pub(super) fn connections(&self) -> usize {
        self.disk.lock().unwrap().connections
    }

    pub(super) fn durable(&self) -> Vec<u8> {
        self.disk.lock().unwrap().durable.clone()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.closing.store(true, Ordering::Relaxed);
        drop(UnixStream::connect(&self.path));
        self.lose_power();
    }
}

fn lose_power(disk: &mut Disk) {
    disk.life += 1;
    disk.cache = disk.durable.clone();
    for socket in disk.sockets.drain(..) {
        drop(socket.shutdown(std::net::Shutdown::Both));
    }
}

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

fn take<const N: usize>(stream: &mut dyn Stream) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn option_reply(stream: &mut dyn Stream, option: u32, kind: u32, body: &[u8]) -> io::Result<()> {
    let mut bytes = wire::OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
    for word in [option, kind, body.len() as u32] {
        bytes.extend_from_slice(&word.to_be_bytes());
    }
    bytes.extend_from_slice(body);
    stream.write_all(&bytes)
}

fn serve(disk: &Mutex<Disk>, mut socket: UnixStream, life: u64, manner: &Manner) -> io::Result<()> {
    socket.write_all(&wire::INIT_MAGIC.to_be_bytes())?;
    socket.write_all(&wire::OPTION_MAGIC.to_be_bytes())?;
    let flags = if manner.fixed { wire::HANDSHAKE_FIXED_NEWSTYLE | wire::HANDSHAKE_NO_ZEROES } else { 0 };
    socket.write_all(&flags.to_be_bytes())?;
    take::<4>(&mut socket)?;
    if let Some(config) = &manner.tls {
        let [.., a, b, c, d] = take::<16>(&mut socket)?;
        assert_eq!(u32::from_be_bytes([a, b, c, d]), 0);
        option_reply(&mut socket, wire::OPTION_STARTTLS, wire::REPLY_ACK, &[])?;
        let session = rustls::ServerConnection::new(Arc::clone(config)).map_err(io::Error::other)?;
        let mut stream = rustls::StreamOwned::new(session, socket);
        return options(disk, &mut stream, life, manner);
    }
    options(disk, &mut socket, life, manner)
}

fn options(disk: &Mutex<Disk>, stream: &mut dyn Stream, life: u64, manner: &Manner) -> io::Result<()> {
    let mut structured = false;
    loop {
        take::<8>(stream)?;
        let option = u32::from_be_bytes(take(stream)?);
        let length = u32::from_be_bytes(take(stream)?);
        let mut data = vec![0; length as usize];
        stream.read_exact(&mut data)?;
        match option {
            wire::OPTION_STRUCTURED_REPLY if manner.structured => {
                structured = true;
                option_reply(stream, option, wire::REPLY_ACK, &[])?;
            }
            wire::OPTION_GO if manner.go => {
                if !data[4..].starts_with(b"disk") {
                    option_reply(stream, option, wire::REPLY_ERROR_UNKNOWN, b"no such disk")?;
                    continue;
                }
                let mut info = wire::INFO_EXPORT.to_be_bytes().to_vec();
                info.extend_from_slice(&manner.size.to_be_bytes());
                info.extend_from_slice(&manner.flags.to_be_bytes());
                option_reply(stream, option, wire::REPLY_INFO, &info)?;
                if let Some(sizes) = manner.block_sizes {
                    let mut info = wire::INFO_BLOCK_SIZE.to_be_bytes().to_vec();
                    sizes.iter().for_each(|size| info.extend_from_slice(&size.to_be_bytes()));
                    option_reply(stream, option, wire::REPLY_INFO, &info)?;
                }
                option_reply(stream, option, wire::REPLY_ACK, &[])?;
                return transmission(disk, stream, life, structured);
            }
            wire::OPTION_EXPORT_NAME => {
                if data != b"disk" {
                    return Ok(());
                }
                let mut bytes = manner.size.to_be_bytes().to_vec();
                bytes.extend_from_slice(&manner.flags.to_be_bytes());
                bytes.resize(if manner.fixed { 10 } else { 134 }, 0);
                stream.write_all(&bytes)?;
                return transmission(disk, stream, life, structured);
            }
            _ => option_reply(stream, option, wire::REPLY_ERROR_UNSUPPORTED, b"")?,
        }
    }
}

pub(super) fn simple(cookie: u64, error: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = wire::SIMPLE_REPLY_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&error.to_be_bytes());
    bytes.extend_from_slice(&cookie.to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

pub(super) fn chunk(cookie: u64, done: bool, kind: u16, parts: &[&[u8]]) -> Vec<u8> {
    let mut bytes = wire::CHUNK_MAGIC.to_be_bytes().to_vec();
    bytes.extend_from_slice(&u16::from(done).to_be_bytes());
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&cookie.to_be_bytes());
    bytes.extend_from_slice(&(parts.iter().map(|part| part.len()).sum::<usize>() as u32).to_be_bytes());
    parts.iter().for_each(|part| bytes.extend_from_slice(part));
    bytes
}

fn transmission(disk: &Mutex<Disk>, stream: &mut dyn Stream, life: u64, structured: bool) -> io::Result<()> {
    loop {
        take::<4>(stream)?;
        let seen = Seen {
            flags: u16::from_be_bytes(take(stream)?),
            command: u16::from_be_bytes(take(stream)?),
            cookie: u64::from_be_bytes(take(stream)?),
            offset: u64::from_be_bytes(take(stream)?),
            length: u32::from_be_bytes(take(stream)?),
        };
        let mut data = Vec::new();
        if seen.command == wire::COMMAND_WRITE {
            data.resize(seen.length as usize, 0);
            stream.read_exact(&mut data)?;
        }
        if seen.command == wire::COMMAND_DISCONNECT {
            return Ok(());
        }
        let reply = {
            let mut disk = disk.lock().unwrap();
            if disk.life != life {
                return Ok(());
            }
            disk.seen.push(seen);
            let act = (disk.script)(seen);
            match act {
                Act::Raw(bytes) => bytes,
                Act::RawAndHangUp(bytes) => {
                    drop(disk);
                    stream.write_all(&bytes)?;
                    return Ok(());
                }
                Act::Error(error) if structured => {
                    chunk(seen.cookie, true, wire::CHUNK_ERROR_BIT | 1, &[&error.to_be_bytes(), &[0, 3], b"no!"])
                }
                Act::Error(error) => simple(seen.cookie, error, &[]),
                Act::PowerLossBefore => {
                    lose_power(&mut disk);
                    return Ok(());
                }
                Act::PowerLossAfter => {
                    apply(&mut disk, seen, &data);
                    lose_power(&mut disk);
                    return Ok(());
                }
                Act::Serve | Act::Scatter => {
                    let scatter = matches!(act, Act::Scatter);
                    let read = apply(&mut disk, seen, &data);
                    match (seen.command, structured) {
                        (wire::COMMAND_READ, true) if scatter => scattered(seen, &read),
                        (wire::COMMAND_READ, true) => {
                            chunk(seen.cookie, true, wire::CHUNK_OFFSET_DATA, &[&seen.offset.to_be_bytes(), &read])
                        }
                        (_, true) if scatter => chunk(seen.cookie, true, wire::CHUNK_NONE, &[]),
                        _ => simple(seen.cookie, 0, &read),
                    }
                }
            }
        };
        stream.write_all(&reply)?;
    }
}

fn scattered(seen: Seen, read: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (number, piece) in read.chunks(512).enumerate().rev() {
        let offset = (seen.offset + number as u64 * 512).to_be_bytes();
        if piece.iter().all(|byte| *byte == 0) {
            let length = (piece.len() as u32).to_be_bytes();
            bytes.extend(chunk(seen.cookie, false, wire::CHUNK_OFFSET_HOLE, &[&offset, &length]));
        } else {
            bytes.extend(chunk(seen.cookie, false, wire::CHUNK_OFFSET_DATA, &[&offset, piece]));
        }
    }
    bytes.extend(chunk(seen.cookie, true, wire::CHUNK_NONE, &[]));
    bytes
}

fn apply(disk: &mut Disk, seen: Seen, data: &[u8]) -> Vec<u8> {
    let range = seen.offset as usize..seen.offset as usize + seen.length as usize;
    match seen.command {
        wire::COMMAND_READ => return disk.cache[range].to_vec(),
        wire::COMMAND_WRITE => disk.cache[range.clone()].copy_from_slice(data),
        wire::COMMAND_WRITE_ZEROES | wire::COMMAND_TRIM => disk.cache[range.clone()].fill(0),
        wire::COMMAND_FLUSH => disk.durable = disk.cache.clone(),
        other => panic!("command {other}"),
    }
    if seen.flags & wire::COMMAND_FLAG_FUA != 0 {
        let done = disk.cache[range.clone()].to_vec();
        disk.durable[range].copy_from_slice(&done);
    }
    Vec::new()
}
