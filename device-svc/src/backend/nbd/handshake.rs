//! The handshake: from a connected socket to an export that can be read and written, or a line that says why not.
//!
//! Fixed newstyle with `NBD_OPT_GO`; a server that does not know GO is asked by `NBD_OPT_EXPORT_NAME`. It blocks, under
//! the stream's deadline. Where TLS was asked for, nothing but `NBD_OPT_STARTTLS` goes over the open connection, and a
//! server that declines it is left: a downgrade would be what an attacker in between wants.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustls::{ClientConnection, StreamOwned};

use super::stream::DeadlineStream;
use super::tls::Tls;
use super::uri::NbdUri;
use super::wire::{self, ProtocolError};

/// The longest reply to an option that is taken, bytes: strings end at 4096 and nothing asked for is longer.
const OPTION_REPLY_BYTES_MAX: u32 = 8192;

/// How many replies one option may get: GO is answered by a handful of `NBD_REP_INFO`, not by a stream without end.
const OPTION_REPLIES_MAX: usize = 64;

/// The largest payload a server must take when it states no limit ("NBD protocol", block size constraints).
pub(super) const PAYLOAD_BYTES_DEFAULT: u32 = 32 << 20;

/// What the server says of an export.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Export {
    /// Bytes.
    pub(super) size_bytes: u64,
    /// `NBD_FLAG_*`.
    pub(super) flags: u16,
    /// Smallest request and alignment, bytes, a power of two.
    pub(super) block_bytes_min: u32,
    /// What requests had better be multiples of, bytes, a power of two.
    pub(super) block_bytes_preferred: u32,
    /// Largest payload of a request, bytes, a multiple of 4096.
    pub(super) payload_bytes_max: u32,
    /// Whether reads are answered by structured replies.
    pub(super) structured: bool,
}

impl Export {
    /// Whether the server has set the flag.
    pub(super) const fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// A connection that is ready for requests.
#[derive(Debug)]
pub(super) struct Established {
    /// Nonblocking.
    pub(super) socket: OwnedFd,
    /// The TLS session on it, if any.
    pub(super) tls: Option<Box<ClientConnection>>,
    /// What it leads to.
    pub(super) export: Export,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum HandshakeError {
    /// The server cannot be reached or does not answer.
    #[error("{0}")]
    Unreachable(#[from] io::Error),
    /// It answers, but no NBD.
    #[error("{0}")]
    Protocol(#[from] ProtocolError),
    /// It will not serve us, or not like this.
    #[error("{0}")]
    Refused(String),
}

/// Connects to `uri` and shakes hands, all within `timeout`.
pub(super) fn establish(uri: &NbdUri, tls: Option<&Tls>, timeout: Duration) -> Result<Established, HandshakeError> {
    let mut stream = DeadlineStream::connect(&uri.address, timeout)?;
    let greeting = greet(&mut stream)?;
    let Some(tls) = tls else {
        let export = negotiate(&mut stream, uri, greeting)?;
        return Ok(Established { socket: stream.into_socket(), tls: None, export });
    };
    if !greeting.fixed {
        return Err(HandshakeError::Refused("the server is too old for TLS, and nbds asks for TLS".to_owned()));
    }
    let mut ignore = |_: u32, _: &[u8]| Ok(());
    match option(&mut stream, wire::OPTION_STARTTLS, &[], &mut ignore)? {
        Answer::Acknowledged => {}
        Answer::Error { .. } => {
            return Err(HandshakeError::Refused("the server declines TLS, and nbds asks for TLS".to_owned()));
        }
    }
    let client = tls.client().map_err(|error| HandshakeError::Refused(format!("TLS: {error}")))?;
    let mut stream = StreamOwned::new(client, stream);
    let export = negotiate(&mut stream, uri, greeting)?;
    Ok(Established { socket: stream.sock.into_socket(), tls: Some(Box::new(stream.conn)), export })
}

#[derive(Clone, Copy)]
struct Greeting {
    fixed: bool,
    no_zeroes: bool,
}

fn greet(stream: &mut DeadlineStream) -> Result<Greeting, HandshakeError> {
    if read_u64(stream)? != wire::INIT_MAGIC {
        return Err(ProtocolError("it does not start with NBDMAGIC").into());
    }
    match read_u64(stream)? {
        wire::OPTION_MAGIC => {}
        wire::OLDSTYLE_MAGIC => {
            return Err(HandshakeError::Refused("the server speaks oldstyle NBD only; newstyle is needed".to_owned()));
        }
        _ => return Err(ProtocolError("it does not go on with IHAVEOPT").into()),
    }
    let flags = read_u16(stream)?;
    let known = flags & (wire::HANDSHAKE_FIXED_NEWSTYLE | wire::HANDSHAKE_NO_ZEROES);
    stream.write_all(&u32::from(known).to_be_bytes())?;
    Ok(Greeting {
        fixed: flags & wire::HANDSHAKE_FIXED_NEWSTYLE != 0,
        no_zeroes: flags & wire::HANDSHAKE_NO_ZEROES != 0,
    })
}

fn negotiate<S: Read + Write>(stream: &mut S, uri: &NbdUri, greeting: Greeting) -> Result<Export, HandshakeError> {
    // A newstyle server that is not fixed ends the connection at any option but EXPORT_NAME.
    if !greeting.fixed {
        return export_name(stream, uri, greeting, false);
    }
    let mut ignore = |_: u32, _: &[u8]| Ok(());
    let structured = match option(stream, wire::OPTION_STRUCTURED_REPLY, &[], &mut ignore)? {
        Answer::Acknowledged => true,
        Answer::Error { code: wire::REPLY_ERROR_TLS_REQUIRED, .. } => return Err(tls_required()),
        Answer::Error { .. } => false,
    };

    // The length was bounded when the URI was parsed.
    let name = uri.export.as_bytes();
    let mut data = Vec::with_capacity(name.len() + 8);
    data.extend_from_slice(&(name.len() as u32).to_be_bytes());
    data.extend_from_slice(name);
    data.extend_from_slice(&1u16.to_be_bytes());
    data.extend_from_slice(&wire::INFO_BLOCK_SIZE.to_be_bytes());
    let mut found = None;
    let mut sizes = None;
    let mut take = |kind: u32, body: &[u8]| -> Result<(), ProtocolError> {
        if kind != wire::REPLY_INFO {
            return Err(ProtocolError("NBD_OPT_GO is answered by something that is neither INFO nor ACK"));
        }
        let (kind, rest) = body.split_first_chunk::<2>().ok_or(ProtocolError("an NBD_REP_INFO has no type"))?;
        match u16::from_be_bytes(*kind) {
            wire::INFO_EXPORT => {
                let body: [u8; 10] =
                    rest.try_into().map_err(|_| ProtocolError("an NBD_INFO_EXPORT is not 12 bytes long"))?;
                let [a, b, c, d, e, f, g, h, i, j] = body;
                found = Some((u64::from_be_bytes([a, b, c, d, e, f, g, h]), u16::from_be_bytes([i, j])));
            }
            wire::INFO_BLOCK_SIZE => {
                let body: [u8; 12] =
                    rest.try_into().map_err(|_| ProtocolError("an NBD_INFO_BLOCK_SIZE is not 14 bytes long"))?;
                let [a, b, c, d, e, f, g, h, i, j, k, l] = body;
                sizes = Some([[a, b, c, d], [e, f, g, h], [i, j, k, l]].map(u32::from_be_bytes));
            }
            // Servers may send others without being asked.
            _ => {}
        }
        Ok(())
    };
    match option(stream, wire::OPTION_GO, &data, &mut take)? {
        Answer::Acknowledged => {
            let (size_bytes, flags) =
                found.ok_or(ProtocolError("NBD_OPT_GO is acknowledged without an NBD_INFO_EXPORT"))?;
            export(size_bytes, flags, sizes, structured)
        }
        Answer::Error { code: wire::REPLY_ERROR_UNSUPPORTED, .. } => export_name(stream, uri, greeting, structured),
        Answer::Error { code: wire::REPLY_ERROR_TLS_REQUIRED, .. } => Err(tls_required()),
        Answer::Error { code: wire::REPLY_ERROR_SHUTDOWN, .. } => {
            Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the server is shutting down").into())
        }
        Answer::Error { code: wire::REPLY_ERROR_UNKNOWN, text } => {
            Err(HandshakeError::Refused(format!("the server has no export `{}`{text}", uri.export)))
        }
        Answer::Error { code: wire::REPLY_ERROR_POLICY, text } => {
            Err(HandshakeError::Refused(format!("the server's policy refuses export `{}`{text}", uri.export)))
        }
        Answer::Error { code, text } => Err(HandshakeError::Refused(format!(
            "the server refuses export `{}` with error {}{text}",
            uri.export,
            code & !wire::REPLY_ERROR
        ))),
    }
}

fn tls_required() -> HandshakeError {
    HandshakeError::Refused("the server asks for TLS; write nbds:// instead of nbd://".to_owned())
}

fn export_name<S: Read + Write>(
    stream: &mut S,
    uri: &NbdUri,
    greeting: Greeting,
    structured: bool,
) -> Result<Export, HandshakeError> {
    send_option(stream, wire::OPTION_EXPORT_NAME, uri.export.as_bytes())?;
    let size_bytes = match read_u64(stream) {
        // The only way in which EXPORT_NAME can say no.
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            return Err(HandshakeError::Refused(format!(
                "the server hung up when asked for export `{}`; it may have none of that name",
                uri.export
            )));
        }
        result => result?,
    };
    let flags = read_u16(stream)?;
    if !greeting.no_zeroes {
        stream.read_exact(&mut [0; 124])?;
    }
    export(size_bytes, flags, None, structured)
}

/// Checks what the server says of itself.
fn export(size_bytes: u64, flags: u16, sizes: Option<[u32; 3]>, structured: bool) -> Result<Export, HandshakeError> {
    if size_bytes > i64::MAX as u64 {
        return Err(ProtocolError("the export is larger than 2^63 bytes").into());
    }
    let [min, preferred, max] = sizes.unwrap_or([1, 4096, PAYLOAD_BYTES_DEFAULT]);
    if !min.is_power_of_two() || min > 1 << 16 {
        return Err(ProtocolError("the minimum block size is no power of two, or above 64 KiB").into());
    }
    if !preferred.is_power_of_two() || preferred < min {
        return Err(ProtocolError("the preferred block size is no power of two, or below the minimum").into());
    }
    // No sensible server says less than a page; what it says above our own limit changes nothing.
    if max < min.max(4096) {
        return Err(ProtocolError("the maximum block size is below 4096 or the minimum").into());
    }
    let payload_bytes_max = max.min(PAYLOAD_BYTES_DEFAULT) & !4095;
    Ok(Export {
        size_bytes,
        flags,
        block_bytes_min: min,
        block_bytes_preferred: preferred,
        payload_bytes_max,
        structured,
    })
}

/// Gets the type and the content of a reply that does not end its option.
type TakeReply<'a> = dyn FnMut(u32, &[u8]) -> Result<(), ProtocolError> + 'a;

enum Answer {
    Acknowledged,
    Error { code: u32, text: String },
}

fn send_option<S: Write>(stream: &mut S, option: u32, data: &[u8]) -> io::Result<()> {
    let mut bytes = Vec::with_capacity(16 + data.len());
    bytes.extend_from_slice(&wire::OPTION_MAGIC.to_be_bytes());
    bytes.extend_from_slice(&option.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    stream.write_all(&bytes)?;
    stream.flush()
}

/// Sends an option and takes its replies, up to the one that ends it; `take` gets the others.
fn option<S: Read + Write>(
    stream: &mut S,
    option: u32,
    data: &[u8],
    take: &mut TakeReply<'_>,
) -> Result<Answer, HandshakeError> {
    send_option(stream, option, data)?;
    for _ in 0..OPTION_REPLIES_MAX {
        if read_u64(stream)? != wire::OPTION_REPLY_MAGIC {
            return Err(ProtocolError("an option's reply has another magic").into());
        }
        if read_u32(stream)? != option {
            return Err(ProtocolError("a reply is for another option").into());
        }
        let kind = read_u32(stream)?;
        let length = read_u32(stream)?;
        if length > OPTION_REPLY_BYTES_MAX {
            return Err(ProtocolError("an option's reply is too long").into());
        }
        let mut body = vec![0; length as usize];
        stream.read_exact(&mut body)?;
        if kind == wire::REPLY_ACK {
            return Ok(Answer::Acknowledged);
        }
        if kind & wire::REPLY_ERROR != 0 {
            let text: String = String::from_utf8_lossy(&body).chars().filter(|c| !c.is_control()).take(200).collect();
            let text = if text.is_empty() { text } else { format!(": {text}") };
            return Ok(Answer::Error { code: kind, text });
        }
        take(kind, &body)?;
    }
    Err(ProtocolError("an option gets replies without end").into())
}

fn read_u16<S: Read>(stream: &mut S) -> io::Result<u16> {
    let mut bytes = [0; 2];
    stream.read_exact(&mut bytes)?;
    Ok(u16::from_be_bytes(bytes))
}

fn read_u32<S: Read>(stream: &mut S) -> io::Result<u32> {
    let mut bytes = [0; 4];
    stream.read_exact(&mut bytes)?;
    Ok(u32::from_be_bytes(bytes))
}

fn read_u64<S: Read>(stream: &mut S) -> io::Result<u64> {
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes)?;
    Ok(u64::from_be_bytes(bytes))
}
