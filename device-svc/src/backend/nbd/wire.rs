//! What goes over an NBD connection, byte for byte: constants and layouts of the NBD protocol, and the parsers of what a
//! server sends. A server is untrusted: a parser answers "more bytes", "this", or "that is no NBD", and every length it
//! lets through is bounded.

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First word of a server ("NBDMAGIC").
pub(super) const INIT_MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
/// Second word of a newstyle server, first of a client's option ("IHAVEOPT").
pub(super) const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
/// Second word of an oldstyle server.
pub(super) const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// First word of an option's reply.
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// First word of a request.
pub(super) const REQUEST_MAGIC: u32 = 0x2560_9513;
/// First word of a simple reply.
pub(super) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// First word of a structured reply's chunk.
pub(super) const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Handshake flag of server and client: fixed newstyle.
pub(super) const HANDSHAKE_FIXED_NEWSTYLE: u16 = 1;
/// Handshake flag of server and client: no 124 zeroes after `NBD_OPT_EXPORT_NAME`.
pub(super) const HANDSHAKE_NO_ZEROES: u16 = 2;

/// `NBD_OPT_EXPORT_NAME`.
pub(super) const OPTION_EXPORT_NAME: u32 = 1;
/// `NBD_OPT_STARTTLS`.
pub(super) const OPTION_STARTTLS: u32 = 5;
/// `NBD_OPT_GO`.
pub(super) const OPTION_GO: u32 = 7;
/// `NBD_OPT_STRUCTURED_REPLY`.
pub(super) const OPTION_STRUCTURED_REPLY: u32 = 8;

/// `NBD_REP_ACK`.
pub(super) const REPLY_ACK: u32 = 1;
/// `NBD_REP_INFO`.
pub(super) const REPLY_INFO: u32 = 3;
/// The bit that makes an option's reply an error.
pub(super) const REPLY_ERROR: u32 = 1 << 31;
/// `NBD_REP_ERR_UNSUP`.
pub(super) const REPLY_ERROR_UNSUPPORTED: u32 = REPLY_ERROR | 1;
/// `NBD_REP_ERR_POLICY`.
pub(super) const REPLY_ERROR_POLICY: u32 = REPLY_ERROR | 2;
/// `NBD_REP_ERR_TLS_REQD`.
pub(super) const REPLY_ERROR_TLS_REQUIRED: u32 = REPLY_ERROR | 5;
/// `NBD_REP_ERR_UNKNOWN`.
pub(super) const REPLY_ERROR_UNKNOWN: u32 = REPLY_ERROR | 6;
/// `NBD_REP_ERR_SHUTDOWN`.
pub(super) const REPLY_ERROR_SHUTDOWN: u32 = REPLY_ERROR | 7;

/// `NBD_INFO_EXPORT`.
pub(super) const INFO_EXPORT: u16 = 0;
/// `NBD_INFO_BLOCK_SIZE`.
pub(super) const INFO_BLOCK_SIZE: u16 = 3;

/// `NBD_FLAG_READ_ONLY`.
pub(super) const FLAG_READ_ONLY: u16 = 1 << 1;
/// `NBD_FLAG_SEND_FLUSH`.
pub(super) const FLAG_SEND_FLUSH: u16 = 1 << 2;
/// `NBD_FLAG_SEND_FUA`.
pub(super) const FLAG_SEND_FUA: u16 = 1 << 3;
/// `NBD_FLAG_SEND_TRIM`.
pub(super) const FLAG_SEND_TRIM: u16 = 1 << 5;
/// `NBD_FLAG_SEND_WRITE_ZEROES`.
pub(super) const FLAG_SEND_WRITE_ZEROES: u16 = 1 << 6;
/// `NBD_FLAG_CAN_MULTI_CONN`.
pub(super) const FLAG_CAN_MULTI_CONN: u16 = 1 << 8;

/// `NBD_CMD_READ`.
pub(super) const COMMAND_READ: u16 = 0;
/// `NBD_CMD_WRITE`.
pub(super) const COMMAND_WRITE: u16 = 1;
/// `NBD_CMD_DISC`.
pub(super) const COMMAND_DISCONNECT: u16 = 2;
/// `NBD_CMD_FLUSH`.
pub(super) const COMMAND_FLUSH: u16 = 3;
/// `NBD_CMD_TRIM`.
pub(super) const COMMAND_TRIM: u16 = 4;
/// `NBD_CMD_WRITE_ZEROES`.
pub(super) const COMMAND_WRITE_ZEROES: u16 = 6;

/// `NBD_CMD_FLAG_FUA`.
pub(super) const COMMAND_FLAG_FUA: u16 = 1;
/// `NBD_CMD_FLAG_NO_HOLE`.
pub(super) const COMMAND_FLAG_NO_HOLE: u16 = 2;

/// `NBD_EIO`.
pub(super) const ERROR_EIO: u32 = 5;
/// `NBD_ENOMEM`.
pub(super) const ERROR_ENOMEM: u32 = 12;
/// `NBD_ENOTSUP`.
pub(super) const ERROR_ENOTSUP: u32 = 95;
/// `NBD_ESHUTDOWN`.
pub(super) const ERROR_ESHUTDOWN: u32 = 108;

/// `NBD_REPLY_FLAG_DONE`.
pub(super) const CHUNK_FLAG_DONE: u16 = 1;
/// `NBD_REPLY_TYPE_NONE`.
pub(super) const CHUNK_NONE: u16 = 0;
/// `NBD_REPLY_TYPE_OFFSET_DATA`.
pub(super) const CHUNK_OFFSET_DATA: u16 = 1;
/// `NBD_REPLY_TYPE_OFFSET_HOLE`.
pub(super) const CHUNK_OFFSET_HOLE: u16 = 2;
/// The bit that makes a chunk an error.
pub(super) const CHUNK_ERROR_BIT: u16 = 1 << 15;

/// The longest error chunk taken, bytes: error, length of the text, text (strings end at 4096), offset.
const ERROR_CHUNK_BYTES_MAX: u32 = 4 + 2 + 4096 + 8;

/// A request to the server.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy, Default, Debug)]
#[repr(C)]
pub(super) struct RequestHeader {
    /// [`REQUEST_MAGIC`].
    pub(super) magic: U32,
    /// `NBD_CMD_FLAG_*`.
    pub(super) flags: U16,
    /// `NBD_CMD_*`.
    pub(super) command: U16,
    /// Comes back with the reply.
    pub(super) cookie: U64,
    /// Bytes.
    pub(super) offset: U64,
    /// Bytes.
    pub(super) length: U32,
}

/// A server's simple reply, before any payload.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct SimpleHeader {
    /// [`SIMPLE_REPLY_MAGIC`].
    pub(super) magic: U32,
    /// `NBD_E*`, or 0.
    pub(super) error: U32,
    /// The request's.
    pub(super) cookie: U64,
}

/// The head of a chunk of a structured reply.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct ChunkHeader {
    /// [`CHUNK_MAGIC`].
    pub(super) magic: U32,
    /// `NBD_REPLY_FLAG_*`.
    pub(super) flags: U16,
    /// `NBD_REPLY_TYPE_*`.
    pub(super) kind: U16,
    /// The request's.
    pub(super) cookie: U64,
    /// What follows, bytes.
    pub(super) length: U32,
}

/// A parsed reply, or chunk of one, up to its payload.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Reply {
    /// A simple reply; a read's payload follows if `error` is 0.
    Simple {
        /// The request's.
        cookie: u64,
        /// `NBD_E*`, or 0.
        error: u32,
    },
    /// A chunk of a structured reply.
    Chunk {
        /// The request's.
        cookie: u64,
        /// Whether it is the last one of its reply.
        done: bool,
        /// What it says.
        body: ChunkBody,
    },
}

/// What a chunk says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum ChunkBody {
    /// Nothing: the request succeeded.
    None,
    /// `length` bytes of payload follow, for `offset` of the export.
    Data {
        /// Bytes, in the export; not checked yet.
        offset: u64,
        /// Bytes, at least 1; not checked yet against the request.
        length: u32,
    },
    /// Zeroes.
    Hole {
        /// Bytes, in the export; not checked yet.
        offset: u64,
        /// Bytes, at least 1; not checked yet against the request.
        length: u32,
    },
    /// The request failed.
    Error {
        /// `NBD_E*`, not 0.
        error: u32,
        /// Bytes to skip that follow: text and offset.
        rest: u32,
    },
}

/// Why bytes are no NBD; the connection is of no use any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the server broke the NBD protocol: {0}")]
pub(super) struct ProtocolError(pub(super) &'static str);

/// Parses the head of a reply. Returns how many bytes of `bytes` it took, or `None` when more are needed; never needs
/// more than 32 bytes, a hole's chunk.
///
/// # Errors
/// When this is no reply.
pub(super) fn parse_reply(bytes: &[u8]) -> Result<Option<(Reply, usize)>, ProtocolError> {
    let Some((magic, _)) = bytes.split_first_chunk::<4>() else {
        return Ok(None);
    };
    match u32::from_be_bytes(*magic) {
        SIMPLE_REPLY_MAGIC => {
            let Ok((header, _)) = SimpleHeader::read_from_prefix(bytes) else {
                return Ok(None);
            };
            let reply = Reply::Simple { cookie: header.cookie.get(), error: header.error.get() };
            Ok(Some((reply, size_of::<SimpleHeader>())))
        }
        CHUNK_MAGIC => {
            let Ok((header, rest)) = ChunkHeader::read_from_prefix(bytes) else {
                return Ok(None);
            };
            let Some((body, taken)) = parse_chunk_body(&header, rest)? else {
                return Ok(None);
            };
            let done = header.flags.get() & CHUNK_FLAG_DONE != 0;
            let reply = Reply::Chunk { cookie: header.cookie.get(), done, body };
            Ok(Some((reply, size_of::<ChunkHeader>() + taken)))
        }
        _ => Err(ProtocolError("a reply starts with neither magic")),
    }
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct HoleBody {
    offset: U64,
    length: U32,
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ErrorBody {
    error: U32,
    text_length: U16,
}

fn parse_chunk_body(header: &ChunkHeader, rest: &[u8]) -> Result<Option<(ChunkBody, usize)>, ProtocolError> {
    let length = header.length.get();
    match header.kind.get() {
        CHUNK_NONE if length != 0 => Err(ProtocolError("a chunk without content has a length")),
        CHUNK_NONE if header.flags.get() & CHUNK_FLAG_DONE == 0 => {
            Err(ProtocolError("a chunk without content does not end its reply"))
        }
        CHUNK_NONE => Ok(Some((ChunkBody::None, 0))),
        CHUNK_OFFSET_DATA => {
            if length <= 8 {
                return Err(ProtocolError("a data chunk has no data"));
            }
            let Some((offset, _)) = rest.split_first_chunk::<8>() else {
                return Ok(None);
            };
            Ok(Some((ChunkBody::Data { offset: u64::from_be_bytes(*offset), length: length - 8 }, 8)))
        }
        CHUNK_OFFSET_HOLE => {
            if length as usize != size_of::<HoleBody>() {
                return Err(ProtocolError("a hole chunk is not 12 bytes long"));
            }
            let Ok((body, _)) = HoleBody::read_from_prefix(rest) else {
                return Ok(None);
            };
            if body.length.get() == 0 {
                return Err(ProtocolError("a hole is empty"));
            }
            let body = ChunkBody::Hole { offset: body.offset.get(), length: body.length.get() };
            Ok(Some((body, size_of::<HoleBody>())))
        }
        kind if kind & CHUNK_ERROR_BIT != 0 => {
            let fixed = size_of::<ErrorBody>() as u32;
            if !(fixed..=ERROR_CHUNK_BYTES_MAX).contains(&length) {
                return Err(ProtocolError("an error chunk has an impossible length"));
            }
            let Ok((body, _)) = ErrorBody::read_from_prefix(rest) else {
                return Ok(None);
            };
            if u32::from(body.text_length.get()) > length - fixed {
                return Err(ProtocolError("an error's text is longer than its chunk"));
            }
            if body.error.get() == 0 {
                return Err(ProtocolError("an error chunk tells of no error"));
            }
            Ok(Some((ChunkBody::Error { error: body.error.get(), rest: length - fixed }, size_of::<ErrorBody>())))
        }
        _ => Err(ProtocolError("a chunk of a kind that was not asked for")),
    }
}

#[cfg(test)]
mod tests;
