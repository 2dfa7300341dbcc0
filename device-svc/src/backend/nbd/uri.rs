//! NBD URIs, as the protocol's own document on them writes them: `nbd://host:port/export`,
//! `nbd+unix:///export?socket=/path`, and the same with `nbds`, which asks for TLS. Parsed once, into a type that names
//! a place to connect to and an export, so that nothing later has to look at the text.

use std::fmt;
use std::path::PathBuf;

/// The port IANA gave NBD.
const PORT: u16 = 10809;

/// The longest export name the protocol lets a client send, bytes ("NBD protocol", values: strings).
pub const EXPORT_NAME_BYTES_MAX: usize = 4096;

/// Where a server listens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NbdAddress {
    /// Over TCP: a name or address, and a port.
    Tcp {
        /// Host name, IPv4 address, or IPv6 address without its brackets.
        host: String,
        /// Port.
        port: u16,
    },
    /// Over a Unix socket: its path.
    Unix(PathBuf),
}

/// A parsed NBD URI.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NbdUri {
    text: String,
    /// Where the server listens.
    pub address: NbdAddress,
    /// Name of the export; empty for the server's default.
    pub export: String,
    /// Whether the connection must be encrypted (`nbds`).
    pub tls: bool,
}

impl fmt::Display for NbdUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Why a text is no NBD URI that can be served.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("`{uri}` is no NBD URI: {why}")]
pub struct UriError {
    uri: String,
    why: &'static str,
}

impl std::str::FromStr for NbdUri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        parse(text).map_err(|why| UriError { uri: text.to_owned(), why })
    }
}

fn parse(text: &str) -> Result<NbdUri, &'static str> {
    let (scheme, rest) = text.split_once("://").ok_or("it has no `://`; write nbd://host:port/export")?;
    let (tls, unix) = match scheme {
        "nbd" => (false, false),
        "nbds" => (true, false),
        "nbd+unix" => (false, true),
        "nbds+unix" => (true, true),
        _ => return Err("its scheme is none of nbd, nbds, nbd+unix, nbds+unix"),
    };
    if rest.contains('#') {
        return Err("it has a fragment (`#`)");
    }
    let (rest, query) = rest.split_once('?').map_or((rest, None), |(rest, query)| (rest, Some(query)));
    let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
    let export = decode(path)?;
    if export.len() > EXPORT_NAME_BYTES_MAX {
        return Err("its export name is longer than 4096 bytes");
    }
    let mut socket = None;
    for pair in query.into_iter().flat_map(|query| query.split('&')).filter(|pair| !pair.is_empty()) {
        match pair.split_once('=') {
            Some(("socket", value)) if unix && socket.is_none() => socket = Some(decode(value)?),
            Some(("socket", _)) => return Err("`socket` belongs once, and to nbd+unix and nbds+unix only"),
            _ => return Err("it has a parameter other than `socket`"),
        }
    }
    let address = if unix {
        if !authority.is_empty() {
            return Err("a Unix socket has no host; write nbd+unix:///export?socket=/path");
        }
        match socket {
            Some(path) if !path.is_empty() => NbdAddress::Unix(path.into()),
            _ => return Err("it names no socket; write nbd+unix:///export?socket=/path"),
        }
    } else {
        tcp(authority)?
    };
    Ok(NbdUri { text: text.to_owned(), address, export, tls })
}

fn tcp(authority: &str) -> Result<NbdAddress, &'static str> {
    if authority.contains('@') {
        return Err("a user name has no meaning here");
    }
    let (host, port) = if let Some(rest) = authority.strip_prefix('[') {
        let (host, port) = rest.split_once(']').ok_or("its IPv6 address has no closing bracket")?;
        match port.strip_prefix(':') {
            Some(port) => (host, Some(port)),
            None if port.is_empty() => (host, None),
            None => return Err("after its IPv6 address comes neither `:` nor `/`"),
        }
    } else {
        authority.split_once(':').map_or((authority, None), |(host, port)| (host, Some(port)))
    };
    if host.is_empty() {
        return Err("it names no host");
    }
    let port = match port {
        None | Some("") => PORT,
        Some(port) => port.parse().ok().filter(|port| *port != 0).ok_or("its port is no number from 1 to 65535")?,
    };
    Ok(NbdAddress::Tcp { host: decode(host)?, port })
}

/// Undoes percent encoding.
fn decode(text: &str) -> Result<String, &'static str> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digit = |byte: Option<u8>| byte.and_then(|byte| char::from(byte).to_digit(16));
        match (digit(rest.next()), digit(rest.next())) {
            (Some(high), Some(low)) => bytes.push((high * 16 + low) as u8),
            _ => return Err("after a `%` two hexadecimal digits must follow"),
        }
    }
    if bytes.contains(&0) {
        return Err("it holds a zero byte");
    }
    String::from_utf8(bytes).map_err(|_| "it is not UTF-8")
}

#[cfg(test)]
mod tests;
