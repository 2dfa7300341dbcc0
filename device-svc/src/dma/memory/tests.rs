#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::sync::atomic::AtomicBool;

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::*;

fn mapping(bytes: u64) -> Arc<Mapping> {
    let fd = memfd_create(c"ram", MFdFlags::MFD_CLOEXEC).unwrap();
    nix::unistd::ftruncate(&fd, bytes as i64).unwrap();
    Arc::new(Mapping::new(&fd, 0, bytes).unwrap())
}

fn region(start: u64, length: u64, mapping: &Arc<Mapping>, offset: usize) -> Region {
    Region::new(Iova(start), length, Arc::clone(mapping), offset).unwrap()
}

#[test]
fn a_range_that_spans_regions_is_found_in_runs() {
    let ram = mapping(0x4000);
    let memory = HostMemory::new([region(0x2000, 0x1000, &ram, 0x3000), region(0x1000, 0x1000, &ram, 0)]).unwrap();
    let base = ram.as_ptr();
    let runs: Vec<_> = memory.runs(Iova(0x1ff0), 0x20, Direction::FromHost).collect();
    assert_eq!(runs, [(base.wrapping_add(0xff0), 0x10), (base.wrapping_add(0x3000), 0x10)]);
    assert!(memory.covers(Iova(0x1000), 0x2000) && !memory.covers(Iova(0x1000), 0x2001));
    assert!(!memory.covers(Iova(0xfff), 1) && !memory.covers(Iova(u64::MAX), 2));
}

#[test]
fn a_range_may_end_within_a_page() {
    let ram = mapping(0x3000);
    let memory = HostMemory::new([region(0x1000, 0x1801, &ram, 0), region(0x3000, 1, &ram, 0)]).unwrap();
    assert!(memory.covers(Iova(0x2000), 0x801) && memory.covers(Iova(0x3000), 1));
    assert!([0x2801, 0x2fff, 0x3001].iter().all(|at| memory.find(Iova(*at)).is_none()));
    assert_eq!(memory.resolve(Iova(0x2800), 2, Direction::FromHost), Some((ram.as_ptr().wrapping_add(0x1800), 1)));
}

#[test]
fn access_is_what_the_region_allows() {
    let ram = mapping(0x3000);
    let regions = [Access::Read, Access::Write, Access::None]
        .into_iter()
        .zip(1_u64..)
        .map(|(access, page)| region(page * 0x1000, 0x1000, &ram, 0).with_access(access));
    let memory = HostMemory::new(regions.collect::<Vec<_>>()).unwrap();
    let may = |page: u64, direction| memory.resolve(Iova(page * 0x1000), 1, direction).is_some();
    let all = [1, 2, 3].map(|page| (may(page, Direction::FromHost), may(page, Direction::ToHost)));
    assert_eq!(all, [(true, false), (false, true), (false, false)]);
}

#[test]
fn distant_memory_is_reached_by_who_can_ask_for_it() {
    let ram = mapping(0x1000);
    let fill = |memory: HostMemory| {
        memory.insert(region(0x1000, 0x1000, &ram, 0)).unwrap();
        memory.insert(Region::distant(Iova(0x2000), 0x1000).unwrap()).unwrap();
        memory
    };
    let guest = Arc::new(crate::driver::GuestMemory::new(0x2000, 0x1000).unwrap());
    let peer = crate::dma::distant::tests::peer(&guest, 1);
    let (alone, asking) = (fill(HostMemory::default()), fill(HostMemory::with_distant(peer)));
    let reaches = |memory: &HostMemory, length| memory.reaches(Iova(0x1000), length, Direction::FromHost);
    assert!(reaches(&alone, 0x1000) && !reaches(&alone, 0x1001));
    assert!(reaches(&asking, 0x2000) && !reaches(&asking, 0x2001));
    assert!(!asking.covers(Iova(0x1000), 0x2000));
    assert!(asking.resolve(Iova(0x2000), 1, Direction::FromHost).is_none());
}

#[test]
fn what_is_no_region_is_refused() {
    let ram = mapping(0x2000);
    let of = |start, length, offset| Region::new(Iova(start), length, Arc::clone(&ram), offset).is_ok();
    assert!(of(0x1000, 0x2000, 0) && of(!0xfff - 0x1000, 0x1000, 0x1000));
    for (start, length, offset) in
        [(0, 0, 0), (1, 0x1000, 0), (0, 0x2001, 0), (0, 0x3000, 0), (0, 0x1000, 0x1001), (!0xfff, 0x1000, 0)]
    {
        assert!(!of(start, length, offset), "{start:#x} {length:#x} {offset:#x}");
    }
    let memory = HostMemory::new([region(0x10000, 0x2000, &ram, 0)]).unwrap();
    for (start, length) in [(0x10000, 0x2000), (0xf000, 0x2000), (0x11000, 0x1000), (0x11000, 0x2000)] {
        assert!(memory.insert(region(start, length, &ram, 0)).is_err(), "{start:#x} {length:#x}");
    }
    assert_eq!(memory.regions().len(), 1);
}

#[test]
fn a_removal_takes_what_is_inside_and_cuts_nothing() {
    let ram = mapping(0x2000);
    let memory = Arc::new(HostMemory::default());
    for start in [0x1000, 0x3000, 0x5000] {
        memory.insert(region(start, 0x2000, &ram, 0)).unwrap();
    }
    for (start, length) in [(0x2000, 0x1000), (0x1000, 0x3000), (0x2000, 0x5000), (0x6000, 1)] {
        let refused = memory.remove(Iova(start), length).unwrap_err();
        assert!(matches!(refused, MemoryError::Cut { .. }), "{start:#x} {length:#x}: {refused}");
    }
    assert!(memory.remove(Iova(0), 0).is_err() && memory.remove(Iova(5), u64::MAX).is_err());
    assert!(memory.remove(Iova(0x7000), 0x1000).unwrap().is_empty());
    let removed = memory.remove(Iova(0x3000), 0x4000).unwrap();
    assert!(!removed.is_empty() && removed.touches(Iova(0x6fff), 1) && !removed.touches(Iova(0x7000), 1));
    assert!(memory.covers(Iova(0x1000), 0x2000) && memory.find(Iova(0x3000)).is_none());
    assert_eq!(memory.regions().len(), 1);
}

/// What was removed stays mapped, and its places in the table unused, until nobody can be using it.
#[test]
fn removed_memory_stays_until_it_is_let_go() {
    let ram = mapping(0x1000);
    let gone = Arc::downgrade(&ram);
    let memory = Arc::new(HostMemory::new([region(0x1000, 0x1000, &ram, 0)]).unwrap());
    drop(ram);
    let removed = memory.remove(Iova(0x1000), 0x1000).unwrap();
    assert!(gone.upgrade().is_some());
    memory.insert(region(0x1000, 0x1000, &mapping(0x1000), 0)).unwrap();
    assert_eq!(memory.writer().records, 2, "its place was not taken");
    drop(removed);
    assert!(gone.upgrade().is_none());
    memory.insert(region(0x2000, 0x1000, &mapping(0x1000), 0)).unwrap();
    assert_eq!(memory.writer().records, 2);
}

/// Ranges come and go in one thread while another looks them up: it finds the right bytes or nothing.
#[test]
fn lookups_go_on_while_the_table_changes() {
    const PAGES: u64 = 512;
    let ram = mapping(PAGES * 0x1000);
    let page = |number: u64| region((number + 7) * 0x1000, 0x1000, &ram, (number * 0x1000) as usize);
    let memory = Arc::new(HostMemory::default());
    let (base, ended) = (ram.as_ptr().expose_provenance(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                for number in 0..PAGES {
                    let address = Iova((number + 7) * 0x1000 + number);
                    let expected = base + (number * 0x1000 + number) as usize;
                    if let Some((at, run)) = memory.resolve(address, 0x1000, Direction::ToHost) {
                        assert_eq!((at.addr(), run), (expected, 0x1000 - number));
                    }
                }
            }
        });
        for _ in 0..100 {
            (0..PAGES).for_each(|number| memory.insert(page(number)).unwrap());
            // As long as a reader may be there, places are not given back.
            let removed: Vec<_> =
                (0..PAGES).map(|number| memory.remove(Iova((number + 7) * 0x1000), 0x1000).unwrap()).collect();
            std::mem::forget(removed);
        }
        ended.store(true, Ordering::Relaxed);
        assert!(reader.join().is_ok());
    });
}

#[test]
fn there_is_an_end_to_ranges() {
    let ram = mapping(0x1000);
    let memory = Arc::new(HostMemory::default());
    for number in 0..RANGES_MAX as u64 {
        memory.insert(region(number * 0x2000, 0x1000, &ram, 0)).unwrap();
    }
    let one_more = region(1 << 40, 0x1000, &ram, 0);
    assert!(matches!(memory.insert(one_more.clone()), Err(MemoryError::TooMany(_))));
    drop(memory.remove(Iova(0), 0x1000).unwrap());
    memory.insert(one_more).unwrap();
}
