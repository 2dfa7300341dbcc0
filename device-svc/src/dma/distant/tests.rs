#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use super::*;
use crate::dma::{Access, Mapping, Region};
use crate::driver::GuestMemory;

/// A VMM that is asked: it answers late, and takes no question now and then.
#[derive(Debug)]
pub struct Peer {
    memory: Arc<GuestMemory>,
    answers: Mutex<HashMap<u16, (u32, Vec<u8>)>>,
    random: AtomicU32,
    asked: AtomicU32,
    refuses: AtomicBool,
    silent: AtomicBool,
}

impl Peer {
    fn below(&self, limit: u32) -> u32 {
        let next = self.random.load(Ordering::Relaxed).wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        self.random.store(next, Ordering::Relaxed);
        (next >> 16) % limit
    }
}

impl DistantMemory for Peer {
    fn bytes_max(&self) -> u32 {
        100
    }

    fn ask(&self, at: Iova, question: Question<'_>) -> Result<Option<u16>, DmaFault> {
        if self.below(4) == 0 {
            return Ok(None);
        }
        let answer = match question {
            Question::Read(count) => {
                let mut bytes = vec![0; count as usize];
                self.memory.copy_out(at, &mut bytes);
                bytes
            }
            Question::Write(bytes) => {
                self.memory.copy_in(at, bytes);
                Vec::new()
            }
        };
        let id = self.asked.fetch_add(1, Ordering::Relaxed) as u16;
        self.answers.lock().unwrap().insert(id, (self.below(3), answer));
        Ok(Some(id))
    }

    fn answer(&self, id: u16, count: u32) -> Result<Option<Vec<u8>>, DmaFault> {
        if self.refuses.load(Ordering::Relaxed) {
            return Err(DmaFault);
        }
        if self.silent.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let mut answers = self.answers.lock().unwrap();
        let (later, bytes) = answers.get_mut(&id).unwrap();
        if *later > 0 {
            *later -= 1;
            return Ok(None);
        }
        assert!(bytes.is_empty() || bytes.len() == count as usize);
        Ok(answers.remove(&id).map(|(_, bytes)| bytes))
    }

    fn forget(&self, id: u16) {
        assert!(self.answers.lock().unwrap().remove(&id).is_some(), "nobody asked that");
    }
}

/// A VMM that has this memory; what it does by chance follows from `seed`.
pub fn peer(memory: &Arc<GuestMemory>, seed: u64) -> Arc<Peer> {
    Arc::new(Peer {
        memory: Arc::clone(memory),
        answers: Mutex::default(),
        random: AtomicU32::new(seed as u32),
        asked: AtomicU32::new(0),
        refuses: AtomicBool::new(false),
        silent: AtomicBool::new(false),
    })
}

/// A table of a guest's memory in which only every other page is mapped.
pub fn half_shared(memory: &GuestMemory, peer: &Arc<Peer>) -> Arc<HostMemory> {
    const PAGE: u64 = 4096;
    let table = HostMemory::with_distant(Arc::clone(peer) as Arc<dyn DistantMemory>);
    let mapping = Arc::new(Mapping::new(memory.file(), 0, memory.len()).unwrap());
    for at in (0..memory.len()).step_by(PAGE as usize) {
        let start = Iova(memory.base().0 + at);
        let region = if (at / PAGE).is_multiple_of(2) {
            Region::distant(start, PAGE)
        } else {
            Region::new(start, PAGE, Arc::clone(&mapping), at as usize)
        };
        table.insert(region.unwrap()).unwrap();
    }
    Arc::new(table)
}

const BASE: u64 = 0x10000;

fn bed() -> (Arc<GuestMemory>, Arc<Peer>, DistantEngine) {
    let memory = Arc::new(GuestMemory::new(BASE, 0x8000).unwrap());
    let peer = peer(&memory, 7);
    let table = half_shared(&memory, &peer);
    let engine = DistantEngine::new(CardMemory::new(0x8000).unwrap(), table, Arc::clone(&peer) as _);
    (memory, peer, engine)
}

fn land(engine: &mut DistantEngine) {
    let ticket = engine.submit();
    for _ in 0..100_000 {
        if engine.landed().unwrap() >= ticket {
            return;
        }
    }
    panic!("it never lands");
}

#[test]
fn copies_span_what_is_mapped_and_what_is_asked_for() {
    let (memory, peer, mut engine) = bed();
    let bytes: Vec<u8> = (0..0x6000_u32).map(|number| (number * 7) as u8 ^ (number >> 8) as u8).collect();
    engine.card().copy_in(CardAddress(0), &bytes);
    engine.write(CardAddress(0), Iova(BASE + 0x0fff), 0x6000).unwrap();
    engine.read(Iova(BASE + 0x0fff), CardAddress(0x1000), 0x6000).unwrap();
    assert!(!engine.is_idle());
    land(&mut engine);
    let mut seen = vec![0; 0x6000];
    memory.copy_out(Iova(BASE + 0x0fff), &mut seen);
    assert!(seen == bytes, "written");
    engine.card().copy_out(CardAddress(0x1000), &mut seen);
    assert!(seen == bytes, "and read back, in that order");
    assert!(engine.is_idle());
    let asked = peer.asked.load(Ordering::Relaxed);
    assert_eq!(asked, 2 * (1 + 3 * 41), "a byte and three pages each way, at most 100 bytes at a time");
    assert_eq!(engine.counters().transactions(), 2);
}

#[test]
fn indices_and_descriptors_are_copied_too() {
    let (memory, _, mut engine) = bed();
    for at in [BASE, BASE + 0x1000] {
        memory.put(Iova(at + 2), 0x1234_u16);
        engine.read_index(Iova(at + 2), CardAddress(0)).unwrap();
        engine.write_index(CardAddress(0), Iova(at + 8)).unwrap();
        land(&mut engine);
        assert_eq!(memory.get::<u16>(Iova(at + 8)), 0x1234);
    }
    let descriptors: Vec<u8> = (0..64).collect();
    memory.copy_in(Iova(BASE + 0x0fe0), &descriptors);
    engine.read_packed(Iova(BASE + 0x0fe0), CardAddress(64), 4).unwrap();
    land(&mut engine);
    let mut seen = vec![0; 64];
    engine.card().copy_out(CardAddress(64), &mut seen);
    assert_eq!(seen, descriptors);
}

/// The flags that are believed are those that were read before the rest.
#[test]
fn a_descriptor_that_becomes_available_in_between_is_not_believed_yet() {
    let (memory, peer, mut engine) = bed();
    engine.read_packed(Iova(BASE), CardAddress(0), 1).unwrap();
    peer.silent.store(true, Ordering::Relaxed);
    engine.submit();
    while peer.asked.load(Ordering::Relaxed) < 1 {
        engine.landed().unwrap();
    }
    memory.copy_in(Iova(BASE), &[0xff; 16]);
    peer.silent.store(false, Ordering::Relaxed);
    land(&mut engine);
    let mut seen = [0; 16];
    engine.card().copy_out(CardAddress(0), &mut seen);
    assert_eq!(seen[..14], [0xff; 14]);
    assert_eq!(seen[14..], [0, 0], "its flags are as they were");
}

#[test]
fn what_is_nowhere_or_forbidden_is_refused() {
    let (_, peer, mut engine) = bed();
    assert!(engine.read(Iova(BASE + 0x7ff0), CardAddress(0), 0x11).is_err());
    let table = HostMemory::with_distant(Arc::clone(&peer) as _);
    table.insert(Region::distant(Iova(BASE), 0x1000).unwrap().with_access(Access::Read)).unwrap();
    engine.set_memory(Arc::new(table));
    assert!(engine.write(CardAddress(0), Iova(BASE), 1).is_err());
    assert!(engine.read(Iova(BASE), CardAddress(0), 1).is_ok());
    land(&mut engine);
    assert!(engine.lend(Iova(BASE), 1, Direction::FromHost, &mut Vec::new()).is_err());
}

#[test]
fn a_refusal_is_a_fault_and_ends_all() {
    let (_, peer, mut engine) = bed();
    peer.refuses.store(true, Ordering::Relaxed);
    engine.read(Iova(BASE), CardAddress(0), 1).unwrap();
    engine.submit();
    while engine.landed().is_ok() {}
    assert!(engine.is_idle(), "nothing more will come");
}

#[test]
fn what_is_abandoned_is_forgotten() {
    let (_, peer, mut engine) = bed();
    for _ in 0..3 {
        engine.read(Iova(BASE), CardAddress(0), 1).unwrap();
    }
    peer.silent.store(true, Ordering::Relaxed);
    engine.submit();
    while peer.asked.load(Ordering::Relaxed) < 1 {
        engine.landed().unwrap();
    }
    engine.abandon();
    assert!(engine.is_idle() && peer.answers.lock().unwrap().is_empty());
}

/// Memory that goes is waited for only while a copy is in it.
#[test]
fn it_lets_go_when_nothing_is_there_any_more() {
    let (_, _, mut engine) = bed();
    engine.read(Iova(BASE + 0x2000), CardAddress(0), 1).unwrap();
    let table = Arc::clone(engine.memory());
    let elsewhere = table.remove(Iova(BASE + 0x4000), 0x1000).unwrap();
    assert!(engine.let_go(&elsewhere));
    let there = table.remove(Iova(BASE + 0x3000), 0x1000).unwrap();
    assert!(engine.let_go(&there));
    engine.read(Iova(BASE + 0x1fff), CardAddress(0), 1).unwrap();
    let there = table.remove(Iova(BASE + 0x1000), 0x1000).unwrap();
    assert!(!engine.let_go(&there));
    land_or_fault(&mut engine);
    assert!(engine.let_go(&there));
}

fn land_or_fault(engine: &mut DistantEngine) {
    let ticket = engine.submit();
    for _ in 0..100_000 {
        if engine.landed().is_err() || engine.landed().is_ok_and(|landed| landed >= ticket) {
            return;
        }
    }
    panic!("it never ends");
}
