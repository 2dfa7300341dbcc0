//! How link and front end find each other, again and again.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};

use super::super::*;
use super::fake::{Bed, Call, FakeFunction, PATIENCE};
use super::raw::{self, RawFrontEnd};

fn settings(socket: &std::path::Path, role: Role) -> VhostUserSettings {
    VhostUserSettings { function: "other".to_owned(), socket: socket.to_owned(), role }
}

fn start(settings: VhostUserSettings) -> Result<VhostUserLink, LinkError> {
    VhostUserLink::start(settings, Arc::new(FakeFunction::default()), None)
}

#[test]
fn front_ends_connect_again_and_again() {
    let bed = Bed::server("again");
    for number in 1..=50 {
        let mut guest = bed.connect(0);
        let queue = guest.queue(16);
        let _events = guest.front_end.start_queue(0, 16, &queue).unwrap();
        // Left in every way: stopped or not, at once followed by the next.
        if number % 2 == 0 {
            guest.front_end.stop_queue(0).unwrap();
        }
    }
    bed.function.wait_for_detached(50);
    assert_eq!(bed.function.count(&Call::Attach), 50);
    assert!(bed.function.with(|record| record.memory.regions().is_empty()), "no memory of a front end stays");
    assert!(bed.warnings().is_empty(), "{:?}", bed.warnings());
}

#[test]
fn a_second_front_end_waits_for_the_first_to_go() {
    let bed = Bed::server("second");
    let first = RawFrontEnd::negotiated(&bed.socket(), 1 << 32);
    let mut second = RawFrontEnd::connect(&bed.socket());
    second.send(raw::GET_FEATURES, raw::PLAIN, &[], &[]);
    assert_eq!(bed.function.count(&Call::Attach), 1);
    drop(first);
    assert_eq!(second.reply(raw::GET_FEATURES).len(), 8);
    let calls = bed.function.with(|record| record.calls.clone());
    let detached = calls.iter().position(|call| *call == Call::Detach).unwrap();
    assert_eq!(calls.iter().rposition(|call| *call == Call::Attach), Some(detached + 1));
}

#[test]
fn a_socket_has_its_permissions_and_goes_with_its_link() {
    for mode in [0o600, 0o660, 0o777] {
        let bed = Bed::start("mode", Role::Server { mode });
        let metadata = bed.socket().symlink_metadata().unwrap();
        assert_eq!(metadata.permissions().mode() & 0o777, mode);
        let Bed { link, folder, .. } = bed;
        drop(link);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "nothing is left behind");
    }
}

#[test]
fn a_socket_in_use_is_refused_and_a_dead_one_replaced() {
    let bed = Bed::server("in-use");
    let role = Role::Server { mode: 0o600 };
    assert!(matches!(start(settings(&bed.socket(), role)), Err(LinkError::InUse(_))));
    // The one that listens there was asked, and serves on.
    drop(bed.connect(0));

    let dead = bed.folder.path().join("dead.sock");
    drop(UnixListener::bind(&dead).unwrap());
    let link = start(settings(&dead, role)).unwrap();
    drop(UnixStream::connect(&dead).unwrap());
    // Somebody else's socket in our place is not removed.
    std::fs::remove_file(&dead).unwrap();
    let _other = UnixListener::bind(&dead).unwrap();
    drop(link);
    assert!(dead.exists());

    let file = bed.folder.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    assert!(matches!(start(settings(&file, role)), Err(LinkError::NotASocket(_))));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
    let nowhere = bed.folder.path().join("none/f.sock");
    assert!(matches!(start(settings(&nowhere, role)), Err(LinkError::System { .. })));
}

/// Says hello as a front end that listens, and listens to the answer.
fn converse(listener: &UnixListener) -> RawFrontEnd {
    let (stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut front_end = RawFrontEnd(stream);
    front_end.send(raw::GET_FEATURES, raw::PLAIN, &[], &[]);
    assert_eq!(front_end.reply(raw::GET_FEATURES).len(), 8);
    front_end
}

#[test]
fn a_client_connects_whenever_somebody_listens() {
    let mut bed = Bed::start("client", Role::Client);
    // Nobody listens yet, then somebody does, hangs up, goes away, and comes back.
    for round in 1..=2 {
        let listener = UnixListener::bind(bed.socket()).unwrap();
        drop(converse(&listener));
        drop(converse(&listener));
        bed.function.wait_for_detached(2 * round);
        drop(listener);
        std::fs::remove_file(bed.socket()).unwrap();
    }
    // It ends at once though nobody listens, and though somebody does.
    bed.link.stop();
    let bed = Bed::start("client-2", Role::Client);
    let listener = UnixListener::bind(bed.socket()).unwrap();
    let mut front_end = converse(&listener);
    let Bed { link, function, .. } = bed;
    drop(link);
    front_end.wait_for_end();
    function.wait_for_detached(1);
}

#[test]
fn half_a_message_stalls_no_other_connection() {
    let (mut half, other) = (Bed::server("half"), Bed::server("other-half"));
    let mut front_end = RawFrontEnd::negotiated(&half.socket(), 1 << 32);
    // Half a header, then a whole header without its body.
    let bytes = raw::message(raw::SET_VRING_NUM, raw::NEED_REPLY, &raw::state(0, 64));
    front_end.0.write_all(&bytes[..5]).unwrap();
    drop(other.connect(0));
    front_end.0.write_all(&bytes[5..12]).unwrap();
    let mut guest = other.connect(0);
    assert_eq!(guest.front_end.queue_count().unwrap(), 4);
    // The rest comes, and all is well.
    front_end.0.write_all(&bytes[12..]).unwrap();
    assert_eq!(front_end.reply(raw::SET_VRING_NUM), raw::words(&[0]));
    // A link whose front end is in the middle of a message ends all the same.
    front_end.0.write_all(&bytes[..14]).unwrap();
    half.link.stop();
    assert_eq!(half.function.count(&Call::Detach), 1);
    front_end.wait_for_end();
}

#[test]
fn a_link_that_stops_lets_its_queues_finish_before_it_hangs_up() {
    let mut bed = Bed::server("drain");
    let mut guest = bed.connect(0);
    let queues = [guest.queue(16), guest.queue(16)];
    let _events: Vec<_> = (0..2).map(|index| guest.front_end.start_queue(index, 16, &queues[index]).unwrap()).collect();
    bed.link.stop();
    let calls = bed.function.with(|record| record.calls.clone());
    let at = |call: &Call| calls.iter().position(|other| other == call);
    assert!(at(&Call::Stop(0)) < at(&Call::Detach) && at(&Call::Stop(1)) < at(&Call::Detach), "{calls:?}");
    assert!(at(&Call::Stop(0)).is_some() && at(&Call::Stop(1)).is_some(), "{calls:?}");

    // A front end that asks and asks and does not read keeps nobody.
    let mut bed = Bed::server("drain-2");
    let mut front_end = RawFrontEnd::connect(&bed.socket());
    bed.function.wait_for(|record| record.calls.contains(&Call::Attach));
    front_end.0.set_nonblocking(true).unwrap();
    let question = raw::message(raw::GET_FEATURES, raw::PLAIN, &[]);
    while front_end.0.write(&question).is_ok_and(|written| written == question.len()) {}
    bed.link.stop();
    assert_eq!(bed.function.count(&Call::Detach), 1);
}
