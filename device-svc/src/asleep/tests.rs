use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicU16, Ordering, fence};

use super::*;
use crate::virtqueue::split::passes_event;

impl Flag for AtomicBool {
    fn set(&self, value: bool) {
        self.store(value, Ordering::Relaxed);
    }

    fn get(&self) -> bool {
        self.load(Ordering::Relaxed)
    }

    fn full_fence() {
        fence(Ordering::SeqCst);
    }
}

/// Two posters and a reactor that wants to sleep: it never sleeps with a message and no bell.
#[test]
fn no_wake_up_is_lost() {
    // Three threads have too many interleavings for all of them; each that switches at most four times against a thread's will is
    // tried, which is more than any known fault of this kind needs.
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(4);
    builder.check(|| {
        let asleep = Arc::new(Asleep::with(AtomicBool::new(false)));
        let messages = Arc::new(AtomicU16::new(0));
        let bell = Arc::new(AtomicBool::new(false));
        let posters: Vec<_> = (0..2)
            .map(|_| {
                let (asleep, messages, bell) = (Arc::clone(&asleep), Arc::clone(&messages), Arc::clone(&bell));
                loom::thread::spawn(move || {
                    messages.fetch_add(1, Ordering::Relaxed);
                    if asleep.must_ring() {
                        bell.store(true, Ordering::Release);
                    }
                })
            })
            .collect();
        let seen = messages.load(Ordering::Relaxed);
        let sleeps = asleep.prepare(|| messages.load(Ordering::Relaxed) == seen);
        for poster in posters {
            assert!(poster.join().is_ok());
        }
        if sleeps && messages.load(Ordering::Relaxed) != seen {
            assert!(bell.load(Ordering::Acquire), "asleep with a message and no bell");
        }
    });
}

/// A driver that adds one entry against a device that arms its doorbell by the event index (virtio 1.3, 2.7.10): the device
/// sees the entry, or the driver rings. And the same the other way round for interrupts, which have the same shape.
#[test]
fn the_event_index_loses_no_doorbell() {
    loom::model(|| {
        let avail_index = Arc::new(AtomicU16::new(7));
        let avail_event = Arc::new(AtomicU16::new(3));
        let driver = {
            let (index, event) = (Arc::clone(&avail_index), Arc::clone(&avail_event));
            loom::thread::spawn(move || {
                index.store(8, Ordering::Release);
                fence(Ordering::SeqCst);
                passes_event(event.load(Ordering::Relaxed), 7, 8)
            })
        };
        avail_event.store(7, Ordering::Release);
        fence(Ordering::SeqCst);
        let sees = avail_index.load(Ordering::Acquire) == 8;
        let rings = driver.join().unwrap_or(false);
        assert!(sees || rings, "the device sleeps and nobody rings");
    });
}
