//! The record of a packed ring (`QueueRegionPacked`): a copy of the descriptors of each request in flight, because the ring's own
//! slots are written over by used descriptors.
//!
//! ```text
//!   fetched     entries from the free list are filled ─► both free heads move behind those of the whole batch, in one store
//!   published   descriptors but the first's flags ─► entries back on the free list, used place moves (the old ones stay)
//!                 ─► flags of the first descriptor ─► `inflight` cleared ─► the old free head and used place follow
//! ```
//!
//! A process that dies in the second line leaves the two used places different, wrap counters included (a batch may be a whole lap).
//! The ring tells whether the batch was published: the first descriptor at the old place is available as long as it was not.
//! In that case used descriptors may stand behind it already, which the mirror takes back. Nothing is fetched between the two, so that entries of a batch that is not yet visible are not written over.

use super::memory::{FreeHeads, PackedEntry, PackedHeader, Region, UsedPlaces};
use super::{QueueRecord, RecordFault, VERSION, check_header};
use crate::virtqueue::packed::{PackedRing, Place};
use crate::virtqueue::{DESCRIPTOR_INDIRECT, PackedDescriptor};

/// A request in flight as the record has it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RecordedChain {
    /// Its first entry.
    pub entry: u16,
    /// Its descriptors in the ring.
    pub descriptors: Vec<PackedDescriptor>,
}

/// The record of one packed ring.
#[derive(Debug)]
pub struct PackedRecord {
    region: Region<PackedHeader, PackedEntry>,
    heads: FreeHeads,
    places: UsedPlaces,
    /// Whether anybody has written to it.
    known: bool,
    /// Our copy of the entries' links.
    links: Box<[Links]>,
    free_head: u16,
    counter: u64,
    /// A batch is being published.
    is_linked: bool,
}

/// Where an entry leads to.
#[derive(Clone, Copy, Default, Debug)]
struct Links {
    /// The next one; that of the last free entry leads nowhere.
    next: u16,
    /// Of a chain's first entry: the chain's last one.
    last: u16,
}

/// A batch whose entries are being filled.
#[derive(Debug)]
pub struct Filling<'a> {
    entries: &'a [PackedEntry],
    /// As many.
    links: &'a mut [Links],
    /// The first entry that is free and not filled.
    end: u16,
    counter: u64,
}

impl Filling<'_> {
    /// The next chain has these descriptors, one or more. Returns its first entry.
    #[inline(always)]
    pub fn chain(&mut self, descriptors: impl Iterator<Item = PackedDescriptor>) -> u16 {
        let entries = self.entries;
        // Of the same length, which saves a check for each descriptor.
        let links = &mut self.links[..entries.len()];
        let head = self.end;
        let (mut next, mut last, mut count) = (head, head, 0);
        for descriptor in descriptors {
            let number = usize::from(next);
            entries[number].put(descriptor);
            last = next;
            next = links[number].next;
            count += 1;
        }
        let first = &entries[usize::from(head)];
        first.num.set(count);
        first.last.set(last);
        first.counter.set(self.counter);
        first.inflight.set(1);
        links[usize::from(head)].last = last;
        self.counter = self.counter.wrapping_add(1);
        self.end = next;
        head
    }
}

const fn place_of((slot, wrap): (u16, u8)) -> Place {
    Place { slot, wrap: wrap != 0 }
}

const fn encode(place: Place) -> (u16, u8) {
    (place.slot, place.wrap as u8)
}

impl PackedRecord {
    /// The record that is there, for a ring of `size` slots; [`attach`](Self::attach) comes next.
    ///
    /// # Errors
    /// When it cannot be this ring's record.
    pub fn new(record: &QueueRecord, size: u16) -> Result<Self, RecordFault> {
        let entries = record.entries;
        let region: Region<PackedHeader, PackedEntry> = record.region(entries);
        let header = region.header();
        let known = check_header(header.version.get(), header.features.get(), header.desc_num.get(), entries, size)?;
        let (heads, places) = if known {
            (FreeHeads::decode(header.free_heads.get()), UsedPlaces::decode(header.used_places.get()))
        } else {
            (FreeHeads { new: 0, old: 0 }, UsedPlaces { new: (0, 0), old: (0, 0) })
        };
        for (slot, _) in [places.new, places.old] {
            if slot >= size {
                return Err(RecordFault::NoSuchEntry { number: slot, size });
            }
        }
        Ok(Self {
            region,
            heads,
            places,
            known,
            links: vec![Links::default(); usize::from(entries)].into_boxed_slice(),
            free_head: 0,
            counter: 1,
            is_linked: false,
        })
    }

    /// The slot whose flags tell whether the last batch was published.
    #[must_use]
    pub const fn doubtful_slot(&self) -> u16 {
        self.places.old.0
    }

    /// Takes the record up; `flags` are those in the ring at the [`doubtful_slot`](Self::doubtful_slot), and `start` is where the front
    /// end says that the next used descriptor goes. Returns where it does go, and the requests in flight in the order in which they
    /// were fetched; `None` of a record that nobody has written to: that one starts at `start`.
    ///
    /// A record says where the next available descriptor is, too: behind the slots of the requests in flight.
    ///
    /// # Errors
    /// When its lists are broken.
    pub fn attach(
        &mut self,
        size: u16,
        start: Place,
        flags: u16,
    ) -> Result<Option<(Place, Vec<RecordedChain>)>, RecordFault> {
        if !self.known {
            self.begin(start);
            return Ok(None);
        }
        let UsedPlaces { new, old } = self.places;
        let published = place_of(new) != place_of(old) && !PackedRing::is_available(flags, place_of(old));
        let (head, used) = if published { (self.heads.new, new) } else { (self.heads.old, old) };
        let mut taken = vec![false; self.links.len()];
        self.read_free_list(head, &mut taken)?;
        self.free_head = head;
        self.heads = FreeHeads { new: head, old: head };
        self.region.header().free_heads.set(self.heads.encode());
        let in_flight = self.read_chains(size, &mut taken)?;
        self.places = UsedPlaces { new: used, old: used };
        self.region.header().used_places.set(self.places.encode());
        Ok(Some((place_of(used), in_flight)))
    }

    /// Writes a fresh record.
    fn begin(&mut self, start: Place) {
        let header = self.region.header();
        let entries = self.region.count();
        for number in 0..entries {
            let entry = self.region.entry(number);
            entry.inflight.set(0);
            entry.next.set(number + 1);
            self.links[usize::from(number)].next = number + 1;
        }
        header.features.set(0);
        header.desc_num.set(entries);
        header.free_heads.set(self.heads.encode());
        self.places = UsedPlaces { new: encode(start), old: encode(start) };
        header.used_places.set(self.places.encode());
        header.version.set(VERSION);
    }

    /// Copies the list of free entries, and clears them.
    fn read_free_list(&mut self, head: u16, taken: &mut [bool]) -> Result<(), RecordFault> {
        let entries = self.region.count();
        let mut number = head;
        while number < entries {
            if std::mem::replace(&mut taken[usize::from(number)], true) {
                return Err(RecordFault::Lists);
            }
            let entry = self.region.entry(number);
            entry.inflight.set(0);
            self.links[usize::from(number)].next = entry.next.get();
            number = self.links[usize::from(number)].next;
        }
        Ok(())
    }

    /// Copies the chains in flight, which must account for every entry that is not free.
    fn read_chains(&mut self, size: u16, taken: &mut [bool]) -> Result<Vec<RecordedChain>, RecordFault> {
        let entries = self.region.count();
        let mut found = Vec::new();
        let mut slots = 0;
        for head in 0..entries {
            let first = self.region.entry(head);
            if taken[usize::from(head)] || first.inflight.get() == 0 {
                continue;
            }
            let (num, last) = (first.num.get(), first.last.get());
            let mut descriptors = Vec::new();
            let mut number = head;
            for index in 0..num {
                if number >= entries || std::mem::replace(&mut taken[usize::from(number)], true) {
                    return Err(RecordFault::Lists);
                }
                let entry = self.region.entry(number);
                let descriptor = entry.descriptor();
                // On the ring a chain ends with the descriptor that leads to a table.
                if descriptor.flags & DESCRIPTOR_INDIRECT != 0 && index + 1 < num {
                    return Err(RecordFault::Lists);
                }
                descriptors.push(descriptor);
                self.links[usize::from(number)].next = entry.next.get();
                if index + 1 == num && number != last {
                    return Err(RecordFault::Lists);
                }
                number = self.links[usize::from(number)].next;
            }
            // A chain takes a slot for each descriptor, and all of them are on the ring.
            slots += u32::from(num);
            if num == 0 || slots > u32::from(size) {
                return Err(RecordFault::Lists);
            }
            self.links[usize::from(head)].last = last;
            found.push((first.counter.get(), RecordedChain { entry: head, descriptors }));
        }
        if taken.iter().any(|taken| !taken) {
            return Err(RecordFault::Lists);
        }
        found.sort_unstable_by_key(|(counter, chain)| (*counter, chain.entry));
        self.counter = found.last().map_or(1, |(counter, _)| counter.wrapping_add(1));
        Ok(found.into_iter().map(|(_, chain)| chain).collect())
    }

    /// A batch has been fetched, and nothing is being published; `fill` fills entries for each of its chains in turn. They stay free, whatever
    /// is in them, until they are [marked](Self::mark). Returns the first entry behind them.
    ///
    /// The ring has room for each chain that is filled in, and has no more slots than the record has entries: there are free ones.
    #[inline]
    pub fn fill(&mut self, fill: impl FnOnce(&mut Filling<'_>)) -> u16 {
        debug_assert!(!self.is_linked, "nothing is fetched between linking and publishing");
        let entries = self.region.entries();
        let links = &mut self.links[..entries.len()];
        let mut filling = Filling { entries, links, end: self.free_head, counter: self.counter };
        fill(&mut filling);
        filling.end
    }

    /// The first `count` chains that were filled in are in flight when this returns, and nothing of them may begin before: up to then the
    /// ring still has them. `end` is the first entry behind theirs.
    #[inline]
    pub fn mark(&mut self, count: u16, end: u16) {
        self.free_head = end;
        self.counter = self.counter.wrapping_add(count.into());
        self.heads = FreeHeads { new: end, old: end };
        self.region.header().free_heads.set(self.heads.encode());
    }

    /// Of what was filled in last, the chains that start at these entries are not marked: they do not say so either.
    #[cold]
    pub fn forget(&mut self, entries: impl Iterator<Item = u16>) {
        entries.for_each(|head| self.region.entry(head).inflight.set(0));
    }

    /// Fills and marks a batch of these chains. Returns their first entries.
    #[cfg(test)]
    pub fn take(&mut self, chains: &[&[PackedDescriptor]]) -> Vec<u16> {
        let mut entries = Vec::new();
        let end = self.fill(|filling| {
            entries.extend(chains.iter().map(|chain| filling.chain(chain.iter().copied())));
        });
        self.mark(chains.len() as u16, end);
        entries
    }

    /// The chains that start at these entries are the whole batch that is about to be published, and the next used descriptor goes to
    /// `used`; the flags of the batch's first may follow.
    #[inline]
    pub fn link(&mut self, batch: impl Iterator<Item = u16>, used: Place) {
        let entries = self.region.entries();
        let links = &mut self.links[..entries.len()];
        let mut free = self.free_head;
        batch.for_each(|head| {
            let last = usize::from(links[usize::from(head)].last);
            entries[last].next.set(free);
            links[last].next = free;
            free = head;
        });
        self.free_head = free;
        self.is_linked = true;
        self.heads.new = free;
        self.region.header().free_heads.set(self.heads.encode());
        self.places.new = encode(used);
        self.region.header().used_places.set(self.places.encode());
    }

    /// The driver can see the batch that was linked last, of chains that start at these entries: it is done. Does nothing if that is
    /// known already.
    #[inline]
    pub fn complete(&mut self, batch: impl Iterator<Item = u16>) {
        if !std::mem::take(&mut self.is_linked) {
            return;
        }
        let entries = self.region.entries();
        batch.for_each(|head| entries[usize::from(head)].inflight.set(0));
        self.heads.old = self.heads.new;
        self.region.header().free_heads.set(self.heads.encode());
        self.places.old = self.places.new;
        self.region.header().used_places.set(self.places.encode());
    }
}
