//! The record of requests in flight, as a front end asks for it and hands it over.

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;

use super::fake::{Bed, Call, QUEUES, SIZE_MAX};
use crate::inflight::{QueueRecord, RecordIdentity};
use crate::virtqueue::features;

fn start(guest: &mut super::fake::Guest, index: usize) {
    let queue = guest.queue(16);
    guest.front_end.start_queue(index, 16, &queue).unwrap();
}

fn identities(bed: &Bed) -> Vec<Option<RecordIdentity>> {
    let of = |record: &super::fake::Record| {
        record.running.values().map(|start| start.inflight.as_ref().map(QueueRecord::identity)).collect()
    };
    bed.function.with(|record| of(record))
}

#[test]
fn each_queue_gets_its_region_of_the_record_that_the_front_end_keeps() {
    for wanted in [0, features::RING_PACKED] {
        let bed = Bed::server("record");
        let mut guest = bed.connect(wanted);
        let record = guest.front_end.make_record(QUEUES, SIZE_MAX).unwrap();
        let entry = if wanted == 0 { 16 } else { 32 };
        assert_eq!(record.file().metadata().unwrap().len(), u64::from(QUEUES) * (u64::from(SIZE_MAX) * entry + 64));
        // Made, but not yet handed over: the queue runs without.
        start(&mut guest, 0);
        assert_eq!(identities(&bed), [None]);
        guest.front_end.hand_over_record(&record).unwrap();
        start(&mut guest, 2);
        let before = identities(&bed);
        assert!(matches!(before[..], [Some(first), Some(second)] if first != second), "{before:?}");
        drop(guest);
        bed.function.wait_for_detached(1);
        // The next connection knows nothing of it before it is told.
        let mut guest = bed.connect(wanted);
        guest.front_end.hand_over_record(&record).unwrap();
        start(&mut guest, 0);
        start(&mut guest, 2);
        assert_eq!(identities(&bed), before, "the same memory, seen through another descriptor");
        guest.front_end.messages().reset_device().unwrap();
        start(&mut guest, 0);
        assert_eq!(identities(&bed), [None], "a reset forgets it");
    }
}

#[test]
fn a_record_that_does_not_fit_is_refused() {
    let bed = Bed::server("bad-record");
    let mut guest = bed.connect(0);
    let record = guest.front_end.make_record(QUEUES, SIZE_MAX).unwrap();
    let length = record.file().metadata().unwrap().len();
    let fd = std::os::fd::AsRawFd::as_raw_fd(record.file());
    for (bytes, offset, queues, size) in [
        (length, 0, QUEUES + 1, SIZE_MAX),
        (length, 0, QUEUES, SIZE_MAX + 1),
        (length - 1, 0, QUEUES, SIZE_MAX),
        (length, 4096, QUEUES, SIZE_MAX),
        (length, 1, QUEUES, SIZE_MAX),
        (u64::MAX, u64::MAX, QUEUES, SIZE_MAX),
    ] {
        let said = VhostUserInflight::new(bytes, offset, queues, size);
        assert!(guest.front_end.messages().set_inflight_fd(&said, fd).is_err(), "{bytes} at {offset}");
    }
    start(&mut guest, 0);
    assert_eq!(identities(&bed), [None], "the conversation goes on");
    assert_eq!(bed.warnings().len(), 1, "{:?}", bed.warnings());
    // What cannot be answered ends the conversation.
    assert!(guest.front_end.make_record(QUEUES + 1, SIZE_MAX).is_err());
    bed.function.wait_for_detached(1);
}

#[test]
fn a_ring_hands_over_where_its_front_end_asked_for_that_and_keeps_the_record() {
    use vhost::vhost_user::message::VhostUserProtocolFeatures as Protocol;
    let bit = Protocol::GET_VRING_BASE_INFLIGHT;
    let both = bit | Protocol::INFLIGHT_SHMFD;
    // What the function can, what the front end accepts, whether it gives a record; whether the ring hands over.
    for (can, accepted, record, hands_over) in [
        (true, both, true, true),
        (true, both, false, false),
        (true, Protocol::INFLIGHT_SHMFD, true, false),
        (true, bit, false, false),
        (false, Protocol::INFLIGHT_SHMFD, true, false),
    ] {
        let bed = Bed::server("hand-over");
        bed.function.with(|function| (function.hands_over, function.advance) = (can, 5));
        let mut guest = bed.connect(0);
        let offered = guest.front_end.messages().get_protocol_features().unwrap();
        assert_eq!(offered.contains(bit), can);
        guest.front_end.messages().set_protocol_features(accepted | Protocol::REPLY_ACK).unwrap();
        if record {
            let record = guest.front_end.make_record(QUEUES, SIZE_MAX).unwrap();
            guest.front_end.hand_over_record(&record).unwrap();
        }
        start(&mut guest, 0);
        let before = bed.function.with(|function| function.calls.len());
        assert_eq!(guest.front_end.stop_queue(0).unwrap(), 5);
        let call = if hands_over { Call::HandOver(0) } else { Call::Stop(0) };
        bed.function.with(|function| assert_eq!(function.calls[before..], [call], "{accepted:?}, record: {record}"));
        // QEMU disables a ring first, and asks for its base then.
        start(&mut guest, 0);
        let before = bed.function.with(|function| function.calls.len());
        guest.front_end.messages().set_vring_enable(0, false).unwrap();
        guest.front_end.stop_queue(0).unwrap();
        let call = if hands_over { Call::HandOver(0) } else { Call::Stop(0) };
        bed.function.with(|function| assert_eq!(function.calls[before..], [call], "{accepted:?}, record: {record}"));
        // A ring that only changes lets its requests end.
        start(&mut guest, 0);
        let stops = bed.function.count(&Call::Stop(0));
        guest.front_end.messages().set_vring_num(0, 8).unwrap();
        assert_eq!(bed.function.count(&Call::Stop(0)), stops + 1);
    }
}
