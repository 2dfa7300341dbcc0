#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use super::*;

fn tether() -> (Arc<Tether>, OwnedFd) {
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
    (Arc::new(Tether::new(ours, false, LANGUAGE_FILES)), theirs)
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
    let keeper = answering(keeper, vec![Answer::Done, Answer::Done, Answer::Kept { number: 5 }, Answer::Done]);
    tether.ready(std::iter::once("g".to_owned())).unwrap();
    let (vmm, _far) = UnixStream::pair().unwrap();
    drop(tether.keep("f", &vmm).unwrap());
    let (wait, keep) = (Question::Await { function: "g".to_owned() }, Question::Keep { function: "f".to_owned() });
    let asked = [(wait, 0), (Question::Ready, 0), (keep, 2), (Question::End { number: 5 }, 0)];
    assert_eq!(keeper.join().unwrap(), asked);
}

#[test]
fn a_connection_does_not_end_when_the_service_makes_room() {
    let (tether, keeper) = tether();
    let answers = vec![Answer::Kept { number: 1 }, Answer::Done, Answer::Done, Answer::Nothing];
    let keeper = answering(keeper, answers);
    let claimed = tether.claim("f").unwrap().unwrap();
    claimed.connection.restored(Ok(()));
    tether.ready(std::iter::empty()).unwrap();
    tether.update("/new".into()).unwrap();
    assert!(tether.is_for_another());
    drop(claimed);
    assert!(tether.claim("g").unwrap().is_none());
    assert_eq!(keeper.join().unwrap().len(), 4);
}

#[test]
fn a_refusal_says_why_and_changes_nothing() {
    let (tether, keeper) = tether();
    let keeper = answering(keeper, vec![Answer::Done, Answer::Refused { why: "no".to_owned() }]);
    tether.ready(std::iter::empty()).unwrap();
    assert!(matches!(tether.update("/new".into()), Err(TetherError::Refused(why)) if why == "no"));
    assert!(!tether.is_for_another());
    keeper.join().unwrap();
}

#[test]
fn what_is_no_answer_is_an_error() {
    let (tether, keeper) = tether();
    send(&keeper, &"what?", &[]).unwrap();
    assert!(matches!(tether.ready(std::iter::empty()), Err(TetherError::Foreign(_))));
    drop(keeper);
    assert!(matches!(tether.ready(std::iter::empty()), Err(TetherError::Gone)));
}

#[test]
fn who_does_not_get_to_serve_leaves_all_as_it_was() {
    for (strict, ends) in [(true, false), (false, true)] {
        let (ours, keeper) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let tether = Arc::new(Tether::new(ours, strict, LANGUAGE_FILES));
        let answers = [Answer::Kept { number: 1 }, Answer::Kept { number: 2 }, Answer::Done];
        let keeper = answering(keeper, answers[..2 + usize::from(ends)].to_vec());
        let (good, bad) = (tether.claim("f").unwrap().unwrap(), tether.claim("g").unwrap().unwrap());
        good.connection.restored(Ok(()));
        bad.connection.restored(Err("other queues".to_owned()));
        if strict {
            assert!(
                matches!(tether.ready(std::iter::empty()), Err(TetherError::Refused(why)) if why == "other queues")
            );
        }
        drop((good, bad));
        let asked = keeper.join().unwrap();
        assert_eq!(asked.get(2).map(|(question, _)| question), ends.then_some(&Question::End { number: 2 }));
    }
}
