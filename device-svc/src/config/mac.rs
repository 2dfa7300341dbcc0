//! The MAC address of a network function.

use std::fmt;

use uuid::Uuid;

use super::name::{IDENTITY_SPACE, machine_id};

/// Bit 0 of the first octet: an address of a group (IEEE 802, 8.2).
const GROUP: u8 = 1;

/// Bit 1 of the first octet: an address that no manufacturer gave.
const LOCAL: u8 = 2;

/// A MAC address that one interface may have: of no group, and not all zeroes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct MacAddress([u8; 6]);

impl MacAddress {
    /// The address of these octets, if one interface may have it.
    #[must_use]
    pub const fn new(octets: [u8; 6]) -> Option<Self> {
        let [first, b, c, d, e, f] = octets;
        let is_zero = matches!([first, b, c, d, e, f], [0, 0, 0, 0, 0, 0]);
        if first & GROUP != 0 || is_zero { None } else { Some(Self(octets)) }
    }

    /// Its octets, in the order in which they are sent.
    #[must_use]
    pub const fn octets(self) -> [u8; 6] {
        self.0
    }

    /// Parses six octets of two hexadecimal digits with colons between.
    ///
    /// # Errors
    /// What is wrong with the text and how to write it.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let octets: Option<Vec<u8>> = text.split(':').map(parse_octet).collect();
        let octets: Option<[u8; 6]> = octets.and_then(|octets| octets.try_into().ok());
        let octets = octets
            .ok_or_else(|| format!("{text:?} is not a MAC address; write six octets, like \"52:54:00:12:34:56\""))?;
        let next = "give one of a single interface, like \"52:54:00:12:34:56\"";
        Self::new(octets).ok_or_else(|| match octets {
            [0, 0, 0, 0, 0, 0] => format!("{text:?} is no interface's address; {next}"),
            _ => format!("{text:?} is the address of a group; {next}"),
        })
    }

    /// The address of a function that was given none: the same after every restart, and another on another machine. It is a
    /// locally administered one, so that it meets no manufacturer's.
    pub(super) fn of_function(name: &str) -> Self {
        let digest = Uuid::new_v5(&IDENTITY_SPACE, format!("{name}\n{} mac", machine_id()).as_bytes());
        let [first, b, c, d, e, f, ..] = *digest.as_bytes();
        Self([first & !GROUP | LOCAL, b, c, d, e, f])
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.0;
        write!(out, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

fn parse_octet(text: &str) -> Option<u8> {
    let is_octet = text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_octet.then(|| u8::from_str_radix(text, 16).ok()).flatten()
}
