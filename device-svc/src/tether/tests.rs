#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use super::*;

fn tether() -> (Arc<Tether>, OwnedFd) {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
    (Arc::new(Tether::new(ours)), theirs)
}

/// A keeper that gives these answers; returns what it was asked.
fn answering(keeper: OwnedFd, answers: Vec<Answer>) -> std::thread::JoinHandle<Vec<(Question, usize)>> {
    std::thread::spawn(move || {
        let asked = answers.into_iter().map(|answer| {
            let (question, fds) = receive::<Question>(&keeper).unwrap();
            let (count, fds): (_, Vec<_>) = (fds.len(), fds.iter().map(AsFd::as_fd).collect());
            let back = if matches!(question, Question::Claim { .. }) && matches!(answer, Answer::Kept { .. }) {
                let (one, other) = UnixStream::pair().unwrap();
                return send(&keeper, &answer, &[one.as_fd(), other.as_fd()]).map(|()| (question, count)).unwrap();
            } else {
                fds
            };
            drop(back);
            send(&keeper, &answer, &[]).unwrap();
            (question, count)
        });
        asked.collect()
    })
}

#[test]
fn a_connection_is_kept_and_ends_when_it_is_dropped() {
    let (tether, keeper) = tether();
    let keeper = answering(keeper, vec![Answer::Kept { number: 5 }, Answer::Done]);
    let (vmm, _far) = UnixStream::pair().unwrap();
    drop(tether.keep("f", &vmm).unwrap());
    let keep = Question::Keep { function: "f".to_owned() };
    assert_eq!(keeper.join().unwrap(), [(keep, 2), (Question::End { number: 5 }, 0)]);
}

#[test]
fn a_connection_does_not_end_when_the_service_makes_room() {
    let (tether, keeper) = tether();
    let keeper = answering(keeper, vec![Answer::Kept { number: 1 }, Answer::Done, Answer::Nothing]);
    let claimed = tether.claim("f").unwrap().unwrap();
    tether.update("/new".into()).unwrap();
    assert!(tether.is_leaving());
    drop(claimed);
    assert!(tether.claim("g").unwrap().is_none());
    assert_eq!(keeper.join().unwrap().len(), 3);
}

#[test]
fn a_refusal_says_why_and_changes_nothing() {
    let (tether, keeper) = tether();
    let keeper = answering(keeper, vec![Answer::Refused { why: "no".to_owned() }]);
    assert!(matches!(tether.update("/new".into()), Err(TetherError::Refused(why)) if why == "no"));
    assert!(!tether.is_leaving());
    keeper.join().unwrap();
}

#[test]
fn what_is_no_answer_is_an_error() {
    let (tether, keeper) = tether();
    send(&keeper, &"what?", &[]).unwrap();
    assert!(matches!(tether.ready(), Err(TetherError::Foreign(_))));
    drop(keeper);
    assert!(matches!(tether.ready(), Err(TetherError::Gone)));
}
