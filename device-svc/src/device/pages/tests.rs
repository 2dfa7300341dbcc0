use proptest::prelude::*;

use super::*;

#[test]
fn a_whole_pool_can_be_one_run() {
    let mut pages = Pages::new(CardAddress(0), 130);
    assert!(pages.take(131 * PAGE_BYTES).is_none());
    let all = pages.take(130 * PAGE_BYTES);
    assert!(all.is_some());
    assert!(pages.take(1).is_none());
    if let Some(all) = all {
        pages.give_back(all);
    }
    assert!(pages.take(1).is_some());
}

proptest! {
    #[test]
    fn runs_never_overlap_and_all_come_back(steps in proptest::collection::vec((any::<bool>(), 1u32..60_000), 1..300)) {
        let mut pages = Pages::new(CardAddress(4096), 200);
        let mut held: Vec<PageRun> = Vec::new();
        for (take, number) in steps {
            if take {
                if let Some(run) = pages.take(number) {
                    prop_assert!(run.first + run.count <= 200);
                    prop_assert!(run.count * PAGE_BYTES >= number);
                    for other in &held {
                        prop_assert!(run.first + run.count <= other.first || other.first + other.count <= run.first);
                    }
                    held.push(run);
                }
            } else if !held.is_empty() {
                let run = held.swap_remove(number as usize % held.len());
                pages.give_back(run);
            }
        }
        for run in held.drain(..) {
            pages.give_back(run);
        }
        prop_assert_eq!(pages.free, 200);
        prop_assert!(pages.take(200 * PAGE_BYTES).is_some());
    }
}
