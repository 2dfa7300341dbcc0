//! A VMM that means harm: conversations over a vfio-user socket that are right up to a point, made from a seed.
//!
//! ```text
//!   converse ─┬─ garbage:   bytes that are no messages
//!             ├─ shuffled:  real messages in any order, with any values, some of them spoiled
//!             ├─ pipelined: many commands before the first reply is read, or none is
//!             ├─ steps:     a driver that leaves out steps, or names addresses that are no memory
//!             └─ attack:    a proper start of a queue, then a ring that breaks the specification in one way
//!      any.rs     messages of any kind
//!      wire.rs    messages as bytes, so that any part can be wrong
//! ```
//!
//! Every command that has a whole message's form must get its own reply, and where virtio names an outcome that is waited for.

mod any;
mod wire;

use std::path::Path;

use nix::sys::eventfd::EventFd;
use zerocopy::IntoBytes;

use super::attack::{ATTACKS, Attack, Outcome, good};
use super::guest::{Guest, NO_STATUS, Ring, Share};
use super::random::Random;
use super::wire::Message;
use super::{End, Events, Misdeed, Told, again, judge, judge_truncation, wait_for};
use crate::driver::vfio_user::{IRQ_EVENTS, IRQ_MSIX, MAP_READ_WRITE, Places, REGION_BAR, REGION_CONFIG, common};
use crate::link::vfio_user::framing::{FLAG_NO_REPLY, TYPE_COMMAND};
use crate::link::vfio_user::message::{
    Capabilities, DmaMap, DmaUnmap, IrqSet, RegionAccess, VersionBody, command, version_text,
};
use crate::virtqueue::features;
use any::any_message;
use wire::{Manner, Reply, Wire, message, region_read, region_write};

/// Where regions start in their files: this protocol knows pages only.
const FILE_OFFSETS: [u64; 3] = [0, 0, 4096];
/// The command register: memory accesses, and bus mastering (PCI 3.0, 6.2.2).
const COMMAND_AT: u64 = 4;
const ENABLED: [u8; 2] = 6_u16.to_le_bytes();
const ID_EXPRESS: u8 = 0x10;
/// Device status (virtio 1.3, 2.1).
const DRIVER: u8 = 3;
const FEATURES_OK: u8 = 11;
const DRIVER_OK: u8 = 15;
const NEEDS_RESET: u8 = 64;

/// Holds the conversation of this seed with whoever serves `socket`.
///
/// # Errors
/// When the card does not do what it must.
pub fn converse(socket: &Path, seed: u64) -> Result<Told, Misdeed> {
    let mut random = Random::new(seed);
    let mut conversation = Conversation::begin(socket, seed, &random)?;
    // A quarter hangs up in the middle of something.
    if random.one_in(4) {
        conversation.left = Some(random.below(60));
    }
    let result = match random.below(16) {
        0 => conversation.garbage(),
        1..=4 => conversation.shuffled(),
        5 => conversation.pipelined(),
        6..=8 => conversation.steps(),
        9 => conversation.distant(),
        _ => conversation.attack(random.pick(&ATTACKS), None),
    };
    judge(seed, conversation.told(), result)
}

/// Starts a queue properly, cuts the memory file short under it, and waits until the device says that it needs a reset.
///
/// # Errors
/// When it does not.
pub fn truncate_memory(socket: &Path, seed: u64) -> Result<Told, Misdeed> {
    let mut conversation = Conversation::begin(socket, seed, &Random::new(seed))?;
    let result = conversation.attack(Attack::Truncate, None);
    judge_truncation(seed, conversation.told(), result)
}

struct Conversation {
    wire: Wire,
    random: Random,
    told: Told,
    /// Messages until it hangs up.
    left: Option<u64>,
    places: Places,
    /// Device control, in the configuration space.
    control: u64,
}

impl Conversation {
    fn begin(socket: &Path, seed: u64, random: &Random) -> Result<Self, Misdeed> {
        let wire = Wire::connect(socket).map_err(|error| Misdeed::Refused { seed, error })?;
        let places = Places::default();
        Ok(Self { wire, random: random.clone(), told: Told::default(), left: None, places, control: 0 })
    }

    fn told(&mut self) -> Told {
        Told { resets: self.wire.resets, ..std::mem::take(&mut self.told) }
    }

    /// One more message, unless it is time to hang up: then half of it.
    fn count(&mut self, message: &Message) -> Result<(), End> {
        if let Some(left) = &mut self.left {
            let Some(fewer) = left.checked_sub(1) else {
                self.wire.send_half(message);
                return Err(End::Gone);
            };
            *left = fewer;
        }
        Ok(())
    }

    /// Sends a command; returns its reply's body, or `None` if it was refused.
    fn ask(&mut self, message: &Message) -> Result<Option<Vec<u8>>, End> {
        self.count(message)?;
        match self.wire.ask(message)? {
            Reply::Done(body) => Ok(Some(body)),
            Reply::Refused => Ok(None),
            Reply::Gone => Err(End::Gone),
        }
    }

    /// A command that must be done.
    fn insist(&mut self, message: &Message) -> Result<Vec<u8>, End> {
        let refused = || End::Owes(format!("command {} was refused, and is right: {:?}", message.code, message.body));
        self.ask(message)?.ok_or_else(refused)
    }

    fn read(&mut self, region: u32, offset: u64, count: u32) -> Result<Vec<u8>, End> {
        let body = self.insist(&region_read(region, offset, count))?;
        match body.get(size_of::<RegionAccess>()..) {
            Some(data) if data.len() == count as usize => Ok(data.to_vec()),
            _ => Err(End::Owes(format!("{} bytes, where {count} were asked for", body.len()))),
        }
    }

    fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), End> {
        self.insist(&region_write(region, offset, data)).map(drop)
    }

    fn write_common(&mut self, field: u64, data: &[u8]) -> Result<(), End> {
        self.write(REGION_BAR, self.places.common + field, data)
    }

    fn status(&mut self) -> Result<u8, End> {
        self.read(REGION_BAR, self.places.common + common::STATUS, 1).map(|bytes| bytes[0])
    }

    /// Writes the status, which then must be as `right` says.
    fn set_status(&mut self, status: u8, right: u8) -> Result<(), End> {
        self.write_common(common::STATUS, &[status])?;
        let now = self.status()?;
        if now == right { Ok(()) } else { Err(End::Owes(format!("status {now}, where {right} is right"))) }
    }

    /// Agrees on a version, and looks around.
    fn greet(&mut self) -> Result<(), End> {
        let transfer = self.random.pick(&[None, None, Some(0), Some(7), Some(4096), Some(u32::MAX)]);
        let capabilities = Capabilities { max_data_xfer_size: transfer, ..Capabilities::default() };
        let version = VersionBody { major: 0, minor: self.random.pick(&[0, 1, 7]) };
        self.insist(&message(command::VERSION, &[version.as_bytes(), &version_text(&capabilities)]))?;
        let space = self.read(REGION_CONFIG, 0, 256)?;
        self.places = Places::find(&space).ok_or_else(|| End::Owes("it is no virtio function".to_owned()))?;
        let express = (0x40..0xf0).step_by(4).find(|at| space[*at] == ID_EXPRESS && space[*at + 2] & 15 == 2);
        self.control = express.unwrap_or(0) as u64 + 8;
        self.write(REGION_CONFIG, COMMAND_AT, &ENABLED)
    }

    fn map(share: &Share, by_descriptor: bool) -> Result<Message, End> {
        let map = DmaMap {
            argsz: size_of::<DmaMap>() as u32,
            flags: MAP_READ_WRITE,
            offset: share.offset,
            address: share.guest,
            size: share.bytes,
        };
        let fd = if by_descriptor { Some(share.fd()?) } else { None };
        Ok(message(command::DMA_MAP, &[map.as_bytes()]).with(fd))
    }

    fn unmap(share: &Share) -> Message {
        let argsz = size_of::<DmaUnmap>() as u32;
        let unmap = DmaUnmap { argsz, flags: 0, address: share.guest, size: share.bytes };
        message(command::DMA_UNMAP, &[unmap.as_bytes()])
    }

    /// Maps a guest's memory; the first region by descriptor or not.
    fn share(&mut self, guest: &Guest, distant: Option<Manner>) -> Result<(), End> {
        if let Some(manner) = distant {
            self.wire.answer_for(&guest.shares[0], manner)?;
        }
        for (number, share) in guest.shares.iter().enumerate() {
            self.insist(&Self::map(share, distant.is_none() || number > 0)?)?;
        }
        Ok(())
    }

    /// From reset to the agreed features, which are returned.
    fn negotiate(&mut self) -> Result<u64, End> {
        for status in [0, 1, DRIVER] {
            self.set_status(status, status)?;
        }
        let mut offered = 0;
        for half in 0..2_u32 {
            self.write_common(common::DEVICE_FEATURE_SELECT, &half.to_le_bytes())?;
            let bits = self.read(REGION_BAR, self.places.common + common::DEVICE_FEATURE, 4)?;
            offered |= bits.iter().rev().fold(0, |all, byte| all << 8 | u64::from(*byte)) << (32 * half);
        }
        let optional = features::INDIRECT
            | features::EVENT_INDEX
            | features::RING_PACKED
            | features::IN_ORDER
            | features::NOTIFICATION_DATA
            | features::RING_RESET;
        let accepted = offered & (!optional | self.random.next());
        self.write_features(accepted)?;
        self.set_status(FEATURES_OK, FEATURES_OK)?;
        Ok(accepted)
    }

    fn write_features(&mut self, bits: u64) -> Result<(), End> {
        for half in 0..2_u32 {
            self.write_common(common::DRIVER_FEATURE_SELECT, &half.to_le_bytes())?;
            self.write_common(common::DRIVER_FEATURE, &((bits >> (32 * half)) as u32).to_le_bytes())?;
        }
        Ok(())
    }

    fn describe(&mut self, index: u16, size: u16, areas: [u64; 3]) -> Result<(), End> {
        self.write_common(common::QUEUE_SELECT, &index.to_le_bytes())?;
        self.write_common(common::QUEUE_SIZE, &size.to_le_bytes())?;
        self.write_common(common::QUEUE_VECTOR, &(index + 1).to_le_bytes())?;
        let fields = [common::QUEUE_DESCRIPTORS, common::QUEUE_DRIVER, common::QUEUE_DEVICE];
        for (field, at) in fields.into_iter().zip(areas) {
            self.write_common(field, &at.to_le_bytes())?;
        }
        self.write_common(common::QUEUE_ENABLE, &1_u16.to_le_bytes())
    }

    /// Starts a queue properly, and the device with it.
    fn start(&mut self, guest: &Guest, ring: &Ring, index: u16, events: &Events) -> Result<(), End> {
        self.insist(&connect(u32::from(index) + 1, [&events.call])?)?;
        self.describe(index, ring.size, Ring::areas(guest))?;
        self.set_status(DRIVER_OK, DRIVER_OK)
    }

    /// Rings the doorbell and waits for what must come.
    fn wait_for(&mut self, guest: &Guest, index: u16, outcome: Outcome) -> Result<(), End> {
        let at = self.places.notify + self.places.notify_bytes * u64::from(index);
        let bell =
            Message { flags: TYPE_COMMAND | FLAG_NO_REPLY, ..region_write(REGION_BAR, at, &index.to_le_bytes()) };
        self.ask(&bell)?;
        let mut told = std::mem::take(&mut self.told);
        let done = wait_for(&mut told, guest, outcome, |_| Ok(self.status()? & NEEDS_RESET != 0));
        self.told = told;
        done
    }

    /// Resets the device, in one of the ways that there are.
    fn reset(&mut self) -> Result<(), End> {
        match self.random.below(3) {
            0 => return self.set_status(0, 0),
            1 => drop(self.insist(&message(command::DEVICE_RESET, &[]))?),
            _ => self.write(REGION_CONFIG, self.control, &0x8000_u16.to_le_bytes())?,
        }
        self.write(REGION_CONFIG, COMMAND_AT, &ENABLED)
    }

    /// Bytes that are no messages.
    fn garbage(&mut self) -> Result<(), End> {
        "garbage".clone_into(&mut self.told.about);
        self.wire.garbage(&mut self.random)
    }

    /// Real messages in any order.
    fn shuffled(&mut self) -> Result<(), End> {
        "shuffled messages".clone_into(&mut self.told.about);
        let mut guest = Guest::new(&mut self.random, &FILE_OFFSETS)?;
        let events = Events::new()?;
        let is_proper = !self.random.one_in(4);
        if is_proper {
            self.greet()?;
            self.share(&guest, None)?;
            if self.random.one_in(2) {
                let accepted = self.negotiate()?;
                let mut ring = self.ring(&guest, accepted);
                self.start(&guest, &ring, 0, &events)?;
                let outcome = good(&mut guest, &mut ring);
                self.wait_for(&guest, 0, outcome)?;
            }
        }
        let spoil = self.random.pick(&[0, 4, 20]);
        for _ in 0..self.random.below(80) {
            let mut message = any_message(&mut self.random, &guest, &events, self.control)?;
            if spoil != 0 && self.random.one_in(spoil) {
                message.spoil(&mut self.random);
                self.wire.spoiled = true;
            }
            self.ask(&message)?;
        }
        if is_proper && !self.wire.spoiled {
            // Whatever was written, it is still what it was.
            let id = self.read(REGION_CONFIG, 0, 4)?;
            if id[..2] != 0x1af4_u16.to_le_bytes() {
                return Err(End::Owes(format!("the function has become {id:?}")));
            }
        }
        Ok(())
    }

    /// Many commands before a reply is read: the replies come in the commands' order; or nobody ever reads them.
    fn pipelined(&mut self) -> Result<(), End> {
        "pipelined".clone_into(&mut self.told.about);
        self.greet()?;
        if self.random.one_in(2) {
            // Until the card, whose replies nobody takes, does not take any more either.
            for _ in 0..4096 {
                if !self.wire.send(&region_read(REGION_CONFIG, 0, 4096)) {
                    break;
                }
            }
            return Ok(());
        }
        let first = self.wire.ids_used();
        for _ in 0..64 {
            if !self.wire.send(&region_read(REGION_CONFIG, 0, 64)) {
                return Err(End::Gone);
            }
        }
        for number in 1..=64 {
            self.wire.reply(first.wrapping_add(number), command::REGION_READ)?;
        }
        Ok(())
    }

    /// A driver that does not keep to the order of things (virtio 1.3, 3.1.1), and then one that does.
    fn steps(&mut self) -> Result<(), End> {
        let mut guest = Guest::new(&mut self.random, &FILE_OFFSETS)?;
        let events = Events::new()?;
        self.greet()?;
        self.share(&guest, None)?;
        let [table, driver, device] = Ring::areas(&guest);
        let way = self.random.below(8);
        self.told.about = format!("steps left out: {way}");
        match way {
            0 => {
                // No features were agreed upon, so nothing comes of the rest.
                self.set_status(0, 0)?;
                self.set_status(4, 0)?;
                self.set_status(8, 0)?;
                self.set_status(DRIVER | 4, DRIVER)?;
            }
            1 => {
                self.set_status(0, 0)?;
                self.set_status(DRIVER, DRIVER)?;
                // One that no device has (virtio 1.3, 6).
                self.write_features(features::VERSION_1 | 1 << 63)?;
                self.set_status(FEATURES_OK, DRIVER)?;
                self.set_status(DRIVER_OK, DRIVER)?;
            }
            2 => {
                self.set_status(0, 0)?;
                self.set_status(DRIVER, DRIVER)?;
                self.describe(0, 16, [table, driver, device])?;
                self.expect_enabled(0)?;
            }
            3 => {
                self.negotiate()?;
                let bad = [guest.end(), table + 1, driver + 1, u64::MAX, u64::MAX - 15, 1 << 63];
                let mut areas = [table, driver, device];
                // An odd driver area is an odd one in any ring; the descriptors' alignment is the strictest.
                areas[self.random.below(3) as usize] = self.random.pick(&bad);
                self.describe(0, 16, areas)?;
                self.set_status(DRIVER_OK, DRIVER_OK | NEEDS_RESET)?;
                self.told.faults += 1;
            }
            4 => {
                // Described after the device was started, and again while it runs.
                self.negotiate()?;
                self.set_status(DRIVER_OK, DRIVER_OK)?;
                self.describe(1, 16, [table, driver, device])?;
                self.describe(1, 8, [u64::MAX, 1, 3])?;
                let size = self.read(REGION_BAR, self.places.common + common::QUEUE_SIZE, 2)?;
                if size != 16_u16.to_le_bytes() {
                    return Err(End::Owes(format!("a running queue became {size:?} long")));
                }
                self.set_status(DRIVER_OK, DRIVER_OK)?;
            }
            5 => {
                // The function may not reach memory, and then it may, when the memory has gone.
                self.write(REGION_CONFIG, COMMAND_AT, &[0, 0])?;
                self.negotiate()?;
                self.describe(0, 16, [table, driver, device])?;
                self.set_status(DRIVER_OK, DRIVER_OK)?;
                self.insist(&Self::unmap(&guest.shares[0]))?;
                self.write(REGION_CONFIG, COMMAND_AT, &ENABLED)?;
                if self.status()? & NEEDS_RESET == 0 {
                    return Err(End::Owes("a queue without memory seems to run".to_owned()));
                }
                self.told.faults += 1;
                self.insist(&Self::map(&guest.shares[0], true)?)?;
            }
            6 => {
                // A queue that is right, and one that cannot start: the function stops as a whole.
                let accepted = self.negotiate()?;
                let mut ring = self.ring(&guest, accepted);
                self.describe(0, ring.size, [table, driver, device])?;
                self.describe(1, 16, [guest.end(), driver, device])?;
                self.set_status(DRIVER_OK, DRIVER_OK | NEEDS_RESET)?;
                self.told.faults += 1;
                let outcome = good(&mut guest, &mut ring);
                for _ in 0..8 {
                    self.wait_for(&guest, 0, Outcome::Any)?;
                }
                if let Outcome::Status(at, _) = outcome
                    && guest.byte(at) != NO_STATUS
                {
                    return Err(End::Owes("a function that needs a reset goes on".to_owned()));
                }
            }
            _ => {
                let accepted = self.negotiate()?;
                // A queue that there is not.
                self.describe(self.random.clone().pick(&[2, 3, 512, 0xfffe]), 16, [table, driver, device])?;
                self.expect_enabled(0)?;
                self.set_status(DRIVER_OK, DRIVER_OK)?;
                if accepted & features::RING_RESET != 0 {
                    self.write_common(common::QUEUE_RESET, &1_u16.to_le_bytes())?;
                }
            }
        }
        self.reset()?;
        self.use_well(guest, &events)
    }

    /// Whether the selected queue says that it is enabled.
    fn expect_enabled(&mut self, right: u8) -> Result<(), End> {
        let enabled = self.read(REGION_BAR, self.places.common + common::QUEUE_ENABLE, 2)?;
        if enabled == [right, 0] { Ok(()) } else { Err(End::Owes(format!("queue enable is {enabled:?}"))) }
    }

    /// From reset to a request that must end well.
    fn use_well(&mut self, mut guest: Guest, events: &Events) -> Result<(), End> {
        let accepted = self.negotiate()?;
        let mut ring = self.ring(&guest, accepted);
        self.start(&guest, &ring, 0, events)?;
        let outcome = good(&mut guest, &mut ring);
        self.wait_for(&guest, 0, outcome)
    }

    /// Memory that the card must ask for, and a VMM that answers as it likes.
    fn distant(&mut self) -> Result<(), End> {
        let manners = [Manner::Honest, Manner::Twice, Manner::Refusing, Manner::TooLong, Manner::Empty];
        let manner = if self.random.one_in(16) { Manner::Silent } else { self.random.pick(&manners) };
        if manner == Manner::Honest {
            let attack = self.random.pick(&ATTACKS);
            return if attack == Attack::Truncate { Ok(()) } else { self.attack(attack, Some(manner)) };
        }
        self.told.about = format!("memory by messages: {manner:?}");
        let mut guest = Guest::new(&mut self.random, &FILE_OFFSETS)?;
        let events = Events::new()?;
        self.greet()?;
        self.share(&guest, Some(manner))?;
        let accepted = self.negotiate()?;
        let mut ring = self.ring(&guest, accepted);
        let outcome = good(&mut guest, &mut ring);
        self.insist(&connect(1, [&events.call])?)?;
        self.describe(0, ring.size, Ring::areas(&guest))?;
        self.write_common(common::STATUS, &[DRIVER_OK])?;
        self.wait_for(&guest, 0, if manner == Manner::Twice { outcome } else { Outcome::Fault })?;
        // It goes on with one that answers.
        self.wire.answer_for(&guest.shares[0], Manner::Honest)?;
        self.reset()?;
        self.use_well(guest, &events)
    }

    fn ring(&mut self, guest: &Guest, accepted: u64) -> Ring {
        Ring::any(guest, accepted & features::RING_PACKED != 0, &mut self.random)
    }

    /// A proper start, and then a ring that is wrong.
    fn attack(&mut self, attack: Attack, distant: Option<Manner>) -> Result<(), End> {
        self.told.about = format!("{attack:?}, {distant:?}");
        let mut guest = Guest::new(&mut self.random, &FILE_OFFSETS)?;
        self.greet()?;
        self.share(&guest, distant)?;
        for round in 0..=self.random.below(2) {
            if round > 0 {
                // The driver resets the device and goes on: what went before must not be felt.
                self.reset()?;
            }
            let accepted = self.negotiate()?;
            let mut ring = self.ring(&guest, accepted);
            let events = Events::new()?;
            let index = self.random.below(2) as u16;
            self.start(&guest, &ring, index, &events)?;
            if self.random.one_in(4) {
                events.block();
            }
            if self.random.one_in(2) {
                let outcome = good(&mut guest, &mut ring);
                self.wait_for(&guest, index, outcome)?;
            }
            let outcome = attack.write(&mut guest, &mut ring, accepted, &mut self.random);
            self.wait_for(&guest, index, outcome)?;
            if attack == Attack::Truncate {
                return Ok(());
            }
            if self.random.one_in(4) {
                // Memory that is in use goes away, and comes back.
                self.insist(&Self::unmap(&guest.shares[0]))?;
                if self.random.one_in(2) {
                    return Ok(());
                }
                self.insist(&Self::map(&guest.shares[0], distant.is_none())?)?;
            }
        }
        Ok(())
    }
}

/// Gives MSI-X vectors their events.
fn connect<'a>(vector: u32, events: impl IntoIterator<Item = &'a EventFd>) -> Result<Message, End> {
    let fds = events.into_iter().map(again).collect::<Result<Vec<_>, _>>()?;
    let argsz = size_of::<IrqSet>() as u32;
    let set = IrqSet { argsz, flags: IRQ_EVENTS, index: IRQ_MSIX, start: vector, count: fds.len() as u32 };
    Ok(message(command::DEVICE_SET_IRQS, &[set.as_bytes()]).with(fds))
}
