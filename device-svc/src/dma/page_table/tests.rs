#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;

use proptest::prelude::*;

use super::*;

/// The last page number of a 64-bit address space.
const LAST: u64 = (1 << 52) - 1;

fn model_find(model: &BTreeMap<u64, (u64, u32)>, page: u64) -> Option<u32> {
    let (_, (last, record)) = model.range(..=page).next_back()?;
    (page <= *last).then_some(*record)
}

#[derive(Clone, Copy, Debug)]
enum Step {
    Insert(u64, u64),
    /// Removes the range that is next at or after this page.
    Remove(u64),
}

fn page() -> impl Strategy<Value = u64> {
    // Near each other, far apart, and at the edges of levels.
    prop_oneof![0..300_u64, (0..52_u32, 0..3_u64).prop_map(|(bit, more)| (1 << bit) - 1 + more), Just(LAST), 0..=LAST]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let length = prop_oneof![Just(1_u64), 1..200_u64, (0..52_u32).prop_map(|bit| 1 << bit)];
    let step = prop_oneof![
        3 => (page(), length).prop_map(|(first, length)| Step::Insert(first, length)),
        2 => page().prop_map(Step::Remove),
    ];
    prop::collection::vec(step, 1..60)
}

proptest! {
    #[test]
    fn it_finds_what_a_map_of_ranges_finds(steps in steps(), probes in prop::collection::vec(page(), 20)) {
        let (table, mut writer) = (PageTable::default(), PageTableWriter::default());
        let mut model: BTreeMap<u64, (u64, u32)> = BTreeMap::new();
        let mut record = 0;
        for step in steps {
            match step {
                Step::Insert(first, length) => {
                    let last = first.saturating_add(length - 1).min(LAST);
                    let before = model.range(..=last).next_back();
                    if before.is_some_and(|(_, (end, _))| *end >= first) {
                        continue;
                    }
                    record += 1;
                    writer.insert(&table, first..=last, record).unwrap();
                    model.insert(first, (last, record));
                }
                Step::Remove(at) => {
                    let Some((first, (last, _))) = model.range(at..).next().map(|(first, rest)| (*first, *rest)) else {
                        continue;
                    };
                    model.remove(&first);
                    let mut emptied = Vec::new();
                    writer.remove(&table, first..=last, &mut emptied);
                    writer.give_back(emptied);
                }
            }
            let edges = model.iter().flat_map(|(first, (last, _))| {
                [first.saturating_sub(1), *first, first.midpoint(*last), *last, (last + 1).min(LAST)]
            });
            for page in edges.chain(probes.iter().copied()) {
                prop_assert_eq!(table.find(page), model_find(&model, page), "page {:#x}", page);
            }
        }
        // Without ranges there are no nodes but the root.
        let ranges: Vec<_> = model.iter().map(|(first, (last, _))| *first..=*last).collect();
        for range in ranges {
            let mut emptied = Vec::new();
            writer.remove(&table, range, &mut emptied);
            writer.give_back(emptied);
        }
        let in_tree = writer.taken.len().saturating_sub(1) - writer.free.len();
        prop_assert!(in_tree <= 1, "{in_tree} nodes remain");
    }
}

#[test]
fn a_page_beyond_what_the_tree_resolves_is_nowhere() {
    let (table, mut writer) = (PageTable::default(), PageTableWriter::default());
    assert_eq!(table.find(0), None);
    writer.insert(&table, 3..=3, 7).unwrap();
    assert_eq!([0, 3, 4, 64, LAST, u64::MAX].map(|page| table.find(page)), [None, Some(7), None, None, None, None]);
}

/// Pages scattered so that each needs a path of its own use the nodes up; what did not fit leaves nothing behind.
#[test]
fn it_fills_up_and_empties_again() {
    let (table, mut writer) = (PageTable::default(), PageTableWriter::default());
    let page = |number: u64| number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 12;
    let mut count = 0;
    while writer.insert(&table, page(count)..=page(count), count as u32).is_ok() {
        count += 1;
        assert!(count < 1 << 20, "it never fills up");
    }
    assert!(count > 10_000, "full after {count}");
    assert_eq!(table.find(page(count)), None);
    assert!((0..count).all(|number| table.find(page(number)) == Some(number as u32)));
    let mut emptied = Vec::new();
    (0..count).for_each(|number| writer.remove(&table, page(number)..=page(number), &mut emptied));
    writer.give_back(emptied);
    assert!((0..count).all(|number| table.find(page(number)).is_none()));
    writer.insert(&table, page(count)..=page(count), 1).unwrap();
}

/// Readers beside a writer see ranges that stay, and of the others their own record or nothing.
#[test]
fn readers_walk_while_it_changes() {
    const STAYING: u64 = 64;
    let (table, ended) = (PageTable::default(), AtomicBool::new(false));
    let mut writer = PageTableWriter::default();
    for number in 0..STAYING {
        writer.insert(&table, number * 1000..=number * 1000 + 9, number as u32).unwrap();
    }
    let changing = |number: u64| number * 1000 + 20..=number * 1000 + 20 + number * 3;
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut found = 0_u64;
            while !ended.load(Ordering::Relaxed) {
                for number in 0..STAYING {
                    assert_eq!(table.find(number * 1000 + number % 10), Some(number as u32));
                    let seen = table.find(number * 1000 + 20 + number);
                    assert!(seen.is_none() || seen == Some(1000 + number as u32), "{number}: {seen:?}");
                    found += u64::from(seen.is_some());
                }
            }
            found
        });
        for round in 0..200 {
            // Nodes are not given back while somebody reads: they are what a later round takes.
            let mut emptied = Vec::new();
            for number in 0..STAYING {
                writer.insert(&table, changing(number), 1000 + number as u32).unwrap();
            }
            if round == 100 {
                writer.insert(&table, LAST..=LAST, 1 << 20).unwrap();
            }
            for number in 0..STAYING {
                writer.remove(&table, changing(number), &mut emptied);
            }
        }
        ended.store(true, Ordering::Relaxed);
        assert!(reader.join().is_ok());
    });
}
