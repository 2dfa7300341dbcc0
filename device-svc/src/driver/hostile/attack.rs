//! What is wrong in a ring, and what a device that follows the specification makes of it.

use virtio_bindings::virtio_blk as spec;

use super::guest::{Guest, Link, Ring};
use super::random::Random;
use crate::virtqueue::{DESCRIPTOR_INDIRECT, features};

/// What must come of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Outcome {
    /// The device needs a reset, and says so on the queue's error event.
    Fault,
    /// The request at the end ends with one of these statuses; its status byte is at the address.
    Status(u64, &'static [u8]),
    /// Either, or nothing that can be seen from here.
    Any,
}

/// Well, or one of the two errors.
const OK: &[u8] = &[0];
const IO_ERROR: &[u8] = &[1];
const UNSUPPORTED: &[u8] = &[2];

/// Ways to be wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Attack {
    HeaderOutside,
    DataOutside,
    DataWraps,
    DataAcrossTheEnd,
    StatusOutside,
    Loop,
    ChainTooLong,
    TableTooLong,
    ReadableAfterWritable,
    NestedTable,
    OddTable,
    TableOutside,
    TableLoop,
    LinkOutOfTable,
    IndexJump,
    HeadOutside,
    BeyondTheEnd,
    SectorWraps,
    NoStatus,
    ShortHeader,
    ScatteredRequest,
    UnknownKind,
    OddLength,
    WrongWay,
    HugeLengths,
    EmptyBuffers,
    OddRanges,
    SameHeadAgain,
    Scribble,
    Truncate,
}

/// All of them.
pub(super) const ATTACKS: [Attack; 30] = [
    Attack::HeaderOutside,
    Attack::DataOutside,
    Attack::DataWraps,
    Attack::DataAcrossTheEnd,
    Attack::StatusOutside,
    Attack::Loop,
    Attack::ChainTooLong,
    Attack::TableTooLong,
    Attack::ReadableAfterWritable,
    Attack::NestedTable,
    Attack::OddTable,
    Attack::TableOutside,
    Attack::TableLoop,
    Attack::LinkOutOfTable,
    Attack::IndexJump,
    Attack::HeadOutside,
    Attack::BeyondTheEnd,
    Attack::SectorWraps,
    Attack::NoStatus,
    Attack::ShortHeader,
    Attack::ScatteredRequest,
    Attack::UnknownKind,
    Attack::OddLength,
    Attack::WrongWay,
    Attack::HugeLengths,
    Attack::EmptyBuffers,
    Attack::OddRanges,
    Attack::SameHeadAgain,
    Attack::Scribble,
    Attack::Truncate,
];

/// A get id, which every device answers.
pub(super) fn good(guest: &mut Guest, ring: &mut Ring) -> Outcome {
    let (line, status) = guest.line(spec::VIRTIO_BLK_T_GET_ID, 0);
    let data = guest.data();
    let chain = [Link::readable(line, 16), Link::writable(data, 20), Link::writable(status, 1).last()];
    ring.offer(guest, &chain);
    ring.publish(guest, 0);
    Outcome::Status(status, OK)
}

impl Attack {
    /// Writes it into the ring and shows it to the device.
    pub(super) fn write(self, guest: &mut Guest, ring: &mut Ring, accepted: u64, random: &mut Random) -> Outcome {
        let outcome = self.offer(guest, ring, accepted, random);
        let jump = if self == Self::IndexJump { ring.size + 1 + random.below(0x4000) as u16 } else { 0 };
        ring.publish(guest, jump);
        if self == Self::Truncate {
            let share = &guest.shares[0];
            // All of it, or all but a split ring's descriptors: a packed ring is not looked for elsewhere until it is used.
            let left = if ring.packed { 0 } else { random.pick(&[0, share.offset + 4096]) };
            let _ = share.file.set_len(left);
        }
        outcome
    }

    #[expect(clippy::too_many_lines, reason = "a table: one entry for each attack")]
    fn offer(self, guest: &mut Guest, ring: &mut Ring, accepted: u64, random: &mut Random) -> Outcome {
        let indirect = accepted & features::INDIRECT != 0;
        let (packed, size, first) = (ring.packed, ring.size, ring.next());
        let data = guest.data();
        let outside = guest.end() + 4096 * (1 + random.below(1 << 20));
        let kind = match self {
            Self::BeyondTheEnd | Self::SectorWraps | Self::OddLength | Self::WrongWay | Self::EmptyBuffers => {
                spec::VIRTIO_BLK_T_IN
            }
            Self::DataOutside | Self::DataWraps | Self::DataAcrossTheEnd => {
                random.pick(&[spec::VIRTIO_BLK_T_IN, spec::VIRTIO_BLK_T_OUT])
            }
            Self::UnknownKind => random.pick(&[3, 7, 9, 24, 0x8000_0000, u32::MAX]),
            Self::OddRanges => random.pick(&[spec::VIRTIO_BLK_T_DISCARD, spec::VIRTIO_BLK_T_WRITE_ZEROES]),
            _ => spec::VIRTIO_BLK_T_GET_ID,
        };
        let sector = match self {
            Self::BeyondTheEnd => random.pick(&[1 << 40, 1 << 54]),
            Self::SectorWraps => random.pick(&[u64::MAX, 1 << 55, (1 << 55) - 1]),
            _ => 0,
        };
        let (line, status_at) = guest.line(kind, sector);
        let header = Link::readable(line, 16);
        let status = Link::writable(status_at, 1).last();
        let id = Link::writable(data, 20);
        let payload = |address: u64, length: u32| {
            if kind == spec::VIRTIO_BLK_T_OUT {
                Link::readable(address, length)
            } else {
                Link::writable(address, length)
            }
        };
        let (links, outcome) = match self {
            Self::HeaderOutside => (vec![Link::readable(outside, 16), id, status], Outcome::Fault),
            Self::DataOutside => (vec![header, payload(outside, 4096), status], Outcome::Fault),
            Self::DataWraps => (vec![header, payload(u64::MAX - 255, 4096), status], Outcome::Fault),
            Self::DataAcrossTheEnd => {
                let end = guest.end();
                (vec![header, payload(end - 2048, 4096), status], Outcome::Fault)
            }
            Self::StatusOutside => (vec![header, id, Link::writable(outside, 1).last()], Outcome::Fault),
            Self::Loop if packed => {
                // Every slot says that the next one belongs to it.
                let links = vec![Link::readable(line, 1); usize::from(size - first)];
                (links.to_vec(), if first == 0 { Outcome::Fault } else { Outcome::Any })
            }
            Self::Loop => {
                let back = Link { next: Some(first), ..Link::readable(line, 1) };
                (vec![header, back], Outcome::Fault)
            }
            Self::ChainTooLong => {
                let links = vec![Link::readable(line, 1); 300];
                (links.to_vec(), if size - first > 300 { Outcome::Fault } else { Outcome::Any })
            }
            Self::TableTooLong => {
                let links = vec![Link::readable(line, 1); 300];
                let table = guest.table(&links, packed);
                (vec![Link::indirect(table, 16 * 300)], Outcome::Fault)
            }
            Self::ReadableAfterWritable => (vec![id, header, status], Outcome::Fault),
            Self::NestedTable => {
                let inner = guest.table(&[header, id, status], packed);
                let outer = guest.table(&[header, Link::indirect(inner, 48)], packed);
                (vec![Link::indirect(outer, 32)], Outcome::Fault)
            }
            Self::OddTable => {
                let table = guest.table(&[header, id, status], packed);
                let length = random.pick(&[0, 1, 15, 17, 47, 49, u32::MAX]);
                (vec![Link::indirect(table, length)], Outcome::Fault)
            }
            Self::TableOutside => (vec![Link::indirect(outside, 48)], Outcome::Fault),
            Self::TableLoop => {
                let back = Link { next: Some(0), ..Link::readable(line, 1) };
                let table = guest.table(&[header, back], packed);
                // A packed ring's table has no links to go wrong: what is left is a request without a status.
                (vec![Link::indirect(table, 32)], Outcome::Fault)
            }
            Self::LinkOutOfTable => {
                let away = Link { next: Some(random.pick(&[3, 100, u16::MAX])), ..header };
                let table = guest.table(&[away, id, status], packed);
                let outcome = match (indirect, packed) {
                    (true, true) => Outcome::Status(status_at, OK),
                    _ => Outcome::Fault,
                };
                (vec![Link::indirect(table, 48)], outcome)
            }
            Self::IndexJump if packed => return good(guest, ring),
            Self::IndexJump => return Outcome::Fault,
            Self::HeadOutside if packed => (vec![header, id, status], Outcome::Status(status_at, OK)),
            Self::HeadOutside => {
                ring.entry(guest, size + random.below(u64::from(u16::MAX - size)) as u16);
                return Outcome::Fault;
            }
            Self::BeyondTheEnd | Self::SectorWraps => {
                (vec![header, payload(data, 512), status], Outcome::Status(status_at, IO_ERROR))
            }
            Self::NoStatus => (vec![header, Link::readable(data, 20).last()], Outcome::Fault),
            Self::ShortHeader => (vec![Link::readable(line, 15), id, status], Outcome::Fault),
            Self::ScatteredRequest => {
                let cut = 1 + random.below(14) as u32;
                let links = [
                    Link::readable(line, cut),
                    Link::readable(line + u64::from(cut), 0),
                    Link::readable(line + u64::from(cut), 16 - cut),
                    Link::writable(data, 7),
                    Link::writable(data + 7, 0),
                    Link::writable(data + 7, 13),
                    status,
                ];
                (links.to_vec(), Outcome::Status(status_at, OK))
            }
            Self::UnknownKind => (vec![header, id, status], Outcome::Status(status_at, UNSUPPORTED)),
            Self::OddLength => {
                let length = random.pick(&[1, 511, 513, 1000]);
                (vec![header, payload(data, length), status], Outcome::Status(status_at, IO_ERROR))
            }
            Self::WrongWay => {
                let links = [header, Link::readable(data, 512), status];
                (links.to_vec(), Outcome::Status(status_at, IO_ERROR))
            }
            Self::HugeLengths => {
                let huge = Link::writable(data, u32::MAX);
                (vec![header, huge, huge, status], Outcome::Fault)
            }
            Self::EmptyBuffers => {
                let empty = Link::writable(outside, 0);
                (vec![header, empty, empty, status], Outcome::Status(status_at, IO_ERROR))
            }
            Self::OddRanges => {
                let count = 1 + random.below(20) as u32;
                for range in 0..count {
                    let words = [random.nasty(), random.nasty()];
                    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
                    guest.write(data + 16 * u64::from(range), &bytes);
                }
                let length = 16 * count - random.pick(&[0, 0, 1]);
                let links = [header, Link::readable(data, length), status];
                (links.to_vec(), Outcome::Status(status_at, &[0, 1, 2]))
            }
            Self::SameHeadAgain => {
                ring.offer(guest, &[header, id, status]);
                for _ in 0..random.below(u64::from(size)) {
                    ring.entry(guest, first);
                }
                return Outcome::Any;
            }
            Self::Scribble => {
                ring.scribble(guest, random);
                return Outcome::Any;
            }
            Self::Truncate => (vec![header, id, status], Outcome::Fault),
        };
        // What is wrong in the ring is as wrong in a table.
        let is_plain = links.iter().all(|link| link.next.is_none() && link.flags & DESCRIPTOR_INDIRECT == 0);
        let tables_apart = !matches!(self, Self::Loop | Self::ChainTooLong);
        if indirect && is_plain && tables_apart && random.one_in(2) {
            let table = guest.table(&links, packed);
            ring.offer(guest, &[Link::indirect(table, 16 * links.len() as u32)]);
        } else {
            ring.offer(guest, &links);
        }
        outcome
    }
}
