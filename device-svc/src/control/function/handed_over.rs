//! Whether queues that were handed over come back as they went.
//!
//! A front end that stops a queue and starts it again, and one that has moved it to another card and back, say the same. But what this card
//! wrote before may be written again (to a server that was away and has lost it) only in the first case: in the second it is older than what
//! the other card wrote. The record of requests in flight tells the two apart: whoever runs a queue writes there.

use crate::inflight::QueueRecord;

/// What is known of the queues of a function.
#[derive(Debug)]
pub(super) struct HandedOver {
    /// The record of each queue that runs, and whether its ring is packed.
    running: Vec<Option<(QueueRecord, bool)>>,
    /// That of each queue which was handed over, as it was then.
    left: Vec<Option<(QueueRecord, bool, u64)>>,
    /// What was found when the first of those came back.
    unchanged: Option<bool>,
}

impl HandedOver {
    pub(super) fn new(queues: usize) -> Self {
        let mut own = Self { running: Vec::new(), left: Vec::new(), unchanged: None };
        own.running.resize_with(queues, || None);
        own.left.resize_with(queues, || None);
        own
    }

    /// A queue was handed over.
    pub(super) fn leaves(&mut self, queue: usize) {
        self.left[queue] = self.running[queue].take().map(|(record, packed)| {
            let then = record.fingerprint(packed);
            (record, packed, then)
        });
        self.unchanged = None;
    }

    /// A queue starts, with this record. Returns whether all that were handed over are as they were then.
    pub(super) fn starts(&mut self, queue: usize, record: Option<QueueRecord>, packed: bool) -> bool {
        let left = &self.left;
        let unchanged = *self.unchanged.get_or_insert_with(|| {
            let is_same = |(left, packed, then): &(QueueRecord, bool, u64)| left.fingerprint(*packed) == *then;
            let has_its_record =
                left[queue].as_ref().map(|(left, ..)| left.identity()) == record.as_ref().map(QueueRecord::identity);
            has_its_record && left.iter().flatten().all(is_same)
        });
        self.left[queue] = None;
        self.running[queue] = record.map(|record| (record, packed));
        unchanged
    }

    /// The front end is gone, or has reset the device: nothing comes back.
    pub(super) fn forget(&mut self) {
        *self = Self { unchanged: Some(false), ..Self::new(self.running.len()) };
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
    use super::*;
    use crate::inflight::{AreaShape, RecordArea, SplitRecord};

    #[test]
    fn queues_come_back_as_they_went_or_were_somewhere_else() {
        let shape = AreaShape { queues: 2, size: 16, packed: false };
        let file = shape.create().unwrap();
        let area = RecordArea::open(&file, 0, shape.bytes(), shape).unwrap();
        let record = |queue| area.queue(queue, false).unwrap();
        let attach = |queue| {
            let mut attached = SplitRecord::new(&record(queue));
            attached.attach(0, 16).unwrap();
            attached
        };
        let mut handed = HandedOver::new(2);
        handed.starts(0, Some(record(0)), false);
        handed.starts(1, Some(record(1)), false);
        let (mut first, _second) = (attach(0), attach(1));
        first.mark([3].into_iter());
        for queue in [0, 1] {
            handed.leaves(queue);
        }
        assert!(handed.starts(1, Some(record(1)), false));
        first.mark([4].into_iter());
        assert!(handed.starts(0, Some(record(0)), false), "what was found with the first holds for all");
        for queue in [0, 1] {
            handed.leaves(queue);
        }
        // Another card has fetched something from the other queue.
        first.mark([5].into_iter());
        assert!(!handed.starts(1, Some(record(1)), false));
        assert!(!handed.starts(0, Some(record(0)), false));
        for queue in [0, 1] {
            handed.leaves(queue);
        }
        assert!(!handed.starts(0, Some(record(1)), false), "it is another record");
        handed.leaves(0);
        handed.forget();
        assert!(!handed.starts(0, Some(record(0)), false), "the front end was gone");
    }
}
